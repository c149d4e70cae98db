"""manifest.json: what a data set is, read and checked before a byte of a shard is trusted.

It is written last: without a manifest there is no data set.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar, overload

from mgc_dist.data.tracks import Track, names_of_splits, refuse_leaks
from mgc_dist.errors import UserError
from mgc_dist.files import replace_text

FORMAT = "mgc_dist shards"
FORMAT_VERSION = 2
NAME = "manifest.json"
INDEX = "index.npy"
TRACKS = "tracks.parquet"
"""A row a track: what the manifest says of it, and how its source was recorded and encoded."""
_ROWS_AT_ONCE = 4096
"""Rows whose text is made and hashed in one go."""
_SEAL = "manifest_sha256"
E = TypeVar("E", "TrackEntry", "ShardEntry")
_SETTINGS = ("segment_samples", "hop_samples", "sample_rate", "rows_per_shard")
_SHARD = re.compile(r"[A-Za-z0-9_-]{1,100}\.tar")


@dataclass(frozen=True, kw_only=True)
class TrackEntry:
    """A packed track.

    Attributes:
        id: its name.
        genre: name of its genre.
        group: its artist, None if unknown.
        split: train, validation or test; or fold0, fold1, ...
        segments: S, those that are packed.
        windows: whole segments that the track holds; more than S under `--max-segments`.
        source: folder and name of its file.
        source_xxh3: xxh3_128 of its file.
    """

    id: str
    genre: str
    group: str | None
    split: str
    segments: int
    windows: int
    source: str
    source_xxh3: str


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """A tar file: its name, rows, bytes and hash."""

    name: str
    rows: int
    bytes: int
    sha256: str


class Tracks(Sequence[TrackEntry]):
    """Tracks that are read when they are first asked for: training needs none of a million names.

    Args:
        load: gives all of them, in order; it is called once.
    """

    def __init__(self, load: Callable[[], Iterable[TrackEntry]]) -> None:
        self._load = load

    @cached_property
    def _all(self) -> tuple[TrackEntry, ...]:
        return tuple(self._load())

    @overload
    def __getitem__(self, place: int) -> TrackEntry: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[TrackEntry, ...]: ...
    def __getitem__(self, place: int | slice) -> TrackEntry | tuple[TrackEntry, ...]:
        return self._all[place]

    def __iter__(self) -> Iterator[TrackEntry]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self._all == tuple(other)

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything about a data set but its audio.

    Attributes:
        dataset_id: hash of what is learned from (see `dataset_id`), free of paths and versions.
        settings: of the packing: segment_samples, hop_samples, sample_rate, split, seed, ...
        genres: names in label order.
        splits: name -> [first row, last row + 1].
        tracks: packed tracks; the index refers to them by position. `Tracks`, which are read
            when they are first asked for, where `opening` has found the data set checked.
        excluded: id -> reason of the tracks that were left out.
        shards: the tar files in row order.
        index_sha256: hash of index.npy.
        tracks_sha256: hash of tracks.parquet; "" for data sets from before there was one.
        telling: properties of the sources that tell the genre by themselves, and the share of
            tracks for which they do.
        versions: of the tool and its libraries, for the record only.
    """

    dataset_id: str
    settings: dict[str, int | float | str]
    genres: tuple[str, ...]
    splits: dict[str, tuple[int, int]]
    tracks: Sequence[TrackEntry]
    excluded: dict[str, str]
    shards: tuple[ShardEntry, ...]
    index_sha256: str
    tracks_sha256: str
    telling: dict[str, float]
    versions: dict[str, str]

    @property
    def rows(self) -> int:
        """N."""
        return sum(shard.rows for shard in self.shards)

    @property
    def segment_samples(self) -> int:
        """T."""
        return int(self.settings["segment_samples"])

    @property
    def files(self) -> dict[str, str]:
        """Name -> sha256 of each file but the manifest."""
        whole = {INDEX: self.index_sha256} | {shard.name: shard.sha256 for shard in self.shards}
        return whole | ({TRACKS: self.tracks_sha256} if self.tracks_sha256 else {})

    def start_s(self, track: TrackEntry, segment: int) -> float:
        """Seconds from the start of a track to that of a segment of it."""
        window = window_of(segment, track.segments, track.windows)
        return window * int(self.settings["hop_samples"]) / self.sample_rate

    def labelled_tracks(self) -> list[Track]:
        """The packed tracks with their splits, in the order that the index refers to."""
        return [
            Track(id=t.id, genre=t.genre, path=Path(t.source), group=t.group, split=t.split)
            for t in self.tracks
        ]

    @property
    def sample_rate(self) -> int:
        """In Hz."""
        return int(self.settings["sample_rate"])


def window_of(segment: int, segments: int, windows: int) -> int:
    """Which window of a track a segment is, where segments are fewer: spread over the track."""
    return segment * (windows - 1) // (segments - 1) if segments > 1 else (windows - 1) // 2


def dataset_id(
    settings: dict[str, int | float | str],
    genres: Iterable[str],
    rows: Iterable[tuple[str, str, str | None, int, str]],
) -> str:
    """Hash of what a data set teaches: no paths, times, versions or shard sizes.

    Args:
        settings: of the packing.
        genres: in label order.
        rows: (key, split, group, label, xxh3_128 of the audio) in row order.
    """
    text = _canonical(
        {
            "format_version": FORMAT_VERSION,
            "segment_samples": settings["segment_samples"],
            "hop_samples": settings["hop_samples"],
            "sample_rate": settings["sample_rate"],
            "genres": list(genres),
            "rows": [],
        }
    )
    before, after = text.split('"rows":[')  # in a name a quote is \"
    digest = hashlib.sha256(f'{before}"rows":['.encode())
    every, comma = iter(rows), ""
    while block := list(islice(every, _ROWS_AT_ONCE)):
        digest.update(f"{comma}{_canonical(block)[1:-1]}".encode())
        comma = ","
    digest.update(after.encode())
    return digest.hexdigest()


def _canonical(content: object) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


def twins(tracks: Iterable[TrackEntry]) -> list[tuple[str, str]]:
    """Pairs of tracks in different splits whose source files are the same, byte by byte."""
    first: dict[str, TrackEntry] = {}
    pairs = []
    for track in tracks:
        other = first.setdefault(track.source_xxh3, track)
        if other.split != track.split:
            pairs.append((other.id, track.id))
    return pairs


def write(folder: Path, manifest: Manifest) -> None:
    """Write the manifest under a temporary name, flush it, and rename it."""
    about = asdict(replace(manifest, tracks=tuple(manifest.tracks)))
    content = {"format": FORMAT, "format_version": FORMAT_VERSION} | about
    replace_text(folder / NAME, sealed(content))


def sealed(content: dict[str, Any]) -> str:
    """The text of a manifest, with a digest of its own content as the last key."""
    content = {key: value for key, value in content.items() if key != _SEAL}
    return json.dumps(content | {_SEAL: _seal_of(content)}, indent=1, ensure_ascii=False)


def _seal_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(_canonical(content).encode()).hexdigest()


def read(folder: Path) -> Manifest:
    """Read and check a manifest: form, version, counts, and that nothing leaks between splits.

    Raises:
        UserError: no manifest, or one that is damaged, of another version, or leaks.
    """
    path = folder / NAME
    if not path.is_file():
        raise UserError(
            f"data set {folder}",
            got=f"no {NAME}" if folder.is_dir() else "no such folder",
            expected="a folder of packed shards",
            cure=f"python -m mgc_dist.shard --data data/genres_original --out {folder}  makes it",
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        seal = content.pop(_SEAL, None)
        whole = seal == _seal_of(content)
        version = (content.pop("format"), content.pop("format_version"))
        if version == (FORMAT, FORMAT_VERSION) and not whole:
            raise ValueError(f"content that is not of its own {_SEAL} {seal}")
        manifest = from_json(content) if version == (FORMAT, FORMAT_VERSION) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    if manifest is None:
        raise UserError(
            f"manifest {path}",
            got=f"{version[0]!r} version {version[1]}",
            expected=f"{FORMAT!r} version {FORMAT_VERSION}",
            cure="pack it again with this version of mgc_dist, and --overwrite",
        )
    _check(path, manifest)
    return manifest


def tracks_of(content: dict[str, Any]) -> Iterator[TrackEntry]:
    """The tracks of a manifest that has been read and checked before."""
    for found in content["tracks"]:
        yield TrackEntry(**({"windows": found["segments"]} | found))


def from_json(content: dict[str, Any]) -> Manifest:
    """Every value has the type that packing gives it; foreign ones must not get further."""
    content = {"tracks_sha256": "", "telling": {}} | content  # absent in older ones
    if set(content) != {field.name for field in fields(Manifest)}:
        raise ValueError(f"keys {sorted(content)}")
    for name in ("dataset_id", "index_sha256", "tracks_sha256"):
        _require(isinstance(content[name], str), name, content[name])
    splits = {name: tuple(bounds) for name, bounds in content["splits"].items()}
    for name, bounds in splits.items():
        whole = len(bounds) == 2 and all(type(row) is int for row in bounds)
        _require(whole, f"split {name}", bounds)
    for name in _SETTINGS:
        value = content["settings"].get(name)
        _require(type(value) is int and value > 0, f"setting {name}", value)
    for key, value in content["telling"].items():
        _require(isinstance(value, float), f"telling {key}", value)
    for name in ("excluded", "versions"):
        for key, value in content[name].items():
            _require(isinstance(value, str), f"{name} {key}", value)
    return Manifest(
        **content
        | {
            "splits": splits,
            "genres": tuple(_strings(content["genres"])),
            "tracks": tuple(_entry(TrackEntry, found) for found in content["tracks"]),
            "shards": tuple(_entry(ShardEntry, found) for found in content["shards"]),
        }
    )


def _entry(kind: type[E], comparison: dict[str, Any]) -> E:
    """A track or a shard, each field of its declared type, numbers positive."""
    if kind is TrackEntry:
        comparison = {"windows": comparison["segments"]} | comparison  # absent in older ones
    for field in fields(kind):
        value = comparison[field.name]
        if field.type in (int, "int"):
            _require(type(value) is int and value > 0, field.name, value)
        elif not (value is None and field.name == "group"):
            _require(isinstance(value, str), field.name, value)
    return kind(**comparison)


def _require(ok: bool, name: str, value: object) -> None:
    if not ok:
        raise ValueError(f"{name} {value!r}")


def _strings(value: object) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{value!r} is no list of names")
    return value


def _check(path: Path, manifest: Manifest) -> None:
    names = names_of_splits(manifest.splits)
    if tuple(manifest.splits) != names:
        raise _damaged(path, f"splits {', '.join(manifest.splits)}")
    bounds = [manifest.splits.get(split) for split in names]
    ends = [0, *(pair[1] if pair else -1 for pair in bounds)]
    starts = [pair[0] if pair else -1 for pair in bounds]
    if starts != ends[:-1] or ends[-1] != manifest.rows or ends != sorted(ends):
        raise _damaged(path, f"splits {manifest.splits} of {manifest.rows} rows")
    if sorted(manifest.genres) != sorted({track.genre for track in manifest.tracks}):
        raise _damaged(path, "genres that are not those of its tracks")
    if sum(track.segments for track in manifest.tracks) != manifest.rows:
        raise _damaged(path, "segments of the tracks that do not add up to the rows")
    for shard in manifest.shards:
        if not _SHARD.fullmatch(shard.name):  # a name may reach a shell, and must stay here
            raise _damaged(path, f"shard name {shard.name!r}")
    refuse_leaks(manifest.tracks)


def _damaged(path: Path, got: str) -> UserError:
    return UserError(
        f"manifest {path}",
        got=got,
        expected="a whole manifest as `shard` wrote it",
        cure="copy the data set again, or pack it again with --overwrite",
    )
