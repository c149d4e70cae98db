"""The training loop: rows in planned order, bias logits in the loss, one agreed state.

Everything that happens (learning rate, logging, validation, checkpoints, the best model) is a
function of `samples_seen`, so that a run that was stopped and resumed, on the same ranks, ends
with the same weights: to the bit on CPUs, where it is tested; GPU kernels may add up in any order.
"""

import logging
import math
import time
from contextlib import ExitStack

from torch import Tensor

from mgc_dist.cluster.lease import Lease
from mgc_dist.cluster.ranks import seed_everything
from mgc_dist.cluster.stop import Stop, describe
from mgc_dist.cluster.watch import Watch
from mgc_dist.console import progress
from mgc_dist.data import record
from mgc_dist.data.order import training_batches
from mgc_dist.data.reader import Batch, Reader
from mgc_dist.errors import EXIT_NON_FINITE, RunFailed
from mgc_dist.events import RefusedEvent
from mgc_dist.journal import RowLedger
from mgc_dist.training.keeper import Keeper
from mgc_dist.training.logbook import Logbook, rate_factor
from mgc_dist.training.losses import MicroLoss
from mgc_dist.training.meters import Census, Meter, Tally
from mgc_dist.training.resume import State
from mgc_dist.training.setup import Run

log = logging.getLogger(__name__)


def train(run: Run, state: State, held: Lease, watch: Watch) -> bool:
    """Train from a state to the end of the plan (a collective).

    Args:
        run: what is trained on what.
        state: where to begin; it is moved on.
        held: the right to write into the run folder.
        watch: told of every micro step.

    Returns:
        Whether the end was reached, of the plan or of `--patience`; False after a stop that all
        ranks agreed on: a checkpoint has been saved then.

    Raises:
        RunFailed: too many steps in a row were refused, or checkpoints could not be saved.
        UserError: the census of gradients found one missing.
    """
    logbook, keeper = Logbook(run), Keeper(run, held, watch)
    refusals, census = Refusals(run, held.attempt), Census(run.model)
    deadline = Deadline(run.config.output.time_limit_s, run.stop)
    first = run.plan.step_of(state.samples_seen)
    if state.owes_validation:
        keeper.all_validate(first - 1, state)
    if keeper.is_out_of_patience(state):
        return True
    run.engine.train(True)
    with ExitStack() as stack:
        reader = stack.enter_context(_reader(run, first))
        bar = stack.enter_context(
            progress(
                "training", run.plan.steps, unit="steps", shown=run.ranks.is_first, lines=False
            )
        )
        tally, meter = Tally(run.ranks), Meter(reader, state.samples_seen, first)
        deadline.restart()
        for batch in reader:
            step = batch.plan.step
            is_last = batch.plan.micro_step == run.layout.accumulation - 1
            watch.progress(step, "computing")

            # forward, loss, backward, step
            if batch.plan.micro_step == 0:
                begin_step(run, step)
            loss, gain = forward(run, batch, meter)
            logbook.keep(gain)
            refusals.keep(batch, loss)
            run.engine.backward(loss.share)
            tally.add(loss.share.detach())
            if is_last and census.is_open:
                census.add(run.engine.all_grads())
            applied = run.engine.step()

            # refused? log? save? validate?
            if is_last:
                state.samples_seen = run.plan.seen_after(step)
                refusals.all_note(step, state, applied)
                asked = bool(run.stop.signal) or deadline.is_up(keeper)
                stopping = tally.reduce(asked) and state.samples_seen < run.plan.total
                bar.at(step + 1, tally.note)
                logbook.all_note(step, state, tally, meter)
                with meter.paused():
                    all_keep(keeper, step, state, stopping)
                deadline.restart()
                if stopping:
                    _say_stopped(run, step)
                    return False
                if keeper.is_out_of_patience(state):
                    return True
            watch.progress(step + is_last, "reading")
    return True


def _reader(run: Run, first: int) -> Reader:
    """The batches of this rank, from an optimizer step on."""
    data = run.config.data
    return Reader(
        run.shards,
        "train",
        training_batches(run.plan, run.layout, run.ranks.rank, first),
        read_ahead=data.read_ahead,
        pin=run.ranks.device.type == "cuda",
        threads=data.reader_threads,
        features=run.features,
    )


def begin_step(run: Run, step: int) -> None:
    """Set the learning rates of an optimizer step."""
    run.engine.set_lr(rate_factor(run, step))


def forward(run: Run, batch: Batch, meter: Meter) -> tuple[MicroLoss, Tensor | None]:
    """What a micro batch loses, and the gain of the bias, float32 [B], where it is learned.

    Dropout is drawn by the number of the micro batch in its step, masks by row: who computes it
    does not matter.
    """
    seed_everything(run.config.output.seed, batch.plan.step, batch.plan.number)
    device, gain = run.ranks.device, None
    with meter.own_work():
        taken, draw = (each.to(device, non_blocking=True) for each in (batch.input, batch.draw))
        if run.config.objective.learns_gain:
            logits, gain = run.engine.with_gain(taken, draw)
        else:
            logits = run.engine(taken, draw)  # [B, K]
    return run.objective.micro_loss(batch, logits, gain), gain


def all_keep(keeper: Keeper, step: int, state: State, stopping: bool) -> None:
    """Save and validate what is due after a step (a collective).

    It is saved before it is validated: a validation that fails, or takes longer than the grace of a
    stop, costs no training. Whoever resumes from here makes up for it.
    """
    state.owes_validation = keeper.validation_is_due(step)
    if stopping or keeper.save_is_due(step):
        keeper.all_save(step, state, last=stopping or keeper.is_at_end(state))
    if state.owes_validation and not stopping:
        keeper.all_validate(step, state)
        if keeper.is_out_of_patience(state) and not keeper.is_at_end(state):
            log.info(
                "%d validations in a row were no better (--patience): the run ends here",
                state.no_better,
            )
            keeper.all_save(step, state, last=True)


def _say_stopped(run: Run, step: int) -> None:
    number = run.stop.signal
    why = describe(number) if number else "the time limit, or a signal to another rank"
    log.info("stopped by %s after step %d, saved; --resume auto goes on", why, step + 1)


class Refusals:
    """Steps whose gradient was not finite: their rows are named, and too many end the run.

    Args:
        run: that is trained.
        attempt: name of this try, for the ledger of consumed rows.
    """

    def __init__(self, run: Run, attempt: str) -> None:
        self._run = run
        self._losses: list[tuple[Tensor, Tensor]] = []
        wanted = run.config.output.row_ledger
        self._ledger = RowLedger(run.folder, attempt, run.ranks.rank) if wanted else None

    def keep(self, batch: Batch, loss: MicroLoss) -> None:
        """Keep what each row of a micro batch loses, until its step has been taken."""
        if batch.plan.micro_step == 0:
            self._losses.clear()
        self._losses.append((batch.row, loss.rows))
        if self._ledger:
            self._ledger.add(batch.row.tolist())

    def all_note(self, step: int, state: State, applied: bool) -> None:
        """Count a step that was refused, name its rows, end after too many (a collective).

        Raises:
            RunFailed: with exit code 70.
        """
        if self._ledger:
            self._ledger.end_step(step)
        if applied:
            state.refused_in_a_row = 0
            return
        state.refused_in_a_row += 1
        run, rows = self._run, self._all_bad_rows()
        keys = ", ".join(self._key(row) for row in rows[:8]) + (", ..." if len(rows) > 8 else "")
        what = f"the losses of {keys}" if rows else "the gradient, with finite losses,"
        if run.engine.loss_scale != 1:
            what += f" (the loss scale falls to {run.engine.loss_scale:g})"
        message = f"step {step + 1} is refused: {what} not finite"
        if run.ranks.is_first:
            log.warning("%s; %d in a row", message, state.refused_in_a_row)
        seen = state.samples_seen
        run.journal.write(RefusedEvent(samples_seen=seen, step=step + 1, reason=what))
        limit = run.config.engine.max_refused_steps
        if state.refused_in_a_row >= limit:
            raise RunFailed(
                f"{message}; {limit} in a row are too many; the last checkpoint is untouched. "
                "Look at these segments, or lower --lr and --head-lr",
                EXIT_NON_FINITE,
            )

    def _all_bad_rows(self) -> list[int]:
        """Rows of the step, over all ranks, whose loss is not finite."""
        bad = [
            int(row)
            for rows, losses in self._losses
            for row, loss in zip(rows.tolist(), losses.tolist(), strict=True)
            if row >= 0 and not math.isfinite(loss)
        ]
        return sorted(row for part in self._run.ranks.all_gather(bad) for row in part)

    def _key(self, row: int) -> str:
        shards = self._run.shards
        entry = shards.index[row]
        return record.key_of(shards.manifest.tracks[int(entry["track"])].id, int(entry["segment"]))


class Deadline:
    """The time limit of a run, which leaves time for what must still be done.

    Args:
        limit_s: since `stop` began to listen; 0 means none.
        stop: when it began.
    """

    def __init__(self, limit_s: float, stop: Stop) -> None:
        self._limit_s, self._began_s = limit_s, stop.started_at_s
        self._step_s, self._stepped_at_s = 0.0, time.monotonic()

    def restart(self) -> None:
        """A step begins."""
        self._stepped_at_s = time.monotonic()

    def is_up(self, keeper: Keeper) -> bool:
        """Whether two steps, a validation and a save might not end within the limit."""
        now = time.monotonic()
        self._step_s = max(0.9 * self._step_s, now - self._stepped_at_s)
        if not self._limit_s:
            return False
        needed_s = 3 * self._step_s + 1.5 * keeper.validate_s + 2 * keeper.save_s + 2
        return now - self._began_s + needed_s > self._limit_s
