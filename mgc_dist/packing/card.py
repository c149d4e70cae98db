"""What a data set is, for people: the card beside its shards, and the table of `shard info`."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from mgc_dist.data import record
from mgc_dist.data.manifest import Manifest, TrackEntry, twins
from mgc_dist.data.tracks import Track
from mgc_dist.files import replace_text
from mgc_dist.packing.cut import PackPlan
from mgc_dist.packing.splits import rule_of

NAME = "README.md"
"""Hugging Face datasets looks for splits and columns in a page of this name, and in no other."""
BESIDE = "README-DATASET.md"
"""Where the card is if the user has a page of that name; older data sets have it here."""
_MADE_BY = "`python -m mgc_dist.shard`"


def write(folder: Path, manifest: Manifest) -> None:
    """Write the card, if it is not there as it should be; a page of the user's own stays."""
    path, beside, text = folder / NAME, folder / BESIDE, _text(manifest)
    if path.is_file() and _MADE_BY not in path.read_text(encoding="utf-8", errors="replace"):
        path = beside
    elif beside.is_file():
        beside.unlink()
    if not path.is_file() or path.read_bytes() != text.encode("utf-8"):
        replace_text(path, text)


def show(folder: Path, manifest: Manifest) -> None:
    """Print splits, genres, settings and what is not controlled, as tables on the terminal."""
    console = Console(highlight=False, markup=False)
    splits = Table(title=f"{folder}: data set {manifest.dataset_id[:12]}")
    for column in ("split", *SPLIT_COLUMNS):
        splits.add_column(column, justify="left" if column == "split" else "right")
    for name, *values in split_rows(manifest):
        splits.add_row(name, *values)
    console.print(splits)
    console.print(_genre_table(_genre_columns(manifest.splits), _genres_of(manifest)))
    settings = ", ".join(f"{key} {value}" for key, value in manifest.settings.items())
    lines = [f"settings: {settings}", f"versions: {_versions(manifest)}"]
    lines += [f"left out: {line}" for line in left_out(manifest)]
    lines += [f"not controlled: {line}" for line in limits(manifest)]
    console.print("\n".join(lines), soft_wrap=True)


def _genre_table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> Table:
    table = Table(title="tracks by genre, and the share of segments in the longest tenth of them")
    for column in columns:
        table.add_column(column, justify="left" if column == "genre" else "right")
    for row in rows:
        table.add_row(*row)
    return table


def show_plan(plan: PackPlan, rule: str, listed: Sequence[Track]) -> None:
    """Print what will be packed, what is left out, and what the split cannot see to.

    Args:
        plan: of the packing.
        rule: of the split.
        listed: tracks that were looked at, the unusable ones too.
    """
    splits = Table(title=f"{len(plan.tracks)} tracks, {len(plan.genres)} genres, split {rule}")
    for column in ("split", "tracks", "artists", "segments"):
        splits.add_column(column, justify="left" if column == "split" else "right")
    tracks = Counter(track.split for track in plan.tracks)
    for split, rows in plan.split_rows.items():
        groups = {track.group for track in plan.tracks if track.split == split and track.group}
        splits.add_row(split, str(tracks[split]), str(len(groups) or "unknown"), str(rows))
    console = Console(highlight=False, soft_wrap=True, markup=False)
    console.print(splits)
    cut = plan.cut
    by_genre = _genre_rows(
        plan.genres,
        plan.split_rows,
        plan.tracks,
        plan.segments,
        hop_s=cut.hop_samples / cut.sample_rate,
        segment_s=cut.segment_samples / cut.sample_rate,
    )
    console.print(_genre_table(_genre_columns(plan.split_rows), by_genre))
    size = sum(record.shard_bytes(rows, plan.cut.segment_samples) for _, rows in plan.shards())
    console.print(f"{len(plan.shards())} shards, {size / 1e6:.1f} MB")
    paths = {track.id: str(track.path) for track in listed}
    reasons = Counter(plan.excluded.values())
    for reason, count in sorted(reasons.items()):
        names = [paths.get(id_, id_) for id_, why in plan.excluded.items() if why == reason]
        named = ", ".join(names) if count <= 5 else f"{count} tracks such as {names[0]}"
        console.print(f"left out: {named}: {reason}")
    unknown = sum(track.group is None for track in plan.tracks)
    console.print(f"leak check: {kept_apart(len(plan.tracks) - unknown)}")
    if note := not_controlled(rule, unknown, len(plan.tracks)):
        console.print(f"not controlled: {note}")


def not_controlled(rule: str, unknown: int, tracks: int) -> str:
    """What a split rule cannot see to, given how many tracks have no known artist; or ""."""
    if not unknown or (rule_of({"split": rule}).by_artist and unknown == tracks):
        return ""
    return (
        f"{unknown} tracks have no known artist (--groups FILE names them); "
        "tracks of one artist may be in two splits, which raises test accuracy"
    )


def kept_apart(known: int) -> str:
    """What the leak check has seen to, given how many tracks have a known artist."""
    if not known:
        return "no track is in two splits; artists are unknown, so theirs may be"
    return f"no track is in two splits, nor an artist of the {known} tracks whose artist is known"


def twins_shown(manifest: Manifest) -> list[tuple[str, str]]:
    """Pairs of tracks with one source file in two splits, the first few."""
    return twins(manifest.tracks)[:10]


SPLIT_COLUMNS = ("tracks", "artists", "segments", "hours", "shards", "MB")


def split_rows(manifest: Manifest) -> list[tuple[str, ...]]:
    """The splits of a data set, each a name and the values of SPLIT_COLUMNS."""
    rows: list[tuple[str, ...]] = []
    ends = np.cumsum([shard.rows for shard in manifest.shards]).tolist()
    places = list(zip(ends, manifest.shards, strict=True))
    for split, (first, stop) in manifest.splits.items():
        tracks = [track for track in manifest.tracks if track.split == split]
        shards = [shard for end, shard in places if first < end <= stop]
        groups = {track.group for track in tracks if track.group}
        rows.append(
            (
                split,
                str(len(tracks)),
                str(len(groups) or "unknown"),
                str(sum(track.segments for track in tracks)),
                f"{sum(_covered_s(manifest, track.segments) for track in tracks) / 3600:.2f}",
                str(len(shards)),
                f"{sum(shard.bytes for shard in shards) / 1e6:.1f}",
            )
        )
    return rows


def _covered_s(manifest: Manifest, segments: int) -> float:
    """Seconds of a track that its overlapping segments cover."""
    step = min(int(manifest.settings["hop_samples"]), manifest.segment_samples)
    return ((segments - 1) * step + manifest.segment_samples) / manifest.sample_rate


def _genre_columns(splits: Iterable[str]) -> tuple[str, ...]:
    return ("label", "genre", *splits, "segments", "hours", "longest tenth")


def _genre_rows(
    genres: Sequence[str],
    splits: Iterable[str],
    tracks: Sequence[Track] | Sequence[TrackEntry],
    segments: NDArray[np.int64],
    *,
    hop_s: float,
    segment_s: float,
) -> list[tuple[str, ...]]:
    """Tracks of each genre by split, its segments and hours, and what its longest tenth holds."""
    rows = []
    names = list(splits)
    for label, genre in enumerate(genres):
        of_split = Counter(track.split for track in tracks if track.genre == genre)
        own = np.sort(segments[[track.genre == genre for track in tracks]])[::-1]
        hours = ((own - 1) * min(hop_s, segment_s) + segment_s).sum() / 3600
        longest = own[: max(1, round(len(own) / 10))].sum() / own.sum()
        counts = (str(of_split[split]) for split in names)
        rows.append((str(label), genre, *counts, str(own.sum()), f"{hours:.2f}", f"{longest:.0%}"))
    return rows


def _genres_of(manifest: Manifest) -> list[tuple[str, ...]]:
    return _genre_rows(
        manifest.genres,
        manifest.splits,
        manifest.tracks,
        np.array([track.segments for track in manifest.tracks]),
        hop_s=int(manifest.settings["hop_samples"]) / manifest.sample_rate,
        segment_s=manifest.segment_samples / manifest.sample_rate,
    )


def _versions(manifest: Manifest) -> str:
    return ", ".join(f"{name} {version}" for name, version in manifest.versions.items())


def left_out(manifest: Manifest) -> list[str]:
    """What was not packed, a line a reason."""
    reasons = Counter(manifest.excluded.values())
    lines = []
    for reason, count in sorted(reasons.items()):
        ids = [id_ for id_, why in manifest.excluded.items() if why == reason]
        lines.append(f"{', '.join(ids) if count <= 5 else f'{count} tracks'}: {reason}")
    return lines


def limits(manifest: Manifest) -> list[str]:
    """What is not controlled between the splits, a line each."""
    unknown = sum(track.group is None for track in manifest.tracks)
    note = not_controlled(str(manifest.settings["split"]), unknown, len(manifest.tracks))
    pairs = [f"{one} and {other} are the same file" for one, other in twins_shown(manifest)]
    return ([note] if note else []) + pairs + betrayed(manifest)


def betrayed(manifest: Manifest) -> list[str]:
    """What tells the genre without music, a line each."""
    chance = 1 / len(manifest.genres)
    return [
        f"{name} of the source files alone tells the genre of {share:.0%} of the tracks (chance "
        f"{chance:.0%}): models may learn it; evaluate --subgroup-column {name} looks at it"
        for name, share in manifest.telling.items()
    ]


_READING = """\
## Reading it

A sample is `KEY.json` (row, track, group, genre, label, segment, start_s, sample_rate, split)
and `KEY.wav`. With webdataset:

```python
import webdataset

shards = webdataset.WebDataset("{shard}", shardshuffle=False)
```

With Hugging Face datasets: the head of this page names splits and columns, so that audio stays
bytes and needs no decoder, and an unknown group is no surprise.

```python
from datasets import load_dataset

{split} = load_dataset("FOLDER", split="{split}")
```

`tracks.parquet` has a row a track: codec, container, sample_rate, channels, kbit_rate, seconds,
peak, clipped, mixing_loss_db and loudness_lufs of its source file, and all that follows.
`manifest.json` lists tracks with the xxh3_128 of their sources, and shards with their sha256;
`python -m mgc_dist.shard verify FOLDER` checks every byte.
"""


def _text(manifest: Manifest) -> str:
    s, tracks = manifest.settings, len(manifest.tracks)
    seconds = manifest.segment_samples / manifest.sample_rate
    hop = int(s["hop_samples"]) / manifest.sample_rate
    splits = [split for split, (first, stop) in manifest.splits.items() if first < stop]
    globs = "\n".join(f"      - split: {split}\n        path: {split}-*.tar" for split in splits)
    settings = ", ".join(f"{key} {value}" for key, value in sorted(s.items()))
    apart = kept_apart(sum(track.group is not None for track in manifest.tracks))
    uncontrolled = [f"- {line}" for line in limits(manifest)] or ["- nothing known"]
    excluded = [f"- {line}" for line in left_out(manifest)] or ["- nothing"]
    return f"""---
task_categories:
  - audio-classification
tags:
  - webdataset
  - music
configs:
  - config_name: default
    data_files:
{globs}
dataset_info:
  features:
{_features()}
---

# Segments of music with genres

{manifest.rows} segments of {seconds:g} s, one every {hop:g} s, of {tracks} tracks; mono,
16 bits, {manifest.sample_rate} Hz, in webdataset tars. Data set `{manifest.dataset_id}`.

{_markdown(("split", *SPLIT_COLUMNS), split_rows(manifest))}

Hours are hours of music; segments overlap. {apart[0].upper()}{apart[1:]}.

{_markdown(_genre_columns(manifest.splits), _genres_of(manifest))}

The last column is the share of a genre's segments that the longest tenth of its tracks holds.

## What is not controlled

{chr(10).join(uncontrolled)}

## Left out

{chr(10).join(excluded)}

{_READING.format(shard=manifest.shards[0].name, split=splits[0])}
## How it was made

{_MADE_BY} with {settings};
{_versions(manifest)}. The rights in the music are those of its source.
"""


def _features() -> str:
    """Columns in the words of Hugging Face datasets."""
    described = {"row": "int64", "track": "string", "group": "string", "genre": "string"}
    described |= {"label": "int64", "segment": "int64", "start_s": "float64"}
    described |= {"sample_rate": "int64", "split": "string"}
    lines = ["- name: json", "  struct:"]
    lines += [f"  - name: {name}\n      dtype: {kind}" for name, kind in described.items()]
    for name, kind in (("wav", "binary"), ("__key__", "string"), ("__url__", "string")):
        lines.append(f"- name: {name}\n    dtype: {kind}")
    return "\n".join(f"  {line}" for line in lines)


def _markdown(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [columns, tuple("---" for _ in columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
