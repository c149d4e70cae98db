"""What is kept of a run: checkpoints, and the best model by validation."""

import logging
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mgc_dist.cluster.lease import Lease
from mgc_dist.cluster.watch import Watch
from mgc_dist.data.reader import Batch
from mgc_dist.errors import EXIT_IO, RunFailed
from mgc_dist.events import (
    CheckpointEvent,
    EmaValidationEvent,
    SaveFailedEvent,
    ValidationEvent,
)
from mgc_dist.models.classifier import Base
from mgc_dist.models.folder import BEST, BEST_EMA, save_exported
from mgc_dist.scoring.score import SplitScores, all_score, fit_temperature
from mgc_dist.training import checkpoint
from mgc_dist.training.resume import State
from mgc_dist.training.setup import Run

log = logging.getLogger(__name__)

MAX_FAILED_SAVES = 3
"""Checkpoints in a row that may fail to be written before the run ends."""


def _base_of(run: Run) -> Base:
    main = run.config.main
    return run.model.as_base(main.model, main.revision, run.identity.get("revision", "none"))


def _say(what: str, result: SplitScores, better: bool) -> None:
    track = result.track
    log.info(
        "%s: track NLL %.4f accuracy %.3f macro-F1 %.3f, segment accuracy %.3f%s",
        *(what, track.nll, track.accuracy, track.macro_f1, result.segment.accuracy),
        " (best)" if better else "",
    )


class Keeper:
    """Saves checkpoints, validates, and exports the best model.

    Args:
        run: that is trained.
        held: the right to write into the run folder.
        watch: told of what is done.

    Attributes:
        save_s: seconds of the last save.
        validate_s: seconds of the longest validation so far, its export included.
    """

    def __init__(self, run: Run, held: Lease, watch: Watch) -> None:
        self._run, self._held, self._watch = run, held, watch
        self._failed_saves = 0
        self.save_s = self.validate_s = 0.0

    def is_at_end(self, state: State) -> bool:
        """Whether all positions of the plan are consumed."""
        return state.samples_seen == self._run.plan.total

    def save_is_due(self, step: int) -> bool:
        """Whether a checkpoint is due after an optimizer step, counted from 0."""
        return self._is_due(self._run.config.output.checkpoint_every_epochs, step)

    def validation_is_due(self, step: int) -> bool:
        """Whether a validation is due after an optimizer step, counted from 0."""
        return self._is_due(self._run.config.output.validate_every_epochs, step)

    def _is_due(self, epochs: float, step: int) -> bool:
        plan = self._run.plan
        return plan.due(max(1, round(epochs * plan.rows)), step)

    def is_out_of_patience(self, state: State) -> bool:
        """Whether so many validations in a row were no better that the run ends (`--patience`)."""
        patience = self._run.config.output.patience
        return bool(patience and state.no_better >= patience)

    def all_save(self, step: int, state: State, *, last: bool) -> None:
        """Commit a checkpoint; one that cannot be written is told, and the run goes on.

        Args:
            step: counted from 0.
            state: what the checkpoint remembers.
            last: whether the run ends here. A collective.

        Raises:
            RunFailed: with exit code 74, at the end of the run or the third time in a row.
        """
        run = self._run
        started = time.perf_counter()
        root = run.folder / checkpoint.FOLDER
        try:
            with self._watch.writing(step, "saving", root):
                folder = self._all_commit(step, state)
        except checkpoint.SaveFailed as error:
            self._failed_saves += 1
            self._tell_failure(step, str(error))
            if last or self._failed_saves >= MAX_FAILED_SAVES:
                raise RunFailed(
                    f"no checkpoint could be saved at step {step + 1}: {error}; the last whole one "
                    f"in {root} is untouched",
                    EXIT_IO,
                ) from error
            return
        self._failed_saves = 0
        self.save_s = time.perf_counter() - started
        run.journal.write(
            CheckpointEvent(samples_seen=state.samples_seen, save_s=round(self.save_s, 3))
        )
        log.info("saved %s in %.1f s", folder, self.save_s)

    def _all_commit(self, step: int, state: State) -> Path:
        run = self._run
        root = run.folder / checkpoint.FOLDER
        return checkpoint.all_commit(
            run.folder,
            step + 1,
            run.ranks,
            lambda root, tag: run.engine.state.save(root, tag, asdict(state)),
            facts={
                "world": run.ranks.world,
                "zero_stage": run.engine.zero_stage,
                "identity": run.identity,
                "base": asdict(_base_of(run)),
            },
            keep=run.config.output.keep_checkpoints,
            lease=self._held,
            expected_bytes=run.ranks.all_decide(lambda: checkpoint.size_of_newest(root)),
        )

    def all_validate(self, step: int, state: State) -> None:
        """Walk the validation split; export the model if it is the best so far (a collective).

        The averaged weights are walked after the raw ones, and exported where they are the best
        of their own. `--patience` counts the raw ones.
        """
        run, started = self._run, time.perf_counter()
        run.engine.train(False)
        self._all_validate_weights(step, state)
        if run.engine.keeps_average:
            with run.engine.all_averaged():
                self._all_validate_average(step, state)
        run.engine.train(True)
        state.owes_validation = False
        self.validate_s = max(self.validate_s, time.perf_counter() - started)

    def _all_validate_weights(self, step: int, state: State) -> None:
        run, least = self._run, state.best_loss
        result, better, figures = self._all_judge(step, state, least, BEST)
        loss, broken = figures["select_loss"], result.rows_not_finite
        if figures["exported"]:
            state.best_by, state.best_loss = figures["select"], loss
            state.best_samples_seen = state.samples_seen
        state.no_better = 0 if least is None or loss < least else state.no_better + 1
        if broken and run.ranks.is_first:
            log.warning(
                "the logits of %d of %d validation segments are not finite: this model is not kept",
                *(broken, len(result.logits)),
            )
        run.journal.write(ValidationEvent(**figures, confusion=result.track.confusion.tolist()))
        epoch = state.samples_seen / run.plan.rows
        _say(f"validation after epoch {epoch:.2f}", result, better)

    def _all_validate_average(self, step: int, state: State) -> None:
        result, better, figures = self._all_judge(step, state, state.ema_loss, BEST_EMA)
        if figures["exported"]:
            state.ema_loss = figures["select_loss"]
            state.ema_samples_seen = state.samples_seen
        self._run.journal.write(EmaValidationEvent(**figures))
        _say("averaged weights", result, better)

    def _all_judge(
        self, step: int, state: State, least: float | None, name: str
    ) -> tuple[SplitScores, bool, dict[str, Any]]:
        """Walk the split with what the engine computes with, and export it if it is the best.

        Returns:
            The scores, whether none was better, and what an event says of them.
        """
        run = self._run
        result = all_score(
            run.engine,
            run.shards,
            "validation",
            run.ranks,
            batch=run.config.engine.eval_batch,
            progress=lambda batches: self._watched(step, batches),
            features=run.features,
        )
        select, broken, track = run.config.output.select, result.rows_not_finite, result.track
        loss = result.loss_by(select)
        better = not broken and (least is None or loss <= least)
        figures = {
            "exported": better and self._all_export(step, result, name),
            "select": select,
            "select_loss": loss,
            "segments_not_finite": broken,
            "samples_seen": state.samples_seen,
            "epoch": round(state.samples_seen / run.plan.rows, 4),
            "track_accuracy": track.accuracy,
            "track_macro_f1": track.macro_f1,
            "track_nll": track.nll,
            "segment_accuracy": result.segment.accuracy,
        }
        return result, better, figures

    def _watched(self, step: int, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            self._watch.progress(step, "validating")
            yield batch

    def _all_export(self, step: int, validation: SplitScores, name: str) -> bool:
        """Write the model; whether it could be written. The next better one is tried again."""
        run = self._run

        def write() -> str:
            manifest, folder = run.shards.manifest, run.folder / name
            temperature = fit_temperature(
                *(validation.logits, validation.row_label, validation.row_track),
                [manifest.tracks[track].group for track in validation.tracks],
            )
            try:
                self._held.check()
                save_exported(
                    run.model, weights, folder, manifest.sample_rate, temperature=temperature
                )
            except OSError as error:
                return f"{folder}: {error}"
            return ""

        with self._watch.writing(step, "exporting", run.folder / f"{name}*"):
            weights = run.engine.state.all_weights()
            reason = run.ranks.all_decide(write)
        if reason:
            self._tell_failure(step, reason)
        return not reason

    def _tell_failure(self, step: int, reason: str) -> None:
        if self._run.ranks.is_first:
            log.error("not saved at step %d: %s; the run goes on", step + 1, reason)
        seen = self._run.plan.seen_after(step)
        self._run.journal.write(SaveFailedEvent(samples_seen=seen, step=step + 1, reason=reason))
