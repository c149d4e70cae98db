"""The questions of the preflight, each with an answer for what is well and for what is not."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import _free_port

from mgc_dist.cluster import lease, preflight
from mgc_dist.cluster.seat import Seat
from mgc_dist.errors import UserError


def at(rank: int = 0, world: int = 2, local: int = 2, address: str = "127.0.0.1") -> Seat:
    return Seat(
        rank=rank,
        world=world,
        local_rank=rank % local,
        local_world=local,
        address=address,
        port=_free_port(),
    )


def answer(question: str, found: list[preflight.Finding]) -> tuple[str, str]:
    """Verdict and sentence."""
    return next((f.verdict, f.sentence) for f in found if f.question == question)


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("SLURM_", "GLOO_", "TORCH")):
            monkeypatch.delenv(name)


def test_all_is_well_on_one_host(tmp_path: Path) -> None:
    found = preflight.look(at(), run=tmp_path / "new" / "run", device="cpu")
    assert {f.verdict for f in found} == {"ok"}
    assert [f.question for f in found] == [
        "MASTER_ADDR",
        "MASTER_PORT",
        "cores",
        "build locks",
        "disk",
    ]


def test_a_process_alone_is_asked_no_address() -> None:
    alone = Seat(rank=0, world=1, local_rank=0, local_world=1, address=None, port=29500)
    found = preflight.look(alone, run=None, device="cpu")
    assert [f.question for f in found] == ["cores", "build locks"]


def test_a_name_that_nobody_knows() -> None:
    found = preflight.look(at(address="nobody.invalid"), run=None, device="cpu")
    verdict, sentence = answer("MASTER_ADDR", found)
    assert verdict == "wrong"
    assert sentence.startswith(f"MASTER_ADDR on {socket.gethostname()} is nobody.invalid (")


def test_rank_0_on_another_host_than_master_addr(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong under Slurm; elsewhere it may be the address of a service."""
    seat = at(address="192.0.2.7")
    assert answer("MASTER_ADDR", preflight.look(seat, run=None, device="cpu"))[0] == "note"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    verdict, sentence = answer("MASTER_ADDR", preflight.look(seat, run=None, device="cpu"))
    assert verdict == "wrong"
    assert "192.0.2.7), which is no address of" in sentence
    seat = at(rank=1, address="192.0.2.7")
    assert answer("MASTER_ADDR", preflight.look(seat, run=None, device="cpu"))[0] == "ok"


def test_a_port_in_use() -> None:
    seat = at()
    with socket.socket() as taken:
        taken.bind(("", seat.port))
        taken.listen()
        verdict, sentence = answer("MASTER_PORT", preflight.look(seat, run=None, device="cpu"))
    assert verdict == "wrong"
    assert f"is {seat.port} (Address already in use)" in sentence


def test_a_host_that_knows_itself_as_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others would be told 127.0.1.1, as Debian's installer writes it."""
    seat = at(world=2, local=1)
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    found = preflight.look(seat, run=None, device="cpu")
    verdict, sentence = answer("own address", found)
    assert verdict == "wrong"
    assert "is 127.0.1.1" in sentence
    assert "GLOO_SOCKET_IFNAME" in sentence
    with pytest.raises(UserError, match="GLOO_SOCKET_IFNAME") as caught:
        raise next(f.error for f in found if f.error)
    assert caught.value.this_rank_only
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    asked = [f.question for f in preflight.look(seat, run=None, device="cpu")]
    assert "own address" not in asked


@pytest.mark.parametrize(
    ("gpus", "tasks", "verdict"), [("4", 4, "ok"), ("4", 1, "note"), ("1", 2, "wrong")]
)
def test_tasks_and_gpus(
    gpus: str, tasks: int, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", gpus)
    seat = at(world=tasks, local=tasks)
    got, sentence = answer("GPUs", preflight.look(seat, run=None, device="auto"))
    assert got == verdict
    if verdict != "ok":
        assert f"--ntasks-per-node={gpus}" in sentence
    assert "GPUs" not in [f.question for f in preflight.look(seat, run=None, device="cpu")]


def test_fewer_cores_than_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "4096")
    verdict, sentence = answer("cores", preflight.look(at(), run=None, device="cpu"))
    assert verdict == "note"
    assert "of the 4096 cores" in sentence


def test_a_lock_that_a_killed_build_has_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "py311_cpu" / "op" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert answer("build locks", preflight.look(at(), run=None, device="cpu"))[0] == "ok"
    old = time.time() - 2 * preflight.OLD_LOCK_S
    os.utime(lock, (old, old))
    verdict, sentence = answer("build locks", preflight.look(at(), run=None, device="cpu"))
    assert verdict == "note"
    assert str(lock) in sentence


def test_too_little_room_for_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoints" / "step-00000010"
    folder.mkdir(parents=True)
    with (folder / "state").open("wb") as file:
        file.truncate(1 << 43)  # a hole
    verdict, sentence = answer("disk", preflight.look(at(), run=tmp_path, device="cpu"))
    assert verdict == "note"
    assert "a checkpoint takes 8192.0: make room" in sentence


SHOWN = {
    "config": "KillWait                = 30 sec\n",
    "partition": "PartitionName=gpu\n   ExclusiveUser=NO GraceTime={grace} Hidden=NO\n",
    "job": "JobId=7 StartTime=2030-01-01T00:00:00 EndTime={end} Deadline=N/A\n",
}


@pytest.mark.parametrize(
    ("save_s", "left_s", "grace", "verdict"),
    [
        (3.0, 3600, 0, "ok"),
        (25.0, 3600, 0, "note"),  # 30 s after SIGTERM are not enough to be sure
        (25.0, 3600, 120, "ok"),
        (25.0, 40, 120, "note"),  # the job ends
    ],
)
def test_time_to_save(
    save_s: float,
    left_s: float,
    grace: int,
    verdict: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tool = tmp_path / "scontrol"
    end = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + left_s))
    texts = {name: text.format(grace=grace, end=end) for name, text in SHOWN.items()}
    cases = "".join(f"{name}) printf '{text}' ;;\n" for name, text in texts.items())
    tool.write_text(f'#!/bin/sh\ncase "$2" in\n{cases}esac\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_PARTITION", "gpu")
    lines = [{"event": "checkpoint", "save_s": s} for s in (1.0, save_s, 0.5)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    seat = at(address=socket.gethostbyname("localhost"))
    got, sentence = answer("time", preflight.look(seat, run=tmp_path, device="cpu"))
    assert got == verdict, sentence
    assert f"a checkpoint took up to {save_s:.1f} s" in sentence
    assert f"after a SIGTERM of Slurm {max(30, grace)} s are left" in sentence
    asked = [f.question for f in preflight.look(at(rank=1), run=tmp_path, device="cpu")]
    assert "time" not in asked, "one rank asks Slurm, not all"


def test_without_scontrol_nothing_is_made_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    verdict, sentence = answer("time", preflight.look(at(), run=tmp_path, device="cpu"))
    assert (verdict, sentence) == (
        "ok",
        "an unknown time until the job's limit; no checkpoint was timed yet",
    )
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 601))
    sentence = answer("time", preflight.look(at(), run=tmp_path, device="cpu"))[1]
    assert sentence.startswith("10 min until the job's limit")


def test_who_holds_the_run_folder(tmp_path: Path) -> None:
    assert next(iter(preflight.lease(tmp_path))).sentence.endswith("is held by nobody")
    held = lease.acquire(tmp_path, lease.new_attempt())
    finding = next(iter(preflight.lease(tmp_path)))
    assert finding.verdict == "note"
    assert f"is held by process {os.getpid()}" in finding.sentence
    held.release()
    (tmp_path / lease.LEASE).write_text("{")
    assert next(iter(preflight.lease(tmp_path))).verdict == "ok"


def test_it_does_not_import_torch() -> None:
    """In a job it speaks in the first second; torch takes longer to be imported."""
    code = "import sys; from mgc_dist.cluster import preflight; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "False"


def test_nobody_needs_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    assert answer("build locks", preflight.look(at(), run=None, device="cpu"))[0] == "ok"
