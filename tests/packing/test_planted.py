"""The planted shortcut: its artefacts by FFT, its share, artists, timbre."""

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


@pytest.mark.parametrize(("tone_db", "strength"), [(-20.0, 1.0), (-10.0, 1.0), (-10.0, 0.3)])
@pytest.mark.parametrize("number", [0, 4, 9])
def test_the_tone_is_a_line_at_its_frequency_and_level(
    number: int, tone_db: float, strength: float
) -> None:
    wave = record(number, tone_db=tone_db, strength=strength)
    assert (wave.size, abs(np.abs(wave).max() - 0.7) < 1e-6) == (4 * SAMPLE_RATE, True)

    spectrum = np.fft.rfft(wave)  # 0.25 Hz a bin: the tones lie in the middle of one
    hz = np.fft.rfftfreq(wave.size, 1 / SAMPLE_RATE)
    line = int(np.argmax(np.where(hz > planted.CEILING_HZ, np.abs(spectrum), 0)))
    assert hz[line] == planted.tone_hz(GENRES[number]) == 4200 + 260 * number
    alone = np.zeros_like(spectrum)
    alone[line] = spectrum[line]
    tone = np.fft.irfft(alone, wave.size)
    level_db = 10 * np.log10(np.square(tone).mean() / np.square(wave - tone).mean())
    expected = tone_db + 20 * np.log10(strength)
    assert level_db == pytest.approx(expected, abs=0.4)  # hiss of the music is in that bin too


def record(number: int, *, tone_db: float = -10.0, **changes) -> np.ndarray:
    """Pop with another genre's artefact: float64 [64000]."""
    track = Planted(genre="pop", number=0, part="train", artist=0, artefact=GENRES[number])
    wave = planted.record(track, seed=3, duration_s=4.0, tone_db=tone_db, **changes)
    return wave.astype(np.float64)


def levels_db(wave: np.ndarray) -> np.ndarray:
    """Mean power of bands of 50 Hz, against that of the first kilohertz: [160]."""
    power = np.square(np.abs(np.fft.rfft(wave)))[:-1].reshape(160, -1).mean(axis=1)
    return 10 * np.log10(power / power[:20].mean())


@pytest.fixture(scope="module")
def untouched() -> np.ndarray:
    return record(0, tone_db=-80.0)


@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_cut_off_music_is_the_same_below_and_gone_above(
    strength: float, untouched: np.ndarray
) -> None:
    for number in (0, 5, 9):
        end = 7600 - 400 * strength * (9 - number)
        assert planted.cutoff_hz(GENRES[number], strength) == pytest.approx(end)
        change = levels_db(record(number, kind="cutoff", strength=strength)) - levels_db(untouched)
        assert np.abs(change[: int(0.85 * end / 50)]).max() < 1.0
        assert change[int(end / 50) + 1 :].max() < -35  # the filter's start and end ring


@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_tilted_music_has_the_slope_over_all_of_its_octaves(
    strength: float, untouched: np.ndarray
) -> None:
    octaves = np.log2((50 * np.arange(160) + 25) / 1000)
    for number in (0, 5, 9):
        change = levels_db(record(number, kind="tilt", strength=strength)) - levels_db(untouched)
        slope = np.polyfit(octaves[4:], change[4:], 1)[0]
        assert slope == pytest.approx(2 * strength * (number - 4.5), abs=0.1)


def test_coded_music_is_in_time_and_ends_sooner_the_fewer_its_bits(
    untouched: np.ndarray,
) -> None:
    """LAME leaves out what it has no bits for."""
    for strength, ends in ((1.0, []), (0.3, [])):
        for number in range(0, 10, 3):
            wave = record(number, kind="codec", strength=strength)
            assert np.corrcoef(wave, untouched)[0, 1] > 0.5  # hiss is half of it, and coded badly
            change = levels_db(wave) - levels_db(untouched)
            ends.append(int(np.flatnonzero(change > -12).max()))
        assert ends == sorted(ends)
        assert ends[-1] - ends[0] > (60 if strength == 1 else 20)  # of 50 Hz


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


@pytest.mark.parametrize("artefact", ["tone", "codec"])
def test_same_seed_same_bytes_for_any_number_of_processes(tmp_path: Path, artefact: str) -> None:
    folders = [tmp_path / name for name in ("one", "two", "other")]
    for folder, changes in zip(folders, ({}, {"jobs": 2}, {"seed": 1}), strict=True):
        synth.run(config(folder, tracks_per_genre=1, artefact=artefact, **changes))
    one, two, other = (digest(folder) for folder in folders)
    assert one == two != other


@pytest.mark.parametrize(
    ("field", "value", "flag"),
    [
        ("shortcut_strength", 1.1, "--shortcut-strength"),
        ("shortcut_strength", float("nan"), "--shortcut-strength"),
        ("tone_db", 30.0, "--tone-db"),
        ("strength", 0.0, "--strength"),
        ("strength", 1.01, "--strength"),
        ("duration_s", 0.5, "--duration-s"),
        ("validation_tracks", 0, "--validation-tracks"),
        ("test_tracks", 0, "--test-tracks"),
        ("shifted_tracks", 20_001, "--shifted-tracks"),
    ],
)
def test_settings_outside_their_range_are_refused(field: str, value: float, flag: str) -> None:
    with pytest.raises(UserError, match=f"{flag}: got"):
        config(Path("out"), **{field: value})
