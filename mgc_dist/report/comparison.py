"""Pictures of comparisons: of two runs on the same tracks, of settings over seeds."""

from pathlib import Path
from typing import Any

from mgc_dist.report import canvas, figures

Report = dict[str, Any]


def draw_pair(path: Path, found: Report) -> None:
    """A picture of the differences: overall, each genre, each subgroup."""
    unit = "artists" if found["unit"] == "groups" else "tracks"
    names = (("accuracy", "accuracy"), ("macro_f1", "macro-F1"))
    rows = [
        (shown, found[name]["difference"], found["intervals"][found["unit"]][name])
        for name, shown in names
    ]
    parts = [(found["per_genre"], "support"), (found["subgroups"] or {}, "count")]
    for part, count in parts:
        rows += [
            (f"{name} ({row[count]})", row["difference"], row["interval"])
            for name, row in part.items()
            if row[count]
        ]
    label = f"difference in points (recall of a genre, accuracy of a subgroup), 95 % over {unit}"
    title = f"{Path(found['b']).name} against {Path(found['a']).name}"
    title += f"\n{found['name']}, {found['count']} tracks"
    canvas.save(figures.differences(rows, label, emphasised=2), path, title)


def draw_seeds(path: Path, found: Report) -> None:
    """A picture: a point a run, a panel for accuracy, macro-F1 and each subgroup."""
    conditions = found["conditions"]
    names = dict.fromkeys(name for each in conditions.values() for name in each["figures"])
    panels = {
        name.replace("_f1", "-F1"): {
            label: {
                int(seed): value
                for seed, value in each["figures"].get(name, {"values": {}})["values"].items()
            }
            for label, each in conditions.items()
        }
        for name in list(names)
        if name != "balanced_accuracy"
    }
    title = f"{found['name']}: runs over seeds, tracks as the unit"
    canvas.save(figures.seeds(panels), path, title)
