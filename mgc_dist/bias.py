"""`deepspeed launch/bias.py`: one pass of the frozen bias model, heads, table, bias report."""

import errno
import json
import logging
import os
from typing import TYPE_CHECKING, Any, NoReturn

from mgc_dist import cli
from mgc_dist.config import BiasConfig
from mgc_dist.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

    from mgc_dist.data import ShardSet
    from mgc_dist.logits import BiasTable, Header
    from mgc_dist.manifest import Manifest
    from mgc_dist.ranks import Ranks

log = logging.getLogger(__name__)

Report = dict[str, Any]

TOO_GOOD = 0.9
"""Out-of-fold accuracy above which a warning is printed: at 0.915 product of experts had taught
the demo's main model little after six epochs, at 0.745 it learned (docs/log.md, 2026-11-22)."""


def run(config: BiasConfig) -> None:
    """Pool hidden states of every row, cross-fit the heads, write the table, print the report.

    Raises:
        UserError: no shards, no model, or a table with other settings is in the way.
    """
    from mgc_dist import display, logits, model, ranks, stage
    from mgc_dist.data import ShardSet
    from mgc_dist.files import replace_text

    if config.shards_from:
        stage.stage(config.shards, config.shards_from, timeout_s=config.stage_timeout_s)
    with ShardSet(config.shards) as shards, ranks.join(config.device) as peers:
        display.start_logging(peers.rank)
        sample_rate = shards.manifest.sample_rate
        backbone = model.build_bias(config.backbone, layer=config.layer, sample_rate=sample_rate)
        bias_hash = model.fingerprint(backbone, f"layer {config.layer}", "pass float32")
        made = peers.all_decide(lambda: _is_made(config, shards.manifest, bias_hash))
        if made:
            if peers.is_first:
                print(f"{config.table} already holds exactly this table; nothing to do.")
        else:
            hidden = _pass(config, shards, peers, backbone.to(peers.device))
            peers.all_decide(lambda: _fit_and_write(config, shards, hidden, bias_hash))
        if peers.is_first:
            table = logits.read(config.table, shards.manifest)
            report = _report(shards, table)
            if not made or not (config.table / "report.json").is_file():
                replace_text(config.table / "report.json", json.dumps(report, indent=1))
            _print_report(config, table.header, report)


def _is_made(config: BiasConfig, found: "Manifest", bias_hash: str) -> bool:
    from mgc_dist import logits

    nearest = next(path for path in (config.table, *config.table.parents) if path.exists())
    if not os.access(nearest, os.W_OK):  # known before the pass, not after it
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(nearest))
    if config.overwrite or not (config.table / logits.HEADER).is_file():
        return False
    header = logits.read_header(config.table)
    wanted = (found.dataset_id, bias_hash, config.folds, config.head_c, config.seed)
    have = (header.dataset_id, header.bias_hash, header.folds, header.head_c, header.seed)
    if have != wanted:
        raise UserError(
            f"--bias-table {config.table}",
            got="a table of another data set, bias model or head",
            expected="no table, or one with these settings",
            cure="replace it with --overwrite, or choose another --bias-table",
        )
    return True


def _pass(
    config: BiasConfig, shards: "ShardSet", peers: "Ranks", backbone: "nn.Module"
) -> "NDArray[np.float32]":
    """Pooled hidden states of all rows, float32 [N, D], on every rank (a collective)."""
    import numpy as np
    import torch

    from mgc_dist.display import progress
    from mgc_dist.infer import all_rows

    samples = shards.manifest.segment_samples
    with torch.no_grad():
        width = backbone(torch.zeros(1, samples, dtype=torch.int16, device=peers.device)).shape[1]
    parts = []
    for split in shards.manifest.splits:
        first, stop = shards.rows_of(split)
        batches = -(-(stop - first) // (config.batch * peers.world))
        with progress(f"bias pass, {split}", batches, shown=peers.is_first) as bar:
            parts.append(
                all_rows(
                    backbone,
                    shards,
                    split,
                    peers,
                    batch=config.batch,
                    width=width,
                    progress=bar.over,
                )
            )
    log.info("bias pass done: %d rows of %d hidden values", sum(map(len, parts)), width)
    return np.concatenate(parts)


def _fit_and_write(
    config: BiasConfig, shards: "ShardSet", hidden: "NDArray[np.float32]", bias_hash: str
) -> None:
    import hashlib

    import numpy as np

    from mgc_dist import logits
    from mgc_dist.heads import cross_fit
    from mgc_dist.split import deal_folds
    from mgc_dist.tracks import group_key

    found = shards.manifest
    tracks = found.labelled_tracks()
    folds = deal_folds([t for t in tracks if t.split == "train"], config.folds, config.seed)
    of_track = np.array([folds.get(group_key(t.id, t.group), -1) for t in tracks], np.int64)
    fit = cross_fit(
        hidden,
        shards.labels,
        of_track[shards.tracks],
        folds=config.folds,
        genres=len(found.genres),
        c=config.head_c,
    )
    digest = hashlib.sha256()
    for head in fit.heads:
        for array in (head.mean, head.scale, head.weight, head.intercept):
            digest.update(array.tobytes())
    header: Header = logits.Header(
        dataset_id=found.dataset_id,
        genres=found.genres,
        backbone=config.backbone,
        bias_hash=bias_hash,
        head_hash=digest.hexdigest(),
        layer=config.layer,
        folds=config.folds,
        head_c=config.head_c,
        seed=config.seed,
        fold_of=folds,
        temperature=fit.temperature,
        table_sha256="",
    )
    logits.write(config.table, header, fit.log_probability, hidden)


def _report(shards: "ShardSet", table: "BiasTable") -> Report:
    """Figures of each split, and of the training rows' truth."""
    import numpy as np

    from mgc_dist.metrics import effective_sample_size, expected_calibration_error, scores

    splits: dict[str, dict[str, float]] = {}
    truth = np.empty(0)
    for split in shards.manifest.splits:
        first, stop = shards.rows_of(split)
        probability = np.exp(table.log_probability[first:stop].astype(np.float64))
        label = shards.labels[first:stop]
        ece = expected_calibration_error(probability, label)
        splits[split] = scores(probability, label).summary() | {"ece": ece}
        if split == "train":
            truth = probability[np.arange(len(label)), label]
    counts, _ = np.histogram(truth, bins=10, range=(0, 1))
    return {
        **splits,
        "truth_histogram": counts.tolist(),
        "effective_sample_size": effective_sample_size(1 - truth),
    }


def _print_report(config: BiasConfig, header: "Header", report: Report) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    shown = Table(title=f"Bias report: {header.backbone}, temperature {header.temperature:.2f}")
    for column in ("split", "logits", "rows", "accuracy", "NLL", "ECE"):
        shown.add_column(column, justify="left" if column in ("split", "logits") else "right")
    for split in ("train", "validation", "test"):
        figures = report[split]
        kind = "out of fold" if split == "train" else "mean of heads"
        values = (f"{figures[name]:.3f}" for name in ("accuracy", "nll", "ece"))
        shown.add_row(split, kind, str(figures["count"]), *values)
    console.print(shown)
    console.print("probability given to the truth (training rows, out of fold):")
    counts = report["truth_histogram"]
    for tenth, count in enumerate(counts):
        bar = "█" * round(40 * count / max(counts))
        console.print(f"  {tenth / 10:.1f}-{(tenth + 1) / 10:.1f} {count:6d} {bar}")
    rows, size = report["train"]["count"], report["effective_sample_size"]
    console.print(
        f"effective sample size of the weights 1 - b_y: {size:.0f} of {rows} rows "
        f"({100 * size / rows:.0f} %)"
    )
    if report["train"]["accuracy"] > TOO_GOOD:
        console.print(
            f"Warning: a bias model that is right in {100 * report['train']['accuracy']:.0f} % of "
            "the segments explains the task itself; product of experts may then teach the main "
            "model little (docs/log.md). Compare with --loss ce, or lower --beta."
        )
    console.print(
        f"{config.table} is ready; next: deepspeed launch/train.py --shards {config.shards}"
    )


def main() -> NoReturn:
    """Entry of `launch/bias.py` and `python -m mgc_dist.bias`."""
    cli.main("bias", BiasConfig, run)


if __name__ == "__main__":
    main()
