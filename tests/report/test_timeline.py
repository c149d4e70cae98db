"""Merging keeps every segment once; the clock."""

from itertools import pairwise

import numpy as np
import pytest

from mgc_dist.report.timeline import clock, merge


@pytest.mark.parametrize(("segments", "lines"), [(1, 1), (20, 20), (21, 11), (399, 20)])
def test_every_segment_is_in_one_stretch(segments: int, lines: int) -> None:
    probabilities = np.random.default_rng(0).dirichlet(np.ones(4), segments)
    starts = [1.5 * k for k in range(segments)]
    merged = merge(starts, probabilities, segment_s=3.0, most=20)
    assert len(merged) == lines
    assert sum(stretch.segments for stretch in merged) == segments
    total = sum(stretch.segments * stretch.probabilities for stretch in merged)
    assert total == pytest.approx(probabilities.sum(axis=0))
    assert merged[0].start_s == 0
    assert merged[-1].end_s == starts[-1] + 3.0
    for one, other in pairwise(merged):
        assert one.end_s == pytest.approx(other.start_s - 1.5 + 3.0)
        assert one.best == int(one.probabilities.argmax())


def test_clock() -> None:
    shown = [clock(x) for x in (0, 1.5, 9.96, 59.96, 60, 125.25, 3600, 3661.5)]
    assert shown == ["0:00", "0:01.5", "0:10", "1:00", "1:00", "2:05.2", "1:00:00", "1:01:01.5"]
