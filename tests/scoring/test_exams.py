"""Verdicts of controls, and the search for bands that suffice, on planted cases."""

import numpy as np
import pytest
import torch

from mgc_dist.scoring import exams, sufficient
from mgc_dist.scoring.exams import Line
from mgc_dist.scoring.score import SplitScores, judge

TRACKS = 200
LABEL = np.arange(TRACKS) % 2


def answers(right: int) -> SplitScores:
    """The first so many tracks are right."""
    guess = np.where(np.arange(TRACKS) < right, LABEL, 1 - LABEL)
    logits = np.eye(2, dtype=np.float32)[guess] * 4
    return judge(logits, LABEL.astype(np.int64), np.arange(TRACKS), "test")


def line(before: int, after: int) -> Line:
    found = {("noise", 10.0): answers(after)}
    about = {("noise", 10.0): ("dB", "noise")}
    (made,) = exams.lines(answers(before), found, about, np.arange(TRACKS), ("a", "b"))
    return made


@pytest.mark.parametrize(
    ("model", "refitted", "verdict", "recovered"),
    [
        ((180, 179), (180, 100), "no loss", None),
        ((180, 100), (180, 170), "last layer", 0.875),
        ((180, 100), (180, 110), "below", 0.125),
        ((180, 170), (180, 174), "below", 0.4),
        ((180, 160), (170, 158), "below", 0.4),
    ],
)
def test_verdicts(
    model: tuple[int, int], refitted: tuple[int, int], verdict: str, recovered: float | None
) -> None:
    before, after = map(answers, refitted)
    found = exams.controlled(line(*model), before, after, np.arange(TRACKS), 2).control
    assert found is not None
    assert found.verdict == verdict
    assert recovered is None or found.recovered == pytest.approx(recovered)
    assert found.difference == pytest.approx((refitted[1] - refitted[0]) / TRACKS)


def test_the_worst_are_of_different_transformations() -> None:
    about = {(name, s): ("", "") for name in "abcd" for s in (1.0, 2.0)}
    found = {key: answers(150 + 10 * place) for place, key in enumerate(about)}
    lines = exams.lines(answers(190), found, about, np.arange(TRACKS), ("a", "b"))
    assert exams.worst(lines) == [("a", 1.0), ("b", 1.0), ("c", 1.0)]
    assert [each.p_corrected >= each.p for each in lines] == [True] * 8


RATE, SIZE = 16_000, 8_000


def by_one_band(place: int):
    """A model that hears nothing but whether a band is loud."""
    low, high = sufficient.edges_hz(RATE)[place : place + 2]
    hz = torch.fft.rfftfreq(SIZE, 1 / RATE)
    inside = (hz >= low) & (hz < high)

    def forward(wave: torch.Tensor) -> torch.Tensor:
        power = torch.fft.rfft(wave.float() / 32768)[:, inside].abs().square().sum(dim=1)
        return torch.stack((power - 10, 10 - power), dim=1)

    return forward


def noise_with(loud: list[bool], place: int) -> torch.Tensor:
    """Noise in which a band is louder in some rows."""
    low, high = sufficient.edges_hz(RATE)[place : place + 2]
    spectrum = np.fft.rfft(np.random.default_rng(0).normal(size=(len(loud), SIZE)))
    hz = np.fft.rfftfreq(SIZE, 1 / RATE)
    inside = (hz >= low) & (hz < high)
    spectrum[:, inside] *= np.where(loud, 3.0, 0.0)[:, None]
    return torch.from_numpy((300 * np.fft.irfft(spectrum, SIZE)).astype(np.int16))


def test_the_search_finds_the_band_that_a_model_hears_and_it_fools_others() -> None:
    loud = [True, False, True, False, True, False]
    wave = torch.cat((noise_with(loud, 7), torch.zeros(2, SIZE, dtype=torch.int16)))
    found = sufficient.Search(by_one_band(7), RATE)(wave).numpy()[:6]
    bands = found[:, : sufficient.BANDS]
    assert bands[::2].sum(axis=1).tolist() == [1, 1, 1]
    assert bands[::2, 7].all(), "the loud rows need this band alone"
    assert not bands[1::2].any(), "silence has the other answer too"
    assert found[::2, -2].all(), "the loud band makes quiet rows loud"
    told = sufficient.summed_up(found, ("loud", "quiet"), RATE)
    assert told.kept == pytest.approx(0.5)
    assert told.by_genre["loud"][7] == 1
    assert told.fooled == pytest.approx(0.5), "nothing of a quiet row makes others quiet"


def test_a_model_with_one_answer_fools_nobody() -> None:
    wave = noise_with([True, False], 3)
    found = sufficient.Search(lambda given: torch.eye(2)[[0] * len(given)], RATE)(wave).numpy()
    assert sufficient.summed_up(found, ("a", "b"), RATE).fooled is None
    assert sufficient.edges_hz(RATE)[[0, -1]] == pytest.approx([0, 8000])


def test_a_band_is_relied_upon_where_swapping_it_costs_answers() -> None:
    about = {(name, s): ("", "") for name in ("band-stop", "band-swap", "hum") for s in (1.0, 2.0)}
    right = (100, 110, 188, 120, 90, 90)  # as in `about`; swapping the first band costs two
    found = {key: answers(n) for key, n in zip(about, right, strict=True)}
    lines = exams.lines(answers(190), found, about, np.arange(TRACKS), ("a", "b"))
    assert [each.reading for each in lines] == [
        *("unfamiliar", "relied upon"),
        *(None, "relied upon"),
        *(None, None),
    ]
