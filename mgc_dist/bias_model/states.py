"""Hidden states of a frozen model: every layer, averaged over time, of every row, on disk.

Of the bias model, or of one that is probed. One pass over the shards writes `hidden.npy` (float32
[N, L, D]) and then `hidden.json`, which says what it is; heads on other layers, folds or strengths
need no other pass.
"""

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mgc_dist.cluster.ranks import Ranks
from mgc_dist.console import progress
from mgc_dist.data.reader import Batch, ShardSet
from mgc_dist.data.rowstore import RowStore
from mgc_dist.errors import UserError
from mgc_dist.files import locked, nearest
from mgc_dist.scoring.rows import all_fill

log = logging.getLogger(__name__)

STORE = RowStore(
    name="hidden",
    format="mgc_dist hidden states",
    version=1,
    noun="hidden states",
    keeps_checksums=False,
)


@dataclass(frozen=True, kw_only=True)
class StatesKey:
    """What hidden states are of.

    Attributes:
        dataset_id: of the shards.
        bias_hash: of the backbone's weights, config, feature settings and the pass's dtype.
        rows, layers, width: N, L, D.
    """

    dataset_id: str
    bias_hash: str
    rows: int
    layers: int
    width: int

    on_disk: ClassVar[type[np.generic]] = np.float32

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array: N, L, D."""
        return self.rows, self.layers, self.width

    @property
    def bytes(self) -> int:
        """Of the states, without the file's header."""
        return 4 * self.rows * self.layers * self.width


@contextmanager
def taken(folder: Path, flag: str) -> Iterator[None]:
    """Have a folder of states alone; one that is empty at the end is removed.

    Raises:
        PermissionError: it cannot be written to: known before the pass, not after it.
        UserError: another process is at it; `flag` names it.
    """
    there = nearest(folder)
    if not os.access(there, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(there))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder / "lock", wait_s=0, purpose=f"{flag} {folder}"):
            yield
    finally:
        with suppress(OSError):  # it is not empty
            folder.rmdir()


def all_bring(
    folder: Path,
    of: StatesKey,
    backbone: nn.Module,
    shards: ShardSet,
    peers: Ranks,
    *,
    batch: int,
    overwrite: bool,
    flags: tuple[str, str],
) -> None:
    """Have the states whole in a folder: as they lie there, or by a pass (a collective).

    Args:
        folder: is made.
        of: what the states are of.
        backbone: int16 [B, T] -> float32 [B, L, D].
        shards: the data set, or a fold of it: all its rows are passed.
        peers: who takes part.
        batch: B.
        overwrite: whether other states may be replaced.
        flags: that name the folder and the model, in messages.

    Raises:
        UserError: others are there, or damaged ones; or a state is not finite.
    """
    if peers.all_decide(lambda: _is_whole(folder, of, overwrite=overwrite, flag=flags[0])):
        log.info("hidden states of this data set and model are there: no pass is needed")
        return
    on_device = backbone.to(peers.device)
    with ShardSet(shards.folder, is_whole=True) as every:  # one pass for all folds
        _all_pass(folder, of, on_device, every, peers, batch=batch, flag=flags[1])


def _is_whole(folder: Path, of: StatesKey, *, overwrite: bool, flag: str) -> bool:
    """Whether a folder holds these states already.

    Args:
        folder: of the states.
        of: what is wanted.
        overwrite: whether others may be replaced.
        flag: that names the folder.

    Raises:
        UserError: it holds others, or damaged ones, and they may not be replaced.
    """
    try:
        return STORE.is_whole(folder, of)
    except ValueError as error:
        if overwrite:
            return False
        raise UserError(
            f"hidden states in {folder}",
            got=str(error),
            expected="none, or those of this data set and model, as they were written",
            cure=f"replace them with --overwrite, or choose another {flag}",
        ) from error


def mean_of_layers(states: NDArray[np.float32], layers: tuple[int, ...]) -> NDArray[np.float32]:
    """One vector a row: the mean over layers, float32 [N, D].

    The mean, not the layers side by side: the heads keep their size, and with it what a strength
    of their penalty means, however many layers are taken.

    Args:
        states: float32 [N, L, D]; only the layers that are taken are read.
        layers: 0 to L - 1.
    """
    total = np.zeros((states.shape[0], states.shape[2]))
    for layer in layers:
        total += states[:, layer]
    return (total / len(layers)).astype(np.float32)


def of_shards(
    folder: Path, of: StatesKey, layers: tuple[int, ...], shards: ShardSet
) -> NDArray[np.float32]:
    """States that lie in a folder, as `mean_of_layers`, in the order of a data set's rows.

    Args:
        folder: of the states.
        of: what they are of.
        layers: 0 to L - 1.
        shards: the data set, or a fold of it, whose rows begin elsewhere.
    """
    pooled = mean_of_layers(STORE.open(folder, of), layers)
    return np.roll(pooled, -shards.first_row, axis=0) if shards.first_row else pooled


def _all_pass(
    folder: Path,
    of: StatesKey,
    backbone: nn.Module,
    shards: ShardSet,
    peers: Ranks,
    *,
    batch: int,
    flag: str,
) -> None:
    """Pool what is missing, on all ranks (a collective), until the states are whole."""

    def shown(split: str, turns: int, batches: Iterator[Batch]) -> Iterator[Batch]:
        with progress(f"pass, {split}", turns, shown=peers.is_first and turns > 0) as bar:
            yield from bar.over(batches)

    with float32():  # as the header says
        all_fill(
            STORE,
            folder,
            of,
            backbone,
            shards,
            peers,
            batch=batch,
            splits=tuple(shards.manifest.splits),
            work={"batch": batch, "device": peers.device.type},
            title="the pass",
            flag=flag,
            progress=shown,
        )
    if peers.is_first:
        log.info(
            "pass done: %d rows x %d layers x %d values, %.1f MB in %s",
            *(of.rows, of.layers, of.width, of.bytes / 1e6, folder / STORE.array),
        )


@contextmanager
def float32() -> Iterator[None]:
    """Without TF32: cuDNN takes it for convolutions, and products where a variable allows it.

    Images of NVIDIA set TORCH_ALLOW_TF32_CUBLAS_OVERRIDE.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
