"""MuQ through its own package, with random weights; OMAR-RQ is refused."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import build_tiny
from layouts import write_muq
from safetensors.torch import load_file, save_file

from mgc_dist.config.lora import Lora
from mgc_dist.encoders import packages
from mgc_dist.errors import UserError
from mgc_dist.models import flops
from mgc_dist.models import folder as exported
from mgc_dist.models.backbone import build_probed
from mgc_dist.models.main import configuration, describe_main

GENRES = ("blues", "jazz", "rock")
RATE, SAMPLES = 24_000, 12_000
needs_muq = pytest.mark.skipif(
    importlib.util.find_spec("muq") is None,
    reason="NO PACKAGE muq HERE, nothing about MuQ is shown: pip install muq",
)


def build(name: str, **changes: Any):
    return build_tiny(name, GENRES, **({"sample_rate": RATE, "segment_samples": SAMPLES} | changes))


def waves() -> torch.Tensor:
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.integers(-9000, 9000, (2, SAMPLES)).astype(np.int16))


@needs_muq
def test_muq_gives_what_its_package_makes_of_a_wave(tmp_path: Path) -> None:
    folder = write_muq(tmp_path / "muq")
    classifier = build(f"muq:{folder}", freeze="backbone").eval()
    theirs = packages.Muq(json.loads((folder / "config.json").read_text())).eval()
    theirs.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    from muq.muq.modules.features import MelSTFT

    wave = waves().float() / 32768
    bands = MelSTFT(n_fft=2048, hop_length=240, is_db=True)(wave)[..., :-1]
    with torch.no_grad():
        hidden = theirs.model["conformer"](theirs.model["conv"]((bands - 6.8) / 18.4))
        torch.testing.assert_close(
            classifier.kind.base(wave).last_hidden_state, hidden.last_hidden_state
        )
        again = build(f"muq:{folder}", freeze="backbone").eval()
        logits = classifier(waves())
        assert again(waves()).equal(logits)
        exported.save_exported(classifier, dict(classifier.state_dict()), tmp_path / "best", RATE)
        loaded = exported.load_exported(tmp_path / "best")
        assert loaded(waves()).equal(logits)
        assert not loaded.do_normalize


@needs_muq
def test_muq_is_adapted_counted_and_probed(tmp_path: Path) -> None:
    name = f"muq:{write_muq(tmp_path / 'muq')}"
    with pytest.raises(UserError, match=r"BatchNorm layers in training"):
        build(name)
    classifier = build(name, freeze="feature_encoder", lora=Lora.parsed("r=2")).train()
    classifier(waves()).square().sum().backward()
    trained = {n for n, p in classifier.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in classifier.named_parameters() if p.grad is not None}
    assert any("layers.1.self_attn.linear_q.lora_A" in n for n in trained)
    empty = describe_main(
        name, GENRES, freeze="backbone", frozen_layers=None, activation_checkpointing=False,
        segment_samples=SAMPLES,
    )  # fmt: skip
    whole = build(name, freeze="backbone")
    parts = flops.count(whole, SAMPLES).parts
    assert parts == flops.count(empty, SAMPLES).parts
    assert {"feature_extractor", "layer 0", "layer 1", "head"} <= set(parts)
    probed = build_probed(name, GENRES, segment_samples=SAMPLES, sample_rate=RATE)
    assert probed(waves()).shape == (2, 3, 16)
    with pytest.raises(UserError, match=r"got 16000 Hz, expected 24000 Hz"):
        build(name, freeze="backbone", sample_rate=16_000)


@needs_muq
def test_muqs_package_seeds_nothing_of_ours(tmp_path: Path) -> None:
    name = f"muq:{write_muq(tmp_path / 'muq')}"
    heads = [
        build(name, freeze="backbone", seed=seed).net.classifier.weight.detach() for seed in (0, 1)
    ]
    assert not heads[0].equal(heads[1])


@needs_muq
def test_what_is_no_muq_is_refused(tmp_path: Path) -> None:
    folder = write_muq(tmp_path / "muq")
    (folder / "config.json").write_text('{"encoder_dim": 16}')
    with pytest.raises(UserError, match=r"config.json without the mean and deviation"):
        configuration(f"muq:{folder}", GENRES)
    with pytest.raises(UserError, match=r"model .*nowhere"):
        configuration(f"muq:{tmp_path}/a/nowhere", GENRES)


def test_a_package_that_is_not_there_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "muq", None)
    words = r"no package muq that can be imported.*\n  pip install muq"
    with pytest.raises(UserError, match=words):
        configuration("muq:any", GENRES)
    packages.MuqConfig(segment_samples=SAMPLES).save_pretrained(tmp_path)  # as of a run's best/
    save_file({}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=words):
        exported.load_exported(tmp_path)


def test_omar_rq_is_refused_with_the_reason() -> None:
    with pytest.raises(UserError, match=r"package omar-rq \(0\.2\.1\) asks for transformers < 5"):
        configuration("omar-rq:mtg-upf/omar-rq-base", GENRES)
