"""Files without a trustworthy header: heard to their end, or refused by name where that is cut."""

import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mgc_dist.data import audio, decoders

RATE = 44_100


def music(seconds: float = 3.0, rate: int = RATE, channels: int = 2) -> np.ndarray:
    t = np.arange(int(seconds * rate)) / rate
    sweep = 0.4 * np.sin(2 * np.pi * (200 + 300 * t) * t)
    noise = 0.01 * np.random.default_rng(0).standard_normal((len(t), channels))
    return np.asarray(sweep[:, None] + noise)


def encoded(path: Path, codec: str, wave: np.ndarray, rate: int = RATE, **options: str) -> Path:
    """A file as FFmpeg's libraries write it; Vorbis, which they do not write, by libsndfile.

    An option `picture` adds six seconds of a video.
    """
    if codec == "vorbis":
        soundfile.write(path, wave, rate, format="OGG")
        return path
    picture = options.pop("picture", "")
    with av.open(str(path), "w", options=options) as file:
        video = file.add_stream("mpeg4", rate=5, width=64, height=64) if picture else None
        layout = "stereo" if wave.shape[1] == 2 else "mono"
        stream = file.add_stream(codec, rate=rate, layout=layout)
        if codec == "wavpack":
            stream.format = "s16p"
        if codec == "wmav2":
            stream.bit_rate = 128_000
        for number in range(30 if video else 0):
            image = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
            image.pts, image.time_base = number, Fraction(1, 5)
            file.mux(video.encode(image))
        file.mux(video.encode() if video else [])
        samples = (32767 * wave).astype(np.int16)
        for start in range(0, len(samples), size := stream.frame_size or 4096):
            block = np.ascontiguousarray(samples[start : start + size]).reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(block, "s16", layout)
            frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def heard(path: Path) -> np.ndarray:
    return audio.read(path, audio.look(path).sample_rate)


def is_like(ours: np.ndarray, wave: np.ndarray, most_ms: float = 60) -> None:
    """Same music and nearly the same length; an encoder may begin a little earlier or later."""
    assert abs(len(ours) - len(wave)) <= most_ms * RATE / 1000
    mono, start = wave.mean(axis=1)[:60_000], 3000
    most = max(
        np.corrcoef(ours[start + late : 57_000 + late], mono[start:57_000])[0, 1]
        for late in range(-2600, 2600)  # FFmpeg drops the first 2048 samples of WMA
    )
    assert most > 0.99


@pytest.mark.parametrize(
    ("suffix", "codec"),
    [
        ("mp3", "libmp3lame"),
        ("m4a", "aac"),
        ("m4a", "alac"),
        ("opus", "libopus"),
        ("ogg", "vorbis"),
        ("webm", "libopus"),
        ("wma", "wmav2"),
        ("aiff", "pcm_s16be"),
        ("au", "pcm_s16be"),
        ("wv", "wavpack"),
        ("mka", "flac"),
        ("aac", "aac"),
    ],
)
def test_every_format_is_heard(suffix: str, codec: str, tmp_path: Path) -> None:
    rate = 48_000 if codec == "libopus" else RATE
    wave = music(rate=rate)
    path = encoded(tmp_path / f"x.{suffix}", codec, wave, rate)
    is_like(heard(path), wave)
    if codec in ("alac", "pcm_s16be", "wavpack", "flac"):
        expected = (32767 * wave).astype(np.int16).mean(axis=1, dtype=np.float32) / 32768
        np.testing.assert_array_equal(heard(path), expected)


def test_the_sound_of_a_video_is_heard_whatever_its_picture(tmp_path: Path) -> None:
    wave = music()
    is_like(heard(encoded(tmp_path / "x.mp4", "aac", wave, picture="yes")), wave)


def test_without_a_header_a_length_is_what_decoding_gives(tmp_path: Path) -> None:
    wave = music()
    for bit_rate in ("64k", "320k"):
        path = encoded(tmp_path / "x.mp3", "libmp3lame", wave, write_xing="0", b=bit_rate)
        assert decoders._frames_of_xing(path) == 0
        is_like(heard(path), wave)


def test_what_is_joined_is_heard_to_its_end(tmp_path: Path) -> None:
    wave = music()
    for kind, parts in {
        "mp3": [encoded(tmp_path / "1.mp3", "libmp3lame", wave)] * 2,
        "ogg": [encoded(tmp_path / "1.ogg", "vorbis", wave)] * 2,
        "flac": [encoded(tmp_path / "1.oga", "flac", wave)] * 2,
    }.items():
        path = tmp_path / f"joined.{kind}"
        path.write_bytes(b"".join(part.read_bytes() for part in parts))
        assert len(heard(path)) == pytest.approx(2 * len(wave), abs=0.1 * RATE)


def test_a_change_of_rate_between_joined_files_is_followed(tmp_path: Path) -> None:
    one = encoded(tmp_path / "1.mp3", "libmp3lame", music(3.0))
    two = encoded(tmp_path / "2.mp3", "libmp3lame", music(2.0, 22_050, 1), 22_050)
    path = tmp_path / "both.mp3"
    path.write_bytes(one.read_bytes() + two.read_bytes())
    assert len(audio.read_int16(path, 16_000)) == pytest.approx(5 * 16_000, abs=0.2 * 16_000)


WITH_AN_END = {
    "mp3": "libmp3lame",
    "ogg": "vorbis",
    "opus": "libopus",
    "m4a": "aac",
    "wma": "wmav2",
    "mka": "flac",
    "aiff": "pcm_s16be",
    "au": "pcm_s16be",
    "flac": "flac",
    "wav": "pcm_s16le",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("formats")
    return {
        suffix: encoded(folder / f"x.{suffix}", codec, music(rate=48_000), 48_000)
        for suffix, codec in WITH_AN_END.items()
    }


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(suffix=st.sampled_from(sorted(WITH_AN_END)), place=st.floats(0.01, 0.999))
def test_a_cut_file_is_refused_or_complete(
    suffix: str, place: float, files: dict[str, Path], tmp_path: Path
) -> None:
    whole = files[suffix].read_bytes()
    path = tmp_path / f"cut.{suffix}"
    path.write_bytes(whole[: int(place * len(whole))])
    try:
        length = len(audio.read_int16(path, 16_000))
    except audio.UnusableAudio:
        return
    assert length >= len(audio.read_int16(files[suffix], 16_000)) - decoders.TOLERANCE_S * 16_000


def test_junk_in_a_stream_is_skipped_up_to_a_hundredth(tmp_path: Path) -> None:
    content = encoded(tmp_path / "x.mp3", "libmp3lame", music(20.0), write_xing="0").read_bytes()
    middle = len(content) // 2
    path = tmp_path / "junk.mp3"
    path.write_bytes(content[:middle] + b"\xff\xfbjunk" * 3 + content[middle:])
    assert len(heard(path)) == pytest.approx(20 * RATE, abs=0.2 * RATE)


@pytest.mark.parametrize("name", ["picture.jpg", "words.mp3", "empty.m4a"])
def test_what_is_no_music_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "picture.jpg":
        with av.open(str(path), "w", format="mjpeg") as file:
            stream = file.add_stream("mjpeg", rate=1, width=64, height=64, pix_fmt="yuvj420p")
            image = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
            file.mux(stream.encode(image))
            file.mux(stream.encode())
    else:
        path.write_bytes(b"" if name == "empty.m4a" else b"only words here " * 400)
    with pytest.raises(audio.UnusableAudio, match="no readable audio"):
        audio.look(path)


def test_lengths_of_headers_are_guesses_where_formats_do_not_tell(
    files: dict[str, Path], tmp_path: Path
) -> None:
    exact = {suffix for suffix, path in files.items() if audio.look(path).is_exact}
    assert exact == {"wav", "flac"}
    wave, rate = soundfile.read(files["wav"])
    assert audio.look(files["mp3"]).frames == pytest.approx(len(wave), rel=0.05)
    assert audio.look(files["wav"]).bit_rate == pytest.approx(2 * 16 * rate, rel=0.01)


def test_a_rank_loads_no_decoder() -> None:
    program = "import sys, mgc_dist.training.command, mgc_dist.report.measure; "
    program += "sys.exit('av' in sys.modules or 'pyarrow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
