"""Artists by a table or by the list of GTZAN's; one recording in one split."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import shard_config

from mgc_dist import shard
from mgc_dist.data import manifest
from mgc_dist.data.tables import read_table
from mgc_dist.data.tracks import Track, refuse_leaks
from mgc_dist.errors import UserError
from mgc_dist.packing import music, splits
from mgc_dist.packing.groups import Repetition, as_one_group, with_groups
from mgc_dist.report import making


def track(id_: str, genre: str = "g", group: str | None = None) -> Track:
    return Track(id=id_, genre=genre, path=Path(genre) / f"{id_}.wav", group=group)


def test_groups_by_name_or_id_and_blank_is_unknown(tmp_path: Path) -> None:
    found = [
        Track(id=f"blues_0000{n}", genre="blues", path=Path(f"blues/blues.0000{n}.wav"))
        for n in range(4)
    ]
    table = tmp_path / "artists.csv"
    table.write_text(
        "track,genre,artist\nblues.00000,blues,Ann\nblues_00001,blues,Ann\nblues.00002,blues,\n"
    )
    grouped = with_groups(found, table)
    assert [t.group for t in grouped] == ["Ann", "Ann", None, None]
    table.write_text("track,who\nblues.00000,Ann\n")
    with pytest.raises(UserError, match="columns track, who"):
        with_groups(found, table)
    table.write_text("track,artist\njazz.1,Ann\n")
    with pytest.raises(UserError, match="none of the tracks by name"):
        with_groups(found, table)
    with pytest.raises(UserError, match="No such file"):
        with_groups(found, tmp_path / "none.csv")


def test_groups_count_within_their_genre_and_never_twice(tmp_path: Path) -> None:
    found = [
        Track(id=f"{genre}_{name}", genre=genre, path=Path(genre) / f"{name}.wav")
        for genre, name in (("rock", "01"), ("rock", "02"), ("jazz", "01"))
    ]
    table = tmp_path / "artists.csv"
    table.write_text("track,genre,artist\n01.wav,rock,A\n02,rock,A\n01,jazz,B\n")
    groups = {t.id: t.group for t in with_groups(found, table)}
    assert groups == {"rock_01": "A", "rock_02": "A", "jazz_01": "B"}
    table.write_text("track,artist\n01,A\n01,B\n")
    with pytest.raises(UserError, match=r"track 01: got both 'A' and 'B'"):
        with_groups(found, table)


def test_groups_of_unnamed_tracks_stay_and_blank_names_are_refused(tmp_path: Path) -> None:
    found = [track("a", group="Ann"), track("b"), track("c", group="Cid")]
    table = tmp_path / "artists.csv"
    table.write_text("track,artist\nb,Bob\nc,Ann\n")
    assert [t.group for t in with_groups(found, table)] == ["Ann", "Bob", "Ann"]
    table.write_text("track,artist\nb,Bob\n\n,Various\n")
    with pytest.raises(UserError, match="line 4: got a blank track"):
        with_groups(found, table)


def test_gtzans_artists_are_known_by_name() -> None:
    genres = sorted({id_.rsplit("_", 1)[0] for id_ in splits.fault_filtered()})
    found = [
        Track(id=f"{genre}_{n:05d}", genre=genre, path=Path(genre) / f"{genre}.{n:05d}.wav")
        for genre in genres
        for n in range(100)
    ]
    grouped = with_groups(found, Path("gtzan"))
    assert sum(t.group is None for t in grouped) == 81  # Sturm could not name them
    artists = Counter(t.group for t in grouped if t.group)
    assert (len(artists), artists["Bob Marley"]) == (244, 35)
    kept, _ = splits.split_fault_filtered(grouped)
    refuse_leaks(kept)  # no artist is in two of its splits
    assert len({t.group or t.id for t in kept if t.split == "test"}) == 124


@pytest.fixture
def repeated(tmp_path: Path) -> Path:
    """Three genres of four tracks of 6 s, and one of them again: as FLAC, later, 3 dB lower."""
    folder = tmp_path / "in"
    for genre in ("jazz", "metal", "pop"):
        (folder / genre).mkdir(parents=True)
        for number in range(4):
            wave = music.compose(genre, number, seed=1, duration_s=6, per_artist=1)
            soundfile.write(folder / genre / f"{number}.wav", 0.5 * wave, music.SAMPLE_RATE)
    wave, rate = soundfile.read(folder / "jazz" / "1.wav")
    late = np.concatenate([np.zeros(rate // 5), 0.7 * wave])
    soundfile.write(folder / "jazz" / "again.flac", late, rate)
    soundfile.write(folder / "pop" / "again.wav", wave, rate)  # under another genre, too
    return folder


def split_of(out: Path) -> dict[str, str]:
    return {track.id: track.split for track in manifest.read(out).tracks}


def test_a_recording_in_two_splits_is_refused_and_kept_together(
    repeated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    config = shard_config(repeated, out, groups=None, seed=1)
    with pytest.raises(UserError) as refused:
        shard.run(config)
    message = str(refused.value)
    assert "the same recording in two splits" in message
    assert "--same-group keeps each pair in one split" in message
    assert "again." in message
    rows = read_table(out / "repetitions.csv", "")
    pairs = {frozenset(Path(row[name]).name for name in ("track", "same_as")) for _, row in rows}
    assert pairs == {
        frozenset(pair)
        for pair in (("1.wav", "again.flac"), ("1.wav", "again.wav"), ("again.flac", "again.wav"))
    }
    assert not list(out.glob("*.tar"))
    together = replace(config, same_group=True)  # the cure, to the letter
    shard.run(together)
    found = split_of(out)
    assert found["jazz_1"] == found["jazz_again"] == found["pop_again"]
    shown = capsys.readouterr().out
    assert "3 pairs of tracks hold the same recording, each within one split" in shown
    assert "2 of these pairs have two genres" in shown
    shard.run(together)  # the same again: nothing to do
    assert "already holds exactly this" in capsys.readouterr().out
    assert "--same-group" in making._shard_command("x", manifest.read(out))


def test_repetitions_can_be_left_alone_and_lists_say_so(repeated: Path, tmp_path: Path) -> None:
    shard.run(shard_config(repeated, tmp_path / "a", groups=None, seed=1, repetitions=False))
    assert len(set(split_of(tmp_path / "a").values())) == 3
    table = tmp_path / "splits.csv"
    splits_there = split_of(tmp_path / "a")
    table.write_text("track,split\n" + "".join(f"{k},{v}\n" for k, v in splits_there.items()))
    listed = shard_config(repeated, tmp_path / "b", groups=None, split_file=table)
    with pytest.raises(UserError, match="leave one of each pair out of the list of splits"):
        shard.run(listed)
    with pytest.raises(UserError, match="--same-group: got --no-repetitions"):
        shard_config(repeated, tmp_path / "c", repetitions=False, same_group=True)


def test_an_artist_comes_along_with_a_repetition() -> None:
    found = [track("a", group="Ann"), track("b", group="Ann"), track("c"), track("d"), track("e")]
    pairs = [
        Repetition(first=found[0], second=found[2], speed=1.0, start_s=0.0),
        Repetition(first=found[3], second=found[2], speed=1.02, start_s=1.5),
    ]
    together = as_one_group(found, pairs)
    assert [each.group for each in together] == ["Ann", "Ann", "Ann", "Ann", None]
    assert str(pairs[1]).endswith("d.wav and g/c.wav, 2.0% faster, +1.5 s")
