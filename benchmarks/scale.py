"""What a large data set costs before anything is learned: seconds and memory, part by part.

A data set of N tracks is made as packing would write it: index, tracks and manifest are real, the
shards are sparse files of the right size, so that a million tracks need no audio and no 1.8 TB.
Each part then runs in a process of its own. Memory is what the process alone holds (RssAnon) at
its highest, less what its imports hold; pages of mapped files, which ranks share, do not count.
"""

import argparse
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from measure import machine, versions, write
from numpy.typing import NDArray

from mgc_dist.bias_model import summary as bias_summary
from mgc_dist.bias_model import table as tables
from mgc_dist.data import manifest, opening, record
from mgc_dist.data.manifest import Manifest, ShardEntry
from mgc_dist.data.order import Plan, lay_out, training_batches
from mgc_dist.data.reader import Reader, ShardSet
from mgc_dist.data.tracks import Track
from mgc_dist.files import sha256
from mgc_dist.packing import pack, provenance
from mgc_dist.packing.cut import Cut, PackPlan, make_plan
from mgc_dist.packing.parts import DecodedTrack, Waves
from mgc_dist.report import evaluation
from mgc_dist.scoring.score import judge

GENRES = 10
TRACKS_OF_AN_ARTIST = 5
FOLDS = 5
SAMPLES = 48_000
"""3 s at 16 kHz, every 1.5 s: 19 segments of a track of 30 s."""
STEPS = 1000
"""Steps of the order that are planned, 32 rows each."""
EVERY_S = 0.005
"""How often the memory of a part is looked at."""


@dataclass(frozen=True, kw_only=True)
class Made:
    """What a part gets: the folder, and how large the data set is."""

    folder: Path
    tracks: int
    segments: int
    rows_per_shard: int

    def plan(self) -> PackPlan:
        """The plan of packing these tracks; splits go by artist, 8 : 1 : 1."""
        artists = np.arange(self.tracks) // TRACKS_OF_AN_ARTIST
        split = np.array(["train"] * 8 + ["validation", "test"])[artists // GENRES % 10]
        found = [
            Track(
                id=f"genre{artist % GENRES}_{number:08d}",
                genre=f"genre{artist % GENRES}",
                path=Path(f"genre{artist % GENRES}/{number:08d}.mp3"),
                group=f"artist {artist}",
                split=name,
            )
            for number, (artist, name) in enumerate(
                zip(artists.tolist(), split.tolist(), strict=True)
            )
        ]
        cut = Cut(
            segment_samples=SAMPLES,
            hop_samples=SAMPLES // 2,
            sample_rate=SAMPLES // 3,
            rows_per_shard=self.rows_per_shard,
        )
        return make_plan(found, {track.id: self.segments for track in found}, {}, cut)


def make(made: Made) -> dict[str, Any]:
    """Write the data set and a bias table; the records are zeros, and so are their checksums'."""
    folder, plan = made.folder, made.plan()
    rows, size = int(plan.segments.sum()), record.record_bytes(SAMPLES)
    index = np.zeros(rows, record.INDEX_DTYPE)
    counts = [count for _, count in plan.shards()]
    index["shard"] = np.repeat(np.arange(len(counts)), counts)
    index["offset"] = np.concatenate([np.arange(count) for count in counts]) * size
    index["wave_offset"] = index["offset"] + record.WAVE_OFFSET
    index["wave_bytes"], index["record_bytes"] = 2 * SAMPLES, size
    index["checksum"] = record.checksum(bytes(size))
    label_of = {genre: label for label, genre in enumerate(plan.genres)}
    order = plan.rows()
    index["track"][order] = np.repeat(np.arange(made.tracks), made.segments)
    index["segment"][order] = np.tile(np.arange(made.segments), made.tracks)
    index["label"] = np.array([label_of[t.genre] for t in plan.tracks])[index["track"]]
    np.save(folder / manifest.INDEX, index)
    for name, count in plan.shards():
        (folder / name).touch()
        os.truncate(folder / name, record.shard_bytes(count, SAMPLES))
    tracks = pack.track_entries(plan, [""] * made.tracks)
    ends = np.cumsum(list(plan.split_rows.values())).tolist()
    manifest.write(
        folder,
        Manifest(
            dataset_id="0" * 64,
            settings={"split": "stratified", "seed": 0}
            | {f"{n}": v for n, v in vars(plan.cut).items() if n != "max_segments"},
            genres=plan.genres,
            splits=dict(zip(plan.split_rows, zip([0, *ends], ends, strict=False), strict=True)),
            tracks=tracks,
            excluded={},
            shards=tuple(
                ShardEntry(name=n, rows=c, bytes=record.shard_bytes(c, SAMPLES), sha256="")
                for n, c in plan.shards()
            ),
            index_sha256=sha256(folder / manifest.INDEX),
            tracks_sha256=provenance.write(folder / manifest.TRACKS, tracks, [{}] * made.tracks),
            telling={},
            versions={},
        ),
    )
    _bias(folder, plan, rows)
    ShardSet(folder).close()  # what is measured is every start but the first, which checks all
    return {"rows": rows, "shards": len(counts), "index_mib": round(index.nbytes / 2**20, 1)}


def _bias(folder: Path, plan: PackPlan, rows: int) -> None:
    groups = sorted({str(track.group) for track in plan.tracks if track.split == "train"})
    logits = np.random.default_rng(0).standard_normal((rows, GENRES), np.float32)
    header = tables.Header(
        dataset_id="0" * 64,
        genres=plan.genres,
        backbone="logmel",
        bias_hash="",
        head_hash="",
        layers=(0,),
        folds=FOLDS,
        head_c=1.0,
        seed=0,
        fold_of={f"group {name}": n % FOLDS for n, name in enumerate(groups)},
        temperature=1.0,
        table_sha256="",
    )
    tables.write(folder / "bias", header, logits)


# --- parts: each prepares, and returns what is measured


def opened(made: Made) -> Callable[[], object]:
    """What a rank does first, where the data set has been opened before."""
    return lambda: ShardSet(made.folder)


def order(made: Made) -> Callable[[], object]:
    """The first steps of an epoch."""
    shards = ShardSet(made.folder)
    return lambda: list(islice(_micro_batches(shards), STEPS))


def first_batch(made: Made) -> Callable[[], object]:
    """From the order to 32 rows in memory, each checked."""
    shards = ShardSet(made.folder)

    def work() -> object:
        with Reader(
            shards, "train", islice(_micro_batches(shards), 4), read_ahead=2, pin=False
        ) as reader:
            return next(iter(reader))

    return work


def _micro_batches(shards: ShardSet) -> Iterator[Any]:
    first, stop = shards.rows_of("train")
    plan = Plan(rows=stop - first, total=10 * (stop - first), global_batch=32, seed=0)
    return training_batches(plan, lay_out(global_batch=32, world=1, largest_micro_batch=32), 0, 0)


def bias_table(made: Made) -> Callable[[], object]:
    """Opening the bias table as training does."""
    shards = ShardSet(made.folder)
    return lambda: tables.read(made.folder / "bias", shards.manifest, shards.keys)


def bias_report(made: Made) -> Callable[[], object]:
    """The report of the bias table."""
    shards = ShardSet(made.folder)
    found = tables.read(made.folder / "bias", shards.manifest, shards.keys)
    return lambda: bias_summary.make(found, shards.manifest, shards.labels, shards.tracks)


def figures(made: Made) -> Callable[[], object]:
    """Every figure of the test split, from the logits of its rows."""
    shards = ShardSet(made.folder)
    first, stop = shards.rows_of("test")
    label, track = shards.labels[first:stop], shards.tracks[first:stop]
    logits = np.random.default_rng(0).normal(size=(len(label), GENRES)).astype(np.float32)
    tracks = [shards.manifest.tracks[place] for place in np.unique(track)]
    subject = evaluation.Subject(
        name="test",
        run="run",
        dataset_id=shards.manifest.dataset_id,
        genres=shards.manifest.genres,
        track_ids=tuple(each.id for each in tracks),
        groups=tuple(each.group for each in tracks),
    )
    return lambda: evaluation.summary(subject, judge(logits, label, track, "test"))


def packing_plan(made: Made) -> Callable[[], object]:
    """From tracks with splits to rows, and to what each worker is sent: bytes of the largest."""
    ids = [track.id for track in made.plan().tracks]
    waves = Waves(folder=made.folder, tracks={id_: DecodedTrack(id=id_) for id_ in ids})

    def work() -> object:
        plan = made.plan()
        work = pack.tasks(plan, plan.rows(), waves, {})
        return max(len(pickle.dumps(task)) for task in islice(work, 0, None, 100))

    return work


def identity(made: Made) -> Callable[[], object]:
    """The data set's id, from index and tracks."""
    plan = made.plan()
    tracks = pack.track_entries(plan, [""] * made.tracks)
    index: NDArray[np.void] = np.load(made.folder / manifest.INDEX, mmap_mode="r")
    rows = pack.identities(index, tracks, ("0" * 32 for _ in range(len(index))))
    return lambda: manifest.dataset_id(dict(vars(plan.cut)), plan.genres, rows)


def checking(made: Made) -> Callable[[], object]:
    """The first opening of all, which checks everything."""
    note = opening.FOLDER

    def work() -> object:
        shutil.rmtree(made.folder / note, ignore_errors=True)
        return ShardSet(made.folder)

    return work


PARTS: dict[str, Callable[[Made], Callable[[], object]]] = {
    "open": opened,
    "plan": order,
    "first_batch": first_batch,
    "bias": bias_table,
    "report": bias_report,
    "evaluate": figures,
    "pack_plan": packing_plan,
    "identity": identity,
    "first_open": checking,
}


def measured(name: str, made: Made) -> dict[str, float]:
    """A part in a process of its own: `NAME_s`, `NAME_cpu_s` and `NAME_mib`."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(
        _again(name, made),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as child:
        assert child.stdin
        assert child.stdout
        child.stdout.readline()  # it is ready
        status = Path(f"/proc/{child.pid}/status")
        before = highest = _own_mib(status)
        child.stdin.write("go\n")
        child.stdin.flush()
        while (now := _own_mib(status)) and child.poll() is None:
            highest = max(highest, now)
            time.sleep(EVERY_S)
        said = child.stdout.read()
    if child.returncode:
        sys.exit(f"{name} failed with exit code {child.returncode}")
    wall_s, cpu_s = json.loads(said)
    return {
        f"{name}_s": wall_s,
        f"{name}_cpu_s": cpu_s,
        f"{name}_mib": round(highest - before, 1),
    }


def _again(name: str, made: Made) -> list[str]:
    words = ["--only", name, "--folder", made.folder, "--tracks", made.tracks]
    words += ["--segments", made.segments, "--rows-per-shard", made.rows_per_shard]
    return [sys.executable, __file__, *map(str, words)]


def _made(words: argparse.Namespace, folder: Path, tracks: int) -> Made:
    return Made(
        folder=folder,
        tracks=tracks,
        segments=words.segments,
        rows_per_shard=words.rows_per_shard,
    )


def _own_mib(status: Path) -> float:
    """Memory that no other process shares; 0 once the process has ended."""
    lines = status.read_text().splitlines()
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon")), 0.0)


def part(name: str, made: Made) -> None:
    """Prepare, wait to be watched, work."""
    work = PARTS[name](made)
    print("ready", flush=True)
    sys.stdin.readline()
    began, used = time.perf_counter(), time.process_time()
    kept = work()
    ended, used = time.perf_counter(), time.process_time() - used
    print(json.dumps([round(ended - began, 4), round(used, 4)]), flush=True)
    time.sleep(4 * EVERY_S)  # what is kept is looked at once more
    del kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tracks", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--segments", type=int, default=19, help="of each track")
    parser.add_argument("--rows-per-shard", type=int, default=0, help="0: what `shard` would take")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--folder", type=Path, help="make the data here")
    parser.add_argument("--json", type=Path, help="write the result here as well")
    parser.add_argument("--only", choices=["make", *PARTS], help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.only == "make":
        print(json.dumps(make(_made(words, words.folder, words.tracks[0]))))
        return
    if words.only:
        part(words.only, _made(words, words.folder, words.tracks[0]))
        return
    found = {}
    for tracks in words.tracks:
        with tempfile.TemporaryDirectory(dir=words.folder) as temporary:
            made = _made(words, Path(temporary), tracks)
            said = subprocess.run(_again("make", made), stdout=subprocess.PIPE, check=True).stdout
            facts = json.loads(said)
            for name in words.parts:
                facts |= measured(name, made)
                wall_s, cpu_s, mib = (facts[f"{name}_{unit}"] for unit in ("s", "cpu_s", "mib"))
                shown = f"{wall_s:.3f} s, CPU {cpu_s:.3f} s, {mib:.0f} MiB"
                print(f"{tracks} tracks: {name}: {shown}", file=sys.stderr, flush=True)
        found[str(tracks)] = facts
    content = {
        "benchmark": "scale",
        "date": str(date.today()),
        "segments": words.segments,
        "machine": machine(),
        "versions": versions(("mgc_dist", "numpy", "pyarrow")),
        "tracks": found,
    }
    print(json.dumps(content))
    if words.json:
        write(words.json, content)


if __name__ == "__main__":
    main()
