"""Music models that come as a Python package: MuQ. Their code is installed, not downloaded.

`--model muq:NAME` takes a folder or a name of the hub, with the package's config.json and weights.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    PretrainedConfig,
    Wav2Vec2ConformerConfig,
    Wav2Vec2FeatureExtractor,
)
from transformers.modeling_outputs import BaseModelOutput

from mgc_dist.encoders import load_errors
from mgc_dist.errors import UserError
from mgc_dist.sound.mel import without_autocast

_MUQ, _OMAR = "muq:", "omar-rq:"
_RATE = 24_000
"""Hz; of MuQ (its MelSTFT)."""
_BANDS = "melspec_2048"


class MuqConfig(PretrainedConfig):  # type: ignore[misc]
    """Settings of MuQ's package, and what heads and adapters ask of any model."""

    model_type = "muq"

    def __init__(self, package: dict[str, Any] | None = None, **settings: Any) -> None:  # noqa: ANN401
        self.package = package or {}
        self.hidden_size = self.package.get("encoder_dim", 1024)
        self.num_hidden_layers = self.package.get("encoder_depth", 12)
        super().__init__(**settings)

    def backbone(self) -> nn.Module:
        """The model itself, with random weights."""
        return Muq(self.package)


class Muq(nn.Module):
    """MuQ's modules, called as `muq.MuQ` calls them.

    Its own forward pass fails with transformers 5, whose conformer gives no hidden states:
    "KeyError: 'hidden_states'". What only pretraining needs is left out.

    Args:
        package: fields of `muq.MuQConfig`.
    """

    def __init__(self, package: dict[str, Any]) -> None:
        super().__init__()
        muq = _muq()
        plain = Wav2Vec2ConformerConfig().to_dict()
        given = {
            name: value
            for name, value in (plain | package.get("w2v2_config", {})).items()
            if name not in ("id2label", "label2id")  # EasyDict: "attribute name must be string"
        }
        given |= {"layerdrop": 0.0}  # ranks would drop different layers
        given |= {"_attn_implementation": "sdpa"}  # "'EasyDict' object has no attribute ..."
        # transformers builds on meta: "Tensor on device cpu is not on the expected device meta!"
        with torch.device("cpu"), _own_numbers():
            whole = muq.MuQ(muq.MuQConfig(**(package | {"w2v2_config": given}))).model
        self.stat = dict(package.get("stat", {}))
        bands = whole.preprocessor_melspec_2048
        self.bands = nn.Sequential(bands.mel_stft, bands.amplitude_to_db)
        for module in self.bands.modules():
            module._non_persistent_buffers_set.update(module._buffers)  # no checkpoint has them
        self.model = nn.ModuleDict({"conv": whole.conv, "conformer": whole.conformer})

    def forward(self, wave: Tensor, output_hidden_states: bool = False) -> BaseModelOutput:
        """Waves [B, T] at 24 kHz -> states [B, T // 960, D]; those by layer are of its layers."""
        with without_autocast(wave.device.type):
            bands = self.bands(wave.float())[..., :-1]  # [B, 128, T // 240]
            bands = (bands - self.stat[f"{_BANDS}_mean"]) / self.stat[f"{_BANDS}_std"]
        hidden = self.model["conv"](bands.to(wave.dtype))  # [B, F, D]
        return BaseModelOutput(self.model["conformer"](hidden).last_hidden_state)


AutoConfig.register(MuqConfig.model_type, MuqConfig)


def _muq() -> Any:  # noqa: ANN401
    """The package.

    Raises:
        UserError: it cannot be imported.
    """
    try:
        import muq  # optional, and 6 s
    except ImportError as error:
        raise UserError(
            "a model of MuQ",
            got=f"no package muq that can be imported ({error})",
            expected="MuQ's own package",
            cure="pip install muq",
        ) from error
    return muq


@contextmanager
def _own_numbers() -> Iterator[None]:
    """A block after which random numbers go on as before: the package seeds all with 142."""
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(state)


def is_named(name: str) -> bool:
    """Whether `--model` names a model of a package."""
    return name.startswith((_MUQ, _OMAR))


def place_of(name: str) -> str:
    """The folder or hub name of a model, without the package's."""
    return name.removeprefix(_MUQ)


def read_config(name: str, revision: str | None, **settings: Any) -> MuqConfig:  # noqa: ANN401
    """The configuration of a model of a package.

    Raises:
        UserError: there is no such model, or its package cannot be used.
    """
    if name.startswith(_OMAR):
        raise UserError(
            f"--model {name}",
            got="OMAR-RQ, whose package omar-rq (0.2.1) asks for transformers < 5",
            expected="a package that works with transformers 5",
            cure="choose another model: muq:OpenMuQ/MuQ-large-msd-iter",
        )
    _muq()
    place = place_of(name)
    try:
        written, _ = PretrainedConfig.get_config_dict(place, revision=revision or "main")
    except (OSError, ValueError) as error:
        raise load_errors.explained(place, error) from error
    commit = written.pop("_commit_hash", None)
    config = MuqConfig(package=written, **settings)
    config.name_or_path = place
    config._commit_hash = commit
    if f"{_BANDS}_mean" not in written.get("stat", {}):
        raise UserError(
            f"--model {name}",
            got="a config.json without the mean and deviation of its bands (`stat`)",
            expected="that of a model of the package muq",
            cure="give such a model: muq:OpenMuQ/MuQ-large-msd-iter",
        )
    return config


def code_of(config: PretrainedConfig) -> str:
    """The package that a model is of, with its version; else "".

    Raises:
        UserError: the package is not there.
    """
    if not isinstance(config, MuqConfig):
        return ""
    _muq()
    return f"muq {version('muq')}"


def extractor_of(config: PretrainedConfig) -> Wav2Vec2FeatureExtractor | None:
    """What a model of a package wants of waves; None of any other."""
    if not isinstance(config, MuqConfig):
        return None
    return Wav2Vec2FeatureExtractor(sampling_rate=_RATE, do_normalize=False)
