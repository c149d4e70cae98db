"""Reading: every byte checked, in the planned order, errors that name the place."""

import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mgc_dist import record
from mgc_dist.data import Reader, ShardSet
from mgc_dist.errors import UserError
from mgc_dist.plan import Plan, lay_out, sweep_batches, training_batches


@pytest.fixture
def copy(shards: Path, tmp_path: Path) -> Path:
    """A copy of the shards that may be damaged."""
    out = tmp_path / "copy"
    out.mkdir()
    for path in shards.iterdir():
        if path.is_file():
            shutil.copy(path, out)
    return out


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
            for row, label, wave in zip(batch.row, batch.label, batch.wave, strict=True):
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
        pread, calls = data._pread, iter(range(10))

        def faulty(entry: np.void) -> bytes:
            content = pread(entry)
            return content[:-1] + b"x" if next(calls) == 0 else content

        monkeypatch.setattr(data, "_pread", faulty)
        assert (data.read(3) == good).all()


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
