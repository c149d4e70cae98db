"""What a run tells: its arithmetic at the start, then a line and an event each few steps."""

import logging
import math
import resource
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mgc_dist.bias_model import summary
from mgc_dist.events import StartEvent, StepEvent
from mgc_dist.models.flops import peak_tflop_per_s
from mgc_dist.training.engine import factor_at
from mgc_dist.training.meters import Laggards, Meter, Tally
from mgc_dist.training.resume import State
from mgc_dist.training.setup import Run

log = logging.getLogger(__name__)


def say_arithmetic(run: Run, state: State) -> None:
    """Log how the global batch is made up, the model's size, and where the run begins."""
    config, layout, plan = run.config, run.layout, run.plan
    head, backbone = run.model.head_and_backbone()
    parts: tuple[Iterable[nn.Parameter], ...] = (run.model.parameters(), backbone, head)
    counts = [sum(_elements(parameter) for parameter in part) / 1e6 for part in parts]
    log.info(
        "global batch %d = %d ranks x micro batch %d x accumulation %d (%d slots, %.0f %% padding)",
        *(layout.global_batch, layout.world, layout.micro_batch, layout.accumulation),
        *(layout.slots, 100 * layout.waste),
    )
    if layout.waste > 0.1:
        log.info(
            "%.0f %% of each step computes padding; --global-batch %d would waste none",
            *(100 * layout.waste, layout.slots),
        )
    if run.config.data.crop_s is not None:
        log.info(
            "training hears a random crop of %g s of each segment, validation %s",
            *(config.data.crop_s, run.model.crops_in_words),
        )
    if config.augmentation.kinds:
        log.info("training segments are changed by %s", ", ".join(config.augmentation.kinds))
    log.info("%d training rows, %d positions, %d steps", plan.rows, plan.total, plan.steps)
    log.info(
        "%s: %.2f M parameters, trained %.2f M of the backbone and %.3f M of the head",
        *(config.main.model, *counts),
    )
    log.info(
        "ZeRO-%d on %s, %s, loss %s",
        *(config.engine.zero_stage, _named(run.ranks.device), run.engine.precision),
        config.objective.description,
    )
    if config.optim.layer_lr_decay != 1:
        deepest = max(run.model.backbone_by_layer(), default=0)
        log.info(
            "peak learning rates: %.3g of the head, %.3g of the last layer, down to %.3g",
            *(config.optim.head_lr, config.optim.lr),
            config.optim.lr * config.optim.layer_lr_decay**deepest,
        )
    log.info("starting at samples_seen %d of %d", state.samples_seen, plan.total)


def _named(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _elements(parameter: nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))  # ZeRO-3 leaves 0 in place


def warn_of_bias(run: Run) -> None:
    """Repeat the warnings of the bias report: its model may know too much, or the training rows."""
    table, shards = run.objective.table, run.shards
    if table is None or not run.ranks.is_first:
        return
    path, objective = run.config.data.table, run.config.objective
    probe = summary.probe_of(path, table)
    report = summary.make(table, shards.manifest, shards.labels, shards.tracks, probe)
    for warning in report["warnings"]:
        log.warning("bias table %s: %s", path, warning)
    if "beta" in objective.entry.knobs:
        strongest = max(objective.beta_at(0), objective.beta_at(1))
        if much := summary.warning_of_beta(report, strongest):
            log.warning("%s", much)


def begin(run: Run, state: State, attempt: str) -> None:
    """Write the first event of a try, and that it is running."""
    journal, seen, world = run.journal, state.samples_seen, run.ranks.world
    genres = list(run.shards.manifest.genres)
    journal.write(StartEvent(samples_seen=seen, world=world, genres=genres))
    journal.begin(attempt=attempt, first_step=run.plan.step_of(seen), world=world)
    journal.status("running", samples_seen=seen, total=run.plan.total)


def rate_factor(run: Run, step: int) -> float:
    """Factor of the peak learning rates at an optimizer step, counted from 0."""
    if run.held_rate is not None:
        return run.held_rate
    return factor_at(run.config.optim, run.plan.seen_after(step), run.plan.total)


class Logbook:
    """Tells of every few steps, in the log and in metrics.jsonl.

    Args:
        run: that is trained.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._laggards = Laggards()
        self._gain: Tensor | None = None

    def keep(self, gain: Tensor | None) -> None:
        """Keep the gains of a micro batch, float32 [B], where they are learned."""
        self._gain = None if gain is None else gain.detach()

    def all_note(self, step: int, state: State, tally: Tally, meter: Meter) -> None:
        """Tell of a step if one is due, or if the run ends with it (a collective)."""
        run = self._run
        if (step + 1) % run.config.output.log_every_steps and state.samples_seen != run.plan.total:
            return
        loss, factor, optim = tally.latest(), rate_factor(run, step), run.config.optim
        entry = run.config.objective.entry
        window = meter.read(state.samples_seen, step + 1)
        rate, wait = window.segments_per_s, window.wait_share
        slow = self._laggards.all_look(window.own_s, run.ranks)
        if slow and run.ranks.is_first:
            log.warning("%s", slow)
        norm, (tflop_per_s, mfu) = run.engine.grad_norm(), _computed(run, rate)
        memory_gib = _peak_memory_gib(run.ranks.device)
        epoch = (state.samples_seen - 1) / run.plan.rows
        event = StepEvent(
            step=step + 1,
            samples_seen=state.samples_seen,
            epoch=round(epoch, 4),
            loss=loss,
            lr=optim.lr * factor,
            head_lr=optim.head_lr * factor,
            grad_norm=norm,
            beta=run.objective.beta(step) if "beta" in entry.knobs else None,
            mean_gain=None if self._gain is None else float(self._gain.mean()),
            step_s=round(window.step_s, 5),
            segments_per_s=round(rate, 2),
            model_tflop_per_s=tflop_per_s,
            mfu=mfu,
            data_wait_share=round(wait, 5),
            peak_memory_gib=round(memory_gib, 3),
        )
        run.journal.write(event)
        left_s = (run.plan.total - state.samples_seen) / rate if rate else math.nan
        log.info("%s", step_line(step + 1, run.plan.steps, loss, norm, rate, left_s))


def step_line(
    step: int, steps: int, loss: float, norm: float | None, segments_per_s: float, left_s: float
) -> str:
    """A step for people: with the time before it, it fits 80 columns; all else is an event."""
    grad = "-" if norm is None else f"{norm:.2g}"
    return (
        f"step {step}/{steps} loss {loss:.3f} grad {grad} {segments_per_s:.0f} segments/s "
        f"left {_clock(left_s)}"
    )


def _computed(run: Run, segments_per_s: float) -> tuple[float, float | None]:
    """TFLOP/s that the model needed on each rank, and its share of the device's peak."""
    reached = run.flops.training * segments_per_s / run.ranks.world / 1e12
    peak = peak_tflop_per_s(run.ranks.device)
    return float(f"{reached:.5g}"), None if peak is None else round(reached / peak, 5)


def _peak_memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "-"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
