"""The benchmark of size: its data set is one that opens, and each part does its work."""

import sys
from pathlib import Path

import numpy as np
import pytest

from mgc_dist.data.reader import ShardSet

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import scale  # noqa: E402


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> scale.Made:
    """1,000 tracks, 19,000 rows."""
    folder = tmp_path_factory.mktemp("scale")
    made = scale.Made(folder=folder, tracks=1000, segments=19, rows_per_shard=512)
    facts = scale.make(made)
    assert (facts["rows"], facts["shards"]) == (19_000, 38)
    return made


def test_the_data_set_is_whole_and_holds_no_audio(made: scale.Made) -> None:
    with ShardSet(made.folder) as shards:
        assert [shards.manifest.splits[name][1] for name in ("train", "test")] == [15_200, 19_000]
        assert not shards.read(18_999).any()
    blocks = [path.stat().st_blocks for path in made.folder.glob("*.tar")]
    assert sum(blocks) * 512 < 1e6


def test_every_part_does_its_work(made: scale.Made) -> None:
    done = {name: scale.PARTS[name](made)() for name in scale.PARTS}
    assert len(done["plan"]) == scale.STEPS
    rows = np.concatenate([micro.place for micro in done["plan"]])
    assert len(set(rows[:15_200].tolist())) == 15_200  # an epoch
    assert done["first_batch"].input.shape == (32, scale.SAMPLES)
    assert done["evaluate"]["track"]["count"] == 100
    assert 0 < done["pack_plan"] < 2000  # bytes, however many tracks there are
    assert len(done["identity"]) == 64
    assert done["bias"].log_probability.shape == (19_000, scale.GENRES)
    done["open"].close()
    done["first_open"].close()


def test_a_part_is_measured_in_a_process_of_its_own(made: scale.Made) -> None:
    found = scale.measured("open", made)
    assert found["open_s"] > 0
    assert 0 < found["open_mib"] < 100
