"""The body of `compare`: two runs on the same tracks, or settings over seeds, and pictures."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mgc_dist.config import CompareConfig
from mgc_dist.files import replace_text
from mgc_dist.report import canvas, figures
from mgc_dist.scoring import conditions, paired, results
from mgc_dist.scoring.metrics import METRICS

Report = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What a comparison found.

    Attributes:
        figures: as they are written to comparison.json.
        is_pair: whether they are of two runs; else of settings over seeds.
        folder: where comparison.json and comparison.png are.
    """

    figures: Report
    is_pair: bool
    folder: Path


def compare(config: CompareConfig) -> Comparison:
    """Compare runs from their predictions, and write comparison.json and .png.

    Raises:
        UserError: a run was not evaluated, or the runs were not measured on the same tracks.
    """
    found = [results.read(run, config.result_name) for run in config.runs]
    picture, is_pair = config.folder / "comparison.png", len(found) == 2
    if is_pair:
        report = paired.compare(found[0], found[1], config.result_name)
        draw_pair(picture, report)
    else:
        runs = []
        for result in found:
            seed, settings = conditions.settings_of(result.run)
            runs.append(conditions.Run(result=result, seed=seed, settings=settings))
        report = conditions.compare(runs, config.result_name)
        draw_seeds(picture, report)
    config.folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=1, ensure_ascii=False)
    replace_text(config.folder / "comparison.json", text)
    return Comparison(figures=report, is_pair=is_pair, folder=config.folder)


def draw_pair(path: Path, comparison: Report) -> None:
    """A picture of the differences: overall, each genre, each subgroup."""
    unit = "artists" if comparison["unit"] == "groups" else "tracks"
    leading = {name: metric.head for name, metric in METRICS.items() if metric.leads}
    rows = [
        (head, comparison[name]["difference"], comparison["intervals"][comparison["unit"]][name])
        for name, head in leading.items()
    ]
    parts = [(comparison["per_genre"], "support"), (comparison["subgroups"] or {}, "count")]
    for part, count in parts:
        rows += [
            (f"{name} ({row[count]})", row["difference"], row["interval"])
            for name, row in part.items()
            if row[count]
        ]
    label = f"difference in points (recall of a genre, accuracy of a subgroup), 95 % over {unit}"
    title = f"{Path(comparison['b']).name} against {Path(comparison['a']).name}"
    title += f"\n{comparison['name']}, {comparison['count']} tracks{_restricted(comparison)}"
    canvas.save(figures.differences(rows, label, emphasised=len(leading)), path, title)


def _restricted(comparison: Report) -> str:
    return ", on genres in common" if comparison["in_common"] else ""


def draw_seeds(path: Path, comparison: Report) -> None:
    """A picture: a point a run, a panel for each leading figure and each subgroup."""
    conditions = comparison["conditions"]
    names = dict.fromkeys(name for each in conditions.values() for name in each["figures"])
    panels = {
        METRICS[name].head if name in METRICS else name: {
            label: {
                int(seed): value
                for seed, value in each["figures"].get(name, {"values": {}})["values"].items()
            }
            for label, each in conditions.items()
        }
        for name in names
        if name not in METRICS or METRICS[name].leads
    }
    title = f"{comparison['name']}: runs over seeds, tracks as the unit{_restricted(comparison)}"
    canvas.save(figures.seeds(panels), path, title)
