"""Packing: the same bytes however it is run, complete or invisible, nothing skipped."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr
import webdataset
from conftest import shard_config, write_tracks

from mgc_dist import files, shard
from mgc_dist.config import VerifyConfig
from mgc_dist.data import manifest, record
from mgc_dist.data.cross_validation import of_fold
from mgc_dist.data.reader import ShardSet
from mgc_dist.data.tracks import Track
from mgc_dist.errors import UserError
from mgc_dist.packing import existing, pack, parts, verify
from mgc_dist.packing.cut import Cut, make_plan
from mgc_dist.packing.splits import NO_FILE, NOT_LISTED, fault_filtered


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
    assert len(one) == 3 + 4  # shards; index, tracks, manifest, card
    wide = manifest.read(tmp_path / "wide")
    assert wide.dataset_id == manifest.read(tmp_path / "one").dataset_id
    assert [entry.rows for entry in wide.shards] == [18, 18, 18]


def test_one_open_shard_at_a_time_is_enough(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard.run(shard_config(few, tmp_path / "all", rows_per_shard=5))
    monkeypatch.setattr(pack, "most_open", lambda wanted: 1)
    shard.run(shard_config(few, tmp_path / "one", rows_per_shard=5))
    assert digests(tmp_path / "one") == digests(tmp_path / "all")


@pytest.mark.parametrize(
    ("rows", "in_a_shard"),
    [(600, 512), (256 * 512, 512), (256 * 600, 600), (19_000_000, 10_225), (10**8, 10_225)],
)
def test_shards_grow_with_the_data_set_up_to_a_gigabyte(rows: int, in_a_shard: int) -> None:
    cut = Cut(segment_samples=48_000, hop_samples=24_000, sample_rate=16_000, rows_per_shard=0)
    found = [
        Track(id=f"{genre}{n}", genre=genre, path=Path("x"), split=split)
        for genre in "ab"
        for n, split in enumerate(("train", "validation", "test"))
    ]
    windows = {track.id: 100 for track in found} | {"a0": rows - 500}
    plan = make_plan(found, windows, {}, cut)
    assert plan.cut.rows_per_shard == in_a_shard
    assert len(plan.shards()) <= max(258, rows // 10_225 + 3)
    assert record.shard_bytes(in_a_shard, 48_000) < 1.001e9
    asked = make_plan(found, windows, {}, replace(cut, rows_per_shard=20))
    assert asked.cut.rows_per_shard == 20


def test_a_data_set_of_an_older_shard_size_is_the_same_one(
    few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard.run(shard_config(few, tmp_path / "out", rows_per_shard=7))
    shard.run(shard_config(few, tmp_path / "out", rows_per_shard=None))
    assert "nothing to do" in capsys.readouterr().out


def test_golden_dataset_id(tmp_path: Path) -> None:
    # freezes format, order of rows and keys: a change orphans every packed data set
    for genre in ("a", "b"):
        (tmp_path / "in" / genre).mkdir(parents=True)
        for n in range(3):
            ramp = ((np.arange(16_000) * (n + 1) * (1 + (genre == "b"))) % 5000).astype(np.int16)
            soundfile.write(tmp_path / "in" / genre / f"{n}.wav", ramp, 16_000, "PCM_16")
    table = tmp_path / "splits.csv"
    table.write_text("track,split\na_0,val\na_1,test\na_2,train\nb_0,test\nb_1,train\nb_2,val\n")
    shard.run(shard_config(tmp_path / "in", tmp_path / "out", groups=None, split_file=table))
    assert manifest.read(tmp_path / "out").dataset_id[:16] == GOLDEN_DATASET


GOLDEN_DATASET = "33b412232166dea7"


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
    with pytest.raises(
        UserError,
        match=r"(?s)got 3.*blues\.00001\.wav.*classical\.00001\.wav.*country\.00001\.wav: silence",
    ):  # headers and content in one list, though a bad header alone would forbid it
        shard.run(shard_config(few, tmp_path / "out"))
    with pytest.raises(UserError, match=r"(?s)got 3.*country\.00001\.wav: silence"):
        shard.run(shard_config(few, tmp_path / "out", allow_bad="2"))
    assert not list((tmp_path / "out").glob("*.tar*"))
    shard.run(shard_config(few, tmp_path / "out", allow_bad="3"))
    found = manifest.read(tmp_path / "out")
    assert set(found.excluded) == {"blues_00001", "classical_00001", "country_00001"}
    assert found.excluded["classical_00001"] == "too short: 0.00 s"
    assert len(found.tracks) == 15
    before = digests(tmp_path / "out")
    shard.run(shard_config(few, tmp_path / "out", allow_bad="3"))  # the same again: nothing to do
    assert digests(tmp_path / "out") == before
    shutil.copy(few / "blues" / "blues.00000.wav", few / "country" / "country.00001.wav")
    with pytest.raises(UserError, match="a different data set"):  # repaired: not the same any more
        shard.run(shard_config(few, tmp_path / "out", allow_bad="3"))
    soundfile.write(few / "country" / "country.00003.wav", np.zeros(rate), rate)
    with pytest.raises(UserError, match=r"country\.00003\.wav: silence"):
        shard.run(shard_config(few, tmp_path / "out", allow_bad="2", overwrite=True))
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
    rng = np.random.default_rng(0)
    for genre in ("blues", "pop"):
        (tmp_path / "in" / genre).mkdir(parents=True)
        ids = sorted(id_ for id_ in lists if id_.startswith(genre))
        for split in ("train", "validation", "test"):
            id_ = next(id_ for id_ in ids if lists[id_] == split)
            path = tmp_path / "in" / genre / f"{id_.replace('_', '.')}.wav"
            soundfile.write(path, rng.uniform(-0.5, 0.5, 22_050), 22_050)
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
        wave = np.random.default_rng(n).uniform(-0.5, 0.5, 22_050)
        soundfile.write(few / "jazz" / f"jazz.0005{n}.wav", wave, 22_050)
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


PACK = """
import sys
from pathlib import Path
from mgc_dist import shard
from mgc_dist.config import ShardConfig
if __name__ == "__main__":
    shard.run(ShardConfig(
        data=Path(sys.argv[1]), out=Path(sys.argv[2]), groups=Path(sys.argv[1]) / "artists.csv",
        segment_s=0.5, hop_s=0.25, rows_per_shard=20, validation_fraction=0.3,
        test_fraction=0.3, jobs=int(sys.argv[3]),
    ))
"""


@pytest.mark.parametrize("jobs", [1, 2])
def test_kill_9_at_any_moment_costs_only_what_was_under_way(
    tracks: Path, shards: Path, tmp_path: Path, jobs: int
) -> None:
    out, script = tmp_path / "out", tmp_path / "pack.py"
    script.write_text(PACK)
    command = [sys.executable, str(script), str(tracks), str(out), str(jobs)]
    decoding, packing = out / "parts" / "part-0001-of-0001.jsonl.tmp", out / "packing.jsonl.tmp"
    for ledger, wanted in ((decoding, 3), (decoding, 9), (packing, 6), (packing, 15)):
        running = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while running.poll() is None:  # so many finished tracks of 18 before each kill
            with suppress(OSError):
                if ledger.read_bytes().count(b"\n") > wanted:
                    break
            time.sleep(0.001)
        running.kill()
        running.wait()
        if not (out / "manifest.json").exists():
            with pytest.raises(UserError, match=r"no manifest\.json"):
                manifest.read(out)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert digests(out) == digests(shards)
    assert sorted(path.name for path in out.iterdir()) == sorted(digests(shards))


def test_hundreds_of_bad_files_are_summed_up(few: Path, tmp_path: Path) -> None:
    (few / "disco").mkdir()
    for number in range(12):
        (few / "disco" / f"a{number}.mp3").write_bytes(b"words" * 900)
    out = tmp_path / "out"
    with pytest.raises(UserError) as refused:
        shard.run(shard_config(few, out))
    message = str(refused.value)
    assert "got 12 of 30" in message
    assert "12 times: no readable audio" in message
    assert "--allow-bad 12" in message
    listing = (out / "unusable.txt").read_text().splitlines()
    assert len(listing) == 12
    assert listing[0].startswith(str(few / "disco" / "a0.mp3") + ": no readable audio")
    with pytest.raises(UserError, match="at most 11 "):
        shard.run(shard_config(few, out, allow_bad="37%"))
    shard.run(shard_config(few, out, allow_bad="40%"))
    assert not (out / "unusable.txt").exists()
    for wrong in ("1.5", "-1", "100%", "many", "%"):
        with pytest.raises(UserError, match="--allow-bad: got"):
            shard_config(few, out, allow_bad=wrong)


def test_of_long_tracks_some_segments_are_kept(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    write_tracks(folder, tracks=3, duration_s=2.0)  # 7 windows each, 0.25 s apart
    ordinary = manifest.read(packed(folder, tmp_path / "all"))
    capped = manifest.read(packed(folder, out, max_segments=3))
    assert {(t.segments, t.windows) for t in capped.tracks} == {(3, 7)}
    assert capped.rows == 3 * len(ordinary.tracks)
    assert capped.dataset_id != ordinary.dataset_id
    verify.verify(out, capped, jobs=1, progress=iter)
    kept, every = ShardSet(out), ShardSet(tmp_path / "all")
    names = {name: row for row, name in enumerate(every.keys())}
    for row, key in enumerate(kept.keys()):
        track, segment = key.rsplit("_", 1)
        same = names[f"{track}_{3 * int(segment):02d}"]  # the first, the middle, the last
        np.testing.assert_array_equal(kept.read(row), every.read(same))
    one = manifest.read(packed(folder, tmp_path / "one", max_segments=1))
    assert one.start_s(one.tracks[0], 0) == 0.75
    shard.run(shard_config(folder, out, groups=None, max_segments=3))  # the same again
    with pytest.raises(UserError, match="a different data set"):
        shard.run(shard_config(folder, out, groups=None, max_segments=4))


def packed(tracks: Path, out: Path, **changes: Any) -> Path:
    shard.run(shard_config(tracks, out, groups=None, **changes))
    return out


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are decoded from now on, without suffix, one at each time."""
    names: list[str] = []
    read = parts.audio.decode
    monkeypatch.setattr(
        parts.audio, "decode", lambda path, rate: names.append(path.stem) or read(path, rate)
    )
    return names


def test_what_is_decoded_is_not_decoded_again(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoded: list[str]
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    shard.run(shard_config(few, whole))
    decoded.clear()
    with monkeypatch.context() as patch:
        stop_after(patch, 30)
        with pytest.raises(KeyboardInterrupt):
            shard.run(shard_config(few, out))
    assert len(decoded) == 18
    (out / "train-000000.tar.tmp").write_bytes(b"")  # a crash that lost what was not flushed
    shard.run(shard_config(few, out))
    assert len(decoded) == 18
    assert digests(out) == digests(whole)


def test_a_wave_that_a_crash_has_lost_is_decoded_again(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoded: list[str]
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    shard.run(shard_config(few, whole))
    with monkeypatch.context() as patch:
        stop_after(patch, 30)
        with pytest.raises(KeyboardInterrupt):
            shard.run(shard_config(few, out))
    (waves,) = (out / "parts").glob("*.pcm")
    os.truncate(waves, waves.stat().st_size - 10)
    decoded.clear()
    shard.run(shard_config(few, out))
    assert len(decoded) == 1
    assert digests(out) == digests(whole)


def test_a_file_that_proves_bad_late_costs_no_second_decoding(
    tmp_path: Path, decoded: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "nine", tmp_path / "out"
    write_tracks(folder, tracks=3, duration_s=1.0)
    middle = folder / "classical" / "classical.00001.wav"
    good = middle.read_bytes()
    soundfile.write(middle, np.zeros(22_050), 22_050)
    config = shard_config(folder, out, groups=None, split="kfold", folds=3)
    with pytest.raises(UserError, match=r"(?s)got 1.*classical\.00001\.wav: silence"):
        shard.run(config)
    assert len(decoded) == len(set(decoded)) == 9
    middle.write_bytes(good)  # repaired: it alone is decoded
    shard.run(replace(config, dry_run=True, decode=True))
    assert len(decoded) == 10
    shard.run(config)
    assert len(decoded) == 10
    shard.run(replace(config, out=tmp_path / "at once"))
    assert digests(out) == digests(tmp_path / "at once")


def test_a_dry_run_that_decodes_tells_the_truth(
    few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    soundfile.write(few / "blues" / "blues.00001.wav", np.zeros(22_050), 22_050)
    config = shard_config(few, tmp_path / "out", dry_run=True)
    shard.run(config)  # headers promise
    with pytest.raises(UserError, match=r"blues\.00001\.wav: silence"):
        shard.run(replace(config, decode=True))
    shard.run(replace(config, decode=True, allow_bad="1"))
    assert "now the plan is" in capsys.readouterr().out
    assert not list((tmp_path / "out").glob("*.tar*"))


def stop_after(monkeypatch: pytest.MonkeyPatch, records: int) -> None:
    encode, calls = pack.record.encode, iter(range(10_000))

    def killed(*args: object) -> bytearray:
        if next(calls) == records:
            raise KeyboardInterrupt
        return encode(*args)

    monkeypatch.setattr(pack.record, "encode", killed)


def test_a_changed_source_starts_over(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(monkeypatch, 30)
    with pytest.raises(KeyboardInterrupt):
        shard.run(shard_config(few, tmp_path / "out"))
    monkeypatch.undo()
    path = few / "blues" / "blues.00000.wav"
    wave, rate = soundfile.read(path)
    soundfile.write(path, wave[::-1], rate, "PCM_16")
    shard.run(shard_config(few, tmp_path / "out"))
    shard.run(shard_config(few, tmp_path / "whole"))
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


@pytest.mark.parametrize("call", range(8))
def test_a_kill_while_publishing_leaves_the_old_set_or_none_and_is_repeated(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    shard.run(shard_config(few, whole))
    shard.run(shard_config(few, out, seed=1))
    calls = iter(range(100))
    rename, unlink = Path.replace, Path.unlink

    def counted(call_: int) -> None:
        if call_ == call:
            raise KeyboardInterrupt

    def replacing(self: Path, target: Path) -> Path:
        if self.parent == out and not self.name.startswith("packing.jsonl.tmp"):
            counted(next(calls))
        return rename(self, target)

    def unlinking(self: Path, missing_ok: bool = False) -> None:
        if self.parent == out and self.suffix != ".tmp":
            counted(next(calls))
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "replace", replacing)
    monkeypatch.setattr(Path, "unlink", unlinking)
    with pytest.raises(KeyboardInterrupt):
        shard.run(shard_config(few, out, overwrite=True))
    monkeypatch.undo()
    if (out / "manifest.json").exists():
        with ShardSet(out) as data:  # the old one, whole
            assert data.manifest.settings["seed"] == 1
            for row in range(data.manifest.rows):
                data.read(row)
    shard.run(shard_config(few, out, overwrite=True))
    assert digests(out) == digests(whole)


def test_two_packings_into_one_folder_are_refused(few: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with (
        files.locked(tmp_path / "out" / pack.LOCK, wait_s=0, purpose="x"),
        pytest.raises(UserError, match=r"packing into .*out: got another process"),
    ):
        shard.run(shard_config(few, tmp_path / "out"))


def test_a_disk_that_is_too_small_or_full_publishes_nothing(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = files.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage._replace(free=500_000))
    with pytest.raises(UserError, match=r"got 0.00 GB of free space"):
        shard.run(shard_config(few, tmp_path / "out"))
    monkeypatch.undo()
    script = tmp_path / "pack.py"
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))\n"
    script.write_text(limit + "import signal; signal.signal(25, signal.SIG_IGN)\n" + PACK)
    command = [sys.executable, str(script), str(few), str(tmp_path / "out"), "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "File too large" in done.stderr
    assert "part-0001-of-0001" in done.stderr
    assert not list((tmp_path / "out").glob("*.tar"))


def test_a_description_that_does_not_fit_is_refused_before_decoding(
    few: Path, tmp_path: Path
) -> None:
    lines = (few / "artists.csv").read_text().replace("blues artist 0", "x" * 400)
    (few / "artists.csv").write_text(lines)
    with pytest.raises(UserError, match=r"description of track blues_00000.*at most 512"):
        shard.run(shard_config(few, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_one_file_under_two_names_in_two_splits_is_said(
    few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = tracks_of(few, tmp_path)
    train = next(t for t in found if t.split == "train" and t.genre == "blues")
    test = next(t for t in found if t.split == "test" and t.genre == "blues")
    shutil.copy(few / train.source, few / test.source)
    with pytest.raises(UserError, match="the same recording in two splits: got 1 pairs"):
        shard.run(shard_config(few, tmp_path / "twins"))
    shard.run(shard_config(few, tmp_path / "twins", repetitions=False))
    pair = f"{min(train.id, test.id)} and {max(train.id, test.id)} are the same file"
    assert pair in capsys.readouterr().out
    assert pair in (tmp_path / "twins" / "README.md").read_text()


def tracks_of(few: Path, tmp_path: Path) -> tuple[manifest.TrackEntry, ...]:
    shard.run(shard_config(few, tmp_path / "first"))
    return manifest.read(tmp_path / "first").tracks


def test_folds_and_tables_reach_the_manifest(few: Path, tmp_path: Path) -> None:
    out = tmp_path / "folds"
    shard.run(shard_config(few, out, split="kfold", folds=3))
    packed = manifest.read(out)
    assert packed.settings["folds"] == 3
    assert list(packed.splits) == ["fold0", "fold1", "fold2"]
    shard.verify(VerifyConfig(shards=out))
    found = of_fold(out, packed, 0)
    assert Counter(t.split for t in found.tracks) == {"train": 6, "validation": 6, "test": 6}
    lines = ["path,genre,group,split"]
    lines += [f"{t.source},{t.genre},{t.group},{t.split}" for t in found.tracks[:-1]]
    table = few / "list.csv"
    table.write_text("\n".join(lines) + "\n")
    shard.run(shard_config(table, tmp_path / "listed", groups=None))
    listed = manifest.read(tmp_path / "listed")
    assert listed.settings["split"] == "table"
    assert listed.tracks == found.tracks[:-1]
    leak = table.read_text().replace(",test", ",train", 1)
    table.write_text(leak)
    with pytest.raises(UserError, match="is in two splits"):
        shard.run(shard_config(table, tmp_path / "leak", groups=None))


def test_files_of_others_are_not_replaced(few: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "train-000123.tar").write_bytes(b"precious")
    with pytest.raises(UserError, match=r"got train-000123\.tar, which no packing"):
        shard.run(shard_config(few, out))
    assert (out / "train-000123.tar").read_bytes() == b"precious"


def test_what_another_process_has_packed_meanwhile_is_not_replaced(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard.run(shard_config(few, tmp_path / "out"))
    before = digests(tmp_path / "out")
    monkeypatch.setattr(existing, "read", lambda config: None)  # as it was when we looked
    with pytest.raises(UserError, match="another process has packed meanwhile"):
        shard.run(shard_config(few, tmp_path / "out", seed=1))
    assert digests(tmp_path / "out") == before


def test_the_same_names_sizes_and_times_elsewhere_are_other_sources(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Path(shutil.copytree(few, tmp_path / "other"))
    for path in other.glob("*/*.wav"):
        wave, rate = soundfile.read(path)
        soundfile.write(path, wave[::-1], rate, "PCM_16")
    for path in [*few.glob("*/*.wav"), *other.glob("*/*.wav")]:
        os.utime(path, (1, 1))
    stop_after(monkeypatch, 50)
    with pytest.raises(KeyboardInterrupt):
        shard.run(shard_config(few, tmp_path / "out"))
    monkeypatch.undo()
    shard.run(shard_config(other, tmp_path / "out"))
    shard.run(shard_config(other, tmp_path / "whole"))
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_a_damaged_set_is_not_called_done_and_can_be_packed_again(
    few: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shard.run(shard_config(few, out))
    whole = digests(out)
    for damage, message in (
        (lambda path: path.unlink(), r"no train-000000\.tar"),
        (lambda path: path.write_bytes(path.read_bytes()[::-1]), r"another train-000000\.tar"),
    ):
        damage(out / "train-000000.tar")
        with pytest.raises(UserError, match=rf"got this data set, but {message}.*\n.*--overwrite"):
            shard.run(shard_config(few, out))
        shard.run(shard_config(few, out, overwrite=True))
        assert digests(out) == whole


def test_a_new_bad_file_makes_it_another_data_set(few: Path, tmp_path: Path) -> None:
    shard.run(shard_config(few, tmp_path / "out"))
    (few / "blues" / "extra.wav").write_bytes(b"no audio")
    with pytest.raises(UserError, match="a different data set"):
        shard.run(shard_config(few, tmp_path / "out", allow_bad="1"))


def test_reasons_do_not_depend_on_how_the_folder_was_named(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (few / "blues" / "extra.wav").write_bytes(b"no audio")
    shard.run(shard_config(few, tmp_path / "one", allow_bad="1"))
    monkeypatch.chdir(few.parent)
    groups = few / "artists.csv"
    shard.run(shard_config(Path(few.name), tmp_path / "two", groups=groups, allow_bad="1"))
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_lengths_are_those_of_what_is_decoded(
    few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in few.glob("*/*.wav"):
        wave, rate = soundfile.read(path)
        soundfile.write(path.with_suffix(".mp3"), np.tile(wave, 2), rate)
        path.unlink()
    one = few / "blues" / "blues.00000.mp3"
    one.write_bytes(without_header(one.read_bytes()))
    out = tmp_path / "out"
    shard.run(shard_config(few, out, dry_run=True))
    assert "The lengths of 18 tracks are guessed" in capsys.readouterr().out
    shard.run(shard_config(few, out))
    tracks = manifest.read(out).tracks
    assert {track.segments for track in tracks} == {7}  # of 0.5 s, every 0.25 s, in 2 s
    shard.run(shard_config(few, out))
    assert "nothing to do" in capsys.readouterr().out


def without_header(content: bytes) -> bytes:
    """An MP3 file without its first frame, which tells how long it is."""
    first = content.index(b"\xff\xf3")
    return content[content.index(b"\xff\xf3", first + 4) :]


def test_what_a_kill_after_the_last_step_leaves_is_tidied(few: Path, tmp_path: Path) -> None:
    shard.run(shard_config(few, tmp_path / "out"))
    before = digests(tmp_path / "out")
    (tmp_path / "out" / "packing.jsonl.tmp").write_text("{}\n")
    (tmp_path / "out" / pack.LOCK).touch()
    shard.run(shard_config(few, tmp_path / "out"))
    assert digests(tmp_path / "out") == before


def test_infinite_lengths_are_refused(few: Path, tmp_path: Path) -> None:
    for changes in ({"segment_s": float("inf")}, {"hop_s": float("inf")}):
        with pytest.raises(UserError, match="got inf, expected above 0 to"):
            shard.run(shard_config(few, tmp_path / "out", **changes))
