"""Each way in which a pretrained model cannot be loaded has its own sentence, and a cure."""

import shutil
from collections.abc import Callable
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import transformers.utils.hub
from conftest import build_tiny, write_model
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import BertConfig, BertModel, Wav2Vec2FeatureExtractor

from mgc_dist.errors import UserError
from mgc_dist.models import folder as exported
from mgc_dist.models.backbone import build_bias

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A whole model."""
    folder = tmp_path / "saved"
    build_tiny(write_model(tmp_path / "x.json")).net.save_pretrained(folder)
    Wav2Vec2FeatureExtractor().save_pretrained(folder)
    return folder


def asked(error: type[HfHubHTTPError], status: int) -> Exception:
    return error("as the hub says", response=MagicMock(status_code=status, headers={}))


@pytest.mark.parametrize(
    ("error", "got", "cure"),
    [
        (lambda: asked(RepositoryNotFoundError, 404), "no such model on the hub", "hf auth login"),
        (lambda: asked(GatedRepoError, 403), "a gated model", r"co/m/x, and log in: hf auth login"),
        (lambda: asked(RevisionNotFoundError, 404), "a revision that", r"huggingface.co/m/x/comm"),
        (lambda: asked(HfHubHTTPError, 429), r"limit of requests \(429\)", "wait five minutes"),
        (lambda: asked(HfHubHTTPError, 503), "no answer of the hub", "hf download m/x --local-dir"),
        (lambda: asked(RemoteEntryNotFoundError, 404), "without config.json, or", "choose such"),
        (lambda: LocalEntryNotFoundError("offline"), "no answer of the hub", "bring that folder"),
    ],
)
def test_what_the_hub_says(
    error: Callable[[], Exception], got: str, cure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*args: object, **settings: object) -> None:
        raise error()

    monkeypatch.setattr(transformers.utils.hub, "hf_hub_download", failing)
    loads = (
        lambda: build_tiny("m/x"),
        lambda: build_bias("m/x", segment_samples=8000, sample_rate=16_000),
    )
    for load in loads:
        with pytest.raises(UserError, match=rf"model m/x.*{got}.*\n.*{cure}"):
            load()


def test_a_model_of_the_hub_without_weights(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = saved.parent / "hub" / "models--m--x"
    (saved / "model.safetensors").unlink()
    shutil.copytree(saved, home / "snapshots" / ("a" * 40))
    missing = home / ".no_exist" / ("a" * 40)
    missing.mkdir(parents=True)
    for name in ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"):
        (missing / name).touch()
    (missing / "pytorch_model.bin.index.json").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home.parent))
    with pytest.raises(UserError, match=r"not appear to have a file .*\n.*co/m/x/tree/main"):
        build_tiny("m/x", revision="a" * 40)


def emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def made_a_run(folder: Path) -> None:
    shutil.copytree(folder, folder.parent / "best")
    emptied(folder)
    (folder.parent / "best").rename(folder / "best")
    (folder / "config.yaml").touch()


def of_text(folder: Path) -> None:
    emptied(folder)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(**small, intermediate_size=16, vocab_size=8)).save_pretrained(folder)


@pytest.mark.parametrize(
    ("spoil", "got", "cure"),
    [
        (emptied, "an empty folder", "hf download NAME --local-dir .*saved"),
        (made_a_run, "a run folder", "give .*saved/best"),
        (lambda f: (f / "config.json").unlink(), "a folder without config.json", "hf download"),
        (lambda f: (f / "model.safetensors").unlink(), "a folder without weights", "hf download"),
        (
            lambda f: (f / "model.safetensors").write_text(POINTER),
            "a pointer of Git LFS in place of model.safetensors",
            "lfs pull; or download it again",
        ),
        (
            lambda f: (f / "model.safetensors").write_bytes(b"12345678 no header"),
            "files that cannot be read",
            "hf download NAME --local-dir",
        ),
        (lambda f: (f / "config.json").write_text("{"), "files that cannot be read", "hf download"),
        (of_text, "got bert, which transformers has for no such use", "choose such a model"),
        (
            lambda f: (f / "config.json").write_text('{"model_type": "of-tomorrow"}'),
            "got of-tomorrow, which transformers has for no such use",
            "choose such a model",
        ),
        (
            lambda f: (f / "config.json").write_text("{}"),
            "without config.json, or with one that names no model_type",
            "choose such a model",
        ),
    ],
)
def test_what_is_wrong_with_a_folder(
    spoil: Callable[[Path], object], got: str, cure: str, saved: Path
) -> None:
    spoil(saved)
    with pytest.raises(UserError, match=rf"model .*saved.*{got}.*\n.*{cure}"):
        build_tiny(saved)


def test_the_cure_for_a_run_folder_gets_further(saved: Path) -> None:
    made_a_run(saved)
    with pytest.raises(UserError) as error:
        build_tiny(saved)
    build_tiny(str(error.value).rpartition("give ")[2])


def test_an_export_of_our_own_cnn_is_no_bias_model(tmp_path: Path) -> None:
    classifier = build_tiny("logmel-cnn")
    weights = dict(classifier.state_dict())
    exported.save_exported(classifier, weights, tmp_path / "best", 16_000)
    with pytest.raises(UserError, match=r"got logmel-cnn, which transformers has for no such use"):
        build_bias(str(tmp_path / "best"), segment_samples=8000, sample_rate=16_000)
    assert build_tiny(tmp_path / "best").net.config.model_type == "logmel-cnn"


def test_paths_that_are_not_there_or_no_folder(tmp_path: Path, saved: Path) -> None:
    for name in (str(tmp_path / "none"), "./none", "a/b/c"):
        with pytest.raises(UserError, match=r"got no such folder, .*\n  correct the path"):
            build_tiny(name)
    with pytest.raises(UserError, match=r"got a file, .*\n  give its folder: .*saved$"):
        build_tiny(saved / "model.safetensors")
