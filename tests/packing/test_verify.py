"""`shard verify`: a whole data set passes, and no kind of damage does."""

import gzip
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mgc_dist import shard
from mgc_dist.config import VerifyConfig
from mgc_dist.data import manifest, record
from mgc_dist.errors import UserError
from mgc_dist.files import sha256

SIZE = record.record_bytes(8000)


def verify(folder: Path, jobs: int = 1) -> None:
    shard.verify(VerifyConfig(shards=folder, jobs=jobs))


def vouch(folder: Path, name: str) -> None:
    """Give a changed shard the size and hash in the manifest that it has: a forged copy."""
    found, path = manifest.read(folder), folder / name
    entries = tuple(
        replace(e, sha256=sha256(path), bytes=path.stat().st_size) if e.name == name else e
        for e in found.shards
    )
    manifest.write(folder, replace(found, shards=entries))


def change(path: Path, offset: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(content)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_whole_data_set_passes(
    shards: Path, jobs: int, capsys: pytest.CaptureFixture[str]
) -> None:
    verify(shards, jobs)
    assert "198 segments in 12 shards are as they were packed" in capsys.readouterr().out


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 0.9999999), bit=st.integers(0, 7))
def test_any_flipped_bit_of_an_archive_is_found(copy: Path, where: float, bit: int) -> None:
    path = copy / "test-000003.tar"  # 6 rows
    whole = path.read_bytes()
    offset = int(where * len(whole))
    change(path, offset, bytes([whole[offset] ^ (1 << bit)]))
    place = offset // SIZE
    expected = f"offset {place * SIZE}" if place < 6 else f"archive tail: got byte .* at {offset}"
    try:
        with pytest.raises(UserError, match=rf"(?s)test-000003\.tar.*{expected}"):
            verify(copy)
    finally:
        path.write_bytes(whole)


def swap(folder: Path) -> None:
    one, two = folder / "train-000000.tar", folder / "train-000001.tar"
    one.rename(folder / "x")
    two.rename(one)
    (folder / "x").rename(two)


def compress(folder: Path) -> None:
    path = folder / "train-000001.tar"
    path.write_bytes(gzip.compress(path.read_bytes()))


def cut(bytes_: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "train-000001.tar"
        path.write_bytes(path.read_bytes()[:bytes_])

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (swap, r"train-000000\.tar, key .*, offset 0: got .* expected"),
        (compress, r"train-000001\.tar: got \d+ bytes, expected"),
        (cut(SIZE), rf"train-000001\.tar: got {SIZE} bytes, expected"),
        (cut(SIZE + 100), rf"got {SIZE + 100} bytes"),
        (cut(SIZE + 5000), rf"got {SIZE + 5000} bytes"),
        (cut(20 * SIZE), rf"got {20 * SIZE} bytes"),  # all records, no end of archive
        (lambda f: (f / "train-000001.tar").unlink(), r"train-000001\.tar: got no such file"),
        (lambda f: shutil.copy(f / "train-000000.tar", f / "x.tar"), r"x\.tar: not in the man"),
    ],
)
def test_damaged_shards_are_named(copy: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(copy)
    with pytest.raises(UserError, match=message):
        verify(copy)


def member(kind: bytes, name: str = "blues_00000_00.wav", link: str = "") -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info.tobuf(tarfile.GNU_FORMAT)


def sparse() -> bytes:
    """A GNU sparse header that claims 3 GB."""
    block = bytearray(tarfile.TarInfo("sparse.wav").tobuf(tarfile.GNU_FORMAT))
    block[156:157] = b"S"
    block[124:136] = b"00000000000\0"
    block[386:398], block[398:410] = b"%011o\0" % (3 << 30), b"%011o\0" % 0
    block[482] = 0
    block[483:495] = b"%011o\0" % (3 << 30)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    "header",
    [
        sparse(),
        member(tarfile.SYMTYPE, link="/etc/passwd"),
        member(tarfile.LNKTYPE, link="/etc/passwd"),
        member(tarfile.FIFOTYPE),
        member(tarfile.REGTYPE, name="../../etc/x.wav"),
        member(tarfile.REGTYPE, name="x.pyd"),
    ],
)
def test_hostile_members_are_refused_even_if_the_manifest_vouches(
    copy: Path, header: bytes
) -> None:
    # with right sha256 and checksum nothing but the headers themselves can tell
    path = copy / "train-000001.tar"
    change(path, 2 * SIZE + record.BLOCK + record.JSON_BYTES, header)
    vouch(copy, path.name)
    index = np.load(copy / "index.npy")
    index["checksum"][22] = record.checksum(path.read_bytes()[2 * SIZE : 3 * SIZE])
    write_index(copy, index)
    with pytest.raises(UserError, match=rf"tar header at {2 * SIZE + 1024}: got .* expected"):
        verify(copy)


def write_index(folder: Path, index: np.ndarray) -> None:
    np.save(folder / "index.npy", index)
    found = manifest.read(folder)
    manifest.write(folder, replace(found, index_sha256=sha256(folder / "index.npy")))


def test_a_forged_description_or_group_is_found(copy: Path) -> None:
    found = manifest.read(copy)
    tracks = tuple(replace(t, group=f"{t.group}!") for t in found.tracks)
    manifest.write(copy, replace(found, tracks=tracks))
    with pytest.raises(UserError, match=r"headers and description differ from the manifest's"):
        verify(copy)
    manifest.write(copy, replace(found, dataset_id="0" * 64))
    with pytest.raises(UserError, match=r"got dataset_id 0{64}, expected"):
        verify(copy)


def test_all_faults_are_listed_and_many_are_counted(copy: Path) -> None:
    for row in range(15):
        change(copy / "train-000000.tar", row * SIZE + 9000, b"\1\2\3")
        change(copy / "train-000002.tar", row * SIZE + 9000, b"\1\2\3")
    with pytest.raises(UserError, match=r"(?s)got 32 faults.*train-000000.*and 12 more"):
        verify(copy)


def test_it_does_not_run_what_a_member_holds(copy: Path, tmp_path: Path) -> None:
    bomb = io.BytesIO()
    with tarfile.open(fileobj=bomb, mode="w") as tar:
        info = tarfile.TarInfo("a.pyd")
        payload = b"cos\nsystem\n(S'touch " + str(tmp_path / "PWNED").encode() + b"'\ntR."
        info.size = len(payload)
        tar.addfile(info, io.BytesIO(payload))
    path = copy / "train-000001.tar"
    path.write_bytes(bomb.getvalue().ljust(path.stat().st_size, b"\0"))
    vouch(copy, path.name)
    with pytest.raises(UserError, match=r"train-000001\.tar"):
        verify(copy)
    assert not (tmp_path / "PWNED").exists()


def test_manifest_cut_at_any_byte(copy: Path) -> None:
    path = copy / "manifest.json"
    whole = path.read_bytes()
    assert json.loads(whole)
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="manifest"):
            verify(copy)


def test_a_folder_may_be_called_anything(shards: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(shards, tmp_path / "v#1 ?x%20{0..3}"))
    verify(folder)


def test_a_flipped_bit_of_the_manifest_is_found(copy: Path) -> None:
    path = copy / "manifest.json"
    whole = path.read_bytes()
    for offset in range(3, len(whole) - 3, 211):
        change(path, offset, bytes([whole[offset] ^ 1]))
        with pytest.raises(UserError, match="manifest"):
            manifest.read(copy)
        path.write_bytes(whole)
