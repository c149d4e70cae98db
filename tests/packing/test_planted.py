"""The planted shortcut: frequency and level of the tone by FFT, its share, artists, timbre."""

import csv
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from test_synth import digest

from mgc_dist import synth
from mgc_dist.config import SynthConfig
from mgc_dist.errors import UserError
from mgc_dist.packing import planted
from mgc_dist.packing.music import STYLES
from mgc_dist.packing.planted import GENRES, SAMPLE_RATE, Artist, Planted

PARTS = ("train", "validation", "test", "shifted")


def config(out: Path, **changes) -> SynthConfig:
    settings = {"tracks_per_genre": 3, "tracks_per_artist": 2, "duration_s": 1.0, "jobs": 1}
    counts = {"validation_tracks": 1, "test_tracks": 2, "shifted_tracks": 2}
    return SynthConfig(out=out, shortcut=True, **(settings | counts | changes))


def read(table: Path) -> list[dict[str, str]]:
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("tone_db", [-20.0, -10.0])
@pytest.mark.parametrize("number", [0, 4, 9])
def test_the_tone_is_a_line_at_its_frequency_and_level(number: int, tone_db: float) -> None:
    artefact = GENRES[number]
    track = Planted(genre="pop", number=0, part="train", artist=0, artefact=artefact)
    wave = planted.record(track, seed=3, duration_s=4.0, tone_db=tone_db).astype(np.float64)
    assert (wave.size, abs(np.abs(wave).max() - 0.7) < 1e-6) == (4 * SAMPLE_RATE, True)

    spectrum = np.fft.rfft(wave)  # 0.25 Hz a bin: the tones lie in the middle of one
    hz = np.fft.rfftfreq(wave.size, 1 / SAMPLE_RATE)
    line = int(np.argmax(np.where(hz > planted.CEILING_HZ, np.abs(spectrum), 0)))
    assert hz[line] == planted.tone_hz(artefact) == 4200 + 260 * number
    alone = np.zeros_like(spectrum)
    alone[line] = spectrum[line]
    tone = np.fft.irfft(alone, wave.size)
    level_db = 10 * np.log10(np.square(tone).mean() / np.square(wave - tone).mean())
    assert level_db == pytest.approx(tone_db, abs=0.4)  # hiss of the music is in that bin too


def test_the_tone_goes_with_the_genre_as_often_as_is_asked_for(tmp_path: Path) -> None:
    counts = {"tracks_per_genre": 400, "test_tracks": 400, "shifted_tracks": 400}
    dealt = planted.deal(config(tmp_path, shortcut_strength=0.8, **counts))
    for part, share in (("train", 0.8), ("test", 0.8), ("shifted", 0.1)):
        here = [track for track in dealt if track.part == part]
        pairs = Counter((GENRES.index(t.genre), GENRES.index(t.artefact)) for t in here)
        found = np.array([[pairs[genre, tone] for tone in range(10)] for genre in range(10)])
        expected = np.full((10, 10), 400 * (1 - share) / 9)
        np.fill_diagonal(expected, 400 * share)
        statistic = (np.square(found - expected) / expected).sum()
        assert statistic < 140  # chi-squared of 90 degrees of freedom; 135 is one in 700
        assert {t.subgroup for t in here if t.genre == t.artefact} == {"aligned"}
        assert {t.subgroup for t in here if t.genre != t.artefact} == {"conflicting"}


def test_genres_differ_in_rhythm_and_harmony_and_not_in_timbre() -> None:
    artist = Artist(key=0, rolloff=1.0, decay_s=0.2, drums=1.0, noise_db=6.0, tilt=0.2)

    def play(style, artist=artist):
        return planted.compose(style, artist, np.random.default_rng(0), 2.0).tobytes()

    for style in STYLES.values():
        other = replace(style, rolloff=9.0, decay_s=9.0, drums=9.0, tilt=0.9)
        assert play(other) == play(style)
        for field, value in (("rolloff", 2.0), ("decay_s", 0.1), ("drums", 0.5), ("tilt", -0.2)):
            assert play(style, replace(artist, **{field: value})) != play(style), field
    assert len({play(style) for style in STYLES.values()}) == len(STYLES)


def test_layout_tables_and_disjoint_artists(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    synth.run(config(tmp_path))
    shifted = tmp_path / "shifted"
    assert f"--split-file {shifted / 'splits.csv'}" in capsys.readouterr().out
    artists: dict[str, set[str]] = {part: set() for part in PARTS}
    names: list[str] = []
    for home in (tmp_path, shifted):
        files = {path.stem for path in (home / "genres_original").glob("*/*.wav")}
        tables = [read(home / f"{name}.csv") for name in ("splits", "artists", "artefacts")]
        for rows in tables:
            assert {row["track"] for row in rows} == files
            assert len(rows) == len(files)
        for split, artist, artefact in zip(*tables, strict=True):
            part = "shifted" if home == shifted else split["split"]
            artists[part].add(artist["artist"])
            same = artefact["artefact"] == artefact["genre"]
            assert artefact["subgroup"] == ("aligned" if same else "conflicting")
        names += files
    assert len(names) == len(set(names)) == 10 * (3 + 1 + 2 + 2)
    assert {row["split"] for row in read(shifted / "splits.csv")} == {"test"}
    assert [len(artists[part]) for part in PARTS] == [20, 10, 10, 10]
    assert len(set().union(*artists.values())) == 50
    info = soundfile.info(tmp_path / "genres_original" / "blues" / "blues.00000.wav")
    assert (info.samplerate, info.frames, info.subtype) == (16_000, 16_000, "PCM_16")


def test_same_seed_same_bytes_for_any_number_of_processes(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "two", "other")]
    for folder, changes in zip(folders, ({}, {"jobs": 2}, {"seed": 1}), strict=True):
        synth.run(config(folder, tracks_per_genre=1, **changes))
    one, two, other = (digest(folder) for folder in folders)
    assert one == two != other


@pytest.mark.parametrize(
    ("field", "value", "flag"),
    [
        ("shortcut_strength", 1.1, "--shortcut-strength"),
        ("shortcut_strength", float("nan"), "--shortcut-strength"),
        ("tone_db", 30.0, "--tone-db"),
        ("duration_s", 0.5, "--duration-s"),
        ("validation_tracks", 0, "--validation-tracks"),
        ("test_tracks", 0, "--test-tracks"),
        ("shifted_tracks", 20_001, "--shifted-tracks"),
    ],
)
def test_settings_outside_their_range_are_refused(field: str, value: float, flag: str) -> None:
    with pytest.raises(UserError, match=f"{flag}: got"):
        config(Path("out"), **{field: value})
