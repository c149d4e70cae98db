"""Reading: every byte checked, in the planned order, errors that name the place."""

import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mgc_dist.data import manifest, record
from mgc_dist.data.order import Plan, lay_out, sweep_batches, training_batches
from mgc_dist.data.reader import Reader, ShardSet
from mgc_dist.errors import UserError
from mgc_dist.files import sha256


def test_batches_hold_the_planned_rows(shards: Path) -> None:
    plan = Plan(rows=66, total=100, global_batch=7, seed=2)
    layout = lay_out(global_batch=7, world=2, largest_micro_batch=2)
    with ShardSet(shards) as data:
        planned = list(training_batches(plan, layout, 1, 0))
        with Reader(data, "train", planned, read_ahead=2, pin=False) as reader:
            batches = list(reader)
        assert len(batches) == len(planned) == 15 * layout.accumulation
        for batch, micro in zip(batches, planned, strict=True):
            assert batch.row.tolist() == micro.place.tolist()
            assert batch.weight.tolist() == [float(p >= 0) for p in micro.place]
            for row, label, wave in zip(batch.row, batch.label, batch.input, strict=True):
                expected = data.read(int(row)) if row >= 0 else np.zeros(8000, np.int16)
                assert (wave.numpy() == expected).all()
                assert int(label) == (data.labels[row] if row >= 0 else 0)


def test_validation_rows_begin_behind_the_training_rows(shards: Path) -> None:
    with ShardSet(shards) as data:
        plan = sweep_batches(66, 32, 1, 0)
        with Reader(data, "validation", plan, read_ahead=1, pin=False) as reader:
            rows = [int(row) for batch in reader for row in batch.row if row >= 0]
    assert rows == list(range(66, 132))


def test_leaving_early_ends_the_thread(shards: Path) -> None:
    before = threading.active_count()
    with ShardSet(shards) as data:
        plan = sweep_batches(66, 1, 1, 0)
        with Reader(data, "train", plan, read_ahead=2, pin=False) as reader:
            next(iter(reader))
    assert threading.active_count() == before


def flip(path: Path, offset: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << bit
    path.write_bytes(content)


SIZE = record.record_bytes(8000)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(offset=st.integers(0, SIZE - 1), bit=st.integers(0, 7), place=st.integers(0, 19))
def test_any_flipped_bit_of_a_record_is_found(
    copy: Path, offset: int, bit: int, place: int
) -> None:
    path = copy / "train-000001.tar"
    flip(path, place * SIZE + offset, bit)
    try:
        with ShardSet(copy) as data:
            row = 20 + place
            with pytest.raises(UserError) as caught:
                data.read(row)
            entry = data.index[row]
            key = f"{data.manifest.tracks[entry['track']].id}_{entry['segment']:02d}"
            for word in ("train-000001.tar", key, f"offset {place * SIZE}", f"row {row}"):
                assert word in str(caught.value)
    finally:
        flip(path, place * SIZE + offset, bit)


def test_damage_reaches_the_loop_and_is_never_skipped(copy: Path) -> None:
    flip(copy / "train-000002.tar", 5000, 3)
    with ShardSet(copy) as data:
        plan = sweep_batches(66, 4, 1, 0)
        with (
            Reader(data, "train", plan, read_ahead=2, pin=False) as reader,
            pytest.raises(UserError, match=r"train-000002\.tar"),
        ):
            list(reader)


def test_a_passing_fault_is_healed_by_one_more_read(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ShardSet(shards) as data:
        good = data.read(3)
        preadv, calls = os.preadv, iter(range(10))

        def faulty(handle: int, parts: record.Parts, offset: int) -> int:
            count = preadv(handle, parts, offset)
            if next(calls) == 0:
                parts[1][7] ^= 1
            return count

        monkeypatch.setattr(os, "preadv", faulty)
        assert (data.read(3) == good).all()
        assert next(calls) == 2


@pytest.mark.parametrize("cut", [SIZE, SIZE + 100, SIZE + 700, SIZE + 3000])
def test_cut_missing_and_swapped_shards_are_refused(copy: Path, cut: int) -> None:
    path = copy / "train-000000.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    with pytest.raises(UserError, match=rf"train-000000\.tar: got {cut} bytes"):
        ShardSet(copy)
    path.unlink()
    with pytest.raises(UserError, match=r"train-000000\.tar: got no such file"):
        ShardSet(copy)
    shutil.copy(copy / "train-000001.tar", path)  # the same size, other content
    with ShardSet(copy) as data, pytest.raises(UserError, match="damaged record"):
        data.read(0)


def test_an_index_that_does_not_belong_is_refused(copy: Path) -> None:
    index = np.load(copy / "index.npy")
    np.save(copy / "index.npy", index[::-1])
    with pytest.raises(UserError, match=r"index\.npy"):
        ShardSet(copy)
    np.save(copy / "index.npy", np.array([{"evil": 1}]), allow_pickle=True)
    with pytest.raises(UserError, match=r"index\.npy"):
        ShardSet(copy)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_neither_order_nor_content(shards: Path, threads: int) -> None:
    plan = Plan(
        rows=66, total=200, global_batch=8, seed=2, window_shards=2, shard_rows=(20, 20, 20, 6)
    )
    layout = lay_out(global_batch=8, world=1, largest_micro_batch=3)
    with ShardSet(shards) as data:
        planned = list(training_batches(plan, layout, 0, 0))
        with Reader(data, "train", planned, read_ahead=3, pin=False, threads=threads) as reader:
            for batch, micro in zip(reader, planned, strict=True):
                assert batch.plan is micro
                for place, wave in zip(micro.place.tolist(), batch.input.numpy(), strict=True):
                    expected = data.read(place) if place >= 0 else np.zeros(8000, np.int16)
                    assert (wave == expected).all()
        assert data.shard_rows_of("train") == (20, 20, 20, 6)
        assert data.shard_rows_of("test") == (20, 20, 20, 6)


def test_a_batch_that_is_kept_is_never_overwritten(shards: Path) -> None:
    with ShardSet(shards) as data:
        batches = sweep_batches(66, 4, 1, 0)
        with Reader(data, "train", batches, read_ahead=2, pin=False) as reader:
            views, addresses = [], set()
            for batch in reader:
                addresses.add(batch.input.data_ptr())
                if len(views) < 5:
                    views.append((batch.row, batch.input[1:3]))  # part of the tensor is enough
        assert len(addresses) < 12  # of 17 batches: buffers come back
        for row, wave in views:
            assert all((data.read(int(row[k + 1])) == wave[k].numpy()).all() for k in (0, 1))


BOUNDED = """
import resource, sys
from pathlib import Path
from mgc_dist.data.reader import Reader, ShardSet
from mgc_dist.data.order import sweep_batches

def used():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmData")).split()[1]) * 1024

with ShardSet(Path(sys.argv[1])) as data:
    def walk(times):
        for _ in range(times):
            plan = sweep_batches(66, 8, 1, 0)
            with Reader(data, "train", plan, read_ahead=4, pin=False) as reader:
                for batch in reader:
                    pass
    walk(10)
    # (read_ahead + 2) batches; stacks of threads, 8 MiB each, of which glibc keeps up to 40 MiB
    # when they have ended, while the next ones start; 16 heaps of malloc, one a thread
    bound = (4 + 2) * 8 * 2 * 8000 + (40 << 20) + 4 * (8 << 20) + 16 * (2 << 20)
    resource.setrlimit(resource.RLIMIT_DATA, (used() + bound,) * 2)
    walk(600)  # six times as much through that
    try:
        kept = [bytearray(1 << 20) for _ in range(128)]
    except MemoryError:
        print("the limit holds")
"""


def test_memory_does_not_grow_with_the_data(shards: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BOUNDED, str(shards)], capture_output=True, text=True
    )
    assert done.stdout == "the limit holds\n", done.stderr


def write_index(folder: Path, index: np.ndarray) -> None:
    np.save(folder / "index.npy", index)
    found = manifest.read(folder)
    manifest.write(folder, replace(found, index_sha256=sha256(folder / "index.npy")))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("shard", lambda i: i.__setitem__(3, 2), "shard 2 of row 3, expected shard 0"),
        ("offset", lambda i: i.__setitem__(3, 5), "offset 5 of row 3"),
        ("wave_offset", lambda i: i.__setitem__(3, 5), "wave_offset 5 of row 3"),
        ("wave_bytes", lambda i: i.__setitem__(3, 2**31), "wave_bytes 2147483648 of row 3"),
        ("record_bytes", lambda i: i.__setitem__(3, 2**31), "record_bytes 2147483648 of row 3"),
        ("label", lambda i: i.__setitem__(3, (i[3] + 1) % 3), "label . of row 3, expected label"),
        ("track", lambda i: i.__setitem__(3, 10**6), "track 1000000 of row 3"),
        ("segment", lambda i: i.__setitem__(3, 99), "segment 99 of row 3"),
    ],
)
def test_an_index_that_packing_would_not_write_is_refused(
    copy: Path, name: str, change: object, message: str
) -> None:
    index = np.load(copy / "index.npy")
    change(index[name])
    write_index(copy, index)
    with pytest.raises(UserError, match=message):
        ShardSet(copy)


def test_rows_that_leak_or_repeat_are_refused(copy: Path) -> None:
    whole = np.load(copy / "index.npy")
    index = whole.copy()
    fields = ["label", "track", "segment"]
    for name in fields:  # a validation row's segment among the training rows
        index[name][0] = whole[name][100]
    write_index(copy, index)
    with pytest.raises(UserError, match=r"track .* of row 0, expected track of the split"):
        ShardSet(copy)
    index = whole.copy()
    for name in fields:
        index[name][0] = whole[name][1]
    write_index(copy, index)
    with pytest.raises(UserError, match=r"number of rows of key \w+ [02] "):
        ShardSet(copy)


def test_a_shard_of_another_length_is_refused_even_if_the_manifest_vouches(copy: Path) -> None:
    path = copy / "train-000003.tar"
    path.write_bytes(path.read_bytes()[: 5 * SIZE])
    found = manifest.read(copy)
    entries = tuple(replace(e, bytes=5 * SIZE) if e.name == path.name else e for e in found.shards)
    manifest.write(copy, replace(found, shards=entries))
    with pytest.raises(UserError, match=rf"train-000003\.tar: got {5 * SIZE} bytes"):
        ShardSet(copy)


def test_the_index_of_another_data_set_is_refused(copy: Path, shards: Path) -> None:
    index = np.load(shards / "index.npy")
    index["checksum"] += 1
    np.save(copy / "index.npy", index)
    with pytest.raises(UserError, match=r"index\.npy: got sha256"):
        ShardSet(copy)


LIMITED = """
import os, resource, sys
from pathlib import Path
from mgc_dist import files
from mgc_dist.data import reader as data
files._OTHER_FILES = 30
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]), int(sys.argv[3])))
with data.ShardSet(Path(sys.argv[1])) as shards:
    before = len(os.listdir("/proc/self/fd"))
    rows = [shards.read(row).tobytes() for row in range(0, 198, 7)]
    print(len(set(rows)), len(os.listdir("/proc/self/fd")) - before)
"""


def test_more_shards_than_open_files(shards: Path) -> None:
    def run(soft: int, hard: int) -> str:
        command = [sys.executable, "-c", LIMITED, str(shards), str(soft), str(hard)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert run(40, 100) == "29 12\n"  # 12 shards and 30 others need 42
    assert run(36, 36) == "29 6\n"


def test_a_shard_is_opened_when_it_is_read_first(copy: Path) -> None:
    with ShardSet(copy) as data:
        before = len(os.listdir("/proc/self/fd"))
        data.read(0)
        assert len(os.listdir("/proc/self/fd")) == before + 1
        (copy / "train-000001.tar").unlink()
        with pytest.raises(UserError, match=r"train-000001\.tar: got no such file"):
            data.read(20)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_failed_opening_leaves_no_file_open(copy: Path) -> None:
    (copy / "test-000003.tar").unlink()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(UserError, match=r"test-000003\.tar: got no such file"):
        ShardSet(copy)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_reader_that_was_left_does_not_end_in_silence(shards: Path) -> None:
    with ShardSet(shards) as data:
        plan = sweep_batches(66, 8, 1, 0)
        with Reader(data, "train", plan, read_ahead=2, pin=False) as reader:
            batches = iter(reader)
            next(batches)
        with pytest.raises(RuntimeError, match="with batches still to come"):
            next(batches)
