"""The body of `exam`: a run's best model on transformed music, kept piece by piece.

RUN/exam/NAME holds the answers to each transformation as soon as they are known, so an exam that
was stopped goes on. All ranks walk together; rank 0 reads, writes, fits and judges.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray
from scipy.special import softmax
from torch import Tensor

from mgc_dist.bias_model.heads import fit_head
from mgc_dist.cluster import ranks
from mgc_dist.cluster.meeting import Meeting
from mgc_dist.cluster.ranks import Ranks
from mgc_dist.config import ExamConfig
from mgc_dist.console import progress
from mgc_dist.data.reader import Batch, ShardSet
from mgc_dist.errors import UserError
from mgc_dist.files import fingerprint, locked, replace_text, replacing
from mgc_dist.models import folder
from mgc_dist.models.classifier import WaveClassifier
from mgc_dist.report import exam_report, measure
from mgc_dist.scoring import exams, intervals, sufficient
from mgc_dist.scoring.exams import Bands, Exam, Heard, Key, Line
from mgc_dist.scoring.score import SplitScores, judge
from mgc_dist.scoring.walk import all_batches, all_rows
from mgc_dist.sound.draws import mixed
from mgc_dist.sound.transformations import TRANSFORMATIONS, transformed

log = logging.getLogger(__name__)

VERSION = 1
"""Of what is kept; changes whenever a transformation's digits do."""
UNTOUCHED: Key = ("untouched", 0.0)
_OTHERS = 1
"""Stream of numbers of a row."""
_HEARD = 2
"""Changed answers of each of the worst transformations that are written as audio."""


class Kept:
    """Arrays in a folder by name, of one model, data set and seed; rank 0 alone calls it.

    Args:
        folder: of the arrays.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def begin(self, of: str) -> None:
        """Make the folder; what is of another model, data set or seed is removed.

        Args:
            of: what the arrays depend on.
        """
        mark = self.folder / "of.txt"
        if not mark.is_file() or mark.read_text(encoding="utf-8") != of:
            for path in (*self.folder.glob("*.npy"), *self.folder.glob("*.wav")):
                path.unlink()
            replace_text(mark, of)

    def has(self, what: str, key: Key) -> bool:
        """Whether an array is there: it is whole then."""
        return self._path(what, key).is_file()

    def put(self, what: str, key: Key, values: NDArray[np.float32]) -> None:
        """Write an array."""
        with replacing(self._path(what, key)) as file:
            np.save(file, values, allow_pickle=False)

    def get(self, what: str, key: Key) -> NDArray[np.float32]:
        """Read an array."""
        found: NDArray[np.float32] = np.load(self._path(what, key), allow_pickle=False)
        return found

    def _path(self, what: str, key: Key) -> Path:
        return self.folder / f"{what} {key[0]} {key[1]:g}.npy"


def examine(config: ExamConfig, meeting: Meeting) -> Exam | None:
    """Hear a split as it is and transformed, judge tracks, write RUN/exam/NAME.json (a collective).

    Args:
        config: which run, which split, which transformations.
        meeting: of the ranks.

    Returns:
        The exam; None on all ranks but the first.

    Raises:
        UserError: no model or data there, other genres than the model's, no such transformation,
            or another process examines the same.
    """
    keys = chosen(config.only)
    with ExitStack() as held:
        model, shards, shared = held.enter_context(measure.opened(config.evaluation, meeting))
        if shared is not None:
            raise UserError(
                f"genres of {shards.folder}",
                got=", ".join(shards.manifest.genres),
                expected=f"those of the model, in order: {', '.join(model.genres)}",
                cure="examine it on shards of these genres; without --data, on the run's own",
            )
        peers = held.enter_context(ranks.join(config.device, meeting=meeting))
        examiner = _Examiner(config, model.to(peers.device), shards, peers)
        peers.all_decide(lambda: held.enter_context(examiner.taken()) or None)
        return examiner.all_examine(keys)


def chosen(only: Sequence[str]) -> list[Key]:
    """Transformations with their strengths: all, or those of some names.

    Raises:
        UserError: there is none of a name.
    """
    unknown = [name for name in only if name not in TRANSFORMATIONS]
    if unknown:
        raise UserError(
            f"--only {' '.join(only)}",
            got=unknown[0],
            expected=f"some of {', '.join(TRANSFORMATIONS)}",
            cure="leave it out for all of them",
        )
    return [
        (name, float(strength))
        for name, each in TRANSFORMATIONS.items()
        if not only or name in only
        for strength in each.strengths
    ]


class _Examiner:
    """Walks over transformed rows, on all ranks, and keeps what it finds."""

    def __init__(
        self, config: ExamConfig, model: WaveClassifier, shards: ShardSet, peers: Ranks
    ) -> None:
        self._config, self._model, self._shards, self._peers = config, model, shards, peers
        self._kept, self._rate = Kept(config.folder), shards.manifest.sample_rate
        self._genres = shards.manifest.genres
        first, stop = shards.rows_of(config.split)
        self._label, self._track = shards.labels[first:stop], shards.tracks[first:stop]
        self._tracks = [shards.manifest.tracks[place] for place in np.unique(self._track)]
        units = intervals.units_of([each.group for each in self._tracks])
        self._unit, self._cluster = next(iter(units.items()))
        self._weights = ""

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Have the exam's folder alone, without what another exam has left in it (rank 0)."""
        config = self._config
        self._kept.folder.mkdir(parents=True, exist_ok=True)
        exported = folder.find_exported(config.run, ema=config.ema)
        self._weights = fingerprint(exported / folder.WEIGHTS)
        words = (VERSION, self._weights, self._shards.manifest.dataset_id)
        settings = (config.split, config.seed, config.batch, config.head_c)
        with locked(self._kept.folder / "lock", wait_s=0, purpose=f"examining {config.run}"):
            self._kept.begin(f"{words} {settings} {self._model.temperature}")
            yield

    def all_examine(self, keys: Sequence[Key]) -> Exam | None:
        """Answers, controls, bands, figures (a collective)."""
        self._all_answer([UNTOUCHED, *keys])
        lines, always, under_control = self._peers.all_decide(partial(self._first_lines, keys))
        self._all_refit(under_control)
        bands = self._all_search()
        return self._peers.all_decide(partial(self._write, lines, always, under_control, bands))

    def _all_answer(self, keys: Sequence[Key]) -> None:
        """Logits of the split under each transformation that is not kept yet (a collective)."""
        missing = self._missing("answers", keys)
        with self._bar("exam", len(missing), (self._config.split,)) as over:
            for number, key in enumerate(missing, start=1):
                found = self._all_rows(
                    self._model.calibrated, self._config.split, key, len(self._genres), over
                )
                self._peers.all_decide(partial(self._kept.put, "answers", key, found))
                log.info("%d of %d: %s %g", number, len(missing), *key)

    def _all_refit(self, keys: Sequence[Key]) -> None:
        """Answers of the last layer, fitted anew on transformed training rows (a collective)."""
        missing = self._missing("refitted", keys)
        if not missing:
            return
        below = _BelowHead(self._model)
        with self._bar("controls", len(missing), ("train", self._config.split)) as over:
            for key in missing:
                splits = ("train", self._config.split)
                hidden = [self._all_rows(below, s, key, below.width, over) for s in splits]
                self._peers.all_decide(partial(self._refit, key, *hidden))
                log.info("last layer fitted anew: %s %g", *key)
        below.remove()

    def _refit(self, key: Key, hidden: NDArray[np.float32], asked: NDArray[np.float32]) -> None:
        first, stop = self._shards.rows_of("train")
        label = self._shards.labels[first:stop]
        head = fit_head(hidden, label, len(self._genres), self._config.head_c)
        self._kept.put("refitted", key, head.logits(asked).astype(np.float32))

    def _missing(self, what: str, keys: Sequence[Key]) -> list[Key]:
        """What is not kept yet (a collective)."""
        return self._peers.all_decide(lambda: [k for k in keys if not self._kept.has(what, k)])

    @contextmanager
    def _bar(
        self, title: str, passes: int, splits: Sequence[str]
    ) -> Iterator[Callable[[Iterator[Batch]], Iterator[Batch]]]:
        """A bar over several passes."""
        turns, done = passes * sum(map(self._turns, splits)), 0

        def over(batches: Iterator[Batch]) -> Iterator[Batch]:
            nonlocal done
            for each in batches:
                yield each
                done += 1
                bar.at(done)

        with progress(title, turns, shown=self._peers.is_first) as bar:
            yield over

    def _turns(self, split: str) -> int:
        first, stop = self._shards.rows_of(split)
        return math.ceil((stop - first) / (self._config.batch * self._peers.world))

    def _all_rows(
        self,
        forward: Callable[[Tensor], Tensor],
        split: str,
        key: Key,
        width: int,
        over: Callable[[Iterator[Batch]], Iterator[Batch]],
    ) -> NDArray[np.float32]:
        return all_rows(
            forward,
            self._shards,
            split,
            self._peers,
            batch=self._config.batch,
            width=width,
            progress=over,
            change=None if key == UNTOUCHED else partial(self._changed, key, split),
        )

    def _changed(self, key: Key, split: str, wave: Tensor, row: Tensor) -> Tensor:
        other = self._others(split, row) if TRANSFORMATIONS[key[0]].wants_other else None
        return transformed(*key, wave, row, rate=self._rate, seed=self._config.seed, other=other)

    def _others(self, split: str, row: Tensor) -> Tensor:
        """A segment of the same split for each row, by row and seed: int16 [B, T]."""
        first, stop = self._shards.rows_of(split)
        draw = mixed(mixed(row, self._config.seed), _OTHERS)
        chosen = (first + torch.remainder(draw, stop - first)).cpu().numpy()
        wave = np.empty((len(chosen), self._shards.manifest.segment_samples), np.int16)
        self._shards.read_batch(chosen, wave, np.empty(len(chosen), np.int64))
        return torch.from_numpy(wave).to(row.device)

    def _all_search(self) -> Bands | None:
        """Bands that suffice, of the first segments of the split; None on other ranks."""
        config = self._config
        wanted = min(config.band_segments, len(self._label))
        if not wanted:
            return None
        batch = min(config.batch, len(self._label))
        search = sufficient.Search(self._model.calibrated, self._rate)
        numbers = range(math.ceil(wanted / batch))
        turns = math.ceil(len(numbers) / self._peers.world)
        with progress("bands", turns, shown=self._peers.is_first) as bar:
            groups = all_batches(
                search,
                self._shards,
                config.split,
                self._peers,
                batch=batch,
                numbers=numbers,
                at_once=len(numbers),
                progress=bar.over,
            )
            found = np.concatenate([each.values for group in groups for each in group])
        return sufficient.summed_up(found, self._genres, self._rate)

    def _judged(self, what: str, key: Key) -> SplitScores:
        logits = self._kept.get(what, key)
        return judge(logits, self._label, self._track, self._config.split)

    def _first_lines(self, keys: Sequence[Key]) -> tuple[list[Line], float, list[Key]]:
        """Figures without controls, what is always right, what is to be controlled (rank 0)."""
        found = {key: self._judged("answers", key) for key in keys}
        about = {key: (TRANSFORMATIONS[key[0]].unit, TRANSFORMATIONS[key[0]].about) for key in keys}
        untouched = self._judged("answers", UNTOUCHED)
        lines = exams.lines(untouched, found, about, self._cluster, self._genres)
        always = exams.always_right([untouched, *found.values()])
        first, stop = self._shards.manifest.splits["train"]
        if self._config.controls == "none" or first == stop:
            log.info("no controls" + ": the data set has no training rows" * (first == stop))
            return lines, always, []
        every = self._config.controls == "all"
        return lines, always, [UNTOUCHED, *(keys if every else exams.worst(lines))]

    def _write(
        self,
        lines: Sequence[Line],
        always: float,
        under_control: Sequence[Key],
        bands: Bands | None,
    ) -> Exam:
        """All figures, written (rank 0)."""
        config, genres = self._config, len(self._genres)
        untouched = self._judged("answers", UNTOUCHED)
        refitted = self._judged("refitted", UNTOUCHED) if under_control else None
        done = []
        for line in lines:
            key = (line.name, line.strength)
            if refitted and key in under_control:
                after = self._judged("refitted", key)
                line = exams.controlled(line, refitted, after, self._cluster, genres)
            done.append(line)
        whole = exams.drop(untouched, untouched, self._cluster, genres)
        exam = Exam(
            run=config.run.resolve().name,
            name=config.folder.name,
            split=config.split,
            dataset_id=self._shards.manifest.dataset_id,
            weights=self._weights,
            genres=list(self._genres),
            seed=config.seed,
            unit=self._unit,
            tracks=len(self._tracks),
            segments=len(self._label),
            untouched=untouched.track.accuracy,
            untouched_interval=whole["interval"],
            refitted=refitted.track.accuracy if refitted else None,
            transformations=done,
            worst=exams.worst(lines, 1)[0],
            always_right=always,
            heard=[each for key in exams.worst(lines) for each in self._heard(key, untouched)],
            bands=bands,
        )
        exam_report.write(exam, config.file.with_suffix(".png"))
        replace_text(config.file, exam.to_json())
        return exam

    def _heard(self, key: Key, before: SplitScores) -> list[Heard]:
        """Tracks that were right and are most surely wrong now, with their audio."""
        after = self._judged("answers", key)
        lost = np.flatnonzero((before.guesses == before.labels) & (after.guesses != after.labels))
        share = after.probabilities[lost, after.guesses[lost]]
        return [
            self._hear(key, int(place), before, after)
            for place in lost[np.argsort(-share, kind="stable")][:_HEARD]
        ]

    def _hear(self, key: Key, place: int, before: SplitScores, after: SplitScores) -> Heard:
        first, _ = self._shards.rows_of(self._config.split)
        own = np.flatnonzero(self._track == after.tracks[place])  # rows of the track
        number = self._shards.index["segment"][first + own].astype(np.int64)
        own, number = own[np.argsort(number)], np.sort(number)
        truth, answer = int(after.labels[place]), int(after.guesses[place])
        said = [softmax(of.logits[own].astype(np.float64), axis=1) for of in (before, after)]
        segment = int(said[1][:, answer].argmax())
        row, entry = first + int(own[segment]), self._tracks[place]
        wave = torch.from_numpy(self._shards.read(row).copy())[None].to(self._peers.device)
        split = self._config.split
        changed = self._changed(key, split, wave, torch.tensor([row], device=self._peers.device))
        file = f"{key[0]} {key[1]:g} {row}.wav"
        with replacing(self._kept.folder / file) as out:
            soundfile.write(out, changed[0].cpu().numpy(), self._rate, "PCM_16", format="WAV")
        return Heard(
            name=key[0],
            strength=key[1],
            track=entry.id,
            truth=self._genres[truth],
            answer=self._genres[answer],
            share=float(after.probabilities[place, answer]),
            truth_share=float(after.probabilities[place, truth]),
            start_s=[self._shards.manifest.start_s(entry, int(each)) for each in number],
            before=said[0][:, truth].tolist(),
            after=said[1][:, truth].tolist(),
            segment=segment,
            file=file,
        )


class _BelowHead:
    """What the last layer of a model gets: int16 [B, T] -> [B, D], over crops their mean."""

    def __init__(self, model: WaveClassifier) -> None:
        head = model.net.get_submodule(model.kind.head)
        self.width = int(cast(torch.nn.Linear, head).in_features)
        self._model, self._parts = model, list[Tensor]()
        self._hook = head.register_forward_pre_hook(self._keep)

    def _keep(self, layer: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._parts.append(inputs[0])  # [B, D]

    def __call__(self, wave: Tensor) -> Tensor:
        self._parts.clear()
        self._model(wave)
        return torch.stack(self._parts).mean(dim=0)

    def remove(self) -> None:
        """Leave the model as it was."""
        self._hook.remove()
