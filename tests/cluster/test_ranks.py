"""Who takes part: launchers' variables, agreed decisions, seeds."""

import json
import os
import random
import resource
import statistics
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import _free_port, run_ranks

from mgc_dist.cluster import ranks
from mgc_dist.cluster.seat import seat
from mgc_dist.errors import RunFailed, UserError


def test_one_process_needs_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    with ranks.join("cpu") as peers:
        assert (peers.rank, peers.world, peers.is_first) == (0, 1, True)
        assert peers.all_sum(torch.ones(2)).tolist() == [1, 1]
        assert peers.all_decide(lambda: "x") == "x"
        peers.barrier()


def collectives() -> tuple[list[float], str, str]:
    with ranks.join("cpu") as peers:
        total = peers.all_sum(torch.tensor([float(peers.rank), 1.0])).tolist()
        said = peers.all_decide(lambda: f"rank {peers.rank}")

        def refuse() -> str:
            raise UserError("--x", got=1, expected="2", cure=f"said by rank {peers.rank}")

        try:
            peers.all_decide(refuse)
        except UserError as error:
            return total, said, str(error)
    return total, said, ""


def test_collectives_and_decisions() -> None:
    message = "--x: got 1, expected 2\n  said by rank 0"
    assert run_ranks(3, collectives) == [([3.0, 3.0], "rank 0", message)] * 3


def stumble() -> str:
    with ranks.join("cpu") as peers:
        try:
            peers.all_decide(lambda: {}["nothing"])
        except (KeyError, RunFailed) as error:
            return f"{type(error).__name__}: {error}"
    return ""


def test_what_rank_0_has_not_foreseen_ends_all() -> None:
    said = ["KeyError: 'nothing'", "RunFailed: rank 0 has failed: KeyError: 'nothing'"]
    assert run_ranks(2, stumble) == said


def slurm_numbers() -> tuple[int, int, int]:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE"):
        os.environ[f"SLURM_{name}"] = os.environ.pop(name)
    os.environ["SLURM_PROCID"] = os.environ.pop("SLURM_RANK")
    os.environ["SLURM_LOCALID"] = os.environ.pop("SLURM_LOCAL_RANK")
    os.environ["SLURM_NTASKS"] = os.environ.pop("SLURM_WORLD_SIZE")
    with ranks.join("cpu") as peers:
        total = peers.all_sum(torch.ones(1))
        return peers.rank, peers.world, int(total)


def test_slurms_variables_are_understood() -> None:
    assert run_ranks(2, slurm_numbers) == [(0, 2, 2), (1, 2, 2)]


MPI = {"RANK": "1", "SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"}
STEP = {"PROCID": "3", "NTASKS": "4", "LOCALID": "3", "STEP_NUM_TASKS": "4", "NODEID": "0"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({f"OMPI_COMM_WORLD_{k}": v for k, v in MPI.items()}, (1, 4, 1, 4)),
        ({f"SLURM_{k}": v for k, v in (STEP | {"TASKS_PER_NODE": "4"}).items()}, (3, 4, 3, 4)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, (0, 1, 0, 1)),  # a batch script
    ],
)
def test_ranks_of_mpirun_and_of_srun_alone(
    variables: dict[str, str], expected: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", variables)
    here = seat()
    assert (here.rank, here.world, here.local_rank, here.local_world) == expected
    assert here.address == ("127.0.0.1" if here.world > 1 else None)


def test_several_hosts_need_the_address_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {f"OMPI_COMM_WORLD_{k}": v for k, v in (MPI | {"LOCAL_SIZE": "2"}).items()}
    monkeypatch.setattr(os, "environ", variables)
    with pytest.raises(UserError, match=r"MASTER_ADDR: got not set(?s:.*)-x MASTER_ADDR=HOST"):
        seat()
    monkeypatch.setattr(os, "environ", variables | {"MASTER_ADDR": "n1"})
    assert seat().address == "n1"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK: got 2 with WORLD_SIZE 2"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "whole numbers"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR: got not set"),
    ],
)
def test_contradicting_variables_are_refused(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message), ranks.join("cpu"):
        pass


def test_a_port_that_is_taken_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    port = _free_port()
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", port))
        taken.listen()
        variables = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        for name, value in (variables | {"MASTER_PORT": str(port)}).items():
            monkeypatch.setenv(name, value)
        message = rf"127\.0\.0\.1:{port}(.|\n)*--master_port"
        with pytest.raises(UserError, match=message), ranks.join("cpu", timeout_s=5):
            pass


def test_cuda_without_a_gpu_is_refused() -> None:
    with pytest.raises(UserError, match="got 0 GPUs"), ranks.join("cuda"):
        pass


def test_seeds_depend_on_every_number() -> None:
    def draw(*numbers: int) -> tuple[float, float, float]:
        ranks.seed_everything(*numbers)
        return torch.rand(()).item(), np.random.rand(), random.random()

    assert draw(1, 2, 3) == draw(1, 2, 3)
    others = [draw(1, 2, 3), draw(0, 2, 3), draw(1, 3, 2), draw(1, 2, 4)]
    assert len(set(others)) == 4


def left_in_order(alone: bool) -> int:
    """How often a rank that fails leaves the process group in order."""
    left: list[int] = []
    ranks.dist.destroy_process_group = lambda: left.append(1)

    def fail() -> None:
        with ranks.join("cpu") as peers:
            peers.barrier()  # both have joined
            raise UserError("x", got=1, expected="2", cure="3", this_rank_only=alone)

    with pytest.raises(UserError, match=r"^x: "):
        fail()
    return len(left)


def test_a_rank_that_fails_alone_does_not_wait_for_its_peers() -> None:
    assert run_ranks(2, left_in_order, True) == [0, 0], "NCCL's farewell waits for all ranks"
    assert run_ranks(2, left_in_order, False) == [1, 1], "all ranks have met it"


def new_pages_of_steps(count: int) -> list[int]:
    """Pages that each pass over an encoder's first layers takes from the kernel."""
    layers = torch.nn.Sequential(
        torch.nn.Conv1d(1, 64, 10, 5),
        torch.nn.GELU(),
        torch.nn.Conv1d(64, 64, 3, 2),
        torch.nn.GELU(),
        torch.nn.Conv1d(64, 64, 3, 2),
    )
    wave, found = torch.zeros(8, 1, 48_000), []
    for _ in range(count):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        layers(wave).sum().backward()
        found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return found


def pages_before_and_after_joining() -> tuple[list[int], list[int]]:
    before = new_pages_of_steps(4)
    with ranks.join("cpu"):
        return before, new_pages_of_steps(8)


def test_memory_is_kept_from_step_to_step_on_a_cpu() -> None:
    """In a process of its own: what malloc is told, other tests here have told it before."""
    code = "import json, test_ranks as t; print(json.dumps(t.pages_before_and_after_joining()))"
    variables = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    drop = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")
    kept = {name: value for name, value in os.environ.items() if name not in drop}
    done = subprocess.run(
        [sys.executable, "-c", code], env=kept | variables, capture_output=True, check=True
    )
    before, after = json.loads(done.stdout)
    assert min(before) > 5000
    # the median: a heap whose free pieces do not fit may still grow once more
    assert statistics.median(after[2:]) < 0.1 * min(before), (before, after)
