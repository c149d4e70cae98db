"""The data set that lies in the output folder already: may it stay, and is it whole?"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from mgc_dist.config import ShardConfig
from mgc_dist.data import manifest
from mgc_dist.data.manifest import Manifest
from mgc_dist.errors import UserError
from mgc_dist.files import fingerprint, sha256
from mgc_dist.packing.cut import PackPlan
from mgc_dist.packing.pack import Settings, track_entries
from mgc_dist.workers import cores


def read(config: ShardConfig) -> Manifest | None:
    """The manifest of the data set that may not be replaced, if there is one."""
    if config.overwrite or not (config.out / manifest.NAME).is_file():
        return None
    return manifest.read(config.out)


def refuse_other(
    config: ShardConfig, existing: Manifest, plan: PackPlan, settings: Settings
) -> None:
    """Refuse a data set that is not just the planned one, or is no longer as it was packed.

    Raises:
        UserError: with what is different.
    """
    if not is_packed(plan, existing, settings):
        raise UserError(
            f"--out {config.out}",
            got=f"a different data set ({existing.dataset_id[:12]})",
            expected="an empty folder, or the same tracks and settings",
            cure="choose another --out, or replace it with --overwrite",
        )
    if fault := damage(config.out, existing, config.jobs):
        raise UserError(
            f"--out {config.out}",
            got=f"this data set, but {fault}",
            expected="files as its manifest lists them",
            cure="pack it again with --overwrite",
        )


def is_packed(plan: PackPlan, dataset: Manifest, settings: Settings) -> bool:
    """Whether a manifest already holds what the plan would write, by content of the sources."""
    wanted = settings | {"rows_per_shard": plan.cut.rows_per_shard}
    same = {key: dataset.settings.get(key) for key in wanted} == wanted
    if plan.excluded != dataset.excluded:
        return False
    entries = tuple(replace(entry, source_xxh3="") for entry in dataset.tracks)
    cut = plan.cut
    if not same or entries != track_entries(plan, [""] * len(plan.tracks)):
        return False
    if dataset.settings["segment_samples"] != cut.segment_samples:
        return False
    if (dataset.settings["hop_samples"], dataset.sample_rate) != (cut.hop_samples, cut.sample_rate):
        return False
    if [(shard.name, shard.rows) for shard in dataset.shards] != plan.shards():
        return False
    pairs = zip(dataset.tracks, plan.tracks, strict=True)
    return all(entry.source_xxh3 == fingerprint(track.path) for entry, track in pairs)


def damage(out: Path, dataset: Manifest, jobs: int) -> str:
    """What is not as the manifest says, by size and sha256 of its files; "" if all is."""

    def fault(item: tuple[str, str]) -> str:
        path, digest = out / item[0], item[1]
        if not path.is_file():
            return f"no {path.name}"
        return "" if sha256(path) == digest else f"another {path.name}"

    with ThreadPoolExecutor(jobs or cores()) as threads:
        faults = threads.map(fault, dataset.files.items())
        return next((text for text in faults if text), "")
