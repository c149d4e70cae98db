"""Models with code of their own: what runs when, and what becomes of them. Layout of MERT v1."""

import json
import secrets
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from conftest import build_tiny
from huggingface_hub import constants
from trainings import config, losses, train_on
from transformers import HubertConfig, HubertModel, Wav2Vec2FeatureExtractor

from mgc_dist import export, predict
from mgc_dist.config import ExportConfig, PredictConfig
from mgc_dist.errors import UserError
from mgc_dist.journal import read_environment
from mgc_dist.models import folder as exported
from mgc_dist.models import kind
from mgc_dist.models.main import configuration, configuration_hash

GENRES = ("blues", "jazz", "rock")
RATE = 24_000
CONFIG_CODE = """from transformers import HubertConfig
class MERTConfig(HubertConfig):
    model_type = "mert_model"
"""
MODEL_CODE = """import torch
from transformers import HubertModel
from .configuration_MERT import MERTConfig
class MERTModel(HubertModel):
    config_class = MERTConfig
    base_model_prefix = "mert_model"
    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("table", torch.arange(1.0, 5.0), persistent=False)
    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.last_hidden_state = found.last_hidden_state * self.table.sum()
        return found
"""
AUTO_MAP = {"AutoConfig": "configuration_MERT.MERTConfig", "AutoModel": "modeling_MERT.MERTModel"}
SMALL: dict[str, Any] = {
    **{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"intermediate_size": 32, "conv_dim": [16] * 7, "num_conv_pos_embeddings": 8},
    **{"num_conv_pos_embedding_groups": 2, "apply_spec_augment": False},
}


def write_mert(folder: Path, before: str = "", seed: int = 0) -> Path:
    """A folder as the hub has it; `before` runs when its code is imported."""
    torch.manual_seed(seed)
    HubertModel(HubertConfig(**SMALL)).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(sampling_rate=RATE, do_normalize=True).save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    written |= {"model_type": "mert_model", "architectures": ["MERTModel"], "auto_map": AUTO_MAP}
    (folder / "config.json").write_text(json.dumps(written))
    (folder / "configuration_MERT.py").write_text(before + CONFIG_CODE)
    (folder / "modeling_MERT.py").write_text(before + MODEL_CODE)
    return folder


def build(name: Path | str, **changes: Any):
    settings = {"sample_rate": RATE, "segment_samples": 12_000, "trust_remote_code": True}
    return build_tiny(name, GENRES, **(settings | changes))


def waves(rows: int = 2) -> torch.Tensor:
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.integers(-9000, 9000, (rows, 12_000)).astype(np.int16))


def test_a_trusted_model_trains_and_freezes(tmp_path: Path) -> None:
    name = write_mert(tmp_path / "MERT")
    held = HubertModel(HubertConfig(**SMALL)).state_dict().keys()
    for freeze, layers in (("none", None), ("feature_encoder", None), ("layers:1", 1)):
        classifier = build(name, freeze=freeze, frozen_layers=layers).train()
        assert classifier.net.backbone.state_dict().keys() == held
        classifier(waves()).square().sum().backward()
        for part, parameter in classifier.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, part
    assert classifier.needs_our_code


def test_its_weights_and_its_tables_are_loaded(tmp_path: Path) -> None:
    name = write_mert(tmp_path / "MERT")
    torch.manual_seed(0)
    source = HubertModel(HubertConfig(**SMALL)).state_dict()
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
    with pytest.raises(UserError, match="code of its own, which transformers cannot load without"):
        export.run(ExportConfig(run=run, out=tmp_path / "out"))
