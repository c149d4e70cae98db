"""Ranks that differ, fail or do not come are named before a collective can wait for them."""

import json
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import run_ranks

from mgc_dist.cluster import meeting as meetings
from mgc_dist.cluster import seat
from mgc_dist.cluster.meeting import Facts
from mgc_dist.errors import PeerLost, UserError


def said_by(rank_flags: list[Facts], wait_s: float = 20.0) -> str:
    """What this rank hears when each has its own flags."""
    flags = rank_flags[int(os.environ["RANK"])]
    try:
        with meetings.meet(flags, wait_s=wait_s):
            return "met"
    except (UserError, PeerLost) as error:
        return f"{type(error).__name__} {error}"


def test_code_of_every_wing_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = Path(meetings.__file__).parent.parent
    copy = tmp_path / "mgc_dist"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(meetings, "__file__", str(copy / "cluster" / "meeting.py"))
    before = meetings.code_hash()
    for path in ("training/losses.py", "train.py"):
        with (copy / path).open("a") as file:
            file.write("# another version\n")
        after = meetings.code_hash()
        assert after != before
        before = after
    (copy / "data" / "audio.py").rename(copy / "data" / "sound.py")
    assert meetings.code_hash() != before


def test_alike() -> None:
    assert run_ranks(3, said_by, [{"--lr": "1"}] * 3) == ["met"] * 3


def test_another_flag_is_named_on_all_ranks() -> None:
    said = run_ranks(3, said_by, [{"--lr": "1"}, {"--lr": "1"}, {"--lr": "2"}])
    assert len(set(said)) == 1
    assert said[0].startswith("UserError --lr on rank 2 (")
    assert "got 2, expected 1, as on rank 0 (" in said[0]


def test_other_code_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = meetings.code_hash()
    monkeypatch.setattr(meetings, "code_hash", lambda: ours + os.environ["RANK"])
    said = run_ranks(2, said_by, [{}, {}])
    assert said[0] == said[1]
    assert f"code on rank 1 ({os.uname().nodename}): got {ours}1, expected {ours}0" in said[0]


def different_data() -> str:
    rank = os.environ["RANK"]
    try:
        with meetings.meet(wait_s=20) as meeting:
            meeting.all_same("data", {"data set (--shards)": f"id{rank}"})
    except UserError as error:
        return str(error)
    return ""


def test_other_data_is_named() -> None:
    said = run_ranks(2, different_data)
    assert said[0] == said[1]
    assert said[0].startswith("data set (--shards) on rank 1 (")


def one_fails(who: int) -> tuple[str, int, float]:
    """A rank fails on its own, before the process group: what the others hear, and how soon."""
    began = time.monotonic()
    try:
        with meetings.meet(wait_s=60) as meeting:
            if meeting.seat.rank == who:
                raise UserError("--shards x", got="nothing", expected="y", cure="z", exit_code=74)
            meeting.all_same("data", {})
    except (UserError, PeerLost) as error:
        return str(error), error.exit_code, time.monotonic() - began
    return "", 0, 0.0


@pytest.mark.parametrize("who", [0, 1])
def test_a_rank_that_fails_alone_ends_the_others(who: int) -> None:
    said = run_ranks(3, one_fails, who)
    for rank, (message, code, seconds) in enumerate(said):
        assert code == 74
        assert seconds < 20
        if rank != who:
            name = f"rank {who} ({os.uname().nodename}) has ended: --shards x: got nothing"
            assert message.startswith(name)


def one_stays_away() -> tuple[str, int]:
    if os.environ["RANK"] == "2":
        return "", 0
    try:
        with meetings.meet(wait_s=2):
            pass
    except PeerLost as error:
        return str(error), error.exit_code
    return "met", 0


def test_a_rank_that_does_not_come_is_named() -> None:
    said = run_ranks(3, one_stays_away)
    assert said[0][1] == said[1][1] == 75
    assert "of 3 ranks, 2 told nothing about their flags and code for 2 s" in said[0][0]


def hang_up() -> str:
    """Rank 0 disappears while the others wait for its verdict."""
    if os.environ["RANK"] == "0":
        with suppress(KeyboardInterrupt), meetings.meet(wait_s=20):
            os._exit(9)
    try:
        with meetings.meet(wait_s=20) as meeting:
            meeting.all_same("data", {})
    except PeerLost as error:
        Path(os.environ["SAID"]).write_text(str(error))
    return ""


def test_rank_0_that_dies_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "said"
    monkeypatch.setenv("SAID", str(file))
    with pytest.raises((RuntimeError, EOFError)):
        run_ranks(2, hang_up)
    deadline = time.monotonic() + 10
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert "rank 1 heard nothing from rank 0" in file.read_text()


def test_hosts_and_their_ranks() -> None:
    where = [("n1", "10.0.0.1")] * 2 + [("n2", "10.0.0.2")] * 2
    said = [{"host": host, "address": address} for host, address in where]
    expected = "4 ranks on 2 hosts: n1 (10.0.0.1) 0-1, n2 (10.0.0.2) 2-3"
    assert meetings.describe(said) == expected
    mixed = [said[0], said[2], said[1]]
    assert meetings.describe(mixed).endswith("n1 (10.0.0.1) 0 2, n2 (10.0.0.2) 1")
    many = [{"host": f"n{k}", "address": "x"} for k in range(12)]
    assert meetings.describe(many).endswith("n7 (x) 7 and 4 more")


def test_a_process_alone_meets_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    with meetings.meet({"--lr": "1"}) as meeting:
        heard: list[list[Facts]] = []
        meeting.all_tell("x", {"a": json.dumps([1])}, heard.append)
        assert heard == [[{"a": "[1]"}]]


@pytest.mark.parametrize(
    ("tasks", "node", "local"),
    [("2(x3)", "2", 2), ("4(x2),3", "0", 4), ("4(x2),3", "2", 3), ("5", "0", 5)],
)
def test_slurms_tasks_of_a_node(
    tasks: str, node: str, local: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "")  # restored at the end
        monkeypatch.delenv(name)
    variables = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "11"}
    variables |= {"SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_NODEID": node, "MASTER_ADDR": "n1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    here = seat.seat()
    assert (here.rank, here.world, here.local_rank, here.local_world) == (3, 11, 1, local)
    assert os.environ["LOCAL_SIZE"] == str(local)  # for DeepSpeed
