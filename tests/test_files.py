"""Files: whole or not there."""

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from mgc_dist import files
from mgc_dist.errors import UserError


def write_half(path: Path) -> None:
    with files.replacing(path) as file:
        file.write(b"new")
        raise RuntimeError("half-way")


def test_a_failed_write_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    files.replace_text(path, "old ü")
    with pytest.raises(RuntimeError, match="half-way"):
        write_half(path)
    assert path.read_text(encoding="utf-8") == "old ü"
    with files.replacing(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.json"]


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "x[1].json"
    with files.replacing(path) as one:
        one.write(b"one")
        writer = multiprocessing.get_context("fork").Process(
            target=files.replace_text, args=(path, "other")
        )
        writer.start()
        writer.join()
        assert path.read_bytes() == b"other"
    assert path.read_bytes() == b"one"
    assert [each.name for each in tmp_path.iterdir()] == ["x[1].json"]


def killed_midway(path: Path) -> None:
    with files.replacing(path) as file:
        file.write(b"half")
        os._exit(0)


def test_what_a_kill_leaves_is_removed_by_the_next_writer(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    writer = multiprocessing.get_context("fork").Process(target=killed_midway, args=(path,))
    writer.start()
    writer.join()
    assert [each.suffix for each in tmp_path.iterdir()] == [".tmp"]
    files.replace_text(path, "whole")
    assert [each.name for each in tmp_path.iterdir()] == ["x.json"]


def fill_half(folder: Path) -> None:
    with files.replacing_folder(folder) as aside:
        (aside / "b").touch()
        raise RuntimeError("half-way")


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    with files.replacing_folder(folder) as aside:
        (aside / "a").touch()
    with pytest.raises(RuntimeError, match="half-way"):
        fill_half(folder)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "x"]
    with files.replacing_folder(folder) as aside:
        (aside / "c").touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["c", "x"]


def test_sha256_of_the_standards_example(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")  # FIPS 180-4's example
    assert files.sha256(tmp_path / "abc").startswith("ba7816bf8f01cfea414140de5dae2223")
    files.sync(tmp_path / "abc")
    files.sync(tmp_path)


def test_write_at_names_the_file_when_the_disk_refuses(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"0123456789")
    with path.open("r+b", buffering=0) as file:
        files.write_at(file, 3, memoryview(b"abc"))
    assert path.read_bytes() == b"012abc6789"
    with (
        Path("/dev/full").open("r+b", buffering=0) as file,
        pytest.raises(OSError, match="No space left") as caught,
    ):
        files.write_at(file, 0, b"x")
    assert caught.value.filename == "/dev/full"


def hold(path: Path, seconds: float) -> None:
    with files.locked(path, wait_s=0, purpose="holding"):
        path.with_suffix(".held").touch()
        time.sleep(seconds)


def test_a_lock_waits_with_a_limit_and_ends_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    holder = multiprocessing.get_context("fork").Process(target=hold, args=(path, 60))
    holder.start()
    while not path.with_suffix(".held").exists():
        time.sleep(0.01)
    with (
        pytest.raises(UserError, match=r"copying: got another process at it for more than 0.2 s"),
        files.locked(path, wait_s=0.2, purpose="copying"),
    ):
        pass
    holder.kill()
    with files.locked(path, wait_s=10, purpose="copying"):
        pass
    holder.join()


def test_a_lock_that_its_holder_removed_is_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    with files.locked(path, wait_s=0, purpose="a"):
        stale = os.open(path, os.O_RDWR)  # as a process that waits has it open
        path.unlink()
    with files.locked(path, wait_s=0, purpose="b"):
        assert os.fstat(stale).st_ino != path.stat().st_ino
        with (
            pytest.raises(UserError, match="c: got another process"),
            files.locked(path, wait_s=0, purpose="c"),
        ):
            pass
    os.close(stale)


def test_a_stamp_tells_files_of_one_size_and_time_apart(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(name.encode())
        os.utime(tmp_path / name, (1, 1))
    assert files.stamp_of(tmp_path / "a") != files.stamp_of(tmp_path / "b")
    before = files.stamp_of(tmp_path / "a")
    assert files.stamp_of(tmp_path / "a") == before
    (tmp_path / "a").write_bytes(b"c")
    os.utime(tmp_path / "a", (1, 1))
    assert files.stamp_of(tmp_path / "a") != before


def test_lines_of_json_end_at_line_feeds_only_and_a_cut_one_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    assert files.json_lines(path) == []
    path.write_text('{"genre": "a\u2028b"}\n[1]\n{"n": 2}\n{"n": ', encoding="utf-8")
    assert files.json_lines(path) == [{"genre": "a\u2028b"}, {"n": 2}]
