"""CPU per segment of packing: ours against the ways that one would take without it.

All read the same synthetic tracks (22,050 Hz, mono, 30 s) and write segments of 3 s, one every
1.5 s, at 16 kHz, 16 bits, with one process. What is fair:

- "webdataset TarWriter", MDSWriter and litdata decode and resample each track once, with our own
  functions, so that only the writing differs. They write no checksums, in the order of the tracks;
  ours writes a checksum a record, sha256 of shards, and spreads a track's segments.
- "Per segment" decodes and resamples every segment on its own and writes it with TarWriter:
  either the file is loaded for each segment and cut (as one does on top of
  torchaudio.datasets.GTZAN, and must where the format cannot seek), or only the segment's part
  of the WAV file is read. Resampled by torchaudio at the quality that music needs (the settings
  that its documentation names "kaiser best"; the default aliases at -17 dB), or by soxr HQ.
- All that write WAV bytes make them with Python's wave module, the cheapest way found; TarWriter
  with soundfile's as well, the library that most would take.
- litdata starts processes of its own, whose imports count: they weigh less with more --tracks.
- MP3, Opus and FLAC are the same music at 44.1 or 48 kHz in stereo. There the others decode, mix
  and resample with the program ffmpeg, a process a track, as one does before one packs; ours does
  so itself.

    python benchmarks/packing.py --json benchmarks/results/packing.json
"""

import contextlib
import io
import json
import os
import shutil
import subprocess
import wave
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import measure
import numpy as np
import soundfile

from mgc_dist.data import audio, record

RATE, LENGTH, HOP, SOURCE_RATE = 16_000, 48_000, 24_000, 22_050


FORMATS = {
    "mp3": ("-ar", "44100", "-b:a", "192k"),
    "opus": ("-ar", "48000", "-c:a", "libopus", "-b:a", "128k"),
    "flac": ("-ar", "44100"),
}
"""How ffmpeg makes them, in stereo."""


def prepare(folder: Path, count: int) -> None:
    """The synthetic tracks as WAV, and in each of FORMATS if ffmpeg is there."""
    for wav in sorted(measure.tracks(folder, count).glob("*/*.wav")):
        for kind, options in FORMATS.items() if shutil.which("ffmpeg") else ():
            path = folder / kind / wav.parent.name / f"{wav.stem}.{kind}"
            path.parent.mkdir(parents=True, exist_ok=True)
            words = ["ffmpeg", "-v", "error", "-n", "-i", str(wav), "-ac", "2", *options, str(path)]
            path.exists() or subprocess.run(words, check=True)


def files_of(folder: Path, kind: str = "wav") -> list[Path]:
    found = sorted((folder / (kind if kind in FORMATS else "genres_original")).glob("*/*.*"))
    if not found:
        raise ImportError(f"no {kind} files: no ffmpeg")
    return found


def read_wave(path: Path) -> np.ndarray:
    """A track by our own functions, or by ffmpeg where it is no WAV file: int16 [samples]."""
    if path.suffix == ".wav":
        return audio.read_int16(path, RATE)
    words = ["ffmpeg", "-v", "error", "-i", str(path), "-ac", "1", "-ar", str(RATE)]
    done = subprocess.run([*words, "-f", "s16le", "-"], check=True, capture_output=True)
    return np.frombuffer(done.stdout, np.int16)


def described(paths: Iterable[Path]) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """Every segment with its description, each track decoded and resampled once."""
    for path in paths:
        for segment, window in enumerate(audio.segments(read_wave(path), LENGTH, HOP)):
            yield description(path, segment), window


def description(path: Path, segment: int) -> dict[str, Any]:
    return {
        "track": path.stem.replace(".", "_"),
        "genre": path.parent.name,
        "segment": segment,
        "start_s": segment * HOP / RATE,
        "sample_rate": RATE,
    }


def wav_bytes(samples: np.ndarray) -> bytes:
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setparams((1, 2, RATE, len(samples), "NONE", ""))
        file.writeframes(np.ascontiguousarray(samples).data)
    return content.getvalue()


def ours(folder: Path, scratch: Path, kind: str = "wav") -> Callable[[], int]:
    import rich.console  # before the clock starts, like the packages of the others
    import rich.table  # noqa: F401

    from mgc_dist import shard
    from mgc_dist.config import ShardConfig
    from mgc_dist.packing import splits  # noqa: F401

    config = ShardConfig(
        data=files_of(folder, kind)[0].parent.parent,
        out=scratch / "out",
        split="stratified",
        repetitions=False,  # the others do not look for any
        jobs=1,
    )

    def work() -> int:
        with contextlib.redirect_stdout(io.StringIO()):
            shard.run(config)
        return len(np.load(config.out / "index.npy", mmap_mode="r"))

    return work


def tar_writer(as_wav: Callable[[np.ndarray], bytes], kind: str = "wav") -> measure.Contender:
    def contender(folder: Path, scratch: Path) -> Callable[[], int]:
        import webdataset

        paths = files_of(folder, kind)

        def work() -> int:
            count, pattern = 0, str(scratch / "out-%06d.tar")
            with webdataset.ShardWriter(pattern, maxcount=512, verbose=0) as out:
                for about, samples in described(paths):
                    key = f"{about['track']}_{about['segment']:02d}"
                    out.write({"__key__": key, "json": about, "wav": as_wav(samples)})
                    count += 1
            return count

        return work

    return contender


def mosaic(folder: Path, scratch: Path, kind: str = "wav") -> Callable[[], int]:
    from streaming import MDSWriter

    paths = files_of(folder, kind)

    def work() -> int:
        count = 0
        columns = {"json": "json", "wav": "bytes"}
        with MDSWriter(out=str(scratch / "out"), columns=columns, size_limit="64mb") as out:
            for about, samples in described(paths):
                out.write({"json": about, "wav": wav_bytes(samples)})
                count += 1
        return count

    return work


def lit_segments(path: str) -> Iterator[dict[str, Any]]:
    for segment, window in enumerate(audio.segments(read_wave(Path(path)), LENGTH, HOP)):
        yield {"json": json.dumps(description(Path(path), segment)), "wav": wav_bytes(window)}


def lit(folder: Path, scratch: Path, kind: str = "wav") -> Callable[[], int]:
    import litdata

    files = [str(path) for path in files_of(folder, kind)]

    def work() -> int:
        with contextlib.redirect_stdout(io.StringIO()):
            litdata.optimize(
                fn=lit_segments,
                inputs=files,
                output_dir=str(scratch / "out"),
                num_workers=1,
                chunk_bytes="64MB",
            )
        lengths = (audio.look(Path(file)).samples_at(RATE) for file in files)
        return sum(audio.segment_count(length, LENGTH, HOP) for length in lengths)

    return work


def soundfile_bytes(samples: np.ndarray) -> bytes:
    content = io.BytesIO()
    soundfile.write(content, samples, RATE, "PCM_16", format="WAV")
    return content.getvalue()


Read = Callable[[Path, int], np.ndarray]
Resample = Callable[[np.ndarray], np.ndarray]


def load_and_cut(path: Path, start: int) -> np.ndarray:
    return soundfile.read(path, dtype="float32")[0][start : start + 3 * SOURCE_RATE]


def seek(path: Path, start: int) -> np.ndarray:
    return soundfile.read(path, start=start, frames=3 * SOURCE_RATE, dtype="float32")[0]


def torchaudio_best() -> Resample:
    import torch
    import torchaudio

    torch.set_num_threads(1)
    best = torchaudio.transforms.Resample(
        SOURCE_RATE,
        RATE,
        lowpass_filter_width=64,
        rolloff=0.9475937167399596,
        resampling_method="sinc_interp_kaiser",
        beta=14.769656459379492,
    )
    return lambda part: best(torch.from_numpy(part)).numpy()


def soxr_hq() -> Resample:
    import soxr

    return lambda part: soxr.resample(part, SOURCE_RATE, RATE, quality="HQ")


def per_segment(read: Read, resampler: Callable[[], Resample]) -> measure.Contender:
    def contender(folder: Path, scratch: Path) -> Callable[[], int]:
        import webdataset

        resample = resampler()

        def work() -> int:
            count, pattern = 0, str(scratch / "out-%06d.tar")
            with webdataset.ShardWriter(pattern, maxcount=512, verbose=0) as out:
                for path in files_of(folder):
                    seconds = soundfile.info(path).duration
                    for segment in range(int((seconds - 3.0) / 1.5) + 1):
                        part = read(path, round(segment * 1.5 * SOURCE_RATE))
                        about = description(path, segment)
                        key = f"{about['track']}_{about['segment']:02d}"
                        wav = wav_bytes(audio.to_int16(resample(part)))
                        out.write({"__key__": key, "json": about, "wav": wav})
                        count += 1
            return count

        return work

    return contender


OURS = "mgc_dist (checksums, sha256, shuffled, atomic)"
CONTENDERS: dict[str, measure.Contender] = {
    OURS: ours,
    "webdataset TarWriter, WAV by soundfile": tar_writer(soundfile_bytes),
    "webdataset TarWriter, WAV by Python's wave": tar_writer(wav_bytes),
    "mosaicml-streaming MDSWriter": mosaic,
    "litdata.optimize": lit,
    "per segment: load, cut, torchaudio kaiser best": per_segment(load_and_cut, torchaudio_best),
    "per segment: load, cut, soxr HQ": per_segment(load_and_cut, soxr_hq),
    "per segment: seek, torchaudio kaiser best": per_segment(seek, torchaudio_best),
    "per segment: seek, soxr HQ": per_segment(seek, soxr_hq),
}
for _kind in FORMATS:
    CONTENDERS |= {
        f"{_kind}: mgc_dist": partial(ours, kind=_kind),
        f"{_kind}: ffmpeg, webdataset TarWriter": tar_writer(wav_bytes, _kind),
        f"{_kind}: ffmpeg, mosaicml-streaming MDSWriter": partial(mosaic, kind=_kind),
        f"{_kind}: ffmpeg, litdata.optimize": partial(lit, kind=_kind),
    }


def compare(results: dict[str, Any]) -> dict[str, Any]:
    base = {name: f"{name[: name.find(':')]}: mgc_dist" for name in CONTENDERS}
    base = {name: ours if ours in CONTENDERS else OURS for name, ours in base.items()}
    ratios = {
        name: measure.ratio(results, ours, name) for name, ours in base.items() if name != ours
    }
    return {"times_our_cpu": ratios, "record_bytes": record.record_bytes(LENGTH)}


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    measure.main(
        "packing",
        CONTENDERS,
        prepare,
        (
            "mgc_dist",
            "soundfile",
            "soxr",
            "torchaudio",
            "webdataset",
            "mosaicml-streaming",
            "litdata",
        ),
        compare,
    )
