"""Every audio classifier of transformers, from its own default configuration made small."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from conftest import bias_config, build_tiny, make_table, run_ranks
from harness import slow
from trainings import config, losses, train_on
from transformers import (
    ASTFeatureExtractor,
    AutoModel,
    PretrainedConfig,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    pipeline,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING

from mgc_dist.bias_model import table
from mgc_dist.data import manifest
from mgc_dist.errors import UserError
from mgc_dist.models import flops
from mgc_dist.models import folder as exported
from mgc_dist.models import main as model
from mgc_dist.models.backbone import build_bias
from mgc_dist.models.exported import GenreClassifier
from mgc_dist.models.predictor import Predictor
from mgc_dist.training.forecast import activation_bytes, count_parts

GENRES = ("blues", "jazz", "rock")
RATE = 16_000
SAMPLES = 8000
FAMILIES = {
    config.model_type: config
    for config in MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING
    if config.__module__.startswith("transformers.")
}
SMALL: dict[str, Any] = {
    **{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"intermediate_size": 32, "conv_dim": 16, "num_conv_pos_embeddings": 8},
    **{"num_conv_pos_embedding_groups": 2, "classifier_proj_size": 16, "output_hidden_size": 16},
    **{"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32},
    **{"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32},
    **{"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    **{"decoder_start_token_id": 1, "max_length": 100},
}
FREEZES = {"none": None, "feature_encoder": None, "layers:1": 1, "backbone": None}


def small(kind: str) -> dict[str, Any]:
    """Settings of a family: its defaults, but for the sizes."""
    defaults = FAMILIES[kind]().to_dict()
    settings = {name: value for name, value in SMALL.items() if name in defaults}
    if "conv_dim" in settings:
        settings["conv_dim"] = [16] * len(defaults["conv_dim"])
    return settings | {"model_type": kind}


def write(folder: Path, kind: str, **changes: Any) -> Path:
    path = folder / f"{kind}.json"
    path.write_text(json.dumps(small(kind) | changes))
    return path


def waves(rows: int = 2, samples: int = SAMPLES, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(-9000, 9000, (rows, samples)).astype(np.int16))


def freeze_of(kind: str) -> str:
    """What can be trained of a family: the conformer's norms must be frozen."""
    return "backbone" if kind == "wav2vec2-conformer" else "feature_encoder"


def test_there_are_twelve() -> None:
    assert len(FAMILIES) == 12, "a new one: does it train?"


@pytest.mark.parametrize("freeze", FREEZES)
@pytest.mark.parametrize("kind", FAMILIES)
def test_each_trains_and_freezes(kind: str, freeze: str, tmp_path: Path) -> None:
    name = write(tmp_path, kind)
    settings: dict[str, Any] = {"freeze": freeze, "frozen_layers": FREEZES[freeze]}
    if kind == "wav2vec2-conformer" and freeze != "backbone":
        with pytest.raises(UserError, match=r"BatchNorm layers in training.*\n.*--freeze backbone"):
            build_tiny(name, GENRES, **settings)
        return
    classifier = build_tiny(name, GENRES, **settings).train()
    logits = classifier(waves())
    assert logits.shape == (2, 3)
    logits.square().sum().backward()
    for parameter_name, parameter in classifier.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, parameter_name
    head, backbone = classifier.head_and_backbone()
    assert head
    assert bool(backbone) == (freeze != "backbone")
    if freeze == "none":
        layers = classifier.backbone_by_layer()
        assert set(layers) == {0, 1, 2}, "above the last, above the first, above all below them"


def noise_of(kind: str) -> dict[str, float]:
    """Settings of a family: dropout wherever it has some."""
    return {
        name: 0.5
        for name, value in FAMILIES[kind]().to_dict().items()
        if "dropout" in name and isinstance(value, int | float)
    }


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_is_frozen_gives_the_same_at_every_step(kind: str, tmp_path: Path) -> None:
    """With dropout everywhere that a family has it, and its masks."""
    name = write(tmp_path, kind, **noise_of(kind))
    classifier = build_tiny(name, GENRES, freeze="backbone").train()
    boundary = classifier.kind.base
    seen: list[torch.Tensor] = []
    boundary.register_forward_hook(lambda m, i, out: seen.append(out.last_hidden_state))
    for _ in range(2):
        classifier(waves())
    assert seen[0].equal(seen[1])
    assert not seen[0].requires_grad


@pytest.mark.parametrize("kind", FAMILIES)
def test_an_export_gives_the_same_wherever_it_is_loaded(kind: str, tmp_path: Path) -> None:
    classifier = build_tiny(write(tmp_path, kind), GENRES, freeze=freeze_of(kind)).eval()
    folder = tmp_path / "best"
    exported.save_exported(classifier, dict(classifier.state_dict()), folder, RATE)
    first, second = exported.load_exported(folder), exported.load_exported(folder)
    wave = waves()
    with torch.no_grad():
        logits = classifier(wave)
        assert first(wave).equal(logits)
        assert second(wave).equal(logits)
    assert exported.sample_rate_of(folder) == RATE
    wanted = logits.double().softmax(1)
    classify = pipeline("audio-classification", model=str(folder), top_k=None)
    for row, truth in zip(wave.numpy(), wanted, strict=True):
        found = classify({"array": row.astype(np.float32) / 32768, "sampling_rate": RATE})
        scores = {item["label"]: item["score"] for item in found}
        assert [scores[g] for g in GENRES] == pytest.approx(truth.tolist(), abs=1e-4)
    soundfile.write(tmp_path / "a.wav", wave[0].numpy(), RATE, subtype="PCM_16")
    told = Predictor.load(folder, torch.device("cpu")).predict(
        tmp_path / "a.wav", hop_s=1.5, batch=2
    )
    assert told.mean == pytest.approx(wanted[0].numpy(), abs=1e-6)
    alone = GenreClassifier(folder)(tmp_path / "a.wav")["probabilities"]
    assert [alone[g] for g in GENRES] == pytest.approx(wanted[0].tolist(), abs=1e-4)


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_dry_run_knows_each(kind: str, tmp_path: Path) -> None:
    name, freeze = write(tmp_path, kind), freeze_of(kind)
    empty = model.describe_main(
        str(name),
        GENRES,
        freeze=freeze,
        frozen_layers=None,
        activation_checkpointing=False,
        segment_samples=SAMPLES,
    )
    work = flops.count(empty, SAMPLES)
    assert set(work.parts) >= {"layer 0", "layer 1", "head"}
    assert work.training > work.forward
    parts = count_parts(empty)
    assert parts["layer 0"][0] > 0
    whole = build_tiny(name, GENRES, freeze=freeze)
    assert parts == count_parts(whole)
    assert activation_bytes(empty, 2, SAMPLES) > 0


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_cache_below_the_head_changes_nothing(kind: str, tmp_path: Path) -> None:
    classifier = build_tiny(write(tmp_path, kind), GENRES, freeze="backbone", cache="trunk").train()
    wave = waves()
    whole = classifier(wave)
    torch.testing.assert_close(classifier(classifier(wave, only_below=True)), whole)


@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if kind != "sew-d"])
def test_a_cut_at_a_layer_changes_nothing(kind: str, tmp_path: Path) -> None:
    """With dropout above it and below, where it is off; of the conformer all layers are frozen."""
    layers = 2 if kind == "wav2vec2-conformer" else 1
    name = write(tmp_path, kind, **(noise_of(kind) | {"apply_spec_augment": False}))
    classifier = build_tiny(
        name, GENRES, freeze=f"layers:{layers}", frozen_layers=layers, cache="trunk"
    ).train()
    wave = waves()
    torch.manual_seed(1)
    whole = classifier(wave)
    torch.manual_seed(2)
    inner = classifier(wave, only_below=True)
    assert not inner.requires_grad
    torch.manual_seed(1)
    torch.testing.assert_close(classifier(inner), whole)
    work = flops.count(classifier, SAMPLES)
    above = set(work.above(f"layers:{layers}").parts)
    assert "head" in above
    assert ("layer 0" in above, "layer 1" in above) == (False, layers == 1)
    cut = classifier.kind.cut
    below = {id(p) for m in cut.modules_below(f"layers:{layers}").values() for p in m.parameters()}
    named = dict(classifier.kind.base.named_parameters())
    named.pop("masked_spec_embed", None)
    assert {n for n, p in named.items() if id(p) in below} == {
        n for n, p in named.items() if not p.requires_grad
    }


@pytest.mark.parametrize(
    ("kind", "freeze", "cache"),
    [
        ("sew-d", "layers:1", "trunk"),
        ("whisper", "feature_encoder", "cnn"),
        ("audio-spectrogram-transformer", "layers:1", "cnn"),
        ("wav2vec2-bert", "feature_encoder", "trunk"),
    ],
)
def test_a_cut_that_a_family_does_not_have_is_refused(
    kind: str, freeze: str, cache: str, tmp_path: Path
) -> None:
    name = write(tmp_path, kind, apply_spec_augment=False)
    settings = {"freeze": freeze, "frozen_layers": FREEZES[freeze], "cache": cache}
    words = rf"--cache {cache} with --freeze {freeze}: got .*\n  use --"
    with pytest.raises(UserError, match=words):
        build_tiny(name, GENRES, **settings)


def test_masks_below_a_layer_of_w2v_bert_are_refused(tmp_path: Path) -> None:
    name = write(tmp_path, "wav2vec2-bert")
    settings: dict[str, Any] = {"freeze": "layers:1", "frozen_layers": 1, "cache": "trunk"}
    with pytest.raises(UserError, match=r"got SpecAugment .*\n  use --no-spec-augment"):
        build_tiny(name, GENRES, **settings)
    build_tiny(name, GENRES, spec_augment=False, **settings)


@pytest.mark.parametrize("kind", FAMILIES)
def test_weights_come_from_a_checkpoint_of_another_task(kind: str, tmp_path: Path) -> None:
    config: PretrainedConfig = FAMILIES[kind](**small(kind))
    torch.manual_seed(1)
    whole = WhisperForConditionalGeneration if kind == "whisper" else AutoModel.from_config
    source = whole(config).eval()
    source.save_pretrained(tmp_path / "saved")
    name = tmp_path / "saved"
    classifier = build_tiny(name, GENRES, freeze=freeze_of(kind), segment_samples=RATE)
    theirs = source.model.encoder if kind == "whisper" else source
    held = theirs.state_dict()
    for key, value in classifier.kind.base.state_dict().items():
        wanted = held[key][: len(value)] if key == "embed_positions.weight" else held[key]
        assert value.equal(wanted), key
    again = build_tiny(name, GENRES, freeze=freeze_of(kind), segment_samples=RATE)
    with torch.no_grad():
        assert classifier.eval()(waves(2, RATE)).equal(again.eval()(waves(2, RATE)))


def test_whisper_gets_the_seconds_of_a_segment(tmp_path: Path) -> None:
    """Its own model, cut nowhere, gives the same for a segment of all its positions."""
    for samples, seconds in ((SAMPLES, 1), (RATE, 1), (RATE + 1, 2), (48_000, 3)):
        classifier = build_tiny(write(tmp_path, "whisper"), GENRES, segment_samples=samples)
        assert classifier.net.config.max_source_positions == 50 * seconds
        assert classifier(waves(1, samples)).shape == (1, 3)
    whole = build_tiny(
        write(tmp_path, "whisper", max_source_positions=100), GENRES, segment_samples=32_000
    )
    wave = waves(1, 32_000)
    extract = WhisperFeatureExtractor(feature_size=80, chunk_length=2)
    theirs = extract(wave[0].numpy().astype(np.float32) / 32768, sampling_rate=RATE)
    with torch.no_grad():
        wanted = whole.net.eval()(torch.from_numpy(theirs.input_features)).logits
        torch.testing.assert_close(whole.eval()(wave), wanted, rtol=0, atol=1e-5)


def test_whispers_layers_are_never_dropped(tmp_path: Path) -> None:
    name = write(tmp_path, "whisper", encoder_layerdrop=0.9)
    classifier = build_tiny(name, GENRES).train()
    assert classifier.net.encoder.layerdrop == 0.0


def test_asts_bands_are_standardised_as_its_checkpoint_says(tmp_path: Path) -> None:
    kind = "audio-spectrogram-transformer"
    AutoModel.from_config(FAMILIES[kind](**small(kind))).save_pretrained(tmp_path / "saved")
    wave = waves()
    floats = list(wave.numpy().astype(np.float32) / 32768)
    for settings in ({"mean": -3.0, "std": 2.0}, {"do_normalize": False}):
        extract = ASTFeatureExtractor(max_length=100, **settings)
        extract.save_pretrained(tmp_path / "saved")
        classifier = build_tiny(tmp_path / "saved", GENRES).eval()
        theirs = extract(floats, sampling_rate=RATE, return_tensors="pt").input_values
        found = classifier.kind.inputs(wave.float() / 32768)
        torch.testing.assert_close(found, theirs, rtol=0, atol=2e-3)
        folder = tmp_path / "best"
        exported.save_exported(classifier, dict(classifier.state_dict()), folder, RATE)
        with torch.no_grad():
            assert exported.load_exported(folder)(wave).equal(classifier(wave))


def test_the_head_of_an_ast_for_other_labels_is_renewed(tmp_path: Path) -> None:
    classifier = build_tiny(write(tmp_path, "audio-spectrogram-transformer"), GENRES)
    trained = {k: v + 1 if "dense" in k else v for k, v in classifier.state_dict().items()}
    exported.save_exported(classifier, trained, tmp_path / "best", RATE)
    kept = build_tiny(tmp_path / "best", GENRES).state_dict()
    assert kept["net.classifier.dense.weight"].equal(trained["net.classifier.dense.weight"])
    for genres in (("a", "b", "c"), ("a", "b")):
        renewed = build_tiny(tmp_path / "best", genres).state_dict()
        assert float(renewed["net.classifier.dense.weight"].abs().max()) < 0.5


def test_the_temperature_goes_into_the_last_layer_of_an_ast(tmp_path: Path) -> None:
    classifier = build_tiny(write(tmp_path, "audio-spectrogram-transformer"), GENRES).eval()
    folder = tmp_path / "best"
    exported.save_exported(classifier, dict(classifier.state_dict()), folder, RATE, temperature=2.0)
    loaded = exported.load_exported(folder)
    exported.save_calibrated(loaded, tmp_path / "plain", RATE)
    with torch.no_grad():
        wanted = loaded.calibrated(waves())
        torch.testing.assert_close(exported.load_exported(tmp_path / "plain")(waves()), wanted)


@pytest.mark.parametrize(
    ("kind", "changes", "samples", "words"),
    [
        ("whisper", {"max_source_positions": 100}, 32_001, r"got 2\.00006 s, expected at most 2 s"),
        ("audio-spectrogram-transformer", {}, 17_000, r"expected at most 1\.015 s"),
        ("audio-spectrogram-transformer", {}, 300, "got 0 frames"),
        ("wav2vec2-bert", {"apply_spec_augment": False}, 500, "got 0 frames"),
        ("wav2vec2-bert", {"mask_time_prob": 0.1}, 3200, "got 9 frames, expected at least 10"),
    ],
)
def test_segments_that_a_family_cannot_take_are_refused(
    kind: str, changes: dict[str, Any], samples: int, words: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=rf"segments of {samples} samples.*{words}.*\n  pack "):
        build_tiny(write(tmp_path, kind, **changes), GENRES, segment_samples=samples)


def test_bands_at_another_rate_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"24000 Hz, expected 16000 Hz\n.*--sample-rate 16000"):
        build_tiny(write(tmp_path, "whisper"), GENRES, sample_rate=24_000)


@pytest.mark.parametrize("kind", ["audio-spectrogram-transformer", "whisper", "wav2vec2-bert"])
def test_a_bias_model_hears_bands(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    whole = WhisperForConditionalGeneration if kind == "whisper" else AutoModel.from_config
    source = whole(FAMILIES[kind](**small(kind))).eval()
    source.save_pretrained(tmp_path / "saved")
    words = {"segment_samples": RATE, "sample_rate": RATE}
    found = build_bias(str(tmp_path / "saved"), **words)
    encoder = build_tiny(tmp_path / "saved", GENRES, freeze="backbone", segment_samples=RATE).eval()
    with torch.no_grad():
        states = encoder.kind.states(encoder._inputs(waves(2, RATE)))
        told = found(waves(2, RATE))
    assert told.shape == (2, found.layers, found.width) == (2, 3, 16)
    for layer, state in enumerate(states):
        torch.testing.assert_close(told[:, layer], state.mean(1))
    with pytest.raises(UserError, match=r"24000 Hz, expected 16000 Hz"):
        build_bias(str(tmp_path / "saved"), segment_samples=RATE, sample_rate=24_000)


def test_a_bias_table_is_made_of_bands(shards: Path, tmp_path: Path) -> None:
    kind = "audio-spectrogram-transformer"
    AutoModel.from_config(FAMILIES[kind](**small(kind))).save_pretrained(tmp_path / "saved")
    flags = {"backbone": str(tmp_path / "saved"), "bias_table": tmp_path / "table"}
    run_ranks(1, make_table, bias_config(shards, **flags))
    made = table.read(tmp_path / "table", manifest.read(shards))
    assert np.exp(made.log_probability).sum(axis=1) == pytest.approx(1, abs=1e-5)
    assert np.load(tmp_path / "table" / "hidden.npy").shape[1:] == (3, 16)


def test_frozen_weights_are_known_by_their_statistics_too(tmp_path: Path) -> None:
    """Of BatchNorm, which are no parameters."""
    name = write(tmp_path, "wav2vec2-conformer")
    one, same, other = (build_tiny(name, GENRES, freeze="backbone") for _ in range(3))
    for part, buffer in other.named_buffers():
        if part.endswith("layers.1.conv_module.batch_norm.running_mean"):
            buffer += 1e-3
    found = [model.frozen_fingerprint(each) for each in (one, same, other)]
    assert found[0] == found[1] != found[2]


NEW = ("audio-spectrogram-transformer", "wav2vec2-bert", "wav2vec2-conformer", "whisper")
"""Whose ways to train no other test has."""


@pytest.mark.parametrize(
    ("kind", "world", "stage"),
    [(kind, 2, 3) if kind in NEW else slow(kind, 2, 3) for kind in FAMILIES]
    + [slow(kind, 1, 0) for kind in FAMILIES],
)
def test_each_takes_two_steps(
    kind: str, world: int, stage: int, shards: Path, table: Path, tmp_path: Path
) -> None:
    settings = config(
        shards,
        write(tmp_path, kind),
        tmp_path / "run",
        zero_stage=stage,
        epochs=20 / 66,
        checkpoint_every_epochs=1.0,
        freeze=freeze_of(kind),
    )
    train_on(world, settings)
    assert len(losses(tmp_path / "run")) == 2
    told = exported.load_exported(exported.find_exported(tmp_path / "run"))
    assert told(waves()).shape[0] == 2


class PlantedConfig(Wav2Vec2Config):
    """As custom code has them."""

    model_type = "planted"


class Planted(Wav2Vec2ForSequenceClassification):
    """With tensors that no checkpoint holds."""

    config_class = PlantedConfig

    def __init__(self, config: PlantedConfig) -> None:
        super().__init__(config)
        table = torch.arange(1.0, 1.0 + config.classifier_proj_size)
        self.projector.register_buffer("table", table, persistent=False)
        self.projector.plain = table / 2
        self.projector.register_forward_hook(lambda m, i, out: out * m.table + m.plain)


def test_tensors_that_no_checkpoint_holds_are_what_the_code_makes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are left as memory happens to be, because models are built on the meta device."""
    classes = MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING
    monkeypatch.setitem(classes._extra_content, PlantedConfig, Planted)
    monkeypatch.setitem(CONFIG_MAPPING._extra_content, "planted", PlantedConfig)
    settings = small("wav2vec2") | {"model_type": "planted"}
    (tmp_path / "planted.json").write_text(json.dumps(settings))
    classifier = build_tiny(tmp_path / "planted.json", GENRES).eval()
    exported.save_exported(classifier, dict(classifier.state_dict()), tmp_path / "best", RATE)
    first, second = (exported.load_exported(tmp_path / "best") for _ in range(2))
    assert first.net.projector.table.tolist() == [float(n) for n in range(1, 17)]
    with torch.no_grad():
        wanted = classifier(waves())
        assert first(waves()).equal(wanted)
        assert second(waves()).equal(wanted)
