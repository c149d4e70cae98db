"""Trained models as folders: written whole, loaded by transformers and by our own commands."""

import copy
import errno
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoFeatureExtractor

from mgc_dist import cli
from mgc_dist.encoders import custom, hub, load_errors, pooling
from mgc_dist.encoders.kind import kind_of
from mgc_dist.errors import UserError
from mgc_dist.files import replaced, replacing_folder
from mgc_dist.models.classifier import TEMPERATURE, WaveClassifier
from mgc_dist.models.lora import merged

WEIGHTS = "model.safetensors"
BEST, BEST_EMA = "best", "best-ema"
"""In a run folder: the best model, and the best averaged weights (`--ema-decay`)."""


def find_exported(run_or_export: Path, *, ema: bool = False) -> Path:
    """`RUN/best` for a run folder, or with `ema` `RUN/best-ema`; else the folder itself.

    Raises:
        UserError: there are no averaged weights.
    """
    best = best_of(run_or_export, BEST_EMA if ema else BEST)
    if ema and not best.is_dir():
        raise UserError(
            f"--ema with {run_or_export}",
            got=f"no {BEST_EMA}/ there",
            expected="the folder of a run that was trained with --ema-decay",
            cure="leave --ema out, or train such a run: "
            f"{cli.launched('train')} --ema-decay 0.999 --run NEW",
        )
    is_run = ema or (run_or_export / "config.yaml").is_file() or best.is_dir()
    return best if is_run else run_or_export


def best_of(run: Path, name: str = BEST) -> Path:
    """The best model of a run; between two renames of `save_exported`, the one before it."""
    best, old = run / name, replaced(run / name)
    return old if old.is_dir() and not best.exists() else best


def settle(folder: Path) -> None:
    """Give a model its name back that a kill between two renames of `save_exported` took."""
    old = replaced(folder)
    if old.is_dir() and not folder.exists():
        old.rename(folder)


def load_exported(folder: Path, *, trust_remote_code: bool = False) -> WaveClassifier:
    """A classifier from a folder that `save_exported` or `save_pretrained` wrote, in eval mode.

    Args:
        folder: as above.
        trust_remote_code: run code that lies beside the weights.

    Raises:
        UserError: no such folder, or weights are missing in it.
    """
    hub.quiet()
    if not (folder / "config.json").is_file():
        raise UserError(
            f"model folder {folder}",
            got="no config.json" if folder.is_dir() else "no such folder",
            expected="a run folder with best/, or an exported model",
            cure=f"train first: {cli.launched('train')}",
        )
    config = custom.read_config(str(folder), None, trusted=trust_remote_code)
    net, missing = hub.load(custom.loader(config), str(folder), config=config)
    if missing or not hasattr(net.config, "segment_samples"):
        raise UserError(
            f"model folder {folder}",
            got=f"no {sorted(missing)[0] if missing else 'segment_samples in config.json'}",
            expected="an audio classifier that mgc_dist has exported",
            cure="export the run again: python -m mgc_dist.export RUN OUT",
        )
    normalises = kind_of(net).take(_saved_extractor(folder))
    return WaveClassifier(net, do_normalize=normalises).eval()


def sample_rate_of(folder: Path) -> int:
    """Sample rate in Hz that an exported model wants."""
    return int(_saved_extractor(folder).sampling_rate)


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
            gain of the learned mixins is left out, and adapters are merged.
        folder: replaced if it exists, under a temporary name until whole.
        sample_rate: in Hz.
        temperature: accepted on validation tracks, for `WaveClassifier.temperature`.
    """
    config = copy.deepcopy(model.net.config)  # from_config would share it with the live model
    setattr(config, TEMPERATURE, temperature)
    is_custom = custom.is_custom(config)
    if is_custom:  # a model of the hub names its repository there: "m-a-p/MERT--modeling.Model"
        config.auto_map = {k: v.rpartition("--")[2] for k, v in config.auto_map.items()}
    with torch.device("meta"):  # random weights of 300 M elements would take seconds
        fresh = type(model.net)(config)
    of_net = {k.removeprefix("net."): v for k, v in weights.items() if k.startswith("net.")}
    fresh.load_state_dict(merged(model.net, of_net), strict=True, assign=True)
    extractor = model.kind.extractor(sample_rate, model.do_normalize)
    with replacing_folder(folder) as temporary:
        try:
            fresh.save_pretrained(temporary)
        except (SafetensorError, RuntimeError) as error:  # a full disk is no OSError there
            raise OSError(errno.EIO, str(error), str(folder)) from error
        extractor.save_pretrained(temporary)
        if is_custom:
            custom.copy_code(model.net, temporary)
        elif pooling.is_headed(fresh):
            pooling.mark(temporary, config.model_type)
        for path in temporary.iterdir():  # safetensors writes 0600, whatever the umask
            path.chmod(temporary.stat().st_mode & 0o666)


def save_calibrated(model: WaveClassifier, folder: Path, sample_rate: int) -> None:
    """Write a loaded model with the temperature in its last layer, as plain transformers needs it.

    Args:
        model: from `load_exported`, with a temperature.
        folder: new or empty.
        sample_rate: in Hz.
    """
    assert model.temperature is not None
    weights = dict(model.state_dict())
    for name in (f"net.{model.kind.head}.{part}" for part in ("weight", "bias")):
        weights[name] = weights[name] / model.temperature
    save_exported(model, weights, folder, sample_rate)


def _saved_extractor(folder: Path) -> Any:  # noqa: ANN401 - one of several of transformers
    try:
        return AutoFeatureExtractor.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise load_errors.explained(str(folder), error) from error
