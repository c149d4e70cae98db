"""The benchmark of the data plane: that it finds what it looks for."""

import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import dataplane  # noqa: E402


def test_worlds_read_the_same_rows(shards: Path) -> None:
    alone = dataplane.read_as(1, shards, 16)
    assert sorted(np.concatenate(alone["steps"]).tolist()) == list(range(66))
    for world in (3, 16):
        read = dataplane.read_as(world, shards, 16)
        dataplane.refuse_wrong(world, read, alone)
        assert sum(read["bytes"]) == sum(alone["bytes"])
        found = dataplane.summary(read)
        assert found["steps"] == 5
        assert found["mb_a_rank"]["min"] <= found["mb_a_rank"]["max"]


def test_what_is_wrong_ends_it(shards: Path) -> None:
    alone, read = dataplane.read_as(1, shards, 16), dataplane.read_as(2, shards, 16)
    repeated = read | {"steps": [read["steps"][0], *read["steps"][:-1]]}
    with pytest.raises(SystemExit, match=r"2 ranks: .* rows read, .* different"):
        dataplane.refuse_wrong(2, repeated, alone)
    moved = read | {"steps": [read["steps"][1], read["steps"][0], *read["steps"][2:]]}
    with pytest.raises(SystemExit, match="2 ranks: step 0 has other rows"):
        dataplane.refuse_wrong(2, moved, alone)
    with pytest.raises(SystemExit, match="2 ranks: micro batches from"):
        dataplane.refuse_wrong(2, read | {"micro_batches": [5, 6]}, alone)
