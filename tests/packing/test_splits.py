"""Splits and folds: shares, groups kept together, lists of others read as they are written."""

import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import shard_config
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mgc_dist import shard
from mgc_dist.config import InfoConfig, ShardConfig
from mgc_dist.data import manifest, tables, tracks
from mgc_dist.data.tracks import Track
from mgc_dist.errors import UserError
from mgc_dist.packing import card, splits
from mgc_dist.report import making


def track(id_: str, genre: str = "g", group: str | None = None, split: str = "") -> Track:
    return Track(id=id_, genre=genre, path=Path(genre) / f"{id_}.wav", group=group, split=split)


def test_fault_filtered_lists_have_their_published_sizes() -> None:
    lists = splits.fault_filtered()
    assert Counter(lists.values()) == {"train": 443, "validation": 197, "test": 290}
    assert len(lists) == 443 + 197 + 290
    everything = [track(id_) for id_ in lists if id_ != "jazz_00054"]  # the known-bad one
    assert splits.choose("auto", everything, None) == "fault-filtered"
    assert splits.choose("auto", everything[: len(everything) // 2], None) == "stratified"
    gone = everything[-1].id
    with pytest.raises(UserError, match=rf"got no {gone}(.|\n)*--split stratified makes a random"):
        splits.choose("auto", everything[:-1], None)
    kept, left_out = splits.split_fault_filtered([*everything, track("blues_99999")])
    assert len(kept) == 929
    assert left_out == {
        "blues_99999": splits.NOT_LISTED,
        "jazz_00054": splits.NO_FILE,
    }
    with pytest.raises(UserError, match="GTZAN's file names"):
        splits.split_fault_filtered([track("a"), track("b")])


def test_fault_filtered_lists_are_torchaudios() -> None:
    gtzan = pytest.importorskip("torchaudio.datasets", exc_type=ImportError).gtzan
    theirs = {
        "train": gtzan.filtered_train,
        "validation": gtzan.filtered_valid,
        "test": gtzan.filtered_test,
    }
    expected = [(name.replace(".", "_"), part) for part, names in theirs.items() for name in names]
    assert list(splits.fault_filtered().items()) == expected


@given(st.lists(st.tuples(st.sampled_from("xyz"), st.integers(0, 12)), min_size=60, max_size=150))
@settings(max_examples=40)
def test_stratified_split_keeps_groups_together_and_shares(pairs: list[tuple[str, int]]) -> None:
    found = [
        track(f"{genre}{n}", genre, f"{genre} artist {artist}" if artist else None)
        for n, (genre, artist) in enumerate(pairs)
    ]
    artists = Counter(genre for genre, _ in {(t.genre, t.group or t.id) for t in found})
    assume(min(artists.values()) >= 6)
    dealt = splits.split_stratified(found, validation=0.2, test=0.2, seed=1)
    tracks.refuse_leaks(dealt)
    assert [t.id for t in dealt] == [t.id for t in found]
    for genre in {t.genre for t in dealt}:
        sizes = Counter(t.split for t in dealt if t.genre == genre)
        largest = max(Counter(t.group or t.id for t in dealt if t.genre == genre).values())
        assert abs(sizes["test"] - 0.2 * sizes.total()) <= largest


def test_too_few_artists_are_refused() -> None:
    found = [track(f"t{n}", group=f"artist {n % 2}") for n in range(10)]
    with pytest.raises(
        UserError,
        match=r"genre g has no track for the \w+ split(?s:.*)3 artists(?s:.*)min-tracks 11",
    ):
        splits.deal("stratified", found, ShardConfig(), {})
    folds = ShardConfig(folds=9)
    tracks_of_eight = [track(f"t{n}", group=f"artist {n // 2}") for n in range(16)]
    with pytest.raises(UserError, match="at least 9 tracks by 9 artists"):
        splits.deal("kfold", tracks_of_eight, folds, {})


@st.composite
def collections(draw: st.DrawFn) -> list[Track]:
    """Tracks of two genres and of artists with 1 to 5 tracks, some artists in both genres."""
    found = []
    for genre in "xy":
        for artist in range(draw(st.integers(3, 12))):
            group = draw(st.sampled_from([f"{genre} {artist}", f"both {artist}", None]))
            for number in range(draw(st.integers(1, 5))):
                found.append(track(f"{genre}{artist}-{number}", genre, group))
    return found


def home_of(found: list[Track]) -> dict[str, str]:
    """Group -> the genre of most of its tracks, counted anew."""
    of_group: dict[str, Counter[str]] = {}
    for each in found:
        of_group.setdefault(each.group or each.id, Counter())[each.genre] += 1
    return {
        group: max(sorted(genres), key=lambda genre: genres[genre])
        for group, genres in of_group.items()
    }


SPLIT_RULES = {
    2: lambda found: splits.split_stratified(found, validation=0.15, test=0.15, seed=3),
    4: lambda found: splits.split_kfold(found, folds=5, seed=3),
}
"""Rules, by the number of their borders."""


@pytest.mark.parametrize("borders", SPLIT_RULES)
@given(found=collections(), data=st.data())
@settings(max_examples=150)
def test_a_track_more_or_less_moves_one_group_a_border(
    borders: int, found: list[Track], data: st.DataObject
) -> None:
    rule = SPLIT_RULES[borders]
    gone = data.draw(st.sampled_from(found))
    less = [each for each in found if each is not gone]
    homes, after = home_of(found), home_of(less)
    changed = {group for group in after if after[group] != homes[group]}
    assume(not changed)  # an artist that changes genre takes all its tracks along
    of_one = {each.group or each.id: each.split for each in rule(found)}
    of_less = {each.group or each.id: each.split for each in rule(less)}
    moved = [group for group, split in of_less.items() if of_one[group] != split]
    assert len(moved) <= borders
    assert {homes[group] for group in moved} <= {homes[gone.group or gone.id]}


@given(found=collections())
@settings(max_examples=100)
def test_every_genre_of_three_groups_is_in_every_split(found: list[Track]) -> None:
    dealt = SPLIT_RULES[2](found)
    tracks.refuse_leaks(dealt)
    homes = home_of(found)
    for genre in "xy":
        groups = {group for group, home in homes.items() if home == genre}
        splits_of = {each.split for each in dealt if (each.group or each.id) in groups}
        assert len(splits_of) == 3 or len(groups) < 3


@given(found=collections(), data=st.data())
@settings(max_examples=50)
def test_with_an_earlier_data_set_nothing_moves(found: list[Track], data: st.DataObject) -> None:
    before = {each.id: each for each in SPLIT_RULES[2](found)}
    gone = data.draw(st.lists(st.sampled_from(found), max_size=5))
    new = [track(f"new{n}", "x", f"new {n}") for n in range(6)]
    friend = track("friend", "x", found[0].group)
    now = [each for each in found if each not in gone] + [*new, friend]
    try:
        dealt = splits.deal("stratified", now, ShardConfig(seed=5), before)
    except UserError:  # what has gone was the last of its genre in a split
        assume(False)
    tracks.refuse_leaks(dealt)
    assert all(before[each.id].split == each.split for each in dealt if each.id in before)
    if friend.group:
        of_friend = {each.split for each in dealt if each.group == friend.group}
        assert of_friend == {before[found[0].id].split}


def test_split_depends_on_the_seed_and_not_on_the_order_of_files() -> None:
    found = [track(f"t{n}") for n in range(40)]

    def deal(order: list[Track], seed: int) -> dict[str, str]:
        made = splits.split_stratified(order, validation=0.2, test=0.2, seed=seed)
        return {t.id: t.split for t in made}

    assert deal(found, 0) == deal(found[::-1], 0) != deal(found, 1)


def test_kfold_has_each_track_in_one_fold_and_keeps_groups_together() -> None:
    found = [
        track(f"{genre}{n}", genre, f"{genre} artist {n // 2}") for genre in "xy" for n in range(20)
    ]
    dealt = splits.split_kfold(found, folds=5, seed=3)
    tracks.refuse_leaks(dealt)
    sizes = Counter((t.genre, t.split) for t in dealt)
    assert sizes == {(genre, f"fold{number}"): 4 for genre in "xy" for number in range(5)}


GTZAN_LIKE = [
    Track(id=f"{genre}_{n:05d}", genre=genre, path=Path(genre) / f"{genre}.{n:05d}.wav")
    for genre in ("pop", "metal")
    for n in range(4)
]


def test_the_predecessors_data_split_is_read(tmp_path: Path) -> None:
    # layout of data_split.txt in csci467_music_genre_classification: names of spectrograms
    table = tmp_path / "data_split.txt"
    table.write_text(
        "train:\n['pop/pop00000.png', 'pop/pop00001.png', 'metal/metal00000.png']\n"
        "dev:\n['pop/pop00002.png', 'metal/metal00001.png']\n"
        "test:\n['metal/metal00002.png', 'pop/pop00003.png', 'pop/pop00099.png']\n"
    )
    assert splits.choose("auto", GTZAN_LIKE, table) == "table"
    kept, left_out = splits.split_table(GTZAN_LIKE, table)
    assert {t.id: t.split for t in kept} == {
        **dict.fromkeys(("pop_00000", "pop_00001", "metal_00000"), "train"),
        **dict.fromkeys(("pop_00002", "metal_00001"), "validation"),
        **dict.fromkeys(("pop_00003", "metal_00002"), "test"),
    }
    assert left_out == {"metal_00003": splits.NOT_NAMED, "pop/pop00099.png": splits.NOT_FOUND}
    table.write_text("train:\n[__import__('os').system('touch x')]\n")
    with pytest.raises(UserError, match="a list of quoted names"):
        splits.split_table(GTZAN_LIKE, table)


@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_a_table_of_splits_names_tracks_as_people_do(tmp_path: Path, delimiter: str) -> None:
    names = ["pop.00000", "pop.00001.wav", "pop_00002", "pop/pop.00003.wav", "metal/00000.wav"]
    found = [*GTZAN_LIKE[:4], track("metal_00000", "metal"), track("x1"), track("x2")]
    lines = [("track", "split")]
    lines += list(zip(names, ("train", "Val", "test", "dev", "training"), strict=True))
    table = tmp_path / "splits"
    table.write_text("\n".join(delimiter.join(line) for line in lines) + "\n")
    kept, left_out = splits.split_table(found, table)
    assert [t.split for t in kept] == ["train", "validation", "test", "validation", "train"]
    assert list(left_out) == ["x1", "x2"]


def test_tables_of_splits_that_do_not_say_one_thing_are_refused(tmp_path: Path) -> None:
    table = tmp_path / "splits.csv"
    numbered = [
        Track(id=f"{genre}_01", genre=genre, path=Path(f"{genre}/01.wav")) for genre in "ab"
    ]
    for text, message in (
        ("track,split\n01,train\n", "a name of a_01, b_01"),
        ("track,split\na/01.wav,train\na_01,test\n", "both train and test"),
        ("track,split\na_01,holdout\n", "got 'holdout'"),
        ("track,fold\na_01,1\n", "columns track, fold"),
        ("track,split\na_01,train\n", "got 1 train, 0 validation, 0 test"),
        ("track,split\na_01,train,more\n", "line 2 has not as many fields"),
    ):
        table.write_text(text)
        with pytest.raises(UserError, match=message):
            splits.split_table(numbered, table)
    with pytest.raises(UserError, match="--split-file FILE, or a --data table"):
        splits.split_table(numbered, None)
    with pytest.raises(UserError, match=r"--split-file.*got --split kfold"):
        splits.choose("kfold", numbered, table)
    with pytest.raises(UserError, match="No such file"):
        splits.split_table(numbered, tmp_path / "none")


def test_a_column_of_splits_is_taken_by_itself() -> None:
    found = [track("a", split="train"), track("b", split="validation"), track("c", split="test")]
    assert splits.choose("auto", found, None) == "table"
    assert splits.choose("stratified", found, None) == "stratified"
    kept, left_out = splits.split_table([*found, track("d")], None)
    assert kept == found
    assert left_out == {"d": splits.NOT_NAMED}


def test_an_exact_id_counts_before_its_letters(tmp_path: Path) -> None:
    found = [track("rock_1-11"), track("rock_11-1"), track("c")]
    table = tmp_path / "splits.csv"
    table.write_text("track,split\nrock_1-11,train\nrock_11-1,val\nc,test\n")
    kept, _ = splits.split_table(found, table)
    assert [t.split for t in kept] == ["train", "validation", "test"]
    table.write_text("track,split\nrock-111,train\nc,test\n")
    with pytest.raises(UserError, match="a name of rock_1-11, rock_11-1"):
        splits.split_table(found, table)


def test_a_new_rule_is_one_entry(
    tracks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but the entry is there: packing, manifest, card and report follow."""

    def deal(found, config):
        names = ("train", "validation", "test")
        return [
            replace(each, split=names[(number + config.folds) % 3])
            for number, each in enumerate(found)
        ]

    rule = splits.Rule(deal=deal, knobs=("folds",), files=("--split-file", "X"), by_artist=True)
    monkeypatch.setitem(splits.RULES, "in-turn", rule)
    shard.run(shard_config(tracks, tmp_path / "out", split="in-turn", folds=4, groups=None))
    found = manifest.read(tmp_path / "out")
    assert (found.settings["split"], found.settings["folds"]) == ("in-turn", 4)
    assert "seed" not in found.settings
    assert {each.split for each in found.tracks} == {"train", "validation", "test"}
    assert "- nothing known" in (tmp_path / "out" / card.NAME).read_text()
    command = making._shard_command("shards", found)
    assert "--split in-turn --folds 4 --split-file X" in command


def test_an_earlier_data_set_and_a_list_do_not_mix(tracks: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shard.run(shard_config(tracks, old, seed=9))
    with pytest.raises(UserError, match="splits from one source"):
        shard.run(shard_config(tracks, tmp_path / "new", split="fault-filtered", split_from=old))
    shard.run(shard_config(tracks, tmp_path / "new", seed=1, split_from=old))
    theirs = {each.id: each.split for each in manifest.read(old).tracks}
    found = manifest.read(tmp_path / "new")
    assert {each.id: each.split for each in found.tracks} == theirs
    command = making._shard_command("shards", found)
    assert f"--split-from {old}" in command
    other = shard_config(tracks, tmp_path / "other", seed=1)
    shard.run(other)
    assert {each.id: each.split for each in manifest.read(other.out).tracks} != theirs
    shard.run(replace(other, overwrite=True, split_from=old))
    assert {each.id: each.split for each in manifest.read(other.out).tracks} == theirs


def test_the_splits_of_a_data_set_are_a_table_for_the_next(
    tracks: Path, shards: Path, tmp_path: Path
) -> None:
    table = tmp_path / "splits.csv"
    shard.info(InfoConfig(shards=shards, splits=table))
    assert table.read_text().startswith("track,genre,group,split\nblues_00000,blues,")
    out = tmp_path / "out"
    shard.run(shard_config(tracks, out, seed=7, split_file=table))
    theirs, ours = (manifest.read(folder) for folder in (shards, out))
    assert ours.dataset_id == theirs.dataset_id


def test_small_genres_are_left_out_by_name(tracks: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tracks, tmp_path / "tracks"))
    (copy / "polka").mkdir()
    for number in (0, 1):
        source = copy / "blues" / f"blues.{number:05d}.wav"
        (copy / "polka" / f"p{number}.wav").write_bytes(source.read_bytes() + bytes(number))
    with pytest.raises(UserError, match=r"genre polka(?s:.*)--min-tracks 3 leaves out"):
        shard.run(shard_config(copy, tmp_path / "out"))
    shard.run(shard_config(copy, tmp_path / "out", min_tracks=3))
    found = manifest.read(tmp_path / "out")
    assert "polka" not in found.genres
    reason = "genre polka has 2 tracks, fewer than --min-tracks"
    assert found.excluded == {"polka_p0": reason, "polka_p1": reason}


def test_no_such_rule_is_refused_with_the_near_miss() -> None:
    with pytest.raises(UserError, match=r"--split: got kfolds, .*auto, .*\n.*mean kfold\?"):
        splits.choose("kfolds", GTZAN_LIKE, None)


def test_help_names_every_rule() -> None:
    command = [sys.executable, "-m", "mgc_dist.shard", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert [rule for rule in splits.RULES if f"`{rule}`" not in " ".join(shown.split())] == []


def test_splits_as_a_table_come_back_with_names_that_are_formulas(tmp_path: Path) -> None:
    found = [
        Track(id=f"a_{n}", genre="=1+1", path=Path(f"a_{n}.wav"), group="@x", split=split)
        for n, split in enumerate(("train", "validation", "test"))
    ]
    table = tmp_path / "splits.csv"
    table.write_text(splits.as_table(found))
    assert table.read_text().splitlines()[1] == "a_0,'=1+1,'@x,train"
    rows = [row for _, row in tables.read_table(table, "--split-file")]
    assert [(row["genre"], row["group"]) for row in rows] == [("=1+1", "@x")] * 3
