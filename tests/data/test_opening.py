"""A data set is checked once; what has changed since is checked again."""

import json
import os
import shutil
import threading
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

from mgc_dist.data import manifest, opening
from mgc_dist.data.reader import ShardSet
from mgc_dist.errors import UserError


def never(*_: object) -> None:
    raise AssertionError("the whole manifest is read")


@pytest.fixture
def known(copy: Path) -> Path:
    """A data set that has been opened before."""
    ShardSet(copy).close()
    return copy


def note_of(folder: Path) -> Path:
    (note,) = (folder / opening.FOLDER).glob("*.json")
    return note


def test_a_later_start_reads_no_names_until_they_are_asked_for(
    known: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, index = manifest.read(known), np.load(known / manifest.INDEX)
    monkeypatch.setattr(manifest, "read", never)
    monkeypatch.setattr(opening, "open_index", never)
    with ShardSet(known) as data:
        assert (data.index == index).all()
        assert isinstance(data.index, np.memmap)
        assert (data.manifest.splits, data.manifest.shards) == (whole.splits, whole.shards)
        assert data.manifest == whole  # its tracks, too
        assert data.keys()[0] == f"{whole.tracks[index['track'][0]].id}_{index['segment'][0]:02d}"


def test_a_label_that_changes_behind_its_times_is_found(known: Path) -> None:
    path = known / manifest.INDEX
    times = path.stat()
    index = np.load(path, mmap_mode="r+")
    index["label"][7] ^= 1
    index.flush()
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(UserError, match=r"index\.npy: got sha256"):
        ShardSet(known)


def test_a_manifest_that_changes_is_read_again(known: Path) -> None:
    path = known / manifest.NAME
    content = json.loads(path.read_text())
    path.write_text(manifest.sealed(content | {"versions": {"mgc_dist": "9"}}))
    with ShardSet(known) as data:
        assert data.manifest.versions == {"mgc_dist": "9"}
        path.write_text(manifest.sealed(content))
        with pytest.raises(UserError, match=r"manifest\.json: got another manifest"):
            len(data.manifest.tracks)
    path.write_text(path.read_text()[:-9])
    with pytest.raises(UserError, match="manifest"):
        ShardSet(known)


def test_a_note_from_elsewhere_is_not_believed(known: Path, tmp_path: Path) -> None:
    """A stranger's data set comes with a note that vouches for a forged index."""
    theirs = Path(shutil.copytree(known, tmp_path / "theirs"))
    index = np.load(theirs / manifest.INDEX)
    index["label"][:] = 0
    np.save(theirs / manifest.INDEX, index)
    note = json.loads(note_of(theirs).read_text())
    ours = opening._note(theirs)
    note_of(theirs).rename(ours)
    hashed = opening.fingerprint(theirs / manifest.INDEX)
    for name in (manifest.NAME, manifest.INDEX):
        note["of"][name] = note["of"][name].rsplit(" ", 1)[0] + f" {hashed}"
    ours.write_text(json.dumps(note))
    with pytest.raises(UserError, match=r"index\.npy: got sha256"):
        ShardSet(theirs)


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"of": 1}'])
def test_a_damaged_note_is_made_again(known: Path, text: str) -> None:
    good = note_of(known).read_text()
    note_of(known).write_text(text)
    with ShardSet(known) as data:
        assert len(data.manifest.tracks) == 18
    assert note_of(known).read_text() == good


def test_a_folder_that_cannot_be_written_to_opens(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (copy / opening.FOLDER).write_text("")  # no folder can be made here, not even by root
    for _ in range(2):
        with ShardSet(copy) as data:
            assert len(data.manifest.tracks) == 18


def test_ranks_that_open_at_once_check_it_once(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, calls = manifest.read, []

    def counted(folder: Path) -> manifest.Manifest:
        calls.append(folder)
        return read(folder)

    monkeypatch.setattr(manifest, "read", counted)
    threads = [threading.Thread(target=lambda: ShardSet(copy).close()) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [copy]


def test_a_folder_without_a_data_set_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no manifest\.json"):
        ShardSet(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_shard_that_nobody_keeps_stays_open_while_it_is_read(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two threads may open a shard at once; the cache keeps one of the two files."""
    with ShardSet(shards) as opened:
        expected = opened.read(0)
        monkeypatch.setattr(opened, "_opened", lru_cache(0)(opened._open))
        assert (opened.read(0) == expected).all()
