"""The planted shortcut: does a debiasing loss help a model that could listen to an artefact?

    python benchmarks/shortcut.py --json benchmarks/results/shortcut.json

For every seed: `synth --shortcut`, both data sets packed, the log-mel bias model, then one main
model a loss, trained and measured by the ordinary commands on artists that it has not heard: on
the in-distribution test, where the tone goes with the genre as in training, and on the shifted
test, where it does not. Two runs at a time, a core each. A run is validated once, at its end:
validation tracks carry the shortcut, and nothing may be chosen by them.

What is finished in `--work` is not done again. `--table FILE` prints the table of a result.
"""

import argparse
import csv
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from measure import machine, versions
from numpy.typing import NDArray

from mgc_dist.bias_model.states import STORE
from mgc_dist.data import manifest
from mgc_dist.data.opening import open_index
from mgc_dist.data.reader import ShardSet
from mgc_dist.files import replace_text
from mgc_dist.scoring.intervals import over_seeds

ROOT = Path(__file__).resolve().parent.parent
FITTED, UNTRAINED, ORACLE = "fitted", "untrained", "oracle"


@dataclass(frozen=True, kw_only=True)
class Condition:
    """A loss: its name in the table, its flags, and the bias table that it reads."""

    title: str
    flags: tuple[str, ...]
    table: str = FITTED


CONDITIONS = {
    "ce": Condition(title="plain cross-entropy", flags=("--loss", "ce")),
    "mixture-untrained": Condition(
        title="mixture with an untrained bias model (the original project's)",
        flags=("--loss", "mixture"),
        table=UNTRAINED,
    ),
    "poe-1": Condition(title="product of experts, beta 1", flags=("--loss", "poe", "--beta", "1")),
    "poe-0.5": Condition(
        title="product of experts, beta 0.5", flags=("--loss", "poe", "--beta", "0.5")
    ),
    "reweight": Condition(title="reweighting", flags=("--loss", "reweight")),
    "dfl": Condition(title="debiased focal loss", flags=("--loss", "dfl")),
    "learned-mixin": Condition(title="learned mixin", flags=("--loss", "learned-mixin")),
    "learned-mixin-h": Condition(
        title="learned mixin with entropy", flags=("--loss", "learned-mixin-h")
    ),
    "oracle": Condition(
        title="reweighting by the true artefacts (an oracle)",
        flags=("--loss", "reweight"),
        table=ORACLE,
    ),
    "poe-0": Condition(title="product of experts, beta 0", flags=("--loss", "poe", "--beta", "0")),
}
CHECK = "poe-0"
"""Must end as `ce` does, to the bit; trained for the first seed only, and in no table."""
FIGURES = {
    "in_distribution_track": "in distribution: tracks",
    "in_distribution_segment": "segments",
    "shifted_track": "shifted: tracks",
    "shifted_segment": "segments",
    "shifted_conflicting": "conflicting tracks",
    "follows_artefact": "follows the artefact",
}
TRAINING = [
    *("--freeze", "none", "--lr", "2e-3", "--head-lr", "2e-3"),
    *("--global-batch", "32", "--micro-batch", "32", "--warmup-fraction", "0.1"),
    *("--weight-decay", "0.01", "--clip-norm", "1.0", "--zero-stage", "1"),
    *("--keep-checkpoints", "1", "--device", "cpu", "--resume", "auto"),
]


@dataclass(frozen=True, kw_only=True)
class Seed:
    """What belongs to one seed: its two data sets and its runs."""

    number: int
    folder: Path

    @property
    def data(self) -> Path:
        """Tracks and tables, as `synth --shortcut` writes them."""
        return self.folder / "data"

    @property
    def shards(self) -> Path:
        """The training set, packed."""
        return self.folder / "shards"

    @property
    def shifted(self) -> Path:
        """The shifted test set, packed."""
        return self.folder / "shards-shifted"

    def table(self, name: str) -> Path:
        """The bias table that a condition reads."""
        return self.shards / "bias" if name == FITTED else self.folder / f"{name}.csv"


def do(words: list[object], product: Path) -> None:
    """Run a command of ours, unless the file that it writes last is there."""
    if product.exists():
        return
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    if done.returncode or not product.exists():
        shown = " ".join(command)
        raise RuntimeError(f"{shown}\nended with {done.returncode}:\n{done.stderr[-3000:]}")


def prepare(seed: Seed) -> None:
    """Both data sets, packed, and the three bias tables."""
    words = ["-m", "mgc_dist.synth", seed.data, "--shortcut", "--seed", seed.number, "--jobs", 1]
    do(words, seed.data / "artists.csv")
    for home, out in ((seed.data, seed.shards), (seed.data / "shifted", seed.shifted)):
        words = ["-m", "mgc_dist.shard", "--data", home / "genres_original", "--out", out]
        words += ["--groups", home / "artists.csv", "--split-file", home / "splits.csv"]
        do([*words, "--segment-s", 1, "--hop-s", 1, "--jobs", 1], out / manifest.NAME)
    words = ["launch/bias.py", "--shards", seed.shards, "--backbone", "logmel", "--device", "cpu"]
    do([*words, "--seed", seed.number], seed.shards / "bias" / "report.json")
    for name, logits in ((UNTRAINED, untrained_logits(seed)), (ORACLE, oracle_logits(seed))):
        write_table(seed, seed.table(name), logits)


def write_table(seed: Seed, path: Path, logits: NDArray[np.float64]) -> None:
    """Logits of every row, float64 [N, K], as a table of `key` and genres."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    with ShardSet(seed.shards) as shards:
        writer.writerow(("key", *shards.manifest.genres))
        for key, row in zip(shards.keys(), logits, strict=True):
            writer.writerow((key, *(f"{value:.6f}" for value in row)))
    replace_text(path, text.getvalue())


def untrained_logits(seed: Seed) -> NDArray[np.float64]:
    """A head at its random initialisation, as the original project's bias model: [N, K].

    Weights and bias are uniform within 1 / sqrt(D), torch's initialisation of a linear layer;
    hidden values are standardised over the training rows.
    """
    found = manifest.read(seed.shards)
    hidden = np.load(seed.shards / "bias" / STORE.array)[:, 0].astype(np.float64)  # [N, D]
    train = hidden[: found.splits["train"][1]]
    standard = (hidden - train.mean(axis=0)) / train.std(axis=0)
    width, genres = hidden.shape[1], len(found.genres)
    rng = np.random.default_rng([seed.number, 5])
    weight, intercept = (rng.uniform(-1, 1, size) for size in ((width, genres), genres))
    logits = (standard @ weight + intercept) / np.sqrt(width)
    return np.asarray(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))


def oracle_logits(seed: Seed) -> NDArray[np.float64]:
    """Log-probabilities of which `reweight` makes artefact and genre independent: [N, K].

    1 - b_y is proportional to 1 / count[genre, artefact] over the training rows, at most 20
    times its mean, the largest 1; what is left goes to the other genres. Rows that are not
    trained on are uniform.
    """
    found = manifest.read(seed.shards)
    index = open_index(seed.shards, found)
    stop, genres = found.splits["train"][1], len(found.genres)
    artefact_of = artefacts(seed.data)
    pairs = [
        (found.tracks[track].genre, artefact_of[found.tracks[track].id])
        for track in index["track"][:stop].tolist()
    ]
    count = Counter(pairs)
    weight = np.array([1 / count[pair] for pair in pairs])
    weight = np.minimum(weight / weight.mean(), 20)
    truth = np.clip(1 - weight / weight.max(), 1e-6, None)  # a logarithm must be finite
    probability = np.full((found.rows, genres), 1 / genres)
    probability[:stop] = ((1 - truth) / (genres - 1))[:, None]
    probability[np.arange(stop), index["label"][:stop]] = truth
    return np.log(probability)


def artefacts(home: Path) -> dict[str, str]:
    """Track id -> the genre that its tone goes with."""
    with (home / "artefacts.csv").open(newline="", encoding="utf-8") as file:
        return {row["track"].replace(".", "_"): row["artefact"] for row in csv.DictReader(file)}


def train_and_measure(seed: Seed, name: str, model: str, epochs: float) -> dict[str, float]:
    """One run by the ordinary commands; its figures."""
    started, condition = time.perf_counter(), CONDITIONS[name]
    run = seed.folder / "runs" / name
    words = ["launch/train.py", "--shards", seed.shards, "--run", run, "--model", model]
    words += ["--bias-table", seed.table(condition.table), "--seed", seed.number]
    words += ["--epochs", epochs]
    once = ["--validate-every-epochs", epochs, "--checkpoint-every-epochs", epochs]
    do([*words, *once, *condition.flags, *TRAINING], run / "DONE")
    measure = ["launch/evaluate.py", run, "--device", "cpu"]
    do(measure, run / "evaluation" / "test.json")
    elsewhere = ["--data", seed.shifted, "--name", "shifted"]
    do([*measure, *elsewhere], run / "evaluation" / "shifted.json")
    found = figures(seed, run)
    shown = ", ".join(f"{key} {value:.3f}" for key, value in found.items())
    spent_s = time.perf_counter() - started
    print(f"seed {seed.number}, {run.name}: {shown} ({spent_s:.0f} s)", file=sys.stderr, flush=True)
    return found


def figures(seed: Seed, run: Path) -> dict[str, float]:
    """Accuracies of a run, and how often it follows the tone where that misleads."""
    inside, shifted = (
        json.loads((run / "evaluation" / f"{name}.json").read_text())
        for name in ("test", "shifted")
    )
    artefact_of = artefacts(seed.data / "shifted")
    lines = predictions(run, "shifted")
    conflicting = [line for line in lines if artefact_of[line["track"]] != line["truth"]]
    right = [line["prediction"] == line["truth"] for line in conflicting]
    follows = [line["prediction"] == artefact_of[line["track"]] for line in conflicting]
    return {
        "in_distribution_track": inside["track"]["accuracy"],
        "in_distribution_segment": inside["segment"]["accuracy"],
        "shifted_track": shifted["track"]["accuracy"],
        "shifted_segment": shifted["segment"]["accuracy"],
        "shifted_conflicting": float(np.mean(right)),
        "follows_artefact": float(np.mean(follows)),
    }


def predictions(run: Path, name: str) -> list[dict[str, Any]]:
    """The lines of an evaluation, one a track."""
    lines = (run / "predictions" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def beta_0_against_ce(seed: Seed) -> dict[str, float]:
    """How far the run with beta 0 is from the one with plain cross-entropy: not at all."""
    pairs = [
        (one, other)
        for name in ("test", "shifted")
        for one, other in zip(
            predictions(seed.folder / "runs" / "ce", name),
            predictions(seed.folder / "runs" / CHECK, name),
            strict=True,
        )
    ]
    gaps = [
        max(abs(one["probabilities"][g] - other["probabilities"][g]) for g in one["probabilities"])
        for one, other in pairs
    ]
    return {
        "tracks": len(pairs),
        "other_predictions": sum(a["prediction"] != b["prediction"] for a, b in pairs),
        "largest_difference_of_probabilities": max(gaps),
    }


def summary(values: list[float]) -> dict[str, Any]:
    """Mean, standard deviation, smallest, largest, and the values by seed."""
    spread = {"mean": float(np.mean(values)), "sd": deviation(values)}
    return spread | {"min": min(values), "max": max(values), "by_seed": values}


def gain(values: list[float], plain: list[float]) -> dict[str, Any]:
    """Paired difference from plain cross-entropy over seeds, with its 95 % t interval.

    Each seed has music of its own, so its spread is over artists too.
    """
    pairs = [value - other for value, other in zip(values, plain, strict=True)]
    found = {"mean": float(np.mean(pairs)), "sd": deviation(pairs)}
    sure = over_seeds(np.array(pairs))
    gained = sum(pair > 0 for pair in pairs)
    return found | {
        "interval_95": sure and list(sure.interval),
        "seeds_that_gained": gained,
        "by_seed": pairs,
    }


def deviation(values: list[float]) -> float:
    """Standard deviation with n - 1, 0 for one value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def collect(found: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Condition -> figure -> summary over seeds, and the gains over `ce`."""
    results: dict[str, Any] = {}
    for name, runs in found.items():
        by_figure = {key: [run[key] for run in runs] for key in FIGURES}
        results[name] = {key: summary(values) for key, values in by_figure.items()}
        if name != "ce":
            results[name]["gain"] = {
                key: gain(by_figure[key], [run[key] for run in found["ce"]])
                for key in ("in_distribution_track", "shifted_track", "shifted_segment")
            }
    return results


def table(content: dict[str, Any]) -> str:
    """The result as a Markdown table: means and standard deviations over seeds."""
    columns = ["loss", *FIGURES.values(), "gain on shifted tracks (95 % interval)", "seeds up"]
    lines = [columns, ["---"] * len(columns)]
    for name, result in content["results"].items():
        cells = [f"{result[key]['mean']:.3f} ± {result[key]['sd']:.3f}" for key in FIGURES]
        last = ["", ""]
        if "gain" in result:
            found = result["gain"]["shifted_track"]
            interval = " ({:+.3f} to {:+.3f})".format(*found["interval_95"] or (0, 0))
            shown = f"{found['mean']:+.3f}" + (interval if found["interval_95"] else "")
            last = [shown, f"{found['seeds_that_gained']} of {len(found['by_seed'])}"]
        lines.append([CONDITIONS[name].title, *cells, *last])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def measure(names: list[str], seeds: list[Seed], words: argparse.Namespace) -> dict[str, Any]:
    """All runs, `--jobs` at a time, and what they show."""
    jobs = [(seed, name) for seed in seeds for name in names]
    jobs.append((seeds[0], CHECK))

    def work(job: tuple[Seed, str]) -> dict[str, float]:
        return train_and_measure(*job, words.model, words.epochs)

    with ThreadPoolExecutor(words.jobs) as pool:
        list(pool.map(prepare, seeds))
        done = dict(zip(jobs, pool.map(work, jobs), strict=True))
    bias = [json.loads((seed.shards / "bias" / "report.json").read_text()) for seed in seeds]
    return {
        "results": collect({name: [done[seed, name] for seed in seeds] for name in names}),
        "beta_0_against_ce": beta_0_against_ce(seeds[0]),
        "bias_accuracy": {
            split: summary([report["splits"][split]["accuracy"] for report in bias])
            for split in ("train", "test")
        },
    }


def refuse_other_settings(path: Path, words: argparse.Namespace) -> None:
    """End with a message where `--work` holds runs of another model or length."""
    wanted = {"model": words.model, "epochs": words.epochs}
    if path.is_file() and (found := json.loads(path.read_text())) != wanted:
        sys.exit(
            f"--work {path.parent} holds runs of {found}, not of {wanted}: name another folder"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(wanted))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--losses", help=f"some of {','.join(CONDITIONS)}; ce is always run")
    parser.add_argument("--model", default="logmel-cnn")
    parser.add_argument("--epochs", type=float, default=10)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--work", type=Path, help="keep everything here, and go on from it")
    parser.add_argument("--json", type=Path, help="write the result here as well")
    parser.add_argument("--table", type=Path, help="print the table of this result, and stop")
    words = parser.parse_args()
    if words.table:
        print(table(json.loads(words.table.read_text())))
        return
    wanted = words.losses.split(",") if words.losses else CONDITIONS
    if unknown := set(wanted) - set(CONDITIONS):
        parser.error(f"--losses: {', '.join(sorted(unknown))}: not of {', '.join(CONDITIONS)}")
    names = [name for name in CONDITIONS if name in {"ce", *wanted} - {CHECK}]
    with tempfile.TemporaryDirectory() as temporary:
        folder = (words.work or Path(temporary)).resolve()
        count = words.seeds
        refuse_other_settings(folder / "settings.json", words)
        seeds = [Seed(number=n, folder=folder / f"seed-{n}") for n in range(count)]
        found = measure(names, seeds, words)
    facts = {"benchmark": "shortcut", "date": str(date.today()), "seeds": count}
    facts |= {"model": words.model, "epochs": words.epochs, "machine": machine()}
    packages = ("mgc_dist", "torch", "deepspeed", "numpy", "scikit-learn")
    content = facts | {"versions": versions(packages)} | found
    print(json.dumps(content))
    if words.json:
        words.json.parent.mkdir(parents=True, exist_ok=True)
        words.json.write_text(json.dumps(content, indent=1) + "\n")
    print(f"\n{table(content)}")


if __name__ == "__main__":
    main()
