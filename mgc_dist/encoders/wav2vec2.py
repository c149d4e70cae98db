"""The family of wav2vec2: a convolutional feature encoder over raw audio below a transformer.

wav2vec2, HuBERT, WavLM, data2vec-audio, UniSpeech, SEW, SEW-D, wav2vec2-conformer. Segments have
one length, so no attention mask is ever given: the base flavour (group norm) must not get one, and
for the large flavour (layer norm) a mask of ones changes nothing.

The parts above a boundary are called as the model itself calls them, in the same order, so that
dropout above it draws the same numbers with a cache and without one.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mgc_dist.encoders import cut, hub, pooling
from mgc_dist.encoders.masks import RowMasks, applies_masks
from mgc_dist.errors import UserError

_ADAPTED: dict[str, tuple[str, ...]] = {
    "sew-d": ("query_proj", "value_proj"),
    "wav2vec2-conformer": ("linear_q", "linear_v"),
    "wavlm": ("intermediate_dense", "output_dense"),
}
"""What `--lora` adapts; of other types the queries and values (Hu et al., ICLR 2022, table 5)."""
_NEVER_CALLED: dict[str, tuple[str, ...]] = {"wavlm": ("q_proj", "k_proj", "v_proj", "out_proj")}
"""It hands their weights to torch's attention."""


class Wav2Vec2Kind:
    """The adapter (`mgc_dist.encoders.kind.Kind`).

    Args:
        net: an audio classifier of transformers.
    """

    normalises: bool | None = None
    head = "classifier"

    def __init__(self, net: PreTrainedModel) -> None:
        self.net = net
        self.cut = Wav2Vec2Cut(net)
        self.masks = RowMasks.of(net)
        self.needs_our_code = not type(net).__module__.startswith("transformers.")
        self.adapted = _ADAPTED.get(net.config.model_type, ("q_proj", "v_proj"))
        self.never_called = _NEVER_CALLED.get(net.config.model_type, ())

    @property
    def base(self) -> nn.Module:
        """All below the head."""
        base: nn.Module = self.net.base_model
        return base

    def inputs(self, wave: Tensor) -> Tensor:
        """The waves themselves."""
        return wave

    def states(self, x: Tensor) -> Sequence[Tensor]:
        """Hidden states by layer, L times [B, F, D]; code of one's own may give none."""
        return states_of(self.net, x, _layers(self.net))

    def take(self, extractor: Any) -> bool:  # noqa: ANN401 - of transformers
        """Whether waves are normalised."""
        return bool(extractor.do_normalize)

    def extractor(self, sample_rate: int, do_normalize: bool) -> Any:  # noqa: ANN401
        """An attention mask is for the large flavour only."""
        return hub.wave_extractor(sample_rate, do_normalize, self.net.config)

    def fit(self, segment_samples: int) -> None:
        """Nothing: it takes segments of any length."""

    @property
    def fuses_attention(self) -> bool:
        """True but for WavLM, which adds a bias to its scores and so keeps them."""
        return bool(self.net.config._attn_implementation != "eager")

    def refuse_unfit(self, name: str, segment_samples: int) -> None:
        """Refuse what takes no raw audio, or gets too few frames."""
        hub.refuse_no_encoder(f"--model {name}", self.net)
        lengths = self.net.base_model._get_feat_extract_output_lengths(
            torch.tensor(segment_samples)
        )
        needed = self.net.config.mask_time_length if self._masks_time else 1
        hub.refuse_short(name, segment_samples, frames=int(lengths), needed=needed)

    def freeze(self, freeze: str, frozen_layers: int | None) -> list[nn.Module]:
        """Freeze; `requires_grad = False` alone would still back-propagate through frozen parts.

        The feature encoder marks its input as requiring gradients unless it is told (1.49 x the
        time at half the layers frozen).
        """
        base, layers = self.net.base_model, _layers(self.net)
        if hasattr(base, "masked_spec_embed") and not self._masks_time:
            base.masked_spec_embed.requires_grad_(False)  # unused: ZeRO-3 repeats its last gradient
        for part in _above_states(self.net):
            part.requires_grad_(False)  # unused, as well
        if freeze == "none":
            return []
        base.feature_extractor._freeze_parameters()
        if freeze == "feature_encoder":
            return [base.feature_extractor]
        if freeze == "backbone":
            base.requires_grad_(False)
            return [base]
        assert frozen_layers is not None
        if frozen_layers > len(layers):
            raise hub.too_many_layers(frozen_layers, len(layers))
        parts = [*_before_layers(self.net), *layers[:frozen_layers]]
        for part in parts:
            part.requires_grad_(False)
        if hasattr(base, "masked_spec_embed"):
            base.masked_spec_embed.requires_grad_(False)
        return parts

    def part_of(self, name: str) -> str:
        """As `--freeze` divides it."""
        for part in ("feature_extractor", "feature_projection", "masked_spec_embed"):
            if f".{part}" in name:
                return part
        if f".{self.net.base_model_prefix}.layer_norm." in name:
            return "feature_projection"  # of SEW, which has its norm beside it
        if ".encoder.upsample." in name:
            return "upsampling"
        layer = re.search(r"\.encoder\.(?:layers|encoder\.layer)\.(\d+)\.", name)
        if layer:
            return f"layer {layer[1]}"
        return "encoder, besides its layers" if ".encoder." in name else "head"

    def layers_above(self, name: str) -> int:
        """0 for the last layer and what follows it; all for what lies below the first one."""
        layers = len(_layers(self.net))
        part = self.part_of(name)
        if part.startswith("layer "):
            return layers - 1 - int(part.removeprefix("layer "))
        follows = ".encoder.layer_norm." in name and _norms_last(self.net)
        return 0 if follows or part in ("upsampling", "head") else layers

    @property
    def _masks_time(self) -> bool:
        config = self.net.config
        return applies_masks(config) and config.mask_time_prob > 0


def states_of(net: PreTrainedModel, x: Tensor, layers: Iterable[nn.Module]) -> Sequence[Tensor]:
    """Hidden states by layer: the model's inputs -> L times [B, F, D].

    Code that calls its encoder itself, as MERT v1 does, gets no states from transformers 5: they
    are then what each layer is given, and what comes out in the end.

    Args:
        net: an audio classifier.
        x: the model's inputs.
        layers: of its encoder.

    Raises:
        UserError: there are none.
    """
    states = pooling.states_of(net, x, layers)
    if states is None:
        raise UserError(
            f"--model {net.config.name_or_path}",
            got="a model that gives no hidden states, and whose layers cannot be told",
            expected="one whose forward() takes output_hidden_states=True",
            cure="choose another model, or train a head: mgc train --freeze backbone",
        )
    return states


class Wav2Vec2Cut:
    """Where the model is cut in two (`mgc_dist.encoders.kind.Cut`).

    Args:
        net: an audio classifier of transformers.
    """

    def __init__(self, net: PreTrainedModel) -> None:
        self.net = net

    def is_below(self, part: str, at: str) -> bool:
        """Layers are counted from 0: `layers:N` has the first N below."""
        if part == "head" or at == "cnn":
            return part == "feature_extractor"
        if at == "backbone":
            return True
        layer = re.fullmatch(r"layer (\d+)", part)
        return part != "upsampling" and (layer is None or int(layer[1]) < cut.layers_below(at))

    def refuse_inexact(self, at: str, flag: str) -> None:
        """Refuse what draws random numbers below, or reads more than the boundary."""
        base, config = self.net.base_model, self.net.config
        if at != "backbone" and hasattr(base, "feature_extractor_cqt"):
            got = "a model that reads waves a second time, for a constant-Q transform"
            raise hub.inexact(flag, got, "--cache trunk with --freeze backbone, or --cache none")
        if at == "cnn":
            return
        if getattr(config, "use_weighted_layer_sum", False):
            raise hub.inexact(flag, "a head that reads the states of all layers", "--cache cnn")
        if at == "backbone":
            return  # in eval mode as a whole: no SpecAugment, no dropout
        if not hasattr(base.encoder, "layers"):  # SEW-D
            got = f"layers of {config.model_type}, which only its encoder as a whole can call"
            raise hub.inexact(flag, got, "--cache cnn")
        cut.refuse_masks(config, flag)

    def open_at(self, at: str) -> None:
        """Let the feature encoder hand its own output on, when it is given that instead of waves.

        float32 waves [B, T] are encoded as ever; features [B, F, D] come back as [B, D, F], which
        is how the model gets them from its encoder. So it is the model's own forward pass that
        runs, with its mask and, at ZeRO-3, its hooks; calling its inner methods would find
        partitioned weights.
        """
        if at != "cnn":
            return
        extractor = self.net.base_model.feature_extractor
        encode = extractor.forward

        def encode_or_pass(x: Tensor) -> Tensor:
            passed: Tensor = x.transpose(1, 2) if x.dim() == 3 else encode(x)  # [B, D, F]
            return passed

        extractor.forward = encode_or_pass

    def below(self, at: str, x: Tensor) -> Tensor:
        """What the frozen part gives: float32 waves [B, T] -> [B, F, D], of autocast's dtype."""
        base = self.net.base_model
        if at == "backbone":
            states: Tensor = base(x).last_hidden_state  # [B, F, D]
            return states
        if at == "cnn":
            features: Tensor = base.feature_extractor(x).transpose(1, 2)  # [B, F, D]
            return features
        return cut.until(base.encoder.layers[cut.layers_below(at) - 1], lambda: base(x))

    def above(self, at: str, hidden: Tensor) -> Tensor:
        """What the rest makes of it: [B, F, D] -> logits [B, K], once `open_at` was called."""
        if at == "cnn":
            logits: Tensor = self.net(hidden).logits
            return logits
        encoder = self.net.base_model.encoder
        if at != "backbone":
            hidden = cut.through(encoder, cut.layers_below(at), hidden)
            if _norms_last(self.net):
                hidden = encoder.layer_norm(hidden)
            if hasattr(encoder, "upsample"):  # SEW's layers see half of the frames
                hidden = encoder.upsample(hidden)
                missing = self._frames - hidden.shape[1]
                hidden = nn.functional.pad(hidden, (0, 0, 0, max(0, missing)))  # [B, F, D]
        pooled = self.net.projector(hidden).mean(dim=1)  # [B, D]
        logits = self.net.classifier(pooled)  # [B, K]
        return logits

    @property
    def _frames(self) -> int:
        """F of a segment, where its feature encoder ends."""
        samples = torch.tensor(self.net.config.segment_samples, device="cpu")
        return int(self.net.base_model._get_feat_extract_output_lengths(samples))

    def modules_below(self, at: str) -> dict[str, nn.Module]:
        """The modules whose weights decide what lies at a boundary, by name."""
        base = self.net.base_model
        if at == "backbone":
            return {"backbone": base}
        parts: dict[str, nn.Module] = {"feature_extractor": base.feature_extractor}
        if at == "cnn":
            return parts
        before = _before_layers(self.net)
        parts |= {f"before {n}": part for n, part in enumerate(before)}
        layers = base.encoder.layers[: cut.layers_below(at)]
        return parts | {f"layer {n}": layer for n, layer in enumerate(layers)}


def _norms_last(net: PreTrainedModel) -> bool:
    """Whether the encoder's norm stands behind its layers; else it stands before them.

    By the encoder that was built: a config may carry do_stable_layer_norm to a model that does
    not look at it (data2vec-audio).
    """
    name = type(net.base_model.encoder).__name__
    return "StableLayerNorm" in name or "Conformer" in name


def _above_states(net: PreTrainedModel) -> list[nn.Module]:
    """What a head does not see that reads the states of all layers: all that follows the last one.

    transformers 5.24 counts neither the norm of the large flavour among them (4 did), nor SEW's
    frames after upsampling.
    """
    if not net.config.to_dict().get("use_weighted_layer_sum"):
        return []
    encoder = net.base_model.encoder
    parts = [getattr(encoder, "upsample", None)]
    parts += [encoder.layer_norm] if _norms_last(net) else []
    return [part for part in parts if part is not None]


def _layers(net: PreTrainedModel) -> nn.ModuleList:
    """The encoder's layers, the lowest first."""
    encoder = net.base_model.encoder
    layers: nn.ModuleList = encoder.encoder.layer if hasattr(encoder, "encoder") else encoder.layers
    return layers


def _before_layers(net: PreTrainedModel) -> list[nn.Module]:
    """All that lies below the encoder's first layer, or is shared by its layers."""
    base, encoder = net.base_model, net.base_model.encoder
    names = ["pos_conv_embed", "dropout"]  # the norm stands there in the post-norm flavour
    names += [] if _norms_last(net) else ["layer_norm"]
    owners: list[tuple[nn.Module, tuple[str, ...]]]
    owners = [(base, ("feature_extractor", "feature_projection", "layer_norm", "feature_dropout"))]
    owners += [(encoder, tuple(names))]
    if hasattr(encoder, "encoder"):  # SEW-D: positions of all layers, a convolution at the first
        owners += [(encoder.encoder, ("rel_embeddings", "LayerNorm", "conv"))]
    parts = [getattr(owner, name, None) for owner, of_it in owners for name in of_it]
    return [part for part in parts if isinstance(part, nn.Module)]
