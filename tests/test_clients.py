"""Readers that are not ours read the shards: webdataset, datasets, wids, tar, soundfile."""

import io
import json
import subprocess
from pathlib import Path

import pytest
import soundfile
import webdataset

from mgc_dist.data.reader import ShardSet


@pytest.fixture(scope="module")
def rows(shards: Path) -> list[tuple[str, bytes]]:
    """Key and audio of each training row, by our own reader."""
    with ShardSet(shards) as data:
        found = []
        for row in range(66):
            entry = data.index[row]
            key = f"{data.manifest.tracks[entry['track']].id}_{entry['segment']:02d}"
            found.append((key, data.read(row).tobytes()))
        return found


def names(shards: Path) -> list[str]:
    return sorted(str(path) for path in shards.glob("train-*.tar"))


def audio_of(wav: bytes) -> bytes:
    wave, rate = soundfile.read(io.BytesIO(wav), dtype="int16")
    assert rate == 16_000
    return bytes(wave.tobytes())


def test_stock_webdataset(shards: Path, rows: list[tuple[str, bytes]]) -> None:
    samples = list(webdataset.WebDataset(names(shards), shardshuffle=False))
    assert [(s["__key__"], audio_of(s["wav"])) for s in samples] == rows
    assert [json.loads(s["json"])["row"] for s in samples] == list(range(66))


def test_hugging_face_datasets_without_decoding(
    shards: Path, rows: list[tuple[str, bytes]], tmp_path: Path
) -> None:
    import datasets

    text, number = datasets.Value("string"), datasets.Value("int64")
    described = {name: number for name in ("row", "label", "segment", "sample_rate")}
    described |= {name: text for name in ("track", "group", "genre", "split")}
    described["start_s"] = datasets.Value("float64")
    columns = {"json": described, "wav": datasets.Value("binary"), "__key__": text}
    loaded = datasets.load_dataset(
        "webdataset",
        data_files={"train": names(shards)},
        split="train",
        features=datasets.Features(columns | {"__url__": text}),
        cache_dir=str(tmp_path / "cache"),
    )
    assert [(s["__key__"], audio_of(s["wav"])) for s in loaded] == rows
    assert [s["json"]["row"] for s in loaded] == list(range(66))


def test_hugging_face_datasets_finds_splits_and_columns_by_the_card(
    shards: Path, rows: list[tuple[str, bytes]], tmp_path: Path
) -> None:
    import datasets

    loaded = datasets.load_dataset(str(shards), cache_dir=str(tmp_path / "cache"))
    assert {name: split.num_rows for name, split in loaded.items()} == {
        "train": 66,
        "validation": 66,
        "test": 66,
    }
    assert [(s["__key__"], audio_of(s["wav"])) for s in loaded["train"]] == rows


def test_wids(shards: Path, rows: list[tuple[str, bytes]], tmp_path: Path) -> None:
    import wids

    listed = [
        {"url": name, "nsamples": n} for name, n in zip(names(shards), (20, 20, 20, 6), strict=True)
    ]
    data = wids.ShardListDataset(
        listed, cache_dir=str(tmp_path / "cache"), keep=True, transformations=[]
    )
    assert len(data) == 66
    for row in (65, 0, 20, 41):
        sample = data[row]
        assert (sample["__key__"], audio_of(sample[".wav"].read())) == rows[row]


def test_gnu_tar_and_a_sound_file_player(
    shards: Path, rows: list[tuple[str, bytes]], tmp_path: Path
) -> None:
    path = names(shards)[1]
    listed = subprocess.run(["tar", "tf", path], capture_output=True, text=True, check=True)
    expected = [f"{key}.{kind}" for key, _ in rows[20:40] for kind in ("json", "wav")]
    assert listed.stdout.split() == expected
    subprocess.run(["tar", "xf", path, "-C", tmp_path], check=True)
    for key, audio in rows[20:40]:
        assert audio_of((tmp_path / f"{key}.wav").read_bytes()) == audio
