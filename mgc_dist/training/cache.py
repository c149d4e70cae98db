"""One pass of the frozen part over the rows that training and validation read, kept on disk.

Batch b holds the same rows whoever computes it, so the bytes are the same on any number of ranks,
and in a pass that was cut. Rank 0 writes for all; every rank reads.
"""

import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mgc_dist import files
from mgc_dist.cluster.ranks import Ranks, seed_everything
from mgc_dist.data import features
from mgc_dist.data.features import Facts, Features
from mgc_dist.data.manifest import Manifest
from mgc_dist.data.reader import Batch, ShardSet
from mgc_dist.data.rowfile import RowFile
from mgc_dist.errors import EXIT_IO, UserError
from mgc_dist.models import trunk
from mgc_dist.models.main import WaveClassifier
from mgc_dist.scoring.walk import Outputs, all_batches

log = logging.getLogger(__name__)

SPLITS = ("train", "validation")
"""Whose rows are kept; they are the first of the data set. Test is only measured."""
PARTIAL, LEDGER, LOCK = "features.npy.tmp", "features.jsonl.tmp", "lock"
_AT_ONCE_BYTES = 64 << 20
"""Features that are summed over ranks and written at a time, in float32."""
_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
"""Of the largest logit: both ways do the same operations, and differ by 0 on a CPU."""


def describe(
    model: WaveClassifier, shards: ShardSet, *, device: torch.device, bf16: bool, dtype: str
) -> Facts:
    """What a cache for this model would be, once it is seen to be exact.

    A batch of noise goes through the whole model in training mode, and through its two halves: what
    draws numbers below the boundary, or a model that works otherwise than `trunk` believes, gives
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
    return Facts(
        dataset_id=found.dataset_id,
        frozen=trunk.fingerprint(model.net, at, model.do_normalize),
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
    facts: Facts,
    forward: Callable[[Tensor], Tensor],
    shards: ShardSet,
    peers: Ranks,
    *,
    batch: int,
    stopped: Callable[[], bool],
    progress: Callable[[Iterator[Batch]], Iterator[Batch]],
) -> Features | None:
    """Open the features, on all ranks (a collective); where they are missing, make them first.

    Args:
        root: of caches; a folder in it, named after the facts, holds these.
        facts: of the features.
        forward: int16 [B, T] on the device -> [B, F, D], in eval mode.
        shards: the data set.
        peers: who takes part.
        batch: B of the pass.
        stopped: whether this rank has been asked to stop.
        progress: wraps the stream of batches.

    Returns:
        None if a rank was asked to stop meanwhile: what is done is kept.

    Raises:
        UserError: no space, another process is making them, they are damaged or not finite, or
            a rank does not see what rank 0 has written.
    """
    folder = root / facts.name
    started = time.monotonic()
    with ExitStack() as held:
        todo = peers.all_decide(lambda: _begin(folder, facts, shards.manifest, batch, held))
        if todo is not None:
            pass_ = _Pass(folder, facts, shards, peers, batch, held)
            if not pass_.all_run(forward, todo, stopped, progress):
                return None
    found = _all_open(folder, facts, peers)
    if peers.is_first:
        words = "reused" if todo is None else f"made in {time.monotonic() - started:.1f} s"
        log.info(
            "cache of %s: %d rows of [%d, %d], %.1f MB in %s, %s",
            *(facts.description, facts.rows, facts.frames, facts.width, facts.bytes / 1e6),
            *(folder, words),
        )
    return found


def _begin(
    folder: Path, facts: Facts, found: Manifest, batch: int, held: ExitStack
) -> dict[str, int] | None:
    """Take the folder, unless nothing is left to do (rank 0): batches of each split."""
    if features.is_whole(folder, facts):
        return None
    part = folder / PARTIAL
    free = shutil.disk_usage(files.nearest(folder)).free + (
        part.stat().st_size if part.exists() else 0
    )
    if free < facts.bytes:
        raise UserError(
            f"--cache-dir {folder.parent}",
            got=f"{free / 1e9:.2f} GB of free space",
            expected=f"{facts.bytes / 1e9:.2f} GB for {facts.rows} rows of {facts.row_bytes} bytes",
            cure="name a --cache-dir on another disk, or take --cache-dtype bf16 or --cache cnn",
            exit_code=EXIT_IO,
        )
    folder.mkdir(parents=True, exist_ok=True)
    held.enter_context(files.locked(folder / LOCK, wait_s=0, purpose=f"cache {folder}"))
    if features.is_whole(folder, facts):  # who held the lock has just made it
        return None
    bounds = {split: found.splits[split] for split in SPLITS}
    return {split: math.ceil((stop - first) / batch) for split, (first, stop) in bounds.items()}


class _Pass:
    """The pass itself; the file is rank 0's."""

    def __init__(
        self,
        folder: Path,
        facts: Facts,
        shards: ShardSet,
        peers: Ranks,
        batch: int,
        held: ExitStack,
    ) -> None:
        self._folder, self._facts, self._shards = folder, facts, shards
        self._peers, self._batch, self._held = peers, batch, held
        self._file: RowFile

    def all_run(
        self,
        forward: Callable[[Tensor], Tensor],
        batches: dict[str, int],
        stopped: Callable[[], bool],
        progress: Callable[[Iterator[Batch]], Iterator[Batch]],
    ) -> bool:
        """Compute what is missing (a collective); False if a rank was asked to stop."""
        todo = self._peers.all_decide(lambda: self._open(batches))
        row = 4 * self._facts.frames * self._facts.width
        at_once = max(self._peers.world, _AT_ONCE_BYTES // (row * self._batch))
        for split, numbers in todo.items():
            groups = all_batches(
                forward,
                self._shards,
                split,
                self._peers,
                batch=self._batch,
                numbers=numbers,
                at_once=at_once,
                progress=progress,
            )
            for group in groups:
                self._peers.all_decide(partial(self._put, split, group))
                if any(self._peers.all_gather(stopped())):
                    log.info("stopped in the pass of the cache; the same command goes on with it")
                    return False
        self._peers.all_decide(self._finish)
        return True

    def _open(self, batches: dict[str, int]) -> dict[str, list[int]]:
        facts, folder = self._facts, self._folder
        part = folder / PARTIAL
        if not part.exists() and (folder / features.FEATURES).exists():
            (folder / features.FEATURES).rename(part)  # killed between the last two renames
        self._file = self._held.enter_context(
            RowFile(
                part,
                folder / LEDGER,
                json.dumps(asdict(facts) | {"batch": self._batch}),  # digits may depend on it
                shape=(facts.rows, facts.frames, facts.width),
                dtype=facts.on_disk,
            )
        )
        todo = {
            split: [n for n in range(count) if not self._file.holds(f"{split} {n}")]
            for split, count in batches.items()
        }
        log.info(
            "making the cache of %s: %.1f MB in %s, %d of %d batches to go",
            *(facts.description, facts.bytes / 1e6, folder),
            *(sum(map(len, todo.values())), sum(batches.values())),
        )
        return todo

    def _put(self, split: str, group: list[Outputs]) -> None:
        for found in group:
            bad = np.flatnonzero(~np.isfinite(found.values).all(axis=(1, 2)))
            if len(bad):
                raise UserError(
                    "--model",
                    got=f"frozen features of row {found.first + bad[0]} that are not finite",
                    expected="numbers",
                    cure="the model's weights are damaged, or overflow: choose another one",
                )
            self._file.put(f"{split} {found.number}", found.first, self._rounded(found.values))

    def _rounded(self, values: NDArray[np.float32]) -> NDArray[np.generic]:
        if self._facts.dtype == "fp32":
            return values
        rounded: NDArray[np.generic] = (
            torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
        )
        return rounded

    def _finish(self) -> None:
        """Flush, write the checksums, take the final name, and write what it is."""
        folder = self._folder
        sums = self._file.checksums()
        self._file.sync()
        with files.replacing(folder / features.CHECKSUMS) as file:
            np.save(file, sums)
        (folder / PARTIAL).replace(folder / features.FEATURES)
        content = {"format": features.FORMAT, "format_version": features.FORMAT_VERSION}
        content |= asdict(self._facts)
        content["checksums_xxh3_128"] = files.fingerprint(folder / features.CHECKSUMS)
        files.replace_text(folder / features.HEADER, json.dumps(content, indent=1))
        (folder / LEDGER).unlink()


def _all_open(folder: Path, facts: Facts, peers: Ranks) -> Features:
    """Open what rank 0 has written (a collective); all ranks fail where one does not see it."""
    found: Features | None = None
    error: UserError | None = None
    try:
        found = Features(folder, facts)
    except UserError as failed:
        error = failed
    errors = [each for each in peers.all_gather(error) if each is not None]
    if errors:
        raise errors[0]
    assert found is not None
    return found
