"""`deepspeed launch/bias.py`: one pass of the frozen bias model, heads, table, bias report."""

import errno
import logging
import os
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, NoReturn

from mgc_dist import cli
from mgc_dist.config import BiasConfig
from mgc_dist.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from mgc_dist.bias_model.states import Facts
    from mgc_dist.cluster.ranks import Ranks
    from mgc_dist.data.manifest import Manifest
    from mgc_dist.data.reader import ShardSet

log = logging.getLogger(__name__)


def run(config: BiasConfig) -> None:
    """Pool hidden states of every row, cross-fit the heads, write the table, print the report.

    Raises:
        UserError: no shards, no model, or a table with other settings is in the way.
    """
    from mgc_dist.cluster import preflight

    preflight.begin(run=None, device=config.device)
    from mgc_dist.cluster import meeting as rendezvous
    from mgc_dist.cluster import ranks
    from mgc_dist.data import fetch as stage
    from mgc_dist.data.reader import ShardSet

    with rendezvous.meet(cli.flags_of(config), wait_s=config.source.stage_timeout_s) as meeting:
        folder = stage.at_hand(config.shards, config.source)
        with ShardSet(folder) as shards:
            meeting.all_same("data", {"data set (--shards)": shards.manifest.dataset_id})
            with ranks.join(config.device, meeting=meeting) as peers, ExitStack() as held:
                if not config.is_foreign:
                    peers.all_decide(lambda: _take(config, held))
                    _make(config, shards, peers)
                elif peers.is_first:
                    _report(config, shards, write=True)


def _make(config: BiasConfig, shards: "ShardSet", peers: "Ranks") -> None:
    """Do what is missing: the pass, the heads, the report."""
    from mgc_dist.bias_model import states as hidden
    from mgc_dist.models import backbone as backbones

    found = shards.manifest
    shards.rows_of("train")  # heads are fitted on training rows: refused before the pass
    backbone = backbones.build_bias(config.backbone, sample_rate=found.sample_rate)
    facts = hidden.Facts(
        dataset_id=found.dataset_id,
        bias_hash=backbones.fingerprint(backbone, "pass float32"),
        rows=found.rows,
        layers=backbone.layers,
        width=backbone.width,
    )
    layers = resolve_layers(config, backbone.layers)
    folds = _deal(config, found)  # refused before the pass, not after it
    made = peers.all_decide(lambda: _is_made(config, found, facts.bias_hash, layers))
    if made and peers.is_first:
        print(f"{config.table} already holds exactly this table; nothing to do.")
    if not made:
        overwrite = config.overwrite
        if peers.all_decide(lambda: hidden.is_whole(config.table, facts, overwrite=overwrite)):
            log.info("hidden states of this data set and bias model are there: no pass is needed")
        else:
            on_device = backbone.to(peers.device)
            hidden.all_pass(config.table, facts, on_device, shards, peers, batch=config.batch)
        peers.all_decide(lambda: _fit_and_write(config, shards, facts, layers, folds))
    if peers.is_first:  # no collective: nothing is left to agree on, and the others may go
        _report(config, shards, write=not made)


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


def _deal(config: BiasConfig, found: "Manifest") -> dict[str, int]:
    """Group -> fold of every training group; none of the folds is empty."""
    from collections import Counter

    from mgc_dist.bias_model.heads import refuse_empty_folds
    from mgc_dist.packing.splits import deal_folds

    training = [track for track in found.labelled_tracks() if track.split == "train"]
    folds = deal_folds(training, config.folds, config.seed)
    counts = Counter(folds.values())
    refuse_empty_folds([counts[fold] for fold in range(config.folds)], config.folds)
    return folds


def _take(config: BiasConfig, held: ExitStack) -> None:
    """Have the folder alone until the command ends (rank 0)."""
    from mgc_dist.files import locked, nearest

    folder = config.table
    there = nearest(folder)
    if not os.access(there, os.W_OK):  # known before the pass, not after it
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(there))
    if folder.is_file():
        raise UserError(
            f"--bias-table {folder}",
            got="a file",
            expected="a folder, or a table from elsewhere in .csv, .tsv or .npy",
            cure="choose another --bias-table",
        )
    folder.mkdir(parents=True, exist_ok=True)
    held.callback(_remove_if_empty, folder)  # where something is refused before the pass
    held.enter_context(locked(folder / "lock", wait_s=0, purpose=f"--bias-table {folder}"))


def _remove_if_empty(folder: "Path") -> None:
    with suppress(OSError):
        folder.rmdir()


def _is_made(
    config: BiasConfig, found: "Manifest", bias_hash: str, layers: tuple[int, ...]
) -> bool:
    from mgc_dist.bias_model import table as logits

    if config.overwrite or not (config.table / logits.HEADER).is_file():
        return False
    header = logits.read_header(config.table)
    wanted = {
        "data set": (header.dataset_id, found.dataset_id),
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
    shards: "ShardSet",
    facts: "Facts",
    layers: tuple[int, ...],
    folds: dict[str, int],
) -> None:
    import numpy as np

    from mgc_dist.bias_model import states as hidden
    from mgc_dist.bias_model import table as logits
    from mgc_dist.bias_model.heads import cross_fit, head_hash
    from mgc_dist.data.tracks import group_key
    from mgc_dist.report import bias as bias_report

    found = shards.manifest
    keys = [group_key(track.id, track.group) for track in found.tracks]
    of_track = np.array([folds.get(key, -1) for key in keys], np.int64)
    fit = cross_fit(
        hidden.mean_of_layers(hidden.open_states(config.table, facts), layers),
        shards.labels,
        of_track[shards.tracks],
        folds=config.folds,
        genres=len(found.genres),
        c=config.head_c,
    )
    for path in bias_report.paths_of(config.table):
        path.unlink(missing_ok=True)  # of the table that is replaced
    header = logits.Header(
        dataset_id=found.dataset_id,
        genres=found.genres,
        backbone=config.backbone,
        bias_hash=facts.bias_hash,
        head_hash=head_hash(fit.heads),
        layers=layers,
        folds=config.folds,
        head_c=config.head_c,
        seed=config.seed,
        fold_of=folds,
        temperature=fit.temperature,
        table_sha256="",
    )
    logits.write(config.table, header, fit.log_probability)


def _report(config: BiasConfig, shards: "ShardSet", *, write: bool) -> None:
    """Print the report, and write it where it is new or missing (rank 0)."""
    from mgc_dist.bias_model import summary
    from mgc_dist.bias_model import table as logits
    from mgc_dist.report import bias as bias_report

    table = logits.read(config.table, shards.manifest, shards.keys)
    report = summary.make(table, shards.manifest, shards.labels, shards.tracks)
    bias_report.show(report)
    files = bias_report.paths_of(config.table)
    if write or not all(path.is_file() for path in files):
        bias_report.write(config.table, report)
    other = f" --bias-table {config.table}" if config.bias_table else ""
    print(f"{config.table} is ready, its report in {files[0]} and {files[1].name}; next:")
    print(f"deepspeed launch/train.py --shards {config.shards}{other}")


def main() -> NoReturn:
    """Entry of `launch/bias.py` and `python -m mgc_dist.bias`."""
    cli.main("bias", BiasConfig, run)


if __name__ == "__main__":
    main()
