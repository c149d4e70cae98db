"""Losses that combine the main model with frozen bias log-probabilities.

All are computed in float32 log space from logits of any dtype. `bias` is log_softmax(z / T),
already calibrated: it is never divided by a temperature again. With p the main model's
probabilities, b the bias model's, y the label, and g >= 0 learned from the main model's last
hidden values (Clark 2019):

    ce                -log p_y
    poe               -log softmax(log p + beta log b)_y
    learned-mixin     -log softmax(log p + g log b)_y
    learned-mixin-h   the same + w H(softmax(g log b))
    reweight          sum_i (1 - b_y) ce_i / sum_i (1 - b_y), over the whole global batch
    dfl               (1 - b_y)^gamma ce
    mixture           -log((1 - r) p_y + r b_y)

A training step averages its rows: by their number, but for `reweight`, whose weights sum to the
divisor. `ce_weight` adds a plain mean cross-entropy to any of them.

Sources: Clark, Yatskar, Zettlemoyer, "Don't Take the Easy Way Out", EMNLP 2019 (reweight, bias
product, learned-mixin, +H); Mahabadi, Belinkov, Henderson, "End-to-End Bias Mitigation by Modelling
Biases in Corpora", ACL 2020 (product of experts, debiased focal loss); Sanh et al., "Learning from
Others' Mistakes", ICLR 2021 (product of experts with a weak model).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mgc_dist.config import LossConfig


def row_losses(
    config: LossConfig,
    logits: Tensor,
    label: Tensor,
    bias: Tensor | None = None,
    *,
    beta: float = 1.0,
    gain: Tensor | None = None,
) -> Tensor:
    """Loss of each row, without the weights of `reweight` and the added cross-entropy.

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
    log_p = F.log_softmax(logits.float(), dim=1)  # [B, K]
    if config.loss == "ce":
        return cross_entropy(log_p, label)
    if bias is None:
        raise ValueError(f"loss {config.loss} needs the bias log-probabilities")
    if config.loss == "poe":
        return product_of_experts(log_p, label, bias, beta)
    if config.loss == "reweight":
        return cross_entropy(log_p, label)
    if config.loss == "dfl":
        return debiased_focal(log_p, label, bias, config.dfl_gamma)
    if config.loss == "mixture":
        return mixture(log_p, label, bias, config.bias_ratio)
    if gain is None:
        raise ValueError(f"loss {config.loss} needs the learned gain")
    weight = config.entropy_weight if config.loss == "learned-mixin-h" else 0.0
    return learned_mixin(log_p, label, bias, gain, weight)


def row_weights(config: LossConfig, label: Tensor, bias: Tensor | None) -> Tensor:
    """What each row counts in the mean: 1 - b_y for `reweight`, 1 for all other losses.

    Args:
        config: which loss.
        label: int64 [B].
        bias: float32 [B, K], log-probabilities of the bias model.

    Returns:
        float32 [B], 0 to 1.
    """
    if config.loss != "reweight":
        return torch.ones(label.shape, dtype=torch.float32, device=label.device)
    assert bias is not None
    return one_minus_truth(bias, label)


def cross_entropy(log_p: Tensor, label: Tensor) -> Tensor:
    """-log p_y: float32 [B].

    Args:
        log_p: float32 [B, K], log-probabilities.
        label: int64 [B].
    """
    return F.nll_loss(log_p, label, reduction="none")


def product_of_experts(log_p: Tensor, label: Tensor, bias: Tensor, beta: float) -> Tensor:
    """Cross-entropy of the normalised product p * b^beta: float32 [B].

    The gradient by the logits is softmax(log p + beta b) - onehot(y); beta 0 and a uniform b
    both give exactly the cross-entropy of p.

    Args:
        log_p: float32 [B, K], log-probabilities of the main model.
        label: int64 [B].
        bias: float32 [B, K], log-probabilities of the bias model.
        beta: weight of the bias, 0 or more.

    Source: Hinton, Neural Computation 14, 2002 (products of experts); Clark et al. 2019, "Bias
    Product"; Mahabadi et al. 2020, "Product of Experts".
    """
    if beta == 0:  # to the bit: normalising log_p again would round
        return cross_entropy(log_p, label)
    return F.cross_entropy(log_p + beta * bias, label, reduction="none")


def learned_mixin(
    log_p: Tensor, label: Tensor, bias: Tensor, gain: Tensor, entropy_weight: float
) -> Tensor:
    """Product of experts whose weight of the bias is learned for each row: float32 [B].

    Without the entropy term the model may learn to ignore the bias (g near 0): the term is small
    where softmax(g log b) is peaked, so it keeps the bias in use.

    Args:
        log_p: float32 [B, K], log-probabilities of the main model.
        label: int64 [B].
        bias: float32 [B, K], log-probabilities of the bias model.
        gain: [B], g = softplus(w h + c), 0 or more; h without a gradient.
        entropy_weight: w of the entropy term; 0 leaves it out.

    Source: Clark et al. 2019, "Learned-Mixin" and "Learned-Mixin +H": there g is softplus too. One
    thing differs: Clark's code lets the gradient of g into h as well. It then trains the shared
    features to serve the product, and the main model alone gets worse (docs/log.md).
    """
    scaled = gain.float()[:, None] * bias  # [B, K]
    losses = F.cross_entropy(log_p + scaled, label, reduction="none")
    if entropy_weight == 0:
        return losses
    log_q = F.log_softmax(scaled, dim=1)
    return losses + entropy_weight * -(log_q.exp() * log_q).sum(dim=1)


def debiased_focal(log_p: Tensor, label: Tensor, bias: Tensor, gamma: float) -> Tensor:
    """(1 - b_y)^gamma times the cross-entropy: float32 [B]; gamma 0 is exactly that.

    Args:
        log_p: float32 [B, K], log-probabilities of the main model.
        label: int64 [B].
        bias: float32 [B, K], log-probabilities of the bias model.
        gamma: 0 or more.

    Source: Mahabadi et al. 2020, "Debiased Focal Loss"; after Lin et al., ICCV 2017, whose
    factor is of the model's own probability.
    """
    losses = cross_entropy(log_p, label)
    return losses if gamma == 0 else one_minus_truth(bias, label) ** gamma * losses


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


def one_minus_truth(bias: Tensor, label: Tensor) -> Tensor:
    """1 - b_y, precise also where b_y is nearly 1: float32 [B], 0 to 1.

    Args:
        bias: float32 [B, K], log-probabilities.
        label: int64 [B].
    """
    return -torch.expm1(bias.gather(1, label[:, None])[:, 0]).clamp(max=0.0)


def masked_sum(losses: Tensor, weight: Tensor) -> Tensor:
    """Weighted sum of the losses of true rows: a scalar.

    Args:
        losses: float32 [B].
        weight: float32 [B], 0 for padding, which is masked, not multiplied (0 x NaN is NaN).
    """
    return torch.where(weight > 0, losses * weight, torch.zeros_like(losses)).sum()
