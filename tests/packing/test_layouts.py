"""Finding tracks: folders, trees, FMA, MTG-Jamendo and tables; the wrong layout leads on."""

import json
import os
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from mgc_dist.config import ShardConfig
from mgc_dist.data.tracks import Track
from mgc_dist.errors import UserError
from mgc_dist.packing import layouts


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def found_in(data: Path, **options: Any) -> list[Track]:
    return layouts.find(ShardConfig(data=data, **options)).tracks


def notes_of(data: Path, **options: Any) -> str:
    return "\n".join(layouts.find(ShardConfig(data=data, **options)).notes)


def test_find_reads_the_kaggle_layout_and_ignores_dotfiles(tmp_path: Path) -> None:
    touch(
        tmp_path / "data" / "genres_original",
        *("blues/blues.00000.wav", "blues/._blues.00000.wav", "rock/rock.00001.WAV"),
        *("rock/a b.flac", "rock/notes.txt", ".hidden/x.wav", "top.wav"),
    )
    found = found_in(tmp_path / "data")
    assert [t.id for t in found] == ["blues_00000", "rock_00001", "rock_a_b"]
    assert found[0].genre == "blues"
    assert [t.id for t in found_in(tmp_path / "data" / "genres_original")] == [t.id for t in found]


def test_errors_name_folder_and_cure(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such folder.*\n.*mgc_dist\.synth"):
        found_in(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no audio files"):
        found_in(tmp_path)
    touch(tmp_path, "g/a b.wav", "g/a_b.wav")
    with pytest.raises(UserError, match="two files have the track id g_a_b"):
        found_in(tmp_path)


def test_files_that_are_not_taken_are_known(tmp_path: Path) -> None:
    root = touch(tmp_path, "g/a.wav", "g/b.m4a", "g/deep/c.txt", "h/d.m4b", "g/._e.wav")
    assert [track.id for track in found_in(root)] == ["g_a", "g_b"]
    assert notes_of(root) == f"not taken: 2 other files, such as {root / 'g/deep/c.txt'}"


def test_names_that_no_manifest_can_hold_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "g/a.wav")
    (tmp_path / "g" / b"caf\xe9.wav".decode("utf-8", "surrogateescape")).touch()
    with pytest.raises(UserError, match="not UTF-8"):
        found_in(tmp_path)


def test_a_table_lists_paths_genres_groups_and_splits(tmp_path: Path) -> None:
    table = tmp_path / "list.tsv"
    table.write_text(
        "path\tgenre\tartist\tsplit\n"
        "x/one.flac\trock\tAnn, the first\ttrain\n"
        "y/two.wav\tjazz\t \tDEV\n"
        f"{tmp_path}/z/three.mp3\tjazz\tBob\t\n"
    )
    found = found_in(table)
    assert [(t.id, t.genre, t.group, t.split) for t in found] == [
        ("jazz_three", "jazz", "Bob", ""),
        ("jazz_two", "jazz", None, "validation"),
        ("rock_one", "rock", "Ann, the first", "train"),
    ]
    assert found[2].path == tmp_path / "x" / "one.flac"
    assert found[0].path == tmp_path / "z" / "three.mp3"
    assert notes_of(table) == ""


def test_albums_that_number_their_files_alike_stay_apart(tmp_path: Path) -> None:
    table = tmp_path / "list.csv"
    table.write_text("path,genre\na/01.wav,rock\nb/01.wav,rock\nb/02.wav,rock\n")
    ids = [t.id for t in found_in(table)]
    assert len(set(ids)) == 3
    assert "rock_02" in ids
    table.write_text("path,genre,track\na/01.wav,rock,A1\nb/01.wav,rock,B1\n")
    assert [t.id for t in found_in(table)] == ["A1", "B1"]


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
        found_in(table)


def test_nothing_that_looks_like_a_track_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = touch(tmp_path / "data" / "genres_original", "blues/a.wav", "jazz/b.wav")
    (root / "jazz" / "c.wav").symlink_to("/nowhere/annex/object")
    touch(tmp_path / "data", "zydeco/d.wav", "e.wav", ".hidden/f.wav")
    found = found_in(tmp_path / "data")
    assert [t.id for t in found] == ["blues_a", "jazz_b", "jazz_c"]  # c will be unusable
    assert notes_of(tmp_path / "data").startswith("not taken: 2 other files, such as ")
    listdir = os.listdir

    def unreadable(folder: Path) -> list[str]:
        if Path(folder).name == "jazz":
            raise PermissionError(13, "Permission denied", str(folder))
        return listdir(folder)

    monkeypatch.setattr(os, "listdir", unreadable)
    with pytest.raises(PermissionError, match="jazz"):
        found_in(tmp_path / "data")


def test_tables_keep_line_breaks_and_unusual_letters(tmp_path: Path) -> None:
    table = tmp_path / "list.csv"
    table.write_text(
        'path,genre,group\n"a\u3000b.wav",rock,"AC\nDC"\n\nc.wav,rock,ACDC\nd.wav,rock,x\u2028y\n'
    )
    found = found_in(table)
    assert {t.group for t in found} == {"AC\nDC", "ACDC", "x\u2028y"}
    for text, message in (
        ("path,genre,genre\na,rock,pop\n", "one of them twice"),
        ("path,genre\na.wav,x\n\n\nb.wav,\n", "line 5: got a blank"),
        ("path,genre,track\na.wav,x,\x01 y\n", "line 2: got track '.x01 y'"),
        ("path,genre\na\x07b.wav,x\n", "control characters"),
    ):
        table.write_text(text)
        with pytest.raises(UserError, match=message):
            found_in(table)


def test_numbered_folders_are_no_genres(tmp_path: Path) -> None:
    root = touch(tmp_path, "000/000002.mp3", "001/001040.mp3")
    with pytest.raises(UserError, match=r"000, 001, .*numbers(?s:.*)--layout fma"):
        found_in(root)
    with pytest.raises(UserError, match=r"no tracks\.csv(?s:.*)--table names"):
        found_in(root, layout="fma")
    assert {t.genre for t in found_in(root, layout="folders")} == {"000", "001"}


def test_trees_of_artists_need_their_layout(tmp_path: Path) -> None:
    root = touch(
        tmp_path,
        *("Rock/Ann/First/01.mp3", "Rock/Ann/Second/01.mp3", "Rock/Various Artists/01.mp3"),
        *("Jazz/Bob/01.mp3", "Jazz/alone.flac", "Jazz/Bob/cover.jpg", "loose.mp3"),
    )
    with pytest.raises(UserError, match=r"4 audio files in deeper folders(?s:.*)--layout nested"):
        found_in(root)
    found = {t.id: (t.genre, t.group) for t in found_in(root, layout="nested")}
    assert found == {
        "Rock_Ann_First_01": ("Rock", "Ann"),
        "Rock_Ann_Second_01": ("Rock", "Ann"),
        "Rock_Various_Artists_01": ("Rock", None),
        "Jazz_Bob_01": ("Jazz", "Bob"),
        "Jazz_alone": ("Jazz", None),
    }
    assert "not taken: 2 other files" in notes_of(root, layout="nested")
    assert [t.id for t in found_in(root, layout="folders")] == ["Jazz_alone"]
    touch(root, "Jazz/Bob_01.mp3")  # the same letters, another file
    ids = [t.id for t in found_in(root, layout="nested") if t.id.startswith("Jazz_Bob_01_")]
    assert len(ids) == 2


def test_loose_files_are_no_data_set(tmp_path: Path) -> None:
    root = touch(tmp_path, "a.mp3", "b.mp3")
    with pytest.raises(UserError, match=r"2 audio files, such as a.mp3, in no folder of a genre"):
        found_in(root)


FMA = """\
,album,set,set,track,track,artist,artist
,title,split,subset,genre_top,title,id,name
track_id,,,,,,,
2,"An album,
of two lines",training,small,Hip-Hop,Food,1,AWOL
5,Other,validation,small,Hip-Hop,This World,2,Other
10,More,test,small,Pop,Freeway,6,Kurt
20,None,training,large,,Spiritual,4,Nicky
30,Not here,training,large,Rock,Away,9,Gone
"""


def test_fma_brings_genres_artists_and_its_own_split(tmp_path: Path) -> None:
    root = touch(
        tmp_path / "fma_small",
        *("000/000002.mp3", "000/000005.mp3", "000/000010.mp3", "000/000020.mp3"),
        *("000/000999.mp3", "README.txt"),
    )
    (tmp_path / "fma_metadata").mkdir()
    table = tmp_path / "fma_metadata" / "tracks.csv"
    table.write_text(FMA)
    found = found_in(root, layout="fma")
    assert [(t.id, t.genre, t.group, t.split) for t in found] == [
        ("fma_000002", "Hip-Hop", "1", "train"),
        ("fma_000005", "Hip-Hop", "2", "validation"),
        ("fma_000010", "Pop", "6", "test"),
    ]
    assert found[0].path == root / "000" / "000002.mp3"
    notes = notes_of(root, layout="fma")
    assert "1 tracks without a top genre" in notes
    assert "1 files that its table does not name, such as " in notes
    with pytest.raises(UserError, match=r"--layout fma --data FOLDER_OF_THE_AUDIO --table"):
        found_in(table)
    with pytest.raises(UserError, match=r"no files such as 000/000002\.mp3"):
        found_in(touch(tmp_path / "else", "rock/a.mp3"), layout="fma", table=table)
    table.write_text("path,genre\n")
    with pytest.raises(UserError, match=r"columns .*(?s:.*)fma_metadata\.zip"):
        found_in(root, layout="fma")


JAMENDO = """\
TRACK_ID\tARTIST_ID\tALBUM_ID\tPATH\tDURATION\tTAGS
track_0000214\tartist_000014\talbum_000031\t14/214.mp3\t124.6\tgenre---punkrock
track_0000215\tartist_000014\talbum_000031\t15/215.mp3\t151.5\tgenre---metal\tgenre---rock
track_0000241\tartist_000005\talbum_000032\t41/241.mp3\t216.4\tgenre---rock\tmood/theme---sad
track_0000242\tartist_000005\talbum_000032\t42/242.mp3\t216.4\tinstrument---piano
"""


def test_of_jamendo_tracks_of_one_wanted_genre_are_taken(tmp_path: Path) -> None:
    root = touch(tmp_path / "audio", "14/214.mp3", "15/215.mp3", "41/241.low.mp3")
    table = tmp_path / "autotagging_genre.tsv"
    table.write_text(JAMENDO)
    found = found_in(root, layout="jamendo", table=table)
    assert [(t.id, t.genre, t.group) for t in found] == [
        ("track_0000214", "punkrock", "artist_000014"),
        ("track_0000241", "rock", "artist_000005"),
    ]
    assert found[1].path == root / "41" / "241.low.mp3"
    notes = notes_of(root, layout="jamendo", table=table)
    assert "1 tracks of several genres" in notes
    assert "1 tracks of other genres" in notes
    found = found_in(root, layout="jamendo", table=table, genres="Metal, punkrock")
    assert [(t.id, t.genre) for t in found] == [
        ("track_0000214", "punkrock"),
        ("track_0000215", "metal"),  # of rock, which is not wanted, too
    ]
    with pytest.raises(UserError, match=r"--layout jamendo --data"):
        found_in(table)
    with pytest.raises(UserError, match="no --table"):
        found_in(root, layout="jamendo")
    table.write_text("path\tgenre\n")
    with pytest.raises(UserError, match=r"columns path, genre(?s:.*)MTG-Jamendo"):
        found_in(root, layout="jamendo", table=table)


def test_columns_of_other_names_and_paths_below_data(tmp_path: Path) -> None:
    root = touch(tmp_path / "audio", "x/1.mp3", "x/2.mp3", "x/3.mp3")
    table = tmp_path / "list.csv"
    table.write_text("file;style;band\nx/1.mp3;rock;Ann\nx/2.mp3;jazz;Bob, the second\n")
    columns = ("path=file", "genre=style", "group=band")
    found = found_in(root, table=table, columns=columns)
    assert [(t.genre, t.group, t.path) for t in found] == [
        ("jazz", "Bob, the second", root / "x" / "2.mp3"),
        ("rock", "Ann", root / "x" / "1.mp3"),
    ]
    assert "not taken: 1 other files" in notes_of(root, table=table, columns=columns)
    with pytest.raises(UserError, match=r"columns file, style, band(?s:.*)--columns path=YOURS"):
        found_in(root, table=table)
    for wrong in ("path=fil", "nonsense=file", "file"):
        with pytest.raises(UserError, match=f"--columns {wrong}: got the columns file, style"):
            found_in(root, table=table, columns=(*columns[1:], wrong))
    with pytest.raises(UserError, match="--data FOLDER --table TABLE"):
        found_in(table, table=table)
    with pytest.raises(UserError, match="a folder and no --table"):
        found_in(root, layout="table")


def test_one_genre_has_one_spelling(tmp_path: Path) -> None:
    composed, apart = (unicodedata.normalize(form, "Música") for form in ("NFC", "NFD"))
    root = touch(
        tmp_path, "Rock/1.wav", "rock/2.wav", "rock/3.wav", f"{apart}/4.wav", f"{composed}/5.wav"
    )
    found = found_in(root)
    assert {t.genre for t in found} == {"rock", composed}
    assert len({t.id for t in found}) == 5
    notes = notes_of(root)
    assert "one genre, rock: 'Rock' (1), 'rock' (2)" in notes
    assert f"one genre, {composed}" in notes
    assert {t.genre for t in found_in(root, genres=f" ROCK, {apart.upper()}")} == {"rock", composed}
    assert {t.genre for t in found_in(root, genres="rock")} == {"rock"}
    assert "2 tracks of 1 other genres" in notes_of(root, genres="rock")
    with pytest.raises(UserError, match=r"--genres rocks: got rocks(?s:.*)did you mean rock\?"):
        found_in(root, genres="rocks")


def test_json_lines_are_a_table(tmp_path: Path) -> None:
    table = tmp_path / "list.jsonl"
    rows = [{"path": "a.wav", "genre": "rock", "group": None}, {"path": "b.wav", "genre": "jazz"}]
    table.write_text("\n".join(json.dumps(row) for row in rows))
    assert [(t.id, t.group) for t in found_in(table)] == [("jazz_b", None), ("rock_a", None)]
