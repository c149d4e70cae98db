"""Packing: the same bytes however it is run, complete or invisible, nothing skipped."""

import hashlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
import webdataset
from conftest import shard_config, write_tracks

from mgc_dist import manifest, pack, shard
from mgc_dist.errors import UserError
from mgc_dist.tracks import NO_FILE, NOT_LISTED, fault_filtered


def digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.is_file()
    }


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """3 genres x 3 tracks by three artists each, 1 s."""
    folder = tmp_path / "few"
    write_tracks(folder, tracks=6, duration_s=1.0)
    return folder


def test_bytes_do_not_depend_on_processes_or_shard_size(few: Path, tmp_path: Path) -> None:
    for name, changes in (("one", {}), ("two", {"jobs": 2}), ("wide", {"rows_per_shard": 1000})):
        shard.run(shard_config(few, tmp_path / name, **changes))
    one, two = digests(tmp_path / "one"), digests(tmp_path / "two")
    assert one == two
    assert len(one) == 5
    wide = manifest.read(tmp_path / "wide")
    assert wide.dataset_id == manifest.read(tmp_path / "one").dataset_id
    assert [entry.rows for entry in wide.shards] == [18, 18, 18]


def test_golden_dataset_id(tmp_path: Path) -> None:
    # freezes format, order of rows and keys: a change orphans every packed data set
    for genre in ("a", "b"):
        (tmp_path / "in" / genre).mkdir(parents=True)
        for n in range(3):
            ramp = ((np.arange(16_000) * (n + 1) * (1 + (genre == "b"))) % 5000).astype(np.int16)
            soundfile.write(tmp_path / "in" / genre / f"{n}.wav", ramp, 16_000, "PCM_16")
    shard.run(shard_config(tmp_path / "in", tmp_path / "out", groups=None))
    assert manifest.read(tmp_path / "out").dataset_id[:16] == GOLDEN_DATASET


GOLDEN_DATASET = "a864059c996380f1"


def test_stock_webdataset_reads_every_segment(shards: Path, tracks: Path) -> None:
    found = manifest.read(shards)
    names = [str(shards / entry.name) for entry in found.shards]
    samples = list(webdataset.WebDataset(names, shardshuffle=False))
    assert len(samples) == found.rows == 18 * 11
    described = [json.loads(sample["json"]) for sample in samples]
    assert [d["row"] for d in described] == list(range(found.rows))
    assert len({sample["__key__"] for sample in samples}) == found.rows
    for sample, about in list(zip(samples, described, strict=True))[::17]:
        first, stop = found.splits[about["split"]]
        assert first <= about["row"] < stop
        name = about["track"].replace("_", ".")
        source, rate = soundfile.read(tracks / about["genre"] / f"{name}.wav", dtype="float32")
        whole = np.rint(soxr.resample(source, rate, 16_000, quality="HQ") * 32768)
        start = round(about["start_s"] * 16_000)
        wave, _ = soundfile.read(io.BytesIO(sample["wav"]), dtype="int16")
        assert np.abs(wave - whole[start : start + 8000]).max() <= 1


def test_segments_of_a_track_are_spread_over_shards(shards: Path) -> None:
    index = np.load(shards / "index.npy")
    for track in np.unique(index["track"]):
        rows = np.flatnonzero(index["track"] == track)
        assert len(np.unique(index["shard"][rows])) >= 2
        assert index["segment"][rows].tolist() != sorted(index["segment"][rows])


def test_packing_again_is_a_no_op_and_another_set_is_refused(
    few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shard.run(shard_config(few, out))
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    shard.run(shard_config(few, out))
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    with pytest.raises(UserError, match=r"a different data set.*\n.*--overwrite"):
        shard.run(shard_config(few, out, seed=1))
    wave, rate = soundfile.read(few / "blues" / "blues.00000.wav")
    soundfile.write(few / "blues" / "blues.00000.wav", wave / 2, rate, "PCM_16")
    with pytest.raises(UserError, match="a different data set"):
        shard.run(shard_config(few, out))
    foreign = out / "holiday.tar"
    foreign.write_bytes(b"mine")
    shard.run(shard_config(few, out, overwrite=True, rows_per_shard=1000))
    assert foreign.read_bytes() == b"mine"
    assert len(list(out.glob("train-*.tar"))) == 1


def test_a_killed_pack_leaves_no_data_set_and_is_repeated(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    shard.run(shard_config(few, whole))
    encode, calls = pack.record.encode, iter(range(1000))

    def killed(*args: object) -> bytes:
        if next(calls) == 20:
            raise KeyboardInterrupt
        return encode(*args)

    monkeypatch.setattr(pack.record, "encode", killed)
    with pytest.raises(KeyboardInterrupt):
        shard.run(shard_config(few, out))
    with pytest.raises(UserError, match=r"no manifest\.json"):
        manifest.read(out)
    monkeypatch.undo()
    shard.run(shard_config(few, out))
    assert digests(out) == digests(whole)


def test_bad_files_are_listed_at_once_and_never_skipped_in_silence(
    few: Path, tmp_path: Path
) -> None:
    (few / "blues" / "blues.00001.wav").write_bytes(b"no audio")
    rate = 22_050
    soundfile.write(few / "country" / "country.00001.wav", np.zeros(rate), rate)  # silent
    soundfile.write(few / "classical" / "classical.00001.wav", np.ones(100), rate)  # short
    with pytest.raises(UserError, match=r"(?s)got 2.*blues_00001.*classical_00001"):
        shard.run(shard_config(few, tmp_path / "out"))
    with pytest.raises(UserError, match=r"(?s)got 3.*country_00001: silence"):
        shard.run(shard_config(few, tmp_path / "out", allow_bad=2))
    assert not list((tmp_path / "out").glob("*.tar*"))
    shard.run(shard_config(few, tmp_path / "out", allow_bad=3))
    found = manifest.read(tmp_path / "out")
    assert set(found.excluded) == {"blues_00001", "classical_00001", "country_00001"}
    assert found.excluded["classical_00001"] == "too short: 0.00 s"
    assert len(found.tracks) == 15
    before = digests(tmp_path / "out")
    shard.run(shard_config(few, tmp_path / "out", allow_bad=3))  # the same again: nothing to do
    assert digests(tmp_path / "out") == before
    shutil.copy(few / "blues" / "blues.00000.wav", few / "country" / "country.00001.wav")
    with pytest.raises(UserError, match="a different data set"):  # repaired: not the same any more
        shard.run(shard_config(few, tmp_path / "out", allow_bad=3))
    soundfile.write(few / "country" / "country.00003.wav", np.zeros(rate), rate)
    with pytest.raises(UserError, match="country_00003: silence"):
        shard.run(shard_config(few, tmp_path / "out", allow_bad=2, overwrite=True))
    assert digests(tmp_path / "out") == before  # a refusal leaves the old data set


def test_one_genre_is_refused(few: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    shutil.copytree(few / "blues", tmp_path / "one" / "blues")
    with pytest.raises(UserError, match="genres: got blues, expected at least two"):
        shard.run(shard_config(tmp_path / "one", tmp_path / "out", groups=None))


def test_fault_filtered_packs_what_is_there_and_does_not_look_at_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lists = fault_filtered()
    wave = np.random.default_rng(0).uniform(-0.5, 0.5, 22_050)
    for genre in ("blues", "pop"):
        (tmp_path / "in" / genre).mkdir(parents=True)
        ids = sorted(id_ for id_ in lists if id_.startswith(genre))
        for split in ("train", "validation", "test"):
            id_ = next(id_ for id_ in ids if lists[id_] == split)
            path = tmp_path / "in" / genre / f"{id_.replace('_', '.')}.wav"
            soundfile.write(path, wave, 22_050)
    every = [f"{genre}_{n:05d}" for genre in ("blues", "pop") for n in range(100)]
    other = next(id_ for id_ in every if id_ not in lists)
    silent = tmp_path / "in" / other.split("_")[0] / f"{other.replace('_', '.')}.wav"
    soundfile.write(silent, np.zeros(22_050), 22_050)
    config = shard_config(tmp_path / "in", tmp_path / "out", split="fault-filtered", groups=None)
    shard.run(config)
    found = manifest.read(tmp_path / "out")
    assert {track.id: track.split for track in found.tracks}.items() <= lists.items()
    assert len(found.tracks) == 6
    assert found.excluded[other] == NOT_LISTED
    assert sum(why == NO_FILE for why in found.excluded.values()) == 924
    shown = capsys.readouterr().out
    assert f"left out: {other}: {NOT_LISTED}" in shown
    assert "left out: 924 tracks such as blues_" in shown
    shard.run(config)
    assert "nothing to do" in capsys.readouterr().out


def test_the_known_bad_file_needs_no_leave(few: Path, tmp_path: Path) -> None:
    (few / "jazz").mkdir()
    for n in range(3):
        shutil.copy(few / "blues" / f"blues.0000{2 * n}.wav", few / "jazz" / f"jazz.0005{n}.wav")
    (few / "jazz" / "jazz.00054.wav").write_bytes(b"\0" * 5000)
    shard.run(shard_config(few, tmp_path / "out"))
    excluded = manifest.read(tmp_path / "out").excluded
    assert list(excluded) == ["jazz_00054"]
    assert "Kaggle copy" in excluded["jazz_00054"]


def test_dry_run_writes_nothing(
    few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard.run(shard_config(few, tmp_path / "out", dry_run=True))
    assert not (tmp_path / "out").exists()
    shown = capsys.readouterr().out
    assert "18 tracks, 3 genres" in shown
    assert "leak check" in shown
    shard.run(shard_config(few, tmp_path / "out", dry_run=True, groups=None))
    assert "not controlled: 18 tracks" in capsys.readouterr().out
