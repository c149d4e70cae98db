"""Log-mel bands as the feature extractors of transformers make them, on the device of the waves.

Theirs work on the host, file by file. `tests/sound/test_fbank.py` compares the two, in float32.
"""

import warnings
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.audio_utils import mel_filter_bank

from mgc_dist.sound.mel import without_autocast

RATE = 16_000
"""Hz; all models of these bands were trained at it."""
FRAME, HOP, FFT = 400, 160, 512
"""Samples: 25 ms, 10 ms, and the next power of two (Kaldi's defaults)."""
_PREEMPHASIS = 0.97
_FLOOR = 1.192092955078125e-07
"""Kaldi's: the epsilon of float32."""
WHISPER_FFT = 400


def kaldi(wave: Tensor, bands: int, window: Literal["hann", "povey"]) -> Tensor:
    """Kaldi's `compute-fbank-feats` without dither, from 20 Hz on: natural logarithms.

    Args:
        wave: float32 [B, T] at 16 kHz, T of 400 or more.
        bands: number of them.
        window: Kaldi's own is `povey`, a Hann window to the power of 0.85.

    Returns:
        float32 [B, F, bands] with F = kaldi_frames(T).
    """
    with without_autocast(wave.device.type):
        frames = wave.unfold(1, FRAME, HOP)  # [B, F, 400]
        frames = frames - frames.mean(dim=2, keepdim=True)
        before = F.pad(frames, (1, 0), mode="replicate")[:, :, :-1]
        frames = (frames - _PREEMPHASIS * before) * _window(window, wave.device)
        power = torch.fft.rfft(frames, n=FFT).abs().pow(2.0)  # [B, F, 257]
        energies: Tensor = power @ _kaldi_filters(bands, wave.device)  # [B, F, bands]
        return energies.clamp(min=_FLOOR).log()


def kaldi_frames(samples: int) -> int:
    """F of T samples."""
    return max(0, (samples - FRAME) // HOP + 1)


def whisper(wave: Tensor, bands: int) -> Tensor:
    """Whisper's bands: log10, at most 8 below a segment's loudest, about -1 to 1.

    Source: `log_mel_spectrogram` of openai/whisper, whisper/audio.py.

    Args:
        wave: float32 [B, T] at 16 kHz.
        bands: 80 or 128.

    Returns:
        float32 [B, bands, T // 160].
    """
    with without_autocast(wave.device.type):
        window = torch.hann_window(WHISPER_FFT, device=wave.device)
        spectrum = torch.stft(wave, WHISPER_FFT, HOP, window=window, return_complex=True)
        power = spectrum[:, :, :-1].abs().pow(2.0)  # [B, 201, F]
        mel = _whisper_filters(bands, wave.device) @ power  # [B, bands, F]
        logs = mel.clamp(min=1e-10).log10()
        return (torch.maximum(logs, logs.amax(dim=(1, 2), keepdim=True) - 8.0) + 4.0) / 4.0


@cache
def _window(name: str, device: torch.device) -> Tensor:
    hann = torch.hann_window(FRAME, periodic=False, dtype=torch.float64)
    return (hann if name == "hann" else hann**0.85).float().to(device)


@cache
def _kaldi_filters(bands: int, device: torch.device) -> Tensor:
    """Triangles that are straight over the mel scale, float32 [257, bands]."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "At least one mel filter has all zero values": AST's 128
        filters = mel_filter_bank(
            FFT // 2 + 1,
            bands,
            20.0,
            RATE / 2,
            RATE,
            norm=None,
            mel_scale="kaldi",
            triangularize_in_mel_space=True,
        )
    return torch.from_numpy(filters).float().to(device)


@cache
def _whisper_filters(bands: int, device: torch.device) -> Tensor:
    """Triangles of equal area over Slaney's scale, float32 [bands, 201]."""
    filters = mel_filter_bank(
        WHISPER_FFT // 2 + 1, bands, 0.0, 8000.0, RATE, norm="slaney", mel_scale="slaney"
    )
    return torch.from_numpy(filters.T.copy()).float().to(device)
