"""Finding, naming and splitting tracks; nothing leaks."""

import os
from pathlib import Path

import pytest

from mgc_dist.data import tracks
from mgc_dist.data.tracks import Track
from mgc_dist.errors import UserError


def track(id_: str, genre: str = "g", group: str | None = None, split: str = "") -> Track:
    return Track(id=id_, genre=genre, path=Path(genre) / f"{id_}.wav", group=group, split=split)


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def test_find_reads_the_kaggle_layout_and_ignores_dotfiles(tmp_path: Path) -> None:
    touch(
        tmp_path / "data" / "genres_original",
        *("blues/blues.00000.wav", "blues/._blues.00000.wav", "rock/rock.00001.WAV"),
        *("rock/a b.flac", "rock/notes.txt", ".hidden/x.wav", "top.wav"),
    )
    found = tracks.find(tmp_path / "data")
    assert [t.id for t in found] == ["blues_00000", "rock_00001", "rock_a_b"]
    assert found[0].genre == "blues"
    assert [t.id for t in tracks.find(tmp_path / "data" / "genres_original")] == [
        t.id for t in found
    ]


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


def test_errors_name_folder_and_cure(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such folder.*\n.*mgc_dist\.synth"):
        tracks.find(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no audio files"):
        tracks.find(tmp_path)
    touch(tmp_path, "g/a b.wav", "g/a_b.wav")
    with pytest.raises(UserError, match="two files have the track id g_a_b"):
        tracks.find(tmp_path)


def test_groups_by_name_or_id_and_blank_is_unknown(tmp_path: Path) -> None:
    found = [
        Track(id=f"blues_0000{n}", genre="blues", path=Path(f"blues/blues.0000{n}.wav"))
        for n in range(4)
    ]
    table = tmp_path / "artists.csv"
    table.write_text(
        "track,genre,artist\nblues.00000,blues,Ann\nblues_00001,blues,Ann\nblues.00002,blues,\n"
    )
    grouped = tracks.with_groups(found, table)
    assert [t.group for t in grouped] == ["Ann", "Ann", None, None]
    table.write_text("track,who\nblues.00000,Ann\n")
    with pytest.raises(UserError, match="columns track, who"):
        tracks.with_groups(found, table)
    table.write_text("track,artist\njazz.1,Ann\n")
    with pytest.raises(UserError, match="none of the tracks by name"):
        tracks.with_groups(found, table)
    with pytest.raises(UserError, match="No such file"):
        tracks.with_groups(found, tmp_path / "none.csv")


def test_groups_count_within_their_genre_and_never_twice(tmp_path: Path) -> None:
    found = tracks.find(touch(tmp_path / "in", "rock/01.wav", "rock/02.wav", "jazz/01.wav"))
    table = tmp_path / "artists.csv"
    table.write_text("track,genre,artist\n01.wav,rock,A\n02,rock,A\n01,jazz,B\n")
    groups = {t.id: t.group for t in tracks.with_groups(found, table)}
    assert groups == {"rock_01": "A", "rock_02": "A", "jazz_01": "B"}
    table.write_text("track,artist\n01,A\n01,B\n")
    with pytest.raises(UserError, match=r"track 01: got both 'A' and 'B'"):
        tracks.with_groups(found, table)


def test_files_that_are_not_taken_are_known(tmp_path: Path) -> None:
    root = touch(tmp_path, "g/a.wav", "g/b.m4a", "g/deep/c.wav", "h/d.m4b", "g/._e.wav")
    found = tracks.find(root)
    names = [path.relative_to(root).as_posix() for path in tracks.overlooked(root, found)]
    assert names == ["g/b.m4a", "g/deep/c.wav", "h/d.m4b"]


def test_names_that_no_manifest_can_hold_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "g/a.wav")
    (tmp_path / "g" / b"caf\xe9.wav".decode("utf-8", "surrogateescape")).touch()
    with pytest.raises(UserError, match="not UTF-8"):
        tracks.find(tmp_path)


def test_leaks_are_refused() -> None:
    with pytest.raises(UserError, match=r"group Ann is in two splits.*a in train, b in test"):
        tracks.refuse_leaks(
            [track("a", group="Ann", split="train"), track("b", group="Ann", split="test")]
        )
    with pytest.raises(UserError, match="track a is in two splits"):
        tracks.refuse_leaks([track("a", split="train"), track("a", split="test")])
    tracks.refuse_leaks([track("a", split="train"), track("b", split="test")])


def test_a_table_lists_paths_genres_groups_and_splits(tmp_path: Path) -> None:
    table = tmp_path / "list.tsv"
    table.write_text(
        "path\tgenre\tartist\tsplit\n"
        "x/one.flac\trock\tAnn, the first\ttrain\n"
        "y/two.wav\tjazz\t \tDEV\n"
        f"{tmp_path}/z/three.mp3\tjazz\tBob\t\n"
    )
    found = tracks.find(table)
    assert [(t.id, t.genre, t.group, t.split) for t in found] == [
        ("jazz_three", "jazz", "Bob", ""),
        ("jazz_two", "jazz", None, "validation"),
        ("rock_one", "rock", "Ann, the first", "train"),
    ]
    assert found[2].path == tmp_path / "x" / "one.flac"
    assert found[0].path == tmp_path / "z" / "three.mp3"
    assert tracks.overlooked(table, found) == []


def test_albums_that_number_their_files_alike_stay_apart(tmp_path: Path) -> None:
    table = tmp_path / "list.csv"
    table.write_text("path,genre\na/01.wav,rock\nb/01.wav,rock\nb/02.wav,rock\n")
    ids = [t.id for t in tracks.find(table)]
    assert len(set(ids)) == 3
    assert "rock_02" in ids
    table.write_text("path,genre,track\na/01.wav,rock,A1\nb/01.wav,rock,B1\n")
    assert [t.id for t in tracks.find(table)] == ["A1", "B1"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,genre\na.wav,\n", "line 2: got a blank path or genre"),
        ("file,genre\na.wav,x\n", "columns file, genre"),
        ("path,genre\n", "no rows"),
        ("path,genre\na.wav,x\na.wav,y\n", "two lines"),
        ("path,genre\na.wav,x\n./b/../a.wav,y\n", "two lines"),
        ("path,genre,track\na.wav,x,T\nb.wav,x,T\n", "two files have the track id T"),
        ('path,genre\n"a.wav,x\n', "expected a readable CSV"),
        ("path,genre,split\na.wav,x,third\n", "got 'third'"),
    ],
)
def test_tables_with_mistakes_are_refused(text: str, message: str, tmp_path: Path) -> None:
    table = tmp_path / "list.csv"
    table.write_text(text)
    with pytest.raises(UserError, match=message):
        tracks.find(table)


def test_nothing_that_looks_like_a_track_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = touch(tmp_path / "data" / "genres_original", "blues/a.wav", "jazz/b.wav")
    (root / "jazz" / "c.wav").symlink_to("/nowhere/annex/object")
    touch(tmp_path / "data", "zydeco/d.wav", "e.wav", ".hidden/f.wav")
    found = tracks.find(tmp_path / "data")
    assert [t.id for t in found] == ["blues_a", "jazz_b", "jazz_c"]  # c will be unusable
    others = tracks.overlooked(tmp_path / "data", found)
    assert [path.name for path in others] == ["e.wav", "d.wav"]
    listdir = os.listdir

    def unreadable(folder: Path) -> list[str]:
        if Path(folder).name == "jazz":
            raise PermissionError(13, "Permission denied", str(folder))
        return listdir(folder)

    monkeypatch.setattr(os, "listdir", unreadable)
    with pytest.raises(PermissionError, match="jazz"):
        tracks.find(tmp_path / "data")


def test_groups_of_unnamed_tracks_stay_and_blank_names_are_refused(tmp_path: Path) -> None:
    found = [track("a", group="Ann"), track("b"), track("c", group="Cid")]
    table = tmp_path / "artists.csv"
    table.write_text("track,artist\nb,Bob\nc,Ann\n")
    assert [t.group for t in tracks.with_groups(found, table)] == ["Ann", "Bob", "Ann"]
    table.write_text("track,artist\nb,Bob\n\n,Various\n")
    with pytest.raises(UserError, match="line 4: got a blank track"):
        tracks.with_groups(found, table)


def test_tables_keep_line_breaks_and_unusual_letters(tmp_path: Path) -> None:
    table = tmp_path / "list.csv"
    table.write_text(
        'path,genre,group\n"a\u3000b.wav",rock,"AC\nDC"\n\nc.wav,rock,ACDC\nd.wav,rock,x\u2028y\n'
    )
    found = tracks.find(table)
    assert {t.group for t in found} == {"AC\nDC", "ACDC", "x\u2028y"}
    for text, message in (
        ("path,genre,genre\na,rock,pop\n", "one of them twice"),
        ("path,genre\na.wav,x\n\n\nb.wav,\n", "line 5: got a blank"),
        ("path,genre,track\na.wav,x,\x01 y\n", "line 2: got track '.x01 y'"),
        ("path,genre\na\x07b.wav,x\n", "control characters"),
    ):
        table.write_text(text)
        with pytest.raises(UserError, match=message):
            tracks.find(table)
