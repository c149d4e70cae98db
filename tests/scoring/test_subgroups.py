"""Who is in which subgroup, and how the subgroups fare."""

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest

from mgc_dist.errors import UserError
from mgc_dist.scoring import subgroups


def test_a_track_is_aligned_by_the_mean_bias_probability_of_its_segments() -> None:
    bias = np.log(np.array([[0.9, 0.1], [0.4, 0.6], [0.4, 0.6], [0.2, 0.8]], np.float32))
    label, track = np.array([0, 0, 0, 0]), np.array([5, 5, 5, 2])
    assert subgroups.aligned_rows(bias, label).tolist() == [True, False, False, False]
    # tracks ascending: 2 leans to genre 1; 5 has mean 0.567 for its own, against two of three rows
    aligned = subgroups.aligned_tracks(bias, label, track)
    assert aligned.tolist() == [False, True]
    assert subgroups.names_of(aligned) == ["bias-conflicting", "bias-aligned"]


def test_figures_of_each_subgroup_and_the_worst() -> None:
    names = ["loud", "loud", "quiet", None, "loud"]
    right = np.array([True, False, True, False, True])
    tracks = np.arange(5)
    found = subgroups.figures(names, right, np.array([0, 0, 1, 1, 1]), ("a", "b"), tracks)
    assert list(found) == ["loud", "quiet"]
    assert found["loud"]["count"] == 3
    assert found["loud"]["accuracy"] == pytest.approx(2 / 3)
    low, high = found["loud"]["interval"]
    expected = binomtest(2, 3).proportion_ci(method="wilson")
    assert low < expected.low < expected.high < high, "with Student's t of two degrees"
    assert found["quiet"]["interval"] is None, "one track"
    artists = np.array([0, 0, 1, 1, 0])
    found = subgroups.figures(names, right, np.array([0, 0, 1, 1, 1]), ("a", "b"), artists)
    assert found["loud"]["interval"] is None, "one artist"
    assert found["loud"]["genres"] == {
        "a": {"count": 2, "accuracy": 0.5},
        "b": {"count": 1, "accuracy": 1.0},
    }
    assert found["quiet"]["genres"]["a"] == {"count": 0, "accuracy": None}
    assert subgroups.worst(found) == {"name": "loud", "accuracy": 2 / 3, "count": 3}


def test_an_empty_bias_subgroup_is_shown_and_is_not_the_worst() -> None:
    found = subgroups.figures(
        ["bias-aligned"] * 2, np.array([True, False]), np.array([0, 0]), ("a",), np.arange(2)
    )
    assert found["bias-conflicting"]["count"] == 0
    assert found["bias-conflicting"]["accuracy"] is None
    assert found["bias-conflicting"]["interval"] is None
    assert subgroups.worst(found) == {"name": "bias-aligned", "accuracy": 0.5, "count": 2}
    assert subgroups.worst({}) is None


def test_a_table_names_tracks_by_file_or_id(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("track,decade\nblues.00001,60s\njazz_00002,\nrock.00003.wav,70s\nmore,80s\n")
    ids = ["jazz_00002", "blues_00001", "rock_00003"]
    assert subgroups.from_table(table, "decade", ids) == [None, "60s", "70s"]


def test_tables_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    with pytest.raises(UserError, match=r"--subgroups .*No such file"):
        subgroups.from_table(table, "subgroup", ["a"])
    table.write_text("track,decade\na,60s\n")
    with pytest.raises(UserError, match=r"columns track, decade(.|\n)*--subgroup-column"):
        subgroups.from_table(table, "subgroup", ["a"])
    with pytest.raises(UserError, match="no row for 1 of 2 tracks, such as b"):
        subgroups.from_table(table, "decade", ["a", "b"])
    table.write_text("track,decade\na,60s\na,70s\n")
    with pytest.raises(UserError, match=r"line 3, track a: got both '60s' and '70s'"):
        subgroups.from_table(table, "decade", ["a"])
    table.write_text("track,decade\n")
    with pytest.raises(UserError, match="got columns none"):
        subgroups.from_table(table, "decade", ["a"])


def test_numbers_of_many_values_are_cut_into_thirds() -> None:
    found = subgroups.in_thirds([float(n) for n in range(9)] + [None])
    assert found == ["up to 2"] * 3 + ["above 2 to 5"] * 3 + ["above 5"] * 3 + [None]
    assert subgroups.in_thirds([16_000, 44_100, 16_000]) == ["16000", "44100", "16000"]
    assert subgroups.in_thirds(["mp3", None]) == ["mp3", None]
