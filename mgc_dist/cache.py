"""`python -m mgc_dist.cache SHARDS/cache`: which caches there are, who used them; removes some."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, UseAppendAction

from mgc_dist import cli
from mgc_dist.config.knobs import Range, check
from mgc_dist.errors import UserError


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """List the caches that `train --cache` has made in a folder: size, last use, and the runs that
    used them. Remove those that are named, or that no run has used for long.
    """

    folder: Positional[Path]
    """Folder of caches: SHARDS/cache, or what `--cache-dir` named."""
    remove: UseAppendAction[tuple[str, ...]] = ()
    """A cache to remove, by its name or how that begins; may be given several times."""
    unused_days: Annotated[float | None, Range(minimum=0, cure="30 is usual")] = None
    """Remove the caches that no run has used for so many days."""

    def __post_init__(self) -> None:
        check(self)


def run(config: CacheConfig) -> None:
    """Remove what is asked for, and print a line a cache.

    Raises:
        UserError: no such folder, no cache of that name, or a training is making it.
    """
    # here, not above: it imports torch, and --help answers without
    from mgc_dist.training import caches

    if not config.folder.is_dir():
        raise UserError(
            f"folder {config.folder}",
            got="no such folder",
            expected="a folder of caches",
            cure="SHARDS/cache is where `train --cache cnn` makes them by default",
        )
    found = caches.listed(config.folder)
    doomed = caches.chosen(found, config.remove, config.unused_days)
    for each in found:
        if each in doomed:
            caches.remove(each)
        print(f"{each}{': removed' * (each in doomed)}")
    taken = sum(each.bytes for each in found if each not in doomed)
    print(f"{len(found) - len(doomed)} caches, {taken / 1e9:.2f} GB in {config.folder}")


def main() -> None:
    """Entry of `python -m mgc_dist.cache`."""
    cli.main("cache", CacheConfig, run)


if __name__ == "__main__":
    main()
