"""The report of a bias table, shown: on the terminal, as files beside the table, on a page."""

import json
import math
from pathlib import Path

from rich.console import Console
from rich.table import Table as Grid

from mgc_dist.bias_model import probe_share, summary
from mgc_dist.bias_model import table as tables
from mgc_dist.bias_model.probe_share import share
from mgc_dist.bias_model.summary import GENRE_TOO_GOOD
from mgc_dist.data.reader import ShardSet
from mgc_dist.data.tracks import SPLITS
from mgc_dist.files import replace_text
from mgc_dist.report import canvas, figures
from mgc_dist.report.section import Drawing, Section, Table
from mgc_dist.scoring.written import BiasReport


def bring(table: Path, shards: ShardSet, *, write_anew: bool) -> tuple[Path, Path]:
    """Print the report of a table, and write it where it is new or missing.

    Args:
        table: its folder, or a file from elsewhere.
        shards: the data set that it is of.
        write_anew: whether files that are there are of an older table.

    Returns:
        The JSON file and the picture.

    Raises:
        UserError: no table there, or it does not fit the data set.
    """
    found = tables.read(table, shards.manifest, shards.keys)
    probe = before = summary.probe_of(table, found)
    if found.header:
        probe = probe_share.measure(shards.folder / "probe", found.header, shards, before)
    report = summary.make(found, shards.manifest, shards.labels, shards.tracks, probe)
    show(report)
    files = summary.paths_of(table)
    if write_anew or probe != before or not all(path.is_file() for path in files):
        write(table, report)
    return files


def write(table: Path, report: BiasReport) -> None:
    """Write the picture, then the JSON file."""
    text, picture = summary.paths_of(table)
    accuracies = (f"{split} {of['accuracy']:.3f}" for split, of in report["splits"].items())
    title = f"{_title(report)}\nsegment accuracy: {', '.join(accuracies)}"
    canvas.save(_drawing(report).figure, picture, title)
    replace_text(text, json.dumps(report, indent=1, ensure_ascii=False))


def section(report: BiasReport) -> Section:
    """What the bias model explains, as a part of a page."""
    rows = tuple(
        (name, str(one["count"]), *(f"{one[key]:.3f}" for key in ("accuracy", "nll", "ece")))
        for name, one in report["splits"].items()
    )
    columns = ("split", "segments", "accuracy", "NLL", "ECE")
    return Section(
        title="What the bias model explains",
        warnings=tuple(report.get("warnings") or ()),
        tables=(Table(label="bias model", columns=columns, rows=rows),),
        paragraphs=tuple(f"{line}." for line in _strength(report)),
        drawings=(_drawing(report),),
        folded=(("by genre", _by_genre(report)),) if report.get("per_genre") else (),
    )


def _drawing(report: BiasReport) -> Drawing:
    counts, size = report["truth_histogram"], report["effective_sample_size"]
    genres = {
        genre: (of["aligned_rows"], of["conflicting_rows"])
        for genre, of in (report.get("per_genre") or {}).items()
        if "aligned_rows" in of
    }
    shares = ", ".join(f"{genre} {a / max(1, a + c):.2f}" for genre, (a, c) in genres.items())
    label = f"Probability that the bias model gives to the truth, {sum(counts)} training segments"
    return Drawing(
        name="bias",
        title="Probability of the truth",
        label=f"{label}. Accuracy by genre: {shares}" if shares else label,
        figure=figures.bias(counts, genres, GENRE_TOO_GOOD),
        about="Training segments, by heads that did not see their tracks, nor their artists "
        "where known. Far right: what the bias model explains, by a shortcut or by the music: this "
        f"figure cannot tell. Effective size of the rest: {size:.0f} of {sum(counts)} segments. "
        "Below: the bias model's accuracy by genre.",
    )


def _by_genre(report: BiasReport) -> Table:
    keys = ("aligned_rows", "conflicting_rows", "aligned_tracks", "conflicting_tracks")
    return Table(
        label="bias by genre",
        columns=("genre", "segments with", "against", "tracks with", "against"),
        rows=tuple(
            (genre, *(str(one.get(key, "-")) for key in keys))
            for genre, one in report["per_genre"].items()
        ),
    )


def show(report: BiasReport) -> None:
    """Print the report."""
    console = Console(highlight=False, soft_wrap=True)
    ours = report["fold_status"] == "out-of-fold"
    shown = Grid(title=_title(report))
    for column in ("split", "logits", "rows", "accuracy", "NLL", "ECE"):
        shown.add_column(column, justify="left" if column in ("split", "logits") else "right")
    for split, of in report["splits"].items():
        kind = "out of fold" if split == "train" else "mean of heads"
        values = (f"{of[name]:.3f}" for name in ("accuracy", "nll", "ece"))
        shown.add_row(split, kind if ours else "as given", str(of["count"]), *values)
    console.print(shown)
    console.print(_genre_grid(report))
    console.print(
        f"probability given to the truth (training rows{', out of fold' if ours else ''}):"
    )
    counts = report["truth_histogram"]
    for tenth, count in enumerate(counts):
        bar = "█" * round(40 * count / max(counts))
        console.print(f"  {tenth / 10:.1f}-{(tenth + 1) / 10:.1f} {count:6d} {bar}")
    rows, size = report["splits"]["train"]["count"], report["effective_sample_size"]
    console.print(
        f"effective sample size of the weights 1 - b_y: {size:.0f} of {rows} rows "
        f"({100 * size / rows:.0f} %)"
    )
    for line in _strength(report):
        console.print(f"{line}.")
    for warning in report["warnings"]:
        console.print(f"Warning: {warning}.", markup=False)


def _strength(report: BiasReport) -> list[str]:
    """How far it is from saying nothing, and how much of a probe of the main model it knows."""
    if "divergence" not in report:  # version 0.1.0 did not report it
        return []
    genres, accuracy = len(report["per_genre"]), report["splits"]["train"]["accuracy"]
    lines = [
        f"mean KL(b || uniform) of the training segments: {report['divergence']:.2f} of at most "
        f"{math.log(genres):.2f} nats; product of experts changes the loss by beta times that"
    ]
    probe = report.get("probe")
    if probe is None:
        told = "not measured; launch/probe.py with the main model, then this command again, does"
        return [*lines, f"share of what a probe of the main model knows: {told}"]
    known = share(accuracy, probe, genres)
    told = "at chance" if known is None else f"the bias model knows {100 * known:.0f} % of that"
    return [
        *lines,
        f"a linear probe of {probe['model']}, layer {probe['layer']}, is right in "
        f"{probe['accuracy']:.3f} of them on the same folds; beyond chance, {told}",
    ]


def _title(report: BiasReport) -> str:
    if report["fold_status"] == "unknown":
        return f"Bias report: {report['backbone']}, fold status unknown"
    layers = report["layers"] or []
    many, named = len(layers) > 1, ", ".join(map(str, layers))
    return (
        f"Bias report: {report['backbone']}, layer{'s' if many else ''} {named}, "
        f"{report['folds']} folds, temperature {report['temperature']:.2f}"
    )


def _genre_grid(report: BiasReport) -> Grid:
    shown = Grid(title="rows and tracks: named by the bias model (aligned) / not (conflicting)")
    shown.add_column("genre")
    for column in ("named", "train", "tracks", "valid.", "tracks", "test", "tracks"):
        shown.add_column(column, justify="right", no_wrap=True)
    for genre, mine in report["per_genre"].items():
        cells = [f"{100 * mine['accuracy']:.0f} %"]
        for of in (mine, *(report["per_genre_of"][split][genre] for split in SPLITS[1:])):
            cells.append(f"{of['aligned_rows']}/{of['conflicting_rows']}")
            cells.append(f"{of['aligned_tracks']}/{of['conflicting_tracks']}")
        shown.add_row(genre, *cells)
    return shown
