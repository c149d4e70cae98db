"""Losses against their closed forms in float64, at the limits and under padding."""

import dataclasses
import math
import typing
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mgc_dist import cli
from mgc_dist.config import LossConfig, LossName, TrainConfig
from mgc_dist.config.knobs import flag
from mgc_dist.config.losses import LOSSES, Loss, cross_entropy, one_minus_truth
from mgc_dist.errors import UserError
from mgc_dist.scoring import conditions
from mgc_dist.training.losses import masked_sum, row_losses, row_weights

B, K = 64, 10
ALL = tuple(LOSSES)


@pytest.fixture
def drawn() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, labels, bias log-probabilities."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(B, K, generator=generator)
    bias = F.log_softmax(3 * torch.randn(B, K, generator=generator), dim=1)
    return logits, torch.randint(0, K, (B,), generator=generator), bias


@pytest.fixture
def gain() -> torch.Tensor:
    """0 to 3, float32 [B]."""
    return 3 * torch.rand(B, generator=torch.Generator().manual_seed(1))


def loss(name, logits, label, bias, gain=None, beta=1.0, **settings):
    config = LossConfig(loss=name, **settings)
    return row_losses(config, logits, label, bias, beta=beta, gain=gain)


def closed_form(name, logits, label, bias, gain, beta=0.7, gamma=1.5, weight=0.2, ratio=0.1):
    """The formulas of the papers, term by term, in float64 and not in log space."""
    p, b, g = logits.double().softmax(1), bias.double().exp(), gain.double()[:, None]

    def at(q):
        return q.gather(1, label[:, None])[:, 0]

    def normed(q):
        return q / q.sum(1, keepdim=True)

    scaled = normed(b**g)
    mixin = -at(normed(p * b**g)).log()
    return {
        "ce": -at(p).log(),
        "poe": -at(normed(p * b**beta)).log(),
        "learned-mixin": mixin,
        "learned-mixin-h": mixin - weight * (scaled * scaled.log()).sum(1),
        "reweight": -at(p).log(),
        "dfl": -((1 - at(b)) ** gamma) * at(p).log(),
        "mixture": -((1 - ratio) * at(p) + ratio * at(b)).log(),
    }[name]


@pytest.mark.parametrize("name", ALL)
def test_every_loss_and_its_gradient_is_its_closed_form(drawn, gain, name: str) -> None:
    logits, label, bias = drawn
    settings = {"dfl_gamma": 1.5, "entropy_weight": 0.2, "bias_ratio": 0.1}
    logits.requires_grad_()
    gain.requires_grad_()
    found = loss(name, logits, label, bias, gain, beta=0.7, **settings)
    expected = closed_form(name, logits, label, bias, gain)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    inputs = [logits, gain] if name.startswith("learned") else [logits]
    grads = torch.autograd.grad(found.sum(), inputs)
    references = torch.autograd.grad(expected.sum(), inputs)
    for grad, reference in zip(grads, references, strict=True):
        torch.testing.assert_close(grad, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_poe_gradient_is_the_ensembles_probability_minus_the_truth(drawn, beta: float) -> None:
    logits, label, bias = drawn
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(loss("poe", logits, label, bias, beta=beta).sum(), logits)
    product = logits.detach().double().log_softmax(1) + beta * bias.double()
    expected = product.softmax(1) - F.one_hot(label, K)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-6)


def test_limits_are_exactly_cross_entropy(drawn) -> None:
    logits, label, bias = drawn
    plain = F.cross_entropy(logits, label, reduction="none")
    uniform = torch.full_like(bias, -math.log(K))
    none = torch.zeros(B)
    for found in (
        loss("ce", logits, label, None),
        loss("poe", logits, label, bias, beta=0.0),
        loss("poe", logits, label, uniform),
        loss("learned-mixin", logits, label, bias, none),
        loss("learned-mixin-h", logits, label, bias, none, entropy_weight=0.0),
        loss("reweight", logits, label, bias),
        loss("dfl", logits, label, bias, dfl_gamma=0.0),
        loss("mixture", logits, label, bias, bias_ratio=0.0),
    ):
        torch.testing.assert_close(found, plain)
    assert loss("poe", logits, label, bias, beta=0.0).equal(loss("ce", logits, label, None))
    # an unused bias has the entropy log K
    found = loss("learned-mixin-h", logits, label, bias, none, entropy_weight=0.5)
    torch.testing.assert_close(found, plain + 0.5 * math.log(K))


def test_weights_are_one_minus_the_truth_also_near_one() -> None:
    label = torch.tensor([0, 1, 0, 0])
    truth = torch.tensor([1e-9, 0.25, 1.0 - 2.0**-40, 1.0], dtype=torch.float64)
    rest = (1 - truth) / 2
    bias = torch.stack([truth, rest, rest], 1)
    bias[1] = torch.tensor([0.5, 0.25, 0.25])
    found = row_weights(LossConfig(loss="reweight"), label, bias.log().float())
    expected = 1 - truth
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-9)
    assert found.min() >= 0
    assert row_weights(LossConfig(loss="poe"), label, bias.log().float()).tolist() == [1.0] * 4


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_stay_finite(name: str, dtype: torch.dtype) -> None:
    logits = torch.zeros(2, K, dtype=dtype)
    logits[0, 0], logits[1, 1] = 200.0, -200.0
    logits.requires_grad_()
    bias = F.log_softmax(torch.eye(K)[:2] * 60, dim=1)
    gain = torch.tensor([0.0, 100.0], dtype=dtype)
    found = loss(name, logits, torch.tensor([1, 1]), bias, gain)
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    assert found.dtype == torch.float32
    assert torch.isfinite(found).all()
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", ALL)
def test_bf16_logits_are_lifted_before_any_arithmetic(drawn, gain, name: str) -> None:
    logits, label, bias = drawn
    rough = logits.bfloat16()
    expected = loss(name, rough.float(), label, bias, gain)
    assert loss(name, rough, label, bias, gain).equal(expected)


def test_padding_is_masked_not_multiplied() -> None:
    losses = torch.tensor([1.0, math.nan, 2.0, math.inf], requires_grad=True)
    total = masked_sum(losses, torch.tensor([1.0, 0.0, 1.0, 0.0]))
    assert total.item() == 3.0


def test_beta_moves_in_a_straight_line() -> None:
    config = LossConfig(loss="poe", beta=0.2, beta_end=1.0)
    assert [config.beta_at(done) for done in (0.0, 0.25, 1.0)] == pytest.approx([0.2, 0.4, 1.0])
    assert LossConfig(loss="poe", beta=0.2).beta_at(0.9) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"loss": "ce"}, "ce"),
        ({"loss": "poe"}, "poe (beta 0.5)"),
        ({"loss": "poe", "beta": 0.0, "beta_end": 1.0}, "poe (beta 0 to 1)"),
        ({"loss": "dfl", "ce_weight": 0.25}, "dfl (gamma 2) + 0.25 ce"),
        ({"loss": "learned-mixin-h"}, "learned-mixin-h (entropy weight 0.03)"),
    ],
)
def test_the_description_names_what_is_read(settings, said: str) -> None:
    assert LossConfig(**settings).description == said


def test_the_docs_show_every_loss_as_its_entry_says() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "debiasing.md").read_text()
    rows, default = [], LossConfig()
    for name, entry in LOSSES.items():
        set_to = {knob: getattr(default, knob) for knob in entry.knobs}
        flags = ", ".join(
            f"`{flag(knob)}`" if value is None else f"`{flag(knob)} {value:g}`"
            for knob, value in set_to.items()
        )
        title = f"`{name}`" + (" (default)" if name == default.loss else "")
        rows.append(f"| {title} | {entry.formula} | {f'{flags} ' if flags else ''}|\n")
    assert "|---|---|---|\n" + "".join(rows) + "\n" in text


def test_every_loss_reads_knobs_that_exist() -> None:
    knobs = {field.name for field in dataclasses.fields(LossConfig)}
    assert typing.get_args(LossName) == ALL
    for entry in LOSSES.values():
        assert knobs > set(entry.knobs)
        assert entry.source


def test_a_new_loss_is_one_entry(drawn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing but the entry is there: arithmetic, weights, needs, words and comparisons follow."""
    logits, label, bias = drawn
    entry = Loss(
        short="a test's",
        formula="sqrt of the cross-entropy",
        source="this test",
        rows=lambda rows, knobs: cross_entropy(rows.log_p, rows.label).sqrt() * knobs.dfl_gamma,
        knobs={"dfl_gamma": "gamma"},
        weights=one_minus_truth,
    )
    monkeypatch.setitem(LOSSES, "rooted", entry)
    made = LossConfig(loss="rooted", dfl_gamma=3.0)
    assert (made.needs_bias, made.learns_gain) == (True, False)
    assert made.description == "rooted (gamma 3)"
    expected = 3 * F.cross_entropy(logits, label, reduction="none").sqrt()
    torch.testing.assert_close(row_losses(made, logits, label, bias), expected)
    assert row_weights(made, label, bias).equal(one_minus_truth(bias, label))
    (tmp_path / "config.yaml").write_text(cli.dump("train", TrainConfig(objective=made)))
    _, settings = conditions.settings_of(tmp_path)
    told = {
        name: value for name, value in settings.items() if name in ("loss", "beta", "dfl_gamma")
    }
    assert told == {"loss": "rooted", "dfl_gamma": "3.0"}


def test_wrong_use_is_refused(drawn) -> None:
    logits, label, bias = drawn
    with pytest.raises(ValueError, match="poe needs the bias"):
        loss("poe", logits, label, None)
    with pytest.raises(ValueError, match="learned-mixin needs the learned gain"):
        loss("learned-mixin", logits, label, bias)
    with pytest.raises(UserError, match="--dfl-gamma: got -1"):
        LossConfig(dfl_gamma=-1.0)
    with pytest.raises(UserError, match="--beta: got nan"):
        LossConfig(beta=math.nan)
