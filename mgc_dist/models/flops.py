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

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from mgc_dist.models.cnn import BANDS
from mgc_dist.models.main import CnnForAudioClassification, WaveClassifier, part_of
from mgc_dist.models.trunk import layers_below, norms_last

FAMILIES = ("wav2vec2", "hubert", "data2vec-audio", "unispeech", "unispeech-sat", "wavlm")
"""Model types whose layers are counted."""

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
        parts: in the order of computation, named as `model.part_of` names parameters.
    """

    parts: Mapping[str, PartFlops]

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
        """What is left to compute where a cache holds what lies below a boundary of `trunk`."""
        left = {part: work for part, work in self.parts.items() if not _is_below(part, boundary)}
        return SegmentFlops(parts=left)


def _is_below(part: str, boundary: str) -> bool:
    if part == "head" or boundary == "cnn":
        return part == "feature_extractor"
    layer = re.fullmatch(r"layer (\d+)", part)
    return boundary == "backbone" or layer is None or int(layer[1]) < layers_below(boundary)


def count(model: WaveClassifier, segment_samples: int) -> SegmentFlops | None:
    """Work out the FLOP of a segment from the layers' shapes, before ZeRO partitions them.

    Args:
        model: with its frozen parts marked; on any device, the meta device too.
        segment_samples: T.

    Returns:
        None for a model whose kind is not known here (`uncounted` says so).
    """
    if isinstance(model.net, CnnForAudioClassification):
        return _count_cnn(model, segment_samples)
    return None if uncounted(model) else _count_transformer(model, segment_samples)


def uncounted(model: WaveClassifier) -> str:
    """Why `count` gives None; "" if it does not."""
    kind = str(model.net.config.model_type)
    known = kind in FAMILIES or isinstance(model.net, CnnForAudioClassification)
    return "" if known else f"layers of {kind} are of a kind that is not counted"


def peak_tflop_per_s(device: torch.device) -> float | None:
    """Dense bf16 peak of a device; None for a CPU, and where it is not in the table."""
    if device.type != "cuda":
        return None
    return PEAK_TFLOP_PER_S.get(torch.cuda.get_device_name(device))


class _Walk:
    """Adds up products in the order of computation; knows whether gradients flow to its place."""

    def __init__(self, model: nn.Module) -> None:
        self._forward: Counter[str] = Counter()
        self._backward: Counter[str] = Counter()
        self._names = {module: f".{name}." for name, module in model.named_modules()}
        self.live = False

    def through(self, *modules: nn.Module | None) -> None:
        """Pass modules without products, whose weights may be trained (norms)."""
        self.live |= any(_trains(module) for module in modules if module is not None)

    def product(self, module: nn.Module, outputs: int, inputs: int) -> None:
        """A product with a weight: `outputs` values, each a sum over `inputs` products."""
        flops, trained = 2 * outputs * inputs, _trains(module)
        self._add(module, flops, flops * (trained + self.live))
        self.live |= trained

    def linear(self, module: nn.Linear, rows: int) -> None:
        """A linear layer over `rows` vectors."""
        self.product(module, rows * module.out_features, module.in_features)

    def conv(self, module: nn.Conv1d, samples: int) -> int:
        """A convolution over time; returns the length of its output."""
        (size,), (stride,), padding = module.kernel_size, module.stride, module.padding
        assert not isinstance(padding, str)
        out = (samples + 2 * padding[0] - size) // stride + 1
        inputs = module.in_channels // module.groups * size
        self.product(module, out * module.out_channels, inputs)
        return out

    def attention(self, module: nn.Module, frames: int, width: int, *, fused: bool) -> None:
        """Scores and weighted values: two products without a weight."""
        flops = 4 * frames * frames * width
        self._add(module, flops, (2 * flops + fused * flops // 2) * self.live)

    def found(self) -> SegmentFlops:
        """What has been added up."""
        return SegmentFlops(
            parts={
                part: PartFlops(forward=flops, backward=self._backward[part])
                for part, flops in self._forward.items()
            }
        )

    def _add(self, module: nn.Module, forward: int, backward: int) -> None:
        part = part_of(self._names[module])
        self._forward[part] += forward
        self._backward[part] += backward


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _count_transformer(model: WaveClassifier, samples: int) -> SegmentFlops:
    walk, net = _Walk(model), model.net
    base, encoder, config = net.base_model, net.base_model.encoder, net.config
    stable = norms_last(net)
    walk.through(base.feature_extractor)  # it marks its input: the first convolution's gradient
    frames = samples
    for layer in base.feature_extractor.conv_layers:
        frames = walk.conv(layer.conv, frames)
    walk.through(getattr(base.feature_projection, "layer_norm", None))
    walk.linear(base.feature_projection.projection, frames)
    for conv in encoder.pos_conv_embed.modules():
        if isinstance(conv, nn.Conv1d):
            walk.conv(conv, frames)  # one frame too many with an even kernel, cut off behind it
    walk.through(None if stable else encoder.layer_norm)
    for layer in encoder.layers:
        _count_layer(walk, layer, frames, stable)
    walk.through(encoder.layer_norm if stable else None)
    if config.use_weighted_layer_sum:
        walk.live |= bool(net.layer_weights.requires_grad)
    walk.linear(net.projector, frames)
    _count_top(walk, model)
    return walk.found()


def _count_layer(walk: _Walk, layer: nn.Module, frames: int, stable: bool) -> None:
    own = dict(layer.named_children())
    inner = dict(own["attention"].named_children())
    width = _linear(inner["out_proj"]).in_features
    walk.through(own["layer_norm"] if stable else None)
    before = walk.live
    for name in ("q_proj", "k_proj", "v_proj"):  # each sees the layer's input
        walk.live = before
        walk.linear(_linear(inner[name]), frames)
    if "gru_rel_pos_linear" in inner:  # WavLM's gate, which sees each head's part of it
        walk.live = before
        gate = _linear(inner["gru_rel_pos_linear"])
        walk.linear(gate, frames * width // gate.in_features)
    walk.through(own["attention"])
    # WavLM adds a bias to its scores through torch's function of old, which keeps them
    fused = "gru_rel_pos_linear" not in inner
    walk.attention(own["attention"], frames, width, fused=fused)
    walk.linear(_linear(inner["out_proj"]), frames)
    walk.through(own["final_layer_norm"] if stable else own["layer_norm"])
    for name in ("feed_forward", "adapter_layer"):
        for module in own[name].modules() if name in own else ():
            if isinstance(module, nn.Linear):
                walk.linear(module, frames)
    walk.through(None if stable else own["final_layer_norm"])


def _linear(module: nn.Module) -> nn.Linear:
    assert isinstance(module, nn.Linear)
    return module


def _count_cnn(model: WaveClassifier, samples: int) -> SegmentFlops:
    """`logmel-cnn`: the Fourier transform, whose count depends on the library, is left out."""
    walk, cnn = _Walk(model), model.net.cnn
    scale = cnn.mel.mel_scale
    frames, bands = samples // cnn.mel.hop_length + 1, BANDS
    walk.product(scale, frames * bands, cnn.mel.n_fft // 2 + 1)
    for module in cnn.blocks:
        if isinstance(module, nn.Conv2d):
            inputs = module.in_channels * module.kernel_size[0] * module.kernel_size[1]
            walk.product(module, bands * frames * module.out_channels, inputs)
        elif isinstance(module, nn.MaxPool2d):
            frames, bands = frames // 2, bands // 2
        else:
            walk.through(module)
    walk.linear(cnn.projector, 1)
    _count_top(walk, model)
    return walk.found()


def _count_top(walk: _Walk, model: WaveClassifier) -> None:
    """The classifier, and beside it the gain of the learned mixins, whose input is detached."""
    before = walk.live
    for module, live in ((model.gain, False), (model.net.classifier, before)):
        walk.live = live
        if module is not None:
            walk.linear(module, 1)
