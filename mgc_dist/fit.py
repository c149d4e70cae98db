"""The training loop: rows in planned order, bias logits in the loss, one agreed state.

Everything that happens (learning rate, logging, validation, checkpoints, the best model) is a
function of `samples_seen`, so that a run that was stopped and resumed, on the same ranks, ends
with the same weights: to the bit on CPUs, where it is tested; GPU kernels may add up in any order.
"""

import logging
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mgc_dist import checkpoint
from mgc_dist.config import TrainConfig
from mgc_dist.data import Batch, Reader, ShardSet
from mgc_dist.display import Bar, progress
from mgc_dist.engine import Engine, lr_factor
from mgc_dist.journal import Journal
from mgc_dist.logits import BiasTable
from mgc_dist.loss import masked_sum, row_losses
from mgc_dist.model import WaveClassifier, save_exported
from mgc_dist.plan import Layout, Plan, training_batches
from mgc_dist.ranks import Ranks, seed_everything
from mgc_dist.score import all_score
from mgc_dist.stop import Stop
from mgc_dist.tally import Meter, Tally

log = logging.getLogger(__name__)


@dataclass
class State:
    """What a checkpoint remembers besides weights and optimizer.

    Attributes:
        samples_seen: positions consumed; the only state of the order.
        best_macro_f1: best validation macro-F1 over tracks so far, -1 before the first.
        best_samples_seen: when it was reached; a tie keeps the earlier one.
    """

    samples_seen: int = 0
    best_macro_f1: float = -1.0
    best_samples_seen: int = 0


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A training run, ready to go.

    Attributes:
        config: of the run.
        identity: what a checkpoint must agree with to be resumed here.
        shards, table: the data; no table for the loss `ce`.
        plan, layout: the order of rows, and how a step's rows lie over ranks.
        model, engine: the main model, and DeepSpeed around it.
        ranks, journal, stop: peers, metrics.jsonl, and the signal flag.
    """

    config: TrainConfig
    identity: dict[str, Any]
    shards: ShardSet
    table: BiasTable | None
    plan: Plan
    layout: Layout
    model: WaveClassifier
    engine: Engine
    ranks: Ranks
    journal: Journal
    stop: Stop

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.config.output.run

    def train(self, state: State) -> bool:
        """Train from a state to the end of the plan (a collective).

        Returns:
            Whether the end was reached; False after a stop that all ranks agreed on: a
            checkpoint has been saved then.

        Raises:
            NonFiniteLoss: a step's loss was NaN or infinite.
        """
        first = self.plan.step_of(state.samples_seen)
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
            ) as reader,
            progress(
                "training", self.plan.steps, unit="steps", shown=self.ranks.is_first, lines=False
            ) as bar,
        ):
            tally, meter = Tally(self.ranks), Meter(reader, state.samples_seen)
            for batch in reader:
                loss_sum = self._micro_step(batch)
                tally.add(loss_sum)
                if batch.plan.micro_step < self.layout.accumulation - 1:
                    continue
                step = batch.plan.step
                state.samples_seen = self.plan.seen_after(step)
                stopping = tally.reduce(step, self.plan, self.stop.signal)
                if self._after_step(step, state, stopping, tally, meter, bar):
                    return False
        return True

    def _micro_step(self, batch: Batch) -> Tensor:
        step, config, device = batch.plan.step, self.config, self.ranks.device
        if batch.plan.micro_step == 0:
            seed_everything(config.output.seed, step, self.ranks.rank)
            self.engine.set_lr(self._lr_factor(step))
        logits = self.engine(batch.wave.to(device, non_blocking=True))  # [B, K]
        bias = self.table.lookup(batch.row).to(device, non_blocking=True) if self.table else None
        losses = row_losses(
            config.objective.loss,
            logits,
            batch.label.to(device, non_blocking=True),
            bias,
            beta=config.objective.beta,
            bias_ratio=config.objective.bias_ratio,
        )  # [B]
        loss_sum = masked_sum(losses, batch.weight.to(device, non_blocking=True))
        self.engine.step(loss_sum, self.plan.true_rows(step))
        return loss_sum.detach()

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
        if self.plan.due(max(1, round(output.validate_every_epochs * rows)), step):
            with meter.paused():
                self._validate(state, tally)
        stopping = stopping and not ends
        if stopping or self.plan.due(max(1, round(output.checkpoint_every_epochs * rows)), step):
            with meter.paused():
                self._save(step, state, tally)
        if stopping:
            log.info("stopped by a signal after step %d, saved; --resume auto goes on", step + 1)
        return stopping

    def _log(self, step: int, state: State, loss: float, meter: Meter) -> None:
        factor, optim = self._lr_factor(step), self.config.optim
        rate, wait = meter.read(state.samples_seen)
        norm = self.engine.grad_norm()
        epoch = (state.samples_seen - 1) / self.plan.rows
        left_s = (self.plan.total - state.samples_seen) / rate if rate else math.nan
        self.journal.write(
            "step",
            step=step + 1,
            samples_seen=state.samples_seen,
            epoch=round(epoch, 4),
            loss=loss,
            lr=optim.lr * factor,
            head_lr=optim.head_lr * factor,
            grad_norm=norm,
            segments_per_s=round(rate, 2),
            data_wait_share=round(wait, 5),
            peak_memory_gib=round(_peak_memory_gib(self.ranks.device), 3),
        )
        log.info(
            "step %d/%d epoch %.2f loss %.4f lr %.2e grad %s %.1f segments/s wait %.1f %% "
            "memory %.2f GiB left %s",
            *(step + 1, self.plan.steps, epoch, loss, optim.lr * factor),
            *("-" if norm is None else f"{norm:.3f}", rate, 100 * wait),
            *(_peak_memory_gib(self.ranks.device), _clock(left_s)),
        )

    def _validate(self, state: State, tally: Tally) -> None:
        tally.latest()
        self.engine.train(False)
        batch = self.config.engine.micro_batch
        result = all_score(self.engine, self.shards, "validation", self.ranks, batch=batch)
        self.engine.train(True)
        better = result.track.macro_f1 > state.best_macro_f1
        self.journal.write(
            "validation",
            samples_seen=state.samples_seen,
            epoch=round(state.samples_seen / self.plan.rows, 4),
            track_accuracy=result.track.accuracy,
            track_macro_f1=result.track.macro_f1,
            track_nll=result.track.nll,
            segment_accuracy=result.segment.accuracy,
        )
        log.info(
            "validation after epoch %.2f: track accuracy %.3f macro-F1 %.3f, segments %.3f%s",
            *(state.samples_seen / self.plan.rows, result.track.accuracy, result.track.macro_f1),
            *(result.segment.accuracy, " (best)" if better else ""),
        )
        if better:
            state.best_macro_f1 = result.track.macro_f1
            state.best_samples_seen = state.samples_seen
            self._export(self.run / "best")

    def _export(self, folder: Path) -> None:
        weights = self.engine.all_weights()
        if self.ranks.is_first:
            save_exported(self.model, weights, folder, self.shards.manifest.sample_rate)
        self.ranks.barrier()

    def _save(self, step: int, state: State, tally: Tally) -> None:
        tally.latest()  # raises before a state with NaN is saved
        started = time.perf_counter()
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
        )
        seconds = time.perf_counter() - started
        self.journal.write("checkpoint", samples_seen=state.samples_seen, save_s=round(seconds, 3))
        log.info("saved %s in %.1f s", folder, seconds)


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
