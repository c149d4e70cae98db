"""Floating-point operations of a segment, part by part: forward, backward, and what freezing saves.

Counted are matrix products and convolutions, a multiplication with its addition as two; norms,
activations and softmax are a few in a thousand, and no table counts them. A product of f
operations costs f forward, f more for the gradient of its weight if that is trained, and f for
the gradient of its input if anything below it is trained. So a frozen prefix costs its forward
only. The two products of attention have inputs only: 2 f backward, and half an f more where a
fused kernel recomputes the scores instead of keeping them (five products for the forward's two: Dao
et al., "FlashAttention", NeurIPS 2022, algorithm 4). Activation checkpointing's second forward
is not counted: it is no work that the model asks for.

For wav2vec2-large (T = 48,000, F = 149) that is 109.64 GFLOP forward, and for a training step 330.0
with nothing frozen, 300.6 with the CNN, 202.5 with the lower 12 of 24 layers too.
"""

from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mgc_dist.encoders.foreign import unchanged
from mgc_dist.encoders.kind import Cut
from mgc_dist.encoders.wrapped import CustomAudioClassifier
from mgc_dist.models.classifier import WaveClassifier

_OF_INPUTS = (torch.ops.aten.bmm, torch.ops.aten.baddbmm)
"""Products without a weight: attention's scores, and what they weigh."""

PEAK_TFLOP_PER_S: Mapping[str, float] = {
    "NVIDIA H200": 989.4,
    "NVIDIA H200 NVL": 835.5,
    "NVIDIA GH200 480GB": 989.4,
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H100 NVL": 835.5,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA A30": 165.0,
    "NVIDIA A10": 125.0,
    "NVIDIA A40": 149.7,
    "NVIDIA RTX A6000": 154.8,
    "NVIDIA L40S": 362.05,
    "NVIDIA L40": 181.05,
    "NVIDIA L4": 121.0,
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA GeForce RTX 3090": 71.0,
}
"""Dense bf16 with float32 sums, by the name that CUDA gives the device: NVIDIA's data sheets (half
of the figure "with sparsity") and, for GeForce, the white papers of Ada (appendix A) and Ampere."""


@dataclass(frozen=True, kw_only=True)
class PartFlops:
    """FLOP a segment of one part of the model: forward, and backward as it is frozen now."""

    forward: int
    backward: int


@dataclass(frozen=True, kw_only=True)
class SegmentFlops:
    """FLOP a segment.

    Attributes:
        parts: named as the model's kind names parameters.
        cut: of the model.
    """

    parts: Mapping[str, PartFlops]
    cut: Cut | None

    @property
    def forward(self) -> int:
        """One forward pass."""
        return sum(part.forward for part in self.parts.values())

    @property
    def training(self) -> int:
        """Forward and backward."""
        return self.forward + sum(part.backward for part in self.parts.values())

    @property
    def frozen(self) -> int:
        """Forward of the parts without a backward: a constant of each segment."""
        return sum(part.forward for part in self.parts.values() if not part.backward)

    def above(self, boundary: str) -> "SegmentFlops":
        """What is left to compute where a cache holds what lies below a boundary."""
        assert self.cut is not None
        left = {
            part: work for part, work in self.parts.items() if not self.cut.is_below(part, boundary)
        }
        return SegmentFlops(parts=left, cut=self.cut)


def count(model: WaveClassifier, segment_samples: int) -> SegmentFlops:
    """Work out the FLOP of a segment, before ZeRO partitions the weights.

    torch's counter watches a forward pass on the meta device, where nothing is computed; what the
    backward pass needs follows from what is trained. Code that is not ours may look at numbers, and
    then gets some, of one segment.

    Args:
        model: with its frozen parts marked; on any device, the meta device too.
        segment_samples: T.
    """
    try:
        counted, live = _forward_on(torch.device("meta"), model, segment_samples)
    except Exception:  # whatever a stranger's code may raise
        if not isinstance(model.net, CustomAudioClassifier) or model.net.device.type == "meta":
            raise
        counted, live = _forward_on(model.net.device, model, segment_samples)
    own = {name: Counter(products) for name, products in counted.items()}
    for name, products in counted.items():
        above = name.rpartition(".")[0]
        while above and above not in own:  # a list of modules is never called itself
            above = above.rpartition(".")[0]
        if above:
            own[above].subtract(products)
    forward: Counter[str] = Counter()
    backward: Counter[str] = Counter()
    for name, module in model.named_modules():
        products = own.get(f"{type(model).__name__}.{name}", Counter())
        if products.total():
            part = model.kind.part_of(f".{name}.")
            forward[part] += products.total()
            fused = model.kind.fuses_attention
            backward[part] += _backward(products, module, live=live[module], fused=fused)
    parts = {part: PartFlops(forward=f, backward=backward[part]) for part, f in forward.items()}
    return SegmentFlops(parts=parts, cut=model.kind.cut)


def _backward(products: "Counter[object]", module: nn.Module, *, live: bool, fused: bool) -> int:
    """FLOP of the backward pass of a module's own products.

    Args:
        products: operation -> FLOP forward.
        module: whose they are.
        live: whether a gradient flows to its input.
        fused: whether attention computes its scores again.
    """
    trained = any(parameter.requires_grad for parameter in module.parameters())
    of_inputs = sum(products[operation] for operation in _OF_INPUTS)
    with_weights = products.total() - of_inputs
    flops = with_weights * (trained + live)
    if of_inputs:
        flops += (2 * of_inputs + fused * of_inputs // 2) * (trained or live)
        # attention in one call (WavLM): its fourth projection sees what the other three trained
        flops += with_weights // 4 * (trained and not live)
    return flops


def _forward_on(
    device: torch.device, model: WaveClassifier, segment_samples: int
) -> tuple[dict[str, dict[object, int]], dict[nn.Module, bool]]:
    """Products of each module and all in it, and whether a gradient flows to its input."""
    live: dict[nn.Module, bool] = {}

    def enter(module: nn.Module, args: tuple[object, ...], named: dict[str, object]) -> None:
        given = [x for x in (*args, *named.values()) if isinstance(x, Tensor)]
        live[module] = any(x.requires_grad for x in given)

    shapes = {
        name: tensor.detach().to(device).requires_grad_(tensor.requires_grad)
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }
    wave = torch.zeros((1, segment_samples), dtype=torch.int16, device=device)
    config, trains = model.net.config, model.training
    with ExitStack() as kept:
        kept.enter_context(unchanged(model))
        kept.callback(model.train, trains)
        model.train()  # else the feature encoder does not mark its input
        if hasattr(config, "apply_spec_augment"):
            kept.callback(setattr, config, "apply_spec_augment", config.apply_spec_augment)
            config.apply_spec_augment = False  # it looks at numbers
        for module in model.modules():
            kept.enter_context(module.register_forward_pre_hook(enter, with_kwargs=True))
        kept.enter_context(torch.random.fork_rng(devices=[]))
        kept.enter_context(torch.enable_grad())
        kept.enter_context(device)  # SEW-D makes scalars, on no device of its input's
        kept.enter_context(sdpa_kernel(SDPBackend.MATH))  # the counter does not know all others
        counter = kept.enter_context(FlopCounterMode(display=False))
        gain = {"with_gain": model.gain is not None}
        torch.func.functional_call(model, shapes, (wave,), gain)
        return counter.get_flop_counts(), live


def peak_tflop_per_s(device: torch.device) -> float | None:
    """Dense bf16 peak of a device; None for a CPU, and where it is not in the table."""
    if device.type != "cuda":
        return None
    return PEAK_TFLOP_PER_S.get(torch.cuda.get_device_name(device))
