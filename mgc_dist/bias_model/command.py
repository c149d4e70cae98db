"""The body of `bias`: what is missing of the pass, the heads and the table."""

import hashlib
import json
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mgc_dist.bias_model import families, states, summary, table
from mgc_dist.bias_model.folds import deal_folds, of_tracks
from mgc_dist.bias_model.heads import cross_fit, head_hash, refuse_empty_folds
from mgc_dist.bias_model.states import StatesKey
from mgc_dist.cluster.ranks import Ranks
from mgc_dist.config import BiasConfig
from mgc_dist.data.manifest import TRACKS, Manifest
from mgc_dist.data.reader import ShardSet
from mgc_dist.errors import UserError
from mgc_dist.models.backbone import build_bias, fingerprint
from mgc_dist.sound.traits import PREFIX, Traits


@dataclass(frozen=True, kw_only=True)
class TableMade:
    """What became of a bias table.

    Attributes:
        folder: of the table; a file of a table from elsewhere.
        is_new: whether it was made now; its report is then to be written anew.
        is_first: whether this is rank 0, which speaks for all.
    """

    folder: Path
    is_new: bool
    is_first: bool


def make(config: BiasConfig, shards: ShardSet, peers: Ranks) -> TableMade:
    """Do what is missing: the pass over the shards, the heads, the table (a collective).

    Args:
        config: which backbone, layers, folds.
        shards: the data.
        peers: who takes part.

    Raises:
        UserError: no training rows, no model, or a table with other settings is in the way.
    """
    if config.is_foreign:
        return TableMade(folder=config.table, is_new=True, is_first=peers.is_first)
    with ExitStack() as held:
        peers.all_decide(lambda: _take(config, held))
        is_new = _all_make(config, shards, peers)
    return TableMade(folder=config.table, is_new=is_new, is_first=peers.is_first)


def _all_make(config: BiasConfig, shards: ShardSet, peers: Ranks) -> bool:
    """False if the table is there already."""
    manifest = shards.manifest
    shards.rows_of("train")  # heads are fitted on training rows: refused before the pass
    folds = _deal(config, manifest)  # this too
    family = families.family_of(config.backbone)
    if family in families.OF_FILES:
        return _all_of_files(config, shards, peers, folds)
    backbone = (
        Traits(family, manifest.sample_rate).eval()
        if family
        else build_bias(
            config.backbone,
            segment_samples=manifest.segment_samples,
            sample_rate=manifest.sample_rate,
            revision=config.revision,
        )
    )
    key = StatesKey(
        dataset_id=shards.packed_id,
        bias_hash=fingerprint(backbone, "pass float32"),
        rows=manifest.rows,
        layers=backbone.layers,
        width=backbone.width,
    )
    layers = resolve_layers(config, backbone.layers)
    if peers.all_decide(lambda: _is_made(config, manifest, key.bias_hash, layers)):
        return False
    states.all_bring(
        config.states,
        key,
        backbone,
        shards,
        peers,
        batch=config.batch,
        overwrite=config.overwrite,
        flags=("--bias-table", "--backbone"),
    )
    peers.all_decide(
        lambda: _fit_and_write(
            config,
            shards,
            states.of_shards(config.states, key, layers, shards),
            key.bias_hash,
            layers,
            folds,
        )
    )
    return True


def _all_of_files(
    config: BiasConfig, shards: ShardSet, peers: Ranks, folds: dict[str, int]
) -> bool:
    """As `_all_make`, of a family that no wave tells: no pass, and no states to keep."""
    family = families.of_file(config.backbone.removeprefix(PREFIX), shards.folder, shards.manifest)
    if family is None:
        raise UserError(
            f"--backbone {config.backbone}",
            got=f"no {TRACKS} in {shards.folder}, which an older version has packed",
            expected="a table of how the sources were recorded",
            cure="pack the data set again, or take a family of the waves, such as audit:lines",
        )
    layers = resolve_layers(config, 1)
    said = json.dumps([config.backbone, family.columns]).encode()
    bias_hash = hashlib.sha256(said + family.values.tobytes()).hexdigest()
    if peers.all_decide(lambda: _is_made(config, shards.manifest, bias_hash, layers)):
        return False
    of_row = family.values[shards.tracks]  # [N, d]
    peers.all_decide(lambda: _fit_and_write(config, shards, of_row, bias_hash, layers, folds))
    return True


def resolve_layers(config: BiasConfig, count: int) -> tuple[int, ...]:
    """The layers that are asked for, counted from 0.

    Args:
        config: may count from the end.
        count: L.

    Raises:
        UserError: there is no such layer, or one is named twice.
    """
    layers = tuple(layer + count if layer < 0 else layer for layer in config.layer)
    outside = [asked for asked, at in zip(config.layer, layers, strict=True) if not 0 <= at < count]
    if outside or len(set(layers)) < len(layers):
        raise UserError(
            f"--layer {' '.join(map(str, config.layer))}",
            got=outside[0] if outside else "a layer twice",
            expected=f"{-count} to {count - 1} for {config.backbone}",
            cure="-1 is the last layer",
        )
    return layers


def _deal(config: BiasConfig, manifest: Manifest) -> dict[str, int]:
    """Group -> fold of every training group; none of the folds is empty."""
    training = [track for track in manifest.labelled_tracks() if track.split == "train"]
    folds = deal_folds(training, config.folds, config.seed)
    counts = Counter(folds.values())
    refuse_empty_folds([counts[fold] for fold in range(config.folds)], config.folds)
    return folds


def _take(config: BiasConfig, held: ExitStack) -> None:
    """Have the folder alone until the table is made (rank 0)."""
    folder = config.states
    if folder.is_file():
        raise UserError(
            f"--bias-table {folder}",
            got="a file",
            expected="a folder, or a table from elsewhere in .csv, .tsv or .npy",
            cure="choose another --bias-table",
        )
    held.enter_context(states.taken(folder, "--bias-table"))


def _is_made(
    config: BiasConfig, manifest: Manifest, bias_hash: str, layers: tuple[int, ...]
) -> bool:
    if config.overwrite or not (config.table / table.HEADER).is_file():
        return False
    header = table.read_header(config.table)
    wanted = {
        "data set": (header.dataset_id, manifest.dataset_id),
        "bias model": (header.bias_hash, bias_hash),
        "--layer": (header.layers, layers),
        "--folds": (header.folds, config.folds),
        "--head-c": (header.head_c, config.head_c),
        "--seed": (header.seed, config.seed),
    }
    other = [name for name, (have, want) in wanted.items() if have != want]
    if other:
        raise UserError(
            f"--bias-table {config.table}",
            got=f"a table of another {', '.join(other)}",
            expected="no table, or one with these settings",
            cure="replace it with --overwrite (hidden states that fit are kept), or choose another "
            "--bias-table",
        )
    return True


def _fit_and_write(
    config: BiasConfig,
    shards: ShardSet,
    hidden: NDArray[np.float32],
    bias_hash: str,
    layers: tuple[int, ...],
    folds: dict[str, int],
) -> None:
    manifest = shards.manifest
    fit = cross_fit(
        hidden,
        shards.labels,
        of_tracks(folds, manifest.tracks)[shards.tracks],
        folds=config.folds,
        genres=len(manifest.genres),
        c=config.head_c,
    )
    for path in summary.paths_of(config.table):
        path.unlink(missing_ok=True)  # of the table that is replaced
    header = table.Header(
        dataset_id=manifest.dataset_id,
        genres=manifest.genres,
        backbone=config.backbone,
        bias_hash=bias_hash,
        head_hash=head_hash(fit.heads),
        layers=layers,
        folds=config.folds,
        head_c=config.head_c,
        seed=config.seed,
        fold_of=folds,
        temperature=fit.temperature,
        table_sha256="",
    )
    config.table.mkdir(exist_ok=True)
    table.write(config.table, header, fit.log_probability)
