"""A data set without training rows: packed, verified, evaluated on; what trains refuses it."""

import json
from pathlib import Path

import pytest
import yaml
from conftest import bias_config, build_tiny, make_table, run_ranks, shard_config
from trainings import config, train_on

from mgc_dist import evaluate, exam, shard
from mgc_dist.config import EvaluateConfig, ExamConfig, InfoConfig, VerifyConfig
from mgc_dist.data import manifest
from mgc_dist.data.reader import ShardSet
from mgc_dist.errors import UserError
from mgc_dist.models.folder import save_exported
from mgc_dist.packing import card
from mgc_dist.scoring import exams

GENRES = ("blues", "classical", "country")


def write_splits(tracks: Path, table: Path, splits: dict[str, str]) -> Path:
    """A table of splits: `GENRE.NNNNN` numbers to splits, the same in every genre."""
    lines = ["track,split"]
    lines += [f"{g}.{number},{split}" for g in GENRES for number, split in splits.items()]
    table.write_text("\n".join(lines) + "\n")
    return table


@pytest.fixture(scope="module")
def tests_only(tracks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four tracks a genre by two artists, all of them for test: 132 rows."""
    out = tmp_path_factory.mktemp("tests-only") / "shards"
    numbers = dict.fromkeys(("00000", "00001", "00004", "00005"), "test")
    splits = write_splits(tracks, out.parent / "splits.csv", numbers)
    shard.run(shard_config(tracks, out, split="table", split_file=splits))
    return out


def test_it_is_packed_described_and_verified(
    tests_only: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = manifest.read(tests_only)
    assert found.splits == {"train": (0, 0), "validation": (0, 0), "test": (0, 132)}
    assert {entry.name.split("-")[0] for entry in found.shards} == {"test"}
    assert [found.excluded[f"{g}_00002"] for g in GENRES] == ["named in no split of the table"] * 3
    text = (tests_only / card.NAME).read_text()
    (files,) = yaml.safe_load(text.split("---\n")[1])["configs"]
    assert files["data_files"] == [{"split": "test", "path": "test-*.tar"}]
    assert 'WebDataset("test-000000.tar"' in text
    assert 'test = load_dataset("FOLDER", split="test")' in text
    shard.verify(VerifyConfig(shards=tests_only, jobs=1))
    shard.info(InfoConfig(shards=tests_only))
    assert "132 segments in 7 shards are as they were" in capsys.readouterr().out


def test_validation_and_test_without_training(tracks: Path, tmp_path: Path) -> None:
    numbers = {"00000": "validation", "00002": "test"}
    splits = write_splits(tracks, tmp_path / "splits.csv", numbers)
    out = tmp_path / "shards"
    shard.run(shard_config(tracks, out, split="table", split_file=splits))
    with ShardSet(out) as shards:
        assert (shards.rows_of("validation"), shards.rows_of("test")) == ((0, 33), (33, 66))
    write_splits(tracks, splits, {"00000": "train", "00002": "test"})
    with pytest.raises(UserError, match="got 3 train, 0 validation, 3 test"):
        shard.run(shard_config(tracks, tmp_path / "other", split="table", split_file=splits))


def test_its_packing_says_what_it_is_for(
    tracks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    splits = write_splits(tracks, tmp_path / "splits.csv", {"00000": "test"})
    shard.run(shard_config(tracks, tmp_path / "shards", split="table", split_file=splits))
    assert "(no training tracks: for evaluation only)" in capsys.readouterr().out


def test_evaluate_takes_it_and_says_which_split_it_has(
    tests_only: Path, tiny_model: Path, tmp_path: Path
) -> None:
    tiny, model = build_tiny(tiny_model, GENRES), tmp_path / "exported"
    save_exported(tiny, tiny.state_dict(), model, 16_000)
    run_ranks(1, evaluate.run, EvaluateConfig(run=model, data=tests_only))
    found = json.loads((model / "evaluation" / "test-of-shards.json").read_text())
    assert (found["track"]["count"], found["segment"]["count"]) == (12, 132)
    validation = EvaluateConfig(run=model, data=tests_only, split="validation")
    with pytest.raises(
        UserError, match=r"validation split of data set .*got no rows.*splits: test"
    ):
        run_ranks(1, evaluate.run, validation)


def test_what_needs_training_rows_refuses_it(
    tests_only: Path, tiny_model: Path, tmp_path: Path
) -> None:
    message = r"train split of data set .*got no rows(.|\n)*to train, pack tracks for train"
    with pytest.raises(UserError, match=message):
        train_on(1, config(tests_only, tiny_model, tmp_path / "run", loss="ce"))
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=message):
        run_ranks(1, make_table, bias_config(tests_only))
    assert not (tests_only / "bias").exists()


def test_it_is_examined_without_controls(
    tests_only: Path, tiny_model: Path, tmp_path: Path
) -> None:
    built = build_tiny(tiny_model, GENRES).eval()
    save_exported(built, built.state_dict(), tmp_path / "model", 16_000)
    settings = ExamConfig(
        run=tmp_path / "model", data=tests_only, only=("polarity",), name="test", band_segments=8
    )
    run_ranks(1, exam.run, settings)
    found = exams.read(tmp_path / "model" / "exam" / "test.json")
    assert found.refitted is None
    assert [line.control for line in found.transformations] == [None]
    assert found.tracks == 12
