"""The exam on planted sets: is a model cleared of what it was trained with, and do controls tell
what is unfamiliar from what is relied upon?

    python benchmarks/exam.py --seeds 2 --work /tmp/exam --json benchmarks/results/exam.json

For every seed: `synth --shortcut` with tones that tell the genre in 0.9 of the tracks, and with
tones at random, both packed; on the first plain cross-entropy, on the second plain cross-entropy
with and without noise as augmentation; each examined by the ordinary command.
The tones' octave is taken out, filled with noise, or swapped for that of another segment: a model
that relies upon it loses by all three, one that never heard its lack by the first alone.

What is finished in `--work` is not done again. `--table FILE` prints the table of a result.
"""

import argparse
import json
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from measure import machine, versions
from shortcut import TRAINING, do

from mgc_dist.data import manifest

SETS = {"telling": 0.9, "random": 0.1}
"""How often the tone goes with the genre."""
MODELS: dict[str, tuple[str, tuple[str, ...]]] = {
    "tones tell": ("telling", ()),
    "tones at random": ("random", ()),
    "tones at random, trained with noise": (
        "random",
        ("--augment", "noise", "--augment-noise-db", "10"),
    ),
}
"""Set and flags of each."""
ASKED = (("band-stop", 5600.0), ("band-noise", 5600.0), ("band-swap", 5600.0), ("noise", 10.0))


def examined(seed: int, name: str, work: Path, epochs: float) -> dict[str, Any]:
    """The exam of a model, whose data set and training are made where they are missing."""
    kind, flags = MODELS[name]
    data, shards = work / f"{seed}-{kind}", work / f"{seed}-{kind}-shards"
    strength = ["--shortcut", "--shortcut-strength", SETS[kind]]
    words = ["-m", "mgc_dist.synth", data, *strength, "--seed", seed, "--jobs", 1]
    do(words, data / "artists.csv")
    words = ["-m", "mgc_dist.shard", "--data", data / "genres_original", "--out", shards]
    words += ["--groups", data / "artists.csv", "--split-file", data / "splits.csv"]
    do([*words, "--segment-s", 1, "--hop-s", 1, "--jobs", 1], shards / manifest.NAME)
    run = work / f"{seed}-{name.replace(' ', '-').replace(',', '')}"
    words = ["launch/train.py", "--shards", shards, "--run", run, "--model", "logmel-cnn"]
    words += ["--seed", seed, "--epochs", epochs, "--loss", "ce", *flags]
    once = ["--validate-every-epochs", epochs, "--checkpoint-every-epochs", epochs]
    do([*words, *once, *TRAINING], run / "DONE")
    only = sorted({name for name, _ in ASKED})
    words = ["launch/exam.py", run, "--only", *only, "--device", "cpu"]
    do(words, run / "exam" / "test.json")
    found: dict[str, Any] = json.loads((run / "exam" / "test.json").read_text())
    return found


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds of what was asked for, and the verdicts."""
    lines = {}
    for name, strength in ASKED:
        of = [
            line
            for each in found
            for line in each["transformations"]
            if (line["name"], line["strength"]) == (name, strength)
        ]
        controls = [line["control"] for line in of]
        lines[f"{name} {strength:g}"] = {
            "accuracy": [line["accuracy"] for line in of],
            "difference_interval": [line["difference_interval"] for line in of],
            "p_corrected": [line["p_corrected"] for line in of],
            "refitted": [control and control["accuracy"] for control in controls],
            "readings": [line["reading"] or "-" for line in of],
        }
    return {
        "untouched": [each["untouched"] for each in found],
        "refitted": [each["refitted"] for each in found],
        "transformations": lines,
    }


def table(content: dict[str, Any]) -> str:
    """The result as a Markdown table: means over seeds, and what each seed is read as."""
    columns = ["model", "untouched, anew", *(f"{name} {s:g}" for name, s in ASKED)]
    lines = [columns, ["---"] * len(columns)]
    for name, result in content["results"].items():
        cells = [f"{np.mean(result['untouched']):.3f}, {np.mean(result['refitted']):.3f}"]
        for each in result["transformations"].values():
            anew = [value for value in each["refitted"] if value is not None]
            numbers = [f"{np.mean(of):.3f}" for of in (each["accuracy"], anew) if of]
            cells.append(f"{', '.join(numbers)}: {'; '.join(each['readings'])}")
        lines.append([name, *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[2])
    parser.add_argument("--epochs", type=float, default=10)
    parser.add_argument("--work", type=Path, help="keep everything here, and go on from it")
    parser.add_argument("--json", type=Path, help="write the result here as well")
    parser.add_argument("--table", type=Path, help="print the table of this result, and stop")
    words = parser.parse_args()
    if words.table:
        print(table(json.loads(words.table.read_text())))
        return
    if not words.work:
        parser.error("--work: name a folder")
    work = words.work.resolve()
    found = {name: [examined(s, name, work, words.epochs) for s in words.seeds] for name in MODELS}
    facts = {"benchmark": "exam", "date": str(date.today()), "seeds": words.seeds}
    facts |= {"epochs": words.epochs, "machine": machine()}
    packages = ("mgc_dist", "torch", "numpy", "scikit-learn")
    results = {name: summary(each) for name, each in found.items()}
    content = facts | {"versions": versions(packages), "results": results}
    if words.json:
        words.json.write_text(json.dumps(content, indent=1) + "\n")
    print(table(content))


if __name__ == "__main__":
    main()
