"""Files of every kind and writer: does the packer hear what FFmpeg's own program hears?

    make hear                                       # all of it; the table is in docs/formats.md
    python benchmarks/hearing.py --only mp3-sox     # one of them

It needs ffmpeg, lame, sox, oggenc and opusenc. A file is made from 8 s of synthetic music, decoded
at its own rate, mixed, and compared with `ffmpeg -f f32le`; then cut at random places.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
from measure import between_marks, machine, versions, write
from numpy.typing import NDArray

from mgc_dist.data import audio, decoders
from mgc_dist.packing import music

PROGRAMS = ("ffmpeg", "lame", "sox", "oggenc", "opusenc")
PAGE = Path(__file__).parent.parent / "docs" / "formats.md"
RATE = 44_100
CUTS = 8

# How each file is made from IN.wav: a line of a shell, or a format (and subtype) of libsndfile.
# fmt: off
WRITERS = {
    "mp3-cbr-ffmpeg": "ffmpeg -i IN -b:a 128k OUT.mp3",
    "mp3-cbr-ffmpeg-no-header": "ffmpeg -i IN -b:a 128k -write_xing 0 OUT.mp3",
    "mp3-cbr-64-ffmpeg-pipe": "ffmpeg -i IN -f mp3 -b:a 64k - > OUT.mp3",
    "mp3-cbr-128-ffmpeg-pipe": "ffmpeg -i IN -f mp3 -b:a 128k - > OUT.mp3",
    "mp3-cbr-320-ffmpeg-pipe": "ffmpeg -i IN -f mp3 -b:a 320k - > OUT.mp3",
    "mp3-vbr-ffmpeg": "ffmpeg -i IN -q:a 4 OUT.mp3",
    "mp3-vbr-ffmpeg-pipe": "ffmpeg -i IN -f mp3 -q:a 4 - > OUT.mp3",
    "mp3-vbr-0-ffmpeg-pipe": "ffmpeg -i IN -f mp3 -q:a 0 - > OUT.mp3",
    "mp3-vbr-9-ffmpeg-pipe": "ffmpeg -i IN -f mp3 -q:a 9 - > OUT.mp3",
    "mp3-abr-ffmpeg-pipe": "ffmpeg -i IN -f mp3 -abr 1 -b:a 160k - > OUT.mp3",
    "mp3-22-khz-mono-ffmpeg": "ffmpeg -i IN -ar 22050 -ac 1 -b:a 64k OUT.mp3",
    "mp3-22-khz-mono-ffmpeg-pipe": "ffmpeg -i IN -ar 22050 -ac 1 -f mp3 -b:a 64k - > OUT.mp3",
    "mp3-48-khz-ffmpeg": "ffmpeg -i IN -ar 48000 -b:a 192k OUT.mp3",
    "mp3-id3v1-ffmpeg": "ffmpeg -i IN -b:a 128k -write_id3v1 1 -metadata title=x OUT.mp3",
    "mp3-mono-lame": "lame --quiet -m m IN OUT.mp3",
    "mp3-vbr-lame": "lame --quiet -V2 IN OUT.mp3",
    "mp3-vbr-lame-pipe": "lame --quiet -V2 IN - > OUT.mp3",
    "mp3-vbr-9-lame-pipe": "lame --quiet -V9 IN - > OUT.mp3",
    "mp3-cbr-lame-pipe": "lame --quiet -b 128 --cbr IN - > OUT.mp3",
    "mp3-cbr-lame-no-header": "lame --quiet -t -b 128 IN OUT.mp3",
    "mp3-abr-lame-no-header": "lame --quiet -t --abr 130 IN OUT.mp3",
    "mp3-vbr-lame-no-header": "lame --quiet -t -V4 IN OUT.mp3",
    "mp3-sox": "sox IN OUT.mp3",
    "mp3-vbr-sox": "sox IN -C -4.2 OUT.mp3",
    "mp3-soundfile": "MP3",
    "mp2-ffmpeg": "ffmpeg -i IN OUT.mp2",
    "ogg-ffmpeg": "ffmpeg -i IN -c:a libvorbis -q:a 4 OUT.ogg",
    "ogg-ffmpeg-pipe": "ffmpeg -i IN -c:a libvorbis -q:a 4 -f ogg - > OUT.ogg",
    "ogg-oggenc": "oggenc -Q -q 4 -o OUT.ogg IN",
    "ogg-22-khz-mono-oggenc": "oggenc -Q -q -1 --resample 22050 --downmix -o OUT.ogg IN",
    "ogg-sox": "sox IN OUT.ogg",
    "ogg-soundfile": "OGG",
    "ogg-flac-ffmpeg": "ffmpeg -i IN -c:a flac -f ogg OUT.oga",
    "ogg-chained-oggenc":
        "oggenc -Q -o OUT.a IN && oggenc -Q -o OUT.b IN && cat OUT.a OUT.b > OUT.ogg",
    "opus-ffmpeg": "ffmpeg -i IN -c:a libopus -b:a 96k OUT.opus",
    "opus-opusenc": "opusenc --quiet IN OUT.opus",
    "opus-24-opusenc": "opusenc --quiet --bitrate 24 --framesize 60 IN OUT.opus",
    "opus-opusenc-pipe": "opusenc --quiet IN - > OUT.opus",
    "opus-soundfile": "OGG OPUS",
    "opus-chained-opusenc":
        "opusenc --quiet IN OUT.a && opusenc --quiet IN OUT.b && cat OUT.a OUT.b > OUT.opus",
    "opus-webm-ffmpeg": "ffmpeg -i IN -c:a libopus OUT.webm",
    "opus-webm-ffmpeg-pipe": "ffmpeg -i IN -c:a libopus -f webm - > OUT.webm",
    "opus-mp4-ffmpeg": "ffmpeg -i IN -c:a libopus OUT.mp4",
    "vorbis-webm-ffmpeg": "ffmpeg -i IN -c:a libvorbis OUT.webm",
    "aac-m4a-ffmpeg": "ffmpeg -i IN -c:a aac -b:a 128k OUT.m4a",
    "aac-m4a-faststart-ffmpeg": "ffmpeg -i IN -c:a aac -movflags +faststart OUT.m4a",
    "aac-m4a-fragmented-ffmpeg":
        "ffmpeg -i IN -c:a aac -movflags frag_keyframe+empty_moov -f mp4 - > OUT.m4a",
    "aac-mp4-video-ffmpeg":
        "ffmpeg -f lavfi -i testsrc=size=64x64:rate=5 -i IN -shortest -c:v mpeg4 -c:a aac OUT.mp4",
    "aac-adts-ffmpeg": "ffmpeg -i IN -c:a aac OUT.aac",
    "alac-m4a-ffmpeg": "ffmpeg -i IN -c:a alac OUT.m4a",
    "wma-2-ffmpeg": "ffmpeg -i IN -c:a wmav2 -b:a 128k OUT.wma",
    "wma-1-ffmpeg": "ffmpeg -i IN -c:a wmav1 -b:a 128k OUT.wma",
    "ac3-ffmpeg": "ffmpeg -i IN -c:a ac3 OUT.ac3",
    "flac-ffmpeg": "ffmpeg -i IN OUT.flac",
    "flac-ffmpeg-pipe": "ffmpeg -i IN -f flac - > OUT.flac",
    "flac-24-bit-ffmpeg": "ffmpeg -i IN -sample_fmt s32 OUT.flac",
    "flac-sox": "sox IN OUT.flac",
    "flac-soundfile": "FLAC",
    "flac-mka-ffmpeg": "ffmpeg -i IN -c:a flac OUT.mka",
    "wavpack-ffmpeg": "ffmpeg -i IN OUT.wv",
    "tta-ffmpeg": "ffmpeg -i IN OUT.tta",
    "wav-ffmpeg": "ffmpeg -i IN OUT.wav",
    "wav-ffmpeg-pipe": "ffmpeg -i IN -f wav - > OUT.wav",
    "wav-sox-pipe": "cat IN | sox -t wav - -t wav - rate 32000 > OUT.wav",
    "wav-24-bit-ffmpeg": "ffmpeg -i IN -c:a pcm_s24le OUT.wav",
    "wav-32-bit-ffmpeg": "ffmpeg -i IN -c:a pcm_s32le OUT.wav",
    "wav-float-ffmpeg": "ffmpeg -i IN -c:a pcm_f32le OUT.wav",
    "wav-double-soundfile": "WAV DOUBLE",
    "wav-8-bit-sox": "sox IN -b 8 OUT.wav",
    "wav-a-law-ffmpeg": "ffmpeg -i IN -c:a pcm_alaw OUT.wav",
    "wav-ms-adpcm-ffmpeg": "ffmpeg -i IN -c:a adpcm_ms OUT.wav",
    "wav-gsm-sox": "sox IN -r 8000 -c 1 -e gsm-full-rate OUT.wav",
    "wav-mp3-ffmpeg": "ffmpeg -i IN -c:a libmp3lame OUT.wav",
    "wav-rf64-ffmpeg": "ffmpeg -i IN -rf64 always OUT.wav",
    "wav-rifx-sox": "sox IN -B OUT.wav",
    "wav-extensible-soundfile": "WAVEX PCM_24",
    "aiff-ffmpeg": "ffmpeg -i IN OUT.aiff",
    "aiff-24-bit-sox": "sox IN -b 24 OUT.aiff",
    "aifc-sox": "sox IN OUT.aifc",
    "au-ffmpeg": "ffmpeg -i IN OUT.au",
    "au-sox": "sox IN OUT.au",
    "au-sox-pipe": "cat IN | sox -t wav - -t au - rate 32000 > OUT.au",
    "au-mu-law-sox": "sox IN -e mu-law OUT.au",
    "caf-ffmpeg": "ffmpeg -i IN OUT.caf",
    "mov-ffmpeg": "ffmpeg -i IN -c:a pcm_s16be OUT.mov",
    "mp3-joined-lame":
        "lame --quiet -V2 IN OUT.a && lame --quiet -b 128 IN OUT.b && cat OUT.a OUT.b > OUT.mp3",
    "mp3-joined-no-header-lame":
        "lame --quiet -t -V2 IN OUT.a && lame --quiet -t -b 128 IN OUT.b "
        "&& cat OUT.a OUT.b > OUT.mp3",
}
# fmt: on
_SUFFIX = {"MP3": "mp3", "OGG": "ogg", "FLAC": "flac", "WAV": "wav", "WAVEX": "wav"}
OPEN = ("-pipe", "-no-header", "-no-header-lame", "mp3-sox", "mp2", "ac3", "adts", "-joined-")
"""Names of files that hold neither their length nor an end mark, unless they are Ogg."""


def is_open(name: str) -> bool:
    """Whether nothing in a file tells that its end is missing."""
    return any(part in name for part in OPEN) and not name.startswith(("ogg", "opus-opusenc"))


def source(folder: Path) -> Path:
    """8 s of synthetic music in stereo, 44.1 kHz, 16 bits."""
    path = folder / "in.wav"
    if not path.is_file():
        parts = [
            music.compose(genre, 3, seed=1, duration_s=8, per_artist=4)
            for genre in ("jazz", "rock")
        ]
        both = np.stack([parts[0] + 0.2 * parts[1], 0.8 * parts[0] - 0.3 * parts[1]], axis=1)
        wave = soxr.resample(0.5 * both, music.SAMPLE_RATE, RATE)
        wave += 0.003 * np.random.default_rng(0).standard_normal(wave.shape)
        soundfile.write(path, wave, RATE, subtype="PCM_16")
    return path


def make(name: str, folder: Path) -> Path:
    """Make one of WRITERS' files.

    Raises:
        CalledProcessError: the program failed.
    """
    line, wav, out = WRITERS[name], source(folder), folder / name
    if line.split()[0] in _SUFFIX:
        kind, *subtype = line.split()
        wave, rate = soundfile.read(wav)
        if subtype == ["OPUS"]:
            wave, rate = soxr.resample(wave, rate, 48_000), 48_000
        path = out.with_suffix(".opus" if subtype == ["OPUS"] else f".{_SUFFIX[kind]}")
        soundfile.write(path, wave, rate, format=kind, subtype=subtype[0] if subtype else None)
        return path
    line = line.replace("ffmpeg -", "ffmpeg -v error -y -").replace("IN", shlex.quote(str(wav)))
    line = line.replace("OUT", shlex.quote(str(out)))
    subprocess.run(["sh", "-c", line], check=True, capture_output=True)
    (path,) = (p for p in folder.glob(f"{name}.*") if p.suffix not in (".a", ".b"))
    return path


def by_ffmpeg(path: Path, channels: int) -> NDArray[np.float32]:
    """What FFmpeg's own program decodes, mixed to mono: float32 [samples]."""
    words = ["ffmpeg", "-v", "quiet", "-i", str(path), "-map", "0:a:0", "-f", "f32le", "-"]
    raw = subprocess.run(words, check=False, capture_output=True).stdout
    return np.asarray(np.frombuffer(raw, "<f4").reshape(-1, channels).mean(axis=1), np.float32)


def compared(path: Path) -> dict[str, Any]:
    """Lengths and likeness of what the packer and FFmpeg's program hear.

    That program plays WAV files of big-endian numbers (RIFX) as noise: there it is the source.

    Raises:
        UnusableAudio: the packer refuses the file.
    """
    header = decoders.look(path)
    ours = audio.read(path, header.sample_rate)
    theirs = by_ffmpeg(path.parent / "in.wav" if "rifx" in path.name else path, header.channels)
    shared = min(len(ours), len(theirs))
    return {
        "decoder": "libsndfile" if header.is_exact else "FFmpeg",
        "codec": header.codec,
        "container": header.container,
        "seconds": round(len(ours) / header.sample_rate, 4),
        "longer_ms": round(1000 * (len(ours) - len(theirs)) / header.sample_rate, 3),
        "correlation": float(np.corrcoef(ours[:shared], theirs[:shared])[0, 1]),
    }


def cut(path: Path, places: Iterable[float]) -> dict[str, int]:
    """What becomes of a file that ends early: refused, whole (nearly), as FFmpeg's, or WRONG."""
    header, content = decoders.look(path), path.read_bytes()
    whole = len(audio.read(path, header.sample_rate))
    found = {"refused": 0, "whole": 0, "as FFmpeg": 0, "WRONG": 0}
    for place in places:
        short = path.with_name(f"cut-{path.name}")
        short.write_bytes(content[: int(place * len(content))])
        try:
            heard = len(audio.read(short, header.sample_rate))
        except audio.UnusableAudio:
            found["refused"] += 1
            continue
        theirs = len(by_ffmpeg(short, header.channels))
        if whole - heard <= decoders.TOLERANCE_S * header.sample_rate:
            found["whole"] += 1
        elif is_open(path.name) and abs(heard - theirs) <= 0.03 * header.sample_rate:
            found["as FFmpeg"] += 1
        else:
            found["WRONG"] += 1
    return found


def hear(names: Iterable[str], folder: Path) -> dict[str, Any]:
    """A row of the table for each name."""
    rng, rows = np.random.default_rng(0), {}
    for name in names:
        path = make(name, folder)
        try:
            row = compared(path) | {"cut": cut(path, rng.uniform(0.05, 1, CUTS))}
        except audio.UnusableAudio as error:
            row = {"refused": str(error).splitlines()[0].partition(": got ")[2]}
        rows[name] = row
        print(f"{name}: {row}", file=sys.stderr)
    return rows


def faults(rows: dict[str, Any]) -> list[str]:
    """Rows that are not as they must be."""
    return [
        name
        for name, row in rows.items()
        if "refused" in row
        or abs(row["longer_ms"]) > 1
        or row["correlation"] < 0.999
        or row["cut"]["WRONG"]
    ]


def render(result: dict[str, Any], page: str) -> str:
    """The page with the table of a result between its marks."""
    lines = [
        f"{result['date']}; {len(result['rows'])} files; PyAV {result['versions']['av']}, "
        f"libsndfile of soundfile {result['versions']['soundfile']}, {result['ffmpeg']}.",
        "",
        "| file | decoder | s | against ffmpeg, ms | correlation | cut at 8 places |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in result["rows"].items():
        ends = ", ".join(f"{count} {what}" for what, count in row["cut"].items() if count)
        lines.append(
            f"| {name} | {row['decoder']}: {row['codec']} | {row['seconds']:.3f} | "
            f"{row['longer_ms']:g} | {row['correlation']:.6f} | {ends} |"
        )
    return between_marks(page, "formats", "hearing", "\n".join(lines))


def main() -> None:
    """Entry of `python benchmarks/hearing.py`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="names, with commas between them")
    parser.add_argument("--json", type=Path, help="write the result here, and the table into docs")
    words = parser.parse_args()
    if missing := [program for program in PROGRAMS if not shutil.which(program)]:
        sys.exit(
            f"no {', '.join(missing)}: apt-get install ffmpeg lame sox libsox-fmt-all "
            "vorbis-tools opus-tools"
        )
    with tempfile.TemporaryDirectory() as folder:
        rows = hear(words.only.split(",") if words.only else WRITERS, Path(folder))
    told = subprocess.run(["ffmpeg", "-version"], check=True, capture_output=True, text=True).stdout
    result = {
        "benchmark": "hearing",
        "date": str(date.today()),
        "machine": machine(),
        "versions": versions(("av", "soundfile", "soxr")),
        "ffmpeg": " ".join(told.split()[:3]),
        "rows": rows,
    }
    print(json.dumps(result))
    if words.json:
        write(words.json, result)
        PAGE.write_text(render(result, PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    if bad := faults(rows):
        sys.exit(f"not as they must be: {', '.join(bad)}")


if __name__ == "__main__":
    main()
