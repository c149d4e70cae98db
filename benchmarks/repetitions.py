"""The same recording twice: how many copies are found, what is found wrongly, what it costs.

    python benchmarks/repetitions.py --json benchmarks/results/repetitions.json
    python benchmarks/repetitions.py --real FOLDER   # music of your own among the synthetic tracks

It needs ffmpeg. Sixty tracks are copied in six ways: the same bytes, FLAC, MP3 at 64 kbit/s,
3 dB lower and 0.2 s later, an excerpt of 10 s, 2 % faster. All are compared as packing does.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
from measure import between_marks, machine, versions, write

from mgc_dist import shard
from mgc_dist.config import ShardConfig
from mgc_dist.data import audio
from mgc_dist.data.tracks import SUFFIXES
from mgc_dist.packing import fingerprints, music
from mgc_dist.workers import spread

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
RATE, SECONDS, PLANTED = 16_000, 30, 60
# how ffmpeg makes each copy, of IN
COPIES = {
    "same bytes": "-c copy OUT.wav",
    "FLAC": "OUT.flac",
    "MP3, 64 kbit/s": "-b:a 64k OUT.mp3",
    "3 dB lower, 0.2 s later": "-af adelay=200:all=1,volume=-3dB OUT.wav",
    "excerpt of 10 s": "-ss 7.3 -t 10 OUT.wav",
    "2 % faster": "-af asetrate=RATE*1.02,aresample=RATE OUT.wav",
}


def compose(item: tuple[str, int], folder: Path) -> Path:
    """Write a synthetic track."""
    genre, number = item
    path = folder / genre / f"{number}.wav"
    path.parent.mkdir(exist_ok=True)
    wave = music.compose(genre, number, seed=0, duration_s=SECONDS, per_artist=4)
    soundfile.write(path, 0.7 * wave, music.SAMPLE_RATE)
    return path


def copies(paths: Sequence[Path], folder: Path) -> Iterator[tuple[str, Path, Path]]:
    """Make each kind of copy of each file: kind, original, copy."""
    for number, path in enumerate(paths):
        wav, rate = folder / f"{number}.wav", audio.look(path).sample_rate
        words = ["ffmpeg", "-v", "error", "-y", "-i", str(path), "-map", "0:a:0", "-t", "30"]
        subprocess.run([*words, "-c:a", "pcm_s16le", str(wav)], check=True)
        for nth, (kind, line) in enumerate(COPIES.items()):
            out = folder / f"{number}-{nth}"
            args = [
                word.replace("RATE", str(rate)).replace("OUT", str(out)) for word in line.split()
            ]
            subprocess.run(["ffmpeg", "-v", "error", "-y", "-i", str(wav), *args], check=True)
            yield kind, path, next(folder.glob(f"{number}-{nth}.*"))


def heard(path: Path) -> tuple[np.ndarray, np.ndarray, float, float]:
    """At most a minute of a file, its landmarks, and CPU seconds of decoding and of landmarks."""
    began = time.process_time()
    wave = audio.read_int16(path, RATE)[: 60 * RATE]
    decoded = time.process_time()
    marks = fingerprints.landmarks(wave, RATE)
    return wave, marks, decoded - began, time.process_time() - decoded


def is_long(path: Path) -> bool:
    """Whether a file is long enough for music, and not a sound of a game."""
    try:
        header = audio.look(path)
    except audio.UnusableAudio:
        return False
    return header.frames >= 20 * header.sample_rate


def packing_s(folder: Path, out: Path) -> float:
    """CPU seconds of packing a folder, one process, its search for repetitions among them."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    shard.run(ShardConfig(data=folder, out=out, jobs=1))
    after = resource.getrusage(resource.RUSAGE_SELF)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(tracks: int, real: Path | None, folder: Path) -> dict[str, Any]:
    """All figures."""
    (folder / "synthetic").mkdir()
    (folder / "copies").mkdir()
    wanted = [(genre, number) for number in range(tracks // 10) for genre in music.STYLES]
    paths = list(spread(partial(compose, folder=folder / "synthetic"), wanted, 0))
    packed_s = packing_s(folder / "synthetic", folder / "out")
    if real:
        others = sorted(p for p in real.rglob("*") if p.suffix.lower() in SUFFIXES)
        paths += [path for path in others if is_long(path)]
    rng = np.random.default_rng(0)
    chosen = [paths[number] for number in rng.choice(len(paths), PLANTED, replace=False)]
    if real:
        chosen[: PLANTED // 2] = rng.permutation(np.array(paths[len(wanted) :]))[: PLANTED // 2]
    planted = list(copies(chosen, folder / "copies"))
    files = paths + [copy for _, _, copy in planted]
    kept = [(path, *found) for path, found in zip(files, spread(usable, files, 0), strict=True)]
    kept = [item for item in kept if item[1] is not None]
    originals = [item for item in kept if item[0] in set(paths)]
    synthetic, others = originals[: len(wanted)], originals[len(wanted) :]
    pairs = find(kept)
    of_copy = {copy: (kind, path) for kind, path, copy in planted}
    found = dict.fromkeys(COPIES, 0)
    wrong = []
    waves, twice = {item[0]: item[1] for item in kept}, []
    for one, two, pair in pairs:
        if two in of_copy and of_copy[two][1] == one:
            found[of_copy[two][0]] += 1
        elif of_copy.get(one, ("", one))[1] != of_copy.get(two, ("", two))[1]:
            is_real = not {one, two} & set(paths[: len(wanted)])
            is_known = is_real and is_true(waves[one], waves[two], pair)
            (twice if is_known else wrong).append((one, two))
    return {
        "tracks": len(originals),
        "real_tracks": len(others),
        "planted": PLANTED,
        "found": found,
        "wrong_pairs": [[path.name for path in pair] for pair in wrong],
        "in_the_collection": [[path.name for path in pair] for pair in twice],
        "cost": {"synthetic": cost(synthetic)} | ({"real": cost(others)} if others else {}),
        "packing_ms": 1000 * packed_s / len(wanted),
    }


def cost(items: Sequence[tuple[Any, ...]]) -> dict[str, float]:
    """Milliseconds of CPU a track: decoding, landmarks, and the search among these tracks."""
    began = time.process_time()
    find(items)
    search_s, count = time.process_time() - began, len(items)
    return {
        "decode_ms": 1000 * sum(item[3] for item in items) / count,
        "landmarks_ms": 1000 * sum(item[4] for item in items) / count,
        "search_ms": 1000 * search_s / count,
    }


def usable(path: Path) -> tuple[Any, ...]:
    """As `heard`; Nones for what cannot be decoded."""
    try:
        return heard(path)
    except audio.UnusableAudio:
        return None, None, 0.0, 0.0


def find(items: Sequence[tuple[Any, ...]]) -> list[tuple[Path, Path, fingerprints.Pair]]:
    """Paths of pairs that hold the same recording."""
    waves = [item[1] for item in items]
    pairs = fingerprints.find([item[2] for item in items], lambda number: waves[number], RATE)
    return [(items[pair.first][0], items[pair.second][0], pair) for pair in pairs]


def is_true(one: np.ndarray, two: np.ndarray, pair: fingerprints.Pair) -> bool:
    """Whether two waves correlate where they are said to be the same.

    Games play one recording with other layers: 0.85 of the battle music of one of them.
    """
    start, size = round(pair.start_s * RATE), 4 * RATE
    two = soxr.resample(two.astype(np.float32), RATE, RATE * pair.speed)
    one, two = one[max(0, start) :], two[max(0, -start) :]
    found = []
    for place in range(64, min(len(one), len(two)) - size - 64, size):
        mine = one[place : place + size]
        near = (two[place + late : place + late + size] for late in range(-64, 64))
        found.append(max(np.corrcoef(mine, each)[0, 1] for each in near))
    return bool(found and np.median(found) > 0.6)


def render(result: dict[str, Any], page: str) -> str:
    """The page with the tables of a result between its marks."""
    rows = result["result"]
    lines = [
        f"`benchmarks/repetitions.py`, {result['date']}: {rows['tracks']} tracks of 30 s to a "
        f"minute ({rows['real_tracks']} real ones); {rows['planted']} are copied in each way.",
        "",
        f"| copied as | found of {rows['planted']} |",
        "|---|---|",
        *(f"| {kind} | {count} |" for kind, count in rows["found"].items()),
        "",
        f"Wrong pairs: {len(rows['wrong_pairs'])}. Pairs that nobody had planted, and whose "
        f"samples correlate: {len(rows['in_the_collection'])}.",
        "",
        "| CPU a track, ms | decoding | landmarks | search | both, of all three |",
        "|---|---|---|---|---|",
        *(
            f"| {kind} | {each['decode_ms']:.1f} | {each['landmarks_ms']:.1f} | "
            f"{each['search_ms']:.1f} | "
            f"{(each['landmarks_ms'] + each['search_ms']) / sum(each.values()):.0%} |"
            for kind, each in rows["cost"].items()
        ),
        "",
        f"Packing a synthetic WAV file takes {rows['packing_ms']:.1f} ms in all.",
    ]
    return between_marks(page, "repetitions", "repetitions", "\n".join(lines))


def main() -> None:
    """Entry of `python benchmarks/repetitions.py`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tracks", type=int, default=2000, help="synthetic ones, tens of them")
    parser.add_argument("--real", type=Path, help="a folder of other music")
    parser.add_argument("--json", type=Path, help="write the result here, and the table into docs")
    words = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(words.tracks, words.real, Path(folder))
    result = {
        "benchmark": "repetitions",
        "date": str(date.today()),
        "machine": machine(),
        "versions": versions(("numpy", "scipy", "soxr", "av")),
        "result": figures,
    }
    print(json.dumps(result, indent=1))
    if words.json:
        write(words.json, result)
        PAGE.write_text(render(result, PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    least = min(figures["found"].values()) / PLANTED
    if least < 0.95 or figures["wrong_pairs"]:
        sys.exit(f"found {least:.0%} of a kind, {len(figures['wrong_pairs'])} wrong pairs")


if __name__ == "__main__":
    main()
