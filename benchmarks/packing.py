"""CPU per segment of packing: ours against the ways that one would take without it.

All read the same synthetic tracks (22,050 Hz, 30 s) and write segments of 3 s, every 1.5 s, at
16 kHz, 16 bits, with one process. "webdataset TarWriter", MDSWriter and litdata decode and
resample each track once, with our own functions, so that only the writing differs; they write
neither checksums nor hashes, ours writes three kinds. "Per segment" decodes and resamples
every segment on its own, with torchaudio at the quality that music needs (its "kaiser best"),
or with soxr, and writes it with TarWriter.

    python benchmarks/packing.py --json benchmarks/results/packing.json
"""

import contextlib
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import measure
import numpy as np
import soundfile

from mgc_dist import audio, record

RATE, LENGTH, HOP = 16_000, 48_000, 24_000


def wave_files(folder: Path) -> list[Path]:
    return sorted((folder / "genres_original").glob("*/*.wav"))


def described(folder: Path) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """Every segment with its description, each track decoded and resampled once."""
    for path in wave_files(folder):
        windows = audio.segments(audio.read_int16(path, RATE), LENGTH, HOP)
        for segment, window in enumerate(windows):
            yield description(path, segment), window


def description(path: Path, segment: int) -> dict[str, Any]:
    return {
        "track": path.stem.replace(".", "_"),
        "genre": path.parent.name,
        "segment": segment,
        "start_s": segment * HOP / RATE,
        "sample_rate": RATE,
    }


def wav_bytes(wave: np.ndarray) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, wave, RATE, "PCM_16", format="WAV")
    return file.getvalue()


def ours(folder: Path, scratch: Path) -> Callable[[], int]:
    from mgc_dist import pack, shard, split  # noqa: F401 - imported before the clock starts
    from mgc_dist.config import ShardConfig

    config = ShardConfig(
        data=folder / "genres_original", out=scratch / "out", split="stratified", jobs=1
    )

    def work() -> int:
        with contextlib.redirect_stdout(io.StringIO()):
            shard.run(config)
        return len(np.load(config.out / "index.npy", mmap_mode="r"))

    return work


def tar_writer(folder: Path, scratch: Path) -> Callable[[], int]:
    import webdataset

    def work() -> int:
        count = 0
        with webdataset.ShardWriter(str(scratch / "out-%06d.tar"), maxcount=512, verbose=0) as out:
            for about, wave in described(folder):
                key = f"{about['track']}_{about['segment']:02d}"
                out.write({"__key__": key, "json": about, "wav": wav_bytes(wave)})
                count += 1
        return count

    return work


def mosaic(folder: Path, scratch: Path) -> Callable[[], int]:
    from streaming import MDSWriter

    def work() -> int:
        count = 0
        columns = {"json": "json", "wav": "bytes"}
        with MDSWriter(out=str(scratch / "out"), columns=columns, size_limit="64mb") as out:
            for about, wave in described(folder):
                out.write({"json": about, "wav": wav_bytes(wave)})
                count += 1
        return count

    return work


def lit_segments(path: str) -> Iterator[dict[str, Any]]:
    windows = audio.segments(audio.read_int16(Path(path), RATE), LENGTH, HOP)
    for segment, window in enumerate(windows):
        yield {"json": json.dumps(description(Path(path), segment)), "wav": wav_bytes(window)}


def lit(folder: Path, scratch: Path) -> Callable[[], int]:
    import litdata

    def work() -> int:
        files = [str(path) for path in wave_files(folder)]
        with contextlib.redirect_stdout(io.StringIO()):
            litdata.optimize(
                fn=lit_segments,
                inputs=files,
                output_dir=str(scratch / "out"),
                num_workers=1,
                chunk_bytes="64MB",
            )
        return sum(
            len(
                audio.segments(
                    np.empty(audio.read_header(Path(f)).samples_at(RATE), np.int16), LENGTH, HOP
                )
            )
            for f in files
        )

    return work


def per_segment(resample: Callable[[np.ndarray], np.ndarray], folder: Path, scratch: Path) -> int:
    import webdataset

    count, source_rate = 0, 22_050
    with webdataset.ShardWriter(str(scratch / "out-%06d.tar"), maxcount=512, verbose=0) as out:
        for path in wave_files(folder):
            seconds = soundfile.info(path).duration
            for segment in range(int((seconds - 3.0) / 1.5) + 1):
                start = round(segment * 1.5 * source_rate)
                wave, _ = soundfile.read(path, start=start, frames=3 * source_rate, dtype="float32")
                about = description(path, segment)
                key = f"{about['track']}_{about['segment']:02d}"
                pcm = audio.to_int16(resample(wave))
                out.write({"__key__": key, "json": about, "wav": wav_bytes(pcm)})
                count += 1
    return count


def per_segment_torchaudio(folder: Path, scratch: Path) -> Callable[[], int]:
    import torch
    import torchaudio

    torch.set_num_threads(1)
    best = torchaudio.transforms.Resample(  # torchaudio's tutorial: as librosa's kaiser_best
        22_050,
        RATE,
        lowpass_filter_width=64,
        rolloff=0.9475937167399596,
        resampling_method="sinc_interp_kaiser",
        beta=14.769656459379492,
    )
    return lambda: per_segment(lambda x: best(torch.from_numpy(x)).numpy(), folder, scratch)


def per_segment_soxr(folder: Path, scratch: Path) -> Callable[[], int]:
    import soxr

    return lambda: per_segment(
        lambda x: soxr.resample(x, 22_050, RATE, quality="HQ"), folder, scratch
    )


OURS = "mgc_dist (checksums, sha256, shuffled, atomic)"
CONTENDERS: dict[str, measure.Contender] = {
    OURS: ours,
    "webdataset TarWriter": tar_writer,
    "mosaicml-streaming MDSWriter": mosaic,
    "litdata.optimize": lit,
    "per segment, torchaudio kaiser best, TarWriter": per_segment_torchaudio,
    "per segment, soxr HQ, TarWriter": per_segment_soxr,
}


def compare(results: dict[str, Any]) -> dict[str, Any]:
    ratios = {name: measure.ratio(results, OURS, name) for name in CONTENDERS if name != OURS}
    return {"times_our_cpu": ratios, "record_bytes": record.record_bytes(LENGTH)}


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    measure.main(
        "packing",
        CONTENDERS,
        lambda folder, count: measure.tracks(folder, count) and None,
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
