"""Families of traits of a data set's tracks, and how well each tells the genre by itself.

Traits of waves are means over a track's segments; those of files come from the table of sources.
Folds keep artists together where they are known, so a family cannot know the artist.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mgc_dist.bias_model.folds import deal_folds, of_tracks
from mgc_dist.bias_model.heads import CrossFit, cross_fit, refuse_empty_folds
from mgc_dist.console import progress
from mgc_dist.data.manifest import Manifest
from mgc_dist.data.reader import ShardSet
from mgc_dist.errors import UserError
from mgc_dist.packing import provenance
from mgc_dist.sound import traits
from mgc_dist.sound.traits import FAMILIES, PREFIX, Probe
from mgc_dist.workers import cores, spread

OF_FILES = {
    "file": (
        "facts of the file: format, rate, channels, bit rate, length",
        ("container", "codec", "sample_rate", "channels", "kbit_rate", "seconds"),
    ),
    "stereo": ("stereo: how much the channels differ", ("channels", "mixing_loss_db")),
}
"""Families that only the source files tell: what they are, and their properties."""
NAMES = (*OF_FILES, *FAMILIES)
PROBE = "log-mel"
_ROWS = 1024
"""Segments that a process is given at a time."""
_SAMPLES = 32 * 48_000
"""Audio samples that it computes at a time: 0.1 GB with all that is made of them."""
HEAD_C = 1.0
"""Inverse penalty of all models here, as the bias model's by default."""

Values = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Traits:
    """A family of M tracks.

    Attributes:
        name: of the family.
        about: what it is, in words.
        columns: names of its d traits.
        values: float32 [M, d].
    """

    name: str
    about: str
    columns: list[str]
    values: Values


def gather(shards: ShardSet, jobs: int) -> tuple[list[Traits], Values]:
    """All families of all tracks, and the probe's statistics [M, 80]: one pass over the shards.

    Args:
        shards: all rows, as they were packed.
        jobs: processes, 0 for one a core.

    Raises:
        UserError: a shard is damaged.
    """
    rows, rate = shards.manifest.rows, shards.manifest.sample_rate
    jobs = min(jobs or cores(), -(-rows // _ROWS))
    blocks = [(first, min(first + _ROWS, rows)) for first in range(0, rows, _ROWS)]
    track, counts = shards.tracks, np.bincount(shards.tracks)
    widths = [len(family.columns(rate)) for family in FAMILIES.values()]
    total = np.zeros((len(counts), sum(widths) + Probe(rate).width))
    work = partial(_measured, folder=shards.folder, alone=jobs > 1)
    with progress("listening", len(blocks), unit="blocks") as bar:
        for (first, stop), found in bar.over(zip(blocks, spread(work, blocks, jobs), strict=True)):
            np.add.at(total, track[first:stop], found)
    means = (total / counts[:, None]).astype(np.float32)  # [M, all]
    *parts, probe = np.split(means, np.cumsum(widths), axis=1)
    heard = [
        Traits(name=name, about=family.about, columns=family.columns(rate), values=values)
        for (name, family), values in zip(FAMILIES.items(), parts, strict=True)
    ]
    of_files = (of_file(name, shards.folder, shards.manifest) for name in OF_FILES)
    return [*(each for each in of_files if each), *heard], probe


def _measured(block: tuple[int, int], *, folder: Path, alone: bool) -> NDArray[np.float32]:
    """Traits of all families and the probe's statistics of some rows: float32 [rows, all]."""
    if alone:
        torch.set_num_threads(1)
    found = []
    with ShardSet(folder, is_whole=True) as shards, torch.inference_mode():
        rate, samples = shards.manifest.sample_rate, shards.manifest.segment_samples
        probe, batch = Probe(rate), max(1, _SAMPLES // samples)
        for first in range(*block, batch):
            rows = np.arange(first, min(first + batch, block[1]))
            wave = np.empty((len(rows), samples), np.int16)
            shards.read_batch(rows, wave, np.empty(len(rows), np.int64))
            taken = torch.from_numpy(wave)  # [B, T]
            heard = traits.hear(taken, rate)
            parts = [family.of(heard) for family in FAMILIES.values()]
            found.append(torch.cat([*parts, probe(taken)], dim=1).numpy())
    return np.concatenate(found)


def of_file(name: str, folder: Path, manifest: Manifest) -> Traits | None:
    """A family that the source files tell; None where the data set has no table of them.

    Args:
        name: of OF_FILES.
        folder: of the shards.
        manifest: of the data set.
    """
    about = provenance.read(folder, manifest)
    if about is None:
        return None
    title, properties = OF_FILES[name]
    columns, values = provenance.indicators(about, properties)
    return Traits(name=name, about=title, columns=columns, values=values)


def family_of(backbone: str) -> str | None:
    """The family that `--backbone audit:NAME` asks for; None for any other backbone.

    Raises:
        UserError: there is no such family.
    """
    if not backbone.startswith(PREFIX):
        return None
    name = backbone.removeprefix(PREFIX)
    if name not in NAMES:
        raise UserError(
            f"--backbone {backbone}",
            got=name or "no name",
            expected=f"one of {', '.join(NAMES)}",
            cure=f"for example {PREFIX}lines; `python -m mgc_dist.audit SHARDS` says which tells",
        )
    return name


def fit(values: Values, label: NDArray[np.int64], fold: NDArray[np.int64], genres: int) -> CrossFit:
    """A linear model of the genre of each of M tracks, by heads that have not seen its fold.

    Args:
        values: float32 [M, d], in the manifest's order.
        label: int64 [M].
        fold: int64 [M], from `folds_of`: none is empty.
        genres: K.
    """
    return cross_fit(values, label, fold, folds=int(fold.max()) + 1, genres=genres, c=HEAD_C)


def folds_of(
    manifest: Manifest, folds: int, seed: int, *, by_artist: bool = True
) -> NDArray[np.int64]:
    """The fold of each track: int64 [M].

    Args:
        manifest: of the data set.
        folds: k.
        seed: of the folds.
        by_artist: whether tracks of an artist are in one fold, where artists are known.

    Raises:
        UserError: a fold would be empty, as there are fewer artists.
    """
    tracks = manifest.labelled_tracks()
    if not by_artist:
        tracks = [replace(track, group=None) for track in tracks]
    fold = of_tracks(deal_folds(tracks, folds, seed), tracks)
    refuse_empty_folds(np.bincount(fold, minlength=folds), folds)
    return fold


def labels(manifest: Manifest) -> NDArray[np.int64]:
    """Label of each track: int64 [M]."""
    place = {genre: label for label, genre in enumerate(manifest.genres)}
    return np.array([place[track.genre] for track in manifest.tracks], np.int64)


def used(family: Traits, fitted: CrossFit, genres: Iterable[str], most: int) -> list[str]:
    """The traits that a family's heads go by, the heaviest first, each with its genre.

    Args:
        family: of the tracks.
        fitted: its heads; their weights are of standardised traits.
        genres: K names.
        most: how many at most.
    """
    weight = np.mean([head.weight for head in fitted.heads], axis=0)  # [K, d]
    names, spread_of = list(genres), weight.std(axis=0)
    order = [column for column in np.argsort(-spread_of) if spread_of[column] > 0][:most]
    return [f"{family.columns[k]} ({names[int(weight[:, k].argmax())]})" for k in order]
