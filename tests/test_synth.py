"""The synthetic data set: GTZAN's layout, seeded, with artists."""

import csv
import hashlib
from pathlib import Path

import numpy as np
import soundfile

from mgc_dist import synth
from mgc_dist.config import SynthConfig
from mgc_dist.packing import music


def make(out: Path, **changes) -> Path:
    settings = {"tracks_per_genre": 4, "tracks_per_artist": 2, "duration_s": 1.5, "jobs": 1}
    synth.run(SynthConfig(out=out, **(settings | changes)))
    return out


def digest(root: Path) -> str:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    content = b"".join(str(p.relative_to(root)).encode() + p.read_bytes() for p in files)
    return hashlib.sha256(content).hexdigest()


def test_layout_format_and_artists(tmp_path: Path) -> None:
    out = make(tmp_path / "data")
    files = sorted((out / "genres_original").glob("*/*.wav"))
    assert len(files) == 40
    assert files[0].relative_to(out).as_posix() == "genres_original/blues/blues.00000.wav"
    info = soundfile.info(files[0])
    assert (info.samplerate, info.channels, info.subtype) == (22_050, 1, "PCM_16")
    assert info.frames == int(1.5 * 22_050)
    with (out / "artists.csv").open() as table:
        rows = list(csv.DictReader(table))
    assert len(rows) == 40
    assert len({row["artist"] for row in rows}) == 20
    assert rows[0]["track"] == "blues.00000"


def test_same_seed_same_bytes_for_any_number_of_processes(tmp_path: Path) -> None:
    one, two = make(tmp_path / "one"), make(tmp_path / "two", jobs=2)
    other = make(tmp_path / "other", seed=1)
    assert digest(one) == digest(two) != digest(other)


def test_the_demos_music_stays_what_its_figures_are_about() -> None:
    """Every 4001st value of three tracks; others round the last bit differently."""
    golden = {
        "blues": [-504, 67, 436, -1525, -2929, 619, -500, 5248, 1277],
        "jazz": [-575, -4860, 1794, 3493, 3373, 1660, 5392, -1189, -12311],
        "rock": [5727, 6394, 3995, 822, 20, -213, 156, -811, 1734],
    }
    for genre, expected in golden.items():
        wave = music.compose(genre, 3, seed=0, duration_s=1.5, per_artist=2)
        assert np.abs(wave[::4001] * 32768 - expected).max() < 2


def test_tracks_are_finite_loud_and_different() -> None:
    waves = [
        music.compose(genre, n, seed=0, duration_s=2.0, per_artist=2)
        for genre in music.STYLES
        for n in range(2)
    ]
    for wave in waves:
        assert np.isfinite(wave).all()
        assert abs(np.abs(wave).max() - 0.7) < 1e-6
    assert len({wave.tobytes() for wave in waves}) == len(waves)
