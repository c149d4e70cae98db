"""Main models: waveform classifiers, by name or by configuration, with parts of them frozen.

The main model is any `AutoModelForAudioClassification` with a convolutional feature encoder
over raw audio (wav2vec2, HuBERT, WavLM, data2vec-audio). Segments have one length, so no
attention mask is ever given: the base flavour of wav2vec2 (group norm) must not get one, and
for the large flavour (layer norm) a mask of ones changes nothing. `logmel-cnn` is a small model of
our own behind the same interface; transformers cannot load it without our code.
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import xxhash
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForAudioClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from mgc_dist.cluster.ranks import seed_everything
from mgc_dist.errors import UserError
from mgc_dist.models import hub, trunk
from mgc_dist.models.cnn import LogMelCnn
from mgc_dist.models.hub import normalise

log = logging.getLogger(__name__)

TEMPERATURE = "calibration_temperature"
"""In config.json; transformers refuses "temperature" there: "Some generation parameters are set
in the model config"."""


class CnnConfig(PretrainedConfig):  # type: ignore[misc]
    """Settings of `logmel-cnn`; 20,094 parameters for ten genres."""

    model_type = "logmel-cnn"

    def __init__(
        self,
        sample_rate: int = 16_000,
        channels: Sequence[int] = (12, 24, 48),
        width: int = 64,
        **settings: Any,  # noqa: ANN401 - of transformers, which checks them
    ) -> None:
        self.sample_rate = sample_rate
        self.channels = list(channels)
        self.width = width
        super().__init__(**settings)


class CnnForAudioClassification(PreTrainedModel):  # type: ignore[misc]
    """`logmel-cnn` with its head, in the form of a transformers model."""

    config_class = CnnConfig
    base_model_prefix = "cnn"
    main_input_name = "input_values"

    def __init__(self, config: CnnConfig) -> None:
        super().__init__(config)
        low, middle, high = config.channels
        self.cnn = LogMelCnn(config.sample_rate, (low, middle, high), config.width)
        self.classifier = nn.Linear(config.width, config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Keep the layers' own initialisation, which transformers would replace."""

    def forward(self, input_values: Tensor) -> SequenceClassifierOutput:
        """Normalised float32 [B, T] -> logits [B, K]."""
        return SequenceClassifierOutput(logits=self.classifier(self.cnn(input_values)))


class WaveClassifier(nn.Module):
    """A transformers audio classifier that takes int16 segments.

    Args:
        net: an `AutoModelForAudioClassification`, or our `logmel-cnn`.
        do_normalize: whether its feature extractor normalises.
        frozen: modules that stay in eval mode, so that no dropout or mask changes them.
        learns_gain: add a layer for the gain of the learned mixins, which is not exported.
        boundary: of `trunk`, where it takes the cached output of its frozen part.

    Attributes:
        net, do_normalize, boundary: as given.
        boundary_dtype: of the model's own values at the boundary, in the run's precision.
    """

    def __init__(
        self,
        net: PreTrainedModel,
        *,
        do_normalize: bool,
        frozen: Sequence[nn.Module] = (),
        learns_gain: bool = False,
        boundary: str | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        self.boundary = boundary
        self.boundary_dtype = torch.float32
        self.do_normalize = do_normalize
        self._frozen = list(frozen)
        self.gain = nn.Linear(net.classifier.in_features, 1) if learns_gain else None
        self._below_head: Tensor | None = None
        if self.gain is not None:
            net.classifier.register_forward_pre_hook(self._keep_below_head)

    def _keep_below_head(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._below_head = inputs[0]  # [B, D]

    def forward(
        self, wave: Tensor, *, with_gain: bool = False, only_below: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """int16 [B, T] -> logits [B, K]; with the gain, g = softplus(w h + c), float32 [B].

        h is what the last layer gets, [B, D] (Clark et al., EMNLP 2019). The gain trains w and c
        only: no gradient flows from it into h, where Clark's code lets it. In place of waves it
        takes what lies at the boundary, of any floating type [B, F, D]: nothing below is computed.
        `only_below` gives just that, [B, F, D].
        """
        if wave.is_floating_point():
            assert self.boundary is not None
            logits = trunk.above(self.net, self.boundary, wave.to(self.boundary_dtype))  # [B, K]
        else:
            x = normalise(wave) if self.do_normalize else wave.float() / 32768.0  # [B, T]
            x = x.to(self.net.dtype)
            if only_below:
                assert self.boundary is not None
                return trunk.below(self.net, self.boundary, x)  # [B, F, D]
            logits = self.net(x).logits  # [B, K]
        if not with_gain:
            return logits
        below, self._below_head = self._below_head, None
        assert self.gain is not None
        assert below is not None
        # detached: else the gain's gradient trains the features for the product p b^g, and the
        # shifted test of benchmarks/shortcut.py falls from 0.840 to 0.555 (docs/log.md)
        return logits, F.softplus(self.gain(below.detach()).float())[:, 0]  # [B]

    def train(self, mode: bool = True) -> "WaveClassifier":
        """Switch the mode; frozen modules stay in eval mode."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    @property
    def genres(self) -> tuple[str, ...]:
        """Names in label order."""
        names: Mapping[int, str] = self.net.config.id2label
        return tuple(names[label] for label in range(len(names)))

    @property
    def segment_samples(self) -> int:
        """T: audio samples of the segments that it was trained on."""
        return int(self.net.config.segment_samples)

    @property
    def needs_our_code(self) -> bool:
        """Whether transformers alone cannot load it."""
        return isinstance(self.net, CnnForAudioClassification)

    @property
    def temperature(self) -> float | None:
        """T that calibrates the mean over segments of softmax(logits / T), if one was accepted."""
        value = self.net.config.to_dict().get(TEMPERATURE)
        return None if value is None else float(value)

    def calibrated(self, wave: Tensor) -> Tensor:
        """int16 [B, T] -> logits [B, K] divided by the temperature: what evaluation reports."""
        logits: Tensor = self(wave)
        return logits / self.temperature if self.temperature else logits

    def head_and_backbone(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Trainable parameters of the head (everything above the base model) and below."""
        inner = {id(p) for p in self.net.base_model.parameters()}
        trained = [p for p in self.parameters() if p.requires_grad]
        head = [p for p in trained if id(p) not in inner]
        return head, [p for p in trained if id(p) in inner]


def build_main(
    name: str,
    genres: Sequence[str],
    *,
    freeze: str,
    frozen_layers: int | None,
    activation_checkpointing: bool,
    seed: int,
    segment_samples: int,
    sample_rate: int,
    learns_gain: bool = False,
    cache: str = "none",
    spec_augment: bool = True,
) -> WaveClassifier:
    """The main model, with a new head.

    Args:
        name: hub name, folder, or with random weights a config .json, `wav2vec2-demo`,
            `logmel-cnn`.
        genres: in label order.
        freeze: `none`, `feature_encoder`, `layers:N` or `backbone`.
        frozen_layers: N of `layers:N`.
        activation_checkpointing: recompute activations in the backward pass.
        seed: of the new weights.
        segment_samples: T.
        sample_rate: of the segments in Hz.
        learns_gain: for the learned mixins.
        cache: `none`, `cnn` or `trunk`: which frozen output it takes in place of waves.
        spec_augment: False switches SpecAugment off.

    Raises:
        UserError: the model cannot be found, does not fit, or has BatchNorm; or the cache would
            not be exact.
    """
    hub.quiet()
    name = hub.located(name)
    labels: dict[str, Any] = {
        "num_labels": len(genres),
        "id2label": dict(enumerate(genres)),
        "label2id": {genre: label for label, genre in enumerate(genres)},
        "layerdrop": 0.0,  # ranks would drop different layers: ZeRO aborts or hangs
    }
    labels |= {} if spec_augment else {"apply_spec_augment": False}
    seed_everything(seed)
    if name == CnnConfig.model_type:
        net = CnnForAudioClassification(CnnConfig(sample_rate=sample_rate, **labels))
    elif name.endswith(".json"):
        net = _from_config_file(Path(name), labels)
    else:
        net = _from_checkpoint(name, labels)
    net.config.segment_samples = segment_samples  # ours: what `predict` cuts files into
    _refuse_unfit(name, net, segment_samples)
    frozen = _freeze(net, freeze, frozen_layers)
    if activation_checkpointing:
        # the reentrant kind drops gradients above a frozen prefix, silently
        net.activation_checkpointing_enable({"use_reentrant": False})
    is_own = isinstance(net, CnnForAudioClassification)
    normalises = is_own or hub.feature_extractor(name, sample_rate).do_normalize
    return WaveClassifier(
        net,
        do_normalize=normalises,
        frozen=frozen,
        learns_gain=learns_gain,
        boundary=_boundary(net, cache, freeze),
    )


def describe_main(
    name: str,
    genres: Sequence[str],
    *,
    freeze: str,
    frozen_layers: int | None,
    activation_checkpointing: bool,
    segment_samples: int,
    cache: str = "none",
    spec_augment: bool = True,
) -> WaveClassifier:
    """The main model of `build_main` without its weights: on torch's meta device, in a second.

    Args:
        name: as for `build_main`; only its configuration is read.
        genres: in label order.
        freeze: as for `build_main`.
        frozen_layers: N of `layers:N`.
        activation_checkpointing: recompute activations in the backward pass.
        segment_samples: T.
        cache: as for `build_main`.
        spec_augment: as for `build_main`.

    Raises:
        UserError: the model's configuration cannot be found, or does not fit; or the cache would
            not be exact.
    """
    hub.quiet()
    name = hub.located(name)
    labels: dict[str, Any] = {"num_labels": len(genres), "layerdrop": 0.0}
    labels |= {} if spec_augment else {"apply_spec_augment": False}
    with torch.device("meta"):
        if name == CnnConfig.model_type:
            net = CnnForAudioClassification(CnnConfig(**labels)).to("meta")
        elif name.endswith(".json"):
            net = _from_config_file(Path(name), labels)
        else:
            try:
                config = AutoConfig.from_pretrained(name, trust_remote_code=False, **labels)
            except (OSError, ValueError) as error:
                raise hub.not_found(name, error) from error
            net = AutoModelForAudioClassification.from_config(config)
    _refuse_unfit(name, net, segment_samples)
    frozen = _freeze(net, freeze, frozen_layers)
    if activation_checkpointing:
        net.activation_checkpointing_enable({"use_reentrant": False})
    at = _boundary(net, cache, freeze)
    return WaveClassifier(net, do_normalize=True, frozen=frozen, boundary=at)


def _boundary(net: PreTrainedModel, cache: str, freeze: str) -> str | None:
    """Make ready for cached features; the boundary that they lie at, None without a cache."""
    if cache == "none":
        return None
    at = trunk.boundary(cache, freeze)
    trunk.refuse_inexact(net, at, f"--cache {cache} with --freeze {freeze}")
    if at == "cnn":
        trunk.pass_by(net)
    return at


def part_of(name: str) -> str:
    """Part of the model that a parameter belongs to, by its name: as `--freeze` divides it."""
    for part in ("feature_extractor", "feature_projection", "masked_spec_embed"):
        if f".{part}" in name:
            return part
    layer = re.search(r"\.encoder\.layers\.(\d+)\.", name)
    if layer:
        return f"layer {layer[1]}"
    if ".encoder." in name:
        return "encoder, besides its layers"
    return "cnn" if ".cnn." in name else "head"


def frozen_fingerprint(model: WaveClassifier) -> str:
    """xxh3_128 of the weights that training does not change; "none" if it changes all.

    A checkpoint that is carried to another number of ranks does not restore them: they come from
    the model that the run is given, which therefore must be the same.
    """
    digest = xxhash.xxh3_128()
    frozen = [(n, p) for n, p in model.named_parameters() if not p.requires_grad]
    for name, parameter in frozen:
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest() if frozen else "none"


def _from_checkpoint(name: str, labels: dict[str, object]) -> PreTrainedModel:
    net, missing = hub.load(AutoModelForAudioClassification, name, **labels)
    lost = sorted(
        key
        for key in missing
        if key.startswith(f"{net.base_model_prefix}.") and not key.endswith("masked_spec_embed")
    )
    if lost:
        raise hub.incomplete(name, lost)
    log.info("new weights, the rest from %s: %s", name, ", ".join(sorted(missing)) or "none")
    return net


def _from_config_file(path: Path, labels: dict[str, object]) -> PreTrainedModel:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        config = AutoConfig.for_model(**(settings | labels))
        net: PreTrainedModel = AutoModelForAudioClassification.from_config(config)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"--model {path}",
            got=" ".join(str(error).split())[:200],
            expected="a transformers config of an audio classifier, with model_type",
            cure=f"see {hub.located('wav2vec2-demo')}",
        ) from error
    return net


def _refuse_unfit(name: str, net: PreTrainedModel, segment_samples: int) -> None:
    if isinstance(net, CnnForAudioClassification):
        _refuse_short(name, segment_samples, frames=segment_samples // 256 + 1, needed=8)
        return
    hub.refuse_no_encoder(f"--model {name}", net)
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in net.modules()):
        raise UserError(
            f"--model {name}",
            got="a BatchNorm layer",
            expected="layer norm or group norm",
            cure="padding and per-rank statistics would change the result; choose another model",
        )
    frames = int(net._get_feat_extract_output_lengths(torch.tensor(segment_samples)))
    needed = net.config.mask_time_length if _masks_time(net) else 1
    _refuse_short(name, segment_samples, frames=frames, needed=needed)


def _refuse_short(name: str, segment_samples: int, *, frames: int, needed: int) -> None:
    if frames < needed:
        raise UserError(
            f"segments of {segment_samples} samples for {name}",
            got=f"{frames} frames",
            expected=f"at least {needed} (its SpecAugment mask, or its pooling)",
            cure="pack longer segments: python -m mgc_dist.shard --segment-s 3",
        )


def _masks_time(net: PreTrainedModel) -> bool:
    return bool(net.config.apply_spec_augment and net.config.mask_time_prob > 0)


def _freeze(net: PreTrainedModel, freeze: str, frozen_layers: int | None) -> list[nn.Module]:
    """Take parts out of training and of the backward pass; returns them.

    `requires_grad = False` alone would still back-propagate through all frozen parts: the
    feature encoder marks its input as requiring gradients unless it is told (1.49 x the time
    at half the layers frozen).
    """
    if isinstance(net, CnnForAudioClassification):
        return _freeze_cnn(net, freeze)
    base, encoder = net.base_model, net.base_model.encoder
    if hasattr(base, "masked_spec_embed") and not _masks_time(net):
        base.masked_spec_embed.requires_grad_(False)  # unused: ZeRO-3 repeats its last gradient
    if freeze == "none":
        return []
    net.freeze_feature_encoder()
    if freeze == "feature_encoder":
        return [base.feature_extractor]
    if freeze == "backbone":
        base.requires_grad_(False)
        return [base]
    assert frozen_layers is not None
    if frozen_layers > len(encoder.layers):
        raise UserError(
            f"--freeze layers:{frozen_layers}",
            got=frozen_layers,
            expected=f"1 to {len(encoder.layers)} for this model",
            cure="--freeze backbone freezes everything below the head",
        )
    parts = [base.feature_extractor, base.feature_projection, encoder.pos_conv_embed]
    parts += [encoder.dropout, *encoder.layers[:frozen_layers]]
    if not trunk.norms_last(net):
        parts.append(encoder.layer_norm)  # stands before the layers in the post-norm flavour
    for part in parts:
        part.requires_grad_(False)
    if hasattr(base, "masked_spec_embed"):
        base.masked_spec_embed.requires_grad_(False)
    return parts


def _freeze_cnn(net: "CnnForAudioClassification", freeze: str) -> list[nn.Module]:
    """Freeze parts of `logmel-cnn`, whose feature encoder, the log-mel bands, has no weights."""
    if freeze in ("none", "feature_encoder"):
        return []
    if freeze != "backbone":
        raise UserError(
            f"--freeze {freeze}",
            got=freeze,
            expected="none, feature_encoder or backbone for logmel-cnn",
            cure="it has no encoder layers",
        )
    net.cnn.requires_grad_(False)
    return [net.cnn]
