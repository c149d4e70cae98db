"""Waveform classifiers and bias backbones; the only file that knows transformers.

The main model is any `AutoModelForAudioClassification` with a convolutional feature encoder
over raw audio (wav2vec2, HuBERT, WavLM, data2vec-audio). Segments have one length, so no
attention mask is ever given: the base flavour of wav2vec2 (group norm) must not get one, and
for the large flavour (layer norm) a mask of ones changes nothing. `logmel-cnn` is a small model of
our own behind the same interface; transformers cannot load it without our code.
"""

import copy
import errno
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchaudio
import transformers
import xxhash
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForAudioClassification,
    PretrainedConfig,
    PreTrainedModel,
    Wav2Vec2FeatureExtractor,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from mgc_dist.cnn import LogMelCnn
from mgc_dist.errors import UserError
from mgc_dist.ranks import seed_everything

log = logging.getLogger(__name__)

TEMPERATURE = "calibration_temperature"
"""In config.json; transformers refuses "temperature" there: "Some generation parameters are set
in the model config"."""


def normalise(wave: Tensor) -> Tensor:
    """Zero mean, unit variance per segment: int16 [B, T] -> float32 [B, T].

    Same formula as transformers' Wav2Vec2FeatureExtractor (population variance, 1e-7).
    """
    x = wave.float() / 32768.0
    mean = x.mean(dim=1, keepdim=True)
    variance = x.var(dim=1, keepdim=True, correction=0)
    return (x - mean) / torch.sqrt(variance + 1e-7)


class CnnConfig(PretrainedConfig):  # type: ignore[misc]
    """Settings of `logmel-cnn`; about 22,000 parameters for ten genres."""

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
    """

    def __init__(
        self,
        net: PreTrainedModel,
        *,
        do_normalize: bool,
        frozen: Sequence[nn.Module] = (),
        learns_gain: bool = False,
    ) -> None:
        super().__init__()
        self.net = net
        self.do_normalize = do_normalize
        self._frozen = list(frozen)
        self.gain = nn.Linear(net.classifier.in_features, 1) if learns_gain else None
        self._below_head: Tensor | None = None
        if self.gain is not None:
            net.classifier.register_forward_pre_hook(self._keep_below_head)

    def _keep_below_head(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._below_head = inputs[0]  # [B, D]

    def forward(self, wave: Tensor, *, with_gain: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """int16 [B, T] -> logits [B, K]; with the gain, g = softplus(w h + c), float32 [B].

        h is what the last layer gets, [B, D] (Clark et al., EMNLP 2019).
        """
        x = normalise(wave) if self.do_normalize else wave.float() / 32768.0  # [B, T]
        logits: Tensor = self.net(x).logits  # [B, K]
        if not with_gain:
            return logits
        below, self._below_head = self._below_head, None
        assert self.gain is not None
        assert below is not None
        return logits, F.softplus(self.gain(below).float())[:, 0]  # [B]

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
        """T that calibrates the mean over segments of softmax(logits / T), if it was fitted."""
        value = self.net.config.to_dict().get(TEMPERATURE)
        return None if value is None else float(value)

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
) -> WaveClassifier:
    """The main model, with a new head.

    Args:
        name: hub name, folder, config .json (random weights), or `logmel-cnn` (random weights).
        genres: in label order.
        freeze: `none`, `feature_encoder`, `layers:N` or `backbone`.
        frozen_layers: N of `layers:N`.
        activation_checkpointing: recompute activations in the backward pass.
        seed: of the new weights.
        segment_samples: T.
        sample_rate: of the segments in Hz.
        learns_gain: for the learned mixins.

    Raises:
        UserError: the model cannot be found, does not fit, or has BatchNorm.
    """
    _quiet()
    labels: dict[str, Any] = {
        "num_labels": len(genres),
        "id2label": dict(enumerate(genres)),
        "label2id": {genre: label for label, genre in enumerate(genres)},
        "layerdrop": 0.0,  # ranks would drop different layers: ZeRO aborts or hangs
    }
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
    extractor = _feature_extractor(name, sample_rate)
    return WaveClassifier(
        net, do_normalize=extractor.do_normalize, frozen=frozen, learns_gain=learns_gain
    )


def describe_main(
    name: str,
    genres: Sequence[str],
    *,
    freeze: str,
    frozen_layers: int | None,
    activation_checkpointing: bool,
    segment_samples: int,
) -> WaveClassifier:
    """The main model of `build_main` without its weights: on torch's meta device, in a second.

    Args:
        name: as for `build_main`; only its configuration is read.
        genres: in label order.
        freeze: as for `build_main`.
        frozen_layers: N of `layers:N`.
        activation_checkpointing: recompute activations in the backward pass.
        segment_samples: T.

    Raises:
        UserError: the model's configuration cannot be found, or does not fit.
    """
    _quiet()
    labels: dict[str, Any] = {"num_labels": len(genres), "layerdrop": 0.0}
    with torch.device("meta"):
        if name == CnnConfig.model_type:
            net = CnnForAudioClassification(CnnConfig(**labels)).to("meta")
        elif name.endswith(".json"):
            net = _from_config_file(Path(name), labels)
        else:
            try:
                config = AutoConfig.from_pretrained(name, **labels)
            except (OSError, ValueError) as error:
                raise _not_found(name, error) from error
            net = AutoModelForAudioClassification.from_config(config)
    _refuse_unfit(name, net, segment_samples)
    frozen = _freeze(net, freeze, frozen_layers)
    if activation_checkpointing:
        net.activation_checkpointing_enable({"use_reentrant": False})
    return WaveClassifier(net, do_normalize=True, frozen=frozen)


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


def find_exported(run_or_export: Path) -> Path:
    """`RUN/best` for a run folder, else the folder itself."""
    is_run = (run_or_export / "config.yaml").is_file() or (run_or_export / "best").is_dir()
    return run_or_export / "best" if is_run else run_or_export


def load_exported(folder: Path) -> WaveClassifier:
    """A classifier from a folder that `save_exported` or `save_pretrained` wrote, in eval mode.

    Raises:
        UserError: no such folder, or weights are missing in it.
    """
    _quiet()
    if not (folder / "config.json").is_file():
        raise UserError(
            f"model folder {folder}",
            got="no config.json" if folder.is_dir() else "no such folder",
            expected="a run folder with best/, or an exported model",
            cure="train first: deepspeed launch/train.py",
        )
    net, missing = _load(_class_of(folder), str(folder))
    if missing or not hasattr(net.config, "segment_samples"):
        raise UserError(
            f"model folder {folder}",
            got=f"no {sorted(missing)[0] if missing else 'segment_samples in config.json'}",
            expected="an audio classifier that mgc_dist has exported",
            cure="export the run again: python -m mgc_dist.export RUN OUT",
        )
    return WaveClassifier(net, do_normalize=_saved_extractor(folder).do_normalize).eval()


def _class_of(folder: Path) -> type:
    """What loads a folder: transformers, but for our own small model."""
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if settings.get("model_type") == CnnConfig.model_type:
        return CnnForAudioClassification
    auto: type = AutoModelForAudioClassification
    return auto


def sample_rate_of(folder: Path) -> int:
    """Sample rate in Hz that an exported model wants."""
    return int(_saved_extractor(folder).sampling_rate)


def _saved_extractor(folder: Path) -> Wav2Vec2FeatureExtractor:
    try:
        return AutoFeatureExtractor.from_pretrained(str(folder))
    except (OSError, ValueError) as error:
        raise _not_found(str(folder), error) from error


def save_exported(
    model: WaveClassifier,
    weights: Mapping[str, Tensor],
    folder: Path,
    sample_rate: int,
    temperature: float | None = None,
) -> None:
    """Write a folder that `transformers.pipeline("audio-classification")` loads.

    The live engine's module is never saved: under ZeRO its weights are in parts, and its
    config may carry bf16. A fresh float32 model takes the gathered weights, strictly.

    Args:
        model: whose configuration and feature settings are used.
        weights: full float32 state dict of the wrapped model (`net.` names), on the CPU; the
            gain of the learned mixins is left out.
        folder: replaced if it exists, under a temporary name until whole.
        sample_rate: in Hz.
        temperature: fitted on validation tracks, for `WaveClassifier.temperature`.
    """
    config = copy.deepcopy(model.net.config)  # from_config would share it with the live model
    setattr(config, TEMPERATURE, temperature)
    if isinstance(config, CnnConfig):
        fresh = CnnForAudioClassification(config)
    else:
        fresh = AutoModelForAudioClassification.from_config(config)
    of_net = {k.removeprefix("net."): v for k, v in weights.items() if k.startswith("net.")}
    fresh.float().load_state_dict(of_net, strict=True)
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        fresh.save_pretrained(temporary)
    except (SafetensorError, RuntimeError) as error:  # a full disk is no OSError there
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(errno.EIO, str(error), str(temporary)) from error
    Wav2Vec2FeatureExtractor(
        feature_size=1,
        sampling_rate=sample_rate,
        do_normalize=model.do_normalize,
        return_attention_mask=getattr(model.net.config, "feat_extract_norm", "") == "layer",
    ).save_pretrained(temporary)
    if folder.exists():
        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        temporary.rename(folder)
        shutil.rmtree(old)
    else:
        temporary.rename(folder)


class LogMel(nn.Module):
    """Time-mean of 40 log-mel bands: a weak model without weights that knows only the timbre.

    Attributes:
        layers, width: 1 and 40; it has one layer of states.
        settings: what its output depends on.
    """

    def __init__(self, sample_rate: int) -> None:
        super().__init__()
        mel = {"n_fft": 512, "hop_length": 256, "n_mels": 40}
        self.layers, self.width = 1, mel["n_mels"]
        self.settings: dict[str, object] = {"logmel": mel, "sample_rate": sample_rate}
        self.mel = torchaudio.transforms.MelSpectrogram(sample_rate, **mel)

    def forward(self, wave: Tensor) -> Tensor:
        """int16 [B, T] -> float32 [B, 1, 40]."""
        mel = self.mel(normalise(wave))  # [B, 40, F]
        return torch.log(mel + 1e-3).mean(dim=2).unsqueeze(1)  # [B, 1, 40]


class HiddenMean(nn.Module):
    """Time-mean of every hidden layer of a frozen transformers model.

    Args:
        net: an `AutoModel` over raw audio.
        do_normalize: whether its feature extractor normalises.

    Attributes:
        layers, width: L and D; layer 0 is the input of the encoder, L - 1 its last layer.
        settings: what its output depends on besides its weights.
    """

    def __init__(self, net: PreTrainedModel, *, do_normalize: bool) -> None:
        super().__init__()
        self.net = net
        self.layers, self.width = net.config.num_hidden_layers + 1, net.config.hidden_size
        self.do_normalize = do_normalize
        config = net.config.to_dict()
        for volatile in ("_name_or_path", "transformers_version"):
            config.pop(volatile, None)
        self.settings: dict[str, object] = {"config": config, "do_normalize": do_normalize}

    def forward(self, wave: Tensor) -> Tensor:
        """int16 [B, T] -> float32 [B, L, D]."""
        x = normalise(wave) if self.do_normalize else wave.float() / 32768.0  # [B, T]
        hidden: Sequence[Tensor] = self.net(x, output_hidden_states=True).hidden_states
        return torch.stack([h.float().mean(dim=1) for h in hidden], dim=1)  # [B, L, D]


def build_bias(name: str, *, sample_rate: int) -> LogMel | HiddenMean:
    """A frozen backbone in eval mode that maps int16 [B, T] to float32 [B, L, D].

    Args:
        name: `logmel`, hub name or folder.
        sample_rate: of the segments in Hz.

    Raises:
        UserError: the model cannot be found, or has no encoder over raw audio.
    """
    _quiet()
    if name == "logmel":
        return LogMel(sample_rate).eval().requires_grad_(False)
    seed_everything(0)  # what a checkpoint lacks (masked_spec_embed) must not vary
    net, missing = _load(AutoModel, name)
    _refuse_no_encoder(f"--backbone {name}", net)
    lost = sorted(key for key in missing if not key.endswith("masked_spec_embed"))
    if lost:
        raise _incomplete(name, lost)
    extractor = _feature_extractor(name, sample_rate)
    module = HiddenMean(net, do_normalize=extractor.do_normalize)
    return module.eval().requires_grad_(False)


def fingerprint(module: LogMel | HiddenMean, *settings: str) -> str:
    """sha256 of a frozen model: names, shapes, dtypes and bytes of its weights, its settings.

    Args:
        module: from `build_bias`.
        settings: anything else that its output depends on.
    """
    digest = hashlib.sha256()
    digest.update(json.dumps([module.settings, *settings], sort_keys=True, default=str).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


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


def _quiet() -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _load(kind: type, name: str, **settings: object) -> tuple[PreTrainedModel, set[str]]:
    try:
        net, info = kind.from_pretrained(  # type: ignore[attr-defined]
            name,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **settings,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise _not_found(name, error) from error
    missing = set(info["missing_keys"]) | {item[0] for item in info["mismatched_keys"]}
    return net, missing


def _from_checkpoint(name: str, labels: dict[str, object]) -> PreTrainedModel:
    net, missing = _load(AutoModelForAudioClassification, name, **labels)
    lost = sorted(
        key
        for key in missing
        if key.startswith(f"{net.base_model_prefix}.") and not key.endswith("masked_spec_embed")
    )
    if lost:
        raise _incomplete(name, lost)
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
            cure="see launch/presets/wav2vec2-demo.json",
        ) from error
    return net


def _refuse_unfit(name: str, net: PreTrainedModel, segment_samples: int) -> None:
    if isinstance(net, CnnForAudioClassification):
        _refuse_short(name, segment_samples, frames=segment_samples // 256 + 1, needed=8)
        return
    _refuse_no_encoder(f"--model {name}", net)
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


def _refuse_no_encoder(flag: str, net: PreTrainedModel) -> None:
    if not hasattr(net.base_model, "feature_extractor"):
        raise UserError(
            flag,
            got=f"{net.config.model_type}, which has no feature encoder over raw audio",
            expected="wav2vec2, hubert, wavlm, data2vec-audio or the like",
            cure="choose such a model",
        )


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
    if not getattr(net.config, "do_stable_layer_norm", False):
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


def _feature_extractor(name: str, sample_rate: int) -> Wav2Vec2FeatureExtractor:
    extractor = Wav2Vec2FeatureExtractor(sampling_rate=sample_rate, do_normalize=True)
    if name == CnnConfig.model_type:
        return extractor
    has_own = Path(name, "preprocessor_config.json").is_file()
    if has_own or not (Path(name).exists() or name.endswith(".json")):
        try:
            extractor = AutoFeatureExtractor.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise _not_found(name, error) from error
    if extractor.sampling_rate != sample_rate:
        raise UserError(
            f"sample rate of the shards for {name}",
            got=f"{sample_rate} Hz",
            expected=f"{extractor.sampling_rate} Hz",
            cure=f"pack again: python -m mgc_dist.shard --sample-rate {extractor.sampling_rate}",
        )
    return extractor


def _not_found(name: str, error: Exception) -> UserError:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return UserError(
        f"model {name}",
        got=lines[0][:200] if lines else type(error).__name__,
        expected="a folder with config.json and weights, or a hub name and a network",
        cure=f"on a machine with a network: hf download {name} --local-dir models/"
        f"{Path(name).name}; bring that folder and give its path instead",
    )


def _incomplete(name: str, lost: Sequence[str]) -> UserError:
    return UserError(
        f"model {name}",
        got=f"a checkpoint without {len(lost)} weights such as {lost[0]}",
        expected="all weights of the backbone",
        cure="give a checkpoint of the same architecture as its config.json",
    )
