"""Heads: attention, sums over layers and a named layer, of every family, by formulas of our own."""

import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import build_tiny, write_model
from harness import slow
from test_custom import build as build_custom
from test_custom import waves as custom_waves
from test_custom import write_mert
from test_families import FAMILIES, GENRES, RATE, SAMPLES, freeze_of, waves, write
from transformers import pipeline

from mgc_dist.config.head import HeadConfig
from mgc_dist.config.lora import Lora
from mgc_dist.encoders import kind
from mgc_dist.errors import UserError
from mgc_dist.models import exported as genre_file
from mgc_dist.models import flops
from mgc_dist.models import folder as exported
from mgc_dist.models import main as model
from mgc_dist.models.classifier import WaveClassifier
from mgc_dist.models.exported import GenreClassifier
from mgc_dist.training.forecast import activation_bytes, count_parts

ATTENTION, MIX = HeadConfig(pooling="attention"), HeadConfig(layer_mix=True)
BOTH = HeadConfig(pooling="attention", layer_mix=True)
AST = "audio-spectrogram-transformer"
SHOWN = ("wav2vec2", "whisper", "sew", AST)
"""Of whose heads each is another code; the rest is slow."""


def drawn(classifier: WaveClassifier) -> WaveClassifier:
    """With weights of layers and frames that are far from even."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in classifier.named_parameters():
            if "layer_weights" in name or ".score." in name:
                parameter.normal_()
    return classifier.eval()


def seen(classifier: WaveClassifier, wave: torch.Tensor) -> tuple[list[torch.Tensor], Any]:
    """States of every layer, [B, F, D] each, and what the base gives in the end."""
    base, between = classifier.kind.base, []
    layers = getattr(getattr(base, "encoder", None), "layers", ())
    hooks = [layer.register_forward_hook(lambda *given: between.append(given)) for layer in layers]
    found = base(classifier._inputs(wave), output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    if found.hidden_states is None:  # of code that calls its encoder itself
        first, *outputs = [between[0][1][0], *(of[2] for of in between)]
        outputs = [each[0] if isinstance(each, tuple) else each for each in outputs]
        return [first, *outputs[:-1], found.last_hidden_state], found.last_hidden_state
    return list(found.hidden_states), found.last_hidden_state


def by_hand(classifier: WaveClassifier, wave: torch.Tensor, head: HeadConfig) -> np.ndarray:
    """Logits [B, K] in float64, from the states that the base gives."""
    net: Any = classifier.net
    with torch.no_grad():
        states, hidden = seen(classifier, wave)
        hidden = hidden.double()  # [B, F, D]
        if head.layer_mix:
            shares = np.exp(net.layer_weights.double().numpy())
            hidden = sum(
                share * state.double()
                for share, state in zip(shares / shares.sum(), states, strict=True)
            )
        net = net.double()
        if head.layer_mix and hasattr(classifier.kind.base, "layernorm"):
            hidden = classifier.kind.base.layernorm(hidden)
        has_projector = hasattr(net, "projector")
        vectors = hidden if has_projector else hidden[:, :2]
        share = np.full(vectors.shape[:2], 1 / vectors.shape[1])
        if head.pooling == "attention":
            vectors = hidden
            score = (net.projector if has_projector else net.attention).score.weight[0]
            raised = np.exp(hidden.numpy() @ score.numpy())  # [B, F]
            share = raised / raised.sum(axis=1, keepdims=True)
        pooled = torch.from_numpy(np.einsum("bf,bfd->bd", share, vectors.numpy()))
        if has_projector:
            pooled = pooled @ net.projector.weight.T + net.projector.bias
        logits: np.ndarray = net.classifier(pooled).numpy()
        net.float()
    return logits


@pytest.mark.parametrize(
    ("family", "head"),
    [(f, BOTH) for f in [*FAMILIES, "stable"]]
    + [(f, h) if f in SHOWN else slow(f, h) for f in FAMILIES for h in (ATTENTION, MIX)],
)
def test_heads_are_what_their_formulas_say(family: str, head: HeadConfig, tmp_path: Path) -> None:
    settings = {"freeze": freeze_of(family), "head": head}
    flavour = {"do_stable_layer_norm": True} if family == "stable" else {}
    name = write(tmp_path, family.replace("stable", "wav2vec2"), **flavour)
    classifier = drawn(build_tiny(name, GENRES, **settings))
    np.testing.assert_allclose(
        classifier(waves()).detach().numpy(), by_hand(classifier, waves(), head), atol=2e-5
    )
    assert set(classifier.head_and_backbone()[0]) >= {
        p for n, p in classifier.named_parameters() if "layer_weights" in n or ".score." in n
    }
    classifier.train()(waves()).square().sum().backward()
    for name, parameter in classifier.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


@pytest.mark.parametrize(
    ("family", "head"),
    [(f, BOTH) if f in SHOWN else slow(f, BOTH) for f in FAMILIES]
    + [("wav2vec2", MIX), (AST, MIX)],
)
def test_exports_say_the_same(family: str, head: HeadConfig, tmp_path: Path) -> None:
    """A pipeline loads them with the class that lies beside them, and never without it."""
    settings = {"freeze": freeze_of(family), "head": head}
    classifier = drawn(build_tiny(write(tmp_path, family), GENRES, **settings))
    folder, wave = tmp_path / "best", waves()
    exported.save_exported(classifier, dict(classifier.state_dict()), folder, RATE)
    with torch.no_grad():
        logits = classifier(wave)
        assert exported.load_exported(folder)(wave).equal(logits)
        for asked in (head, HeadConfig()):
            again = build_tiny(folder, GENRES, freeze=freeze_of(family), head=asked).eval()
            assert again(wave).equal(logits), "what has such a head keeps it"
    is_plain = family == "wav2vec2" and head == MIX
    trusts = {} if is_plain else {"trust_remote_code": True}
    if not is_plain:
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            pipeline("audio-classification", model=str(folder))
    classify = pipeline("audio-classification", model=str(folder), top_k=None, **trusts)
    said = classify({"array": wave[0].numpy().astype(np.float32) / 32768, "sampling_rate": RATE})
    scores = {item["label"]: item["score"] for item in said}
    wanted = logits.double().softmax(1)[0].tolist()
    assert [scores[genre] for genre in GENRES] == pytest.approx(wanted, abs=1e-4)
    with torch.no_grad():
        theirs = classify.model(classifier._inputs(wave)).logits
    torch.testing.assert_close(theirs, logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "family",
    [f if f in SHOWN else slow(f) for f in FAMILIES if f not in ("sew", "sew-d")],
)
def test_the_dry_run_counts_heads(family: str, tmp_path: Path) -> None:
    name = write(tmp_path, family)
    settings: dict[str, Any] = {"freeze": freeze_of(family), "frozen_layers": None}
    settings |= {"activation_checkpointing": False, "segment_samples": SAMPLES}
    plain, headed, lower = (
        model.describe_main(str(name), GENRES, head=head, **settings)
        for head in (HeadConfig(), BOTH, HeadConfig(from_layer=1))
    )
    whole = build_tiny(name, GENRES, freeze=freeze_of(family), head=BOTH)
    assert count_parts(headed) == count_parts(whole)
    width = plain.net.config.hidden_size
    more = count_parts(headed)["head"][0] - count_parts(plain)["head"][0]
    assert more == width + 3, "a score of a frame, and weights of 2 layers and their input"
    assert activation_bytes(headed, 2, SAMPLES) > activation_bytes(plain, 2, SAMPLES)
    work, of_plain = flops.count(headed, SAMPLES), flops.count(plain, SAMPLES)
    frames = classifier_frames(whole)
    assert work.forward == of_plain.forward + 2 * frames * width
    assert "layer 1" in of_plain.parts
    assert "layer 1" not in flops.count(lower, SAMPLES).parts


def classifier_frames(classifier: WaveClassifier) -> int:
    with torch.no_grad():
        found = classifier.kind.base(classifier._inputs(waves()))
    return int(found.last_hidden_state.shape[1])


@pytest.mark.parametrize("family", [f if f in SHOWN else slow(f) for f in FAMILIES])
def test_a_named_layer_is_the_model_that_ends_there(family: str, tmp_path: Path) -> None:
    """A checkpoint of two layers, read at the first one, is that of a model with one layer."""
    freeze = freeze_of(family)
    source = build_tiny(write(tmp_path, family), GENRES, freeze=freeze, seed=5)
    exported.save_exported(source, dict(source.state_dict()), tmp_path / "two", RATE)
    read = build_tiny(tmp_path / "two", GENRES, freeze=freeze, head=HeadConfig(from_layer=1)).eval()
    theirs = source.net.state_dict()
    assert all(value.equal(theirs[name]) for name, value in read.net.state_dict().items())
    layers = {"num_hidden_layers": 1, "encoder_layers": 1}
    defaults = FAMILIES[family]().to_dict()
    one = {name: value for name, value in layers.items() if name in defaults}
    short = build_tiny(write(tmp_path, family, **one), GENRES, freeze=freeze).eval()
    short.net.load_state_dict(read.net.state_dict())
    with torch.no_grad():
        assert read(waves()).equal(short(waves()))
    if family in ("wav2vec2", "hubert", "unispeech"):  # their norm stands before the layers
        states = source.eval().kind.states(source._inputs(waves()))
        torch.testing.assert_close(read.kind.states(read._inputs(waves()))[-1], states[1])
    exported.save_exported(read, dict(read.state_dict()), tmp_path / "best", RATE)
    pipeline("audio-classification", model=str(tmp_path / "best"))


@pytest.mark.parametrize("family", ["wav2vec2", "whisper", AST])
def test_a_cache_below_attention_changes_nothing(family: str, tmp_path: Path) -> None:
    settings = {"freeze": "backbone", "cache": "trunk", "head": ATTENTION}
    classifier = drawn(build_tiny(write(tmp_path, family), GENRES, **settings))
    whole = classifier(waves())
    torch.testing.assert_close(classifier(classifier(waves(), only_below=True)), whole)
    of_mean = build_tiny(write(tmp_path, family), GENRES, freeze="backbone", cache="trunk")
    of_mean.load_state_dict(classifier.state_dict(), strict=False)
    if family != AST:  # of which the mean needs two tokens only
        assert kind.fingerprint(of_mean.net, "backbone") == kind.fingerprint(
            classifier.net, "backbone"
        )


@pytest.mark.parametrize("family", ["wav2vec2", "whisper", AST])
def test_a_cache_of_one_layer_is_refused_to_a_sum_over_all(family: str, tmp_path: Path) -> None:
    settings = {"freeze": "backbone", "cache": "trunk", "head": MIX}
    with pytest.raises(UserError, match=r"got a head that reads the states of all layers.*\n"):
        build_tiny(write(tmp_path, family), GENRES, **settings)
    if family == "wav2vec2":
        build_tiny(write(tmp_path, family), GENRES, **(settings | {"cache": "cnn"}))


def test_a_head_of_a_model_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    classifier = build_tiny(write(tmp_path, "wav2vec2"), GENRES, head=ATTENTION)
    folder = tmp_path / "best"
    exported.save_exported(classifier, dict(classifier.state_dict()), folder, RATE)
    file = folder / "config.json"
    for own in ("theirs", None):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"type_below_head": own}))
        with pytest.raises(UserError, match=rf"type_below_head is {own}"):
            exported.load_exported(folder)


def test_adapters_leave_the_head_trained(tmp_path: Path) -> None:
    lora = Lora(r=2, alpha=4.0, targets=())
    settings = {"freeze": "feature_encoder", "head": BOTH, "lora": lora}
    classifier = build_tiny(write(tmp_path, "wav2vec2"), GENRES, **settings)
    trained = {name for name, p in classifier.named_parameters() if p.requires_grad}
    assert {"net.layer_weights", "net.projector.score.weight"} < trained
    assert all("lora" in name for name in trained if name.startswith("net.wav2vec2."))
    drawn(classifier)
    exported.save_exported(classifier, dict(classifier.state_dict()), tmp_path / "best", RATE)
    with torch.no_grad():
        found = exported.load_exported(tmp_path / "best")(waves())
        torch.testing.assert_close(found, classifier(waves()), rtol=0, atol=1e-6)


def test_custom_code_gets_heads(tmp_path: Path) -> None:
    name = write_mert(tmp_path / "MERT")
    for head in (ATTENTION, MIX, BOTH, HeadConfig(from_layer=1)):
        classifier = drawn(build_custom(name, head=head))
        wanted = by_hand(classifier, custom_waves(), head)
        np.testing.assert_allclose(classifier(custom_waves()).detach(), wanted, atol=2e-5)
        folder = tmp_path / f"best {head}"
        exported.save_exported(classifier, dict(classifier.state_dict()), folder, 24_000)
        loaded = exported.load_exported(folder, trust_remote_code=True)
        assert loaded(custom_waves()).equal(classifier(custom_waves()))


def test_a_whole_file_is_predicted_without_mgc_dist(tmp_path: Path) -> None:
    """From the folder that genre.py lies in, whose code runs as genre.py does; from no other."""
    classifier = drawn(build_tiny(write(tmp_path, "wav2vec2"), GENRES, head=ATTENTION))
    folder = tmp_path / "best"
    exported.save_exported(classifier, dict(classifier.state_dict()), folder, RATE)
    with pytest.raises(ValueError, match="trust_remote_code"):
        GenreClassifier(folder)
    shutil.copyfile(genre_file.__file__, folder / "genre.py")
    told = runpy.run_path(str(folder / "genre.py"))["GenreClassifier"](folder)
    wave = waves()[0]
    found = told(wave.numpy().astype(np.float32) / 32768)["probabilities"]
    wanted = classifier(wave[None]).double().softmax(1)[0].tolist()
    assert [found[genre] for genre in GENRES] == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (HeadConfig(from_layer=3), r"--from-layer 3: got 3, expected 1 to 2 .*\n  leave it out"),
        (HeadConfig(from_layer=2), ""),
    ],
)
def test_a_layer_that_is_not_there_is_refused(head: HeadConfig, words: str, tmp_path: Path) -> None:
    name = write_model(tmp_path / "m.json")
    if not words:
        build_tiny(name, head=head)
        return
    with pytest.raises(UserError, match=words):
        build_tiny(name, head=head)


def test_a_model_without_layers_has_its_own_head(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--pooling attention and --layer-mix with --model logmel"):
        build_tiny("logmel-cnn", head=BOTH)
