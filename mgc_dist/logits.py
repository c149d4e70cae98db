"""The bias table: calibrated log-probabilities of the frozen bias model, one row a segment.

A folder of `log_probability.npy` (float32 [N, K], in row order), `hidden.npy` (what the heads
were fitted on) and `header.json`, which is written last and holds the fingerprints. A table
that does not belong to the data set is refused; so is one with a row whose head has seen it.
"""

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mgc_dist.errors import UserError
from mgc_dist.files import replace_text, replacing, sha256
from mgc_dist.manifest import Manifest
from mgc_dist.tracks import group_key

FORMAT = "mgc_dist bias table"
FORMAT_VERSION = 1
HEADER = "header.json"
TABLE = "log_probability.npy"
HIDDEN = "hidden.npy"


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a table is and what it was made from.

    Attributes:
        dataset_id: of the shards.
        genres: in column order.
        backbone: name, for the reader.
        bias_hash: of the backbone's weights, config and feature settings.
        head_hash: of the fitted heads.
        layer: that was pooled.
        folds: k.
        head_c: inverse penalty of the heads.
        seed: of the folds.
        fold_of: group (track where unknown) -> its fold, for every training track.
        temperature: that the logits were divided by.
        table_sha256: of log_probability.npy.
    """

    dataset_id: str
    genres: tuple[str, ...]
    backbone: str
    bias_hash: str
    head_hash: str
    layer: int
    folds: int
    head_c: float
    seed: int
    fold_of: dict[str, int]
    temperature: float
    table_sha256: str


class BiasTable:
    """Log-probabilities by row, checked against the data set.

    Args:
        header: of the table.
        log_probability: float32 [N, K].
    """

    def __init__(self, header: Header, log_probability: NDArray[np.float32]) -> None:
        self.header = header
        self.log_probability = log_probability

    def lookup(self, row: Tensor) -> Tensor:
        """float32 [B, K] for int64 [B]; a uniform row for padding (-1)."""
        place = row.numpy()
        found = np.array(self.log_probability[np.maximum(place, 0)])  # [B, K]
        found[place < 0] = -math.log(found.shape[1])
        return torch.from_numpy(found)


def write(
    folder: Path,
    header: Header,
    log_probability: NDArray[np.float32],
    hidden: NDArray[np.float32],
) -> None:
    """Write the arrays, flush them, then the header.

    Args:
        folder: is made; an older table in it is replaced.
        header: its `table_sha256` is filled in here.
        log_probability: float32 [N, K].
        hidden: float32 [N, D].
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / HEADER).unlink(missing_ok=True)
    for name, array in ((TABLE, log_probability), (HIDDEN, hidden)):
        with replacing(folder / name) as file:
            np.save(file, array, allow_pickle=False)
    content = {"format": FORMAT, "format_version": FORMAT_VERSION} | asdict(header)
    content["table_sha256"] = sha256(folder / TABLE)
    replace_text(folder / HEADER, json.dumps(content, indent=1, ensure_ascii=False))


def read_header(folder: Path) -> Header:
    """The header of a table.

    Raises:
        UserError: there is none, or it is damaged or of another version.
    """
    path = folder / HEADER
    if not path.is_file():
        raise UserError(
            f"bias table {folder}",
            got="no such table",
            expected="the logits of the bias model for these shards",
            cure="deepspeed launch/bias.py  makes it; --loss ce trains without",
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = (content.pop("format"), content.pop("format_version"))
        if version != (FORMAT, FORMAT_VERSION) or set(content) != {f.name for f in fields(Header)}:
            raise ValueError(f"{version[0]!r} version {version[1]}, keys {sorted(content)}")
        content["genres"] = tuple(content["genres"])
        return Header(**content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _refused(folder, str(error), f"{FORMAT!r} version {FORMAT_VERSION}") from error


def read(folder: Path, found: Manifest) -> BiasTable:
    """Open a table, memory-mapped, and check that it belongs to a data set.

    Raises:
        UserError: no table; another data set, genres or size; damaged; a row that is missing;
            or a training group without a fold, whose logits could have been fitted on itself.
    """
    header = read_header(folder)
    if header.dataset_id != found.dataset_id:
        raise _refused(
            folder,
            f"a table of data set {header.dataset_id[:12]}",
            f"one of {found.dataset_id[:12]}, the data set of --shards",
        )
    if header.genres != found.genres:
        raise _refused(folder, f"genres {header.genres}", f"{found.genres}")
    for track in found.tracks:
        fold = header.fold_of.get(group_key(track.id, track.group))
        if track.split == "train" and (fold is None or not 0 <= fold < header.folds):
            raise _refused(folder, f"fold {fold} for {track.id}", f"0 to {header.folds - 1}")
    try:
        if sha256(folder / TABLE) != header.table_sha256:
            raise ValueError("another sha256 than its header says")
        table: NDArray[np.float32] = np.load(folder / TABLE, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise _refused(folder, f"{TABLE}: {error}", "the table as it was written") from error
    shape = (found.rows, len(found.genres))
    if table.shape != shape or table.dtype != np.float32:
        raise _refused(folder, f"{table.dtype} {table.shape}", f"float32 {shape}")
    missing = np.flatnonzero(~np.isfinite(table).all(axis=1))
    if len(missing):
        raise _refused(folder, f"no logits for row {missing[0]}", "finite logits for every row")
    return BiasTable(header, table)


def _refused(folder: Path, got: object, expected: str) -> UserError:
    return UserError(
        f"bias table {folder}",
        got=got,
        expected=expected,
        cure="make it again: deepspeed launch/bias.py --overwrite",
    )
