"""A small convolutional network on log-mel bands: the main model of benchmarks and quick tests.

It learns in seconds on a CPU what a transformer from random weights does not. It has group norm:
the statistics of batch norm would depend on padding and on the ranks.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from mgc_dist.models.mel import MelSpectrogram

BANDS = 40
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
            self.mel = MelSpectrogram(sample_rate, n_fft=512, hop_length=256, n_mels=BANDS)
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
        with _without_autocast(wave.device.type):
            bands = torch.log(self.mel(wave) + FLOOR)  # [B, 40, F]
            bands = (bands - MEAN) / SCALE
        planes = self.blocks(bands[:, None])  # [B, C, 5, F / 8]
        pooled = torch.cat([planes.mean(dim=(2, 3)), planes.amax(dim=(2, 3))], dim=1)  # [B, 2 C]
        return torch.relu(self.projector(pooled))  # [B, D]


def _without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Float32 for the bands: the mel matrix product would lose them in bfloat16."""
    if torch.amp.autocast_mode.is_autocast_available(device_type):  # not on the meta device
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
