"""Where a process stands among its peers, as its launcher or Slurm says; imports no torch.

Ranks come from the launchers deepspeed, torchrun and accelerate (RANK, WORLD_SIZE, ...), from
Open MPI's mpirun (OMPI_COMM_WORLD_RANK, ...), from Slurm's srun (SLURM_PROCID, ...) or, without any
of these, are one process.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from mgc_dist.errors import UserError

_SLURM = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_NTASKS"}
_OPEN_MPI = {
    "RANK": "OMPI_COMM_WORLD_RANK",
    "LOCAL_RANK": "OMPI_COMM_WORLD_LOCAL_RANK",
    "WORLD_SIZE": "OMPI_COMM_WORLD_SIZE",
    "LOCAL_SIZE": "OMPI_COMM_WORLD_LOCAL_SIZE",
}


MET: set[int] = set()
"""Ports at which this process has met its peers: what rank 0 serves there, it serves until its end.

A second server at the port of a first one that still ends would be refused.
"""


@dataclass(frozen=True, kw_only=True)
class Seat:
    """Numbers of a process.

    Attributes:
        rank, world: 0 .. world - 1 of all processes.
        local_rank, local_world: the same on this host.
        address: the host of rank 0; None for a process alone.
        port: where rank 0 listens.
    """

    rank: int
    world: int
    local_rank: int
    local_world: int
    address: str | None
    port: int


def seat() -> Seat:
    """Read the environment; what MPI or Slurm alone say is written back for DeepSpeed to find.

    Raises:
        UserError: the variables are no numbers, or contradict.
    """
    if "RANK" not in os.environ:
        _take_over()
    os.environ.setdefault("LOCAL_RANK", "0")
    try:
        world = int(os.environ.get("WORLD_SIZE", "1"))
        rank = int(os.environ.get("RANK", "0"))
        local_rank = int(os.environ["LOCAL_RANK"])
        local_world = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", world)))
    except ValueError as error:
        raise UserError(
            "environment variables RANK, WORLD_SIZE, LOCAL_RANK",
            got=str(error),
            expected="whole numbers",
            cure="let the launcher set them",
            this_rank_only=True,
        ) from error
    if not 0 <= rank < world:
        raise UserError(
            "environment variable RANK",
            got=f"{rank} with WORLD_SIZE {world}",
            expected="0 to WORLD_SIZE - 1",
            cure="let the launcher set both",
            this_rank_only=True,
        )
    if world > 1 and "MASTER_ADDR" not in os.environ:
        raise UserError(
            "environment variable MASTER_ADDR",
            got="not set",
            expected=f"the host of rank 0 of {world} ranks",
            cure="export MASTER_ADDR=HOST (mpirun: -x MASTER_ADDR=HOST), or start with deepspeed; "
            "slurm/train.sbatch does it for Slurm",
            this_rank_only=True,
        )
    port = os.environ.get("MASTER_PORT", "29500")
    if not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(
            "environment variable MASTER_PORT",
            got=port,
            expected="1 to 65535",
            cure="let the launcher set it",
            this_rank_only=True,
        )
    return Seat(
        rank=rank,
        world=world,
        local_rank=local_rank,
        local_world=local_world,
        address=os.environ.get("MASTER_ADDR"),
        port=int(port),
    )


def some_of(ranks: Sequence[int]) -> str:
    """Ranks for a message: all of a few, the first of many."""
    return ", ".join(map(str, ranks[:8])) + (" and others" if len(ranks) > 8 else "")


def _take_over() -> None:
    """Write down what mpirun says, else what srun says, under the names that launchers use.

    A batch script is a process of Slurm's too: it has a rank, but no step of several tasks.
    """
    if "OMPI_COMM_WORLD_RANK" in os.environ:
        names = _OPEN_MPI
    elif "SLURM_PROCID" in os.environ and (
        "MASTER_ADDR" in os.environ or os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1"
    ):
        names = _SLURM
        if tasks := _tasks_here():
            os.environ["LOCAL_SIZE"] = str(tasks)
    else:
        return
    for ours, theirs in names.items():
        if theirs in os.environ:
            os.environ[ours] = os.environ[theirs]
    if os.environ.get("LOCAL_SIZE") == os.environ.get("WORLD_SIZE"):
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")


def _tasks_here() -> int:
    """Tasks of this Slurm step on this node, from a list such as `4(x2),3`; 0 if unknown."""
    words = os.environ.get("SLURM_STEP_TASKS_PER_NODE", os.environ.get("SLURM_TASKS_PER_NODE", ""))
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", words):
        counts += [int(count)] * int(times or 1)
    node = int(os.environ.get("SLURM_NODEID", "0"))
    return counts[node] if node < len(counts) else 0
