"""Two nodes: what the doctor says, staging, and a hostfile without Slurm."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cluster import ROOT, TWO_NODES, Cluster, Ended
from harness import start, steps_taken, until, weights_hash
from trainings import config

from mgc_dist import cli
from mgc_dist.data import manifest
from mgc_dist.journal import read_status
from mgc_dist.packing import verify

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]


@pytest.fixture
def doctor(cluster: Cluster, tmp_path: Path) -> Any:
    """What the doctor says on two nodes, and how the job ended."""

    def ask(*words: str | Path, flags: tuple[str, ...] = ()) -> tuple[str, Ended]:
        command = ("slurm/run.sbatch", "-m", "mgc_dist.doctor", *words)
        job = cluster.sbatch(*TWO_NODES, *flags, *command)
        ended = cluster.wait(job, 120)
        return (tmp_path / f"mgc-run-{job}.out").read_text(), ended

    return ask


def test_the_doctor_finds_nothing(doctor: Any, shards: Path, table: Path, tmp_path: Path) -> None:
    said, ended = doctor("--shards", shards, "--run", tmp_path / "run", "--device", "cpu")
    assert ended == Ended("COMPLETED", "0:0", 0), said
    for line in (
        r"^ok +ranks +2 ranks on 2 hosts: n1 \(192\.0\.2\.11\) 0, n2 \(192\.0\.2\.12\) 1$",
        r"^ok +MASTER_ADDR +MASTER_ADDR n1 is 192\.0\.2\.11$",
        r"^ok +own address +rank 1: n2 is 192\.0\.2\.12$",
        r"^ok +MASTER_PORT +MASTER_PORT 1\d{4} is free on n1$",
        r"^ok +data +data set [0-9a-f]{12}, bias table [0-9a-f]{12}: 198 segments in 12 shards",
        r"^ok +run folder +.* is held by nobody$",
        r"^ok +shared +all ranks see /",
        r"^ok +disk +[0-9.]+ GiB free",
        r"^ok +time +(19|20) min until the job's limit; no checkpoint was timed yet; "
        r"after a SIGTERM of Slurm 15 s are left$",
    ):
        assert re.search(line, said, re.MULTILINE), f"{line}\n{said}"
    assert "WRONG" not in said
    assert not list(tmp_path.glob(".doctor-*"))


def test_the_doctor_counts_gpus(doctor: Any, tmp_path: Path) -> None:
    said, ended = doctor("--run", tmp_path / "run", flags=("--gpus-per-node=2",))
    assert ended.state == "COMPLETED", said
    assert "1 task for 2 GPUs on n1: the others are idle; sbatch --ntasks-per-node=2" in said
    flags = ("--gpus-per-node=1", "--ntasks-per-node=2")
    said, ended = doctor("--run", tmp_path / "run", flags=flags)
    assert ended.state == "FAILED"
    # the first node that says so ends the other one, maybe before it has said anything
    assert re.search("tasks on n[12] is 2 for 1 GPUs, where one task a GPU is needed", said)


def test_the_doctor_sees_what_only_one_node_sees(cluster: Cluster, tmp_path: Path) -> None:
    """Without Slurm: variables by hand, and a folder that is another one on n2."""
    local = tmp_path / "local"
    local.mkdir()
    hidden = f"mount -t tmpfs none {local} && exec"
    said = _on_both(cluster, tmp_path, second=hidden, words=("--run", str(local)))
    assert f"n2 does not see what rank 0 writes into {local}" in said


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"MASTER_ADDR": "n9"}, "MASTER_ADDR on n2 is n9 ("),
        ({"WORLD_SIZE": "x"}, "RANK, WORLD_SIZE, LOCAL_RANK: got"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT: got 99999, expected 1 to 65535"),
    ],
)
def test_a_wrong_variable_is_named(
    variables: dict[str, str], message: str, cluster: Cluster, tmp_path: Path
) -> None:
    said = _on_both(cluster, tmp_path, variables=variables)
    assert message in said


def test_other_code_on_a_node_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    copy = tmp_path / "code"
    shutil.copytree(ROOT / "mgc_dist", copy / "mgc_dist")
    with (copy / "mgc_dist" / "__init__.py").open("a") as file:
        file.write("# changed\n")
    said = _on_both(cluster, tmp_path, second=f"cd {copy} && exec")
    assert re.search(r"code on rank 1 \(n2\): got [0-9a-f]{12}, expected [0-9a-f]{12}", said)


@pytest.mark.slow
def test_a_folder_that_is_not_shared_ends_a_training(
    cluster: Cluster, shards: Path, noisy: Path, table: Path, tmp_path: Path
) -> None:
    """In the first seconds, not at the first checkpoint."""
    local = tmp_path / "local"
    local.mkdir()
    file = tmp_path / "config.yaml"
    file.write_text(cli.dump("train", config(shards, noisy, local / "run")))
    said = _on_both(
        cluster,
        tmp_path,
        second=f"mount -t tmpfs none {local} && exec",
        words=("--config", str(file)),
        module="train",
    )
    assert f"--run {local}/run: got n2 (rank 1), which does not see what rank 0 writes" in said


@pytest.mark.slow
def test_each_node_copies_the_shards_once(
    cluster: Cluster, shards: Path, table: Path, noisy: Path, tmp_path: Path
) -> None:
    settings = config(shards, noisy, tmp_path / "run")
    alone = replace(settings, output=replace(settings.output, run=tmp_path / "alone"))
    job = start(alone, tmp_path)
    assert job.wait() == [0, 0], job.said
    file = tmp_path / "config.yaml"
    file.write_text(cli.dump("train", settings))
    number = cluster.sbatch(
        *("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1"),
        *("slurm/train.sbatch", "--config", file, "--run", settings.output.run),
        *("--stage-dir", f"{tmp_path}/scratch-$SLURMD_NODENAME", "--micro-batch", "1"),
    )
    assert cluster.wait(number) == Ended("COMPLETED", "0:0", 0), cluster.said()
    id_ = manifest.read(shards).dataset_id[:16]
    for node in ("n1", "n2"):
        copied = tmp_path / f"scratch-{node}" / f"mgc-{os.geteuid()}" / id_
        assert manifest.read(copied) == manifest.read(shards)
        verify.verify(copied, manifest.read(copied), jobs=1, progress=iter)
    assert read_status(settings.output.run)["world"] == 4


def test_srun_alone_starts_the_ranks_of_one_node(
    cluster: Cluster, shards: Path, table: Path, noisy: Path, tmp_path: Path
) -> None:
    """As docs/launchers.md has it: no batch script, and no address is told."""
    file, run = tmp_path / "config.yaml", tmp_path / "run"
    file.write_text(cli.dump("train", config(shards, noisy, run)))
    words = ("--nodes=1", "--ntasks=2", "--gpus-per-node=2", "--time=10")
    cluster.slurm("srun", *words, sys.executable, "launch/train.py", "--config", file)
    assert read_status(run)["world"] == 2
    assert (run / "DONE").exists()


@pytest.mark.slow
def test_a_hostfile_without_slurm(
    cluster: Cluster, shards: Path, table: Path, noisy: Path, tmp_path: Path
) -> None:
    """`deepspeed` on each node, told which one it is: no ssh from node to node is needed."""
    settings = config(shards, noisy, tmp_path / "run", resume="auto", epochs=20.0)
    alone = start(replace(settings, output=replace(settings.output, run=tmp_path / "a")), tmp_path)
    assert alone.wait() == [0, 0], alone.said
    (tmp_path / "hosts").write_text("n1 slots=1\nn2 slots=1\n")
    (tmp_path / "config.yaml").write_text(cli.dump("train", settings))

    def launch() -> list[subprocess.Popen[bytes]]:
        tool = Path(sys.executable).with_name("deepspeed")
        words = [tool, "--hostfile", tmp_path / "hosts", "--no_ssh", "--master_addr", "n1"]
        words += ["--master_port", "29512"]
        return [
            subprocess.Popen(
                [
                    *(*cluster.on(f"n{k + 1}"), *map(str, words), "--node_rank", str(k)),
                    *("launch/train.py", "--config", str(tmp_path / "config.yaml")),
                ],
                stdout=(tmp_path / f"node-{k}.txt").open("a"),
                stderr=subprocess.STDOUT,
                env=cluster.environment,
                cwd=ROOT,
            )
            for k in range(2)
        ]

    first = launch()
    until(lambda: steps_taken(settings.output.run) >= 3, 120)
    pid = json.loads(
        next((settings.output.run / "heartbeats").glob("*-rank00001.json")).read_text()
    )
    os.kill(pid["pid"], signal.SIGUSR1)
    said = [(tmp_path / f"node-{k}.txt").read_text for k in range(2)]
    assert [node.wait(120) for node in first] == [0, 0], said[0]() + said[1]()
    assert read_status(settings.output.run)["state"] == "stopped"
    assert [node.wait(120) for node in launch()] == [0, 0], said[0]() + said[1]()
    assert read_status(settings.output.run)["state"] == "done"
    assert weights_hash(settings.output.run) == weights_hash(tmp_path / "a")
    assert "2 ranks on 2 hosts: n1 (192.0.2.11) 0, n2 (192.0.2.12) 1" in said[0]()


def _on_both(
    cluster: Cluster,
    folder: Path,
    *,
    variables: dict[str, str] | None = None,
    second: str = "exec",
    words: tuple[str, ...] = (),
    module: str = "doctor",
) -> str:
    """What a command says on n1 and n2 without Slurm; variables and commands are for n2."""
    files, processes = [], []
    for rank, before in enumerate(("exec", second)):
        environment = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        environment |= {"MASTER_ADDR": "n1", "MASTER_PORT": 29511}
        environment |= {"OMP_NUM_THREADS": 1} | ((variables or {}) if rank else {})
        sets = [f"{name}={value}" for name, value in environment.items()]
        command = f"{before} {sys.executable} -m mgc_dist.{module} " + " ".join(words)
        if module == "doctor":
            command += " --device cpu --wait-s 15"
        files.append(folder / f"said-{rank}.txt")
        processes.append(
            subprocess.Popen(
                [*cluster.on(f"n{rank + 1}"), "env", *sets, "sh", "-c", command],
                stdout=files[-1].open("w"),
                stderr=subprocess.STDOUT,
                env=cluster.environment,
                cwd=ROOT,
            )
        )
    codes = [process.wait(120) for process in processes]
    said = "\n".join(file.read_text() for file in files)
    assert codes[1] not in (0, None), said
    return said
