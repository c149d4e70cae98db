"""One packing serves all folds: each track is tested once, and every row is the one it says."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import trainings
import webdataset
from conftest import bias_config, run_ranks, shard_config, write_tracks

from mgc_dist import bias, evaluate, shard, train
from mgc_dist.bias_model import table as tables
from mgc_dist.config import EvaluateConfig, InfoConfig, SourceConfig
from mgc_dist.data import manifest, record
from mgc_dist.data.reader import ShardSet
from mgc_dist.data.tracks import refuse_leaks
from mgc_dist.errors import UserError
from mgc_dist.packing.splits import as_table

FOLDS = 4


@pytest.fixture(scope="module")
def folds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two genres of eight artists with a track each, cut into four folds, two shards each."""
    root = tmp_path_factory.mktemp("folds")
    write_tracks(root / "music", genres=2, tracks=8, duration_s=2.0)
    config = shard_config(
        root / "music", root / "out", groups=None, split="kfold", folds=FOLDS, rows_per_shard=7
    )
    shard.run(config)
    return root / "out"


def test_every_track_is_tested_once_and_no_fold_leaks(folds: Path) -> None:
    tested: list[str] = []
    for fold in range(FOLDS):
        with ShardSet(folds, fold) as data:
            refuse_leaks(data.manifest.labelled_tracks())
            of = {split: [] for split in ("train", "validation", "test")}
            for each in data.manifest.tracks:
                of[each.split].append(each.id)
        assert [len(names) for names in of.values()] == [8, 4, 4]
        tested += of["test"]
        with ShardSet(folds, (fold - 1) % FOLDS) as before:
            assert of["validation"] == [t.id for t in before.manifest.tracks if t.split == "test"]
    assert len(tested) == len(set(tested)) == 16


@pytest.mark.parametrize("rows_per_shard", [7, 5])
def test_rows_of_a_fold_are_what_stock_webdataset_reads(
    folds: Path, rows_per_shard: int, tmp_path: Path
) -> None:
    """Audio, label, key and track of every row; splits follow one another in the rows.

    Of 12 shards, numbers that ran below zero as uint32 came out wrong; of 8 they did not.
    """
    if rows_per_shard != 7:
        config = shard_config(
            folds.parent / "music",
            tmp_path / "out",
            groups=None,
            split="kfold",
            folds=FOLDS,
            rows_per_shard=rows_per_shard,
        )
        shard.run(config)
        folds = config.out
    found = manifest.read(folds)
    urls = [str(folds / each.name) for each in found.shards]
    stock = {each["__key__"]: each for each in webdataset.WebDataset(urls, shardshuffle=False)}
    for fold in range(FOLDS):
        with ShardSet(folds, fold) as data:
            splits = data.manifest.splits
            assert list(splits.values())[-1][1] == data.manifest.rows == len(stock)
            assert sum(data.shard_rows_of("train")) == splits["train"][1]
            for row, key in enumerate(data.keys()):
                wave, _ = soundfile.read(io.BytesIO(stock[key]["wav"]), dtype="int16")
                assert (data.read(row) == wave).all()
                track = data.manifest.tracks[data.tracks[row]]
                assert key == record.key_of(track.id, int(data.index["segment"][row]))
                assert data.manifest.genres[data.labels[row]] == track.genre
                first, stop = splits[track.split]
                assert first <= row < stop
            assert sorted(data.keys()) == sorted(stock)


def test_folds_are_data_sets_of_their_own(folds: Path) -> None:
    ids = {ShardSet(folds, fold).manifest.dataset_id for fold in range(FOLDS)}
    assert len(ids | {manifest.read(folds).dataset_id}) == FOLDS + 1


@pytest.mark.parametrize("fold", [None, FOLDS])
def test_a_fold_must_be_named(folds: Path, fold: int | None) -> None:
    with pytest.raises(UserError, match=r"expected --fold 0 to 3\n.*add --fold 0"):
        ShardSet(folds, fold)


def test_a_data_set_with_splits_has_no_fold(shards: Path) -> None:
    with pytest.raises(UserError, match=r"got --fold 0, .*it has splits\n.*leave --fold out"):
        ShardSet(shards, 0)


@pytest.fixture(scope="module")
def biased(folds: Path) -> Path:
    """Bias tables of folds 1 and 2."""
    for fold in (1, 2):
        run_ranks(2, bias.run, bias_config(folds, source=SourceConfig(fold=fold)))
    return folds


def test_one_pass_of_the_bias_model_serves_all_folds(biased: Path) -> None:
    assert sorted(path.parent.name for path in biased.rglob("hidden.npy")) == ["bias"]
    written = (biased / "bias" / "hidden.npy").stat().st_mtime_ns
    run_ranks(1, bias.run, bias_config(biased, source=SourceConfig(fold=3)))
    assert (biased / "bias" / "hidden.npy").stat().st_mtime_ns == written


def test_heads_of_a_fold_are_those_of_these_splits_packed_alone(
    biased: Path, tmp_path: Path
) -> None:
    """Against a data set that was packed with train, validation and test as fold 2 has them."""
    with ShardSet(biased, 2) as data:
        ours = tables.read(biased / "bias" / "fold2", data.manifest, data.keys)
        keys = data.keys()
        (tmp_path / "splits.csv").write_text(as_table(data.manifest.labelled_tracks()))
    music = biased.parent / "music"
    config = shard_config(music, tmp_path / "out", groups=None, split_file=tmp_path / "splits.csv")
    shard.run(config)
    run_ranks(1, bias.run, bias_config(tmp_path / "out"))
    with ShardSet(tmp_path / "out") as data:
        theirs = tables.read(tmp_path / "out" / "bias", data.manifest, data.keys)
        row_of = {key: row for row, key in enumerate(data.keys())}
    order = [row_of[key] for key in keys]
    expected = np.array(theirs.log_probability)[order]
    assert np.array(ours.log_probability) == pytest.approx(expected, abs=1e-4)


def test_a_fold_is_trained_evaluated_and_reported(
    biased: Path, tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    config = trainings.config(biased, tiny_model, run, epochs=1.0, global_batch=8, micro_batch=4)
    fold = replace(config, data=replace(config.data, source=SourceConfig(fold=1)))
    trainings.train_on(2, fold)
    run_ranks(1, evaluate.run, EvaluateConfig(run=run))
    lines = (run / "predictions" / "test.jsonl").read_text().splitlines()
    with ShardSet(biased, 1) as data:
        tested = {each.id for each in data.manifest.tracks if each.split == "test"}
    assert {json.loads(line)["track"] for line in lines} == tested
    shown = (run / "report.html").read_text()
    assert "--fold 1" in shown
    assert "kfold" in shown
    other = replace(
        fold,
        data=replace(fold.data, source=SourceConfig(fold=2)),
        output=replace(fold.output, resume="auto"),
    )
    with pytest.raises(UserError, match=r"data set \(--shards\)"):
        run_ranks(1, train.run, other)


def test_a_packed_fold_is_described_and_dealt_on(
    folds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`shard info`, its table of folds, and more tracks with --split-from."""
    shard.info(InfoConfig(shards=folds, splits=tmp_path / "folds.csv"))
    assert "fold3" in capsys.readouterr().out
    music, before = folds.parent / "music", {t.id: t.split for t in manifest.read(folds).tracks}
    listed = shard_config(
        music, tmp_path / "listed", groups=None, split_file=tmp_path / "folds.csv"
    )
    shard.run(listed)
    assert {t.id: t.split for t in manifest.read(listed.out).tracks} == before
    more = shard_config(music, tmp_path / "more", groups=None, split_from=folds, folds=FOLDS)
    shard.run(replace(more, split="kfold"))
    assert {t.id: t.split for t in manifest.read(more.out).tracks} == before
    with pytest.raises(UserError, match=r"--split-from .*\n.*--split kfold --folds 4"):
        shard.run(replace(more, split="stratified", out=tmp_path / "other"))
