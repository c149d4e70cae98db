"""A small convolutional network on log-mel bands: the main model of benchmarks and quick tests.

It learns in seconds on a CPU what a transformer from random weights does not. It has group norm:
the statistics of batch norm would depend on padding and on the ranks.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForAudioClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from mgc_dist.encoders import hub
from mgc_dist.encoders.masks import RowMasks
from mgc_dist.errors import UserError
from mgc_dist.sound.mel import MelSpectrogram, without_autocast

BANDS, HOP = 40, 256
GROUPS = 4
FLOOR = 1e-3
"""Added to the power of a band before the logarithm, so that silence is finite; segments have
unit variance, so a band of music is about 270."""
MEAN, SCALE = 5.6, 1.6
"""Mean and standard deviation of the log-mel values of the planted set; 5.0 and 1.8 on the other
synthetic set, 6.7 for white noise."""


class LogMelCnn(nn.Module):
    """Three blocks of convolution, group norm, ReLU and max pooling, pooled by mean and maximum.

    Args:
        sample_rate: in Hz.
        channels: of the three blocks; multiples of 4.
        width: of the output, D.
    """

    def __init__(self, sample_rate: int, channels: tuple[int, int, int], width: int) -> None:
        super().__init__()
        with torch.device("cpu"):  # transformers builds on the meta device; filters have values
            self.mel = MelSpectrogram(sample_rate, n_fft=512, hop_length=HOP, n_mels=BANDS)
        blocks: list[nn.Module] = []
        for below, own in zip((1, *channels[:2]), channels, strict=True):
            blocks += [
                nn.Conv2d(below, own, 3, padding=1, bias=False),
                nn.GroupNorm(GROUPS, own),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
        self.blocks = nn.Sequential(*blocks)
        self.projector = nn.Linear(2 * channels[2], width)

    def forward(self, wave: Tensor) -> Tensor:
        """Normalised float32 [B, T] -> [B, D], 0 or more."""
        with without_autocast(wave.device.type):
            bands = torch.log(self.mel(wave) + FLOOR)  # [B, 40, F]
            bands = (bands - MEAN) / SCALE
        planes = self.blocks(bands[:, None])  # [B, C, 5, F / 8]
        pooled = torch.cat([planes.mean(dim=(2, 3)), planes.amax(dim=(2, 3))], dim=1)  # [B, 2 C]
        return torch.relu(self.projector(pooled))  # [B, D]


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


AutoConfig.register(CnnConfig.model_type, CnnConfig)
AutoModelForAudioClassification.register(CnnConfig, CnnForAudioClassification)


class LogMelCnnKind:
    """The adapter (`mgc_dist.encoders.kind.Kind`). Its feature encoder, the bands, has no weights.

    Args:
        net: a `CnnForAudioClassification`.
    """

    normalises: bool | None = True
    needs_our_code = True
    head = "classifier"
    fuses_attention = False
    adapted = ("projector",)
    never_called: tuple[str, ...] = ()
    cut = None
    masks: RowMasks | None = None

    def __init__(self, net: PreTrainedModel) -> None:
        self.net = net

    @property
    def base(self) -> nn.Module:
        """All below the head."""
        base: nn.Module = self.net.base_model
        return base

    def inputs(self, wave: Tensor) -> Tensor:
        """The waves themselves."""
        return wave

    def states(self, x: Tensor) -> Sequence[Tensor]:
        """What the head gets, [B, 1, D]: it has no encoder layers."""
        return [self.base(x)[:, None]]  # [B, 1, D]

    def take(self, extractor: Any) -> bool:  # noqa: ANN401 - of transformers
        """Whether waves are normalised."""
        return bool(extractor.do_normalize)

    def extractor(self, sample_rate: int, do_normalize: bool) -> Any:  # noqa: ANN401
        """It is never used; `predict` reads its sample rate."""
        return hub.wave_extractor(sample_rate, do_normalize, self.net.config)

    def fit(self, segment_samples: int) -> None:
        """Nothing: it takes segments of any length."""

    def refuse_unfit(self, name: str, segment_samples: int) -> None:
        """Refuse segments that three poolings leave nothing of."""
        hub.refuse_short(name, segment_samples, frames=segment_samples // HOP + 1, needed=8)

    def freeze(self, freeze: str, frozen_layers: int | None) -> list[nn.Module]:
        """Freeze all below the classifier, or nothing."""
        if freeze in ("none", "feature_encoder"):
            return []
        if freeze != "backbone":
            raise UserError(
                f"--freeze {freeze}",
                got=freeze,
                expected="none, feature_encoder or backbone for logmel-cnn",
                cure="it has no encoder layers",
            )
        self.net.cnn.requires_grad_(False)
        return [self.net.cnn]

    def part_of(self, name: str) -> str:
        """All below the classifier is one part."""
        return "cnn" if ".cnn." in name else "head"

    def layers_above(self, name: str) -> int:
        """Always refused: it has no encoder layers."""
        raise UserError(
            "--layer-lr-decay with --model logmel-cnn",
            got="a model without encoder layers",
            expected="one rate below the head, --lr",
            cure="use --layer-lr-decay 1, or a transformers model",
        )
