"""The losses, an entry each: formula, source, knobs, and the arithmetic of a batch's rows.

The arithmetic uses tensors' own methods, so nothing imports torch: `--help`, reports and
comparisons read the same entries as training does. All of it is float32, in log space. `bias`
is log_softmax(z / T), already calibrated: it is never divided by a temperature again. With p the
main model's probabilities, b the bias model's, y the label, and g >= 0 learned from the main
model's last hidden values.

A training step averages its rows by the sum of their weights, which are 1 but where an entry says
otherwise. `ce_weight` adds a plain mean cross-entropy to any of them.

A new loss is a function and its entry; a knob that it alone reads is a field of `LossConfig`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import arg

from mgc_dist.config.knobs import Effect, Range, check

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What the losses of a micro batch's rows follow from.

    Attributes:
        log_p: float32 [B, K], log-probabilities of the main model.
        label: int64 [B], 0 .. K - 1.
        bias: float32 [B, K], log-probabilities of the bias model.
        gain: float32 [B], g = softplus(w h + c), 0 or more; h without a gradient.
        beta: weight of the bias in `poe` at this step, 0 or more.
    """

    log_p: "Tensor"
    label: "Tensor"
    bias: "Tensor"
    gain: "Tensor"
    beta: float


@dataclass(frozen=True, kw_only=True)
class Loss:
    """An entry.

    Attributes:
        short: a few words for `--help`.
        formula: for a row with label y, as docs/debiasing.md shows it.
        source: the papers that it is from.
        rows: loss of each row, float32 [B], without its weight.
        knobs: fields of `LossConfig` that this loss alone reads, and how each is said.
        needs_bias: whether it reads `Rows.bias`.
        learns_gain: whether it reads `Rows.gain`.
        weights: what each row counts, float32 [B], from (bias, label); None where all count 1.
    """

    short: str
    formula: str
    source: str
    rows: "Callable[[Rows, LossConfig], Tensor]"
    knobs: Mapping[str, str] = field(default_factory=dict)
    needs_bias: bool = True
    learns_gain: bool = False
    weights: "Callable[[Tensor, Tensor], Tensor] | None" = None


def of_truth(values: "Tensor", label: "Tensor") -> "Tensor":
    """The value of each row's label, [B, K] -> [B]."""
    return values.gather(1, label[:, None])[:, 0]


def cross_entropy(log_p: "Tensor", label: "Tensor") -> "Tensor":
    """-log p_y of float32 [B, K] and int64 [B]: float32 [B]."""
    return -of_truth(log_p, label)


def one_minus_truth(bias: "Tensor", label: "Tensor") -> "Tensor":
    """1 - b_y, precise also where b_y is nearly 1: float32 [B], 0 to 1."""
    return -of_truth(bias, label).expm1().clamp(max=0.0)


def _plain(rows: Rows, knobs: "LossConfig") -> "Tensor":
    return cross_entropy(rows.log_p, rows.label)


def _product_of_experts(rows: Rows, knobs: "LossConfig") -> "Tensor":
    """Cross-entropy of the normalised product p * b^beta.

    The gradient by the logits is softmax(log p + beta b) - onehot(y); beta 0 and a uniform b
    both give exactly the cross-entropy of p.
    """
    if rows.beta == 0:  # to the bit: normalising log_p again would round
        return cross_entropy(rows.log_p, rows.label)
    return _with(rows, rows.beta * rows.bias)


def _with(rows: Rows, log_expert: "Tensor") -> "Tensor":
    """Cross-entropy of the normalised product of p and another expert, [B, K] -> [B]."""
    return cross_entropy((rows.log_p + log_expert).log_softmax(dim=1), rows.label)


def _learned_mixin(rows: Rows, knobs: "LossConfig") -> "Tensor":
    """Product of experts whose weight of the bias is learned for each row."""
    return _with(rows, rows.gain.float()[:, None] * rows.bias)


def _learned_mixin_h(rows: Rows, knobs: "LossConfig") -> "Tensor":
    """The same with an entropy term, w H(softmax(g log b)).

    Without it the model may learn to ignore the bias (g near 0): the term is small where
    softmax(g log b) is peaked, so it keeps the bias in use.
    """
    scaled = rows.gain.float()[:, None] * rows.bias  # [B, K]
    losses = _with(rows, scaled)
    if knobs.entropy_weight == 0:
        return losses
    log_q = scaled.log_softmax(dim=1)
    return losses + knobs.entropy_weight * -(log_q.exp() * log_q).sum(dim=1)


def _debiased_focal(rows: Rows, knobs: "LossConfig") -> "Tensor":
    """(1 - b_y)^gamma times the cross-entropy; gamma 0 is exactly that."""
    losses, gamma = cross_entropy(rows.log_p, rows.label), knobs.dfl_gamma
    return losses if gamma == 0 else one_minus_truth(rows.bias, rows.label) ** gamma * losses


def _mixture(rows: Rows, knobs: "LossConfig") -> "Tensor":
    """-log((1 - r) p_y + r b_y), through logaddexp; r = 0 is exactly the cross-entropy."""
    own, ratio = of_truth(rows.log_p, rows.label), knobs.bias_ratio
    if ratio == 0:
        return -own
    theirs = of_truth(rows.bias, rows.label) + math.log(ratio)  # [B]
    return -(own + math.log1p(-ratio)).logaddexp(theirs)


_CLARK = "Clark, Yatskar, Zettlemoyer, Don't Take the Easy Way Out, EMNLP 2019"
_MAHABADI = (
    "Mahabadi, Belinkov, Henderson, End-to-End Bias Mitigation by Modelling Biases in Corpora, "
    "ACL 2020"
)

LOSSES: dict[str, Loss] = {
    "ce": Loss(
        short="no bias",
        formula="-log p_y: no bias; run it beside the others, always",
        source="cross-entropy",
        rows=_plain,
        needs_bias=False,
    ),
    "poe": Loss(
        short="product of experts",
        formula="-log of the normalised product p b^beta; beta may move over the run",
        source=f"Hinton, Neural Computation 14, 2002; {_CLARK}, Bias Product; {_MAHABADI}; Sanh et "
        "al., Learning from Others' Mistakes, ICLR 2021 (with a weak model)",
        rows=_product_of_experts,
        knobs={"beta": "beta", "beta_end": "to"},
    ),
    "learned-mixin": Loss(
        short="the same, how much is learned",
        formula="the same, beta learned for each row",
        # Clark's code lets the gradient of g into h as well. It then trains the shared features to
        # serve the product, and the main model alone gets worse (docs/log.md)
        source=f"{_CLARK}, Learned-Mixin; there g is softplus too, but h has a gradient",
        rows=_learned_mixin,
        learns_gain=True,
    ),
    "learned-mixin-h": Loss(
        short="with an entropy term",
        formula="the same, with a term that keeps the bias in use",
        source=f"{_CLARK}, Learned-Mixin +H; as learned-mixin",
        rows=_learned_mixin_h,
        knobs={"entropy_weight": "entropy weight"},
        learns_gain=True,
    ),
    "reweight": Loss(
        short="rows that the bias model is sure of count less",
        formula="(1 - b_y) cross-entropy, divided by the sum of the weights",
        source=f"{_CLARK}, Reweight; the sum is over the whole global batch",
        rows=_plain,
        weights=one_minus_truth,
    ),
    "dfl": Loss(
        short="debiased focal",
        formula="(1 - b_y)^gamma cross-entropy",
        source=f"{_MAHABADI}, Debiased Focal Loss; after Lin et al., ICCV 2017, whose factor is of "
        "the model's own probability",
        rows=_debiased_focal,
        knobs={"dfl_gamma": "gamma"},
    ),
    "mixture": Loss(
        short="mean of probabilities",
        formula="-log((1 - r) p_y + r b_y)",
        source="the ensemble of the original project, which averaged probabilities",
        rows=_mixture,
        knobs={"bias_ratio": "ratio"},
    ),
}

if TYPE_CHECKING:
    LossName = str  # a type checker cannot read names from a dict
else:
    LossName = Literal[tuple(LOSSES)]

_KNOB = Effect(change="loss")
_WEIGHT = Range(minimum=0, maximum=1_000, cure="the default is a good start")
_CHOICES = ", ".join(f"`{name}` ({loss.short})" for name, loss in LOSSES.items())


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """How the frozen bias logits enter the loss."""

    loss: Annotated[LossName, arg(help=f"One of {_CHOICES}."), _KNOB] = "poe"
    beta: Annotated[float, _WEIGHT, _KNOB] = 0.5
    """Weight of the bias log-probabilities in `poe`; 0 is `ce`."""
    beta_end: Annotated[float | None, _WEIGHT, _KNOB] = None
    """Weight at the last step of `poe`; it moves there in a straight line over the steps."""
    entropy_weight: Annotated[float, _WEIGHT, _KNOB] = 0.03
    """Weight of the entropy of the scaled bias in `learned-mixin-h`."""
    dfl_gamma: Annotated[float, _WEIGHT, _KNOB] = 2.0
    """Exponent of `dfl`: (1 - b_y)^gamma; 0 is `ce`."""
    bias_ratio: Annotated[float, Range(minimum=0, below=1, cure="try 0.1"), _KNOB] = 0.1
    """Share r of the bias model in `mixture`: -log((1 - r) p + r b)."""
    ce_weight: Annotated[float, _WEIGHT, _KNOB] = 0.0
    """Weight of a plain cross-entropy that is added to the loss."""
    label_smoothing: Annotated[float, Range(minimum=0, below=1, cure="0.1 is usual"), _KNOB] = 0.0
    """Share of a row's loss that is spread evenly over all genres as its label."""
    class_weight: Annotated[str | None, Effect(identity=False, change="loss")] = None
    """What rows of a genre count: `balanced` (each genre the same in all), or a CSV or TSV table of
    `genre` and `weight`. The mean over a step is divided by the sum of the weights."""

    @property
    def entry(self) -> Loss:
        """The loss that is chosen."""
        return LOSSES[self.loss]

    @property
    def needs_bias(self) -> bool:
        """Whether a bias table is read."""
        return self.entry.needs_bias

    @property
    def learns_gain(self) -> bool:
        """Whether the main model learns by how much the bias counts."""
        return self.entry.learns_gain

    @property
    def description(self) -> str:
        """The loss and the settings that it reads, such as `poe (beta 0.5)`."""
        set_to = {word: getattr(self, name) for name, word in self.entry.knobs.items()}
        said = " ".join(f"{word} {value:g}" for word, value in set_to.items() if value is not None)
        name = f"{self.loss} ({said})" if said else self.loss
        name += f" + {self.ce_weight:g} ce" if self.ce_weight else ""
        name += f", smoothed {self.label_smoothing:g}" if self.label_smoothing else ""
        return name + (f", class weights {self.class_weight}" if self.class_weight else "")

    def beta_at(self, done: float) -> float:
        """Weight of the bias in `poe` when `done` of the steps, 0 to 1, are taken."""
        end = self.beta if self.beta_end is None else self.beta_end
        return self.beta + (end - self.beta) * done

    def __post_init__(self) -> None:
        check(self)
