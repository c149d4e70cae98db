"""The walk and what is judged from it: the same digits at any world size, every row once."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build_tiny, run_ranks

from mgc_dist.cluster import ranks
from mgc_dist.data.reader import ShardSet
from mgc_dist.encoders.hub import normalise
from mgc_dist.models.classifier import WaveClassifier
from mgc_dist.scoring import walk as infer
from mgc_dist.scoring.score import SplitScores, all_score, judge


def classifier(tiny_model: Path) -> WaveClassifier:
    return build_tiny(tiny_model).eval()


def walk(shards: Path, tiny_model: Path) -> tuple[bytes, SplitScores]:
    net = classifier(tiny_model)
    with ShardSet(shards) as data, ranks.join("cpu") as peers:
        found = infer.all_rows(net, data, "test", peers, batch=8, width=3)
        return found.tobytes(), all_score(net, data, "test", peers, batch=8)


def test_same_digits_at_any_world_size(shards: Path, tiny_model: Path) -> None:
    found = [result for world in (1, 2, 3) for result in run_ranks(world, walk, shards, tiny_model)]
    assert len(found) == 6
    assert len({digits for digits, _ in found}) == 1
    assert len({(s.track.accuracy, s.track.nll, s.segment.nll) for _, s in found}) == 1


def test_outputs_are_each_rows_own(shards: Path, tiny_model: Path) -> None:
    digits, _ = run_ranks(2, walk, shards, tiny_model)[0]
    found = np.frombuffer(digits, np.float32).reshape(-1, 3)
    net = classifier(tiny_model)
    with ShardSet(shards) as data, torch.no_grad():
        first, stop = data.rows_of("test")
        assert len(found) == stop - first
        for row in range(first, stop, 13):
            alone = net(torch.from_numpy(data.read(row).copy())[None])[0].numpy()
            assert found[row - first] == pytest.approx(alone, abs=1e-5)


def walk_with_a_lost_batch(shards: Path) -> None:
    sweep = infer.sweep_batches

    def lossy(*args):
        batches = list(sweep(*args))
        if args[3] == 1:
            batches[0].place[:] = -1
        return iter(batches)

    infer.sweep_batches = lossy
    with ShardSet(shards) as data, ranks.join("cpu") as peers:
        infer.all_rows(lambda w: normalise(w)[:, :3], data, "test", peers, batch=8, width=3)


def test_a_row_that_is_lost_is_an_error_on_every_rank(shards: Path) -> None:
    with pytest.raises(RuntimeError, match="row 140 was visited 0 times"):
        run_ranks(2, walk_with_a_lost_batch, shards)


def test_tracks_are_judged_by_their_own_rows() -> None:
    logits = np.log(np.array([[0.9, 0.1], [0.1, 0.9], [0.2, 0.8], [0.6, 0.4]], np.float32))
    found = judge(logits, np.array([0, 1, 0, 1]), np.array([5, 3, 5, 3]), "test")
    assert found.tracks.tolist() == [3, 5]
    assert found.labels.tolist() == [1, 0]
    assert found.probabilities == pytest.approx(np.array([[0.35, 0.65], [0.55, 0.45]]), abs=1e-6)
    assert found.track.accuracy == 1.0
    assert found.segment.accuracy == 0.5


def walk_some(shards: Path, tiny_model: Path, at_once: int) -> dict[int, bytes]:
    net, found = classifier(tiny_model), {}
    with ShardSet(shards) as data, ranks.join("cpu") as peers:
        first, _ = data.rows_of("test")
        for group in infer.all_batches(
            net, data, "test", peers, batch=8, numbers=[0, 3, 4, 7, 8], at_once=at_once
        ):
            assert len(group) <= max(at_once, peers.world)
            for batch in group:
                assert batch.first == first + 8 * batch.number
                found[batch.number] = batch.values.tobytes()
    return found


def test_a_walk_over_some_batches_gives_the_whole_walks_digits(
    shards: Path, tiny_model: Path
) -> None:
    whole = np.frombuffer(run_ranks(1, walk, shards, tiny_model)[0][0], np.float32).reshape(-1, 3)
    for world, at_once in ((1, 2), (2, 2), (2, 1), (3, 16)):
        found = run_ranks(world, walk_some, shards, tiny_model, at_once)[world - 1]
        assert sorted(found) == [0, 3, 4, 7, 8]
        for number, digits in found.items():
            assert digits == whole[8 * number : 8 * number + 8].tobytes()


def sizes_of_batches(shards: Path) -> set[int]:
    seen = set()

    def forward(wave: torch.Tensor) -> torch.Tensor:
        seen.add(len(wave))
        return normalise(wave)[:, :3]

    with ShardSet(shards) as data, ranks.join("cpu") as peers:
        infer.all_rows(forward, data, "test", peers, batch=1000, width=3)
    return seen


def test_a_batch_is_never_larger_than_the_split(shards: Path) -> None:
    """Padding would be computed like rows: 32 rows of a large model where there are six."""
    assert run_ranks(1, sizes_of_batches, shards) == [{66}]
