"""The loss of a training step: the main model's logits, the bias table, and who divides by what.

A step's loss is one number over the whole global batch,

    sum_i w_i l_i / D  +  ce_weight * sum_i ce_i / rows,        D = sum_i w_i,

with w = 1 but where the loss's entry in mgc_dist.config.losses has weights, times that of the row's
genre. Every rank works out D
for all ranks from the plan and the table, so no collective is needed, and the gradient is the same
on any number of ranks.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mgc_dist.bias_model.table import BiasTable
from mgc_dist.config import LossConfig
from mgc_dist.config.losses import Rows, cross_entropy
from mgc_dist.data.order import Plan
from mgc_dist.data.reader import Batch, ShardSet
from mgc_dist.data.tables import read_table
from mgc_dist.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class MicroLoss:
    """What a micro batch lost.

    Attributes:
        share: of the step's loss, a scalar with a gradient.
        rows: float32 [B], loss of each row before weights, without a gradient.
    """

    share: Tensor
    rows: Tensor


class Objective:
    """The loss of a run.

    Args:
        config: which loss, and its settings.
        plan: of the rows.
        shards: the data set.
        table: of the bias model; None if the loss needs none.

    Attributes:
        table: as given.
    """

    def __init__(
        self, config: LossConfig, plan: Plan, shards: ShardSet, table: BiasTable | None
    ) -> None:
        self._config = config
        self._plan = plan
        self.table = table
        self._label_of = shards.labels_of  # of the map: an array took 150 MB of 19 M rows
        self._first_row, _ = shards.rows_of("train")
        self._class_weight = class_weights(config.class_weight, shards)
        self._of_step = (-1, 0.0)

    def beta(self, step: int) -> float:
        """Weight of the bias in `poe` at an optimizer step, counted from 0."""
        return self._config.beta_at(step / max(1, self._plan.steps - 1))

    def divisor(self, step: int) -> float:
        """D: what all rows of a step's global batch count, over all ranks.

        0 if all of them have the weight 0, as with `reweight` rows that the bias model is sure of.
        """
        if self._config.entry.weights is None and self._class_weight is None:
            return float(self._plan.true_rows(step))
        if self._of_step[0] != step:
            start = self._plan.start_of(step)
            places = self._plan.places(np.arange(start, self._plan.seen_after(step)))
            row = torch.from_numpy(places + self._first_row)
            label = torch.from_numpy(self._label_of(row.numpy()))
            weights = self._weights(label, self.table.lookup(row) if self.table else None)
            self._of_step = (step, float(weights.double().sum()))
            if self._of_step[1] == 0:
                log.warning("step %d: all rows have the weight 0, and give no gradient", step + 1)
        return self._of_step[1]

    def micro_loss(self, batch: Batch, logits: Tensor, gain: Tensor | None) -> MicroLoss:
        """The loss of one micro batch of one rank.

        Args:
            batch: whose rows, labels and weights count.
            logits: [B, K] of the main model.
            gain: float32 [B] of the learned mixins, else None.
        """
        step, device = batch.plan.step, logits.device
        label = batch.label.to(device, non_blocking=True)
        true = batch.weight.to(device, non_blocking=True)
        bias = None
        if self.table:
            bias = self.table.lookup(batch.row)  # [B, K]
            bias = bias.pin_memory() if device.type == "cuda" else bias
            bias = bias.to(device, non_blocking=True)
        losses = row_losses(self._config, logits, label, bias, beta=self.beta(step), gain=gain)
        weight = true * self._weights(label, bias)  # [B]
        share = masked_sum(losses, weight) / (self.divisor(step) or 1.0)
        if self._config.ce_weight:
            plain = cross_entropy(F.log_softmax(logits.float(), dim=1), label)
            mean = masked_sum(plain, true) / self._plan.true_rows(step)
            share = share + self._config.ce_weight * mean
        return MicroLoss(share=share, rows=losses.detach())

    def _weights(self, label: Tensor, bias: Tensor | None) -> Tensor:
        """What each row counts: float32 [B]."""
        weights = row_weights(self._config, label, bias)
        if self._class_weight is None:
            return weights
        self._class_weight = self._class_weight.to(label.device)
        return weights * self._class_weight[label]


def class_weights(wanted: str | None, shards: ShardSet) -> Tensor | None:
    """What rows of each genre count: float32 [K], of mean 1 over the training rows; None for 1.

    Args:
        wanted: `balanced`, a table of `genre` and `weight`, or None.
        shards: the data set.

    Raises:
        UserError: the table cannot be read, lacks a genre, or a weight is no number from 0.
    """
    if wanted is None:
        return None
    genres, (first, stop) = shards.manifest.genres, shards.rows_of("train")
    counts = np.bincount(shards.labels[first:stop], minlength=len(genres))
    if wanted == "balanced":
        weights = 1 / np.maximum(counts, 1)
    else:
        weights = np.array(_weights_in(Path(wanted), genres))
    return torch.from_numpy(weights * counts.sum() / (weights * counts).sum()).float()


def _weights_in(table: Path, genres: Sequence[str]) -> list[float]:
    found: dict[str, float] = {}
    for line, row in read_table(table, "--class-weight"):
        try:
            found[row["genre"]] = float(row["weight"])
        except (KeyError, ValueError):
            found[row.get("genre", "")] = math.nan
        if not 0 <= found[row.get("genre", "")] < math.inf:
            raise UserError(
                f"--class-weight {table}: line {line}",
                got=", ".join(f"{key} {value!r}" for key, value in row.items()),
                expected="a genre and a weight, a number from 0",
                cure="write a header genre,weight and a line for each genre",
            )
    missing = [genre for genre in genres if genre not in found]
    if missing or not any(found[genre] for genre in genres):
        raise UserError(
            f"--class-weight {table}",
            got=f"no weight of {', '.join(missing)}" if missing else "weights of 0 only",
            expected=f"one for each of {', '.join(genres)}",
            cure="add a line for each, or use --class-weight balanced",
        )
    return [found[genre] for genre in genres]


def row_losses(
    config: LossConfig,
    logits: Tensor,
    label: Tensor,
    bias: Tensor | None = None,
    *,
    beta: float = 1.0,
    gain: Tensor | None = None,
) -> Tensor:
    """Loss of each row, without its weight and the added cross-entropy.

    Args:
        config: which loss, and its settings.
        logits: [B, K] of the main model, any floating dtype.
        label: int64 [B], 0 .. K - 1.
        bias: float32 [B, K], log-probabilities of the bias model; not used by `ce`.
        beta: weight of the bias in `poe` at this step, `config.beta_at(...)`.
        gain: float32 [B], g of the learned mixins.

    Returns:
        float32 [B].

    Raises:
        ValueError: a loss that needs the bias, or the gain, without it.
    """
    if config.needs_bias and bias is None:
        raise ValueError(f"loss {config.loss} needs the bias log-probabilities")
    if config.learns_gain and gain is None:
        raise ValueError(f"loss {config.loss} needs the learned gain")
    log_p = F.log_softmax(logits.float(), dim=1)  # [B, K]
    given = Rows(
        log_p=log_p, label=label, bias=cast(Tensor, bias), gain=cast(Tensor, gain), beta=beta
    )
    losses = config.entry.rows(given, config)
    if not config.label_smoothing:
        return losses
    return losses.lerp(_over_labels(given, config), config.label_smoothing)


def _over_labels(given: Rows, config: LossConfig) -> Tensor:
    """The mean of what each row would lose with each of the K labels: float32 [B].

    Of plain cross-entropy it is the smoothing of Szegedy et al., CVPR 2016.
    """
    rows, genres = given.log_p.shape

    def each(values: Tensor | None) -> Tensor:
        return cast(Tensor, None if values is None else values.repeat_interleave(genres, 0))

    every = Rows(
        log_p=each(given.log_p),
        label=torch.arange(genres, device=given.label.device).repeat(rows),
        bias=each(given.bias),
        gain=each(given.gain),
        beta=given.beta,
    )
    return config.entry.rows(every, config).view(rows, genres).mean(dim=1)


def row_weights(config: LossConfig, label: Tensor, bias: Tensor | None) -> Tensor:
    """What each row counts in the mean: 1, but where the loss's entry has weights.

    Args:
        config: which loss.
        label: int64 [B].
        bias: float32 [B, K], log-probabilities of the bias model.

    Returns:
        float32 [B], 0 to 1.
    """
    weights = config.entry.weights
    if weights is None:
        return torch.ones(label.shape, dtype=torch.float32, device=label.device)
    assert bias is not None
    return weights(bias, label)


def masked_sum(losses: Tensor, weight: Tensor) -> Tensor:
    """Weighted sum of the losses of true rows: a scalar.

    Args:
        losses: float32 [B].
        weight: float32 [B], 0 for padding, which is masked, not multiplied (0 x NaN is NaN).
    """
    return torch.where(weight > 0, losses * weight, torch.zeros_like(losses)).sum()
