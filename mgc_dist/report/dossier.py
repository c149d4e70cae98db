"""What a run folder holds, gathered for its report: each part is there, or absent without harm."""

import base64
import io
import json
import logging
import wave
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from mgc_dist import cli
from mgc_dist.bias_model import table as tables
from mgc_dist.bias_model.table import Header
from mgc_dist.cluster.lease import ATTEMPTS
from mgc_dist.config import TrainConfig, identity
from mgc_dist.data import manifest
from mgc_dist.data.cross_validation import of_fold
from mgc_dist.data.manifest import Manifest
from mgc_dist.data.reader import ShardSet
from mgc_dist.data.tracks import folds_of
from mgc_dist.errors import UserError
from mgc_dist.events import E, Event, StartEvent, ValidationEvent, only
from mgc_dist.files import fingerprint, json_lines
from mgc_dist.journal import ENVIRONMENT, read_events, read_status
from mgc_dist.models.folder import BEST_EMA, WEIGHTS, find_exported
from mgc_dist.scoring import exams
from mgc_dist.scoring.exams import Exam
from mgc_dist.scoring.written import BiasReport, EvaluationFigures, Prediction

log = logging.getLogger(__name__)

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Span:
    """A try: from its `start` event to its last one.

    Attributes:
        started_at_s: seconds since 1970.
        ended_at_s: of its last event.
        samples_seen: where it began.
        world: ranks.
    """

    started_at_s: float
    ended_at_s: float
    samples_seen: int
    world: int


@dataclass(frozen=True, kw_only=True)
class Decider:
    """The segment of a track that gave the wrong genre its highest probability.

    Attributes:
        start_s: of each segment, in seconds.
        wrong: probability of the predicted genre in each segment.
        truth: probability of the true genre in each segment.
        segment: which one decided.
        wav: the audio of that segment as a WAV file in base64; "" without shards.
    """

    start_s: list[float]
    wrong: list[float]
    truth: list[float]
    segment: int
    wav: str


class Dossier:
    """The files of a run folder, read when asked for; a damaged or missing one is None or empty.

    Args:
        run: the run folder.
        shards: that were evaluated, if they are known; else those of the training are looked for.
    """

    def __init__(self, run: Path, shards: Path | None = None) -> None:
        self.run = run
        self._shards = shards

    @cached_property
    def config(self) -> TrainConfig | None:
        """How the run was trained."""
        path = self.run / "config.yaml"
        if not path.is_file():
            return None
        try:
            return cli.parse("train", TrainConfig, ["--config", str(path)])
        except (UserError, SystemExit, OSError) as error:
            log.warning("%s is not of this version: %s", path, error)
            return None

    @cached_property
    def environment(self) -> Json:
        """env.json: versions, world, device, identity."""
        return _json(self.run / ENVIRONMENT) or {}

    @cached_property
    def engine(self) -> Json:
        """ds_config.json: DeepSpeed's settings as they were resolved."""
        return _json(self.run / "ds_config.json") or {}

    @cached_property
    def status(self) -> Json:
        """status.json."""
        try:
            return read_status(self.run)
        except (OSError, ValueError):
            return {}

    @cached_property
    def attempts(self) -> list[Json]:
        """attempts.jsonl: how each try began and ended."""
        return json_lines(self.run / ATTEMPTS)

    @cached_property
    def events(self) -> list[Event]:
        """metrics.jsonl, whole."""
        return read_events(self.run)

    def history(self, kind: type[E]) -> list[E]:
        """Events of one kind that belong to the final weights.

        A run that was killed has steps behind its checkpoint; the next try does them again.
        """
        kept: list[E] = []
        for event in self.events:
            if isinstance(event, StartEvent):
                kept = [past for past in kept if past.samples_seen <= event.samples_seen]
            elif isinstance(event, kind):
                kept.append(event)
        return kept

    @cached_property
    def spans(self) -> list[Span]:
        """The tries, in order."""
        starts = [(k, each) for k, each in enumerate(self.events) if isinstance(each, StartEvent)]
        ends = [*(k for k, _ in starts[1:]), len(self.events)]
        return [
            Span(
                started_at_s=start.time_s,
                ended_at_s=self.events[end - 1].time_s,
                samples_seen=start.samples_seen,
                world=start.world,
            )
            for (_, start), end in zip(starts, ends[: len(starts)], strict=True)
        ]

    @cached_property
    def genres(self) -> list[str]:
        """Of the training, as its last try that said so began; [] where none has."""
        named = [start.genres for start in only(self.events, StartEvent) if start.genres]
        return named[-1] if named else []

    @cached_property
    def best(self) -> ValidationEvent | None:
        """The validation that chose the model: the last one whose model was written to best/."""
        exported = [each for each in self.history(ValidationEvent) if each.exported]
        return exported[-1] if exported else None

    @cached_property
    def evaluations(self) -> dict[str, EvaluationFigures]:
        """Name -> figures of each evaluation, the main one first: test, others, validation."""
        found: dict[str, EvaluationFigures] = {}
        for path in sorted((self.run / "evaluation").glob("*.json")):
            content = _json(path)
            is_whole = content and "track" in content and "confusion" in content
            if content and is_whole and content.get("weights", self._weights[0]) in self._weights:
                found[path.stem] = cast(EvaluationFigures, content)
        last = {"train": 3, "validation": 2, "test": 0}
        return dict(sorted(found.items(), key=lambda item: last.get(item[0], 1)))

    @cached_property
    def outdated(self) -> list[str]:
        """Names of evaluations of another model than best/ holds now."""
        every = (path.stem for path in sorted((self.run / "evaluation").glob("*.json")))
        return [name for name in every if name not in self.evaluations]

    @cached_property
    def _weights(self) -> tuple[str | None, str | None]:
        """Fingerprints of the best model, and of the best averaged weights."""
        folders = (find_exported(self.run), self.run / BEST_EMA)
        best, ema = (
            fingerprint(path) if (path := folder / WEIGHTS).is_file() else None
            for folder in folders
        )
        return best, ema

    @cached_property
    def main(self) -> tuple[str, EvaluationFigures] | None:
        """Name and figures of the evaluation that the report is about."""
        return next(iter(self.evaluations.items()), None)

    @cached_property
    def comparisons(self) -> list[tuple[Json, "Dossier"]]:
        """Figures of `compare A RUN` over the tracks of the main evaluation, each with run A."""
        found = []
        for path in sorted((self.run / "comparison").glob("*/comparison.json")):
            pair = _json(path)
            if not pair or pair.get("mode") != "pair" or self.main is None:
                continue
            name, figures = self.main
            if (pair.get("name"), pair.get("dataset_id")) != (name, figures.get("dataset_id")):
                continue
            beside = self.run.resolve().parent / Path(pair["a"]).name
            found.append((pair, Dossier(beside if beside.is_dir() else Path(pair["a"]))))
        return found

    @cached_property
    def predictions(self) -> list[Prediction]:
        """A line a track of the main evaluation."""
        if self.main is None:
            return []
        lines = json_lines(self.run / "predictions" / f"{self.main[0]}.jsonl")
        return [cast(Prediction, line) for line in lines]

    @cached_property
    def exam(self) -> tuple[Exam, Path] | None:
        """An exam of the model, with the folder of its audio; the main evaluation's first."""
        files = sorted((self.run / "exam").glob("*.json"))
        name = self.main[0] if self.main else "test"
        for path in sorted(files, key=lambda path: path.stem != name):
            try:
                found = exams.read(path)
            except UserError as error:
                log.warning("%s", error)
                continue
            if found.weights in self._weights:
                return found, path.with_suffix("")
        return None

    @cached_property
    def trained_on(self) -> tuple[Path, Manifest] | None:
        """The shards of the training, where they are still as they were."""
        return self._find(str(self.environment.get("dataset_id")))

    @cached_property
    def evaluated_on(self) -> tuple[Path, Manifest] | None:
        """The shards of the main evaluation, where they are still as they were."""
        return self._find(str(self.main[1].get("dataset_id"))) if self.main else None

    def _fold_in(self, folder: Path) -> int | None:
        """The fold of the training, where a folder of shards has folds."""
        if self.config is None or not folds_of(manifest.read(folder).splits):
            return None
        return self.config.data.source.fold

    def _find(self, dataset_id: str) -> tuple[Path, Manifest] | None:
        own = self.config.data.shards if self.config else None
        for folder in (self._shards, own):
            if folder is None or not (folder / manifest.NAME).is_file():
                continue
            try:
                dataset = of_fold(folder, manifest.read(folder), self._fold_in(folder))
            except UserError as error:
                log.warning("%s", error)
                continue
            if dataset.dataset_id == dataset_id:
                return folder, dataset
        return None

    @cached_property
    def bias(self) -> tuple[BiasReport, Header] | None:
        """report.json of the bias table of the training, and the table's header.

        None where that table is not there any more: one that was made again says what another
        bias model knows. None for a table from elsewhere too, which is a file.
        """
        trained = identity.read(self.environment.get("identity") or {}).get("bias_table")
        folders = [self.config.data.table] if self.config else []
        folders += [self._shards / "bias"] if self._shards else []
        for folder in folders:
            report = _json(folder / "report.json")
            try:
                header = tables.read_header(folder) if report else None
            except UserError:
                continue
            if report and header and header.table_sha256 == trained:
                return cast(BiasReport, report), header
        return None

    def deciders(self, wanted: list[Prediction]) -> dict[str, Decider]:
        """Track id -> what its segments said, for wrong predictions of the main evaluation.

        Args:
            wanted: lines of `predictions`.

        Returns:
            Nothing where logits or shards are not there, or do not fit one another.
        """
        if self.main is None or self.evaluated_on is None:
            return {}
        name, figures = self.main
        path = self.run / "predictions" / f"{name}.logits.npy"
        folder, found = self.evaluated_on
        bounds = found.splits.get(str(figures.get("split")))
        genres = figures["genres"]
        try:
            table: NDArray[np.float32] = np.load(path, mmap_mode="r", allow_pickle=False)
            if bounds is None or table.shape != (bounds[1] - bounds[0], len(genres)):
                raise ValueError(f"{table.shape} logits for rows {bounds}")
            with ShardSet(folder, self._fold_in(folder)) as shards:
                return {
                    line["track"]: _decider(shards, table, bounds[0], line, genres)
                    for line in wanted
                }
        except (OSError, ValueError, EOFError, UserError) as error:
            log.warning("no segments in the report: %s", error)
            return {}


def _decider(
    shards: ShardSet, table: NDArray[np.float32], first: int, line: Prediction, genres: list[str]
) -> Decider:
    dataset = shards.manifest
    track = [t.id for t in dataset.tracks].index(line["track"])
    entry = dataset.tracks[track]
    own = shards.index["track"][first : first + len(table)] == track
    rows = np.flatnonzero(own)
    segments = shards.index["segment"][first + rows].astype(np.int64)
    order = np.argsort(segments)
    rows, segments = rows[order], segments[order]
    probability = softmax(np.asarray(table[rows], np.float64), axis=1)  # [S, K]
    wrong = probability[:, genres.index(line["prediction"])]
    truth = probability[:, genres.index(line["truth"])]
    decided = int(wrong.argmax())
    audio = shards.read(first + int(rows[decided]))
    return Decider(
        start_s=[dataset.start_s(entry, int(segment)) for segment in segments],
        wrong=wrong.tolist(),
        truth=truth.tolist(),
        segment=decided,
        wav=wav_of(audio, dataset.sample_rate),
    )


def wav_of(audio: NDArray[np.int16], sample_rate: int) -> str:
    """A WAV file of a segment, int16 [T], in base64."""
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(sample_rate)
        writer.writeframes(audio.astype("<i2").tobytes())
    return base64.b64encode(file.getvalue()).decode("ascii")


def _json(path: Path) -> Json | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
