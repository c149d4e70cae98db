"""Audio files to mono float32 at the wanted rate, and to segments.

Packing and prediction share this code, so training and serving cannot drift apart.
Resampling is soxr HQ: a 9 kHz tone at 22,050 Hz leaves an alias of -141 dB at 16 kHz, where
torchaudio's default leaves -16.8 dB (docs/design.md).
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from mgc_dist.errors import UserError

W = TypeVar("W", np.float32, np.int16)

MAX_HOURS = 12
"""A FLAC header can claim 2^36 frames and make a decoder allocate 256 GiB."""
MAX_CHANNELS = 8
_FULL_SCALE = 32768
_BLOCK = 1 << 16
"""Frames that are decoded at a time; they and what becomes of them stay in a core's cache."""


class UnusableAudio(UserError):
    """A file that cannot be a track; packing may leave it out (`--allow-bad`)."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a file's header says.

    Attributes:
        frames: samples of each channel.
        sample_rate: in Hz.
        channels: their number.
        is_pcm16: whether its samples are 16-bit integers.
    """

    frames: int
    sample_rate: int
    channels: int
    is_pcm16: bool

    def samples_at(self, sample_rate: int) -> int:
        """Length in samples after resampling, rounded down."""
        return self.frames * sample_rate // self.sample_rate


def read_header(path: Path) -> Header:
    """Read a header and refuse absurd ones before anything is decoded.

    Raises:
        UnusableAudio: no such file, no audio, or a header outside what a track can be.
    """
    if not path.is_file():
        raise _unusable(path, "no such file", "an audio file")
    try:
        info = soundfile.info(str(path))
    except (soundfile.LibsndfileError, RuntimeError, TypeError) as error:  # TypeError: .raw
        got, kinds = f"no readable audio ({_said(error)})", "WAV, FLAC, OGG, Opus or MP3"
        raise _unusable(path, got, kinds) from error
    if not 1 <= info.channels <= MAX_CHANNELS:
        raise _unusable(path, f"{info.channels} channels", f"1 to {MAX_CHANNELS}")
    if not 4_000 <= info.samplerate <= 192_000:
        raise _unusable(path, f"{info.samplerate} Hz", "4000 to 192000 Hz")
    if not 0 < info.frames <= MAX_HOURS * 3600 * info.samplerate:
        raise _unusable(path, f"{info.frames} frames", f"1 frame to {MAX_HOURS} hours")
    if info.format in ("WAV", "WAVEX", "RF64"):
        _refuse_cut_wav(path)
    return Header(
        frames=info.frames,
        sample_rate=info.samplerate,
        channels=info.channels,
        is_pcm16=info.subtype == "PCM_16",
    )


def _refuse_cut_wav(path: Path) -> None:
    """Libsndfile plays what is left of a cut WAV file without a word; its data chunk tells."""
    with path.open("rb") as file:
        magic = file.read(12)[:4]
        order = "big" if magic == b"RIFX" else "little"
        size, wide = path.stat().st_size, 0
        while len(head := file.read(8)) == 8:
            length = int.from_bytes(head[4:], order)  # type: ignore[arg-type]
            if head[:4] == b"ds64":
                wide = int.from_bytes(file.read(16)[8:], order)  # type: ignore[arg-type]
                length -= 16
            if head[:4] == b"data":
                claimed = wide if magic in (b"RF64", b"BW64") else length
                held = size - file.tell()
                if claimed > held:
                    raise _unusable(
                        path,
                        f"{held} bytes of audio where its header claims {claimed}",
                        "a whole file (a WAV file that was written to a pipe claims too much)",
                    )
                return
            file.seek(length + length % 2, os.SEEK_CUR)


def read(path: Path, sample_rate: int) -> NDArray[np.float32]:
    """Decode, mix to mono and resample a whole file.

    Args:
        path: any file that libsndfile reads.
        sample_rate: in Hz.

    Returns:
        float32 [header.samples_at(sample_rate)], usually within -1 to 1.

    Raises:
        UnusableAudio: unreadable, shorter than its header says, silent, or not finite.
    """
    header = read_header(path)
    wave = np.empty(header.samples_at(sample_rate), np.float32)
    for start, block in _blocks(path, header, sample_rate):
        np.multiply(block, np.float32(1 / _FULL_SCALE), out=wave[start : start + len(block)])
    return _refuse_silence(path, wave)


def read_int16(path: Path, sample_rate: int) -> NDArray[np.int16]:
    """As `read`, quantised block by block: what a shard holds, in half of the memory.

    Returns:
        int16 [header.samples_at(sample_rate)], equal to to_int16(read(...)).

    Raises:
        UnusableAudio: as `read`; a sound below half a quantisation step is silence.
    """
    header = read_header(path)
    wave = np.empty(header.samples_at(sample_rate), "<i2")
    for start, block in _blocks(path, header, sample_rate):
        wave[start : start + len(block)] = _quantised(block)
    return _refuse_silence(path, wave)


def _blocks(
    path: Path, header: Header, sample_rate: int
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """First sample and content of consecutive mono blocks at the new rate, full scale 32768.

    Scale is a power of two, so it changes no digit of the floats, and 16-bit audio needs no
    multiplication on the way.
    """
    total, start = header.samples_at(sample_rate), 0
    resample = None
    if header.sample_rate != sample_rate:
        resample = soxr.ResampleStream(header.sample_rate, sample_rate, 1, "float32", "HQ")
    for mono in _decoded(path, header):
        block = resample.resample_chunk(mono) if resample else mono
        yield start, block[: max(0, total - start)]
        start += len(block)
    if resample:
        rest = resample.resample_chunk(np.zeros(0, np.float32), last=True)
        rest = rest[: max(0, total - start)]
        yield start, np.pad(rest, (0, max(0, total - start - len(rest))))


def _decoded(path: Path, header: Header) -> Iterator[NDArray[np.float32]]:
    """Mono blocks at the file's own rate, full scale 32768.

    16-bit files are read as integers: libsndfile's conversion to float took four times the CPU
    of reading (docs/design.md).
    """
    kind = np.int16 if header.is_pcm16 else np.float32
    buffer = np.empty((min(header.frames + 1, _BLOCK), header.channels), kind)
    frames = 0
    try:
        with soundfile.SoundFile(str(path)) as file:
            while len(block := file.read(out=buffer)):  # [frames, channels]
                frames += len(block)
                mono = _mono(block)  # [frames]
                if not header.is_pcm16:
                    mono *= np.float32(_FULL_SCALE)
                    if not np.isfinite(mono).all():
                        raise _unusable(path, "samples that are not finite", "numbers")
                yield mono
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise _unusable(path, f"damaged audio ({_said(error)})", "a whole file") from error
    if frames != header.frames:
        raise _unusable(path, f"{frames} frames", f"{header.frames} as its header says")


def _mono(block: NDArray[np.int16 | np.float32]) -> NDArray[np.float32]:
    """Mean over the channels, [frames, channels] -> [frames]: the bits of `block.mean(axis=1)`.

    That took 971 of 1,600 us of a segment of 44.1 kHz stereo, this takes 119. A half is a power of
    two, so in which order a processor adds and multiplies changes no bit of a stereo sound.
    """
    channels = block.shape[1]
    if channels == 2:
        return np.asarray(block @ np.full(2, 0.5, np.float32), np.float32)
    mono = block[:, 0].astype(np.float32)
    for channel in range(1, channels):
        mono += block[:, channel]
    return mono if channels == 1 else mono / np.float32(channels)


def _quantised(block: NDArray[np.float32]) -> NDArray[np.int16]:
    rounded = np.rint(block)
    np.maximum(rounded, np.float32(-_FULL_SCALE), out=rounded)
    np.minimum(rounded, np.float32(_FULL_SCALE - 1), out=rounded)
    return rounded.astype("<i2")


def _refuse_silence(path: Path, wave: NDArray[W]) -> NDArray[W]:
    if not wave.any():
        raise _unusable(path, "silence", "sound")
    return wave


def segment_count(samples: int, length: int, hop: int) -> int:
    """S: whole segments of `length` samples, every `hop` samples; 19 for 30 s, 3 s and 1.5 s."""
    return 0 if samples < length else (samples - length) // hop + 1


def segments(wave: NDArray[np.int16], length: int, hop: int) -> NDArray[np.int16]:
    """Cut a wave into whole segments: int16 [S, length], a view of the wave."""
    if len(wave) < length:
        return np.empty((0, length), np.int16)
    return np.lib.stride_tricks.sliding_window_view(wave, length)[::hop]  # [S, length]


def to_int16(wave: NDArray[np.float32]) -> NDArray[np.int16]:
    """Quantise to 16 bits, rounded and clipped, no dither: exact for 16-bit audio at this rate."""
    return _quantised(wave * np.float32(_FULL_SCALE))


def _said(error: Exception) -> str:
    """What libsndfile says, without the path in front: reasons are written into the manifest."""
    return str(getattr(error, "error_string", error))


def _unusable(path: Path, got: str, expected: str) -> UnusableAudio:
    return UnusableAudio(
        f"audio file {path}",
        got=got,
        expected=expected,
        cure="replace the file, or take it out",
        this_rank_only=True,
    )
