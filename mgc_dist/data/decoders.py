"""Audio files of every kind: what their headers promise, and their samples, block by block.

Plain WAV and FLAC are read by libsndfile, whose headers are exact. All else is read by FFmpeg's
libraries, which PyAV brings along: they play chained Ogg, joined MP3 and files without a
header to their end, and leave out what an encoder has padded (docs/design.md has the table).

How long a file is, only decoding tells. A file that ends early is refused where its format can
show it: by a length in the header, by packets that are counted there, or by an end mark.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import soundfile
from av.container import InputContainer
from av.error import FFmpegError
from numpy.typing import NDArray

from mgc_dist.errors import UserError

MAX_HOURS = 12
"""A FLAC header can claim 2^36 frames and make a decoder allocate 256 GiB."""
MAX_CHANNELS = 8
TOLERANCE_S = 0.1
"""A lossy file may be so much shorter than its header says: encoders count their own delay."""
FULL_SCALE = 32768

_BLOCK = 1 << 16
"""Frames that are decoded at a time; they and what becomes of them stay in a core's cache."""
_STREAMED = 0x7FFF0000
"""Programs that write a WAV file to a pipe put 0 or a length from here on into its header."""
_STREAMS = frozenset({"mp3", "aac", "ac3", "eac3", "dts", "mpegts", "mpeg", "loas", "amr"})
"""Formats of FFmpeg that are packets in a row: no length, no end, and junk between is skipped."""
_LOSSLESS = frozenset({"flac", "alac", "wavpack", "tta", "ape", "tak", "truehd", "mlp"})
_ROUGH = frozenset({"matroska", "ogg"})
"""Formats of FFmpeg whose lengths are rounded, or those of the last packet."""
_SHARE_OF_JUNK = 0.01
_PAGE, _LAST_PAGE, _LONGEST_PAGE = b"OggS", 4, 27 + 255 + 255 * 255

_KINDS = "music in a format that FFmpeg reads"

Block = NDArray[np.int16] | NDArray[np.float32]


class UnusableAudio(UserError):
    """A file that cannot be a track; packing may leave it out (`--allow-bad`)."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a file says of itself before it is decoded.

    Attributes:
        frames: samples of each channel; 0 if nothing tells.
        is_exact: whether decoding gives just so many, or the file is refused.
        sample_rate: in Hz.
        channels: their number.
        codec: of its audio, in FFmpeg's or libsndfile's word, such as `mp3` or `PCM_16`.
        container: the format around it, in the same words.
        bit_rate: in bits per second, over the whole file; 0 if nothing tells.
    """

    frames: int
    is_exact: bool
    sample_rate: int
    channels: int
    codec: str
    container: str
    bit_rate: int

    def samples_at(self, sample_rate: int) -> int:
        """Length in samples after resampling, rounded down."""
        return self.frames * sample_rate // self.sample_rate


def look(path: Path) -> Header:
    """Read a header and refuse absurd ones before anything is decoded.

    Raises:
        UnusableAudio: no such file, no audio, or a header outside what a track can be.
    """
    if not path.is_file():
        raise unusable(path, "no such file", "an audio file")
    header = _plain(path) or _any(path)
    if not 1 <= header.channels <= MAX_CHANNELS:
        raise unusable(path, f"{header.channels} channels", f"1 to {MAX_CHANNELS}")
    if not 4_000 <= header.sample_rate <= 192_000:
        raise unusable(path, f"{header.sample_rate} Hz", "4000 to 192000 Hz")
    if header.frames > MAX_HOURS * 3600 * header.sample_rate or (
        header.is_exact and not header.frames
    ):
        raise unusable(path, f"{header.frames} frames", f"1 frame to {MAX_HOURS} hours")
    return header


def blocks(path: Path, header: Header) -> Iterator[tuple[int, Block]]:
    """Sample rate in Hz, and samples [frames, channels] at full scale 32768, in their order.

    16-bit files are read as integers: libsndfile's conversion to float took four times the CPU
    of reading (docs/design.md). Rate and channels may change where files have been joined.

    Raises:
        UnusableAudio: damaged, or it ends early.
    """
    decode = _plain_blocks if header.is_exact else _any_blocks
    for rate, block in decode(path, header):
        if block.dtype == np.float32 and not np.isfinite(block).all():
            raise unusable(path, "samples that are not finite", "numbers")
        yield rate, block


def unusable(path: Path, got: str, expected: str) -> UnusableAudio:
    """The error of a file that cannot be a track."""
    return UnusableAudio(
        f"audio file {path}",
        got=got,
        expected=expected,
        cure="replace the file, or take it out",
        this_rank_only=True,
    )


def _plain(path: Path) -> Header | None:
    """The header of a WAV or FLAC file whose length is to be trusted; None of any other file."""
    with path.open("rb") as file:
        magic = file.read(12)
    is_wav = magic[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64") and magic[8:] == b"WAVE"
    if not is_wav and magic[:4] != b"fLaC":
        return None
    try:
        info = soundfile.info(str(path))
    except (soundfile.LibsndfileError, RuntimeError):
        return None
    depth = info.subtype.startswith(("PCM_", "FLOAT", "DOUBLE", "ULAW", "ALAW"))
    if not depth or (is_wav and not _holds_what_it_claims(path, magic)):
        return None
    if info.format == "FLAC" and not 0 < info.frames < 1 << 36:  # written to a pipe
        return None
    return Header(
        frames=info.frames,
        is_exact=True,
        sample_rate=info.samplerate,
        channels=info.channels,
        codec=info.subtype,
        container=info.format,
        bit_rate=_bit_rate(path, info.frames, info.samplerate),
    )


def _holds_what_it_claims(path: Path, magic: bytes) -> bool:
    """Whether the length in a WAV file's header is that of its audio, to less than a frame.

    False for a file that was written to a pipe, whose header promises nothing.

    Raises:
        UnusableAudio: cut; libsndfile plays what is left of it without a word.
    """
    with path.open("rb") as file:
        order: Any = "big" if magic[:4] == b"RIFX" else "little"
        size, wide, frame = path.stat().st_size, 0, 1
        file.seek(12)
        while len(head := file.read(8)) == 8:
            length = int.from_bytes(head[4:], order)
            body = file.tell()
            if head[:4] == b"ds64":
                wide = int.from_bytes(file.read(16)[8:], order)
            elif head[:4] == b"fmt ":
                frame = int.from_bytes(file.read(14)[12:], order)
            elif head[:4] == b"data":
                is_wide = magic[:4] in (b"RF64", b"BW64")
                claimed, held = wide if is_wide else length, size - body
                if not is_wide and (claimed == 0 or claimed >= _STREAMED) and held != claimed:
                    return False
                if claimed - held >= max(frame, 1):
                    got = f"{held} bytes of audio where its header claims {claimed}"
                    raise unusable(path, got, "a whole file")
                return True
            file.seek(body + length + length % 2, os.SEEK_SET)
    return False


def _plain_blocks(path: Path, header: Header) -> Iterator[tuple[int, Block]]:
    kind = np.int16 if header.codec == "PCM_16" else np.float32
    buffer = np.empty((min(header.frames + 1, _BLOCK), header.channels), kind)
    frames = 0
    try:
        with soundfile.SoundFile(str(path)) as file:
            while len(block := file.read(out=buffer)):  # [frames, channels]
                frames += len(block)
                if kind is np.float32:
                    block *= np.float32(FULL_SCALE)
                yield header.sample_rate, block
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise unusable(path, f"damaged audio ({_said(error)})", "a whole file") from error
    if frames != header.frames:
        raise unusable(path, f"{frames} frames", f"{header.frames} as its header says")


def _any(path: Path) -> Header:
    try:
        with av.open(str(path), metadata_errors="ignore") as file:
            stream = file.streams.best("audio")
            if not isinstance(stream, av.AudioStream):
                raise unusable(path, "no readable audio (nothing that sounds)", _KINDS)
            codec = stream.codec_context
            seconds = (file.duration or 0) / av.time_base
            if stream.duration and stream.time_base:
                seconds = float(stream.duration * stream.time_base)
            elif len(file.streams) > 1:  # the length of a picture may be another
                seconds = 0.0
            return Header(
                frames=round(max(0.0, seconds) * codec.sample_rate),
                is_exact=False,
                sample_rate=codec.sample_rate,
                channels=codec.channels,
                codec=codec.codec.canonical_name,
                container=file.format.name.partition(",")[0],
                bit_rate=_bit_rate(path, seconds, 1),
            )
    except (FFmpegError, ValueError) as error:
        got = f"no readable audio ({_said(error)})"
        raise unusable(path, got, _KINDS) from error


def _bit_rate(path: Path, frames: float, sample_rate: int) -> int:
    return round(8 * path.stat().st_size * sample_rate / frames) if frames > 0 else 0


@dataclass(kw_only=True)
class _Count:
    """What has come out of a file so far."""

    packets: int = 0
    junk: int = 0
    is_cut: bool = False
    seconds: float = 0.0
    samples: int = 0


def _any_blocks(path: Path, header: Header) -> Iterator[tuple[int, Block]]:
    count, length = _Count(), 0
    waiting: list[Block] = []
    kind = None
    try:
        with av.open(str(path), metadata_errors="ignore") as file:
            stream = file.streams.best("audio")
            assert isinstance(stream, av.AudioStream)
            for frame in _frames(file, stream, header, count):
                if kind != (frame.sample_rate, frame.layout.nb_channels) or length >= _BLOCK:
                    if kind and waiting:
                        yield kind[0], _joined(waiting)
                    waiting, length = [], 0
                    kind = (frame.sample_rate, frame.layout.nb_channels)
                waiting.append(_samples(frame))
                length += frame.samples
                count.samples += frame.samples
                count.seconds += frame.samples / frame.sample_rate
                if count.seconds > MAX_HOURS * 3600:
                    raise unusable(path, f"more than {MAX_HOURS} hours", "a track")
            if kind and waiting:
                yield kind[0], _joined(waiting)
            _refuse_early_end(path, header, count, stream.frames)
    except FFmpegError as error:
        raise unusable(path, f"damaged audio ({_said(error)})", "a whole file") from error


def _joined(waiting: list[Block]) -> Block:
    joined: Block = np.concatenate(waiting)  # type: ignore[assignment]  # all are of one type
    return joined


def _frames(
    file: InputContainer, stream: av.AudioStream, header: Header, count: _Count
) -> Iterator[av.AudioFrame]:
    """Decoded frames. A stream of packets may hold junk, which FFmpeg's own program skips too.

    Raises:
        FFmpegError: a packet is damaged.
    """
    may_skip = header.container in _STREAMS
    for packet in file.demux(stream):
        if packet.size:
            count.packets += 1
            count.is_cut = count.is_cut or packet.is_corrupt
        try:
            yield from packet.decode()
        except FFmpegError:
            count.junk += 1
            if not may_skip:
                raise
    if count.junk > max(2, _SHARE_OF_JUNK * count.packets):
        raise av.error.InvalidDataError(0, f"{count.junk} of {count.packets} packets are damaged")


def _samples(frame: av.AudioFrame) -> Block:
    """Samples [frames, channels] at full scale 32768, 16-bit integers as they are."""
    raw: NDArray[Any] = frame.to_ndarray()  # [channels, frames], or [1, frames * channels]
    block = raw.T if frame.format.is_planar else raw.reshape(-1, frame.layout.nb_channels)
    if block.dtype == np.int16:
        return block
    if block.dtype == np.uint8:
        return (block.astype(np.float32) - np.float32(128)) * np.float32(FULL_SCALE / 128)
    if block.dtype.kind == "i":
        scale = FULL_SCALE / 2.0 ** (8 * block.dtype.itemsize - 1)
        return np.asarray(block * scale, np.float32)
    return np.asarray(block * block.dtype.type(FULL_SCALE), np.float32)


def _refuse_early_end(path: Path, header: Header, count: _Count, listed: int) -> None:
    """Refuse a file that holds less than its format shows that it should.

    Args:
        path: of the file.
        header: of the file.
        count: what has been decoded.
        listed: packets or samples that its header counts; 0 if it counts none.

    Raises:
        UnusableAudio: with what was promised, and by what.
    """
    if header.container in _STREAMS:
        promised = _frames_of_xing(path) / header.sample_rate
    elif header.container == "wav" and header.codec.startswith("pcm_"):  # written to a pipe
        promised, count.is_cut = 0.0, False
    else:
        promised = header.frames / header.sample_rate
    if count.is_cut and header.container not in _STREAMS:
        raise unusable(path, "an end in the middle of a packet", "a whole file")
    if listed and count.packets < listed and count.samples < listed:
        got = f"{count.packets} packets, {count.samples} samples"
        raise unusable(path, got, f"{listed} as its header counts them")
    is_lossless = header.codec in _LOSSLESS or header.codec.startswith("pcm_")
    is_exact = is_lossless and header.container not in _ROUGH
    missing = promised - count.seconds
    if missing > (1.5 / header.sample_rate if is_exact else TOLERANCE_S):
        got = f"{count.seconds:.2f} s of audio where its header claims {promised:.2f}"
        raise unusable(path, got, "a whole file")
    if header.container == "ogg" and not _has_last_page(path):
        raise unusable(path, "no last page", "a whole Ogg file")
    if header.container == "asf" and _bytes_of_asf(path) > path.stat().st_size:
        raise unusable(path, f"{path.stat().st_size} bytes", f"{_bytes_of_asf(path)}, as it says")
    if not count.samples:
        raise unusable(path, "0 frames", f"1 frame to {MAX_HOURS} hours")


def _has_last_page(path: Path) -> bool:
    """Whether the last Ogg page is whole and marked as the last one of its stream (RFC 3533)."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 4 * _LONGEST_PAGE))
        tail = file.read()
    start = tail.rfind(_PAGE)
    head = tail[start : start + 27]
    if start < 0 or len(head) < 27:
        return False
    lengths = tail[start + 27 : start + 27 + head[26]]
    is_whole = len(lengths) == head[26] and len(tail) >= start + 27 + head[26] + sum(lengths)
    return is_whole and bool(head[5] & _LAST_PAGE)


def _bytes_of_asf(path: Path) -> int:
    """Size that an ASF file's properties promise; FFmpeg believes what is there."""
    with path.open("rb") as file:
        data = file.read(1 << 16)
    at = data.find(bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365"))
    return int.from_bytes(data[at + 40 : at + 48], "little") if at >= 0 else 0


def _frames_of_xing(path: Path) -> int:
    """Samples that the Xing, Info or VBRI header of an MP3 file promises; 0 without one.

    FFmpeg tells a length also where there is none, from the size of the file.
    """
    with path.open("rb") as file:
        start = 0
        while (tag := file.read(10))[:3] == b"ID3":
            a, b, c, d = tag[6:10]
            start += 10 + (a << 21 | b << 14 | c << 7 | d)
            file.seek(start)
        file.seek(start)
        data = file.read(8192)
    for at in range(len(data) - 200):
        if data[at] == 0xFF and data[at + 1] & 0xE6 == 0xE2:  # layer III
            version = data[at + 1] >> 3 & 3
            is_mono = data[at + 3] >> 6 == 3
            side = (17 if is_mono else 32) if version == 3 else (9 if is_mono else 17)
            for place in (at + 4 + side, at + 6 + side, at + 36):
                name, count = data[place : place + 4], 0
                if name in (b"Xing", b"Info") and data[place + 7] & 1:
                    count = int.from_bytes(data[place + 8 : place + 12], "big")
                elif name == b"VBRI":
                    count = int.from_bytes(data[place + 14 : place + 18], "big")
                if count:
                    return count * (1152 if version == 3 else 576)
            return 0
    return 0


def _said(error: Exception) -> str:
    """What a library says, without the path in front: reasons are written into the manifest."""
    return str(getattr(error, "error_string", None) or getattr(error, "strerror", None) or error)
