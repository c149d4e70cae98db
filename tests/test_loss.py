"""Losses against their closed forms in float64, at the limits and under padding."""

import math

import pytest
import torch
import torch.nn.functional as F

from mgc_dist.loss import masked_sum, row_losses

B, K = 64, 10


@pytest.fixture
def drawn() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, labels, bias log-probabilities."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(B, K, generator=generator)
    bias = F.log_softmax(3 * torch.randn(B, K, generator=generator), dim=1)
    return logits, torch.randint(0, K, (B,), generator=generator), bias


def loss(name, logits, label, bias, beta=1.0, ratio=0.1):
    return row_losses(name, logits, label, bias, beta=beta, bias_ratio=ratio)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 2.0])
def test_poe_is_the_normalised_product(drawn, beta: float) -> None:
    logits, label, bias = drawn
    product = logits.double().softmax(1) * bias.double().exp() ** beta
    truth = product.gather(1, label[:, None])[:, 0] / product.sum(1)
    found = loss("poe", logits, label, bias, beta)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), -truth.log(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_poe_gradient_is_the_ensembles_probability_minus_the_truth(drawn, beta: float) -> None:
    logits, label, bias = drawn
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(loss("poe", logits, label, bias, beta).sum(), logits)
    product = logits.detach().double().log_softmax(1) + beta * bias.double()
    expected = product.softmax(1) - F.one_hot(label, K)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-6)


def test_limits_are_exactly_cross_entropy(drawn) -> None:
    logits, label, bias = drawn
    plain = F.cross_entropy(logits, label, reduction="none")
    uniform = torch.full_like(bias, -math.log(K))
    torch.testing.assert_close(loss("ce", logits, label, None), plain)
    torch.testing.assert_close(loss("poe", logits, label, bias, beta=0.0), plain)
    torch.testing.assert_close(loss("poe", logits, label, uniform), plain)
    torch.testing.assert_close(loss("mixture", logits, label, bias, ratio=0.0), plain)


@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.9])
def test_mixture_is_the_log_of_the_mean(drawn, ratio: float) -> None:
    logits, label, bias = drawn
    mean = (1 - ratio) * logits.double().softmax(1) + ratio * bias.double().exp()
    expected = -mean.gather(1, label[:, None])[:, 0].log()
    found = loss("mixture", logits, label, bias, ratio=ratio).double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["ce", "poe", "mixture"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_stay_finite(name: str, dtype: torch.dtype) -> None:
    logits = torch.zeros(2, K, dtype=dtype)
    logits[0, 0], logits[1, 1] = 200.0, -200.0
    logits.requires_grad_()
    bias = F.log_softmax(torch.eye(K)[:2] * 60, dim=1)
    found = loss(name, logits, torch.tensor([1, 1]), bias)
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    assert found.dtype == torch.float32
    assert torch.isfinite(found).all()
    assert torch.isfinite(gradient).all()


def test_padding_is_masked_not_multiplied() -> None:
    losses = torch.tensor([1.0, math.nan, 2.0, math.inf], requires_grad=True)
    total = masked_sum(losses, torch.tensor([1.0, 0.0, 1.0, 0.0]))
    assert total.item() == 3.0


def test_wrong_use_is_refused(drawn) -> None:
    logits, label, bias = drawn
    with pytest.raises(ValueError, match="poe needs the bias"):
        loss("poe", logits, label, None)
    with pytest.raises(ValueError, match="unknown loss 'pow'"):
        loss("pow", logits, label, bias)
