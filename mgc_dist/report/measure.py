"""The body of `evaluate`: a run's best model on a split, and its figures in the run folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mgc_dist import cli
from mgc_dist.bias_model import table as tables
from mgc_dist.bias_model.table import BiasTable
from mgc_dist.cluster import ranks
from mgc_dist.cluster.meeting import Meeting
from mgc_dist.config import EvaluateConfig, TrainConfig, identity
from mgc_dist.console import progress
from mgc_dist.data import fetch
from mgc_dist.data.manifest import Manifest
from mgc_dist.data.reader import ShardSet
from mgc_dist.errors import UserError
from mgc_dist.files import fingerprint, locked
from mgc_dist.journal import read_environment
from mgc_dist.models import folder
from mgc_dist.models.classifier import WaveClassifier
from mgc_dist.report import evaluation
from mgc_dist.report.evaluation import Subject
from mgc_dist.scoring import shared_genres, subgroups
from mgc_dist.scoring.score import SplitScores, all_score
from mgc_dist.scoring.shared_genres import SharedGenres
from mgc_dist.scoring.written import EvaluationFigures

LOCK_WAIT_S = 600.0
"""How long an evaluation waits for another one of the run that writes; minutes are many."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What an evaluation found; the same on every rank, but for who speaks.

    Attributes:
        figures: as they are written to RUN/evaluation/NAME.json; {} on all ranks but the first.
        scores: of the split, with the logits of every segment.
        notes: what the reader of the figures should know, a sentence each.
        run: the run folder, or the folder of an exported model.
        name: of the files that are written.
        shards: that were measured on.
        is_first: whether this is rank 0, which writes and speaks for all.
    """

    figures: EvaluationFigures
    scores: SplitScores
    notes: tuple[str, ...]
    run: Path
    name: str
    shards: Path
    is_first: bool

    @property
    def places(self) -> tuple[str, ...]:
        """Where the files are, a line each."""
        pictures = self.run / "evaluation"
        return (
            f"figures: {pictures / self.name}.json",
            f"pictures: {pictures}/confusion-{self.name}.png, reliability-{self.name}.png",
            f"predictions: {self.run / 'predictions' / self.name}.jsonl",
        )


def evaluate(config: EvaluateConfig, meeting: Meeting) -> Evaluation:
    """Walk a split with a run's best model, judge tracks, write the figures (a collective).

    Args:
        config: which run, which split, on which shards.
        meeting: of the ranks.

    Raises:
        UserError: no model or data there, no genres in common, or a bias table, a map of genres
            or a table of subgroups does not fit.
    """
    with opened(config, meeting) as (classifier, shards, shared):
        return _measure(config, classifier, shards, shared, meeting)


@contextmanager
def opened(
    config: EvaluateConfig, meeting: Meeting
) -> Iterator[tuple[WaveClassifier, ShardSet, SharedGenres | None]]:
    """The model, the shards, and their genres in common where they differ (a collective).

    Args:
        config: which run, on which shards.
        meeting: of the ranks.

    Raises:
        UserError: no model or data there, or they do not fit one another.
    """
    exported = folder.find_exported(config.run, ema=config.ema)
    classifier = folder.load_exported(exported, trust_remote_code=config.trust_remote_code)
    at_hand = fetch.at_hand(config.data or _own_shards(config), config.source)
    fold = config.source.fold if config.data else _trained_with(config.run).data.source.fold
    with ShardSet(at_hand, fold) as shards:
        meeting.all_same("data", {"data set (--data)": shards.manifest.dataset_id})
        if config.data is None:
            _refuse_repacked(config.run, shards)
        _refuse_other(config, classifier, folder.sample_rate_of(exported), shards.manifest)
        genres = shards.manifest.genres
        shared = shared_genres.match(classifier.genres, genres, config.genre_map, shards.folder)
        yield classifier, shards, shared


def _measure(
    config: EvaluateConfig,
    classifier: WaveClassifier,
    shards: ShardSet,
    shared: SharedGenres | None,
    meeting: Meeting,
) -> Evaluation:
    """Walk the split, and write what it shows (a collective)."""
    subject, notes = _subject(config, shards, shared, classifier.temperature)
    if classifier.crop_of == shards.manifest.segment_samples:
        notes.append(f"of each segment the model hears {classifier.crops_in_words}")
    with ranks.join(config.device, meeting=meeting) as peers:
        first, stop = shards.rows_of(config.split)
        batches = -(-(stop - first) // (config.batch * peers.world))
        with progress(f"evaluating {config.split}", batches, shown=peers.is_first) as bar:
            scores = all_score(
                classifier.to(peers.device).calibrated,
                shards,
                config.split,
                peers,
                batch=config.batch,
                aggregate=config.aggregate,
                progress=bar.over,
                shared=shared,
            )
        figures: EvaluationFigures = {}
        peers.all_decide(lambda: figures.update(_write(config, subject, scores)))
    return Evaluation(
        figures=figures,
        scores=scores,
        notes=tuple(notes),
        run=config.run,
        name=subject.name,
        shards=shards.folder,
        is_first=peers.is_first,
    )


def _write(config: EvaluateConfig, subject: Subject, scores: SplitScores) -> EvaluationFigures:
    """Write the figures, and return them (rank 0)."""
    figures = evaluation.summary(subject, scores)
    weights = folder.find_exported(config.run, ema=config.ema) / folder.WEIGHTS
    figures["weights"] = fingerprint(weights)  # the model may go on to be trained
    purpose = f"writing an evaluation of {config.run}"
    with locked(config.run / "evaluation.lock", wait_s=LOCK_WAIT_S, purpose=purpose):
        evaluation.write(config.run, subject, scores, figures)
    return figures


def _subject(
    config: EvaluateConfig,
    shards: ShardSet,
    shared: SharedGenres | None,
    temperature: float | None,
) -> tuple[Subject, list[str]]:
    """What is measured, and what the reader should know about it."""
    first, stop = shards.rows_of(config.split)
    label, track = shards.labels[first:stop], shards.tracks[first:stop]
    kept = shared.kept(label) if shared else np.ones(len(label), bool)
    genres = [each.genre for each in shards.manifest.tracks if each.split == config.split]
    in_common = shared.written(genres) if shared else None
    if not kept.any():
        raise UserError(
            f"{config.split} split of {shards.folder}",
            got="no track of a genre in common",
            expected=f"tracks of {', '.join(shared.genres if shared else ())}",
            cure="measure another one: --split train",
        )
    label, track = label[kept], track[kept]
    tracks = [shards.manifest.tracks[place] for place in np.unique(track)]
    table, notes = _bias_table(config, shards)
    aligned, found = None, None
    if table is not None:
        bias = np.array(table.log_probability[first:stop])[kept]  # [rows, K]
        aligned = subgroups.aligned_tracks(bias, label, track)
        found = subgroups.Subgroups(
            source=f"bias model {table.name}, table {table.sha256[:12]}",
            of_track=subgroups.names_of(aligned),
            of_row=subgroups.names_of(subgroups.aligned_rows(bias, label)),
        )
    if config.subgroups or config.subgroup_column:
        given = (config.subgroups, config.subgroup_column)
        found = subgroups.asked_for(*given, [each.id for each in tracks], shards)
    if config.data:
        notes.append("--data: whether its tracks were trained on is for you to know")
    if temperature is None:
        notes.append(
            "no temperature: none made the probabilities of left-out validation tracks better, or "
            "`export` has put it into the head"
        )
    subject = Subject(
        name=config.result_name,
        run=config.run.resolve().name,
        dataset_id=shards.manifest.dataset_id,
        genres=shared.genres if shared else shards.manifest.genres,
        in_common=in_common,
        track_ids=tuple(each.id for each in tracks),
        groups=tuple(each.group for each in tracks),
        temperature=temperature,
        aligned=aligned,
        subgroups=found,
    )
    return subject, notes


def _bias_table(config: EvaluateConfig, shards: ShardSet) -> tuple[BiasTable | None, list[str]]:
    """The table that says what the bias model knows, or why there is none."""
    if config.bias_table:
        return tables.read(config.bias_table, shards.manifest, shards.keys), []
    if config.data:
        return None, ["no bias subgroups: --bias-table names the table of these shards"]
    trained = _trained_with(config.run)
    own = trained.data.table
    if not (own / tables.HEADER).is_file() and not own.is_file():
        return None, [f"no bias subgroups: no bias table {own}"]
    try:
        table = tables.read(own, shards.manifest, shards.keys)
    except UserError as error:
        if not trained.objective.needs_bias:  # the run has never read it
            return None, [f"no bias subgroups: {error}"]
        raise
    trained_with = identity.read(read_environment(config.run)["identity"])
    if trained.objective.needs_bias and trained_with["bias_table"] != table.sha256:
        return table, [f"{own} is not the table of the training: it was made again since"]
    return table, []


def _trained_with(run_folder: Path) -> TrainConfig:
    settings = run_folder / "config.yaml"
    if not settings.is_file():
        raise UserError(
            "--data",
            got=f"nothing, and {run_folder} is no run folder that names its shards",
            expected="a folder of shards",
            cure="add --data shards",
        )
    return cli.parse("train", TrainConfig, ["--config", str(settings)])


def _own_shards(config: EvaluateConfig) -> Path:
    """Where the shards were that a run was trained on."""
    run_folder = config.run
    shards = _trained_with(run_folder).data.shards
    if not shards.is_dir() and not config.source.shards_from:
        raise UserError(
            f"shards of {run_folder}",
            got=f"no folder {shards} here",
            expected="to be started where the training was, or --data",
            cure="add --data FOLDER",
        )
    return shards


def _refuse_repacked(run_folder: Path, shards: ShardSet) -> None:
    trained_on = str(read_environment(run_folder)["dataset_id"])
    found = shards.manifest.dataset_id
    if found != trained_on:
        raise UserError(
            f"data set {shards.folder}",
            got=f"{found[:12]}, packed after the training",
            expected=f"{trained_on[:12]}, which {run_folder} was trained on",
            cure="its test split may hold training tracks; name another data set with --data",
        )


def _refuse_other(
    config: EvaluateConfig, classifier: WaveClassifier, wanted: int, manifest: Manifest
) -> None:
    heard = classifier.crop_of or classifier.segment_samples
    if manifest.segment_samples not in (heard, classifier.segment_samples):
        raise UserError(
            f"segments of the shards for {config.run}",
            got=f"{manifest.segment_samples} samples",
            expected=f"{heard}, as in training",
            cure="pack the data set again with the --segment-s of the training",
        )
    if wanted != manifest.sample_rate:
        raise UserError(
            f"sample rate of the shards for {config.run}",
            got=f"{manifest.sample_rate} Hz",
            expected=f"{wanted} Hz",
            cure=f"pack again: python -m mgc_dist.shard --sample-rate {wanted}",
        )
