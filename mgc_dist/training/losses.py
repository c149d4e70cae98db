"""The losses of a batch's rows, as the entries of mgc_dist.config.losses say."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mgc_dist.config import LossConfig
from mgc_dist.config.losses import Rows


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
