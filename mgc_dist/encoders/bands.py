"""Transformers over log-mel bands: AST, Whisper's encoder, w2v-BERT.

The bands are computed in the forward pass from the int16 segments, as each model's own feature
extractor makes them, and no other file has to know. A family is an entry of LAYOUTS.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import (
    ASTFeatureExtractor,
    PreTrainedModel,
    SeamlessM4TFeatureExtractor,
    WhisperFeatureExtractor,
)

from mgc_dist.encoders import cut, hub
from mgc_dist.encoders.masks import RowMasks, applies_masks
from mgc_dist.encoders.pooling import pooled
from mgc_dist.sound import fbank

MEAN, SCALE = "input_mean", "input_scale"
"""Of AST's bands, in config.json: a checkpoint of a run keeps no feature extractor."""
_SEAMLESS_STRIDE = 2
_WHISPER_FRAMES_PER_S = 50
"""Positions: a band frame every 10 ms, and a convolution of stride 2."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the parts of a family are.

    Attributes:
        base: below the head, in the model.
        encoder: of the frames, in the base; frozen by `--freeze feature_encoder`.
        before: in the base, all that lies below the first layer.
        layers: in the base.
        head: the last linear layer, in the model.
        inputs: float32 waves [B, T] -> what the model takes.
        longest: samples of a segment at most; None if there is no limit.
        frames: that a segment of T samples has.
        extractor: what transformers needs beside an export.
        adapted: names of the linear layers that `--lora` adapts, of queries and values.
    """

    base: str
    encoder: tuple[str, ...]
    before: tuple[str, ...]
    layers: str
    head: str
    inputs: Callable[[Tensor, Any], Tensor]
    longest: Callable[[Any], int | None]
    frames: Callable[[int], int]
    extractor: Callable[[Any], Any]
    adapted: tuple[str, ...] = ("q_proj", "v_proj")


def _ast_inputs(wave: Tensor, config: Any) -> Tensor:  # noqa: ANN401 - of transformers
    """[B, max_length, bands], zeros after the segment, then standardised."""
    bands = fbank.kaldi(wave, config.num_mel_bins, "hann")  # [B, F, bands]
    whole = nn.functional.pad(bands, (0, 0, 0, config.max_length - bands.shape[1]))
    mean, scale = _ast_scale(config)
    return (whole - mean) / (scale * 2)  # the 2 is AST's: a standard deviation of 0.5


def _ast_scale(config: Any) -> tuple[float, float]:  # noqa: ANN401
    said, own = config.to_dict(), ASTFeatureExtractor()
    return float(said.get(MEAN, own.mean)), float(said.get(SCALE, own.std))


def _whisper_inputs(wave: Tensor, config: Any) -> Tensor:  # noqa: ANN401
    """[B, bands, 2 * max_source_positions], silence after the segment."""
    whole = config.max_source_positions * 2 * fbank.HOP
    return fbank.whisper(nn.functional.pad(wave, (0, whole - wave.shape[1])), config.num_mel_bins)


def _seamless_inputs(wave: Tensor, config: Any) -> Tensor:  # noqa: ANN401
    """[B, F // 2, 2 * bands], each band with zero mean and unit variance over the segment."""
    width = config.feature_projection_input_dim // _SEAMLESS_STRIDE
    bands = fbank.kaldi(wave * 32768.0, width, "povey")  # [B, F, bands], of Kaldi's 16 bits
    variance = bands.var(dim=1, keepdim=True)
    bands = (bands - bands.mean(dim=1, keepdim=True)) / (variance + 1e-7).sqrt()
    pairs = bands.shape[1] // _SEAMLESS_STRIDE
    return bands[:, : pairs * _SEAMLESS_STRIDE].reshape(len(wave), pairs, -1)


LAYOUTS: Mapping[str, Layout] = {
    "audio-spectrogram-transformer": Layout(
        base="audio_spectrogram_transformer",
        encoder=("embeddings.patch_embeddings",),
        before=("embeddings",),
        layers="layers",
        head="classifier.dense",
        inputs=_ast_inputs,
        longest=lambda config: (config.max_length - 1) * fbank.HOP + fbank.FRAME,
        frames=fbank.kaldi_frames,
        extractor=lambda config: ASTFeatureExtractor(
            num_mel_bins=config.num_mel_bins,
            max_length=config.max_length,
            mean=_ast_scale(config)[0],
            std=_ast_scale(config)[1],
        ),
    ),
    "whisper": Layout(
        base="encoder",
        encoder=("conv1", "conv2"),
        before=("conv1", "conv2", "embed_positions"),
        layers="layers",
        head="classifier",
        inputs=_whisper_inputs,
        longest=lambda config: config.max_source_positions * 2 * fbank.HOP,
        frames=lambda samples: samples // (2 * fbank.HOP),
        extractor=lambda config: WhisperFeatureExtractor(
            feature_size=config.num_mel_bins,
            chunk_length=config.max_source_positions // _WHISPER_FRAMES_PER_S,
        ),
    ),
    "wav2vec2-bert": Layout(
        base="wav2vec2_bert",
        encoder=(),  # bands have no weights
        before=("feature_projection", "encoder.embed_positions", "encoder.dropout"),
        layers="encoder.layers",
        head="classifier",
        inputs=_seamless_inputs,
        longest=lambda config: None,
        frames=lambda samples: fbank.kaldi_frames(samples) // _SEAMLESS_STRIDE,
        extractor=lambda config: SeamlessM4TFeatureExtractor(
            feature_size=config.feature_projection_input_dim // _SEAMLESS_STRIDE,
            num_mel_bins=config.feature_projection_input_dim // _SEAMLESS_STRIDE,
            stride=_SEAMLESS_STRIDE,
        ),
        adapted=("linear_q", "linear_v"),
    ),
}
"""By `model_type`."""


class BandsKind:
    """The adapter (`mgc_dist.encoders.kind.Kind`).

    Args:
        net: an audio classifier of a family of LAYOUTS.
    """

    normalises: bool | None = None
    needs_our_code = False
    never_called: tuple[str, ...] = ()

    def __init__(self, net: PreTrainedModel) -> None:
        self.net = net
        self.masks = RowMasks.of(net)
        self._layout = LAYOUTS[net.config.model_type]
        self.cut = BandsCut(self)

    @property
    def fuses_attention(self) -> bool:
        """Whether its attention is one fused kernel."""
        return bool(self.net.config._attn_implementation != "eager")

    @property
    def base(self) -> nn.Module:
        """All below the head."""
        base: nn.Module = self.net.get_submodule(self._layout.base)
        return base

    @property
    def head(self) -> str:
        """Name of the last linear layer."""
        return self._layout.head

    @property
    def adapted(self) -> tuple[str, ...]:
        """Its queries and values."""
        return self._layout.adapted

    def inputs(self, wave: Tensor) -> Tensor:
        """Float32 waves [B, T] -> the family's bands."""
        return self._layout.inputs(wave, self.net.config)

    def states(self, x: Tensor) -> Sequence[Tensor]:
        """Hidden states by layer, L times [B, F, D]; of AST the patches of the segment alone.

        Its other patches are of the zeros up to `max_length`: 7 of 10 s for segments of 3 s.
        Patches stand by band, then by time, after two tokens.
        """
        states: Sequence[Tensor] = self.base(x, output_hidden_states=True).hidden_states
        config = self.net.config
        if not hasattr(self.base, "embeddings"):
            return states
        frames = self._layout.frames(config.segment_samples)
        over_time = (config.max_length - config.patch_size) // config.time_stride + 1
        kept = min(over_time, -(-frames // config.time_stride))
        patches = (each[:, 2:].reshape(len(x), -1, over_time, each.shape[2]) for each in states)
        return [each[:, :, :kept].flatten(1, 2) for each in patches]  # [B, F, D]

    def take(self, extractor: Any) -> bool:  # noqa: ANN401 - of transformers
        """AST's mean and scale, kept in its config; waves are never normalised."""
        if isinstance(extractor, ASTFeatureExtractor):
            standardises = extractor.do_normalize  # else (x - 0) / (2 * 0.5)
            setattr(self.net.config, MEAN, extractor.mean if standardises else 0.0)
            setattr(self.net.config, SCALE, extractor.std if standardises else 0.5)
        if extractor.sampling_rate != fbank.RATE:
            raise hub.other_rate(self.net.config.model_type, extractor.sampling_rate, fbank.RATE)
        return False

    def extractor(self, sample_rate: int, do_normalize: bool) -> Any:  # noqa: ANN401
        """What transformers computes the same bands with."""
        return self._layout.extractor(self.net.config)

    def refuse_unfit(self, name: str, segment_samples: int) -> None:
        """Refuse segments that are longer than its positions, or too short."""
        longest = self._layout.longest(self.net.config)
        if longest is not None and segment_samples > longest:
            raise hub.too_long(name, segment_samples, longest, fbank.RATE)
        needed = self.net.config.mask_time_length if self._masks_time else 1
        hub.refuse_short(
            name, segment_samples, frames=self._layout.frames(segment_samples), needed=needed
        )

    def fit(self, segment_samples: int) -> None:
        """Cut Whisper's positions after the segment, in whole seconds: its extractor pads to those.

        Each position has a vector of its own, so the first ones are what they were; 27 of 30 s of
        silence would cost ten times the work, and be most of the mean that the head gets.
        """
        if self.net.config.model_type != "whisper":
            return
        config, encoder = self.net.config, self.net.encoder
        config.encoder_layerdrop = encoder.layerdrop = 0.0  # ranks would drop different layers
        kept = -(-segment_samples // fbank.RATE) * _WHISPER_FRAMES_PER_S
        if kept >= config.max_source_positions:
            return
        table = encoder.embed_positions
        shorter = nn.Embedding(kept, table.embedding_dim, _weight=table.weight[:kept].detach())
        encoder.embed_positions = shorter.requires_grad_(False)
        encoder.max_source_positions = config.max_source_positions = kept

    def freeze(self, freeze: str, frozen_layers: int | None) -> list[nn.Module]:
        """Freeze; bands carry no gradient, so the backward pass ends where training does."""
        base, layout, layers = self.base, self._layout, self.layers
        filler = getattr(base, "masked_spec_embed", None)
        if filler is not None and (not self._masks_time or frozen_layers is not None):
            filler.requires_grad_(False)  # unused: ZeRO-3 repeats its last gradient
        parts = list(self.before.values())
        if freeze in ("none", "feature_encoder"):
            names = layout.encoder if freeze == "feature_encoder" else ()
            parts = [base.get_submodule(each) for each in names]
        if freeze == "backbone":
            parts = [base]
        elif frozen_layers is not None:
            if frozen_layers > len(layers):
                raise hub.too_many_layers(frozen_layers, len(layers))
            parts += layers[:frozen_layers]
            if self.net.config.model_type == "whisper":
                self.net.encoder.dropout = 0.0  # a number, and no module that could be in eval mode
        for part in parts:
            part.requires_grad_(False)
        return parts

    def part_of(self, name: str) -> str:
        """As `--freeze` divides it."""
        layout = self._layout
        layer = re.search(rf"\.{re.escape(layout.base + '.' + layout.layers)}\.(\d+)\.", name)
        if layer:
            return f"layer {layer[1]}"
        if any(f".{layout.base}.{part}." in name for part in layout.encoder):
            return "feature_extractor"
        below = any(f".{layout.base}.{part}." in name for part in layout.before)
        if below or ".masked_spec_embed" in name:
            return "embeddings"
        return "encoder, besides its layers" if f".{layout.base}." in name else "head"

    def layers_above(self, name: str) -> int:
        """0 for the last layer and what follows it; all for what lies below the first one."""
        part = self.part_of(name)
        if part.startswith("layer "):
            return len(self.layers) - 1 - int(part.removeprefix("layer "))
        return len(self.layers) if part in ("feature_extractor", "embeddings") else 0

    @property
    def _masks_time(self) -> bool:
        config = self.net.config
        return self.masks is not None and applies_masks(config) and config.mask_time_prob > 0

    @property
    def before(self) -> dict[str, nn.Module]:
        """All that lies below the first layer, by name."""
        names = [each for each in self._layout.before if _has(self.base, each)]
        return {each: self.base.get_submodule(each) for each in names}

    @property
    def layers(self) -> nn.ModuleList:
        """Its encoder's layers, the lowest first."""
        layers = self.base.get_submodule(self._layout.layers)
        assert isinstance(layers, nn.ModuleList)
        return layers


class BandsCut:
    """Where the model is cut in two (`mgc_dist.encoders.kind.Cut`): at a layer, or below the head.

    Args:
        kind: of the model.
    """

    def __init__(self, kind: BandsKind) -> None:
        self._kind = kind

    def is_below(self, part: str, at: str) -> bool:
        """Layers are counted from 0: `layers:N` has the first N below."""
        if at == "backbone":
            return part != "head"
        layer = re.fullmatch(r"layer (\d+)", part)
        before = part in ("feature_extractor", "embeddings")
        return int(layer[1]) < cut.layers_below(at) if layer else before

    def refuse_inexact(self, at: str, flag: str) -> None:
        """Refuse the bands' first convolutions, masks below, and a head that reads all layers."""
        config = self._kind.net.config
        if at == "cnn":
            got = f"{config.model_type}, whose first convolutions cost less than to read them"
            raise hub.inexact(flag, got, "--cache trunk with --freeze layers:N, or --cache none")
        if at != "backbone":
            cut.refuse_masks(config, flag)
        if config.to_dict().get("use_weighted_layer_sum"):
            raise hub.inexact(flag, "a head that reads the states of all layers", "--cache none")

    def open_at(self, at: str) -> None:
        """Nothing to do: `above` calls the head alone."""

    def below(self, at: str, x: Tensor) -> Tensor:
        """What the head gets: the model's inputs -> [B, F, D]; of AST two tokens, or all states."""
        base, net = self._kind.base, self._kind.net
        if at != "backbone":
            return cut.until(self._kind.layers[cut.layers_below(at) - 1], lambda: base(x))
        states: Tensor = base(x).last_hidden_state  # [B, F, D]
        reads_all = hasattr(net, "projector") or hasattr(net, "attention")
        return states if reads_all else states[:, :2]

    def above(self, at: str, hidden: Tensor) -> Tensor:
        """What the rest makes of it: [B, F, D] -> logits [B, K]."""
        net = self._kind.net
        if at != "backbone":
            hidden = self._above_layers(cut.through(self._encoder, cut.layers_below(at), hidden))
        logits: Tensor = net.classifier(pooled(net, hidden))  # [B, K]
        return logits

    def modules_below(self, at: str) -> dict[str, nn.Module]:
        """The modules whose weights decide what lies at a boundary, by name."""
        if at == "backbone":
            return {"backbone": self._kind.base}
        layers = self._kind.layers[: cut.layers_below(at)]
        return self._kind.before | {f"layer {n}": layer for n, layer in enumerate(layers)}

    @property
    def _encoder(self) -> Any:  # noqa: ANN401 - of transformers
        """The module that has the layers."""
        base: Any = self._kind.base
        return base if hasattr(base, "layers") else base.encoder

    def _above_layers(self, hidden: Tensor) -> Tensor:
        """What a family does with the last layer's states: [B, F, D] -> [B, F, D]."""
        base: Any = self._kind.base
        for name in ("layernorm", "layer_norm"):  # AST's, Whisper's
            if hasattr(base, name):
                normed: Tensor = getattr(base, name)(hidden)
                return normed
        if base.intermediate_ffn:
            hidden = hidden + 0.5 * base.intermediate_ffn(hidden)
        return hidden if base.adapter is None else base.adapter(hidden)


def _has(module: nn.Module, name: str) -> bool:
    """Whether a part is there: w2v-BERT may have no module for its positions."""
    found: Any = module
    for each in name.split("."):
        found = getattr(found, each, None)
    return found is not None
