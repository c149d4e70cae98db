"""The bias table: calibrated log-probabilities of the frozen bias model, one row a segment.

Ours is a folder of `log_probability.npy` (float32 [N, K], in row order) and `header.json`, which
is written last and holds the fingerprints. A table that does not belong to the data set is
refused; so is one with a row whose head may have seen it.

One from elsewhere is a file: a CSV or TSV with the header `key,GENRE,...`, or a structured .npy
with a field `key` and a float field a genre, in any order. A key is a segment's name in the shards
(`blues_00000_03`), values are logits or log-probabilities. Nobody has told us whether its model
has seen the rows that it judges: its fold status is "unknown".
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import log_softmax
from torch import Tensor

from mgc_dist import cli
from mgc_dist.config import FOREIGN_TABLES
from mgc_dist.data.manifest import Manifest
from mgc_dist.data.tables import read_table
from mgc_dist.data.tracks import group_key
from mgc_dist.errors import UserError
from mgc_dist.files import replace_text, replacing, sha256

FORMAT = "mgc_dist bias table"
FORMAT_VERSION = 2
HEADER = "header.json"
TABLE = "log_probability.npy"
KEY = "key"

FoldStatus = Literal["out-of-fold", "unknown"]


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a table is and what it was made from.

    Attributes:
        dataset_id: of the shards.
        genres: in column order.
        backbone: name, for the reader.
        bias_hash: of the backbone's weights, config, feature settings and the pass's dtype.
        head_hash: of the fitted heads.
        layers: that the heads have seen the mean of, counted from 0.
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
    layers: tuple[int, ...]
    folds: int
    head_c: float
    seed: int
    fold_of: dict[str, int]
    temperature: float
    table_sha256: str


@dataclass(frozen=True, kw_only=True)
class BiasTable:
    """Log-probabilities by row, checked against the data set.

    Attributes:
        name: the backbone, or the file that a table from elsewhere is.
        fold_status: whether each training row's logits come from a model that has not seen it.
        sha256: of the table's content, for a run's identity.
        log_probability: float32 [N, K], in row order.
        header: of our own tables.
    """

    name: str
    fold_status: FoldStatus
    sha256: str
    log_probability: NDArray[np.float32]
    header: Header | None = None

    def lookup(self, row: Tensor) -> Tensor:
        """float32 [B, K] for int64 [B]; a uniform row for padding (-1)."""
        place = row.numpy()
        found = np.array(self.log_probability[np.maximum(place, 0)])  # [B, K]
        found[place < 0] = -math.log(found.shape[1])
        return torch.from_numpy(found)


def write(folder: Path, header: Header, log_probability: NDArray[np.float32]) -> None:
    """Write the array, flush it, then the header.

    Args:
        folder: is made; an older table in it is replaced.
        header: its `table_sha256` is filled in here.
        log_probability: float32 [N, K].
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / HEADER).unlink(missing_ok=True)
    with replacing(folder / TABLE) as file:
        np.save(file, log_probability, allow_pickle=False)
    content = {"format": FORMAT, "format_version": FORMAT_VERSION} | asdict(header)
    content["table_sha256"] = sha256(folder / TABLE)
    replace_text(folder / HEADER, json.dumps(content, indent=1, ensure_ascii=False))


def read_header(folder: Path) -> Header:
    """The header of one of our tables.

    Raises:
        UserError: there is none, or it is damaged or of another version.
    """
    path = folder / HEADER
    if not path.is_file():
        raise UserError(
            f"bias table {folder}",
            got="no such table",
            expected="the logits of the bias model for these shards",
            cure=f"{cli.launched('bias')}  makes it; --loss ce trains without",
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = (content.pop("format"), content.pop("format_version"))
        if version != (FORMAT, FORMAT_VERSION) or set(content) != {f.name for f in fields(Header)}:
            raise ValueError(f"{version[0]!r} version {version[1]}, keys {sorted(content)}")
        content["genres"] = tuple(content["genres"])
        content["layers"] = tuple(content["layers"])
        folds = content["fold_of"].values()
        if not all(type(fold) is int for fold in (*folds, *content["layers"], content["folds"])):
            raise ValueError("folds or layers that are no whole numbers")
        return Header(**content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _refused(folder, str(error), f"{FORMAT!r} version {FORMAT_VERSION}") from error


def read(
    path: Path, manifest: Manifest, keys: Callable[[], Sequence[str]] | None = None
) -> BiasTable:
    """Open a table and check that it belongs to a data set.

    Args:
        path: a folder of ours, which is memory-mapped, or a file from elsewhere.
        manifest: manifest of the data set.
        keys: gives the key of every row (`ShardSet.keys`); called for a file from elsewhere.

    Raises:
        UserError: no table; another data set, genres or size; damaged; a row that is missing or
            not finite; for ours a training group without a fold, or a fold for any other group:
            a head may have been fitted on what it judges.
    """
    if path.is_dir() or path.suffix not in FOREIGN_TABLES:
        return _read_ours(path, manifest)
    if keys is None:
        raise ValueError("a table from elsewhere needs the keys of the rows")
    return _read_foreign(path, manifest, keys())


def _read_ours(folder: Path, manifest: Manifest) -> BiasTable:
    if folder.is_file():
        raise UserError(
            f"bias table {folder}",
            got=f"a file that ends in {folder.suffix or 'no suffix'}",
            expected=f"a folder that `bias` has made, or {', '.join(FOREIGN_TABLES)}",
            cure="name the folder, or save the table as CSV",
        )
    header = read_header(folder)
    if header.dataset_id != manifest.dataset_id:
        raise _refused(
            folder,
            f"a table of data set {header.dataset_id[:12]}",
            f"one of {manifest.dataset_id[:12]}, the data set of --shards",
        )
    if header.genres != manifest.genres:
        raise _refused(folder, f"genres {header.genres}", f"{manifest.genres}")
    _refuse_in_fold(folder, header, manifest)
    try:
        digest = sha256(folder / TABLE)
        if digest != header.table_sha256:
            raise ValueError("another sha256 than its header says")
        table: NDArray[np.float32] = np.load(folder / TABLE, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise _refused(folder, f"{TABLE}: {error}", "the table as it was written") from error
    shape = (manifest.rows, len(manifest.genres))
    if table.shape != shape or table.dtype != np.float32:
        raise _refused(folder, f"{table.dtype} {table.shape}", f"float32 {shape}")
    missing = np.flatnonzero(~np.isfinite(table).all(axis=1))
    if len(missing):
        raise _refused(folder, f"no logits for row {missing[0]}", "finite logits for every row")
    return BiasTable(
        name=header.backbone,
        fold_status="out-of-fold",
        sha256=digest,
        log_probability=table,
        header=header,
    )


def _refuse_in_fold(folder: Path, header: Header, manifest: Manifest) -> None:
    """Every training group has one fold, no other group has any, and no fold is empty."""
    training = set()
    for track in manifest.tracks:
        key = group_key(track.id, track.group)
        fold = header.fold_of.get(key)
        if track.split == "train":
            training.add(key)
            if fold is None or not 0 <= fold < header.folds:
                raise _refused(folder, f"fold {fold} for {track.id}", f"0 to {header.folds - 1}")
        elif fold is not None:
            raise _refused(folder, f"a fold for {track.id} of the {track.split} split", "none")
    strange = sorted(header.fold_of.keys() - training)
    if strange:
        raise _refused(folder, f"a fold for {strange[0]}", "training groups of --shards only")
    if header.folds < 2 or len(set(header.fold_of.values())) < header.folds:
        used = len(set(header.fold_of.values()))
        raise _refused(folder, f"{used} of {header.folds} folds in use", "2 or more, all in use")


def _refused(folder: Path, got: object, expected: str) -> UserError:
    return UserError(
        f"bias table {folder}",
        got=got,
        expected=expected,
        cure=f"make it again: {cli.launched('bias')} --overwrite",
    )


def _read_foreign(path: Path, manifest: Manifest, keys: Sequence[str]) -> BiasTable:
    load = _from_npy if path.suffix == ".npy" else _from_text
    named, values = load(path, manifest.genres)
    place = _places(path, named, keys)
    with np.errstate(over="ignore", invalid="ignore"):
        table = log_softmax(values[place], axis=1).astype(np.float32)  # [N, K]
    bad = np.flatnonzero(~np.isfinite(table).all(axis=1))
    if len(bad):
        raise _foreign(
            path,
            f"values that are not finite for {_few([keys[row] for row in bad.tolist()])}",
            "a finite logit or log-probability of every genre",
            "write log(1e-9) or so where the model gave 0",
        )
    table.setflags(write=False)
    digest = hashlib.sha256(table.tobytes()).hexdigest()
    return BiasTable(name=path.name, fold_status="unknown", sha256=digest, log_probability=table)


def _from_text(path: Path, genres: Sequence[str]) -> tuple[list[str], NDArray[np.float64]]:
    """Keys and values float64 [rows, K] of a CSV or TSV file, columns by name."""
    lines = read_table(path, "--bias-table")
    _refuse_columns(path, list(lines[0][1]) if lines else [], genres)
    values = np.empty((len(lines), len(genres)))
    for n, (line, row) in enumerate(lines):
        try:
            values[n] = [float(row[genre]) for genre in genres]
        except ValueError as error:
            raise _foreign(
                path, f"{error} in line {line}", "numbers", "write one logit a genre"
            ) from error
    return [row[KEY] for _, row in lines], values


def _from_npy(path: Path, genres: Sequence[str]) -> tuple[list[str], NDArray[np.float64]]:
    """Keys and values float64 [rows, K] of a structured array, fields by name."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")  # never unpickles
        _refuse_columns(path, list(array.dtype.names or ()), genres)
        kinds = {name: array.dtype[name].kind for name in (KEY, *genres)}
        odd = [name for name, kind in kinds.items() if kind not in ("US" if name == KEY else "f")]
        if odd or array.ndim != 1 or any(array.dtype[name].shape for name in kinds):
            raise ValueError(f"{array.dtype} {array.shape}")
        named = array[KEY].astype(np.str_).tolist()
    except (OSError, ValueError) as error:
        raise _foreign(
            path,
            str(error),
            "a one-dimensional structured array of text keys and float genres",
            "np.save(FILE, array) of such an array, or write a CSV file",
        ) from error
    return named, np.stack([array[genre].astype(np.float64) for genre in genres], axis=1)


def _refuse_columns(path: Path, columns: Sequence[str], genres: Sequence[str]) -> None:
    missing = [name for name in (KEY, *genres) if name not in columns]
    strange = sorted(set(columns) - {KEY, *genres})
    if missing or strange:
        got = f"no column {_few(missing)}" if missing else f"columns besides: {_few(strange)}"
        cure = "another genre's logits cannot be left out of a softmax; leave other columns out"
        raise _foreign(path, got, f"the columns {KEY}, {', '.join(genres)}", cure)


def _places(path: Path, named: Sequence[str], keys: Sequence[str]) -> NDArray[np.int64]:
    """Where each row's logits stand in the file: int64 [N]."""
    place = {key: n for n, key in enumerate(named)}
    twice = [key for key, count in Counter(named).items() if count > 1]
    missing = [key for key in keys if key not in place]
    unknown = sorted(place.keys() - set(keys))
    for fault, which in (("twice", twice), ("missing", missing), ("unknown", unknown)):
        if which:
            raise _foreign(
                path,
                f"{len(which)} keys {fault}: {_few(which)}",
                f"each of the {len(keys)} segments of --shards once",
                f"keys are the names of the segments in the shards, such as {keys[0]}",
            )
    return np.array([place[key] for key in keys], np.int64)


def _few(listed: Sequence[str]) -> str:
    return f"{', '.join(listed[:3])}{f' ... ({len(listed)})' if len(listed) > 3 else ''}"


def _foreign(path: Path, got: str, expected: str, cure: str) -> UserError:
    return UserError(f"--bias-table {path}", got=got, expected=expected, cure=cure)
