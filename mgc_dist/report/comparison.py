"""Pictures of comparisons: of two runs on the same tracks, of settings over seeds."""

from pathlib import Path
from typing import Any

from mgc_dist.report import figures
from mgc_dist.scoring.metrics import METRICS

Report = dict[str, Any]


def draw_pair(path: Path, found: Report) -> None:
    """A picture of the differences: overall, each genre, each subgroup."""
    unit = "artists" if found["unit"] == "groups" else "tracks"
    leading = {name: metric.head for name, metric in METRICS.items() if metric.leads}
    rows = [
        (head, found[name]["difference"], found["intervals"][found["unit"]][name])
        for name, head in leading.items()
    ]
    parts = [(found["per_genre"], "support"), (found["subgroups"] or {}, "count")]
    for part, count in parts:
        rows += [
            (f"{name} ({row[count]})", row["difference"], row["interval"])
            for name, row in part.items()
            if row[count]
        ]
    figures.differences(
        path,
        rows,
        f"{Path(found['b']).name} against {Path(found['a']).name}\n{found['name']}, "
        f"{found['count']} tracks",
        f"difference in points (recall of a genre, accuracy of a subgroup), 95 % over {unit}",
        emphasised=len(leading),
    )


def draw_seeds(path: Path, found: Report) -> None:
    """A picture: a point a run, a panel for each leading figure and each subgroup."""
    conditions = found["conditions"]
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
    figures.seeds(path, panels, f"{found['name']}: runs over seeds, tracks as the unit")
