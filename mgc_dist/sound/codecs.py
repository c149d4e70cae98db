"""Segments through lossy codecs and back, on the CPU: MP3 and Opus by FFmpeg, Vorbis by libsndfile.

FFmpeg as PyAV brings it has no libvorbis; libsndfile loses the delay of MP3 at low bit rates.
"""

import io
from typing import cast

import av
import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

_OPUS_RATE = 48_000
"""In Hz, of all that an Opus decoder gives. Source: RFC 7845, section 5.1."""


def mp3(wave: NDArray[np.float32], kbit: float, rate: int) -> NDArray[np.float32]:
    """MPEG layer III at a constant bit rate: float32 [T] -> [T], in time with what was given.

    Args:
        wave: within -1 to 1.
        kbit: per second; LAME takes the nearest that the rate allows.
        rate: in Hz.
    """
    return fitted(_through(wave, rate, "mp3", "libmp3lame", kbit), len(wave))


def opus(wave: NDArray[np.float32], kbit: float, rate: int) -> NDArray[np.float32]:
    """Opus at a mean bit rate; arguments and result are as for `mp3`."""
    found = _through(resampled(wave, rate, _OPUS_RATE), _OPUS_RATE, "ogg", "libopus", kbit)
    return fitted(resampled(found, _OPUS_RATE, rate), len(wave))


def vorbis(wave: NDArray[np.float32], quality: float, rate: int) -> NDArray[np.float32]:
    """Vorbis at a quality of 0 to 1, a tenth of oggenc's; else as for `mp3`."""
    file = io.BytesIO()
    how = {"format": "OGG", "subtype": "VORBIS", "compression_level": 1 - quality}
    soundfile.write(file, wave, rate, **how)
    file.seek(0)
    found, _ = soundfile.read(file, dtype="float32")
    return fitted(np.asarray(found, np.float32), len(wave))


def resampled(wave: NDArray[np.float32], rate: int, new: int) -> NDArray[np.float32]:
    """By soxr HQ, as packing does it."""
    return wave if rate == new else np.asarray(soxr.resample(wave, rate, new, "HQ"), np.float32)


def fitted(wave: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """Cut, or with silence behind: float32 [size]."""
    return np.pad(wave[:size], (0, max(0, size - len(wave))))


def _through(
    wave: NDArray[np.float32], rate: int, container: str, codec: str, kbit: float
) -> NDArray[np.float32]:
    """Encoded and decoded; the decoder takes the encoder's delay off, which the file tells."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        stream = cast(av.AudioStream, out.add_stream(codec, rate=rate, layout="mono"))
        stream.bit_rate = round(1000 * kbit)
        frame = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
        frame.sample_rate = rate
        for part in (frame, None):
            out.mux(stream.encode(part))
    file.seek(0)
    with av.open(file, "r") as back:
        parts = [part.to_ndarray()[0] for part in back.decode(audio=0)]  # planar floats
    return np.concatenate(parts)
