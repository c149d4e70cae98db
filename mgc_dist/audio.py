"""Audio files to mono float32 at the wanted rate, and to segments.

Packing and prediction share this code, so training and serving cannot drift apart.
Resampling is soxr HQ: a 9 kHz tone at 22,050 Hz leaves an alias of -141 dB at 16 kHz, where
torchaudio's default leaves -16.8 dB (docs/design.md).
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from mgc_dist.errors import UserError

MAX_HOURS = 12
"""A FLAC header can claim 2^36 frames and make a decoder allocate 256 GiB."""
MAX_CHANNELS = 8
_BLOCK = 1 << 18


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a file's header says.

    Attributes:
        frames: samples of each channel.
        sample_rate: in Hz.
        channels: their number.
    """

    frames: int
    sample_rate: int
    channels: int

    def samples_at(self, sample_rate: int) -> int:
        """Length in samples after resampling, rounded down."""
        return self.frames * sample_rate // self.sample_rate


def read_header(path: Path) -> Header:
    """Read a header and refuse absurd ones before anything is decoded.

    Raises:
        UserError: no such file, no audio, or a header outside what a track can be.
    """
    if not path.is_file():
        raise _unusable(path, "no such file", "an audio file")
    try:
        info = soundfile.info(str(path))
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise _unusable(path, f"no readable audio ({error})", "WAV, FLAC, OGG or MP3") from error
    if not 1 <= info.channels <= MAX_CHANNELS:
        raise _unusable(path, f"{info.channels} channels", f"1 to {MAX_CHANNELS}")
    if not 4_000 <= info.samplerate <= 192_000:
        raise _unusable(path, f"{info.samplerate} Hz", "4000 to 192000 Hz")
    if not 0 < info.frames <= MAX_HOURS * 3600 * info.samplerate:
        raise _unusable(path, f"{info.frames} frames", f"1 frame to {MAX_HOURS} hours")
    return Header(frames=info.frames, sample_rate=info.samplerate, channels=info.channels)


def read(path: Path, sample_rate: int) -> NDArray[np.float32]:
    """Decode, mix to mono and resample a whole file.

    Args:
        path: any file that libsndfile reads.
        sample_rate: in Hz.

    Returns:
        float32 [header.samples_at(sample_rate)], usually within -1 to 1.

    Raises:
        UserError: unreadable, shorter than its header says, silent, or not finite.
    """
    header = read_header(path)
    parts: list[NDArray[np.float32]] = []
    resample = soxr.ResampleStream(header.sample_rate, sample_rate, 1, "float32", "HQ")
    frames = 0
    try:
        with soundfile.SoundFile(str(path)) as file:
            for block in file.blocks(_BLOCK, dtype="float32", always_2d=True):
                mono = np.ascontiguousarray(block.mean(axis=1, dtype=np.float32))  # [frames]
                frames += len(mono)
                parts.append(resample.resample_chunk(mono))
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise _unusable(path, f"damaged audio ({error})", "a whole file") from error
    parts.append(resample.resample_chunk(np.zeros(0, np.float32), last=True))
    if frames != header.frames:
        raise _unusable(path, f"{frames} frames", f"{header.frames} as its header says")
    wave = np.concatenate(parts)[: header.samples_at(sample_rate)]
    if not np.isfinite(wave).all():
        raise _unusable(path, "samples that are not finite", "numbers")
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
    return np.asarray(np.clip(np.rint(wave * 32768.0), -32768, 32767), "<i2")


def _unusable(path: Path, got: str, expected: str) -> UserError:
    return UserError(
        f"audio file {path}",
        got=got,
        expected=expected,
        cure="replace the file, or take it out",
        this_rank_only=True,
    )
