"""The process group: where we compute, and the few collectives that we need.

Functions named `all_*` are collectives: every rank must call them, in the same order.
"""

import os
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mgc_dist.cluster.meeting import Meeting, meet
from mgc_dist.errors import EXIT_IO, PeerLost, RunFailed, UserError, exit_code_of
from mgc_dist.workers import keep_memory

T = TypeVar("T")

_LARGEST_KEPT = 1 << 26
"""Bytes of a block that a rank on a CPU keeps. With 1 << 30 a rank of wav2vec2-large peaked at
8.8 GB, with this at 7.7, with glibc's defaults at 6.5."""

_BROKEN = ("gloo", "Gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")


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
                every rank, so that none is left waiting. An error that nobody has foreseen stays
                itself on rank 0.
        """
        box: list[T | UserError | RunFailed | None] = [None]
        unforeseen: Exception | None = None
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
            except Exception as error:
                unforeseen = error
                said = f"{type(error).__name__}: {error}"
                box[0] = RunFailed(f"rank 0 has failed: {said}", exit_code_of(error))
        if self.world > 1:
            dist.broadcast_object_list(box, device=self.device)
        if unforeseen:
            raise unforeseen
        if isinstance(box[0], UserError | RunFailed):
            raise box[0]
        return cast(T, box[0])


@contextmanager
def join(device: str, timeout_s: float = 1800.0, meeting: Meeting | None = None) -> Iterator[Ranks]:
    """Join the process group, and leave it at the end.

    Args:
        device: `auto`, `cpu` or `cuda`.
        timeout_s: seconds after which a collective fails; rank 0 may write or fit for long.
        meeting: where these ranks have met; without one they meet now.

    Raises:
        UserError: CUDA is asked for and not there, or what `meet` raises.
        PeerLost: a rank has been lost.
    """
    with ExitStack() as stack:
        peers = _enter(device, timeout_s, meeting or stack.enter_context(meet(wait_s=timeout_s)))
        try:
            yield peers
        except PeerLost:
            raise  # leaving a group that lost a rank may block: the command ends the process
        except BaseException as error:
            if Ranks.is_broken(error):
                said = str(error).splitlines()[0]
                raise PeerLost(
                    f"rank {peers.rank} of {peers.world} lost its peers: {said}"
                ) from error
            _leave(alone=peers.world > 1 and getattr(error, "this_rank_only", False))
            raise
        dist.destroy_process_group()


def _enter(device: str, timeout_s: float, meeting: Meeting) -> Ranks:
    here = meeting.seat
    computes = device_of(device, here.local_rank)
    if computes.type == "cpu":
        _settle_on_cpu(here.local_world)
    if computes.type == "cuda":
        torch.cuda.set_device(computes)
    try:
        dist.init_process_group(
            "nccl" if computes.type == "cuda" else "gloo",
            store=meeting.group_store(),
            timeout=timedelta(seconds=timeout_s),
            rank=here.rank,
            world_size=here.world,
        )
    except RuntimeError as error:  # DistStoreError, or gloo's own words
        said = str(error).splitlines()[0]
        raise PeerLost(f"rank {here.rank} waited for {here.world} ranks in vain: {said}") from error
    meeting.is_over = True
    return Ranks(rank=here.rank, world=here.world, local_rank=here.local_rank, device=computes)


def _settle_on_cpu(local_world: int) -> None:
    """Share the cores of the host, and keep memory: fresh pages took 17 % of a step."""
    keep_memory(_LARGEST_KEPT)
    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // local_world))


def _leave(*, alone: bool) -> None:
    """Leave the process group, unless the peers know nothing of it: NCCL's waits for them."""
    if not alone:
        dist.destroy_process_group()


def seed_everything(*numbers: int) -> None:
    """Seed torch (all devices), numpy and random from numbers, such as (seed, step, micro batch).

    Called before every micro batch: a resumed run needs no saved generator state. A model may draw
    from any of the three.
    """
    sequence = np.random.SeedSequence([n & 0xFFFFFFFF for n in numbers])
    torch_seed, numpy_seed, python_seed = (int(s) for s in sequence.generate_state(3, np.uint32))
    torch.manual_seed(torch_seed)
    np.random.seed(numpy_seed)
    random.seed(python_seed)


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
