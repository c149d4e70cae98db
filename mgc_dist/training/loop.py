"""The training loop: rows in planned order, bias logits in the loss, one agreed state.

Everything that happens (learning rate, logging, validation, checkpoints, the best model) is a
function of `samples_seen`, so that a run that was stopped and resumed, on the same ranks, ends
with the same weights: to the bit on CPUs, where it is tested; GPU kernels may add up in any order.
"""

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mgc_dist.cluster.lease import Lease
from mgc_dist.cluster.ranks import Ranks, seed_everything
from mgc_dist.cluster.stop import Stop, describe
from mgc_dist.cluster.watch import Watch
from mgc_dist.config import Select, TrainConfig
from mgc_dist.console import Bar, progress
from mgc_dist.data import record
from mgc_dist.data.features import Features
from mgc_dist.data.order import Layout, Plan, training_batches
from mgc_dist.data.reader import Batch, Reader, ShardSet
from mgc_dist.errors import EXIT_IO, EXIT_NON_FINITE, RunFailed
from mgc_dist.journal import Journal, RowLedger
from mgc_dist.models.flops import SegmentFlops, peak_tflop_per_s
from mgc_dist.models.folder import save_exported
from mgc_dist.models.main import WaveClassifier
from mgc_dist.scoring.score import SplitScores, all_score, fit_temperature
from mgc_dist.training import checkpoint
from mgc_dist.training.census import Census
from mgc_dist.training.engine import Engine, lr_factor
from mgc_dist.training.meters import Laggards, Meter, Tally
from mgc_dist.training.objective import Objective

log = logging.getLogger(__name__)

MAX_FAILED_SAVES = 3
"""Checkpoints in a row that may fail to be written before the run ends."""


@dataclass
class State:
    """What a checkpoint remembers besides weights and optimizer.

    Attributes:
        samples_seen: positions consumed; the only state of the order.
        best_by: the `--select` that the best validation was chosen by.
        best_loss: what it was chosen by, the smaller the better; None before the first.
        best_samples_seen: when it was reached; a tie goes to the later one.
        refused_in_a_row: steps up to now whose gradient was not finite.
        owes_validation: a validation of these weights is due and has not been made.
    """

    samples_seen: int = 0
    best_by: Select = "nll"
    best_loss: float | None = None
    best_samples_seen: int = 0
    refused_in_a_row: int = 0
    owes_validation: bool = False

    @classmethod
    def restored(cls, values: dict[str, Any]) -> "State":
        """From a checkpoint; version 0.1.0 wrote the best macro-F1, -1 before the first."""
        values = dict(values)
        macro_f1 = values.pop("best_macro_f1", None)
        if macro_f1 is not None:
            values |= {"best_by": "macro-f1", "best_loss": None if macro_f1 < 0 else -macro_f1}
        return cls(**values)

    def forget_best(self, select: Select) -> None:
        """Seek the best model among the validations to come."""
        self.best_by, self.best_loss, self.best_samples_seen = select, None, 0


@dataclass(kw_only=True)
class Fit:
    """A training run, ready to go.

    Attributes:
        config: of the run.
        identity: what a checkpoint must agree with to be resumed here.
        shards: the data.
        objective: the loss, with the bias table in it.
        plan, layout: the order of rows, and how a step's rows lie over ranks.
        flops: of a segment, but what a cache holds; None where the model's kind is not counted.
        model, engine: the main model, and DeepSpeed around it.
        ranks, journal, stop: peers, metrics.jsonl, and what asks for a stop.
        features: read in place of waves, once they are there; None without a cache.
    """

    config: TrainConfig
    identity: dict[str, Any]
    shards: ShardSet
    objective: Objective
    plan: Plan
    layout: Layout
    flops: SegmentFlops | None
    model: WaveClassifier
    engine: Engine
    ranks: Ranks
    journal: Journal
    stop: Stop
    features: Features | None = None

    def __post_init__(self) -> None:
        self._lease: Lease
        self._watch: Watch
        self._census = Census(self.model)
        self._laggards = Laggards()
        self._kept_losses: list[tuple[Tensor, Tensor]] = []
        self._gain: Tensor | None = None
        self._failed_saves = 0
        self._step_s = self._validate_s = self._save_s = 0.0
        self._stepped_at_s = time.monotonic()
        self._rows: RowLedger | None = None

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.config.output.run

    def train(self, state: State, lease: Lease, watch: Watch) -> bool:
        """Train from a state to the end of the plan (a collective).

        Args:
            state: where to begin; it is moved on.
            lease: the right to write into the run folder.
            watch: told of every micro step.

        Returns:
            Whether the end was reached; False after a stop that all ranks agreed on: a
            checkpoint has been saved then.

        Raises:
            RunFailed: too many steps in a row were refused, or checkpoints could not be saved.
            UserError: the census of gradients found one missing.
        """
        self._lease, self._watch = lease, watch
        if self.config.output.row_ledger:
            self._rows = RowLedger(self.run, self._lease.attempt, self.ranks.rank)
        first = self.plan.step_of(state.samples_seen)
        if state.owes_validation:
            self._validate(first - 1, state)
        batches = training_batches(self.plan, self.layout, self.ranks.rank, first)
        pin = self.ranks.device.type == "cuda"
        data = self.config.data
        self.engine.train(True)
        with (
            Reader(
                self.shards,
                "train",
                batches,
                read_ahead=data.read_ahead,
                pin=pin,
                threads=data.reader_threads,
                features=self.features,
            ) as reader,
            progress(
                "training", self.plan.steps, unit="steps", shown=self.ranks.is_first, lines=False
            ) as bar,
        ):
            tally, meter = Tally(self.ranks), Meter(reader, state.samples_seen, first)
            self._stepped_at_s = time.monotonic()
            for batch in reader:
                step = batch.plan.step
                self._watch.progress(step, "computing")
                tally.add(self._forward_backward(batch, meter))
                at_end = batch.plan.micro_step == self.layout.accumulation - 1
                if at_end:
                    self._take_census()
                applied = self.engine.step()
                if at_end:
                    state.samples_seen = self.plan.seen_after(step)
                    self._note_refusal(step, state, applied)
                    asked = bool(self.stop.signal) or self._time_is_up()
                    stopping = tally.reduce(asked)
                    if self._after_step(step, state, stopping, tally, meter, bar):
                        return False
                self._watch.progress(step + at_end, "reading")
        return True

    def _forward_backward(self, batch: Batch, meter: Meter) -> Tensor:
        step, config, device = batch.plan.step, self.config, self.ranks.device
        if batch.plan.micro_step == 0:
            seed_everything(config.output.seed, step, self.ranks.rank)
            self.engine.set_lr(self._lr_factor(step))
            self._kept_losses.clear()
        with meter.own_work():
            logits, gain = self._forward(batch.wave.to(device, non_blocking=True))
        loss = self.objective.micro_loss(batch, logits, gain)
        self._kept_losses.append((batch.row, loss.rows))
        if self._rows:
            self._rows.add(batch.row.tolist())
        self.engine.backward(loss.share)
        return loss.share.detach()

    def _forward(self, wave: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits [B, K], and the gain [B] of the bias where it is learned."""
        if not self.config.objective.learns_gain:
            return self.engine(wave), None
        logits, gain = self.engine.with_gain(wave)
        self._gain = gain.detach()
        return logits, gain

    def _take_census(self) -> None:
        if self._census.is_open:
            self._census.add(self.engine.all_grads())

    def _note_refusal(self, step: int, state: State, applied: bool) -> None:
        """Count steps whose gradient was not finite, name their rows, end after too many.

        Raises:
            RunFailed: with exit code 70.
        """
        if self._rows:
            self._rows.end_step(step)
        if applied:
            state.refused_in_a_row = 0
            return
        state.refused_in_a_row += 1
        bad = [
            int(row)
            for rows, losses in self._kept_losses
            for row, loss in zip(rows.tolist(), losses.tolist(), strict=True)
            if row >= 0 and not math.isfinite(loss)
        ]
        rows = sorted(row for part in self.ranks.all_gather(bad) for row in part)
        keys = ", ".join(self._key(row) for row in rows[:8]) + (", ..." if len(rows) > 8 else "")
        what = f"the losses of {keys}" if rows else "the gradient, with finite losses,"
        message = f"step {step + 1} is refused: {what} not finite"
        if self.ranks.is_first:
            log.warning("%s; %d in a row", message, state.refused_in_a_row)
        self.journal.write("refused", step=step + 1, samples_seen=state.samples_seen, reason=what)
        limit = self.config.engine.max_refused_steps
        if state.refused_in_a_row >= limit:
            raise RunFailed(
                f"{message}; {limit} in a row are too many; the last checkpoint is untouched. "
                "Look at these segments, or lower --lr and --head-lr",
                EXIT_NON_FINITE,
            )

    def _key(self, row: int) -> str:
        entry, tracks = self.shards.index[row], self.shards.manifest.tracks
        return record.key_of(tracks[int(entry["track"])].id, int(entry["segment"]))

    def _time_is_up(self) -> bool:
        """Whether two steps, a validation and a save might not end within the time limit."""
        now, limit = time.monotonic(), self.config.output.time_limit_s
        self._step_s = max(0.9 * self._step_s, now - self._stepped_at_s)
        self._stepped_at_s = now
        if not limit:
            return False
        needed_s = 3 * self._step_s + 1.5 * self._validate_s + 2 * self._save_s + 2
        return now - self.stop.started_at_s + needed_s > limit

    def _lr_factor(self, step: int) -> float:
        optim = self.config.optim
        return lr_factor(
            self.plan.seen_after(step),
            self.plan.total,
            warmup=optim.warmup_fraction,
            final=optim.final_lr_fraction,
        )

    def _after_step(
        self, step: int, state: State, stopping: bool, tally: Tally, meter: Meter, bar: Bar
    ) -> bool:
        """Log, validate, save what is due; returns whether the run stops here."""
        output, rows = self.config.output, self.plan.rows
        ends = state.samples_seen == self.plan.total
        bar.at(step + 1, tally.note)
        if (step + 1) % output.log_every_steps == 0 or ends:
            self._log(step, state, tally.latest(), meter)
        every = max(1, round(output.validate_every_epochs * rows))
        state.owes_validation = self.plan.due(every, step)
        stopping = stopping and not ends
        # saved before it is validated: a validation that fails, or takes longer than the grace
        # of a stop, costs no training; whoever resumes from here makes up for it
        if stopping or self.plan.due(max(1, round(output.checkpoint_every_epochs * rows)), step):
            with meter.paused():
                self._save(step, state, last=stopping or ends)
        if state.owes_validation and not stopping:
            with meter.paused():
                self._validate(step, state)
        self._stepped_at_s = time.monotonic()
        if stopping:
            number = self.stop.signal
            why = describe(number) if number else "the time limit, or a signal to another rank"
            log.info("stopped by %s after step %d, saved; --resume auto goes on", why, step + 1)
        return stopping

    def _log(self, step: int, state: State, loss: float, meter: Meter) -> None:
        factor, optim = self._lr_factor(step), self.config.optim
        window = meter.read(state.samples_seen, step + 1)
        rate, wait = window.segments_per_s, window.wait_share
        slow = self._laggards.all_look(window.own_s, self.ranks)
        if slow and self.ranks.is_first:
            log.warning("%s", slow)
        norm = self.engine.grad_norm()
        epoch = (state.samples_seen - 1) / self.plan.rows
        left_s = (self.plan.total - state.samples_seen) / rate if rate else math.nan
        computed = self._computed(rate)
        self.journal.write(
            "step",
            step=step + 1,
            samples_seen=state.samples_seen,
            epoch=round(epoch, 4),
            loss=loss,
            lr=optim.lr * factor,
            head_lr=optim.head_lr * factor,
            grad_norm=norm,
            **self._bias_strength(step),
            step_s=round(window.step_s, 5),
            segments_per_s=round(rate, 2),
            **computed,
            data_wait_share=round(wait, 5),
            peak_memory_gib=round(_peak_memory_gib(self.ranks.device), 3),
        )
        log.info(
            "step %d/%d epoch %.2f loss %.4f lr %.2e grad %s %.1f segments/s %swait %.1f %% "
            "memory %.2f GiB left %s",
            *(step + 1, self.plan.steps, epoch, loss, optim.lr * factor),
            *("-" if norm is None else f"{norm:.3f}", rate),
            *(f"MFU {100 * computed['mfu']:.1f} % " if "mfu" in computed else "", 100 * wait),
            *(_peak_memory_gib(self.ranks.device), _clock(left_s)),
        )

    def _computed(self, segments_per_s: float) -> dict[str, float]:
        """TFLOP/s that the model needed on each rank, and its share of the device's peak."""
        if self.flops is None:
            return {}
        reached = self.flops.training * segments_per_s / self.ranks.world / 1e12
        peak = peak_tflop_per_s(self.ranks.device)
        found = {"model_tflop_per_s": float(f"{reached:.5g}")}
        return found | ({} if peak is None else {"mfu": round(reached / peak, 5)})

    def _bias_strength(self, step: int) -> dict[str, float]:
        """How much the bias counts: beta, or the mean gain of rank 0's last micro batch."""
        if self._gain is not None:
            return {"mean_gain": float(self._gain.mean())}
        return {"beta": self.objective.beta(step)} if self.config.objective.loss == "poe" else {}

    def _validate(self, step: int, state: State) -> None:
        def watched(batches: Iterator[Batch]) -> Iterator[Batch]:
            for batch in batches:
                self._watch.progress(step, "validating")
                yield batch

        started = time.perf_counter()
        self.engine.train(False)
        result = all_score(
            self.engine,
            self.shards,
            "validation",
            self.ranks,
            batch=self.config.engine.eval_batch,
            progress=watched,
            features=self.features,
        )
        self.engine.train(True)
        select, broken = self.config.output.select, result.rows_not_finite
        loss, least = result.loss_by(select), state.best_loss
        better = not broken and (least is None or loss <= least)
        exported = better and self._export(step, self.run / "best", result)
        if broken and self.ranks.is_first:
            log.warning(
                "the logits of %d of %d validation segments are not finite: this model is not kept",
                *(broken, len(result.logits)),
            )
        self.journal.write(
            "validation",
            exported=exported,
            select=select,
            select_loss=loss,
            segments_not_finite=broken,
            samples_seen=state.samples_seen,
            epoch=round(state.samples_seen / self.plan.rows, 4),
            track_accuracy=result.track.accuracy,
            track_macro_f1=result.track.macro_f1,
            track_nll=result.track.nll,
            segment_accuracy=result.segment.accuracy,
            confusion=result.track.confusion.tolist(),
        )
        log.info(
            "validation after epoch %.2f: track NLL %.4f accuracy %.3f macro-F1 %.3f, "
            "segment accuracy %.3f%s",
            *(state.samples_seen / self.plan.rows, result.track.nll, result.track.accuracy),
            *(result.track.macro_f1, result.segment.accuracy, " (best)" if better else ""),
        )
        if exported:
            state.best_by, state.best_loss = select, loss
            state.best_samples_seen = state.samples_seen
        state.owes_validation = False
        self._validate_s = max(self._validate_s, time.perf_counter() - started)

    def _export(self, step: int, folder: Path, validation: SplitScores) -> bool:
        """Write the model; whether it could be written. The next better one is tried again."""
        self._watch.progress(step, "exporting")
        weights = self.engine.all_weights()

        def write() -> str:
            tracks = self.shards.manifest.tracks
            temperature = fit_temperature(
                *(validation.logits, validation.row_label, validation.row_track),
                [tracks[place].group for place in validation.tracks],
            )
            rate = self.shards.manifest.sample_rate
            try:
                self._lease.check()
                save_exported(self.model, weights, folder, rate, temperature=temperature)
            except OSError as error:
                return f"{folder}: {error}"
            return ""

        reason = self.ranks.all_decide(write)
        if reason:
            self._tell_failure(step, reason)
        return not reason

    def _save(self, step: int, state: State, *, last: bool) -> None:
        """Commit a checkpoint; one that cannot be written is told, and the run goes on.

        Raises:
            RunFailed: with exit code 74, at the end of the run or the third time in a row.
        """
        self._watch.progress(step, "saving")
        started = time.perf_counter()
        root = self.run / checkpoint.FOLDER
        try:
            folder = checkpoint.all_commit(
                self.run,
                step + 1,
                self.ranks,
                lambda root, tag: self.engine.save(root, tag, asdict(state)),
                facts={
                    "world": self.ranks.world,
                    "zero_stage": self.engine.zero_stage,
                    "identity": self.identity,
                },
                keep=self.config.output.keep_checkpoints,
                lease=self._lease,
                expected_bytes=self.ranks.all_decide(lambda: checkpoint.size_of_newest(root)),
            )
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
        self._save_s = time.perf_counter() - started
        self.journal.write(
            "checkpoint", samples_seen=state.samples_seen, save_s=round(self._save_s, 3)
        )
        log.info("saved %s in %.1f s", folder, self._save_s)

    def _tell_failure(self, step: int, reason: str) -> None:
        if self.ranks.is_first:
            log.error("not saved at step %d: %s; the run goes on", step + 1, reason)
        self.journal.write("save_failed", step=step + 1, reason=reason)


def _peak_memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "-"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
