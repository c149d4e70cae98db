"""How the sources were recorded and encoded: measured rightly, kept, and told where it tells."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pyloudnorm
import pytest
import soundfile

from mgc_dist import shard
from mgc_dist.config import InfoConfig, ShardConfig, VerifyConfig
from mgc_dist.data import audio, manifest
from mgc_dist.data.manifest import TrackEntry
from mgc_dist.errors import UserError
from mgc_dist.packing import provenance


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_a_source_is_measured(rng: np.random.Generator, tmp_path: Path) -> None:
    """Against numpy on the whole file; what is clipped, lost by mixing, at full scale."""
    sound = rng.uniform(-0.5, 0.5, (3 * 22_050, 2))
    sound[:300, 0] = 1.0
    sound[100:200, 1] = -1.0
    path = tmp_path / "x.wav"
    soundfile.write(path, sound, 22_050, subtype="PCM_16")
    _, found = audio.decode(path, 16_000)
    assert (found.container, found.codec) == ("WAV", "PCM_16")
    assert (found.sample_rate, found.channels, found.seconds) == (22_050, 2, 3.0)
    assert found.kbit_rate == pytest.approx(2 * 16 * 22.05, abs=2)
    assert found.peak == pytest.approx(1, abs=1e-4)
    assert found.clipped == pytest.approx(400 / sound.size, abs=1e-6)
    mixed = np.square(sound.mean(axis=1)).mean() / np.square(sound).mean()
    assert found.mixing_loss_db == pytest.approx(-10 * np.log10(mixed), abs=0.2)


def test_mono_loses_nothing_and_floats_may_be_louder_than_full_scale(tmp_path: Path) -> None:
    path = tmp_path / "x.wav"
    soundfile.write(path, 1.5 * np.sin(np.arange(48_000) / 7), 16_000, subtype="FLOAT")
    _, found = audio.decode(path, 16_000)
    assert found.mixing_loss_db == 0.0
    assert found.peak == pytest.approx(1.5, abs=1e-3)
    assert 0.4 < found.clipped < 0.6  # |1.5 sin| >= 1


@pytest.mark.parametrize("rate", [16_000, 22_050, 24_000, 44_100])
def test_loudness_is_that_of_the_standard(rng: np.random.Generator, rate: int) -> None:
    """Against pyloudnorm: noise and tones with loud and quiet seconds, and the gate."""
    for _ in range(5):
        levels = np.repeat(10 ** (rng.uniform(-60, 0, 20) / 20), rate)
        tone = 0.2 * np.sin(rng.uniform(60, 3_000) / rate * 2 * np.pi * np.arange(20 * rate))
        sound = levels * (0.1 * rng.standard_normal(20 * rate) + tone)
        wave = np.rint(32_767 * sound.clip(-1, 1)).astype(np.int16)
        expected = pyloudnorm.Meter(rate).integrated_loudness(wave / 32_768)
        assert audio.loudness(wave, rate) == pytest.approx(expected, abs=0.2)


def test_what_is_quiet_or_short_has_no_loudness() -> None:
    assert audio.loudness(np.full(16_000, 1, np.int16), 16_000) is None
    assert audio.loudness(np.full(5_000, 9_000, np.int16), 16_000) is None


def entries(genres: list[str], per_artist: int = 1) -> list[TrackEntry]:
    return [
        TrackEntry(
            id=f"{genre}_{number}",
            genre=genre,
            group=f"artist {number // per_artist}",
            split="train",
            segments=1,
            windows=1,
            source="x",
            source_xxh3="",
        )
        for number, genre in enumerate(genres)
    ]


def test_a_codec_that_goes_with_the_genre_is_told() -> None:
    tracks = entries(["rock", "jazz"] * 50)
    about = [{"codec": "mp3" if track.genre == "rock" else "flac"} for track in tracks]
    assert provenance.telling(tracks, about) == {"codec": 1.0}


def test_a_level_that_goes_with_the_genre_is_told(rng: np.random.Generator) -> None:
    tracks = entries(["rock", "jazz", "pop"] * 60)
    means = {"rock": -8.0, "jazz": -20.0, "pop": -12.0}
    about = [{"loudness_lufs": rng.normal(means[track.genre], 2)} for track in tracks]
    found = provenance.telling(tracks, about)
    assert found["loudness_lufs"] > 0.7


def test_chance_is_not_told(rng: np.random.Generator) -> None:
    """200 data sets whose properties are drawn without looking at the genre."""
    told = 0
    for _ in range(200):
        tracks = entries(list(rng.choice(["a", "b", "c", "d"], 60, p=[0.4, 0.3, 0.2, 0.1])))
        about = [
            {"codec": str(rng.choice(["mp3", "flac", "opus"])), "peak": rng.uniform(0.2, 1)}
            for _ in tracks
        ]
        told += len(provenance.telling(tracks, about))
    assert told <= 5


def test_what_only_an_artist_has_does_not_count() -> None:
    """Ten artists with a rate of their own each, five tracks each: nothing is learned of others."""
    tracks = entries([genre for genre in "abab" * 3 for _ in range(5)], per_artist=5)
    about = [
        {"sample_rate": 8_000 + 100 * int((track.group or "0").split()[1])} for track in tracks
    ]
    assert provenance.telling(tracks, about) == {}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rock as FLAC at 44.1 kHz, jazz as WAV at 22.05 kHz, packed."""
    root = tmp_path_factory.mktemp("mixed")
    rng = np.random.default_rng(0)
    for genre, rate, suffix in (("rock", 44_100, "flac"), ("jazz", 22_050, "wav")):
        (root / "music" / genre).mkdir(parents=True)
        for number in range(12):
            sound = 0.3 * rng.standard_normal(4 * rate)
            soundfile.write(root / "music" / genre / f"{number}.{suffix}", sound, rate)
    shard.run(ShardConfig(data=root / "music", out=root / "out", jobs=1))
    return root / "out"


def test_the_table_lies_beside_the_shards(mixed: Path) -> None:
    found = manifest.read(mixed)
    table = pyarrow.parquet.read_table(mixed / manifest.TRACKS).to_pylist()
    assert [row["track"] for row in table] == [track.id for track in found.tracks]
    assert {(row["genre"], row["codec"], row["sample_rate"]) for row in table} == {
        ("rock", "PCM_16", 44_100),
        ("jazz", "PCM_16", 22_050),
    }
    assert {row["container"] for row in table} == {"FLAC", "WAV"}
    assert set(provenance.PROPERTIES) < set(table[0])


def test_people_are_told_that_the_recording_betrays_the_genre(
    mixed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert manifest.read(mixed).telling["sample_rate"] == 1.0
    shard.info(InfoConfig(shards=mixed))
    shown = capsys.readouterr().out
    assert "sample_rate of the source files alone tells the genre of 100% of the tracks" in shown
    assert "--subgroup-column sample_rate" in (mixed / "README.md").read_text()


def test_another_table_is_found_and_an_old_data_set_needs_none(mixed: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(mixed, copy)
    (copy / manifest.TRACKS).write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"tracks.parquet: got sha256"):
        shard.verify(VerifyConfig(shards=copy))
    (copy / manifest.TRACKS).unlink()
    content = json.loads((copy / manifest.NAME).read_text())
    del content["tracks_sha256"], content["telling"]
    (copy / manifest.NAME).write_text(manifest.sealed(content))
    shard.verify(VerifyConfig(shards=copy))
    old = manifest.read(copy)
    assert old == replace(manifest.read(mixed), tracks_sha256="", telling={})


def test_bytes_do_not_depend_on_how_it_was_packed(mixed: Path, tmp_path: Path) -> None:
    music = mixed.parent / "music"
    for part in ("1/2", "2/2"):
        shard.run(ShardConfig(data=music, out=tmp_path / "out", part=part, jobs=1))
    shard.run(ShardConfig(data=music, out=tmp_path / "out", join=True, jobs=2))
    assert manifest.read(tmp_path / "out").tracks_sha256 == manifest.read(mixed).tracks_sha256
