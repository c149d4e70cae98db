"""The parts of a report that say how the model came about: data, settings, curves, bias, cost."""

import shlex
import statistics
from collections import Counter
from collections.abc import Iterable
from itertools import accumulate

from mgc_dist.bias_model.table import Header
from mgc_dist.config import TrainConfig
from mgc_dist.config.knobs import flag
from mgc_dist.data.manifest import Manifest
from mgc_dist.packing import card
from mgc_dist.packing.splits import rule_of
from mgc_dist.report import svg
from mgc_dist.report.dossier import Dossier, Json
from mgc_dist.report.markup import Html, bullets, facts, figure, note, section, table, tag
from mgc_dist.report.svg import Bar, Line


def data(found: Dossier) -> Html:
    """What was learned from, and what the split controls."""
    title = "What it learned from"
    if found.trained_on is None:
        name = str(found.environment.get("dataset_id", "unknown"))
        return section(
            title,
            note(
                f"Data set {name[:12]}; its shards are not where they were, or were packed again, "
                "so nothing more can be said about it."
            ),
        )
    folder, of = found.trained_on
    rows = [
        (name, str(len({t.genre for t in of.tracks if t.split == name})), *values[:4])
        for name, *values in card.split_rows(of)
    ]
    limits = card.limits(of)
    known = sum(track.group is not None for track in of.tracks)
    seconds, hop_s = of.segment_samples / of.sample_rate, int(of.settings["hop_samples"])
    lines = [
        f"Checked when packing and at each loading: {card.kept_apart(known)}.",
        *(f"Not controlled: {limit}" for limit in limits),
        *(f"Left out: {line}" for line in card.left_out(of)),
    ]
    return section(
        title,
        facts(
            (
                ("data set", of.dataset_id[:12]),
                ("shards", str(folder)),
                ("split rule", _split_rule(of)),
                ("segments", f"{seconds:g} s every {hop_s / of.sample_rate:g} s"),
            )
        ),
        table("splits", ("split", "genres", *card.SPLIT_COLUMNS[:4]), rows),
        bullets(lines),
    )


def _split_rule(of: Manifest) -> str:
    told = [f"{name} {of.settings[name]}" for name in rule_of(of.settings).knobs]
    return ", ".join([str(of.settings["split"]), *told])


def training(found: Dossier) -> Html:
    """Model, loss, bias table, engine, versions."""
    title, config, env = "How it was trained", found.config, found.environment
    if config is None:
        return section(title, note("config.yaml is not there, or of another version."))
    precision: str = config.engine.precision
    if precision == "auto" and "torch_autocast" in found.engine:
        precision += ", bf16 autocast" if found.engine["torch_autocast"]["enabled"] else ", fp32"
    device = f"{env.get('world', '?')} on {env.get('device', '?')}"
    frozen = "nothing" if config.main.freeze == "none" else config.main.freeze
    versions = ", ".join(f"{name} {value}" for name, value in env.get("versions", {}).items())
    pairs = [
        ("main model", config.main.model),
        ("frozen", frozen),
        ("loss", config.objective.description),
        ("bias table", _table(found, config)),
        ("epochs", f"{config.optim.epochs:g}"),
        ("learning rates", f"{config.optim.lr:g}, head {config.optim.head_lr:g}"),
        ("global batch", str(config.optim.global_batch)),
        ("ranks", device),
        ("ZeRO stage", str(config.engine.zero_stage)),
        ("precision", precision),
        ("seed", str(config.output.seed)),
        ("versions", versions or "unknown"),
    ]
    if env.get("git"):
        pairs.append(("git", str(env["git"])))
    return section(title, facts(pairs))


def _table(found: Dossier, config: TrainConfig) -> str:
    if not config.objective.needs_bias:
        return "none: plain cross-entropy"
    report, header = found.bias or ({}, None)
    recorded = found.environment.get("bias_table") or {}
    if recorded.get("fold_status") == "unknown":
        return f"{recorded.get('name')}, from elsewhere: it may have seen what it judges"
    if header is None:
        return f"{config.data.table}, which is not there now"
    status = report.get("fold_status", "out of fold")
    return f"{header.backbone}, table {header.table_sha256[:12]}, {status}"


def curves(found: Dossier) -> Html:
    """Loss, validation and learning rate over epochs."""
    title = "How it went"
    steps, checks = found.history("step"), found.history("validation")
    if not steps:
        return section(title, note("metrics.jsonl holds no steps."))
    spans = found.spans[1:]
    resumed = [
        (at, "resumed")
        for at in (_epoch_at(span.samples_seen, steps) for span in spans)
        if at is not None
    ]
    about = "Dotted: where the run was resumed." if resumed else ""
    loss = [(s["epoch"], s["loss"]) for s in steps if s.get("loss") is not None]
    parts = []
    if loss:
        drawn = [Line(name="each step", points=loss, style="faint")]
        drawn += [Line(name="running mean", points=_smooth(loss))] if len(loss) > 15 else []
        label = f"Training loss from {loss[0][1]:.3f} to {loss[-1][1]:.3f} over {len(loss)} points"
        shown = svg.lines(label, drawn, x_title="epoch", y_title="loss", marks=resumed)
        parts.append(figure("Training loss", shown, about=about))
    if checks:
        parts.append(_validation(found, checks))
    rates = [(s["epoch"], s["lr"]) for s in steps if s.get("lr") is not None]
    if rates:
        heads = [s["head_lr"] / s["lr"] for s in steps if s.get("lr") and s.get("head_lr")]
        told = f"Of the backbone; the head's is {heads[-1]:g} times as high." if heads else ""
        label = f"Learning rate, at most {max(rate for _, rate in rates):.2e}"
        shown = svg.lines(
            label, [Line(name="", points=rates)], x_title="epoch", y_title="rate", marks=resumed
        )
        parts.append(figure("Learning rate", shown, about=told))
    return section(title, tag("div", *parts, class_="figures"))


def _validation(found: Dossier, checks: list[Json]) -> Html:
    accuracy = [(c["epoch"], c["track_accuracy"]) for c in checks]
    macro_f1 = [(c["epoch"], c["track_macro_f1"]) for c in checks]
    best = found.best
    marks = [(best["epoch"], "the model that was kept")] if best else []
    genres = next((len(e["genres"]) for e in found.events if e.get("genres")), 0)
    shown = svg.lines(
        f"Validation: track accuracy {accuracy[-1][1]:.3f} and macro-F1 {macro_f1[-1][1]:.3f} at "
        f"the end, of {len(checks)} validations",
        [
            Line(name="track accuracy", points=accuracy, style="second", dots=len(checks) < 40),
            Line(name="macro-F1", points=macro_f1, dots=len(checks) < 40),
        ],
        x_title="epoch",
        y_title="tracks",
        y_range=(0, 1),
        level=(1 / genres, "chance") if genres else None,
        marks=marks,
    )
    kept = f"Dotted: epoch {best['epoch']:.2f}, whose model was kept." if best else ""
    return figure("Validation", shown, about=kept)


def _epoch_at(seen: int, steps: list[Json]) -> float | None:
    """The epoch of the last step that a resumed try built upon."""
    before = [step["epoch"] for step in steps if step["samples_seen"] <= seen]
    return float(before[-1]) if before else None


def _smooth(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Running mean over a tenth of the points, half of them before each and half behind."""
    half = max(2, len(points) // 20)
    sums = [0.0, *accumulate(y for _, y in points)]
    out = []
    for k, (x, _) in enumerate(points):
        first, stop = max(0, k - half), min(len(points), k + half + 1)
        out.append((x, (sums[stop] - sums[first]) / (stop - first)))
    return out


def bias(found: Dossier) -> Html | None:
    """What the bias model knows."""
    if found.config is not None and not found.config.objective.needs_bias:
        return None
    title = "What the bias model explains"
    if found.bias is None:
        table_is = "The bias table of the training is from elsewhere, gone or made again since:"
        return section(title, note(f"{table_is} there is no report of it."))
    report, _ = found.bias
    splits = report.get("splits") or {k: report[k] for k in ("train", "validation", "test")}
    rows = [
        (name, str(one["count"]), *(f"{one[key]:.3f}" for key in ("accuracy", "nll", "ece")))
        for name, one in splits.items()
    ]
    counts = report["truth_histogram"]
    size, total = report["effective_sample_size"], sum(counts)
    label = f"Probability that the bias model gives to the truth, {total} training segments"
    warnings = report.get("warnings") or []
    return section(
        title,
        tag("ul", *(tag("li", line) for line in warnings), class_="warning") if warnings else None,
        table("bias model", ("split", "segments", "accuracy", "NLL", "ECE"), rows),
        figure(
            "Probability of the truth",
            svg.columns(
                label, counts, x_title="probability of the truth", y_title="training segments"
            ),
            about="Training segments, by heads that did not see their tracks, nor their artists "
            "where known. Far right: what the shortcut explains. Effective size of the rest: "
            f"{size:.0f} of {total} segments.",
        ),
        _bias_by_genre(report),
    )


def _bias_by_genre(report: Json) -> Html | None:
    if not report.get("per_genre"):
        return None
    drawn = [
        Bar(name=genre, value=one["accuracy"], note=f"of {one['rows']}")
        for genre, one in report["per_genre"].items()
    ]
    rows = [
        (
            genre,
            *(
                str(one.get(key, "-"))
                for key in (
                    "aligned_rows",
                    "conflicting_rows",
                    "aligned_tracks",
                    "conflicting_tracks",
                )
            ),
        )
        for genre, one in report["per_genre"].items()
    ]
    columns = ("genre", "segments with", "against", "tracks with", "against")
    label = "Accuracy of the bias model by genre"
    return tag(
        "details",
        tag("summary", "by genre"),
        figure(
            "Accuracy of the bias model",
            svg.bars(label, drawn),
            about="Segments of each genre; below, how many go with the bias model and against it.",
        ),
        table("bias by genre", columns, rows),
    )


def cost(found: Dossier) -> Html:
    """Time, speed, memory, tries."""
    spans, steps = found.spans, [e for e in found.events if e.get("event") == "step"]
    if not spans:
        return section("What it cost", note("metrics.jsonl tells of no try."))
    names = Counter(e.get("event") for e in found.events)
    pairs = [("wall time", _hours(sum(span.ended_at_s - span.started_at_s for span in spans)))]
    for title, key, unit in (
        ("segments/s", "segments_per_s", 1.0),
        ("seconds a step", "step_s", 1.0),
        ("TFLOP/s of a rank", "model_tflop_per_s", 1.0),
        ("of its bf16 peak (MFU), %", "mfu", 100.0),
    ):
        if values := [unit * value for value in _numbers(steps, key)]:
            low, middle, high = min(values), statistics.median(values), max(values)
            pairs.append((title, f"{middle:.4g} (median), {low:.4g} to {high:.4g}"))
    waits = _numbers(steps, "data_wait_share")
    if waits:
        pairs.append(("waiting for data", f"{100 * statistics.fmean(waits):.2f} % of the time"))
    peaks = _numbers(steps, "peak_memory_gib")
    if peaks:
        pairs.append(("peak memory", f"{max(peaks):.2f} GiB on rank 0"))
    outcomes = Counter(str(a.get("outcome")) for a in found.attempts if a.get("event") == "end")
    killed = len(spans) - sum(outcomes.values())
    told = ", ".join(f"{count} {name}" for name, count in outcomes.items())
    ends = told + (f"{', ' if told else ''}{killed} without a last word" if killed > 0 else "")
    pairs.append(("tries", f"{len(spans)} ({ends})" if ends else str(len(spans))))
    pairs.append(("refused steps", str(names["refused"])))
    pairs.append(("failed saves", str(names["save_failed"])))
    return section("What it cost", facts(pairs))


def _numbers(events: Iterable[Json], key: str) -> list[float]:
    return [float(event[key]) for event in events if event.get(key) is not None]


def _hours(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d} h"


def commands(found: Dossier) -> Html:
    """How to make it again."""
    title, config = "Making it again", found.config
    if config is None:
        return section(title, note("config.yaml is not there, or of another version."))
    lines, shards = [], str(config.data.shards)
    if found.trained_on:
        lines.append(_shard_command(shards, found.trained_on[1]))
    if config.objective.needs_bias and found.bias and found.bias[1]:
        lines.append(_bias_command(shards, str(config.data.table), found.bias[1]))
    again = f"{found.run}-again"
    settings = str(found.run / "config.yaml")
    train = ["deepspeed", "launch/train.py", "--config", settings, "--run", again]
    lines.append(shlex.join([*train, "--resume", "never"]))
    if config.objective.needs_bias:
        beside = ["--run", f"{found.run}-ce", "--resume", "never", "--loss", "ce"]
        lines.append(shlex.join([*train[:4], *beside]))
    lines.append(shlex.join(["deepspeed", "launch/evaluate.py", again]))
    world = found.environment.get("world")
    return section(
        title,
        tag("pre", "\n".join(lines), tabindex=0),
        tag(
            "p",
            f"It ran on {world} ranks; on as many the weights come out the same, on others to "
            "rounding. DATA is the folder of the tracks, with --groups for the artists if they "
            "were given.",
        ),
    )


def _shard_command(shards: str, of: Manifest) -> str:
    s, rate = of.settings, of.sample_rate
    words = ["python", "-m", "mgc_dist.shard", "--data", "DATA", "--out", shards]
    words += ["--segment-s", f"{of.segment_samples / rate:g}"]
    words += ["--hop-s", f"{int(s['hop_samples']) / rate:g}", "--sample-rate", str(rate)]
    words += ["--rows-per-shard", str(s["rows_per_shard"]), "--split", str(s["split"])]
    rule = rule_of(s)
    for name in rule.knobs:
        words += [flag(name), str(s[name])]
    words += rule.files
    if of.excluded:
        words += ["--allow-bad", str(len(of.excluded))]
    return shlex.join(words)


def _bias_command(shards: str, place: str, header: Header) -> str:
    words = ["deepspeed", "launch/bias.py", "--shards", shards, "--bias-table", place]
    words += ["--backbone", header.backbone, "--layer", *map(str, header.layers)]
    words += ["--folds", str(header.folds), "--head-c", f"{header.head_c:g}"]
    return shlex.join([*words, "--seed", str(header.seed)])
