"""Low-rank adapters on every family: they learn, all else is still, and an export has none."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import NOISY, build_tiny, write_model
from peft import LoraConfig
from test_families import FAMILIES, GENRES, RATE, waves, write
from transformers import AutoModelForAudioClassification, pipeline

from mgc_dist.config import ModelConfig
from mgc_dist.config.lora import Lora
from mgc_dist.encoders.hub import normalise
from mgc_dist.errors import UserError
from mgc_dist.models import folder as exported
from mgc_dist.models.classifier import WaveClassifier

USUAL = Lora(r=4, alpha=8.0, targets=())
OTHERS = {
    **{"sew-d": ("dense", "key_proj"), "whisper": ("fc1", "k_proj", "out_proj")},
    **{"audio-spectrogram-transformer": ("fc1", "o_proj"), "wavlm": ("gru_rel_pos_linear",)},
    **dict.fromkeys(("wav2vec2-bert", "wav2vec2-conformer"), ("linear_k", "output_dense")),
}
"""Layers that are not adapted unless they are named."""


def adapted(file: Path, **changes: Any) -> WaveClassifier:
    settings: dict[str, Any] = {"freeze": "feature_encoder", "lora": USUAL}
    return build_tiny(file, GENRES, **(settings | changes))


def disturb(model: WaveClassifier) -> None:
    """Move the adapters away from their start, where they change nothing."""
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.5)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("kind", FAMILIES)
def test_adapters_and_head_learn_and_nothing_else(kind: str, named: bool, tmp_path: Path) -> None:
    # WavLM hands the weights of its queries to torch's attention: adapters of those learn nothing
    targets = OTHERS.get(kind, ("k_proj", "output_dense")) if named else ()
    file = write(tmp_path, kind)
    model = adapted(file, lora=Lora(r=4, alpha=8.0, targets=targets)).train()
    plain = build_tiny(file, GENRES, freeze="backbone").train()
    model(waves()).square().sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    below = [n for n in trained if any(p is model.get_parameter(n) for p in backbone(model))]
    head = {name for name, parameter in plain.named_parameters() if parameter.requires_grad}
    assert trained - set(below) == head
    assert all(".lora_A." in name or ".lora_B." in name for name in below)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert ".lora_B." not in name or bool(parameter.grad.any()), name
    layers = 2 * (len(targets) or 2)
    assert len(below) >= 2 * layers


def backbone(model: WaveClassifier) -> list[torch.nn.Parameter]:
    return list(model.kind.base.parameters())


@pytest.mark.parametrize("kind", FAMILIES)
def test_an_export_is_a_plain_model_of_the_same_logits(kind: str, tmp_path: Path) -> None:
    model = adapted(write(tmp_path, kind)).eval()
    wave = waves()
    with torch.no_grad():
        before = model(wave)
        disturb(model)
        logits = model(wave)
        assert float((logits - before).abs().max()) > 2e-5
        exported.save_exported(model, dict(model.state_dict()), tmp_path / "best", RATE)
        found = exported.load_exported(tmp_path / "best")
        assert float((found(wave) - logits).abs().max()) < 1e-6
    assert not [name for name in found.state_dict() if "lora" in name or "base_layer" in name]


def test_an_export_loads_in_transformers_alone(tiny_model: Path, tmp_path: Path) -> None:
    model = adapted(tiny_model).eval()
    disturb(model)
    exported.save_exported(model, dict(model.state_dict()), tmp_path / "best", RATE)
    wave = waves()
    net = AutoModelForAudioClassification.from_pretrained(tmp_path / "best").eval()
    with torch.no_grad():
        logits = model(wave)
        assert float((net(normalise(wave)).logits - logits).abs().max()) < 1e-6
    classify = pipeline("audio-classification", model=str(tmp_path / "best"), top_k=None)
    said = classify({"array": wave[0].numpy().astype(np.float32) / 32768, "sampling_rate": RATE})
    scores = {item["label"]: item["score"] for item in said}
    assert [scores[g] for g in GENRES] == pytest.approx(logits[0].softmax(0).tolist(), abs=1e-5)


def test_adapters_change_nothing_at_the_start(tiny_model: Path) -> None:
    plain = build_tiny(tiny_model, GENRES, freeze="feature_encoder").eval()
    with torch.no_grad():
        assert adapted(tiny_model).eval()(waves()).equal(plain(waves()))


def test_dropout_and_masks_stay_on_where_adapters_learn(tmp_path: Path) -> None:
    file = write_model(tmp_path / "noisy.json", **(NOISY | {"hidden_dropout": 0.0}))
    model, drawn = adapted(file).train(), torch.tensor([1, 2])
    base = model.net.base_model
    assert not base.feature_extractor.training
    assert base.encoder.layers[0].attention.training
    attended = model(waves(), drawn)
    assert not attended.equal(model(waves(), drawn)), "attention has dropout"
    for layer in base.encoder.layers:
        layer.attention.dropout = 0.0
    assert model(waves(), drawn).equal(model(waves(), drawn))
    assert not model(waves(), drawn).equal(model(waves(), drawn + 1)), "masks follow the draw"


def test_layers_below_what_is_frozen_have_no_adapters(tiny_model: Path) -> None:
    model = adapted(tiny_model, freeze="layers:1", frozen_layers=1, cache="trunk").train()
    names = [name for name, _ in model.named_parameters() if ".lora_" in name]
    assert len(names) == 4
    assert all(".layers.1." in name for name in names)
    disturb(model)
    whole = model(waves())
    assert model(model(waves(), only_below=True)).equal(whole), "a cache is exact"


def test_a_target_that_the_model_does_not_have_is_refused(tiny_model: Path) -> None:
    with pytest.raises(UserError, match="--lora: target query: got no linear layer of ") as error:
        adapted(tiny_model, lora=Lora(r=4, alpha=8.0, targets=("q_proj", "query")))
    names = "intermediate_dense, k_proj, out_proj, output_dense, projection, q_proj, v_proj"
    assert f"expected one of {names}" in str(error.value)
    assert adapted(tiny_model, lora=Lora(r=4, alpha=8.0, targets=tuple(names.split(", "))))


def test_a_model_of_which_all_layers_are_frozen_is_refused(tiny_model: Path) -> None:
    with pytest.raises(UserError, match=r"--lora: got no linear layer.*\n  freeze less: --f"):
        adapted(tiny_model, freeze="layers:2", frozen_layers=2)
    assert adapted(tiny_model, freeze="feature_encoder")


def test_a_cache_with_adapters_below_its_cut_is_refused(tiny_model: Path) -> None:
    below = Lora(r=4, alpha=8.0, targets=("feature_projection.projection",))
    settings: dict[str, Any] = {"freeze": "layers:1", "frozen_layers": 1, "cache": "trunk"}
    with pytest.raises(UserError, match=r"target feature_projection.*above what"):
        adapted(tiny_model, lora=below, **settings)
    assert adapted(tiny_model, lora=below), "the cure is to freeze less"


def test_a_model_with_adapters_beside_it_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    # transformers would put them in, unasked: base weights would then have other names
    build_tiny(tiny_model, GENRES).net.save_pretrained(tmp_path)
    LoraConfig(r=2, target_modules=["q_proj"]).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"got a model with adapters.*\n.* out of a copy"):
        adapted(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    assert adapted(tmp_path)


def test_wavlms_attention_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"target q_proj: got no linear layer .* adapters can chan"):
        adapted(write(tmp_path, "wavlm"), lora=Lora(r=4, alpha=8.0, targets=("q_proj",)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"--lora: got , expected r=N\[,alpha=A\]\[,targets=NAME,NAME\]\n  for example --lora"),
        ("alpha=32", "--lora: got alpha=32, expected r=N"),
        ("r=16,targets=", "--lora: got r=16,targets=, expected r=N"),
        ("r=16,dropout=0.1", "--lora: got r=16,dropout=0.1, expected r=N"),
        ("r=0", "--lora: r: got 0, expected 1 to 4096\n  8 to 64 is usual"),
        ("r=16,alpha=0", "--lora: alpha: got 0.0, expected above 0 to 65536\n  twice r"),
    ],
)
def test_other_words_are_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ModelConfig(lora=text)


def test_words_are_read() -> None:
    assert ModelConfig().adapters is None
    assert ModelConfig(lora="r=16").adapters == Lora(r=16, alpha=32.0, targets=())
    words = "r=8,alpha=4.5,targets=q_proj,fc1.dense"
    assert ModelConfig(lora=words).adapters == Lora(r=8, alpha=4.5, targets=("q_proj", "fc1.dense"))


@pytest.mark.parametrize("freeze", ["none", "backbone"])
def test_freezing_all_or_nothing_is_refused(freeze: str) -> None:
    with pytest.raises(UserError, match=f"--lora with --freeze {freeze}: got both.*\n.*feature_en"):
        ModelConfig(lora="r=16", freeze=freeze)
    assert ModelConfig(lora="r=16", freeze="feature_encoder").lora
