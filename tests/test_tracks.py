"""Finding, naming and splitting tracks; nothing leaks."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mgc_dist import tracks
from mgc_dist.errors import UserError
from mgc_dist.tracks import Track


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
    made = tracks.track_id(Path(path))
    assert made.isascii()
    assert "." not in made
    assert len(made) <= tracks.ID_BYTES
    assert id_ is None or made == id_


def test_names_that_lose_letters_stay_apart() -> None:
    assert tracks.track_id(Path("日本/曲.wav")) != tracks.track_id(Path("日本/歌.wav"))


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
    root = touch(tmp_path, "g/a.wav", "g/b.m4a", "g/deep/c.wav", "h/d.opus", "g/._e.wav")
    found = tracks.find(root)
    names = [path.relative_to(root).as_posix() for path in tracks.overlooked(root, found)]
    assert names == ["g/b.m4a", "g/deep/c.wav", "h/d.opus"]


def test_names_that_no_manifest_can_hold_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "g/a.wav")
    (tmp_path / "g" / b"caf\xe9.wav".decode("utf-8", "surrogateescape")).touch()
    with pytest.raises(UserError, match="not UTF-8"):
        tracks.find(tmp_path)


def test_fault_filtered_lists_have_their_published_sizes() -> None:
    lists = tracks.fault_filtered()
    assert Counter(lists.values()) == {"train": 443, "validation": 197, "test": 290}
    assert len(lists) == tracks.FAULT_FILTERED_TRACKS
    everything = [track(id_) for id_ in lists if id_ != "jazz_00054"]  # the known-bad one
    assert tracks.choose_split("auto", everything) == "fault-filtered"
    assert tracks.choose_split("auto", everything[: len(everything) // 2]) == "stratified"
    gone = everything[-1].id
    with pytest.raises(UserError, match=rf"got no {gone}(.|\n)*--split stratified makes a random"):
        tracks.choose_split("auto", everything[:-1])
    kept, left_out = tracks.split_fault_filtered([*everything, track("blues_99999")])
    assert len(kept) == 929
    assert left_out == {
        "blues_99999": tracks.NOT_LISTED,
        "jazz_00054": tracks.NO_FILE,
    }
    with pytest.raises(UserError, match="GTZAN's file names"):
        tracks.split_fault_filtered([track("a"), track("b")])


@given(st.lists(st.tuples(st.sampled_from("xyz"), st.integers(0, 12)), min_size=60, max_size=150))
@settings(max_examples=40, deadline=None)
def test_stratified_split_keeps_groups_together_and_shares(pairs: list[tuple[str, int]]) -> None:
    found = [
        track(f"{genre}{n}", genre, f"{genre} artist {artist}" if artist else None)
        for n, (genre, artist) in enumerate(pairs)
    ]
    artists = Counter(genre for genre, _ in {(t.genre, t.group or t.id) for t in found})
    assume(min(artists.values()) >= 6)
    split = tracks.split_stratified(found, validation=0.2, test=0.2, seed=1)
    tracks.refuse_leaks(split)
    assert [t.id for t in split] == [t.id for t in found]
    for genre in {t.genre for t in split}:
        sizes = Counter(t.split for t in split if t.genre == genre)
        largest = max(Counter(t.group or t.id for t in split if t.genre == genre).values())
        assert abs(sizes["test"] - 0.2 * sizes.total()) <= largest + 1


def test_too_few_artists_are_refused() -> None:
    found = [track(f"t{n}", group=f"artist {n % 2}") for n in range(10)]
    with pytest.raises(UserError, match="genre g has no track for the test split"):
        tracks.split_stratified(found, validation=0.2, test=0.2, seed=1)


def test_split_depends_on_the_seed_and_not_on_the_order_of_files() -> None:
    found = [track(f"t{n}") for n in range(40)]

    def split(order: list[Track], seed: int) -> dict[str, str]:
        made = tracks.split_stratified(order, validation=0.2, test=0.2, seed=seed)
        return {t.id: t.split for t in made}

    assert split(found, 0) == split(found[::-1], 0) != split(found, 1)


def test_leaks_are_refused() -> None:
    with pytest.raises(UserError, match=r"group Ann is in two splits.*a in train, b in test"):
        tracks.refuse_leaks(
            [track("a", group="Ann", split="train"), track("b", group="Ann", split="test")]
        )
    with pytest.raises(UserError, match="track a is in two splits"):
        tracks.refuse_leaks([track("a", split="train"), track("a", split="test")])
    tracks.refuse_leaks([track("a", split="train"), track("b", split="test")])


def test_folds_keep_groups_together_and_spread_each_genre() -> None:
    found = [
        track(f"{genre}{n}", genre, f"{genre} artist {n // 2}") for genre in "xy" for n in range(20)
    ]
    folds = tracks.deal_folds(found, 5, seed=0)
    assert set(folds.values()) == {0, 1, 2, 3, 4}
    for genre in "xy":
        sizes = Counter(folds[f"group {t.group}"] for t in found if t.genre == genre)
        assert set(sizes.values()) == {4}
    assert folds != tracks.deal_folds(found, 5, seed=1)
