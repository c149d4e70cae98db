"""Mel bands: equal to those of torchaudio to the bit, and to those of transformers to rounding."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers.audio_utils import mel_filter_bank

from mgc_dist.sound.mel import MelSpectrogram, mel_filters

RATES = (8000, 16_000, 22_050, 44_100)
SHAPES = ((512, 256, 40), (400, 160, 32))


@pytest.mark.parametrize("rate", RATES)
def test_filters_are_those_of_transformers(rate: int) -> None:
    for n_fft, _, bands in SHAPES:
        expected = mel_filter_bank(n_fft // 2 + 1, bands, 0.0, rate / 2, rate)
        found = mel_filters(rate, n_fft // 2 + 1, bands)
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found.numpy(), expected, atol=2e-5)


@pytest.mark.parametrize("rate", RATES)
def test_buffers_bands_and_gradients_are_torchaudios_to_the_bit(rate: int) -> None:
    # beside a newer torch, its last version 2.11 fails to import
    transforms = pytest.importorskip("torchaudio.transforms", exc_type=ImportError)

    def bands_and_gradient(mel: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(3, rate, generator=torch.Generator().manual_seed(0), requires_grad=True)
        bands = mel(x)
        (gradient,) = torch.autograd.grad(torch.log(bands + 1e-3).sum(), x)
        return bands, gradient

    for n_fft, hop, bands in SHAPES:
        knobs = {"n_fft": n_fft, "hop_length": hop, "n_mels": bands}
        ours, theirs = MelSpectrogram(rate, **knobs), transforms.MelSpectrogram(rate, **knobs)
        assert list(ours.state_dict()) == list(theirs.state_dict())  # old checkpoints load
        for mine, other in zip(
            (*ours.buffers(), *bands_and_gradient(ours)),
            (*theirs.buffers(), *bands_and_gradient(theirs)),
            strict=True,
        ):
            assert torch.equal(mine, other)
