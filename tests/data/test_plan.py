"""The order: a bijection, every row once per epoch at any layout, resumable from one integer."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgc_dist.data.order import (
    Layout,
    Plan,
    bijection,
    key_of,
    lay_out,
    sweep_batches,
    training_batches,
)
from mgc_dist.errors import UserError


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_bijection_visits_everything_once(size: int, key: int) -> None:
    assert sorted(bijection(np.arange(size), size, key)) == list(range(size))


def test_golden_vectors_freeze_the_order() -> None:
    # a change here changes every run: raise ORDER_VERSION and write it into docs/log.md
    assert bijection(np.arange(10), 10, 42).tolist() == GOLDEN_TEN
    assert key_of(1, 0, 0) == GOLDEN_KEY
    places = Plan(rows=5399, total=10798, global_batch=64, seed=7).places(np.arange(10798))
    assert hashlib.sha256(places.astype("<i8").tobytes()).hexdigest()[:16] == GOLDEN_PLAN


GOLDEN_TEN = [8, 6, 2, 4, 0, 5, 3, 7, 9, 1]
GOLDEN_KEY = 10796231123306858631
GOLDEN_PLAN = "9e77053b385fe482"


def test_order_differs_between_epochs_and_seeds() -> None:
    first = Plan(rows=1000, total=3000, global_batch=10, seed=0).places(np.arange(3000))
    other = Plan(rows=1000, total=3000, global_batch=10, seed=1).places(np.arange(3000))
    epochs = first.reshape(3, 1000)
    for a, b in ((epochs[0], epochs[1]), (epochs[1], epochs[2]), (epochs[0], other[:1000])):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.1
        assert (a == b).mean() < 0.01
    assert abs(np.corrcoef(epochs[0][:-1], epochs[0][1:])[0, 1]) < 0.1


layouts = st.tuples(st.integers(1, 64), st.integers(1, 33), st.integers(1, 97))


def walk(plan: Plan, world: int, micro: int, first: int, last: int | None = None) -> np.ndarray:
    """Visits of each place by steps first..last, with equal steps on all ranks checked."""
    layout = lay_out(global_batch=plan.global_batch, world=world, largest_micro_batch=micro)
    visits = np.zeros(plan.rows, int)
    lengths = set()
    for rank in range(world):
        batches = [
            batch
            for batch in training_batches(plan, layout, rank, first)
            if last is None or batch.step < last
        ]
        lengths.add(len(batches))
        for batch in batches:
            assert len(batch.place) == layout.micro_batch
            np.add.at(visits, batch.place[batch.place >= 0], 1)
    assert len(lengths) == 1
    return visits


@given(layouts, st.integers(1, 200), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_every_row_once_per_epoch_at_any_layout(
    layout: tuple[int, int, int], rows: int, epochs: int
) -> None:
    world, micro, batch = layout
    plan = Plan(rows=rows, total=rows * epochs, global_batch=max(batch, world), seed=3)
    assert (walk(plan, world, micro, 0) == epochs).all()


def test_a_step_holds_the_same_rows_on_any_machine() -> None:
    plan = Plan(rows=500, total=700, global_batch=50, seed=1)

    def steps(world: int, micro: int) -> list[list[int]]:
        layout = lay_out(global_batch=50, world=world, largest_micro_batch=micro)
        rows: list[list[int]] = [[] for _ in range(plan.steps)]
        for rank in range(world):
            for batch in training_batches(plan, layout, rank, 0):
                rows[batch.step] += batch.place[batch.place >= 0].tolist()
        return [sorted(row) for row in rows]

    assert steps(1, 50) == steps(3, 4) == steps(7, 2) == steps(50, 1)


def test_worked_example_of_the_docstring() -> None:
    layout = lay_out(global_batch=4, world=3, largest_micro_batch=1)
    assert layout == Layout(world=3, global_batch=4, micro_batch=1, accumulation=2)
    plan = Plan(rows=4, total=4, global_batch=4, seed=0)
    first = plan.places(np.arange(4)).tolist()
    lanes = [[b.place[0] for b in training_batches(plan, layout, r, 0)] for r in range(3)]
    assert lanes == [[first[0], first[3]], [first[1], -1], [first[2], -1]]


def test_micro_batches_do_not_depend_on_the_ranks_while_there_are_enough() -> None:
    """Numbers of micro batches hold the same rows, in the same order, on 1 to 4 ranks."""
    assert lay_out(global_batch=64, world=1, largest_micro_batch=48).micro_batch == 32
    plan = Plan(rows=100, total=300, global_batch=10, seed=0)
    of = {}
    for world in (1, 2, 3, 4):
        layout = lay_out(global_batch=10, world=world, largest_micro_batch=3)
        assert layout.micro_batch == 3
        batches = [b for r in range(world) for b in training_batches(plan, layout, r, 0)]
        true = [b for b in batches if (b.place >= 0).any()]
        of[world] = {(b.step, b.number): (b.place.tolist(), b.draw.tolist()) for b in true}
    assert of[1] == of[2] == of[3] == of[4]
    assert lay_out(global_batch=10, world=5, largest_micro_batch=3).micro_batch == 2


def test_draws_follow_from_seed_and_position() -> None:
    plan, other = (Plan(rows=50, total=150, global_batch=10, seed=seed) for seed in (0, 1))
    positions = np.arange(150)
    drawn = plan.draws(positions, plan.places(positions))
    assert len(set(drawn.tolist())) == 150
    assert (drawn != other.draws(positions, other.places(positions))).all()


def test_layout_takes_the_micro_batch_that_wastes_least() -> None:
    layout = lay_out(global_batch=10, world=2, largest_micro_batch=5)
    assert (layout.accumulation, layout.micro_batch, layout.slots) == (1, 5, 10)
    assert lay_out(global_batch=10, world=2, largest_micro_batch=4).waste == pytest.approx(3 / 8)
    assert lay_out(global_batch=64, world=8, largest_micro_batch=100).micro_batch == 8
    with pytest.raises(UserError, match="at least one row a rank"):
        lay_out(global_batch=3, world=4, largest_micro_batch=1)


def test_events_fire_after_the_first_step_that_reaches_them() -> None:
    plan = Plan(rows=100, total=250, global_batch=30, seed=0)
    fired = [plan.seen_after(step) for step in range(plan.steps) if plan.due(100, step)]
    assert fired == [120, 210, 250]
    assert [plan.true_rows(step) for step in range(plan.steps)] == [30] * 8 + [10]


def test_step_of_refuses_another_global_batch() -> None:
    plan = Plan(rows=100, total=250, global_batch=30, seed=0)
    assert (plan.step_of(0), plan.step_of(90), plan.step_of(250)) == (0, 3, 9)
    with pytest.raises(UserError, match="end of a step of 30 rows"):
        plan.step_of(100)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_sweep_takes_rows_once_in_batches_that_do_not_depend_on_the_world(world: int) -> None:
    seen: dict[int, list[int]] = {}
    counts = set()
    for rank in range(world):
        batches = list(sweep_batches(53, 8, world, rank))
        counts.add(len(batches))
        for batch in batches:
            places = batch.place[batch.place >= 0].tolist()
            if places:
                seen[places[0] // 8] = places
    assert len(counts) == 1
    assert [seen[number] for number in sorted(seen)] == [
        list(range(first, min(first + 8, 53))) for first in range(0, 53, 8)
    ]


def windowed(rows: int, window: int, seed: int = 0, epochs: int = 2, **changes: int) -> Plan:
    """A plan over shards of 7 rows."""
    full, rest = divmod(rows, 7)
    shard_rows = (7,) * full + ((rest,) if rest else ())
    settings_ = {"global_batch": 64} | changes
    return Plan(
        rows=rows,
        total=rows * epochs,
        seed=seed,
        window_shards=window,
        shard_rows=shard_rows,
        **settings_,
    )


@given(st.integers(1, 150), st.integers(1, 30), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_windows_visit_every_row_once_and_stay_within_their_shards(
    rows: int, window: int, seed: int
) -> None:
    plan = windowed(rows, window, seed)
    for epoch in range(2):
        places = plan.places(np.arange(epoch * rows, (epoch + 1) * rows))
        assert sorted(places) == list(range(rows))
        seen: list[int] = []
        for shard in (places // 7).tolist():
            if shard not in seen:
                seen.append(shard)
        first_use = {shard: places.tolist().index(p) for p in places for shard in [p // 7]}
        last_use = {p // 7: n for n, p in enumerate(places.tolist())}
        at_once = max(sum(first_use[s] <= n <= last_use[s] for s in first_use) for n in range(rows))
        assert at_once <= window
        assert len(seen) == len(plan.shard_rows)


def test_windows_are_frozen_and_differ_between_epochs() -> None:
    plan = windowed(5399, 16, 7)
    places = plan.places(np.arange(10798))
    assert hashlib.sha256(places.astype("<i8").tobytes()).hexdigest()[:16] == GOLDEN_WINDOWS
    assert abs(np.corrcoef(places[:5399], places[5399:])[0, 1]) < 0.05
    one = places[:5399][: 16 * 7]
    assert abs(np.corrcoef(one[:-1] % 7, one[1:] % 7)[0, 1]) < 0.3


GOLDEN_WINDOWS = "935d40d3161e8316"


@given(
    st.lists(st.tuples(layouts, st.integers(0, 8)), min_size=1, max_size=5),
    st.integers(0, 99),
    st.integers(10, 150),
    st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_chains_of_layouts_give_the_same_rows_in_the_same_step(
    chain: list[tuple[tuple[int, int, int], int]], seed: int, rows: int, window: int
) -> None:
    """World, micro batch and accumulation may change in the middle of any epoch."""
    plan = windowed(rows, window, seed, epochs=3)
    expected = [
        plan.places(np.arange(s * 64, min((s + 1) * 64, plan.total))) for s in range(plan.steps)
    ]
    samples_seen = 0
    for (world, micro, _), steps in [*chain, ((1, 64, 0), plan.steps)]:
        layout = lay_out(global_batch=64, world=world, largest_micro_batch=micro)
        first = plan.step_of(samples_seen)
        last = min(first + steps, plan.steps)
        taken: dict[int, list[int]] = {step: [] for step in range(first, last)}
        lengths = set()
        for rank in range(world):
            batches = [b for b in training_batches(plan, layout, rank, first) if b.step < last]
            lengths.add(len(batches))
            for batch in batches:
                taken[batch.step] += batch.place[batch.place >= 0].tolist()
        assert lengths == {(last - first) * layout.accumulation}
        for step, places in taken.items():
            assert sorted(places) == sorted(expected[step])
            samples_seen = plan.seen_after(step)
    assert samples_seen == plan.total


@given(layouts, st.integers(0, 150), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_a_plan_may_begin_at_any_position(
    layout: tuple[int, int, int], begin: int, steps: int
) -> None:
    """The rest of the positions, each once, in the order of a plan that never stopped."""
    world, micro, batch = layout
    whole = Plan(rows=97, total=250, global_batch=max(batch, world), seed=3)
    plan = replace(whole, first_position=begin, first_step=steps)
    laid = lay_out(global_batch=plan.global_batch, world=world, largest_micro_batch=micro)
    assert (plan.step_of(begin), plan.seen_after(steps - 1)) == (steps, begin)
    taken: dict[int, list[int]] = {}
    for rank in range(world):
        for each in training_batches(plan, laid, rank, steps):
            taken.setdefault(each.step, []).extend(each.place[each.place >= 0].tolist())
    expected = whole.places(np.arange(begin, whole.total)).tolist()
    for step in range(steps, plan.steps):
        first, stop = plan.start_of(step) - begin, plan.seen_after(step) - begin
        assert sorted(taken[step]) == sorted(expected[first:stop])
        assert plan.true_rows(step) == len(taken[step])
        assert plan.step_of(stop + begin) == step + 1
    assert plan.seen_after(plan.steps - 1) == whole.total


@pytest.mark.parametrize("start", [0, 1, 4095, 4096, 5000])
def test_resuming_anywhere_gives_the_rest_of_the_same_batches(start: int) -> None:
    # steps are planned some thousand at a time: where that begins must not matter
    plan = Plan(rows=997, total=6000, global_batch=1, seed=1)
    layout = Layout(world=1, global_batch=1, micro_batch=1, accumulation=1)
    whole = [int(b.place[0]) for b in training_batches(plan, layout, 0, 0)]
    rest = [int(b.place[0]) for b in training_batches(plan, layout, 0, start)]
    assert rest == whole[start:]


@pytest.mark.parametrize("window", [0, 4])
def test_batches_mix_tracks_about_as_well_as_chance(window: int) -> None:
    """Pairs of one track's segments in a batch of 64, against a true shuffle."""
    from mgc_dist.packing.cut import SPREAD_VERSION

    tracks, segments = 440, 19  # GTZAN's fault-filtered training split
    rows = tracks * segments
    place = bijection(np.arange(rows), rows, key_of(SPREAD_VERSION, 0))
    track_of = np.empty(rows, np.int64)
    track_of[place] = np.repeat(np.arange(tracks), segments)
    shard_rows = (512,) * (rows // 512) + (rows % 512,)
    plan = Plan(
        rows=rows,
        total=20 * rows,
        global_batch=64,
        seed=5,
        window_shards=window,
        shard_rows=shard_rows,
    )
    steps = plan.places(np.arange(20 * rows // 64 * 64)).reshape(-1, 64)
    counts = np.array([np.bincount(track_of[step], minlength=tracks) for step in steps])
    pairs = (counts * (counts - 1) / 2).sum(axis=1).mean()
    chance = 64 * 63 / 2 * (segments - 1) / (rows - 1)
    assert pairs == pytest.approx(chance, rel=0.05)
