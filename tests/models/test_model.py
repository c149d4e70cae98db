"""Both flavours of wav2vec2, checkpoints of other tasks, freezing, export, refusals."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BASE_FLAVOUR, TINY, build_tiny, write_model
from transformers import (
    AutoModelForAudioClassification,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2Model,
    pipeline,
)

from mgc_dist.encoders import hub
from mgc_dist.encoders.hub import normalise
from mgc_dist.errors import UserError
from mgc_dist.models import folder as exported
from mgc_dist.models import main as model
from mgc_dist.models.backbone import build_bias, fingerprint

GENRES = ("blues", "jazz", "rock")
RATE = 16_000


def build(name: Path | str, **changes) -> model.WaveClassifier:
    return build_tiny(name, GENRES, **changes)


def waves(batch: int = 4, samples: int = 8000, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(-9000, 9000, (batch, samples)).astype(np.int16))


@pytest.fixture(params=["large", "base"])
def checkpoint(request, tmp_path: Path) -> Path:
    """A saved ForCTC checkpoint (large flavour) or bare backbone (base flavour)."""
    settings = {k: v for k, v in TINY.items() if k != "model_type"}
    torch.manual_seed(1)
    if request.param == "large":
        net = Wav2Vec2ForCTC(Wav2Vec2Config(**settings, vocab_size=12))
    else:
        net = Wav2Vec2Model(Wav2Vec2Config(**(settings | BASE_FLAVOUR)))
    net.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_normalise_is_the_feature_extractors(tmp_path: Path) -> None:
    wave = waves()
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True, sampling_rate=RATE)
    floats = [row.numpy().astype(np.float32) / 32768 for row in wave]
    expected = extractor(floats, sampling_rate=RATE, return_tensors="np").input_values
    assert normalise(wave).numpy() == pytest.approx(expected, abs=1e-5)
    assert normalise(torch.zeros(1, 8000, dtype=torch.int16)).abs().max() == 0


def test_backbone_weights_come_from_the_checkpoint(checkpoint: Path) -> None:
    classifier = build(checkpoint)
    source = Wav2Vec2Model.from_pretrained(checkpoint).state_dict()
    loaded = classifier.net.base_model.state_dict()
    assert {name for name in source if not loaded[name].equal(source[name])} == set()
    assert classifier.genres == GENRES
    assert classifier.net.config.layerdrop == 0.0
    assert classifier(waves()).shape == (4, 3)
    again = build(checkpoint).state_dict()
    assert all(again[name].equal(value) for name, value in classifier.state_dict().items())
    other = build(checkpoint, seed=1).state_dict()
    assert not other["net.classifier.weight"].equal(again["net.classifier.weight"])


def test_a_checkpoint_of_another_architecture_is_refused(checkpoint: Path) -> None:
    config = checkpoint / "config.json"
    text = config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
    config.write_text(text)
    with pytest.raises(UserError, match=r"a checkpoint without 16 weights such as wav2vec2\.enc"):
        build(checkpoint)


@pytest.mark.parametrize("flavour", [{}, BASE_FLAVOUR])
@pytest.mark.parametrize("freeze", ["feature_encoder", "layers:1", "layers:2", "backbone"])
def test_frozen_parts_get_no_gradient_no_noise_and_no_backward_pass(
    flavour: dict, freeze: str, tmp_path: Path
) -> None:
    noisy = {"hidden_dropout": 0.5, "attention_dropout": 0.5, "feat_proj_dropout": 0.5}
    layers = int(freeze[-1]) if freeze.startswith("layers") else None
    name = write_model(tmp_path / "x.json", **flavour, **noisy)
    classifier = build(name, freeze=freeze, frozen_layers=layers).train()
    base = classifier.net.base_model
    boundary = {
        "feature_encoder": base.feature_extractor,
        "layers:1": base.encoder.layers[0],
        "layers:2": base.encoder.layers[1],
        "backbone": base,
    }[freeze]
    outputs = []

    def keep(module, args, output) -> None:
        outputs.append(getattr(output, "last_hidden_state", output))

    boundary.register_forward_hook(keep)
    classifier(waves()).sum().backward()
    classifier(waves())
    assert not outputs[0].requires_grad  # autograd never goes below it
    assert outputs[0].equal(outputs[1])  # dropout below it is off
    head, backbone = classifier.head_and_backbone()
    for name, parameter in classifier.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
        else:
            assert parameter.grad is None, name
    assert len(head) == 4
    # the base flavour has no norm behind its layers, so freezing both leaves nothing
    empty = freeze == "backbone" or (freeze == "layers:2" and flavour == BASE_FLAVOUR)
    assert (len(backbone) == 0) == empty


def test_more_frozen_layers_than_there_are_is_refused(tiny_model: Path) -> None:
    with pytest.raises(UserError, match=r"--freeze layers:3: got 3, expected 1 to 2"):
        build(tiny_model, freeze="layers:3", frozen_layers=3)


def test_activation_checkpointing_changes_no_gradient(tiny_model: Path) -> None:
    grads = []
    for on in (False, True):
        classifier = build(
            tiny_model, activation_checkpointing=on, freeze="feature_encoder"
        ).train()
        classifier(waves()).square().sum().backward()
        grads.append([p.grad for p in classifier.parameters() if p.requires_grad])
    assert all(a.equal(b) for a, b in zip(*grads, strict=True))


def test_export_loads_strictly_and_gives_the_same_logits_in_pipeline(
    tiny_model: Path, tmp_path: Path
) -> None:
    classifier = build(tiny_model).eval()
    weights = {name: value.clone() for name, value in classifier.state_dict().items()}
    folder = tmp_path / "best"
    for _ in range(2):  # a second export replaces the first
        exported.save_exported(classifier, weights, folder, RATE)
    loaded = exported.load_exported(folder)
    wave = waves()
    with torch.no_grad():
        logits = classifier(wave)
        assert loaded(wave).equal(logits)
    assert loaded.genres == GENRES
    assert loaded.segment_samples == 8000
    assert exported.sample_rate_of(folder) == RATE
    classify = pipeline("audio-classification", model=str(folder), top_k=None)
    for row, truth in zip(wave.numpy(), logits.double().softmax(1), strict=True):
        found = classify({"array": row.astype(np.float32) / 32768, "sampling_rate": RATE})
        scores = {item["label"]: item["score"] for item in found}
        assert [scores[g] for g in GENRES] == pytest.approx(truth.tolist(), abs=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best"]
    (tmp_path / "new").touch()  # with the mode that umask gives
    modes = {path.stat().st_mode for path in (tmp_path / "new", *folder.iterdir())}
    assert len(modes) == 1, "others may read the weights if they may read the rest"


def test_a_head_of_other_labels_is_renewed_and_one_of_the_same_is_kept(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A warm start from an export: of as many genres, by other names or in another order."""
    caplog.set_level("INFO", "mgc_dist")
    first = build(tiny_model)
    trained = {k: v + 1 if "classifier" in k else v for k, v in first.state_dict().items()}
    exported.save_exported(first, trained, tmp_path / "best", RATE)
    same = build(tmp_path / "best").state_dict()
    assert all(same[name].equal(value) for name, value in trained.items())
    assert "is kept: its labels are the genres of the shards" in caplog.text
    for genres in (("rock", "jazz", "blues"), ("a", "b", "c")):
        caplog.clear()
        heads = [build_tiny(tmp_path / "best", genres, seed=n).state_dict() for n in (0, 0, 1)]
        weights = [head["net.classifier.weight"] for head in heads]
        assert float(weights[0].abs().max()) < 0.5, "drawn anew: the trained ones are about 1"
        assert not heads[0]["net.classifier.bias"].any()
        assert weights[0].equal(weights[1])
        assert not weights[0].equal(weights[2])
        assert heads[0]["net.projector.weight"].equal(trained["net.projector.weight"])
        assert "is renewed: its labels are blues, jazz, rock, and the genres of" in caplog.text
        assert f"the genres of the shards {', '.join(genres)}" in caplog.text
        assert "new weights, the rest from" in caplog.text
        assert ": classifier.bias, classifier.weight" in caplog.text


class Killed(BaseException):
    """In place of SIGKILL."""


def test_a_kill_between_two_renames_leaves_a_best_model(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (build(tiny_model, seed=seed) for seed in (0, 1))
    best = tmp_path / "best"
    (tmp_path / "config.yaml").touch()
    exported.save_exported(first, dict(first.state_dict()), best, RATE)
    rename = Path.rename

    def killed(self: Path, target: Path) -> Path:
        if self.suffix == ".tmp":
            raise Killed
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(Killed):
        exported.save_exported(second, dict(second.state_dict()), best, RATE)
    monkeypatch.undo()
    assert not best.exists()
    wave = waves()
    with torch.no_grad():
        found = exported.load_exported(exported.find_exported(tmp_path))
        assert found(wave).equal(first.eval()(wave)), "the one before it"
        exported.settle(best)
        assert exported.load_exported(best)(wave).equal(first(wave))
        exported.save_exported(second, dict(second.state_dict()), best, RATE)
        assert exported.load_exported(exported.find_exported(tmp_path))(wave).equal(
            second.eval()(wave)
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "config.yaml"]


def test_the_temperature_travels_with_the_export(tiny_model: Path, tmp_path: Path) -> None:
    classifier = build(tiny_model)
    weights = dict(classifier.state_dict())
    for temperature in (None, 1.75, 2.5):
        exported.save_exported(
            classifier, weights, tmp_path / "best", RATE, temperature=temperature
        )
        assert exported.load_exported(tmp_path / "best").temperature == temperature
    assert classifier.temperature is None  # the live model's configuration is not touched


def test_export_without_all_weights_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    classifier = build(tiny_model)
    weights = dict(classifier.state_dict())
    weights.pop("net.classifier.bias")
    with pytest.raises(RuntimeError, match="Missing key"):
        exported.save_exported(classifier, weights, tmp_path / "best", RATE)
    with pytest.raises(UserError, match=r"no such folder.*\n.*launch/train\.py"):
        exported.load_exported(tmp_path / "best")
    AutoModelForAudioClassification.from_config(classifier.net.config).save_pretrained(
        tmp_path / "foreign"
    )
    (tmp_path / "foreign" / "config.json").write_text(
        (tmp_path / "foreign" / "config.json").read_text().replace("segment_samples", "x")
    )
    with pytest.raises(UserError, match="segment_samples"):
        exported.load_exported(tmp_path / "foreign")


def test_missing_models_say_how_to_bring_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"facebook/wav2vec2-large.*\n.*bring that folder"):
        build("facebook/wav2vec2-large-960h-lv60-self")
    with pytest.raises(UserError, match=r"--model .*none\.json"):
        build(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text('{"model_type": "wav3vec"}')
    with pytest.raises(UserError, match="with model_type"):
        build(tmp_path / "bad.json")


def test_half_a_download_is_refused(checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"files that cannot be read.*\n.*download it again"):
        build(checkpoint)
    with pytest.raises(UserError, match=r"files that cannot be read.*\n.*download it again"):
        build_bias(str(checkpoint), segment_samples=8000, sample_rate=RATE)


def test_models_that_would_be_wrong_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"segments of 300 samples.*got 0 frames"):
        build(tiny_model, segment_samples=300)
    masked = write_model(tmp_path / "m.json", apply_spec_augment=True, mask_time_prob=0.1)
    with pytest.raises(UserError, match="at least 10"):
        build(masked, segment_samples=3200)


def test_another_sample_rate_is_refused(checkpoint: Path) -> None:
    Wav2Vec2FeatureExtractor(sampling_rate=8000).save_pretrained(checkpoint)
    with pytest.raises(UserError, match=r"got 16000 Hz, expected 8000 Hz"):
        build(checkpoint)


@pytest.mark.parametrize("kind", ["hubert", "wavlm", "data2vec-audio", "unispeech-sat"])
def test_relatives_of_wav2vec2_train_and_freeze(kind: str, tmp_path: Path) -> None:
    extra = {"conv_pos_kernel_size": 3} if kind == "data2vec-audio" else {}
    name = write_model(tmp_path / "x.json", model_type=kind, **extra)
    for freeze, layers in (("feature_encoder", None), ("layers:1", 1), ("backbone", None)):
        classifier = build(name, freeze=freeze, frozen_layers=layers).train()
        logits = classifier(waves(2))
        assert logits.shape == (2, 3)
        logits.sum().backward()
        for parameter_name, parameter in classifier.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, parameter_name


def test_the_norm_is_frozen_by_where_it_stands_not_by_what_the_config_says(tmp_path: Path) -> None:
    extra = {"model_type": "data2vec-audio", "conv_pos_kernel_size": 3}
    classifier = build(
        write_model(tmp_path / "x.json", **extra), freeze="layers:1", frozen_layers=1
    )
    assert classifier.net.config.do_stable_layer_norm, "which its encoder does not look at"
    assert not classifier.net.base_model.encoder.layer_norm.weight.requires_grad


def test_bias_backbones_pool_every_layer_over_time(checkpoint: Path) -> None:
    logmel = build_bias("logmel", segment_samples=8000, sample_rate=RATE)
    assert logmel(waves()).shape == (4, logmel.layers, logmel.width) == (4, 1, 40)
    assert logmel(waves()).equal(logmel(waves()))
    net = Wav2Vec2Model.from_pretrained(checkpoint).eval()
    with torch.no_grad():
        layers = net(normalise(waves()), output_hidden_states=True).hidden_states
    backbone = build_bias(str(checkpoint), segment_samples=8000, sample_rate=RATE)
    found = backbone(waves())
    assert found.shape == (4, backbone.layers, backbone.width) == (4, 3, 32)
    for layer in range(3):
        torch.testing.assert_close(found[:, layer], layers[layer].mean(1))


def test_fingerprint_sees_weights_and_settings_but_not_the_path(
    checkpoint: Path, tmp_path: Path
) -> None:
    def hashed(folder: Path) -> str:
        return fingerprint(
            build_bias(str(folder), segment_samples=8000, sample_rate=RATE), "pass float32"
        )

    backbone = build_bias(str(checkpoint), segment_samples=8000, sample_rate=RATE)
    first = fingerprint(backbone, "pass float32")
    moved = checkpoint.rename(tmp_path / "moved")
    assert hashed(moved) == first
    assert fingerprint(backbone, "pass bfloat16") != first
    Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(moved)
    assert hashed(moved) != first
    (moved / "preprocessor_config.json").unlink()
    config = moved / "config.json"  # now masks in training: a vector that the file does not hold
    config.write_text(config.read_text().replace('"mask_time_prob": 0.0', '"mask_time_prob": 0.1'))
    assert hashed(moved) == hashed(moved) != first
    with torch.no_grad():
        next(backbone.parameters()).view(-1)[0] += 1e-6
    assert fingerprint(backbone, "pass float32") != first
    rates = {
        fingerprint(build_bias("logmel", segment_samples=8000, sample_rate=r)) for r in (8000, RATE)
    }
    assert len(rates) == 2


def write_custom_code(folder: Path, mark: Path) -> Path:
    """A model folder whose own code writes a file when it runs."""
    folder.mkdir()
    settings = {
        "model_type": "music-of-theirs",
        "architectures": ["Theirs"],
        "auto_map": {
            "AutoConfig": "theirs.TheirConfig",
            "AutoModel": "theirs.Theirs",
            "AutoModelForAudioClassification": "theirs.Theirs",
            "AutoFeatureExtractor": "theirs.TheirExtractor",
        },
    }
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    code = f"""open({str(mark)!r}, "w").close()
from transformers import PretrainedConfig
class TheirConfig(PretrainedConfig):
    model_type = "music-of-theirs"
"""
    (folder / "theirs.py").write_text(code)
    return folder


def test_custom_code_never_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal it used to ask, and to run the folder's code after a "y"."""
    asked, mark = [], tmp_path / "ran"
    monkeypatch.setattr("builtins.input", lambda *words: asked.append(words) or "y")
    folder = str(write_custom_code(tmp_path / "theirs", mark))
    loads = (
        lambda: build(folder),
        lambda: model.describe_main(
            folder,
            GENRES,
            freeze="none",
            frozen_layers=None,
            activation_checkpointing=False,
            segment_samples=8000,
        ),
        lambda: build_bias(folder, segment_samples=8000, sample_rate=RATE),
        lambda: hub.feature_extractor(folder, RATE),
        lambda: exported.load_exported(Path(folder)),
    )
    for load in loads:
        with pytest.raises(
            UserError, match="expected a model whose code is in transformers"
        ) as error:
            load()
        assert "a model with custom code (`auto_map` in its config.json)" in str(error.value)
        assert "hf download" not in str(error.value)
    assert not asked
    assert not mark.exists()


@pytest.mark.parametrize("name", ["wav2vec2-demo", "launch/presets/wav2vec2-demo.json"])
def test_the_packages_small_model_has_its_old_name_too(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert build(name).net.config.hidden_size == 64
    (tmp_path / "launch" / "presets").mkdir(parents=True)  # a user's own goes first
    write_model(tmp_path / "launch" / "presets" / "wav2vec2-demo.json")
    own = build("launch/presets/wav2vec2-demo.json").net.config
    assert own.hidden_size == TINY["hidden_size"]


class Foreign:
    """What a stranger may have pickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("kind", ["code", "cut", "empty", "text"])
def test_weights_that_are_no_tensors_are_refused_in_words(
    kind: str, checkpoint: Path, tmp_path: Path
) -> None:
    (checkpoint / "model.safetensors").unlink()
    weights = checkpoint / "pytorch_model.bin"
    if kind == "code":
        torch.save({"a": Foreign(tmp_path / "ran")}, weights)
    else:
        weights.write_bytes({"cut": b"PK\x03\x04abc", "empty": b"", "text": b"hello"}[kind])
    with pytest.raises(UserError, match=f"model {checkpoint}: got "):
        build_bias(str(checkpoint), segment_samples=8000, sample_rate=RATE)
    assert not (tmp_path / "ran").exists()
