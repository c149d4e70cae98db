"""Files: whole or not there."""

from pathlib import Path

import pytest

from mgc_dist import files


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


def test_sha256_of_the_standards_example(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")  # FIPS 180-4's example
    assert files.sha256(tmp_path / "abc").startswith("ba7816bf8f01cfea414140de5dae2223")
    files.sync(tmp_path / "abc")
    files.sync(tmp_path)
