"""The process group: who we are, where we compute, and the few collectives that we need.

Ranks come from the deepspeed or torchrun launcher (RANK, WORLD_SIZE, ...), from Slurm
(SLURM_PROCID, ...) or, without either, are one process. Functions named `all_*` are
collectives: every rank must call them, in the same order.
"""

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mgc_dist.errors import EXIT_IO, PeerLost, RunFailed, UserError
from mgc_dist.workers import keep_memory

T = TypeVar("T")

_BROKEN = ("gloo", "Gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
_SLURM = {
    "RANK": "SLURM_PROCID",
    "LOCAL_RANK": "SLURM_LOCALID",
    "WORLD_SIZE": "SLURM_NTASKS",
    "LOCAL_SIZE": "SLURM_NTASKS_PER_NODE",
}


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Where a process stands among its peers.

    Attributes:
        rank: 0 .. world - 1.
        world: number of processes.
        local_rank: number of this process on its host.
        device: where it computes.
    """

    rank: int
    world: int
    local_rank: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which speaks and writes for all."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks (a collective)."""
        if self.world > 1:
            dist.barrier()

    def all_sum(self, values: Tensor) -> Tensor:
        """Sum a tensor over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def all_gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of ranks (a collective); it must be picklable."""
        values: list[T | None] = [None] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        else:
            values = [value]
        return cast(list[T], values)

    @staticmethod
    def is_broken(error: BaseException) -> bool:
        """Whether an error says that the process group has lost a rank.

        NCCL and the store have exceptions of their own; gloo raises RuntimeError, such as
        "[gloo/transport/tcp/pair.cc:553] Connection closed by peer".
        """
        return isinstance(error, dist.DistError) or (
            type(error) is RuntimeError and any(word in str(error) for word in _BROKEN)
        )

    def all_decide(self, decide: Callable[[], T]) -> T:
        """Let rank 0 decide for all (a collective).

        Args:
            decide: called on rank 0 only; its value must be picklable.

        Returns:
            Rank 0's value on every rank.

        Raises:
            UserError, RunFailed: rank 0's (an OSError as a UserError with exit code 74), on
                every rank, so that none is left waiting.
        """
        box: list[T | UserError | RunFailed | None] = [None]
        if self.is_first:
            try:
                box[0] = decide()
            except (UserError, RunFailed) as error:
                box[0] = error
            except OSError as error:
                box[0] = UserError(
                    f"file {error.filename}",
                    got=error.strerror or str(error),
                    expected="to read or write it",
                    cure="check the path, its permissions and the free space",
                    exit_code=EXIT_IO,
                )
        if self.world > 1:
            dist.broadcast_object_list(box, device=self.device)
        if isinstance(box[0], UserError | RunFailed):
            raise box[0]
        return cast(T, box[0])


@contextmanager
def join(device: str, timeout_s: float = 1800.0) -> Iterator[Ranks]:
    """Join the process group, and leave it at the end.

    Args:
        device: `auto`, `cpu` or `cuda`.
        timeout_s: seconds after which a collective fails; rank 0 may write or fit for long.

    Raises:
        UserError: CUDA is asked for and not there, or the launcher's variables contradict.
    """
    rank, world, local_rank, local_world = _numbers()
    place = device_of(device, local_rank)
    if place.type == "cpu":
        _settle_on_cpu(local_world)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    backend = "nccl" if place.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    if "MASTER_ADDR" in os.environ:
        try:
            dist.init_process_group(backend, timeout=timeout, rank=rank, world_size=world)
        except dist.DistNetworkError as error:
            raise UserError(
                f"rank 0's address {os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT')}",
                got=str(error).splitlines()[0],
                expected="a free port there that every rank can reach",
                cure="if another job uses the port: deepspeed --master_port 29501 launch/...",
            ) from error
        except RuntimeError as error:  # DistStoreError, or gloo's own words
            said = str(error).splitlines()[0]
            raise PeerLost(f"rank {rank} waited for {world} ranks in vain: {said}") from error
    elif world == 1:
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, timeout=timeout, rank=0, world_size=1, store=store)
    else:
        raise UserError(
            "environment variable MASTER_ADDR",
            got="not set",
            expected=f"the host of rank 0 of {world} ranks",
            cure="start with `deepspeed launch/...`, or see slurm/train.sbatch",
        )
    try:
        yield Ranks(rank=rank, world=world, local_rank=local_rank, device=place)
    except PeerLost:
        raise  # leaving a group that lost a rank may block: the command ends the process
    except BaseException as error:
        if Ranks.is_broken(error):
            said = str(error).splitlines()[0]
            raise PeerLost(f"rank {rank} of {world} lost its peers: {said}") from error
        _leave(alone=world > 1 and getattr(error, "this_rank_only", False))
        raise
    dist.destroy_process_group()


def _settle_on_cpu(local_world: int) -> None:
    """Share the cores of the host, and keep memory: fresh pages took 17 % of a step."""
    keep_memory()
    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // local_world))


def _leave(*, alone: bool) -> None:
    """Leave the process group, unless the peers know nothing of it: NCCL's waits for them."""
    if not alone:
        dist.destroy_process_group()


def seed_everything(*numbers: int) -> None:
    """Seed torch (all devices), numpy and random from the numbers, such as (seed, step, rank).

    Called before every optimizer step: a resumed run needs no saved generator state. numpy's
    global generator counts because transformers draws SpecAugment masks from it.
    """
    sequence = np.random.SeedSequence([n & 0xFFFFFFFF for n in numbers])
    torch_seed, numpy_seed, python_seed = (int(s) for s in sequence.generate_state(3, np.uint32))
    torch.manual_seed(torch_seed)
    np.random.seed(numpy_seed)
    random.seed(python_seed)


def _numbers() -> tuple[int, int, int, int]:
    """Rank, world, local rank, local world; also written back for DeepSpeed to find."""
    if "RANK" not in os.environ and "SLURM_PROCID" in os.environ and "MASTER_ADDR" in os.environ:
        for ours, theirs in _SLURM.items():
            if theirs in os.environ:
                os.environ[ours] = os.environ[theirs]
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
        ) from error
    if not 0 <= rank < world:
        raise UserError(
            "environment variable RANK",
            got=f"{rank} with WORLD_SIZE {world}",
            expected="0 to WORLD_SIZE - 1",
            cure="let the launcher set both",
        )
    return rank, world, local_rank, local_world


def device_of(device: str, local_rank: int) -> torch.device:
    """The device of `auto`, `cpu` or `cuda` for a local rank.

    Raises:
        UserError: CUDA is asked for, and there is no GPU for this rank.
    """
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if "SLURM_PROCID" in os.environ and torch.cuda.device_count() == 1:
        return torch.device("cuda", 0)  # Slurm may show each task only the GPU bound to it
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"--device {device} on local rank {local_rank}",
            got=f"{torch.cuda.device_count()} GPUs on this host",
            expected="one GPU for each local rank",
            cure="start fewer ranks with `deepspeed --num_gpus N`, or use --device cpu",
            this_rank_only=True,
        )
    return torch.device("cuda", local_rank)
