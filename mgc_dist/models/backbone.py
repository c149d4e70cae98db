"""Frozen models, of the bias and of probes: segments to the time-means of their hidden layers."""

import hashlib
import json
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from mgc_dist.cluster.ranks import seed_everything
from mgc_dist.encoders import custom, hub
from mgc_dist.encoders.bands import LAYOUTS
from mgc_dist.encoders.hub import normalise
from mgc_dist.models.classifier import WaveClassifier
from mgc_dist.models.main import build_main
from mgc_dist.sound.mel import MelSpectrogram
from mgc_dist.sound.traits import Traits


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
        self.mel = MelSpectrogram(sample_rate, **mel)

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


class LayerMeans(nn.Module):
    """Time-mean of every hidden layer of a frozen model of any kind that can be trained.

    Args:
        model: a main model; its head is left out.

    Attributes:
        layers, width: L and D; found by a segment of silence.
        settings: what its output depends on besides its weights.
    """

    def __init__(self, model: WaveClassifier) -> None:
        super().__init__()
        self.base, self._kind, self._do_normalize = model.kind.base, model.kind, model.do_normalize
        config = model.net.config
        said = {name: value for name, value in config.to_dict().items() if name not in _OF_THE_FILE}
        self.settings: dict[str, object] = {
            "config": said,
            "do_normalize": self._do_normalize,
            "code": custom.code_of(config),
        }
        with torch.no_grad():
            silence = torch.zeros(1, model.segment_samples, dtype=torch.int16)
            self.layers, self.width = self.eval()(silence).shape[1:]

    def forward(self, wave: Tensor) -> Tensor:
        """int16 [B, T] -> float32 [B, L, D]."""
        x = normalise(wave) if self._do_normalize else wave.float() / 32768.0  # [B, T]
        states = self._kind.states(self._kind.inputs(x))
        return torch.stack([state.float().mean(dim=1) for state in states], dim=1)  # [B, L, D]


_OF_THE_FILE = ("_name_or_path", "_commit_hash", "transformers_version")


def build_probed(
    name: str,
    genres: Sequence[str],
    *,
    segment_samples: int,
    sample_rate: int,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> LogMel | LayerMeans:
    """A frozen model in eval mode that maps int16 [B, T] to float32 [B, L, D].

    Args:
        name: `logmel`, or what `build_main` takes.
        genres: of its head, which nobody asks.
        segment_samples: T.
        sample_rate: of the segments in Hz.
        revision: of a hub model.
        trust_remote_code: run code that lies beside the weights.

    Raises:
        UserError: the model cannot be found, does not fit, or gives no hidden states.
    """
    if name == "logmel":
        return LogMel(sample_rate).eval().requires_grad_(False)
    model = build_main(
        name,
        genres,
        freeze="backbone",
        frozen_layers=None,
        activation_checkpointing=False,
        seed=0,
        segment_samples=segment_samples,
        sample_rate=sample_rate,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    return LayerMeans(model.eval()).requires_grad_(False)


def build_bias(
    name: str, *, segment_samples: int, sample_rate: int, revision: str | None = None
) -> LogMel | HiddenMean | LayerMeans:
    """A frozen backbone in eval mode that maps int16 [B, T] to float32 [B, L, D].

    Args:
        name: `logmel`, hub name or folder.
        segment_samples: T.
        sample_rate: of the segments in Hz.
        revision: of a hub model.

    Raises:
        UserError: the model cannot be found, does not fit, or has no encoder over audio.
    """
    hub.quiet()
    if name == "logmel":
        return LogMel(sample_rate).eval().requires_grad_(False)
    seed_everything(0)  # what a checkpoint lacks (masked_spec_embed) must not vary
    net, missing = hub.load(AutoModel, name, revision)
    if net.config.model_type in LAYOUTS:
        return build_probed(
            name,
            ("unused",),
            segment_samples=segment_samples,
            sample_rate=sample_rate,
            revision=revision,
        )
    hub.refuse_no_encoder(f"--backbone {name}", net)
    lost = sorted(key for key in missing if not key.endswith("masked_spec_embed"))
    if lost:
        raise hub.incomplete(name, lost)
    extractor = hub.feature_extractor(name, sample_rate, revision)
    module = HiddenMean(net, do_normalize=extractor.do_normalize)
    return module.eval().requires_grad_(False)


def fingerprint(module: LogMel | HiddenMean | LayerMeans | Traits, *settings: str) -> str:
    """sha256 of a frozen model: names, shapes, dtypes and bytes of its weights, its settings.

    Args:
        module: from `build_bias` or `build_probed`, or a family of traits.
        settings: anything else that its output depends on.
    """
    digest = hashlib.sha256()
    digest.update(json.dumps([module.settings, *settings], sort_keys=True, default=str).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
