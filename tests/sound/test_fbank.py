"""Log-mel bands on the device against the feature extractors of transformers."""

import numpy as np
import pytest
import torch
from transformers import (
    ASTFeatureExtractor,
    SeamlessM4TFeatureExtractor,
    WhisperFeatureExtractor,
)

from mgc_dist.sound import fbank

RATE = 16_000


def waves(samples: int) -> torch.Tensor:
    """Loud noise, quiet noise, a sine between zeros, and silence: float32 of int16 steps."""
    rng = np.random.default_rng(0)
    sine = 9000 * np.sin(np.arange(samples) / 7) * (np.arange(samples) > samples // 2)
    rows = [rng.integers(-9000, 9000, samples), rng.integers(-9, 9, samples), sine, 0 * sine]
    return torch.from_numpy(np.stack(rows).astype(np.int16)).float() / 32768


@pytest.mark.parametrize("samples", [8000, 16_000])
def test_bands_of_ast(samples: int) -> None:
    x = waves(samples)
    extract = ASTFeatureExtractor(max_length=fbank.kaldi_frames(samples), do_normalize=False)
    theirs = extract(list(x.numpy()), sampling_rate=RATE, return_tensors="pt").input_values
    torch.testing.assert_close(fbank.kaldi(x, 128, "hann"), theirs, rtol=0, atol=5e-3)


@pytest.mark.parametrize("samples", [8000, 16_000])
def test_bands_of_w2v_bert(samples: int) -> None:
    x = waves(samples)[:3]
    extract = SeamlessM4TFeatureExtractor()
    theirs = [
        torch.from_numpy(np.asarray(extract._extract_fbank_features(row))) for row in x.numpy()
    ]
    found = fbank.kaldi(x * 32768, 80, "povey")
    torch.testing.assert_close(found, torch.stack(theirs).float(), rtol=0, atol=5e-3)


@pytest.mark.parametrize("bands", [80, 128])
def test_bands_of_whisper(bands: int) -> None:
    x = waves(32_000)
    extract = WhisperFeatureExtractor(feature_size=bands, chunk_length=2)
    theirs = extract(list(x.numpy()), sampling_rate=RATE, return_tensors="pt").input_features
    torch.testing.assert_close(fbank.whisper(x, bands), theirs, rtol=0, atol=1e-5)
