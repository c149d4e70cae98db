"""What a resumed run must agree in, found by content: precision, micro batch, configuration."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import run_ranks
from metrics import read_metrics
from trainings import config, train_on

from mgc_dist import train
from mgc_dist.errors import UserError
from mgc_dist.models.main import configuration, configuration_hash
from mgc_dist.training import checkpoint, setup


@pytest.fixture(scope="module")
def begun(shards: Path, table: Path, noisy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with dropout, after 4 of 7 steps."""
    run = tmp_path_factory.mktemp("begun") / "run"
    train_on(1, config(shards, noisy, run, epochs=40 / 66))
    return run


def resumed(begun: Path, shards: Path, model: Path, tmp_path: Path, **changes: Any) -> Any:
    run = Path(shutil.copytree(begun, tmp_path / "run"))
    knobs = {"epochs": 1.0, "resume": "auto", "change": ("epochs",)} | changes
    return config(shards, model, run, **knobs)


@pytest.mark.parametrize(
    ("changes", "said", "name"),
    [
        ({"precision": "bf16"}, r"--precision: got bf16, expected fp32", "precision"),
        ({"micro_batch": 5}, r"--micro-batch: got 5, expected 3", "micro-batch"),
    ],
)
def test_another_draw_or_precision_is_another_run_unless_it_is_allowed(
    changes: dict[str, Any],
    said: str,
    name: str,
    begun: Path,
    shards: Path,
    noisy: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(UserError, match=said + rf"(.|\n)*--change {name}"):
        run_ranks(1, train.run, resumed(begun, shards, noisy, tmp_path, **changes))
    allowed = resumed(begun, shards, noisy, tmp_path / "2", **changes, change=("epochs", name))
    train_on(1, allowed)
    assert f"--{name}" in {line["name"] for line in read_metrics(allowed.output.run, "changed")}


def test_a_model_that_was_moved_is_the_same_and_one_that_was_edited_is_not(
    begun: Path, shards: Path, noisy: Path, tmp_path: Path
) -> None:
    moved = Path(shutil.copy(noisy, tmp_path / "moved.json"))
    train_on(1, resumed(begun, shards, moved, tmp_path))
    edited = json.loads(noisy.read_text()) | {"num_attention_heads": 2}
    moved.write_text(json.dumps(edited))
    with pytest.raises(UserError, match=r"configuration of --model: got wav2vec2 \w+, expected"):
        run_ranks(1, train.run, resumed(begun, shards, moved, tmp_path / "2"))


def test_other_libraries_are_written_down_and_not_refused(
    begun: Path, shards: Path, noisy: Path, tmp_path: Path
) -> None:
    settings = resumed(begun, shards, noisy, tmp_path)
    (newest,) = (settings.output.run / checkpoint.FOLDER).glob("step-*")
    path = newest / checkpoint.MANIFEST
    content = json.loads(path.read_text())
    libraries = content["identity"]["libraries"]
    assert libraries.startswith("torch ")
    content["identity"]["libraries"] = "torch 2.0"
    path.write_text(json.dumps(content | {"manifest_sha256": checkpoint._digest(content)}))
    train_on(1, settings)
    (line,) = [
        line for line in read_metrics(settings.output.run, "changed") if line["name"] == "libraries"
    ]
    assert (line["before"], line["now"]) == ("torch 2.0", libraries)


def test_ranks_of_two_precisions_or_devices_are_told_apart(
    shards: Path, table: Path, noisy: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"--precision on rank 1 .*got bf16, expected fp32"):
        run_ranks(2, mixed, config(shards, noisy, tmp_path / "run"))


def mixed(settings: Any) -> Any:
    """Rank 1 has another GPU, which takes bfloat16."""
    if os.environ["RANK"] == "1":
        setup.precision_of = lambda config, ranks: "bf16"
    return train.run(settings)


def test_the_hash_of_a_configuration_is_of_its_content(noisy: Path, tmp_path: Path) -> None:
    genres = ("a", "b")
    one = configuration_hash(configuration(str(noisy), genres))
    copy = Path(shutil.copy(noisy, tmp_path / "other.json"))
    assert configuration_hash(configuration(str(copy), genres)) == one
    copy.write_text(json.dumps(json.loads(noisy.read_text()) | {"hidden_dropout": 0.3}))
    assert configuration_hash(configuration(str(copy), genres)) != one
