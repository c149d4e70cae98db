"""Hidden states of the bias backbone: every layer, averaged over time, of every row, on disk.

One pass over the shards writes `hidden.npy` (float32 [N, L, D]) and then `hidden.json`, which
says what it is; heads on other layers, folds or strengths need no other pass. While the pass runs,
`hidden.npy.tmp` fills batch by batch and `hidden.jsonl.tmp` lists the batches that it holds with
their checksums: a killed pass goes on with those that are missing or not as they were written.
Rank 0 writes for all, so that the folder may be on a disk of its own.
"""

import json
import logging
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mgc_dist.cluster.ranks import Ranks
from mgc_dist.console import progress
from mgc_dist.data.manifest import Manifest
from mgc_dist.data.reader import ShardSet
from mgc_dist.data.rowfile import RowFile
from mgc_dist.errors import UserError
from mgc_dist.files import fingerprint, replace_text
from mgc_dist.scoring.walk import Outputs, all_batches

log = logging.getLogger(__name__)

FORMAT = "mgc_dist hidden states"
FORMAT_VERSION = 1
STATES, HEADER = "hidden.npy", "hidden.json"
PARTIAL, LEDGER = "hidden.npy.tmp", "hidden.jsonl.tmp"
_AT_ONCE = 16
"""Batches that are summed over ranks and written at a time: 20 MB of wav2vec2-base's at B 32."""


@dataclass(frozen=True, kw_only=True)
class Facts:
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

    @property
    def bytes(self) -> int:
        """Of the states, without the file's header."""
        return 4 * self.rows * self.layers * self.width


def is_whole(folder: Path, facts: Facts, *, overwrite: bool) -> bool:
    """Whether a folder holds these states already.

    Args:
        folder: of the table.
        facts: that are wanted.
        overwrite: whether others may be replaced.

    Raises:
        UserError: it holds others, or damaged ones, and they may not be replaced.
    """
    if not (folder / HEADER).is_file():
        return False
    try:
        content = json.loads((folder / HEADER).read_text(encoding="utf-8"))
        digest = content.pop("xxh3_128")
        wanted = {"format": FORMAT, "format_version": FORMAT_VERSION} | asdict(facts)
        other = [key for key in wanted if content.get(key) != wanted[key]]
        if other:
            raise ValueError(f"states of another {', '.join(other)}")
        if fingerprint(folder / STATES) != digest:
            raise ValueError(f"{STATES} with another xxh3_128 than {HEADER} says")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        if overwrite:
            return False
        raise UserError(
            f"hidden states in {folder}",
            got=str(error),
            expected="none, or those of this data set and bias model, as they were written",
            cure="replace them with --overwrite, or choose another --bias-table",
        ) from error
    return True


def open_states(folder: Path, facts: Facts) -> NDArray[np.float32]:
    """The states, memory-mapped: float32 [N, L, D]. `is_whole` has looked at them.

    Raises:
        ValueError: the file is of another shape.
    """
    states: NDArray[np.float32] = np.load(folder / STATES, mmap_mode="r", allow_pickle=False)
    if states.dtype != np.float32 or states.shape != (facts.rows, facts.layers, facts.width):
        raise ValueError(f"{folder / STATES}: {states.dtype} {states.shape}")
    return states


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


def all_pass(
    folder: Path,
    facts: Facts,
    backbone: nn.Module,
    shards: ShardSet,
    peers: Ranks,
    *,
    batch: int,
) -> None:
    """Pool what is missing, on all ranks (a collective), until the states are whole.

    Args:
        folder: of the table; is made.
        facts: of the states.
        backbone: int16 [B, T] -> float32 [B, L, D], on the device of this rank.
        shards: the data set.
        peers: who takes part.
        batch: B.

    Raises:
        UserError: a state is not finite.
        RuntimeError: a row was not visited exactly once.
    """
    with ExitStack() as stack:
        files: list[RowFile] = []  # one, on rank 0

        def begin() -> dict[str, list[int]]:
            files.append(stack.enter_context(_open(folder, facts, batch, peers)))
            return _todo(files[0], shards.manifest, batch)

        todo = peers.all_decide(begin)
        stack.enter_context(float32())  # as the header says
        for split, numbers in todo.items():
            steps = math.ceil(len(numbers) / peers.world)
            shown = peers.is_first and bool(numbers)
            with progress(f"bias pass, {split}", steps, shown=shown) as bar:
                groups = all_batches(
                    backbone,
                    shards,
                    split,
                    peers,
                    batch=batch,
                    numbers=numbers,
                    at_once=_AT_ONCE,
                    progress=bar.over,
                )
                for group in groups:
                    peers.all_decide(partial(_put, files, split, group))
        peers.all_decide(lambda: _finish(files[0], folder, facts))


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


def _open(folder: Path, facts: Facts, batch: int, peers: Ranks) -> RowFile:
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / PARTIAL
    if not part.exists() and not (folder / HEADER).exists() and (folder / STATES).exists():
        (folder / STATES).rename(part)  # killed between the last two renames
    work = {"batch": batch, "device": peers.device.type}  # digits may depend on both
    shape = (facts.rows, facts.layers, facts.width)
    return RowFile(
        part, folder / LEDGER, json.dumps(asdict(facts) | work), shape=shape, dtype=np.float32
    )


def _todo(file: RowFile, found: Manifest, batch: int) -> dict[str, list[int]]:
    """Split -> batches that are missing, or not as they were written."""
    missing: dict[str, list[int]] = {}
    for split, (first, stop) in found.splits.items():
        numbers = range(math.ceil((stop - first) / batch))
        missing[split] = [n for n in numbers if not file.holds(f"{split} {n}")]
    left = sum(map(len, missing.values()))
    if file.batches and left:
        log.info("the bias pass goes on: %d batches are done, %d are left", file.batches, left)
    return missing


def _put(files: list[RowFile], split: str, group: list[Outputs]) -> None:
    for found in group:
        bad = np.flatnonzero(~np.isfinite(found.values).all(axis=(1, 2)))
        if len(bad):
            raise UserError(
                "--backbone",
                got=f"hidden states of row {found.first + bad[0]} that are not finite",
                expected="numbers",
                cure="the model's weights are damaged, or overflow: choose another one",
            )
        files[0].put(f"{split} {found.number}", found.first, found.values)


def _finish(file: RowFile, folder: Path, facts: Facts) -> None:
    """Flush, take the final name, and write what it is."""
    file.checksums()  # raises where a row is missing
    file.sync()
    part = folder / PARTIAL
    content = {"format": FORMAT, "format_version": FORMAT_VERSION} | asdict(facts)
    content["xxh3_128"] = fingerprint(part)
    (folder / HEADER).unlink(missing_ok=True)
    part.replace(folder / STATES)
    replace_text(folder / HEADER, json.dumps(content, indent=1))
    (folder / LEDGER).unlink()
    log.info(
        "bias pass done: %d rows x %d layers x %d values, %.1f MB in %s",
        *(facts.rows, facts.layers, facts.width, facts.bytes / 1e6, folder / STATES),
    )
