"""Pretrained models by name: a hub name or a folder, with what their feature extractors do.

With its neighbours the only modules that know transformers.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from pickle import UnpicklingError

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoFeatureExtractor,
    PretrainedConfig,
    PreTrainedModel,
    Wav2Vec2FeatureExtractor,
)

from mgc_dist.config.identity import OLD_MODEL
from mgc_dist.encoders import load_errors
from mgc_dist.encoders.wrapped import CustomAudioClassifier, remake_unsaved
from mgc_dist.errors import UserError

_ADAPTERS = "adapter_config.json"
_UNREADABLE = (OSError, ValueError, LookupError, EOFError, SafetensorError, UnpicklingError)
"""What transformers and torch raise for files that are missing, cut or no weights."""


def located(name: str) -> str:
    """Where a model is: `wav2vec2-demo` is a file of the package, which 0.1.0 had elsewhere."""
    if name in ("wav2vec2-demo", OLD_MODEL) and not Path(name).exists():
        return str(files("mgc_dist") / "presets" / "wav2vec2-demo.json")
    return name


def normalise(wave: Tensor) -> Tensor:
    """Zero mean, unit variance per segment: int16 [B, T] -> float32 [B, T]."""
    return standardised(wave.float() / 32768.0)


def standardised(x: Tensor) -> Tensor:
    """Zero mean, unit variance per segment: float32 [B, T] -> float32 [B, T].

    Same formula as transformers' Wav2Vec2FeatureExtractor (population variance, 1e-7).
    """
    mean = x.mean(dim=1, keepdim=True)
    variance = x.var(dim=1, keepdim=True, correction=0)
    return (x - mean) / torch.sqrt(variance + 1e-7)


def quiet() -> None:
    """No reports and bars of transformers."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@contextmanager
def heard_again() -> Iterator[None]:
    """A block after which transformers reports, and shows bars, as before."""
    told = transformers.utils.logging
    verbosity, shows_bars = told.get_verbosity(), told.is_progress_bar_enabled()
    try:
        yield
    finally:
        told.set_verbosity(verbosity)
        if shows_bars:
            told.enable_progress_bar()


def load(
    kind: type, name: str, revision: str | None = None, **settings: object
) -> tuple[PreTrainedModel, set[str]]:
    """A model in float32, and the names of weights that its checkpoint lacks.

    Args:
        kind: a class with `from_pretrained`.
        name: hub name or folder.
        revision: branch, tag or commit of a hub model.
        settings: of the model's configuration.

    Raises:
        UserError: it cannot be found or read, or has adapters beside it.
    """
    if Path(name, _ADAPTERS).is_file():
        raise _has_adapters(name)
    try:
        net, info = kind.from_pretrained(  # type: ignore[attr-defined]
            name,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            trust_remote_code=False,
            revision=revision or "main",
            **settings,
        )
    except (*_UNREADABLE, RuntimeError, AttributeError, TypeError) as error:
        if kind is CustomAudioClassifier and not isinstance(error, _UNREADABLE):
            raise load_errors.failed(name, "when it is built", error) from error
        is_unreadable = isinstance(error, _UNREADABLE) or "PytorchStreamReader" in str(error)
        if not is_unreadable:
            raise  # memory may be short
        raise load_errors.explained(name, error) from error
    if getattr(net, "_hf_peft_config_loaded", False):
        raise _has_adapters(name)
    if kind is not CustomAudioClassifier:  # which does so itself
        remake_unsaved(net)
    missing = set(info["missing_keys"]) | {item[0] for item in info["mismatched_keys"]}
    return net, missing


def _has_adapters(name: str) -> UserError:
    """What to say of a model into which transformers would put adapters, unasked."""
    return UserError(
        f"model {name}",
        got=f"a model with adapters beside it ({_ADAPTERS})",
        expected="a whole model; --lora makes adapters of its own",
        cure=f"merge them (peft's merge_and_unload), or take {_ADAPTERS} out of a copy",
    )


def feature_extractor(
    name: str,
    sample_rate: int,
    revision: str | None = None,
    own: Wav2Vec2FeatureExtractor | None = None,
) -> Wav2Vec2FeatureExtractor:
    """The feature extractor of a model; one that normalises where it has none of its own.

    Args:
        name: hub name, folder or config .json.
        sample_rate: of the shards in Hz.
        revision: branch, tag or commit of a hub model.
        own: that of the model, where it is known.

    Raises:
        UserError: it cannot be found, or wants another sample rate.
    """
    extractor = own or Wav2Vec2FeatureExtractor(sampling_rate=sample_rate, do_normalize=True)
    has_own = Path(name, "preprocessor_config.json").is_file()
    if own is None and (has_own or not (Path(name).exists() or name.endswith(".json"))):
        try:
            extractor = AutoFeatureExtractor.from_pretrained(
                name, trust_remote_code=False, revision=revision or "main"
            )
        except (OSError, ValueError) as error:
            raise load_errors.explained(name, error) from error
    if extractor.sampling_rate != sample_rate:
        raise other_rate(name, sample_rate, extractor.sampling_rate)
    return extractor


def other_rate(name: str, got: int, wanted: int) -> UserError:
    """What to say when a model wants waves of another sample rate; in Hz."""
    return UserError(
        f"sample rate of the shards for {name}",
        got=f"{got} Hz",
        expected=f"{wanted} Hz",
        cure="pack with it beside what is there, and then give that folder as --shards: "
        f"python -m mgc_dist.shard --sample-rate {wanted} --out shards/at-{wanted}",
    )


def wave_extractor(
    sample_rate: int, do_normalize: bool, config: PretrainedConfig
) -> Wav2Vec2FeatureExtractor:
    """The feature extractor of a model over waves; the large flavour's gives an attention mask."""
    return Wav2Vec2FeatureExtractor(
        feature_size=1,
        sampling_rate=sample_rate,
        do_normalize=do_normalize,
        return_attention_mask=getattr(config, "feat_extract_norm", "") == "layer",
    )


def refuse_no_encoder(flag: str, net: PreTrainedModel) -> None:
    """Refuse a model that does not take raw audio.

    Raises:
        UserError: naming the flag.
    """
    if not hasattr(net.base_model, "feature_extractor"):
        raise UserError(
            flag,
            got=f"{net.config.model_type}, which has no feature encoder over raw audio",
            expected="wav2vec2, hubert, wavlm, data2vec-audio or the like",
            cure="choose such a model",
        )


def refuse_short(name: str, segment_samples: int, *, frames: int, needed: int) -> None:
    """Refuse segments of which a model gets too few frames.

    Raises:
        UserError: with both numbers.
    """
    if frames < needed:
        raise UserError(
            f"segments of {segment_samples} samples for {name}",
            got=f"{frames} frames",
            expected=f"at least {needed} (its SpecAugment mask, or its pooling)",
            cure="pack longer segments: python -m mgc_dist.shard --segment-s 3",
        )


def too_long(name: str, segment_samples: int, longest: int, rate: int) -> UserError:
    """What to say of segments that a model has no positions for; in samples, at a rate in Hz."""
    return UserError(
        f"segments of {segment_samples} samples for {name}",
        got=f"{segment_samples / rate:g} s",
        expected=f"at most {longest / rate:g} s, for which it has positions",
        cure="pack shorter segments: python -m mgc_dist.shard "
        f"--segment-s {min(longest // rate, 3) or longest / rate:g}; or train on parts of them: "
        f"--crop-s {longest // rate or longest / rate:g}",
    )


def too_many_layers(asked: int, layers: int) -> UserError:
    """What to say when more layers are to be frozen than there are."""
    return UserError(
        f"--freeze layers:{asked}",
        got=asked,
        expected=f"1 to {layers} for this model",
        cure="--freeze backbone freezes everything below the head",
    )


def inexact(flag: str, got: str, cure: str) -> UserError:
    """What to say when a frozen part gives something else for a segment at every step."""
    return UserError(
        flag,
        got=got,
        expected="a frozen part that gives the same for a segment at every step",
        cure=f"use {cure}",
    )


def incomplete(name: str, lost: Sequence[str]) -> UserError:
    """What to say when a checkpoint lacks weights of the backbone."""
    return UserError(
        f"model {name}",
        got=f"a checkpoint without {len(lost)} weights such as {lost[0]}",
        expected="all weights of the backbone",
        cure="give a checkpoint of the same architecture as its config.json",
    )
