"""Main models: waveform classifiers, by name or by configuration, with parts of them frozen.

The main model is any `AutoModelForAudioClassification` of a kind that `kind` knows. `logmel-cnn` is
a small model of our own, registered with transformers.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForAudioClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from mgc_dist.cluster.ranks import seed_everything
from mgc_dist.config.head import HeadConfig
from mgc_dist.config.lora import Lora
from mgc_dist.encoders import custom, foreign, hub, packages, pooling
from mgc_dist.encoders.bands import MEAN, SCALE
from mgc_dist.encoders.cnn import CnnConfig
from mgc_dist.encoders.kind import Kind, kind_of, open_boundary
from mgc_dist.encoders.wrapped import CustomAudioClassifier
from mgc_dist.errors import UserError
from mgc_dist.models.classifier import CROP_OF, TEMPERATURE, Base, WaveClassifier
from mgc_dist.models.lora import adapt
from mgc_dist.sound.augment import Augment

log = logging.getLogger(__name__)

_AS_EVER = HeadConfig()


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
    crop_of: int | None = None,
    learns_gain: bool = False,
    cache: str = "none",
    spec_augment: bool = True,
    revision: str | None = None,
    trust_remote_code: bool = False,
    base: Base | None = None,
    lora: Lora | None = None,
    head: HeadConfig = _AS_EVER,
    augment: Augment | None = None,
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
        segment_samples: T; of a crop, where it hears crops.
        sample_rate: of the segments in Hz.
        crop_of: T of the segments that crops are of.
        learns_gain: for the learned mixins.
        cache: `none`, `cnn` or `trunk`: which frozen output it takes in place of waves.
        spec_augment: False switches SpecAugment off.
        revision: branch, tag or commit of a hub model.
        trust_remote_code: run code that lies beside the weights.
        base: build it from this, with random weights, and look for nothing by name.
        lora: adapters, which are trained in place of the model's own weights below the head.
        head: what it reads, and how it pools.
        augment: changes waves in training.

    Raises:
        UserError: the model cannot be found, does not fit, or has BatchNorm or no layer to adapt;
            or the cache would not be exact.
    """
    hub.quiet()
    name = hub.located(name)
    labels = _labels(genres, spec_augment)
    seed_everything(seed)
    config = _kept_config(base, labels) if base else _new_config(name, sample_rate, labels)
    if config:
        net = _from_config(name, _with_head(name, config, head))
    else:
        net = _from_checkpoint(name, labels, revision, trust_remote_code, head)
    net.config.segment_samples = segment_samples  # ours: what `predict` cuts files into
    vars(net.config).pop(CROP_OF, None)
    if crop_of is not None:
        setattr(net.config, CROP_OF, crop_of)
    kind = kind_of(net)
    frozen = _make_ready(
        kind, name, segment_samples, freeze, frozen_layers, activation_checkpointing, lora
    )
    normalises = kind.normalises
    if normalises is None and base:
        normalises = base.do_normalize
    elif normalises is None:
        own = packages.extractor_of(net.config)
        normalises = kind.take(hub.feature_extractor(name, sample_rate, revision, own))
    return WaveClassifier(
        net,
        do_normalize=normalises,
        frozen=frozen,
        learns_gain=learns_gain,
        boundary=open_boundary(kind, cache, freeze),
        augment=augment,
    )


def describe_main(
    name: str,
    genres: Sequence[str],
    *,
    freeze: str,
    frozen_layers: int | None,
    activation_checkpointing: bool,
    segment_samples: int,
    sample_rate: int | None = None,
    cache: str = "none",
    spec_augment: bool = True,
    revision: str | None = None,
    trust_remote_code: bool = False,
    lora: Lora | None = None,
    head: HeadConfig = _AS_EVER,
) -> WaveClassifier:
    """The main model of `build_main` without its weights: on torch's meta device, in a second.

    Args:
        name: as for `build_main`; only its configuration is read.
        genres: in label order.
        freeze: as for `build_main`.
        frozen_layers: N of `layers:N`.
        activation_checkpointing: recompute activations in the backward pass.
        segment_samples: T.
        sample_rate: of the segments in Hz; None does not ask whether the model wants it.
        cache: as for `build_main`.
        spec_augment: as for `build_main`.
        revision: as for `build_main`.
        trust_remote_code: as for `build_main`.
        lora: as for `build_main`.
        head: as for `build_main`.

    Raises:
        UserError: the model's configuration cannot be found, or does not fit; or the cache would
            not be exact.
    """
    name = hub.located(name)
    config = configuration(
        name,
        genres,
        spec_augment=spec_augment,
        revision=revision,
        trust_remote_code=trust_remote_code,
        head=head,
    )
    with torch.device("meta"):
        net = _from_config(name, config).to("meta")
    kind = kind_of(net)
    frozen = _make_ready(
        kind, name, segment_samples, freeze, frozen_layers, activation_checkpointing, lora
    )
    if kind.normalises is None and sample_rate is not None:
        kind.take(hub.feature_extractor(name, sample_rate, revision))
    at = open_boundary(kind, cache, freeze)
    return WaveClassifier(net, do_normalize=True, frozen=frozen, boundary=at)


def configuration(
    name: str,
    genres: Sequence[str],
    *,
    spec_augment: bool = True,
    revision: str | None = None,
    trust_remote_code: bool = False,
    base: Base | None = None,
    head: HeadConfig = _AS_EVER,
) -> PretrainedConfig:
    """The configuration of the main model, without its weights; as for `build_main`.

    Raises:
        UserError: it cannot be found, or does not fit.
    """
    hub.quiet()
    name, labels = hub.located(name), _labels(genres, spec_augment)
    config = _kept_config(base, labels) if base else _new_config(name, 16_000, labels)
    config = config or _saved_config(name, labels, revision, trust_remote_code)
    return _with_head(name, config, head)


def configuration_hash(config: PretrainedConfig) -> str:
    """Hash of what a configuration says of the model, not of where it lies or who wrote it."""
    said = config.to_dict()
    content = {name: value for name, value in said.items() if name not in _OF_THE_FILE}
    code = custom.code_of(config)
    if code:
        content["code"] = code
    text = json.dumps(content, sort_keys=True, default=str)
    return f"{config.model_type} {xxhash.xxh3_128_hexdigest(text.encode())}"


_OF_THE_FILE = (
    *("_name_or_path", "_commit_hash", "transformers_version", "architectures", "dtype"),
    *("segment_samples", CROP_OF, TEMPERATURE, "sample_rate"),
    *(MEAN, SCALE, "max_source_positions", "encoder_layerdrop"),  # what `Kind` finds and fits
)


def draws_dropout(config: PretrainedConfig) -> bool:
    """Whether a model draws random numbers for whole batches in training."""
    return any(
        isinstance(value, float) and value > 0
        for name, value in config.to_dict().items()
        if name.removesuffix("_prob").endswith("dropout")
    )


def _labels(genres: Sequence[str], spec_augment: bool) -> dict[str, Any]:
    """Settings of the model's configuration that a run decides on."""
    settings: dict[str, Any] = {
        "num_labels": len(genres),
        "id2label": dict(enumerate(genres)),
        "label2id": {genre: label for label, genre in enumerate(genres)},
        "layerdrop": 0.0,  # ranks would drop different layers: ZeRO aborts or hangs
    }
    return settings if spec_augment else settings | {"apply_spec_augment": False}


def is_at_hand(name: str) -> bool:
    """Whether a model can be had without a hub: it is a file or folder, or one of our own."""
    place = packages.place_of(hub.located(name))
    return name == CnnConfig.model_type or Path(place).exists()


def is_found(name: str, revision: str | None) -> bool:
    """Whether a model's configuration can be had, be it from a hub."""
    try:
        configuration(name, ["any"], revision=revision)
    except UserError:
        return False
    return True


def _saved_config(
    name: str, labels: dict[str, Any], revision: str | None, trusted: bool
) -> PretrainedConfig:
    """The configuration of a checkpoint, with what a run decides on.

    transformers hands what a configuration does not name on to the model: "__init__() got an
    unexpected keyword argument 'layerdrop'" (AST).
    """
    config = custom.read_config(name, revision, trusted=trusted, **labels)
    for setting in ("layerdrop", "apply_spec_augment"):
        if setting in labels:
            setattr(config, setting, labels[setting])
    return config


def _kept_config(base: Base, labels: dict[str, Any]) -> PretrainedConfig:
    config: PretrainedConfig = AutoConfig.for_model(**(base.settings | labels))
    return config


def _new_config(name: str, sample_rate: int, labels: dict[str, Any]) -> PretrainedConfig | None:
    """The configuration of a model with random weights; None for one that has a checkpoint."""
    if name == CnnConfig.model_type:
        return CnnConfig(sample_rate=sample_rate, **labels)
    if not name.endswith(".json"):
        return None
    try:
        settings = json.loads(Path(name).read_text(encoding="utf-8"))
        config: PretrainedConfig = AutoConfig.for_model(**(settings | labels))
    except _BAD_CONFIG as error:
        raise _refused_config(name, error) from error
    return config


def _with_head(name: str, config: PretrainedConfig, head: HeadConfig) -> PretrainedConfig:
    """The configuration with a head of `--pooling`, `--layer-mix` and `--from-layer`."""
    asked = {"--pooling attention": head.pooling == "attention", "--layer-mix": head.layer_mix}
    asked |= {f"--from-layer {head.from_layer}": head.from_layer is not None}
    flags = " and ".join(flag for flag, is_asked in asked.items() if is_asked)
    layers = getattr(config, "num_hidden_layers", 0)
    if flags and not layers:
        got, cure = f"{config.model_type}, which has no encoder layers", f"leave {flags} out"
        raise UserError(f"{flags} with --model {name}", got=got, expected="layers", cure=cure)
    if head.from_layer is not None:
        if head.from_layer > layers:
            raise UserError(
                f"--from-layer {head.from_layer}",
                got=head.from_layer,
                expected=f"1 to {layers} for this model",
                cure="leave it out for the last layer",
            )
        config.num_hidden_layers = head.from_layer
    if head.pooling == "attention":
        setattr(config, pooling.ATTENTION, True)
    if head.layer_mix:
        config.use_weighted_layer_sum = True
    return config


def _from_config(name: str, config: PretrainedConfig) -> PreTrainedModel:
    own: Any = custom.loader(config)
    net: PreTrainedModel
    try:
        if issubclass(own, CustomAudioClassifier):
            net = custom.built(config, name)
        elif own is AutoModelForAudioClassification:
            net = own.from_config(config)
        else:
            net = own(config)
    except _BAD_CONFIG as error:
        raise _refused_config(name, error) from error
    return net


_BAD_CONFIG = (OSError, ValueError, TypeError, KeyError)


def _refused_config(name: str, error: Exception) -> UserError:
    return UserError(
        f"--model {name}",
        got=" ".join(str(error).split())[:200],
        expected="a transformers config of an audio classifier, with model_type",
        cure=f"see {hub.located('wav2vec2-demo')}",
    )


def _make_ready(
    kind: Kind,
    name: str,
    segment_samples: int,
    freeze: str,
    frozen_layers: int | None,
    activation_checkpointing: bool,
    lora: Lora | None,
) -> list[nn.Module]:
    """Refuse a model that does not fit, freeze and adapt parts of it; return what has eval mode."""
    if isinstance(kind.net, CustomAudioClassifier):
        foreign.look(kind.net, kind.base, name, segment_samples)
    kind.refuse_unfit(name, segment_samples)
    kind.fit(segment_samples)
    frozen = kind.freeze(freeze, frozen_layers)
    if lora:
        frozen += _batch_norms(kind.net)  # frozen too
        adapt(kind, lora, frozen)
    _refuse_trained_batch_norm(name, kind.net, frozen)
    if activation_checkpointing:
        _recompute_activations(name, kind.net)
    return frozen


def _recompute_activations(name: str, net: PreTrainedModel) -> None:
    """Activation checkpointing; the reentrant kind drops gradients above a frozen prefix."""
    try:
        net.activation_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:  # "... is not compatible with gradient checkpointing."
        raise UserError(
            f"--activation-checkpointing with --model {name}",
            got="code that has none",
            expected="a model whose layers can recompute their activations",
            cure="leave it out; a smaller --micro-batch takes less memory too",
        ) from error


def _refuse_trained_batch_norm(name: str, net: PreTrainedModel, frozen: list[nn.Module]) -> None:
    kept = {id(each) for part in frozen for each in part.modules()}
    if any(id(norm) not in kept for norm in _batch_norms(net)):
        raise UserError(
            f"--model {name}",
            got="BatchNorm layers in training, whose statistics depend on padding and ranks",
            expected="layer norm or group norm, or BatchNorm layers that are all frozen",
            cure="use --freeze backbone, or another model",
        )


def _batch_norms(net: PreTrainedModel) -> list[nn.Module]:
    return [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def frozen_fingerprint(model: WaveClassifier) -> str:
    """xxh3_128 of the weights and statistics that training does not change; "none" without any.

    A checkpoint that is carried to another number of ranks does not restore them: they come from
    the model that the run is given, which therefore must be the same.
    """
    digest = xxhash.xxh3_128()
    frozen = [(n, p) for n, p in model.named_parameters() if not p.requires_grad]
    if not frozen:
        return "none"
    saved = model.state_dict()
    statistics = [(n, b) for n, b in model.named_buffers() if n in saved]  # of BatchNorm
    for name, value in (*frozen, *statistics):
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _from_checkpoint(
    name: str, labels: dict[str, Any], revision: str | None, trusted: bool, head: HeadConfig
) -> PreTrainedModel:
    config = _with_head(name, _saved_config(name, labels, revision, trusted), head)
    place = packages.place_of(name)
    net, missing = hub.load(custom.loader(config), place, revision, config=config)
    kind = kind_of(net)
    inner = next(f"{part}." for part, module in net.named_modules() if module is kind.base)
    lost = sorted(
        key for key in missing if key.startswith(inner) and not key.endswith("masked_spec_embed")
    )
    if lost:
        raise hub.incomplete(name, lost)
    if not missing & {f"{kind.head}.weight", f"{kind.head}.bias"}:
        own = _saved_config(name, {}, revision, trusted).id2label
        missing |= _judge_head(name, kind, own)
    log.info("new weights, the rest from %s: %s", name, ", ".join(sorted(missing)) or "none")
    return net


def _judge_head(name: str, kind: Kind, own: Mapping[int, str]) -> set[str]:
    """Keep the head of a checkpoint only if its labels are our genres, in order.

    Returns:
        The names of its weights, where they are drawn anew.
    """
    labels = (own, kind.net.config.id2label)
    theirs, ours = ([each[label] for label in sorted(each)] for each in labels)
    if theirs == ours:
        log.info("the head of %s is kept: its labels are the genres of the shards", name)
        return set()
    log.info(
        "the head of %s is renewed: its labels are %s, and the genres of the shards %s",
        *(name, ", ".join(map(str, theirs)), ", ".join(ours)),
    )
    head = kind.net.get_submodule(kind.head)
    for parameter in head.parameters():
        parameter._is_hf_initialized = False  # else transformers leaves it as it is
    kind.net._init_weights(head)
    return {f"{kind.head}.{part}" for part, _ in head.named_parameters()}
