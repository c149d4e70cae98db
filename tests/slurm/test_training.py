"""slurm/train.sbatch, as it is shipped, on a real Slurm: what may happen to a job, and how it ends.

Every case ends with the sha256 of the weights of a run that nothing happened to, on two forked
ranks without Slurm, and the number of restarts that Slurm counted.
"""

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cluster import TWO_NODES, Cluster, Ended
from harness import start, steps_taken, until, weights_hash
from trainings import config

from mgc_dist import cli
from mgc_dist.config import TrainConfig
from mgc_dist.journal import read_status
from mgc_dist.training import checkpoint

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

KNOBS: dict[str, Any] = {"checkpoint_every_epochs": 2.0, "epochs": 40.0, "hang_timeout_s": 15.0}
SAVED = 2 * 66 // 10 + 1
"""The step of the first checkpoint."""


def settings_of(shards: Path, noisy: Path, run: Path) -> TrainConfig:
    return config(shards, noisy, run, **KNOBS, resume="auto")


@pytest.fixture(scope="module")
def whole(shards: Path, table: Path, noisy: Path, tmp_path_factory: Any) -> str:
    """Hash of the final weights of a run of 264 steps that nothing happened to, without Slurm."""
    work = tmp_path_factory.mktemp("whole")
    job = start(settings_of(shards, noisy, work / "run"), work)
    assert job.wait() == [0, 0], job.said
    return weights_hash(work / "run")


class Job:
    """A job of train.sbatch on two nodes."""

    def __init__(
        self, cluster: Cluster, settings: TrainConfig, flags: tuple[str, ...], words: list[str]
    ) -> None:
        self.cluster, self.run = cluster, settings.output.run
        file = self.run.with_suffix(".yaml")
        file.write_text(cli.dump("train", settings))
        words = ["--config", str(file), "--run", str(self.run), *words]
        self.words = (*TWO_NODES, *flags, "slurm/train.sbatch", *words)
        self.id = self.submit()

    def submit(self) -> str:
        return self.cluster.sbatch(*self.words)

    def at_step(self, step: int) -> "Job":
        """Wait until a step has been taken."""
        until(lambda: steps_taken(self.run) >= step, 120)
        return self

    def rank(self, rank: int) -> int:
        """Process of a rank of the try that is going on."""
        attempt = read_status(self.run)["attempt"]
        beat = self.run / "heartbeats" / f"{attempt}-rank{rank:05d}.json"
        return int(json.loads(beat.read_text())["pid"])

    def ended(self) -> Ended:
        return self.cluster.wait(self.id)

    def batch_log(self) -> str:
        return "".join(file.read_text() for file in self.cluster.folder.glob("mgc-train-*.out"))

    def check(self, whole: str, *, restarts: int, said: str = "", all_logs: bool = True) -> None:
        """It completed, with the weights that it would have had without the fault."""
        ended = self.ended()
        assert ended == Ended("COMPLETED", "0:0", restarts), self.cluster.said()
        assert said in self.batch_log()
        assert read_status(self.run)["state"] == "done"
        assert weights_hash(self.run) == whole
        logs = {file.name for file in (self.run / "logs").glob("*.log")}
        tries = range(restarts + 1)
        expected = {f"{self.id}-try{n}-rank{rank}.log" for n in tries for rank in (0, 1)}
        assert logs == expected if all_logs else logs <= expected


@pytest.fixture
def job(cluster: Cluster, shards: Path, table: Path, noisy: Path, tmp_path: Path) -> Any:
    """Submits train.sbatch, with flags of sbatch and words for the trainer."""
    settings = settings_of(shards, noisy, tmp_path / "run")
    return lambda *flags, words=(): Job(cluster, settings, flags, words)


def test_nothing_happens(job: Any, whole: str) -> None:
    job().check(whole, restarts=0)


def test_usr1_to_the_batch_script(job: Any, whole: str) -> None:
    """As --signal=B:USR1@300 before the time limit."""
    going = job().at_step(3)
    going.cluster.slurm("scancel", "--signal=USR1", "--batch", going.id)
    going.check(whole, restarts=1, said="saved and stopped on request")


@pytest.mark.slow
def test_usr1_to_one_rank(job: Any, whole: str) -> None:
    going = job().at_step(3)
    os.kill(going.rank(1), signal.SIGUSR1)
    going.check(whole, restarts=1, said="saved and stopped on request")


def test_preemption(job: Any, whole: str) -> None:
    """A job of a higher partition takes the nodes."""
    going = job().at_step(3)
    urgent = going.cluster.sbatch(
        *("--partition=urgent", "--nodes=2", "--exclusive", "--wrap", "sleep 3")
    )
    assert going.cluster.wait(urgent).state == "COMPLETED"
    going.check(whole, restarts=1)


def test_a_rank_is_killed(job: Any, whole: str) -> None:
    going = job().at_step(SAVED + 2)
    os.kill(going.rank(1), signal.SIGKILL)
    going.check(whole, restarts=1, said=f"failure 1 from step-{SAVED:08d}")


@pytest.mark.slow
def test_rank_0_is_killed_before_a_checkpoint(job: Any, whole: str) -> None:
    going = job().at_step(3)
    os.kill(going.rank(0), signal.SIGKILL)
    going.check(whole, restarts=1, said="failure 1 from the beginning")


@pytest.mark.slow
def test_a_node_crashes_and_the_newest_checkpoint_is_damaged(job: Any, whole: str) -> None:
    going = job().at_step(2 * SAVED + 2)
    going.cluster.do("crash", "n2")
    until(lambda: going.cluster.facts(going.id)["JobState"] == "PENDING")
    newest = sorted((going.run / checkpoint.FOLDER).glob("step-*"))[-1]
    shard = next(newest.glob("*optim_states.pt"))
    os.truncate(shard, shard.stat().st_size // 2)
    going.cluster.do("boot", "n2")
    going.check(whole, restarts=1)
    assert f"{newest.name}" in (going.run / "train.log").read_text()


@pytest.mark.slow
def test_a_rank_stands_still(job: Any, whole: str) -> None:
    going = job().at_step(SAVED + 2)
    os.kill(going.rank(1), signal.SIGSTOP)
    going.check(whole, restarts=1, said=f"failure 1 from step-{SAVED:08d}")


@pytest.mark.slow
def test_a_cable_is_cut(job: Any, whole: str) -> None:
    going = job().at_step(SAVED + 2)
    going.cluster.do("cut", "n2")
    time.sleep(45)
    going.cluster.do("plug", "n2")
    until(lambda: going.cluster.facts(going.id)["JobState"] == "COMPLETED", 240)
    # n2 may act on what it has missed when the next try is there: its TERM stops that one, saved,
    # or its launch is refused ("Job credential revoked")
    late = going.batch_log().count("saved and stopped on request")
    late += going.batch_log().count("did not launch all tasks")
    assert late <= 2
    going.check(whole, restarts=1 + late, all_logs=late == 0)


def test_scancel(job: Any, whole: str) -> None:
    """It saves, and stays cancelled; another sbatch goes on from there."""
    going = job().at_step(3)
    going.cluster.slurm("scancel", going.id)
    ended = going.ended()
    assert (ended.state, ended.restarts) == ("CANCELLED", 0), going.cluster.said()
    until(lambda: read_status(going.run)["state"] == "stopped")
    saved = sorted((going.run / checkpoint.FOLDER).glob("step-*"))
    assert len(saved) == 1
    assert not checkpoint.damage(saved[0])
    first, going.id = going.id, going.submit()
    assert going.ended() == Ended("COMPLETED", "0:0", 0), going.cluster.said()
    assert weights_hash(going.run) == whole
    logs = {file.name.split("-")[0] for file in (going.run / "logs").glob("*.log")}
    assert logs == {first, going.id}


@pytest.mark.slow
def test_requeued_by_hand(job: Any, whole: str) -> None:
    going = job().at_step(3)
    going.cluster.slurm("scontrol", "requeue", going.id)
    going.check(whole, restarts=1)


@pytest.mark.slow
def test_a_job_that_may_not_be_requeued(job: Any, whole: str) -> None:
    """It ends with 75, saved, and the same sbatch goes on."""
    going = job("--no-requeue").at_step(3)
    going.cluster.slurm("scancel", "--signal=USR1", "--batch", going.id)
    assert going.ended() == Ended("FAILED", "75:0", 0), going.cluster.said()
    assert "cannot be requeued: the same sbatch goes on" in going.batch_log()
    going.id = going.submit()
    assert going.ended() == Ended("COMPLETED", "0:0", 0), going.cluster.said()
    assert weights_hash(going.run) == whole


@pytest.mark.slow
def test_a_finished_run_is_trained_longer(
    job: Any, shards: Path, noisy: Path, tmp_path: Path
) -> None:
    """A second sbatch with more epochs, requeued on its way: the weights of two forked runs."""
    alone = settings_of(shards, noisy, tmp_path / "alone")
    half = replace(alone, optim=replace(alone.optim, epochs=19.5))
    longer = replace(alone, output=replace(alone.output, change=("epochs",)))
    for settings in (half, longer):
        forked = start(settings, tmp_path)
        assert forked.wait() == [0, 0], forked.said
    going = job(words=["--epochs", "19.5"])
    assert going.ended() == Ended("COMPLETED", "0:0", 0), going.cluster.said()
    done = steps_taken(going.run)
    going.words += ("--epochs", "40", "--change", "epochs")
    going.id = going.submit()
    going.at_step(done + 3)
    going.cluster.slurm("scancel", "--signal=USR1", "--batch", going.id)
    assert going.ended() == Ended("COMPLETED", "0:0", 1), going.cluster.said()
    assert weights_hash(going.run) == weights_hash(alone.output.run)


@pytest.mark.slow
def test_what_starting_again_does_not_mend(job: Any) -> None:
    going = job(words=["--model", "nowhere.json"])
    ended = going.ended()
    assert (ended.state, ended.restarts) == ("FAILED", 0)
    assert "failed before the run began" in going.batch_log()
    assert "nowhere.json" in (going.run / "logs" / f"{going.id}-try0-rank0.log").read_text()


@pytest.mark.slow
def test_an_array_of_two(job: Any, whole: str, tmp_path: Path) -> None:
    """One of them is stopped: only that one is requeued, though its number is the array's too."""
    going = job("--array=0-1", words=["--run", f"{tmp_path}/run-%a"])
    going.run = tmp_path / "run-1"
    going.at_step(3)
    assert json.loads((going.run / "lease.json").read_text())["attempt"].startswith(f"{going.id}.0")
    going.cluster.slurm("scancel", "--signal=USR1", "--batch", f"{going.id}_1")
    for number, restarts in ((0, 0), (1, 1)):
        ended = going.cluster.wait(f"{going.id}_{number}")
        assert ended == Ended("COMPLETED", "0:0", restarts), going.cluster.said()
        assert weights_hash(tmp_path / f"run-{number}") == whole
