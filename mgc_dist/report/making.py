"""The parts of a page that say how the model came about: data, settings, curves, bias, cost."""

import shlex
import statistics
from collections import Counter
from itertools import accumulate

from mgc_dist import cli
from mgc_dist.bias_model.table import Header
from mgc_dist.config import TrainConfig
from mgc_dist.config.knobs import flag
from mgc_dist.config.source import table_of
from mgc_dist.config.train import DataConfig
from mgc_dist.data.manifest import Manifest
from mgc_dist.events import RefusedEvent, SaveFailedEvent, StepEvent, ValidationEvent, only
from mgc_dist.packing import card
from mgc_dist.packing.splits import rule_of
from mgc_dist.report import bias_report, figures
from mgc_dist.report.canvas import SECOND
from mgc_dist.report.dossier import Dossier
from mgc_dist.report.figures import Line, Point
from mgc_dist.report.section import Drawing, Section, Table

_NO_CONFIG = "config.yaml is not there, or of another version."


def data(dossier: Dossier) -> Section:
    """What was learned from, and what the split controls."""
    title = "What it learned from"
    if dossier.trained_on is None:
        name = str(dossier.environment.get("dataset_id", "unknown"))
        note = (
            f"Data set {name[:12]}; its shards are not where they were, or were packed again, "
            "so nothing more can be said about it."
        )
        return Section(title=title, notes=(note,))
    folder, of = dossier.trained_on
    settings = of.settings
    segment_s, hop_s = (
        int(n) / of.sample_rate for n in (of.segment_samples, settings["hop_samples"])
    )
    rows = tuple(
        (name, str(len({t.genre for t in of.tracks if t.split == name})), *values[:4])
        for name, *values in card.split_rows(of)
    )
    known = sum(track.group is not None for track in of.tracks)
    rule = [f"{name} {settings[name]}" for name in rule_of(settings).knobs]
    return Section(
        title=title,
        facts=(
            ("data set", of.dataset_id[:12]),
            ("shards", str(folder)),
            ("split rule", ", ".join([str(settings["split"]), *rule])),
            ("segments", f"{segment_s:g} s every {hop_s:g} s"),
        ),
        tables=(
            Table(label="splits", columns=("split", "genres", *card.SPLIT_COLUMNS[:4]), rows=rows),
        ),
        bullets=(
            f"Checked when packing and at each loading: {card.kept_apart(known)}.",
            *(f"Not controlled: {limit}" for limit in card.limits(of)),
            *(f"Left out: {line}" for line in card.left_out(of)),
        ),
    )


def training(dossier: Dossier) -> Section:
    """Model, loss, bias table, engine, versions."""
    title, config, env = "How it was trained", dossier.config, dossier.environment
    if config is None:
        return Section(title=title, notes=(_NO_CONFIG,))
    precision: str = config.engine.precision
    if precision == "auto" and "torch_autocast" in dossier.engine:
        autocast = dossier.engine["torch_autocast"]
        name = "fp16" if autocast.get("dtype") == "float16" else "bf16"
        precision += f", {name} autocast" if autocast["enabled"] else ", fp32"
    versions = ", ".join(f"{name} {value}" for name, value in env.get("versions", {}).items())
    frozen = "nothing" if config.main.freeze == "none" else config.main.freeze
    if config.main.lora:
        frozen += f", and all above it but the head and adapters ({config.main.lora})"
    facts = (
        ("main model", config.main.model),
        ("frozen", frozen),
        ("loss", config.objective.description),
        ("bias table", _table(dossier, config)),
        ("epochs", f"{config.optim.epochs:g}"),
        ("learning rates", f"{config.optim.lr:g}, head {config.optim.head_lr:g}"),
        ("global batch", str(config.optim.global_batch)),
        ("ranks", f"{env.get('world', '?')} on {env.get('device', '?')}"),
        ("ZeRO stage", str(config.engine.zero_stage)),
        ("precision", precision),
        ("seed", str(config.output.seed)),
        ("versions", versions or "unknown"),
    )
    git = (("git", str(env["git"])),) if env.get("git") else ()
    return Section(title=title, facts=facts + git)


def _table(dossier: Dossier, config: TrainConfig) -> str:
    if not config.objective.needs_bias:
        return "none: plain cross-entropy"
    recorded = dossier.environment.get("bias_table") or {}
    if recorded.get("fold_status") == "unknown":
        return f"{recorded.get('name')}, from elsewhere: it may have seen what it judges"
    if dossier.bias is None:
        return f"{config.data.table}, which is not there now"
    report, header = dossier.bias
    status = report.get("fold_status", "out of fold")
    return f"{header.backbone}, table {header.table_sha256[:12]}, {status}"


def curves(dossier: Dossier) -> Section:
    """Loss, validation and learning rate over epochs."""
    title, steps = "How it went", dossier.history(StepEvent)
    if not steps:
        return Section(title=title, notes=("metrics.jsonl holds no steps.",))
    resumed = [
        (before[-1], "resumed")
        for span in dossier.spans[1:]
        if (before := [s.epoch for s in steps if s.samples_seen <= span.samples_seen])
    ]
    drawn = (_loss(steps, resumed), _validation(dossier), _rates(steps, resumed))
    return Section(title=title, drawings=tuple(each for each in drawn if each))


def _loss(steps: list[StepEvent], resumed: list[tuple[float, str]]) -> Drawing | None:
    points = [(s.epoch, s.loss) for s in steps if s.loss is not None]
    if not points:
        return None
    many = len(points) > 15
    drawn = [Line(name="each step", points=points, faint=many)]
    drawn += [Line(name="running mean", points=_smooth(points))] if many else []
    first, last = points[0][1], points[-1][1]
    return Drawing(
        name="loss",
        title="Training loss",
        label=f"Training loss from {first:.3f} to {last:.3f} over {len(points)} points",
        figure=figures.lines(drawn, x_title="epoch", y_title="loss", marks=resumed),
        about="Dotted: where the run was resumed." if resumed else "",
    )


def _smooth(points: list[Point]) -> list[Point]:
    """Running mean over a tenth of the points, half of them before each and half behind."""
    half = max(2, len(points) // 20)
    sums = [0.0, *accumulate(y for _, y in points)]
    out = []
    for k, (x, _) in enumerate(points):
        first, stop = max(0, k - half), min(len(points), k + half + 1)
        out.append((x, (sums[stop] - sums[first]) / (stop - first)))
    return out


def _validation(dossier: Dossier) -> Drawing | None:
    checks, best = dossier.history(ValidationEvent), dossier.best
    if not checks:
        return None
    accuracy = [(c.epoch, c.track_accuracy) for c in checks]
    macro_f1 = [(c.epoch, c.track_macro_f1) for c in checks]
    genres = len(dossier.genres)
    dots = len(checks) < 40
    figure = figures.lines(
        [
            Line(name="track accuracy", points=accuracy, color=SECOND, dots=dots),
            Line(name="macro-F1", points=macro_f1, dots=dots),
        ],
        x_title="epoch",
        y_title="tracks",
        y_range=(0, 1),
        level=(1 / genres, "chance") if genres else None,
        marks=[(best.epoch, "the model that was kept")] if best else [],
    )
    return Drawing(
        name="validation",
        title="Validation",
        label=f"Validation: track accuracy {accuracy[-1][1]:.3f} and macro-F1 "
        f"{macro_f1[-1][1]:.3f} at the end, of {len(checks)} validations",
        figure=figure,
        about=f"Dotted: epoch {best.epoch:.2f}, whose model was kept." if best else "",
    )


def _rates(steps: list[StepEvent], resumed: list[tuple[float, str]]) -> Drawing | None:
    points = [(s.epoch, s.lr) for s in steps]
    if not points:
        return None
    heads = [s.head_lr / s.lr for s in steps if s.lr and s.head_lr]
    line = Line(name="", points=points)
    return Drawing(
        name="learning-rate",
        title="Learning rate",
        label=f"Learning rate, at most {max(rate for _, rate in points):.2e}",
        figure=figures.lines([line], x_title="epoch", y_title="rate", marks=resumed),
        about=f"Of the backbone; the head's is {heads[-1]:g} times as high." if heads else "",
    )


def bias(dossier: Dossier) -> Section | None:
    """What the bias model knows."""
    if dossier.config is not None and not dossier.config.objective.needs_bias:
        return None
    if dossier.bias is None:
        table_is = "The bias table of the training is from elsewhere, gone or made again since:"
        note = f"{table_is} there is no report of it."
        return Section(title="What the bias model explains", notes=(note,))
    return bias_report.section(dossier.bias[0])


def cost(dossier: Dossier) -> Section:
    """Time, speed, memory, tries."""
    title = "What it cost"
    spans, steps = dossier.spans, only(dossier.events, StepEvent)
    if not spans:
        return Section(title=title, notes=("metrics.jsonl tells of no try.",))
    facts = [("wall time", _hours(sum(span.ended_at_s - span.started_at_s for span in spans)))]
    for name, given in (
        ("segments/s", [step.segments_per_s for step in steps]),
        ("seconds a step", [step.step_s for step in steps]),
        ("TFLOP/s of a rank", [step.model_tflop_per_s for step in steps]),
        ("of its bf16 peak (MFU), %", [100 * step.mfu for step in steps if step.mfu is not None]),
    ):
        if values := [value for value in given if value is not None]:
            low, middle, high = min(values), statistics.median(values), max(values)
            facts.append((name, f"{middle:.4g} (median), {low:.4g} to {high:.4g}"))
    if steps:
        waits = [step.data_wait_share for step in steps]
        facts.append(("waiting for data", f"{100 * statistics.fmean(waits):.2f} % of the time"))
        peak = max(step.peak_memory_gib for step in steps)
        facts.append(("peak memory", f"{peak:.2f} GiB on rank 0"))
    facts.append(("tries", _tries(dossier)))
    facts.append(("refused steps", str(len(only(dossier.events, RefusedEvent)))))
    facts.append(("failed saves", str(len(only(dossier.events, SaveFailedEvent)))))
    return Section(title=title, facts=tuple(facts))


def _tries(dossier: Dossier) -> str:
    outcomes = Counter(str(a.get("outcome")) for a in dossier.attempts if a.get("event") == "end")
    ends = [f"{count} {name}" for name, count in outcomes.items()]
    killed = len(dossier.spans) - sum(outcomes.values())
    ends += [f"{killed} without a last word"] if killed > 0 else []
    return f"{len(dossier.spans)} ({', '.join(ends)})" if ends else str(len(dossier.spans))


def _hours(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d} h"


def commands(dossier: Dossier) -> Section:
    """How to make it again."""
    title, config = "Making it again", dossier.config
    if config is None:
        return Section(title=title, notes=(_NO_CONFIG,))
    lines, shards = [], str(config.data.shards)
    if dossier.trained_on:
        lines.append(_shard_command(shards, dossier.trained_on[1]))
    if config.objective.needs_bias and dossier.bias and dossier.bias[1]:
        lines.append(_bias_command(config.data, dossier.bias[1]))
    again = f"{dossier.run}-again"
    train = [*cli.launched("train").split(), "--config", str(dossier.run / "config.yaml")]
    lines.append(shlex.join([*train, "--run", again, "--resume", "never"]))
    if config.objective.needs_bias:
        beside = ["--run", f"{dossier.run}-ce", "--resume", "never", "--loss", "ce"]
        lines.append(shlex.join([*train, *beside]))
    lines.append(f"{cli.launched('evaluate')} {shlex.quote(again)}")
    told = (
        f"It ran on {dossier.environment.get('world')} ranks; on as many the weights come out the "
        "same, on others to rounding. DATA is the folder of the tracks, with --groups for the "
        "artists if they were given."
    )
    return Section(title=title, code="\n".join(lines), paragraphs=(told,))


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
    for name in ("split_from", "max_segments"):
        if name in s:
            words += [flag(name), str(s[name])]
    words += ["--same-group"] if "same_group" in s else []
    if of.excluded:
        words += ["--allow-bad", str(len(of.excluded))]
    return shlex.join(words)


def _bias_command(data: DataConfig, header: Header) -> str:
    place = table_of(data.shards, data.bias_table, None)
    words = [*cli.launched("bias").split(), "--shards", str(data.shards)]
    words += ["--bias-table", str(place)]
    words += [] if data.source.fold is None else ["--fold", str(data.source.fold)]
    words += ["--backbone", header.backbone, "--layer", *map(str, header.layers)]
    words += ["--folds", str(header.folds), "--head-c", f"{header.head_c:g}"]
    return shlex.join([*words, "--seed", str(header.seed)])
