"""`python -m mgc_dist.audit SHARDS`: what besides music tells the genre in a data set."""

import tempfile
from dataclasses import replace
from pathlib import Path

from mgc_dist import cli
from mgc_dist.config import AuditConfig, ShardConfig


def run(config: AuditConfig) -> None:
    """Examine a data set; print what was found, and write audit.json and audit.html.

    Raises:
        UserError: no data set or music there, a damaged shard, or fewer artists than folds.
    """
    from mgc_dist.data import manifest  # here, not above: --help answers without numpy

    if (config.data / manifest.NAME).is_file() or not config.data.exists():
        _examine(config, config.data, config.out or config.data / "audit")
        return
    with tempfile.TemporaryDirectory(prefix="mgc_dist-audit-") as folder:
        _pack(config, Path(folder) / "shards")
        _examine(config, Path(folder) / "shards", config.out or Path("audit"))


def _pack(config: AuditConfig, out: Path) -> None:
    """Pack music as one split, so that no genre has too few artists to be looked at."""
    from mgc_dist.files import replace_text
    from mgc_dist.packing import command, layouts, splits

    music = ShardConfig(
        data=config.data, groups=config.groups, out=out, allow_bad="99%", jobs=config.jobs
    )
    tracks = [replace(track, split="test") for track in layouts.find(music).tracks]
    table = out.parent / "splits.csv"
    replace_text(table, splits.as_table(tracks))
    command.shard(replace(music, split="table", split_file=table), print)


def _examine(config: AuditConfig, folder: Path, out: Path) -> None:
    from mgc_dist.bias_model import findings
    from mgc_dist.data.reader import ShardSet
    from mgc_dist.report import audit_report

    with ShardSet(folder, is_whole=True) as shards:
        found = findings.examine(config, shards)
        audit_report.bring(found, shards, out, config.data.resolve().name)


def main() -> None:
    """Entry of `python -m mgc_dist.audit`."""
    cli.main("audit", AuditConfig, run)


if __name__ == "__main__":
    main()
