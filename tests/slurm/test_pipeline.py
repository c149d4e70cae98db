"""slurm/pipeline.sh, as it is shipped: from a folder of tracks to an evaluated run, in six jobs."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster import ROOT, Cluster, Ended
from harness import start, weights_hash
from trainings import config

from mgc_dist import cli
from mgc_dist.bias_model import table as tables
from mgc_dist.data import manifest

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def submitted(cluster: Cluster, tmp_path: Path) -> Any:
    """Runs the pipeline's jobs to their end: name -> number, and what it printed."""

    def submit(*words: str | Path) -> tuple[dict[str, str], str]:
        said = cluster.slurm(
            *("env", f"SBATCH_OUTPUT={tmp_path}/%x-%j.out", "slurm/pipeline.sh", *words)
        )
        return dict(re.findall(r"^(\w+) +(\d+)", said, re.MULTILINE)), said

    return submit


def test_the_whole_way(
    submitted: Any,
    cluster: Cluster,
    tracks: Path,
    shards: Path,
    table: Path,
    noisy: Path,
    tmp_path: Path,
) -> None:
    settings = config(shards, noisy, tmp_path / "alone")
    job = start(settings, tmp_path)
    assert job.wait() == [0, 0], job.said
    flags = {
        "shard": {
            "groups": tracks / "artists.csv",
            "segment_s": 0.5,
            "hop_s": 0.25,
            "rows_per_shard": 20,
            "validation_fraction": 0.3,
            "test_fraction": 0.3,
        },
        "bias": {"backbone": "logmel", "folds": 2, "batch": 8, "device": "cpu"},
        "evaluate": {"device": "cpu"},
    }
    text = {k: {n: str(v) for n, v in section.items()} for k, section in flags.items()}
    file = tmp_path / "all.yaml"
    file.write_text(cli.dump("train", settings) + yaml.safe_dump(text))
    packed, run = tmp_path / "packed", tmp_path / "run"
    small = "--time=10 --cpus-per-task=1"
    jobs, said = submitted(
        *("--data", tracks, "--shards", packed, "--run", run, "--config", file, "--parts", "2"),
        *("--cpu", small, "--gpu", f"{small} --nodes=2", "--", "--seed", "0"),
    )
    assert list(jobs) == ["pack", "join", "bias", "train", "evaluate"]
    ends = {name: cluster.wait(number, 300) for name, number in jobs.items()}
    assert set(ends.values()) == {Ended("COMPLETED", "0:0", 0)}, f"{ends}\n{cluster.said()}"
    assert manifest.read(packed).dataset_id == manifest.read(shards).dataset_id
    assert (packed / manifest.NAME).read_bytes() == (shards / manifest.NAME).read_bytes()
    ours, theirs = (tables.read_header(folder / "bias") for folder in (packed, shards))
    assert ours.table_sha256 == theirs.table_sha256
    assert weights_hash(run) == weights_hash(tmp_path / "alone")
    assert json.loads((run / "evaluation" / "test.json").read_text())["track"]["accuracy"] >= 0
    assert (run / "report.html").is_file()
    numbers = ",".join(jobs.values())
    assert f"squeue --jobs={numbers}" in said


def test_what_fails_is_not_built_upon(submitted: Any, cluster: Cluster, tmp_path: Path) -> None:
    nothing = tmp_path / "nothing"
    words = ("--data", nothing, "--shards", tmp_path / "s", "--run", tmp_path / "r")
    small = "--time=10 --cpus-per-task=1"
    jobs, _ = submitted(*words, "--cpu", small, "--gpu", small)
    ends = {name: cluster.wait(number, 120).state for name, number in jobs.items()}
    assert ends == {"pack": "FAILED"} | dict.fromkeys(list(jobs)[1:], "CANCELLED")
    assert str(nothing) in cluster.said()


def test_usage() -> None:
    import subprocess

    done = subprocess.run(
        [ROOT / "slurm" / "pipeline.sh", "--data", "x"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "--parts N" in done.stderr
