"""Power in mel bands, by torch alone.

Each operation is torchaudio 2.11's, in its order and precision, and buffers have its names: bias
tables, checkpoints and exports from when torchaudio computed them agree to the bit.
"""

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn


class MelSpectrogram(nn.Module):
    """Squared magnitudes of windowed Fourier transforms, summed in triangles over the mel scale.

    Args:
        sample_rate: in Hz.
        n_fft: samples of a window.
        hop_length: samples between windows.
        n_mels: bands.
    """

    def __init__(self, sample_rate: int, *, n_fft: int, hop_length: int, n_mels: int) -> None:
        super().__init__()
        self.n_fft, self.hop_length = n_fft, hop_length
        self.spectrogram = _Power(n_fft, hop_length)
        self.mel_scale = _Bands(mel_filters(sample_rate, n_fft // 2 + 1, n_mels))

    def forward(self, wave: Tensor) -> Tensor:
        """float32 [B, T] -> [B, n_mels, F] with F = T // hop_length + 1."""
        bands: Tensor = self.mel_scale(self.spectrogram(wave))
        return bands


class _Power(nn.Module):
    window: Tensor

    def __init__(self, n_fft: int, hop_length: int) -> None:
        super().__init__()
        self.hop_length = hop_length
        self.register_buffer("window", torch.hann_window(n_fft))

    def forward(self, wave: Tensor) -> Tensor:
        spectrum = torch.stft(
            wave, len(self.window), self.hop_length, window=self.window, return_complex=True
        )
        return spectrum.abs().pow(2.0)  # [B, n_fft / 2 + 1, F]


class _Bands(nn.Module):
    fb: Tensor

    def __init__(self, filters: Tensor) -> None:
        super().__init__()
        self.register_buffer("fb", filters)

    def forward(self, power: Tensor) -> Tensor:
        return (power.transpose(1, 2) @ self.fb).transpose(1, 2)  # [B, n_mels, F]


def mel_filters(sample_rate: int, bins: int, bands: int) -> Tensor:
    """Triangles of height 1 whose corners are evenly spaced in mel, float32 [bins, bands].

    The scale is 2595 log10(1 + f / 700 Hz) (O'Shaughnessy, "Speech Communication", 1987; HTK's).

    Args:
        sample_rate: in Hz; the bands reach to half of it.
        bins: frequencies of the Fourier transform, from 0 Hz on.
        bands: triangles.
    """
    frequencies = torch.linspace(0, sample_rate // 2, bins)
    highest = 2595.0 * math.log10(1.0 + float(sample_rate // 2) / 700.0)
    mels = torch.linspace(0.0, highest, bands + 2)
    corners = 700.0 * (10.0 ** (mels / 2595.0) - 1.0)  # [bands + 2], Hz
    widths = corners[1:] - corners[:-1]
    distances = corners.unsqueeze(0) - frequencies.unsqueeze(1)  # [bins, bands + 2]
    rising = -1.0 * distances[:, :-2] / widths[:-1]
    falling = distances[:, 2:] / widths[1:]
    return torch.max(torch.zeros(1), torch.min(rising, falling))  # [bins, bands]


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Float32 for a block: the mel matrix product would lose its bands in bfloat16."""
    if torch.amp.autocast_mode.is_autocast_available(device_type):  # not on the meta device
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
