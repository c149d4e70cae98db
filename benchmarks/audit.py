"""The audit on what was planted: is each artefact named first, and is nothing named where none is?

    python benchmarks/audit.py --json benchmarks/results/audit.json

For every seed: `synth --shortcut` with each artefact at two strengths, packed and audited; one set
with an artefact at random, where nothing may be named; and a set of genres with 8 % wrong labels,
by tracks of 3 s. Seeds 100 and 101 served for settling traits, so none of them is shown.

What stands in the JSON file already is not done again.
"""

import argparse
import csv
import json
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from measure import between_marks, machine, versions

from mgc_dist import shard, synth
from mgc_dist.bias_model import findings
from mgc_dist.config import AuditConfig, ShardConfig, SynthConfig
from mgc_dist.data.reader import ShardSet
from mgc_dist.files import replace_text

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
OWN = {"tone": "lines", "cutoff": "bandwidth", "tilt": "tilt", "codec": "bandwidth"}
"""The family that each artefact belongs to."""
STRENGTHS = (1.0, 0.3)
WRONG = 0.08
"""Share of labels that are made wrong."""


def planted(seed: int, artefact: str, strength: float, share: float, folder: Path) -> Path:
    """Shards of 160 tracks of 2 s, 8 artists a genre."""
    config = SynthConfig(
        out=folder / "set",
        shortcut=True,
        artefact=artefact,
        strength=strength,
        shortcut_strength=share,
        tracks_per_genre=12,
        validation_tracks=2,
        test_tracks=2,
        shifted_tracks=1,
        tracks_per_artist=2,
        duration_s=2.0,
        seed=seed,
        jobs=1,
    )
    synth.run(config)
    return packed(folder, split_file=folder / "set" / "splits.csv")


def packed(folder: Path, **changes: Any) -> Path:
    """The set in a folder, as shards of segments of 1 s."""
    settings: dict[str, Any] = {"groups": folder / "set" / "artists.csv", "repetitions": False}
    out = folder / "shards"
    data = folder / "set" / "genres_original"
    settings |= {"data": data, "out": out, "segment_s": 1.0, "hop_s": 1.0, "jobs": 1}
    shard.run(ShardConfig(**(settings | changes)))
    return out


def audited(shards: Path, seed: int) -> dict[str, Any]:
    """All figures of an audit."""
    with ShardSet(shards, is_whole=True) as opened:
        config = AuditConfig(data=shards, seed=seed, jobs=1)
        return findings.examine(config, opened).figures


def told(figures: dict[str, Any]) -> dict[str, Any]:
    """What is kept of an audit: accuracies, and the families that are named."""
    return {
        "accuracy": {each["name"]: round(each["accuracy"], 4) for each in figures["families"]},
        "named": [each["name"] for each in figures["families"] if each["named"]],
    }


def mislabelled(seed: int, folder: Path) -> dict[str, Any]:
    """How many of the wrong labels are doubted, and how many of the doubts are wrong labels."""
    synth.run(
        SynthConfig(out=folder / "set", tracks_per_genre=24, duration_s=3.0, seed=seed, jobs=1)
    )
    home, rng = folder / "set" / "genres_original", np.random.default_rng(seed)
    artists = {}
    with (folder / "set" / "artists.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            artists[row["track"]] = row["artist"]
    files = sorted(home.glob("*/*.wav"))
    genres = sorted(path.name for path in home.iterdir())
    wrong, lines = set(), ["track,artist"]
    for path in files:
        lines.append(f"{path.stem},{artists[path.stem]}")
        if rng.random() < WRONG:
            other = rng.choice([genre for genre in genres if genre != path.parent.name])
            path.rename(home / str(other) / path.name)
            wrong.add(path.stem)
    (folder / "set" / "artists.csv").write_text("\n".join(lines) + "\n")
    doubts = audited(packed(folder, split="kfold", folds=5), seed)["doubts"]
    found = [Path(each["source"]).stem for each in doubts["tracks"]]
    return {
        "tracks": len(files),
        "wrong": len(wrong),
        "doubted": len(found),
        "right_doubts": len(wrong.intersection(found)),
        "right_first": len(wrong.intersection(found[: len(wrong)])),
        "accuracy": round(doubts["accuracy"], 4),
    }


def cases(seeds: int) -> list[tuple[str, int, str, float]]:
    """Key, seed, artefact (`labels` for wrong ones) and strength, 0 where it is at random."""
    found = []
    kinds = list(OWN)
    for seed in range(seeds):
        found += [(seed, kind, 1.0) for kind in kinds]
        found += [(seed, kinds[seed % len(kinds)], 0.0), (seed, "labels", 0.0)]
    found += [(seed, kind, STRENGTHS[1]) for seed in range(seeds) for kind in kinds]
    return [(f"{kind} {strength:g} {seed}", seed, kind, strength) for seed, kind, strength in found]


def measured(seed: int, kind: str, strength: float) -> dict[str, Any]:
    """A case."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if kind == "labels":
            return mislabelled(seed, folder)
        share = 0.9 if strength else 0.1
        return told(audited(planted(seed, kind, strength or 1.0, share, folder), seed))


def render(result: dict[str, Any]) -> str:
    """The tables of a result."""
    of = result["result"]
    lines = [f"`benchmarks/audit.py`, {result['date']}.", ""]
    lines += [
        "| planted in 90 % of the tracks | seeds | its family | named first | named | accuracy "
        "| the best other family | others named |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind, own in OWN.items():
        for strength in STRENGTHS:
            mine = [value for key, value in of.items() if key.startswith(f"{kind} {strength:g} ")]
            if mine:
                lines.append(_line(f"{kind}, strength {strength:g}", own, mine))
    random = [v for key, v in of.items() if " 0 " in key and not key.startswith("labels")]
    alarms = sum(bool(each["named"]) for each in random)
    best = sorted(max(each["accuracy"].values()) for each in random)
    lines += [
        "",
        f"With artefacts at random, {len(random)} seeds: a family was named in {alarms}; the best "
        f"one was right in {np.median(best):.3f} of the tracks (median; at most {max(best):.3f}).",
        "",
    ]
    labels = [value for key, value in of.items() if key.startswith("labels")]
    sums = {name: sum(each[name] for each in labels) for name in labels[0]}
    lines.append(
        f"Wrong labels, {len(labels)} seeds of {labels[0]['tracks']} tracks, {WRONG:.0%} made "
        f"wrong: {sums['right_doubts']} of {sums['wrong']} are doubted (recall "
        f"{sums['right_doubts'] / sums['wrong']:.2f}), and so are "
        f"{sums['doubted'] - sums['right_doubts']} right ones (precision "
        f"{sums['right_doubts'] / sums['doubted']:.2f}; {sums['right_first'] / sums['wrong']:.2f} "
        "among as many of the surest as there are wrong labels). The model is right in "
        f"{sums['accuracy'] / len(labels):.3f} of the tracks, by the labels as they are."
    )
    return "\n".join(lines)


def _line(title: str, own: str, mine: list[dict[str, Any]]) -> str:
    first = sum(next(iter(each["accuracy"])) == own and own in each["named"] for each in mine)
    named = sum(own in each["named"] for each in mine)
    others = [max(v for k, v in each["accuracy"].items() if k != own) for each in mine]
    too = sum(len(set(each["named"]) - {own}) for each in mine)
    accuracy = np.mean([each["accuracy"][own] for each in mine])
    return (
        f"| {title} | {len(mine)} | {own} | {first} | {named} | {accuracy:.3f} | "
        f"{np.mean(others):.3f} | {too} |"
    )


def main() -> None:
    """Entry of `python benchmarks/audit.py`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first", type=int, default=None, help="so many cases at most")
    parser.add_argument("--json", type=Path, help="goes on from it, and writes the table into docs")
    words = parser.parse_args()
    of: dict[str, Any] = {}
    if words.json and words.json.is_file():
        of = json.loads(words.json.read_text(encoding="utf-8"))["result"]
    result: dict[str, Any] = {
        "benchmark": "audit",
        "date": str(date.today()),
        "machine": machine(),
        "versions": versions(("numpy", "scipy", "torch", "soundfile")),
        "result": of,
    }
    for key, seed, kind, strength in cases(words.seeds)[: words.first]:
        if key not in of:
            of[key] = measured(seed, kind, strength)
            print(key, of[key], flush=True)
        if words.json:
            words.json.parent.mkdir(exist_ok=True)
            replace_text(words.json, json.dumps(result, indent=1) + "\n")
    page = render(result)
    print(page)
    if words.json:
        text = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(between_marks(text, "audit", "audit", page), encoding="utf-8")


if __name__ == "__main__":
    main()
