"""The bias command and its table: right rows, right fingerprints, refused otherwise."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import bias_config, make_table, run_ranks, shard_config, write_tracks

from mgc_dist import logits, manifest, shard
from mgc_dist.errors import UserError
from mgc_dist.files import sha256


@pytest.fixture
def copy(table: Path, tmp_path: Path) -> Path:
    shutil.copytree(table, tmp_path / "bias")
    return tmp_path / "bias"


def edit(folder: Path, **changes: object) -> None:
    path = folder / logits.HEADER
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_table_is_the_same_on_two_ranks(shards: Path, table: Path, tmp_path: Path) -> None:
    run_ranks(2, make_table, bias_config(shards, bias_table=tmp_path / "two"))
    for name in (logits.TABLE, logits.HIDDEN, logits.HEADER):
        assert (tmp_path / "two" / name).read_bytes() == (table / name).read_bytes()


def test_lookup_gives_a_rows_log_probabilities_and_uniform_padding(
    shards: Path, table: Path
) -> None:
    found = logits.read(table, manifest.read(shards))
    raw = np.load(table / logits.TABLE)
    assert raw.shape == (198, 3)
    looked = found.lookup(torch.tensor([5, -1, 170]))
    assert looked[0].tolist() == raw[5].tolist()
    assert looked[2].tolist() == raw[170].tolist()
    assert looked[1].exp().tolist() == pytest.approx([1 / 3] * 3)
    assert np.exp(raw).sum(1) == pytest.approx(np.ones(198), abs=1e-5)


def test_folds_follow_artists_and_are_recorded(shards: Path, table: Path) -> None:
    header = logits.read_header(table)
    artists = {
        f"group {track.group}" for track in manifest.read(shards).tracks if track.split == "train"
    }
    assert set(header.fold_of) == artists
    assert header.backbone == "logmel"
    assert header.genres == ("blues", "classical", "country")


def relabel(shards: Path, first: int) -> None:
    index, path = np.load(shards / "index.npy"), shards / manifest.NAME
    index["label"][first:] = (index["label"][first:] + 1) % 3
    np.save(shards / "index.npy", index)
    content = json.loads(path.read_text())
    for track in content["tracks"]:
        if track["split"] != "train":
            label = (content["genres"].index(track["genre"]) + 1) % 3
            track["genre"] = content["genres"][label]
    changes = {"index_sha256": sha256(shards / "index.npy")}
    path.write_text(manifest.sealed(content | changes))


def test_labels_of_validation_and_test_change_no_byte(tmp_path: Path) -> None:
    tables = []
    for name, swap in (("one", False), ("two", True)):
        write_tracks(tmp_path / name, duration_s=1.0)
        shard.run(shard_config(tmp_path / name, tmp_path / name / "shards"))
        if swap:  # as if those splits had been labelled wrongly
            relabel(tmp_path / name / "shards", first=18)
        run_ranks(1, make_table, bias_config(tmp_path / name / "shards"))
        tables.append((tmp_path / name / "shards" / "bias" / logits.TABLE).read_bytes())
    assert tables[0] == tables[1]


def test_made_again_is_a_no_op_and_other_settings_are_refused(shards: Path, table: Path) -> None:
    before = (table / logits.TABLE).stat().st_mtime_ns
    run_ranks(2, make_table, bias_config(shards))
    assert (table / logits.TABLE).stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"another data set, bias model or head.*\n.*--overwrite"):
        run_ranks(2, make_table, bias_config(shards, seed=4))


def test_tables_that_do_not_belong_are_refused(shards: Path, copy: Path) -> None:
    found = manifest.read(shards)
    header = json.loads((copy / logits.HEADER).read_text())
    someone = next(iter(header["fold_of"]))
    without = {k: v for k, v in header["fold_of"].items() if k != someone}
    for changes, message in (
        ({"dataset_id": "f" * 64}, "a table of data set ffffffffffff"),
        ({"genres": ["x", "y", "z"]}, "genres"),
        ({"fold_of": without}, "fold None for"),
        ({"fold_of": header["fold_of"] | {someone: 7}}, "fold 7 for"),
        ({"table_sha256": "0"}, "another sha256"),
        ({"format_version": 9}, "version 9"),
    ):
        edit(copy, **changes)
        with pytest.raises(UserError, match=message):
            logits.read(copy, found)
        (copy / logits.HEADER).write_text(json.dumps(header))
    logits.read(copy, found)


def test_rows_without_logits_and_pickles_are_refused(shards: Path, copy: Path) -> None:
    import hashlib

    found, table = manifest.read(shards), np.load(copy / logits.TABLE)

    def put(array: np.ndarray) -> None:
        np.save(copy / logits.TABLE, array, allow_pickle=True)
        digest = hashlib.sha256((copy / logits.TABLE).read_bytes()).hexdigest()
        edit(copy, table_sha256=digest)

    table[17, 1] = np.nan
    put(table)
    with pytest.raises(UserError, match="no logits for row 17"):
        logits.read(copy, found)
    put(table[:-1])
    with pytest.raises(UserError, match=r"float32 \(197, 3\), expected float32 \(198, 3\)"):
        logits.read(copy, found)
    put(np.array([{"evil": 1}]))
    with pytest.raises(UserError, match="Python objects in dtype"):
        logits.read(copy, found)


def test_no_table_names_the_command(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such table.*\n.*deepspeed launch/bias\.py"):
        logits.read(tmp_path / "none", manifest.read(shards))


def test_what_rank_0_refuses_stops_all_ranks(shards: Path, tmp_path: Path) -> None:
    config = bias_config(shards, bias_table=tmp_path / "t", folds=20)
    with pytest.raises(UserError, match="--folds 20: got"):
        run_ranks(2, make_table, config, timeout_s=60)
    assert not (tmp_path / "t").exists()
