"""Names of tracks; nothing leaks."""

from pathlib import Path

import pytest

from mgc_dist.data import tracks
from mgc_dist.data.tracks import Track
from mgc_dist.errors import UserError


def track(id_: str, genre: str = "g", group: str | None = None, split: str = "") -> Track:
    return Track(id=id_, genre=genre, path=Path(genre) / f"{id_}.wav", group=group, split=split)


@pytest.mark.parametrize(
    ("path", "id_"),
    [
        ("blues/blues.00000.wav", "blues_00000"),
        ("rock/01. Song (live).wav", "rock_01_Song_live_"),
        ("pop/" + "x" * 200 + ".wav", None),
        ("日本/曲.wav", None),
    ],
)
def test_ids_are_short_ascii_without_dots(path: str, id_: str | None) -> None:
    made = tracks.track_id(Path(path), Path(path).parent.name)
    assert made.isascii()
    assert "." not in made
    assert len(made) <= tracks.ID_BYTES
    assert id_ is None or made == id_


def test_names_that_lose_letters_stay_apart() -> None:
    assert tracks.track_id(Path("曲.wav"), "日本") != tracks.track_id(Path("歌.wav"), "日本")


def test_leaks_are_refused() -> None:
    with pytest.raises(UserError, match=r"group Ann is in two splits.*a in train, b in test"):
        tracks.refuse_leaks(
            [track("a", group="Ann", split="train"), track("b", group="Ann", split="test")]
        )
    with pytest.raises(UserError, match="track a is in two splits"):
        tracks.refuse_leaks([track("a", split="train"), track("a", split="test")])
    tracks.refuse_leaks([track("a", split="train"), track("b", split="test")])
