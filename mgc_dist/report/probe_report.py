"""What a probe has found, shown and written: JSON, a table and a figure by layer.

MARBLE's protocol is that of github.com/a43992899/MARBLE-Benchmark, benchmark/tasks/GTZAN
(GTZAN_base_config.yaml, GTZAN_dataset.py), which probes MERT.
"""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from mgc_dist.bias_model.probe_heads import BATCH, DROPOUT, HIDDEN, PATIENCE
from mgc_dist.bias_model.probe_share import PROBE
from mgc_dist.data.tables import plain
from mgc_dist.files import replace_text
from mgc_dist.report import canvas, figures
from mgc_dist.report.canvas import MAIN, SECOND, SOFT
from mgc_dist.report.figures import Line

_COLORS = {"linear": MAIN, "mlp": SECOND, "mix": SOFT}


def bring(found: dict[str, Any], folder: Path) -> None:
    """Write FOLDER/probe.png, layers.csv and probe.json, and print the same.

    Args:
        found: of `bias_model.probe.make`.
        folder: is made.
    """
    found = found | {"protocol": protocol(found)}
    folder.mkdir(parents=True, exist_ok=True)
    _draw(found, folder / "probe.png")
    _write_csv(found, folder / "layers.csv")
    replace_text(folder / PROBE, json.dumps(found, indent=1, ensure_ascii=False))
    _show(found, folder)


def protocol(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Parts of MARBLE's protocol for GTZAN, what is done here, and whether it is the same."""
    whole = found["segments"] == found["tracks"]
    has_mlp = "mlp" in found["heads"]
    packed = found["folds"] is None and found["split"] == "fault-filtered"
    split = f"{found['folds']} folds of all tracks" if found["folds"] else found["split"]
    rows = (
        ("encoder", "frozen", "frozen", True),
        (
            "states",
            "mean over the whole track",
            f"mean over a segment of {found['segment_s']:g} s",
            whole,
        ),
        ("segments to tracks", "mean of logits", "mean of log-probabilities", True),
        ("split", "fault-filtered", split, packed),
        (
            "layers",
            "one that is named, or a learned sum without layer 0",
            "each, and a learned sum of all; chosen by validation",
            False,
        ),
        (
            "MLP",
            f"one hidden layer of {HIDDEN}, dropout {DROPOUT}",
            "the same" if has_mlp else "none",
            has_mlp,
        ),
        ("inputs of heads", "as they are", "standardised by training rows", False),
        (
            "optimiser",
            f"Adam, {BATCH} rows, 100 epochs at most, {PATIENCE} without a better one end it, "
            "rate halved at a plateau",
            f"Adam, {BATCH} rows, {found['settings']['epochs']} epochs at most, {PATIENCE} "
            "without a better one end it, rate constant",
            False,
        ),
        (
            "learning rate",
            "0.001, or a search from 0.0001 to 0.01",
            f"the best of {', '.join(f'{lr:g}' for lr in found['settings']['lr'])}",
            False,
        ),
        ("chosen by", "validation accuracy", "validation NLL over tracks", False),
        ("seeds", "one", str(found["seeds"]), found["seeds"] == 1),
    )
    keys = ("part", "marble", "here", "followed")
    return [dict(zip(keys, row, strict=True)) for row in rows]


def _show(found: dict[str, Any], folder: Path) -> None:
    console = Console(highlight=False, markup=False, soft_wrap=True)
    unit = _unit(found)
    named = [(line["head"], line) for line in found["lines"]]
    chosen = [
        (f"any: {of['head']}" if name == "any" else name, of)
        for name, of in found["chosen"].items()
    ]
    console.print(_table(_title(found), named, unit))
    console.print(_table("Chosen by validation tracks, before test was looked at", chosen, unit))
    known = "over artists" if unit == "groups" else "by track; artists unknown, so too narrow"
    console.print(
        "NLL: of validation tracks. The rest: over segments and tracks of test, the mean over "
        f"seeds; accuracy, 95 % {known}; macro-F1."
    )
    rules = Table(title="MARBLE's protocol for GTZAN", title_justify="left")
    for column in ("part", "there", "here", "same"):
        rules.add_column(column)
    for each in found["protocol"]:
        rules.add_row(
            each["part"], each["marble"], each["here"], "yes" if each["followed"] else "no"
        )
    console.print(rules)
    console.print(f"All figures: {folder / 'probe.json'}, layers.csv and probe.png")


def _title(found: dict[str, Any]) -> str:
    return f"Probe of {canvas.short(found['model'], 40)}, {found['tracks']} test tracks"


def _unit(found: dict[str, Any]) -> str:
    """What is drawn for the intervals: artists, where several are known."""
    return "groups" if "groups" in found["lines"][0]["intervals"] else "tracks"


def _table(title: str, lines: Sequence[tuple[str, dict[str, Any]]], unit: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in ("head", "layer", "C, lr", "NLL", "segm.", "tracks", "95 %", "F1"):
        many = column in ("layer", "C, lr")  # of the folds
        justify: Literal["left", "right"] = "left" if column == "head" else "right"
        table.add_column(column, justify=justify, no_wrap=not many, overflow="fold")
    for name, line in lines:
        table.add_row(name, *_cells(line, unit))
    return table


def _cells(line: dict[str, Any], unit: str) -> tuple[str, ...]:
    low, high = line["intervals"][unit]["accuracy"]
    return (
        _few("all" if layer is None else layer for layer in line["layer"]),
        _few(f"{setting:g}" for setting in line["setting"]),
        f"{line['validation_nll']:.3f}",
        f"{line['segment']['accuracy']:.3f}",
        f"{line['track']['accuracy']:.3f}",
        f"{low:.3f} to {high:.3f}",
        f"{line['track']['macro_f1']:.3f}",
    )


def _few(values: Any) -> str:  # noqa: ANN401
    """Those of the divisions, each once."""
    return " ".join(dict.fromkeys(map(str, values)))


def _write_csv(found: dict[str, Any], path: Path) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    figure = ("accuracy", "macro_f1", "nll")
    levels = ("track", "segment")
    bounds = ("low", "high")
    names = [f"{level}_{name}" for level in levels for name in figure]
    names += [f"{unit}_{end}" for unit in ("tracks", "groups") for end in bounds]
    writer.writerow(("head", "layer", "setting", "chosen", "validation_nll", *names))
    for line in found["lines"]:
        chosen = found["chosen"][line["head"]]["layer"].count(line["layer"][0])
        values = [line[level][name] for level in levels for name in figure]
        for unit in ("tracks", "groups"):
            values += line["intervals"].get(unit, {}).get("accuracy", ["", ""])
        first = (line["head"], line["layer"][0], _few(line["setting"]), chosen)
        writer.writerow(plain((*first, line["validation_nll"], *values)))
    replace_text(path, text.getvalue())


def _draw(found: dict[str, Any], path: Path) -> None:
    """Track accuracy by layer; faint are the ends of the intervals."""
    drawn: list[Line] = []
    unit = _unit(found)
    for head in found["heads"]:
        lines = [line for line in found["lines"] if line["head"] == head]
        color, last = _COLORS[head], found["layers"] - 1
        xs = [range(last + 1) if line["layer"][0] is None else line["layer"][:1] for line in lines]
        for end in (0, 1):
            points = [
                (x, 100 * line["intervals"][unit]["accuracy"][end])
                for at, line in zip(xs, lines, strict=True)
                for x in at
            ]
            drawn.append(Line(name="", points=points, color=color, faint=True))
        points = [
            (x, 100 * line["track"]["accuracy"])
            for at, line in zip(xs, lines, strict=True)
            for x in at
        ]
        drawn.append(Line(name=head, points=points, color=color, dots=head != "mix"))
    chosen = {
        layer: f"chosen: {name}"
        for name, line in found["chosen"].items()
        for layer in line["layer"]
        if layer is not None and name != "any"
    }
    figure = figures.lines(
        drawn,
        x_title=f"layer; dotted: chosen by validation; faint: 95 %\n{_title(found)}",
        y_title="track accuracy, %",
        marks=list(chosen.items()),
    )
    canvas.save(figure, path)  # a title of its own would lie on the legend
