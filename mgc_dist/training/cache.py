"""One pass of the frozen part over the rows that training and validation read, kept on disk.

Batch b holds the same rows whoever computes it, so the bytes are the same on any number of ranks,
and in a pass that was cut. Rank 0 writes for all; every rank reads.
"""

import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mgc_dist import files
from mgc_dist.cluster.ranks import Ranks, seed_everything
from mgc_dist.data import features
from mgc_dist.data.features import STORE, Features, FeaturesKey
from mgc_dist.data.reader import Batch, ShardSet
from mgc_dist.encoders import kind
from mgc_dist.errors import EXIT_IO, UserError
from mgc_dist.models.classifier import WaveClassifier
from mgc_dist.scoring.rows import all_fill
from mgc_dist.training.caches import LOCK, note_use

log = logging.getLogger(__name__)

SPLITS = ("train", "validation")
"""Whose rows are kept; they are the first of the data set. Test is only measured."""
_LOOK_S = 1.0
"""Between two looks whether another training has made the cache."""
_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
"""Of the largest logit: both ways do the same operations, and differ by 0 on a CPU."""


def describe(
    model: WaveClassifier, shards: ShardSet, *, device: torch.device, bf16: bool, dtype: str
) -> FeaturesKey:
    """What a cache for this model would be, once it is seen to be exact.

    A batch of noise goes through the whole model in training mode, and through its two halves: what
    draws numbers below the boundary, or a model that works otherwise than its kind believes, gives
    other logits. Generators are seeded anew.

    Args:
        model: with a boundary, and whole weights, on the device; its `boundary_dtype` is set.
        shards: the data set.
        device: of this rank.
        bf16: whether the run computes under autocast to bfloat16.
        dtype: `auto` takes what the values have in the run anyway; or `fp32`, `bf16`.

    Raises:
        UserError: the two differ.
    """
    found, at = shards.manifest, model.boundary
    assert at is not None
    wave = torch.from_numpy(
        np.random.default_rng(0).integers(-9000, 9000, (2, found.segment_samples), np.int16)
    ).to(device)
    model.train()
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        seed_everything(0)
        whole = model(wave)
        seed_everything(1)  # another: nothing below may draw numbers
        inner = model(wave, only_below=True)  # [2, F, D]
        model.boundary_dtype = inner.dtype
        seed_everything(0)
        halves = model(inner)
    precision = "bf16" if bf16 else "fp32"
    _refuse_different(whole.float(), halves.float(), at, _TOLERANCE[precision])
    own = "bf16" if inner.dtype == torch.bfloat16 else "fp32"
    return FeaturesKey(
        dataset_id=found.dataset_id,
        frozen=kind.fingerprint(model.net, at, model.do_normalize),
        boundary=at,
        dtype=own if dtype == "auto" else dtype,  # type: ignore[arg-type]
        precision="bf16" if bf16 else "fp32",
        device=device.type,
        rows=found.splits[SPLITS[-1]][1],
        frames=inner.shape[1],
        width=inner.shape[2],
    )


def _refuse_different(whole: Tensor, halves: Tensor, at: str, tolerance: float) -> None:
    difference, size = float((whole - halves).abs().max()), float(whole.abs().max())
    if not difference <= tolerance * size:
        raise UserError(
            f"--cache at {at} of this model",
            got=f"logits that differ by {difference:.1e} of {size:.1e} from the whole model's",
            expected="the same",
            cure="something below draws random numbers, or the model works in another way than "
            "wav2vec2; use --cache cnn, or none",
        )


def all_bring(
    root: Path,
    key: FeaturesKey,
    forward: Callable[[Tensor], Tensor],
    shards: ShardSet,
    peers: Ranks,
    *,
    run: Path,
    batch: int,
    stopped: Callable[[], bool],
    beat: Callable[[str], None],
) -> Features | None:
    """Open the features, on all ranks (a collective); where they are missing, make them first.

    Args:
        root: of caches; a folder in it, named after the key, holds these.
        key: of the features.
        forward: int16 [B, T] on the device -> [B, F, D], in eval mode.
        shards: the data set.
        peers: who takes part.
        run: the run folder, which is noted beside the features.
        batch: B of the pass.
        stopped: whether this rank has been asked to stop.
        beat: told what is being done, at every batch.

    Returns:
        None if a rank was asked to stop meanwhile: what is done is kept.

    Raises:
        UserError: no space, they are damaged or not finite, or a rank does not see what rank 0 has
            written.
    """
    folder = root / key.name
    started = time.monotonic()
    with ExitStack() as held:
        made = _all_take(folder, key, held, peers, stopped, beat)
        if made is None:
            return None
        if made and not _all_fill(folder, key, forward, shards, peers, batch, stopped, beat):
            return None
    found = _all_open(folder, key, peers)
    if peers.is_first:
        note_use(folder, run)
        words = f"made in {time.monotonic() - started:.1f} s" if made else "reused"
        log.info(
            "cache of %s: %d rows of [%d, %d], %.1f MB in %s, %s",
            *(key.description, key.rows, key.frames, key.width, key.bytes / 1e6),
            *(folder, words),
        )
    return found


def _all_take(
    folder: Path,
    key: FeaturesKey,
    held: ExitStack,
    peers: Ranks,
    stopped: Callable[[], bool],
    beat: Callable[[str], None],
) -> bool | None:
    """Have the folder alone, waiting for another training that makes it (a collective).

    Returns:
        Whether anything is left to make; None if a rank was asked to stop meanwhile.
    """
    told = False
    while (made := peers.all_decide(lambda: _take(folder, key, held))) is None:
        if any(peers.all_gather(stopped())):
            return None
        if not told and peers.is_first:
            log.info("another training is making the cache %s: waiting for it", folder)
        told = True
        beat("waiting for the cache")
        time.sleep(_LOOK_S)
    return made


def _take(folder: Path, key: FeaturesKey, held: ExitStack) -> bool | None:
    """Have the folder alone, unless nothing is left to do; None if another has it (rank 0)."""
    if features.is_whole(folder, key):
        return False
    part = folder / STORE.partial
    free = shutil.disk_usage(files.nearest(folder)).free + (
        part.stat().st_size if part.exists() else 0
    )
    if free < key.bytes:
        raise UserError(
            f"--cache-dir {folder.parent}",
            got=f"{free / 1e9:.2f} GB of free space",
            expected=f"{key.bytes / 1e9:.2f} GB for {key.rows} rows of {key.row_bytes} bytes",
            cure="name a --cache-dir on another disk, or take --cache-dtype bf16 or --cache cnn",
            exit_code=EXIT_IO,
        )
    folder.mkdir(parents=True, exist_ok=True)
    try:
        held.enter_context(files.locked(folder / LOCK, wait_s=0, purpose=f"cache {folder}"))
    except UserError:
        return None
    return not features.is_whole(folder, key)  # who held the lock may just have made it


def _all_fill(
    folder: Path,
    key: FeaturesKey,
    forward: Callable[[Tensor], Tensor],
    shards: ShardSet,
    peers: Ranks,
    batch: int,
    stopped: Callable[[], bool],
    beat: Callable[[str], None],
) -> bool:
    """Compute what is missing (a collective); False if a rank was asked to stop."""

    def watched(split: str, turns: int, batches: Iterator[Batch]) -> Iterator[Batch]:
        for each in batches:
            beat("making the cache")
            yield each

    whole = all_fill(
        STORE,
        folder,
        key,
        forward,
        shards,
        peers,
        batch=batch,
        splits=SPLITS,
        work={"batch": batch},
        title=f"making the cache of {key.description}, {key.bytes / 1e6:.1f} MB in {folder}",
        flag="--model",
        progress=watched,
        stopped=stopped,
    )
    if not whole:
        log.info("stopped in the pass of the cache; the same command goes on with it")
    return whole


def _all_open(folder: Path, key: FeaturesKey, peers: Ranks) -> Features:
    """Open what rank 0 has written (a collective); all ranks fail where one does not see it."""
    found: Features | None = None
    error: UserError | None = None
    try:
        found = Features(folder, key)
    except UserError as failed:
        error = failed
    errors = [each for each in peers.all_gather(error) if each is not None]
    if errors:
        raise errors[0]
    assert found is not None
    return found
