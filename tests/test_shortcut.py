"""The benchmark of the planted shortcut: its oracle and summary, and, slowly, its claim."""

import csv
import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import scipy.special
import scipy.stats

from mgc_dist import shard, synth
from mgc_dist.config import BiasConfig, ShardConfig, SynthConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import shortcut  # noqa: E402


@pytest.fixture(scope="module")
def seed(tmp_path_factory: pytest.TempPathFactory) -> shortcut.Seed:
    """A small planted set, packed, with hidden values in the place of the bias pass."""
    made = shortcut.Seed(number=1, folder=tmp_path_factory.mktemp("seed-1"))
    counts = {"tracks_per_genre": 6, "validation_tracks": 1, "test_tracks": 1, "shifted_tracks": 1}
    settings = {"duration_s": 2.0, "jobs": 1, "shortcut_strength": 0.6}
    synth.run(SynthConfig(out=made.data, shortcut=True, seed=1, **counts, **settings))
    shard.run(
        ShardConfig(
            data=made.data / "genres_original",
            out=made.shards,
            groups=made.data / "artists.csv",
            split_file=made.data / "splits.csv",
            segment_s=1.0,
            hop_s=1.0,
            jobs=1,
        )
    )
    BiasConfig(shards=made.shards).table.mkdir()
    hidden = np.random.default_rng(0).normal(5.0, 2.0, (160, 1, 40)).astype(np.float32)
    np.save(made.shards / "bias" / "hidden.npy", hidden)
    return made


def test_the_oracle_makes_artefact_and_genre_independent(seed: shortcut.Seed) -> None:
    """The weights 1 - b_y of a table that was written and read again sum alike in all cells."""
    path = seed.folder / "oracle.csv"
    shortcut.write_table(seed, path, shortcut.oracle_logits(seed))
    with path.open(newline="") as file:
        header, *lines = csv.reader(file)
    assert (header[0], len(header), len(lines)) == ("key", 11, 160)
    artefact_of = shortcut.artefacts(seed.data)
    splits = {}
    with (seed.data / "splits.csv").open(newline="") as file:
        splits = {row["track"].replace(".", "_"): row["split"] for row in csv.DictReader(file)}
    sums: dict[tuple[str, str], float] = defaultdict(float)
    largest = 0.0
    for key, *logits in lines:
        track = key.rpartition("_")[0]
        genre = track.partition("_")[0]
        probability = scipy.special.softmax(np.array(logits, float))
        if splits[track] == "train":
            weight = 1 - probability[header[1:].index(genre)]
            sums[genre, artefact_of[track]] += weight
            largest = max(largest, weight)
        else:
            assert probability == pytest.approx(0.1, abs=1e-6)
    assert len(sums) > 15
    assert list(sums.values()) == pytest.approx([max(sums.values())] * len(sums), rel=1e-4)
    assert largest == pytest.approx(1, abs=1e-5)


def test_the_untrained_table_is_a_random_head_of_torchs_size(seed: shortcut.Seed) -> None:
    """Uniform weights within 1 / sqrt(40) on standardised values: logits of variance about 1/3."""
    logits = shortcut.untrained_logits(seed)
    assert logits.shape == (160, 10)
    assert np.exp(logits).sum(axis=1) == pytest.approx(1)
    centred = logits - logits.mean(axis=1, keepdims=True)
    assert 0.15 < np.square(centred).mean() < 0.6
    other = shortcut.untrained_logits(shortcut.Seed(number=2, folder=seed.folder))
    assert np.abs(other - logits).max() > 0.1


def test_a_gain_is_a_paired_difference_with_students_interval() -> None:
    plain, better = [0.50, 0.55, 0.45, 0.60, 0.52], [0.60, 0.54, 0.58, 0.70, 0.66]
    found = shortcut.gain(better, plain)
    reference = scipy.stats.ttest_rel(better, plain)
    assert found["interval_95"] == pytest.approx(list(reference.confidence_interval(0.95)))
    assert (found["mean"], found["seeds_that_gained"]) == (pytest.approx(0.092), 4)
    alone = shortcut.gain([0.6], [0.5])
    assert (alone["interval_95"], alone["sd"]) == (None, 0.0)


def test_figures_count_followed_tones_on_conflicting_tracks_only(seed: shortcut.Seed) -> None:
    artefact_of = shortcut.artefacts(seed.data / "shifted")
    run = seed.folder / "runs" / "made-up"
    for folder in ("evaluation", "predictions"):
        (run / folder).mkdir(parents=True)
    for name in ("test", "shifted"):
        accuracies = {unit: {"accuracy": 0.5} for unit in ("track", "segment")}
        (run / "evaluation" / f"{name}.json").write_text(json.dumps(accuracies))
    genres = {track: track.partition("_")[0] for track in artefact_of}
    conflicting = [track for track in genres if artefact_of[track] != genres[track]]
    lines = []
    for track, genre in genres.items():  # one follows the tone, one is right, the rest neither
        guess = "none" if track in conflicting else genre
        guess = artefact_of[track] if track == conflicting[0] else guess
        guess = genre if track == conflicting[1] else guess
        lines.append(json.dumps({"track": track, "truth": genre, "prediction": guess}))
    (run / "predictions" / "shifted.jsonl").write_text("\n".join(lines))
    found = shortcut.figures(seed, run)
    share = pytest.approx(1 / len(conflicting))
    assert (found["follows_artefact"], found["shifted_conflicting"]) == (share, share)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_debiasing_gains_on_the_shifted_test(tmp_path: Path) -> None:
    """Seed 0, whatever it shows: it is not to be chosen. `make shortcut` has five seeds."""
    result = tmp_path / "result.json"
    words = [sys.executable, "benchmarks/shortcut.py", "--seeds", "1", "--losses", "poe-0.5"]
    words += ["--json", str(result), "--work", str(tmp_path / "work")]
    done = subprocess.run(
        words, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout, done.stderr)
    found = json.loads(result.read_text())
    assert found["seeds"] == 1
    check = found["beta_0_against_ce"]
    assert check["tracks"] == 240
    assert check["other_predictions"] == 0
    assert check["largest_difference_of_probabilities"] == 0.0
    assert found["results"]["poe-0.5"]["gain"]["shifted_track"]["mean"] > 0
