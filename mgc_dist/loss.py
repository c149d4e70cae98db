"""Losses that combine the main model with frozen bias log-probabilities.

All are computed in float32 log space from logits of any dtype. `bias` is log_softmax(z / T),
already calibrated: it is never divided by a temperature again.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def row_losses(
    name: str, logits: Tensor, label: Tensor, bias: Tensor | None, *, beta: float, bias_ratio: float
) -> Tensor:
    """Loss of each row.

    Args:
        name: `ce`, `poe` or `mixture`.
        logits: [B, K] of the main model, any floating dtype.
        label: int64 [B], 0 .. K - 1.
        bias: float32 [B, K], log-probabilities of the bias model; not used by `ce`.
        beta: weight of the bias in `poe`.
        bias_ratio: share of the bias in `mixture`.

    Returns:
        float32 [B].

    Raises:
        ValueError: an unknown name, or a loss that needs the bias without it.
    """
    log_p = F.log_softmax(logits.float(), dim=1)  # [B, K]
    if name == "ce":
        return F.nll_loss(log_p, label, reduction="none")
    if bias is None:
        raise ValueError(f"loss {name} needs the bias log-probabilities")
    if name == "poe":
        return product_of_experts(log_p, label, bias, beta)
    if name == "mixture":
        return mixture(log_p, label, bias, bias_ratio)
    raise ValueError(f"unknown loss {name!r}, expected ce, poe or mixture")


def product_of_experts(log_p: Tensor, label: Tensor, bias: Tensor, beta: float) -> Tensor:
    """Cross-entropy of the normalised product p * b^beta: float32 [B].

    The gradient by the logits is softmax(log p + beta b) - onehot(y); beta 0 and a uniform b
    both give exactly the cross-entropy of p.

    Args:
        log_p: float32 [B, K], log-probabilities of the main model.
        label: int64 [B].
        bias: float32 [B, K], log-probabilities of the bias model.
        beta: weight of the bias, 0 or more.

    Source: Hinton 2002; Clark et al., EMNLP 2019, eq. 2; Mahabadi et al., ACL 2020.
    """
    return F.cross_entropy(log_p + beta * bias, label, reduction="none")


def mixture(log_p: Tensor, label: Tensor, bias: Tensor, bias_ratio: float) -> Tensor:
    """-log((1 - r) p_y + r b_y), through logaddexp: float32 [B].

    Args:
        log_p: float32 [B, K], log-probabilities of the main model.
        label: int64 [B].
        bias: float32 [B, K], log-probabilities of the bias model.
        bias_ratio: r, 0 to below 1; 0 is exactly the cross-entropy.

    Source: the ensemble of the original project, which averaged probabilities.
    """
    own = log_p.gather(1, label[:, None])[:, 0]  # [B]
    if bias_ratio == 0:
        return -own
    theirs = bias.gather(1, label[:, None])[:, 0]  # [B]
    return -torch.logaddexp(own + math.log1p(-bias_ratio), theirs + math.log(bias_ratio))


def masked_sum(losses: Tensor, weight: Tensor) -> Tensor:
    """Sum of the losses of true rows: a scalar.

    Args:
        losses: float32 [B].
        weight: float32 [B], 0 for padding, which is masked, not multiplied (0 x NaN is NaN).
    """
    return torch.where(weight > 0, losses * weight, torch.zeros_like(losses)).sum()
