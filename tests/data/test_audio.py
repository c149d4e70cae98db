"""Decoding, resampling and cutting; hostile files are refused before they are decoded."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mgc_dist.data import audio, decoders
from mgc_dist.errors import UserError

RATE = 22_050


def tone(frequency: float, seconds: float = 2.0, rate: int = RATE) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(int(seconds * rate)) / rate)


def write(path: Path, wave: np.ndarray, rate: int = RATE, subtype: str = "FLOAT") -> Path:
    soundfile.write(path, wave, rate, subtype=subtype)
    return path


def level_db(wave: np.ndarray, frequency: float, rate: int) -> float:
    """Level of the strongest line near a frequency, relative to a sine of amplitude 0.5."""
    inner = wave[rate // 4 : -rate // 4].astype(np.float64)
    window = np.blackman(len(inner))
    spectrum = np.abs(np.fft.rfft(inner * window)) / window.sum() * 2
    bins = np.fft.rfftfreq(len(inner), 1 / rate)
    near = spectrum[np.abs(bins - frequency) < 40].max()
    return float(20 * np.log10(near / 0.5 + 1e-12))


def test_no_alias_and_a_flat_pass_band(tmp_path: Path) -> None:
    folded = audio.read(write(tmp_path / "9k.wav", tone(9000)), 16_000)
    assert level_db(folded, 7000, 16_000) < -95  # 16000 - 9000
    for frequency in (100, 1000, 5000, 7000):
        passed = audio.read(write(tmp_path / "t.wav", tone(frequency)), 16_000)
        assert abs(level_db(passed, frequency, 16_000)) < 0.5


def test_16_bit_mono_at_the_wanted_rate_is_exact(tmp_path: Path) -> None:
    wave = np.random.default_rng(0).integers(-32768, 32768, 20_000).astype(np.int16)
    path = write(tmp_path / "x.wav", wave, 16_000, "PCM_16")
    assert (audio.to_int16(audio.read(path, 16_000)) == wave).all()


def test_channels_are_averaged_and_rates_agree(tmp_path: Path) -> None:
    both = np.stack([tone(440), np.zeros(2 * RATE)], axis=1)
    mono = audio.read(write(tmp_path / "s.wav", both), 16_000)
    assert len(mono) == 32_000
    assert np.abs(mono - audio.read(write(tmp_path / "m.wav", tone(440) / 2), 16_000)).max() < 1e-6
    for rate in (8_000, 44_100, 48_000, 96_000):
        other = audio.read(write(tmp_path / "r.wav", tone(440, rate=rate) / 2, rate), 16_000)
        inner = slice(1000, 31_000)
        assert np.abs(other[inner] - mono[inner]).max() < 1e-3


@pytest.mark.parametrize("channels", [1, 2, 3, 6])
@pytest.mark.parametrize("kind", [np.int16, np.float32])
def test_mixing_down_has_the_bits_of_the_mean(channels: int, kind: type) -> None:
    """It is nine times as fast for stereo; data sets that were packed before stay as they are."""
    rng = np.random.default_rng(channels)
    block = rng.integers(-32768, 32768, (50_000, channels)).astype(kind)
    if kind is np.float32:
        block = (rng.normal(size=block.shape) * 10.0 ** rng.integers(-9, 1, block.shape)).astype(
            kind
        )
    expected = block.mean(axis=1, dtype=np.float32)
    np.testing.assert_array_equal(audio._mono(block), expected)


def test_blocks_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "x.wav", np.random.default_rng(0).uniform(-0.5, 0.5, 50_000))
    whole = audio.read(path, 16_000)
    monkeypatch.setattr(decoders, "_BLOCK", 997)
    assert np.abs(audio.read(path, 16_000) - whole).max() < 1e-6


@pytest.mark.parametrize("suffix", ["flac", "ogg", "mp3"])
def test_other_formats_are_read(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{suffix}"
    soundfile.write(path, tone(440), RATE)
    assert level_db(audio.read(path, 16_000), 440, 16_000) == pytest.approx(0, abs=0.5)


def test_segments_are_whole_windows() -> None:
    wave = np.arange(10, dtype=np.int16)
    assert audio.segments(wave, 4, 3).tolist() == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    for length in range(15):
        assert len(audio.segments(wave[:length], 4, 3)) == audio.segment_count(
            min(length, 10), 4, 3
        )
    assert audio.segment_count(30 * 16_000, 48_000, 24_000) == 19


def riff(
    data: bytes = b"\1\0" * 1600,
    channels: int = 1,
    rate: int = 16_000,
    bits: int = 16,
    form: int = 1,
    claimed: int | None = None,
) -> bytes:
    align = channels * bits // 8
    size = len(data) if claimed is None else claimed
    head = struct.pack("<IHHIIHH", 16, form, channels, rate, rate * align % 2**32, align, bits)
    body = b"WAVEfmt " + head + b"data" + struct.pack("<I", size) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


def flac_that_claims_2_36_frames() -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.ones(16_000, np.int16), 16_000, format="FLAC")
    content = bytearray(file.getvalue())
    content[21] |= 0x0F
    content[22:26] = b"\xff" * 4
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no readable audio"),
        (b"hello" * 100, "no readable audio"),
        (riff(channels=0), "no readable audio"),
        (riff(channels=64, data=b"\0" * 12_800), "64 channels"),
        (riff(rate=0), "no readable audio"),
        (riff(rate=400), "400 Hz"),
        (riff(data=b""), "no readable audio|0 frames"),
        (flac_that_claims_2_36_frames(), "frames"),
        (riff(data=b"\0" * 3200), "silence"),
        (riff(data=struct.pack("<f", float("nan")) * 800, bits=32, form=3), "not finite"),
    ],
)
def test_hostile_and_useless_files_are_refused(
    content: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.wav"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        audio.read(path, 16_000)


def test_missing_file_and_truncated_flac(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        audio.read(tmp_path / "none.wav", 16_000)
    path = tmp_path / "x.flac"
    soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, 30_000), RATE)
    path.write_bytes(path.read_bytes()[:-20_000])
    with pytest.raises(UserError, match=r"damaged audio|frames"):
        audio.read(path, 16_000)


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
@pytest.mark.parametrize("channels", [1, 2, 6])
def test_every_depth_and_channel_count_gives_the_same_wave(
    subtype: str, channels: int, tmp_path: Path
) -> None:
    wave = np.stack([tone(440, rate=44_100) / (n + 1) for n in range(channels)], axis=1)
    path = write(tmp_path / "x.wav", wave, 44_100, subtype)
    expected = audio.read(write(tmp_path / "e.wav", wave.mean(axis=1), 44_100, "DOUBLE"), 16_000)
    steps = {"PCM_U8": 2**-7, "PCM_16": 2**-15}.get(subtype, 2**-20)
    assert np.abs(audio.read(path, 16_000) - expected).max() < 1.1 * steps
    assert (audio.read_int16(path, 16_000) == audio.to_int16(audio.read(path, 16_000))).all()


def test_opus_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.opus"
    soundfile.write(path, tone(440, rate=48_000), 48_000, format="OGG", subtype="OPUS")
    assert level_db(audio.read(path, 16_000), 440, 16_000) == pytest.approx(0, abs=0.5)


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 22_051, 44_100, 48_000])
@pytest.mark.parametrize("frames", [400, 4_001, 30_003, 66_150])
def test_the_header_tells_the_length(rate: int, frames: int, tmp_path: Path) -> None:
    path = write(tmp_path / "x.wav", tone(440, frames / rate, rate)[:frames], rate, "PCM_16")
    frames = audio.look(path).frames
    for wave in (audio.read(path, 16_000), audio.read_int16(path, 16_000)):
        assert len(wave) == audio.look(path).samples_at(16_000) == frames * 16_000 // rate


@pytest.mark.parametrize("keep", [0.0005, 0.3, 0.999])
@pytest.mark.parametrize("form", ["WAV", "RF64", "WAVEX"])
def test_a_cut_wav_file_is_refused_from_its_header(keep: float, form: str, tmp_path: Path) -> None:
    # libsndfile itself reads what is left of it without a word
    path = tmp_path / "x.wav"
    soundfile.write(path, tone(440), RATE, "PCM_16", format=form)
    audio.look(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: max(150, int(keep * len(whole)))])
    assert len(soundfile.read(path)[0]) < 2 * RATE
    with pytest.raises(UserError, match="bytes of audio where its header claims 88200"):
        audio.look(path)


@pytest.mark.parametrize("claimed", [0, 0x7FFFF000, 0x80000000, 0xFFFFFFFF])
def test_a_wav_file_from_a_pipe_is_heard_to_its_end(claimed: int, tmp_path: Path) -> None:
    wave = np.random.default_rng(0).integers(-9999, 9999, 1601, np.int16)
    path = tmp_path / "x.wav"
    path.write_bytes(riff(wave.tobytes(), claimed=claimed))
    assert (audio.read_int16(path, 16_000) == wave).all()
    path.write_bytes(riff(wave.tobytes() + b"x", claimed=claimed))  # half a sample more
    assert (audio.read_int16(path, 16_000) == wave).all()


def test_a_wav_file_that_is_a_byte_short_loses_a_frame(tmp_path: Path) -> None:
    wave = np.random.default_rng(0).integers(-9999, 9999, 1600, np.int16)
    path = tmp_path / "x.wav"
    path.write_bytes(riff(wave.tobytes())[:-1])
    assert (audio.read_int16(path, 16_000) == wave[:-1]).all()
    path.write_bytes(riff(wave.tobytes())[:-2])
    with pytest.raises(audio.UnusableAudio, match="3198 bytes of audio where its header claims"):
        audio.read(path, 16_000)
    path.write_bytes(riff(wave.tobytes()) + b"LIST\4\0\0\0abcd")  # chunks after it are fine
    assert audio.look(path).frames == 1600


def test_absurd_levels_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.wav", 32768 * tone(440))
    with pytest.raises(audio.UnusableAudio, match="samples up to 16384 times full scale"):
        audio.read(path, 16_000)
    write(path, 3 * tone(440))  # too loud, but music: clipped
    assert np.abs(audio.read_int16(path, 16_000)).max() == 32767
    apart = np.stack([tone(440), -tone(440)], axis=1)
    for wave in (apart, apart + 1e-3 * tone(441)[:, None]):
        write(path, wave)
        with pytest.raises(audio.UnusableAudio, match="channels that cancel each other"):
            audio.read_int16(path, 16_000)
    write(path, np.stack([tone(440), tone(97)], axis=1))  # nothing in common: half the power
    audio.read_int16(path, 16_000)


def test_reasons_do_not_hold_the_path_and_raw_files_are_refused(tmp_path: Path) -> None:
    for name in ("x.wav", "x.raw"):
        path = tmp_path / name
        path.write_bytes(b"no audio" * 100)
        with pytest.raises(audio.UnusableAudio, match="no readable audio") as caught:
            audio.look(path)
        assert str(tmp_path) not in str(caught.value).split("got", 1)[1]
