"""`python -m mgc_dist.audit SHARDS`: what besides music tells the genre in a data set."""

import tempfile
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
    from mgc_dist.packing import command

    packed = ShardConfig(
        data=config.data,
        groups=config.groups,
        out=out,
        split="stratified",
        same_group=True,
        allow_bad="99%",
        jobs=config.jobs,
    )
    command.shard(packed, print)


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
