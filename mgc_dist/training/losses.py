"""The loss of a training step: the main model's logits, the bias table, and who divides by what.

A step's loss is one number over the whole global batch,

    sum_i w_i l_i / D  +  ce_weight * sum_i ce_i / rows,        D = sum_i w_i,

with w = 1 but where the loss's entry in mgc_dist.config.losses has weights. Every rank works out D
for all ranks from the plan and the table, so no collective is needed, and the gradient is the same
on any number of ranks.
"""

import logging
from dataclasses import dataclass
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
        self._labels = shards.labels
        self._first_row, _ = shards.rows_of("train")
        self._of_step = (-1, 0.0)

    def beta(self, step: int) -> float:
        """Weight of the bias in `poe` at an optimizer step, counted from 0."""
        return self._config.beta_at(step / max(1, self._plan.steps - 1))

    def divisor(self, step: int) -> float:
        """D: what all rows of a step's global batch count, over all ranks.

        0 if all of them have the weight 0, as with `reweight` rows that the bias model is sure of.
        """
        if self._config.entry.weights is None:
            return float(self._plan.true_rows(step))
        if self._of_step[0] != step:
            assert self.table is not None
            start = self._plan.start_of(step)
            places = self._plan.places(np.arange(start, self._plan.seen_after(step)))
            row = torch.from_numpy(places + self._first_row)
            label = torch.from_numpy(self._labels[row.numpy()])
            weights = row_weights(self._config, label, self.table.lookup(row))
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
        weight = true * row_weights(self._config, label, bias)  # [B]
        share = masked_sum(losses, weight) / (self.divisor(step) or 1.0)
        if self._config.ce_weight:
            plain = cross_entropy(F.log_softmax(logits.float(), dim=1), label)
            mean = masked_sum(plain, true) / self._plan.true_rows(step)
            share = share + self._config.ce_weight * mean
        return MicroLoss(share=share, rows=losses.detach())


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
    return config.entry.rows(given, config)


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
