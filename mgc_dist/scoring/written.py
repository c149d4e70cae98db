"""What is written as JSON about a model or a bias table: the keys, and what stands under them.

Figures named by METRICS are mappings, because a metric is an entry and not a field. A class whose
keys a file may lack, because version 0.1.0 did not write them, is not `total`.
"""

from collections.abc import Mapping
from typing import NotRequired, TypedDict

Values = Mapping[str, float | None]
"""`count` and each metric, by name; None where it is not defined."""
Bounds = dict[str, list[float]]
"""Metric -> low and high."""


class Intervals(TypedDict):
    """Of each figure over tracks, and over `groups` (artists), None where they are unknown."""

    level: float
    tracks: Bounds
    groups: Bounds | None
    known_groups: int


class GenreFigures(TypedDict):
    """A genre over tracks; intervals over artists where they are known."""

    precision: float | None
    recall: float | None
    f1: float | None
    support: int
    recall_interval: list[float] | None
    f1_interval: NotRequired[list[float] | None]


class ReliabilityBins(TypedDict):
    """Bins of confidence; None where a bin is empty."""

    edges: list[float]
    count: list[int]
    confidence: list[float | None]
    accuracy: list[float | None]


class Temperature(TypedDict, total=False):
    """The temperature of all figures, and the figures without it."""

    value: float
    fitted_on: str
    aggregate: str
    without: Values


class Share(TypedDict):
    """How many, and how many of them right."""

    count: int
    accuracy: float | None


class GroupFigures(Share):
    """A subgroup of tracks."""

    interval: list[float] | None
    genres: dict[str, Share]
    calibration: NotRequired[Values]


class WorstGroup(TypedDict):
    """The subgroup of the lowest accuracy."""

    name: str
    accuracy: float
    count: int


class SubgroupFigures(TypedDict):
    """Subgroups of tracks, and of segments."""

    source: str
    groups: dict[str, GroupFigures]
    segment: dict[str, Share]
    worst_group: WorstGroup | None


class WorstGenre(TypedDict):
    """The genre of the lowest recall."""

    name: str
    recall: float | None


class GenresInCommon(TypedDict):
    """Of an evaluation on genres in common: all genres of the model, names that differ (those of
    the data set -> those of the model), and how many tracks of each other genre are left out.
    """

    of_model: list[str]
    renamed: dict[str, str]
    left_out: dict[str, int]


class EvaluationFigures(TypedDict, total=False):
    """RUN/evaluation/NAME.json; of a validation, split, genres and confusion are known."""

    split: str
    name: str
    dataset_id: str
    run: str
    aggregate: str
    genres: list[str]
    in_common: GenresInCommon | None
    track: Values
    segment: Values
    aggregates: dict[str, Values]
    intervals: Intervals
    per_genre: dict[str, GenreFigures]
    confusion: list[list[int]]
    reliability: ReliabilityBins
    temperature: Temperature | None
    subgroups: SubgroupFigures | None
    worst_genre: WorstGenre
    weights: str


class Prediction(TypedDict):
    """A line of RUN/predictions/NAME.jsonl: a track."""

    track: str
    group: str | None
    truth: str
    prediction: str
    probabilities: dict[str, float]
    bias_aligned: bool | None
    subgroup: str | None


class BiasGenre(TypedDict):
    """A genre in a bias table: rows and tracks whose genre it names (aligned), or does not."""

    rows: int
    accuracy: float
    aligned_rows: int
    conflicting_rows: int
    aligned_tracks: int
    conflicting_tracks: int


class ProbeFigures(TypedDict):
    """A linear probe of the main model on the folds of a bias table, out of fold, over segments.

    `layer` is that of the model's hidden states, as validation tracks chose it.
    """

    model: str
    model_hash: str
    layer: int
    accuracy: float
    nll: float


class BiasReport(TypedDict):
    """TABLE/report.json.

    `layers`, `folds`, `temperature` are None for a table from elsewhere; `splits` is over segments;
    `truth_histogram` has ten counts of training rows by the probability given to the truth;
    `divergence` is their mean KL(b || uniform) in nats; `probe` is None where none was made;
    `effective_sample_size` is that of the weights 1 - b_y; `per_genre` is of the training split.
    """

    backbone: str
    layers: list[int] | None
    folds: int | None
    temperature: float | None
    fold_status: str
    dataset_id: str
    table_sha256: str
    splits: dict[str, dict[str, float]]
    truth_histogram: list[int]
    divergence: NotRequired[float]
    probe: NotRequired[ProbeFigures | None]
    effective_sample_size: float
    per_genre: dict[str, BiasGenre]
    per_genre_of: dict[str, dict[str, BiasGenre]]
    warnings: list[str]
