"""The small log-mel CNN as a main model: size, norms, export, freezing, refusals, ZeRO, dry run."""

from pathlib import Path

import pytest
import torch
from conftest import build_tiny
from torch import nn
from trainings import config, losses, train_on

from mgc_dist import export
from mgc_dist.config import ExportConfig
from mgc_dist.encoders import hub
from mgc_dist.errors import UserError
from mgc_dist.models import folder as exported
from mgc_dist.models import main as model
from mgc_dist.training.forecast import activation_bytes, count_parts

TEN = tuple("abcdefghij")


def waves(rows: int = 3, samples: int = 8000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-9000, 9000, (rows, samples), generator=generator, dtype=torch.int16)


def test_it_is_small_and_has_no_batch_norm() -> None:
    classifier = build_tiny("logmel-cnn", TEN)
    count = sum(p.numel() for p in classifier.parameters())
    assert 15_000 < count < 25_000
    kinds = {type(module) for module in classifier.modules()}
    assert nn.GroupNorm in kinds
    assert not any(issubclass(kind, nn.modules.batchnorm._BatchNorm) for kind in kinds)
    assert classifier.genres == TEN
    # a row's logits do not depend on its neighbours
    with torch.no_grad():
        x = waves()
        torch.testing.assert_close(classifier.train()(x)[:1], classifier.train()(x[:1]))


def test_its_bands_are_those_of_the_definition() -> None:
    # log(mel power + floor), standardised: by numpy, in float64
    import numpy as np
    from transformers.audio_utils import mel_filter_bank

    cnn = build_tiny("logmel-cnn", TEN).net.cnn
    x = hub.normalise(waves())
    seen = []
    cnn.blocks.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    cnn(x)
    padded = np.pad(x.double().numpy(), ((0, 0), (256, 256)), mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, 512, axis=1)[:, ::256]
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(512) / 512)
    power = np.abs(np.fft.rfft(frames * window, axis=2)) ** 2  # [B, F, 257]
    bank = mel_filter_bank(257, 40, 0.0, 8000.0, 16_000)
    from mgc_dist.encoders.cnn import FLOOR, MEAN, SCALE

    expected = (np.log(power @ bank + FLOOR) - MEAN) / SCALE
    found = seen[0][:, 0].transpose(1, 2).numpy()
    np.testing.assert_allclose(found, expected, atol=2e-3)


@pytest.mark.parametrize("learns_gain", [False, True])
def test_export_and_load(learns_gain: bool, tmp_path: Path) -> None:
    classifier = build_tiny("logmel-cnn", TEN, learns_gain=learns_gain).eval()
    weights = {name: value.clone() for name, value in classifier.state_dict().items()}
    assert any(name.startswith("gain.") for name in weights) == learns_gain
    exported.save_exported(classifier, weights, tmp_path / "best", 16_000)
    loaded = exported.load_exported(tmp_path / "best")
    assert loaded.gain is None
    with torch.no_grad():
        assert loaded(waves()).equal(classifier(waves()))
    assert loaded.genres == TEN
    assert loaded.segment_samples == 8000
    assert exported.sample_rate_of(tmp_path / "best") == 16_000


def test_the_gain_is_softplus_of_a_layer_on_what_the_head_gets(tiny_model: Path) -> None:
    for name in ("logmel-cnn", str(tiny_model)):
        classifier = build_tiny(name, TEN, learns_gain=True).eval()
        kept = []
        classifier.net.classifier.register_forward_hook(lambda m, i, o, kept=kept: kept.append(i))
        logits, gain = classifier(waves(), with_gain=True)
        assert classifier.gain is not None
        expected = nn.functional.softplus(classifier.gain(kept[0][0]))[:, 0]
        torch.testing.assert_close(gain, expected)
        torch.testing.assert_close(logits, classifier(waves()))
        head, backbone = classifier.head_and_backbone()
        assert any(p is classifier.gain.weight for p in head)
        assert not any(p is classifier.gain.weight for p in backbone)


def test_freezing() -> None:
    for freeze in ("none", "feature_encoder"):
        classifier = build_tiny("logmel-cnn", TEN, freeze=freeze)
        assert all(p.requires_grad for p in classifier.parameters())
    head, backbone = build_tiny("logmel-cnn", TEN, freeze="backbone").head_and_backbone()
    assert len(head) == 2
    assert backbone == []
    with pytest.raises(UserError, match=r"--freeze layers:2: .* expected none, feature_encoder or"):
        build_tiny("logmel-cnn", TEN, freeze="layers:2", frozen_layers=2)


def test_segments_that_are_too_short_are_refused() -> None:
    with pytest.raises(UserError, match="segments of 1600 samples for logmel-cnn: got 7 frames"):
        build_tiny("logmel-cnn", TEN, segment_samples=1600)


def test_the_dry_run_knows_it() -> None:
    empty = model.describe_main(
        "logmel-cnn",
        TEN,
        freeze="none",
        frozen_layers=None,
        activation_checkpointing=False,
        segment_samples=8000,
    )
    parts = count_parts(empty)
    assert set(parts) == {"cnn", "head"}
    assert parts["head"] == (650, 650)
    assert activation_bytes(empty, 4, 8000) == pytest.approx(
        4 * activation_bytes(empty, 1, 8000), rel=0.01
    )


def test_two_ranks_at_stage_3_follow_one(shards: Path, table: Path, tmp_path: Path) -> None:
    found = []
    for world, stage in ((1, 0), (2, 3)):
        run = tmp_path / f"run{world}"
        settings = config(shards, Path("logmel-cnn"), run, zero_stage=stage, epochs=60 / 66)
        train_on(world, settings)
        found.append(losses(run))
    assert found[1] == pytest.approx(found[0], abs=1e-5)
    assert found[0][-1] != pytest.approx(found[0][0], abs=1e-3)


def test_export_for_others_is_refused(tmp_path: Path) -> None:
    classifier = build_tiny("logmel-cnn", TEN)
    run = tmp_path / "run"
    run.mkdir()
    exported.save_exported(classifier, classifier.state_dict(), run / "best", 16_000)
    with pytest.raises(UserError, match="logmel-cnn, which transformers cannot load without our"):
        export.run(ExportConfig(run=run, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["cnn", "wav2vec2"])
def test_the_gain_leaves_the_shared_features_alone(kind: str, tiny_model: Path) -> None:
    """Its gradient used to train them for the product: -0.285 on the shifted test (docs/log.md)."""
    name = "logmel-cnn" if kind == "cnn" else str(tiny_model)
    classifier = build_tiny(name, TEN, learns_gain=True)
    _, gain = classifier(waves(), with_gain=True)
    gain.sum().backward()
    moved = {n for n, p in classifier.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"gain.weight", "gain.bias"}
