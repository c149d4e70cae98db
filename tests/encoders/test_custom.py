"""Models with code of their own: what runs when, and what becomes of them. Layout of MERT v1."""

import json
import secrets
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from conftest import build_tiny
from huggingface_hub import constants
from layouts import RATE, write_mert, write_mert2
from safetensors.torch import load_file
from trainings import config, losses, train_on
from transformers import Wav2Vec2FeatureExtractor, pipeline

from mgc_dist import export, predict
from mgc_dist.config import ExportConfig, PredictConfig
from mgc_dist.encoders import kind
from mgc_dist.errors import UserError
from mgc_dist.journal import read_environment
from mgc_dist.models import flops
from mgc_dist.models import folder as exported
from mgc_dist.models.exported import GenreClassifier
from mgc_dist.models.main import configuration, configuration_hash, describe_main
from mgc_dist.training.forecast import activation_bytes, count_parts

GENRES = ("blues", "jazz", "rock")


def build(name: Path | str, **changes: Any):
    settings = {"sample_rate": RATE, "segment_samples": 12_000, "trust_remote_code": True}
    return build_tiny(name, GENRES, **(settings | changes))


def waves(rows: int = 2) -> torch.Tensor:
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.integers(-9000, 9000, (rows, 12_000)).astype(np.int16))


LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "v1": write_mert,
    "v1 with bands": partial(write_mert, feature_extractor_cqt=True),
    "v2": write_mert2,
}
FREEZES = {"none": None, "feature_encoder": None, "layers:1": 1, "backbone": None}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_trusted_model_trains_and_freezes(layout: str, tmp_path: Path) -> None:
    name = LAYOUTS[layout](tmp_path / "MERT")
    held = load_file(name / "model.safetensors").keys()
    for freeze, layers in FREEZES.items():
        classifier = build(name, freeze=freeze, frozen_layers=layers).train()
        assert classifier.net.backbone.state_dict().keys() == held
        classifier(waves()).square().sum().backward()
        for part, parameter in classifier.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, part
        trained = {n for n, p in classifier.named_parameters() if p.requires_grad}
        assert not any("final_proj" in n or "predictor" in n or "mask_token" in n for n in trained)
        below = [n for n in trained if ".front." in n or ".feature_extractor." in n]
        assert bool(below) == (freeze == "none")
        assert any(".layers.0." in n for n in trained) == (freeze in ("none", "feature_encoder"))
        assert any(".layers.1." in n for n in trained) == (freeze != "backbone")
        if freeze == "none":
            assert set(classifier.backbone_by_layer()) == {0, 1, 2}
    assert classifier.needs_our_code


def test_the_dry_run_knows_code_of_ones_own(tmp_path: Path) -> None:
    for layout, write in LAYOUTS.items():
        name = str(write(tmp_path / layout))
        settings: dict[str, Any] = {"freeze": "feature_encoder", "frozen_layers": None}
        empty = describe_main(
            name, GENRES, segment_samples=12_000, activation_checkpointing=True,
            trust_remote_code=True, **settings,
        )  # fmt: skip
        whole = build(name, **settings)
        assert count_parts(empty) == count_parts(whole)
        work = flops.count(whole, 12_000)
        assert work.parts == flops.count(empty, 12_000).parts
        assert {"layer 0", "layer 1", "head", "feature_extractor"} <= set(work.parts)
        assert activation_bytes(empty, 2, 12_000) > 0
        assert whole(waves()).shape == (2, 3), "what the count has left behind"


def test_code_that_looks_at_numbers_is_counted_by_some(tmp_path: Path) -> None:
    wanted = flops.count(build(write_mert2(tmp_path / "plain")), 12_000)
    name = write_mert2(tmp_path / "MERT")
    code = name / "modeling_mert2.py"
    told = code.read_text()
    code.write_text(
        told.replace("spectrum = ", "assert input_values.isfinite().all()\n        spectrum = ")
    )
    assert flops.count(build(name), 12_000).parts == wanted.parts
    with pytest.raises(UserError, match=r"without numbers \(a dry run needs that\)"):
        describe_main(
            str(name), GENRES, freeze="none", frozen_layers=None, activation_checkpointing=False,
            segment_samples=12_000, trust_remote_code=True,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("import torch\n", "import torch, no_such_thing\n", "its own code when it is imported"),
        ("self.post_init()", "self.nothing", r"AttributeError of its own code when it is built"),
        ("bands = (spec", "bands = (spek", "NameError of its own code for a segment of 12000"),
        ("return BaseModelOutput(last,", "return BaseModelOutput(last[:, 0],", r"states of shape"),
        ("self.seen, self.table = 0, None", "self.seen, self.table = 0, [torch.ones(1)]", ""),
    ],
)
def test_what_fails_in_a_strangers_code_is_told(
    old: str, new: str, said: str, tmp_path: Path
) -> None:
    name = write_mert2(tmp_path / "MERT")
    code = name / "modeling_mert2.py"
    assert old in code.read_text()
    code.write_text(code.read_text().replace(old, new, 1))
    if not said:
        build(name)
        return
    with pytest.raises(UserError, match=rf"{said}.*\n"):
        build(name)


def test_code_without_activation_checkpointing_is_refused(tmp_path: Path) -> None:
    build(write_mert2(tmp_path / "has"), activation_checkpointing=True)
    name = write_mert2(tmp_path / "MERT")
    code = name / "modeling_mert2.py"
    told = code.read_text().replace("    gradient_checkpointing = False\n", "")
    code.write_text(told.replace("self.gradient_checkpointing and", "False and"))
    with pytest.raises(UserError, match=r"--activation-checkpointing .* got code that has none"):
        build(name, activation_checkpointing=True)


def test_the_cuts_of_code_of_ones_own(tmp_path: Path) -> None:
    """At the head only, but for what calls wav2vec2's parts in wav2vec2's order."""
    for layout, write in LAYOUTS.items():
        name = write(tmp_path / layout)
        classifier = build(name, freeze="backbone", cache="trunk").train()
        whole = classifier(waves())
        halves = classifier(classifier(waves(), only_below=True))
        torch.testing.assert_close(halves, whole)
        if layout == "v1":
            continue
        settings: dict[str, Any] = {"freeze": "layers:1", "frozen_layers": 1, "cache": "trunk"}
        with pytest.raises(UserError, match=r"--cache trunk with --freeze layers:1: .*\n  use --"):
            build(name, **settings)


def test_its_weights_and_its_tables_are_loaded(tmp_path: Path) -> None:
    name = write_mert(tmp_path / "MERT")
    source = load_file(name / "model.safetensors")
    first, second = build(name).eval(), build(name).eval()
    assert all(first.net.backbone.state_dict()[key].equal(value) for key, value in source.items())
    assert first.net.backbone.table.tolist() == [1.0, 2.0, 3.0, 4.0], "which no checkpoint holds"
    with torch.no_grad():
        assert first(waves()).equal(second(waves()))
        folder = tmp_path / "best"
        exported.save_exported(first, dict(first.state_dict()), folder, RATE)
        shutil.rmtree(name)
        loaded = exported.load_exported(folder, trust_remote_code=True)
        assert loaded(waves()).equal(first(waves()))
    with pytest.raises(UserError, match=r"custom code.*\n.*add --trust-remote-code$"):
        exported.load_exported(folder)


def test_rotary_rates_are_what_the_code_makes_them(tmp_path: Path) -> None:
    """They come up as memory happens to be: transformers builds on the meta device."""
    name = write_mert2(tmp_path / "MERT")
    first, second = build(name).eval(), build(name).eval()
    wanted = 1.0 / 10_000 ** (torch.arange(0, 8, 2).float() / 8)
    for layer in first.net.backbone.encoder.layers:
        assert layer.rotary.rates.equal(wanted)
    assert first.net.backbone.window.equal(torch.hann_window(960))
    folder = tmp_path / "best"
    exported.save_exported(first, dict(first.state_dict()), folder, RATE)
    with torch.no_grad():
        logits = first(waves())
        assert second(waves()).equal(logits)
        for _ in range(2):
            assert exported.load_exported(folder, trust_remote_code=True)(waves()).equal(logits)


def test_another_rate_names_the_one_that_it_wants(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"got 16000 Hz, expected 24000 Hz\n.*--sample-rate 24000"):
        build(write_mert(tmp_path / "MERT"), sample_rate=16_000)


def test_a_change_of_the_code_is_another_model(tmp_path: Path) -> None:
    name = write_mert(tmp_path / "MERT")
    said = configuration(str(name), GENRES, trust_remote_code=True)
    first = configuration_hash(said)
    assert configuration_hash(configuration(str(name), GENRES, trust_remote_code=True)) == first
    with (name / "modeling_MERT.py").open("a") as code:
        code.write("# another\n")
    assert configuration_hash(configuration(str(name), GENRES, trust_remote_code=True)) != first


def test_a_change_of_the_code_is_another_cache(tmp_path: Path) -> None:
    """With the same configuration and weights: what it makes of them is in the code."""
    found = []
    for number, factor in enumerate((1.0, 1.0, 2.0)):
        name = write_mert(tmp_path / f"{number}" / "MERT")
        code = (name / "modeling_MERT.py").read_text()
        (name / "modeling_MERT.py").write_text(code.replace("arange(1.0,", f"arange({factor},"))
        found.append(kind.fingerprint(build(name, freeze="backbone").net, "backbone"))
    assert found[0] == found[1] != found[2]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A hub of two commits of m-a-p/MERT, the newer one hostile: name -> commit."""
    cache = tmp_path / "hub"
    # transformers keeps code by commit, from one session to the next
    commits = {"good": secrets.token_hex(20), "hostile": secrets.token_hex(20)}
    home = cache / "models--m-a-p--MERT"
    for name, commit in commits.items():
        mark = f"open({str(tmp_path / 'ran')!r}, 'w').close()\n" if name == "hostile" else ""
        write_mert(home / "snapshots" / commit, mark)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commits["hostile"])
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return commits


def test_only_the_named_commit_runs(hub: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"custom code.*\n.*--trust-remote-code --revision COMMIT"):
        build("m-a-p/MERT", trust_remote_code=False)
    for revision in (None, "main", "aaaaaaa"):
        with pytest.raises(UserError, match=r"expected the commit.*\n.*huggingface\.co/m-a-p/MERT"):
            build("m-a-p/MERT", revision=revision)
    classifier = build("m-a-p/MERT", revision=hub["good"]).eval()
    exported.save_exported(classifier, dict(classifier.state_dict()), tmp_path / "best", RATE)
    loaded = exported.load_exported(tmp_path / "best", trust_remote_code=True)
    with torch.no_grad():
        assert loaded(waves()).equal(classifier(waves()))
    assert not (tmp_path / "ran").exists()
    build("m-a-p/MERT", revision=hub["hostile"])
    assert (tmp_path / "ran").exists(), "the test can fail"


def test_code_of_another_repository_is_refused(tmp_path: Path) -> None:
    name = write_mert(tmp_path / "MERT")
    file = name / "config.json"
    written = json.loads(file.read_text())
    written["auto_map"]["AutoModel"] = "someone/else--modeling_MERT.MERTModel"
    file.write_text(json.dumps(written))
    with pytest.raises(UserError, match="someone/else, which no --revision pins"):
        build(name)


def test_a_feature_extractor_runs_no_code(tmp_path: Path) -> None:
    """Trust is for the network: no --revision pins what this names."""
    name, mark = write_mert(tmp_path / "MERT"), tmp_path / "ran"
    file = name / "preprocessor_config.json"
    code = {"auto_map": {"AutoFeatureExtractor": "theirs.Extractor"}}
    file.write_text(json.dumps(code | {"feature_extractor_type": "Extractor"}))
    (name / "theirs.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    with pytest.raises(UserError, match="only a main model's network may have its own"):
        build(name)
    assert not mark.exists()


def test_code_without_a_model_is_refused(tmp_path: Path) -> None:
    name = write_mert(tmp_path / "MERT")
    file = name / "config.json"
    written = json.loads(file.read_text())
    del written["auto_map"]["AutoModel"]
    file.write_text(json.dumps(written))
    with pytest.raises(UserError, match="custom code for AutoConfig only"):
        build(name)


def test_a_run_of_two_ranks_and_what_reads_it(shards: Path, table: Path, tmp_path: Path) -> None:
    name = write_mert(tmp_path / "MERT")
    Wav2Vec2FeatureExtractor(sampling_rate=16_000).save_pretrained(name)
    run = tmp_path / "run"
    settings = config(shards, name, run, epochs=20 / 66, checkpoint_every_epochs=1.0)
    with pytest.raises(UserError, match=r"custom code.*\n.*add --trust-remote-code$"):
        train_on(1, settings)
    object.__setattr__(settings.main, "trust_remote_code", True)
    train_on(2, settings)
    assert len(losses(run)) == 2
    assert read_environment(run)["identity"]["model"].startswith("mert_model ")
    rng = np.random.default_rng(0)
    soundfile.write(tmp_path / "a.wav", rng.normal(0, 0.1, 16_000), 16_000)
    asked = {"run": run, "files": (tmp_path / "a.wav",), "csv": tmp_path / "a.csv"}
    predict.run(PredictConfig(**asked, trust_remote_code=True))
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 2
    with pytest.raises(UserError, match=r"add --trust-remote-code$"):
        predict.run(PredictConfig(**asked))
    with pytest.raises(UserError, match=r"add --trust-remote-code$"):
        export.run(ExportConfig(run=run, out=tmp_path / "out"))
    export.run(ExportConfig(run=run, out=tmp_path / "out", trust_remote_code=True))
    shutil.rmtree(name)
    shutil.rmtree(run)
    wave = (rng.normal(0, 0.1, 8000)).astype(np.float32)
    classify = pipeline(
        "audio-classification", str(tmp_path / "out"), trust_remote_code=True, top_k=None
    )
    scores = {each["label"]: each["score"] for each in classify(wave)}
    told = exported.load_exported(tmp_path / "out", trust_remote_code=True)
    with torch.no_grad():
        rows = torch.from_numpy((wave * 32768)[None])
        wanted = told.net(told._inputs(rows)).logits.double().softmax(dim=1)[0]
    assert [scores[genre] for genre in told.genres] == pytest.approx(wanted.tolist(), abs=1e-5)
    alone = GenreClassifier(tmp_path / "out", trust_remote_code=True)(wave, 16_000)
    assert alone["probabilities"] == pytest.approx(scores, abs=1e-5)
