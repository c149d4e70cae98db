"""CPU per segment of reading: our reader against the ways that one would take without it.

All deliver one shuffled epoch of the same training segments (3 s, 16 kHz, 16 bits) as batches of
32 with integer labels: int16, and float32 from "the original project's way". One process and one
torch thread each, but for those with a DataLoader worker, whose CPU counts. What is fair:

- Opening is not counted, as one opens once and reads many epochs; the rest of the epoch is, with
  what a contender leaves to its first sample. Those fixed costs weigh less with more --tracks.
- The page cache is warm: all data has been read shortly before. The disk is not measured.
- webdataset, wids, Hugging Face datasets, "cat" and ours read the same tar files; MDS, litdata
  and the plain files hold the same bytes in the same row order, uncompressed. All others decode
  with soundfile and collate with their own default, or torch's; webdataset also without a decoder
  (np.frombuffer behind the header), which is its fastest way.
- Only ours checks every record (xxh3_64). Ours and the plain files are shuffled over the whole
  split, webdataset and Hugging Face in a buffer of 1000, wids within a shard (with its own
  sampler), MDS and litdata by their defaults.
- "Plain files" are one WAV file a segment. "The original project's way" reads such files at the
  tracks' own 22,050 Hz, and resamples and normalises every item: that is more work for a batch,
  but work that its users had in every epoch.
- "cat" writes the shards to /dev/null: the limit of anything that reads them as files.

Whoever delivers more or fewer segments than there are is named under "delivered_otherwise".

    python benchmarks/reading.py --json benchmarks/results/reading.json
"""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import measure
import numpy as np
import soundfile
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from mgc_dist import shard
from mgc_dist.config import ShardConfig
from mgc_dist.data import manifest
from mgc_dist.data.order import Plan, lay_out, training_batches
from mgc_dist.data.reader import Reader, ShardSet

RATE, LENGTH, BATCH, BUFFER = 16_000, 48_000, 32, 1000
SOURCE_RATE, SOURCE_LENGTH = 22_050, 66_150

Sample = tuple[Tensor, int]
"""Wave [T] and label."""


def prepare(folder: Path, count: int) -> None:
    """Tracks, shards and the copies that others read; what a marker says is done, stays."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.redirect_stdout(io.StringIO()):
        data = measure.tracks(folder, count)
        once(folder / "shards", lambda out: pack(data, out))
        once(folder / "mds", lambda out: copy_mds(folder, out))
        once(folder / "litdata", lambda out: copy_litdata(folder, out))
        once(folder / "plain", lambda out: copy_plain(folder, out))
        once(folder / "original", lambda out: copy_original(folder, out))
    for path in folder.rglob("*"):  # into the page cache, also if made long ago
        if path.is_file():
            path.read_bytes()


def once(out: Path, make: Callable[[Path], None]) -> None:
    """Make a folder unless it is done; without the package for it, it is left out."""
    done = out.with_suffix(".done")
    if done.exists():
        return
    shutil.rmtree(out, ignore_errors=True)
    try:
        make(out)
    except ImportError as error:
        print(f"{out} is left out: {error}", file=sys.stderr)
        return
    done.touch()


def pack(data: Path, out: Path) -> None:
    shard.run(ShardConfig(data=data, out=out, split="stratified", jobs=0))


def copy_mds(folder: Path, out: Path) -> None:
    from streaming import MDSWriter

    columns = {"json": "json", "wav": "bytes"}
    with MDSWriter(out=str(out), columns=columns, compression=None) as writer:
        for about, wav in packed(folder):
            writer.write({"json": json.loads(about), "wav": wav})


def copy_litdata(folder: Path, out: Path) -> None:
    import litdata

    litdata.optimize(
        fn=lit_samples,
        inputs=[str(path) for path in training_shards(folder)],
        output_dir=str(out),
        num_workers=1,
        chunk_bytes="64MB",
    )


def lit_samples(path: str) -> Iterator[dict[str, Any]]:
    for about, wav in members(Path(path)):
        yield {"json": about.decode(), "wav": wav}


def copy_plain(folder: Path, out: Path) -> None:
    out.mkdir()
    for row, (_, wav) in enumerate(packed(folder)):
        wave_path(out, row).write_bytes(wav)


def copy_original(folder: Path, out: Path) -> None:
    out.mkdir()
    source = {track.id: track.source for track in manifest.read(folder / "shards").tracks}
    for row, (about, _) in enumerate(packed(folder)):
        segment = json.loads(about)
        path = folder / "genres_original" / source[segment["track"]]
        start = round(segment["start_s"] * SOURCE_RATE)
        wave, _ = soundfile.read(path, start=start, frames=SOURCE_LENGTH, dtype="int16")
        soundfile.write(wave_path(out, row), wave, SOURCE_RATE, "PCM_16")


def wave_path(folder: Path, row: int) -> Path:
    return folder / f"{row:06d}.wav"


def training_shards(folder: Path) -> dict[Path, int]:
    """The shards of the training split, in row order, with their rows."""
    found = manifest.read(folder / "shards").shards
    return {folder / "shards" / s.name: s.rows for s in found if s.name.startswith("train-")}


def training_labels(folder: Path) -> list[int]:
    with ShardSet(folder / "shards") as shards:
        return shards.labels[slice(*shards.rows_of("train"))].tolist()


def packed(folder: Path) -> Iterator[tuple[bytes, bytes]]:
    """The JSON and the WAV file of every training segment, in row order."""
    for path in training_shards(folder):
        yield from members(path)


def members(path: Path) -> Iterator[tuple[bytes, bytes]]:
    with tarfile.open(path) as tar:
        content = (tar.extractfile(member).read() for member in tar)
        yield from zip(content, content, strict=True)


def decoded(wav: bytes) -> Tensor:
    """int16 [T]."""
    wave, _ = soundfile.read(io.BytesIO(wav), dtype="int16")
    return torch.from_numpy(wave)


def delivered(batches: Iterable[Any]) -> int:
    """Take every batch; returns how many segments came."""
    count = 0
    for wave, label in batches:
        if wave.shape != (len(label), LENGTH):
            raise ValueError(f"a batch of {tuple(wave.shape)} with {len(label)} labels")
        count += len(label)
    return count


def ours(folder: Path, scratch: Path) -> Callable[[], int]:
    torch.set_num_threads(1)
    shards = ShardSet(folder / "shards")
    first, stop = shards.rows_of("train")
    plan = Plan(rows=stop - first, total=stop - first, global_batch=BATCH, seed=0)
    layout = lay_out(global_batch=BATCH, world=1, largest_micro_batch=BATCH)

    def work() -> int:
        count = 0
        batches = training_batches(plan, layout, 0, 0)
        with Reader(shards, "train", batches, read_ahead=4, pin=False) as reader:
            for batch in reader:
                if batch.input.shape != (BATCH, LENGTH):
                    raise ValueError(f"a batch of {tuple(batch.input.shape)}")
                count += int(np.count_nonzero(batch.plan.place >= 0))  # not the padding
        return count

    return work


def webdataset_pipeline(folder: Path, scratch: Path) -> Callable[[], int]:
    import webdataset

    torch.set_num_threads(1)

    def sample(found: dict[str, Any]) -> Sample:
        return decoded(found["wav"]), json.loads(found["json"])["label"]

    urls = [str(path) for path in training_shards(folder)]
    data = webdataset.WebDataset(urls, shardshuffle=100, seed=0)
    return lambda: delivered(data.shuffle(BUFFER, seed=0).map(sample).batched(BATCH))


def webdataset_frombuffer(folder: Path, scratch: Path) -> Callable[[], int]:
    torch.set_num_threads(1)
    data = frombuffer_batches(folder)
    return lambda: delivered(data)


def webdataset_worker(folder: Path, scratch: Path) -> Callable[[], int]:
    torch.set_num_threads(1)
    data = frombuffer_batches(folder)
    return lambda: delivered(DataLoader(data, batch_size=None, num_workers=1))


def frombuffer_batches(folder: Path) -> Iterable[Any]:
    """A webdataset pipeline at its best: no decoder, the samples behind the 44-byte header."""
    import webdataset

    def sample(found: dict[str, Any]) -> Sample:
        wave = np.frombuffer(found["wav"], "<i2", offset=44)
        return torch.from_numpy(wave), json.loads(found["json"])["label"]

    urls = [str(path) for path in training_shards(folder)]
    data = webdataset.WebDataset(urls, shardshuffle=100, seed=0)
    batches: Iterable[Any] = data.shuffle(BUFFER, seed=0).map(sample).batched(BATCH)
    return batches


def wids_dataset(folder: Path, scratch: Path) -> Callable[[], int]:
    import wids

    torch.set_num_threads(1)

    def sample(found: dict[str, Any]) -> Sample:
        wave, _ = soundfile.read(found[".wav"], dtype="int16")
        return torch.from_numpy(wave), json.load(found[".json"])["label"]

    parts = training_shards(folder).items()
    data = wids.ShardListDataset(
        [{"url": str(path), "nsamples": rows} for path, rows in parts],
        localname=lambda url: url,  # read in place: nothing is copied
        transformations=sample,
    )
    sampler = wids.ShardedSampler(data, shufflefirst=True)
    return lambda: delivered(DataLoader(data, BATCH, sampler=sampler, num_workers=0))


def mosaic(folder: Path, scratch: Path) -> Callable[[], int]:
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    class Segments(StreamingDataset):
        def __getitem__(self, at: int) -> Sample:
            found = super().__getitem__(at)
            return decoded(found["wav"]), found["json"]["label"]

    torch.set_num_threads(1)
    clean_stale_shared_memory()
    data = Segments(local=str(folder / "mds"), shuffle=True, batch_size=BATCH)
    return lambda: delivered(DataLoader(data, BATCH, num_workers=0))


def lit(folder: Path, scratch: Path) -> Callable[[], int]:
    import litdata

    def sample(found: dict[str, Any]) -> Sample:
        return decoded(found["wav"]), json.loads(found["json"])["label"]

    torch.set_num_threads(1)
    data = litdata.StreamingDataset(
        str(folder / "litdata"), shuffle=True, drop_last=False, transform=sample
    )
    batches = litdata.StreamingDataLoader(data, batch_size=BATCH, num_workers=0)
    return lambda: delivered(batches)


def hugging_face(folder: Path, scratch: Path) -> Callable[[], int]:
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(scratch / "hugging-face")}
    import datasets

    def collate(found: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        return default_collate([(decoded(s["wav"]), s["json"]["label"]) for s in found])

    torch.set_num_threads(1)
    text, number = datasets.Value("string"), datasets.Value("int64")
    about = dict.fromkeys(("track", "group", "genre", "split"), text)
    about |= dict.fromkeys(("row", "label", "segment", "sample_rate"), number)
    about["start_s"] = datasets.Value("float64")
    # as bytes: a column of type Audio needs torchcodec, also with decode=False
    features = {"json": about, "wav": datasets.Value("binary")}
    data = datasets.load_dataset(
        "webdataset",
        data_files=[str(path) for path in training_shards(folder)],
        features=datasets.Features({"__key__": text, "__url__": text} | features),
        split="train",
        streaming=True,
    ).shuffle(seed=0, buffer_size=BUFFER)
    return lambda: delivered(DataLoader(data, BATCH, num_workers=0, collate_fn=collate))


class PlainFiles(Dataset[Sample]):
    """A WAV file a segment."""

    def __init__(self, folder: Path, labels: list[int]) -> None:
        self.paths = [str(wave_path(folder, row)) for row in range(len(labels))]
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, at: int) -> Sample:
        wave, _ = soundfile.read(self.paths[at], dtype="int16")
        return torch.from_numpy(wave), self.labels[at]


class OriginalFiles(PlainFiles):
    """A WAV file a segment at 22,050 Hz, resampled and normalised when it is asked for."""

    def __init__(self, folder: Path, labels: list[int]) -> None:
        from torchaudio.transforms import Resample
        from transformers import Wav2Vec2FeatureExtractor

        super().__init__(folder, labels)
        self.resample = Resample(SOURCE_RATE, RATE)
        self.extract = Wav2Vec2FeatureExtractor(
            feature_size=1, sampling_rate=RATE, padding_value=0.0, do_normalize=True
        )

    def __getitem__(self, at: int) -> Sample:
        wave, _ = soundfile.read(self.paths[at], dtype="float32")
        wave = self.resample(torch.from_numpy(wave)).numpy()
        found = self.extract(wave, sampling_rate=RATE, return_tensors="pt")
        return found.input_values[0], self.labels[at]


class OurRows(Dataset[Sample]):
    """Our shards, read row by row."""

    def __init__(self, folder: Path) -> None:
        self.shards = ShardSet(folder)
        self.first, self.stop = self.shards.rows_of("train")
        self.labels = self.shards.labels.tolist()

    def __len__(self) -> int:
        return self.stop - self.first

    def __getitem__(self, at: int) -> Sample:
        row = self.first + at
        return torch.from_numpy(self.shards.read(row)), self.labels[row]


def loader(data: Dataset[Sample], workers: int) -> Callable[[], int]:
    torch.set_num_threads(1)
    return lambda: delivered(DataLoader(data, BATCH, shuffle=True, num_workers=workers))


def plain(folder: Path, scratch: Path) -> Callable[[], int]:
    return loader(PlainFiles(folder / "plain", training_labels(folder)), 0)


def plain_worker(folder: Path, scratch: Path) -> Callable[[], int]:
    return loader(PlainFiles(folder / "plain", training_labels(folder)), 1)


def ours_worker(folder: Path, scratch: Path) -> Callable[[], int]:
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    return loader(OurRows(folder / "shards"), 1)


def original(folder: Path, scratch: Path) -> Callable[[], int]:
    return loader(OriginalFiles(folder / "original", training_labels(folder)), 0)


def cat(folder: Path, scratch: Path) -> Callable[[], int]:
    paths = [str(path) for path in training_shards(folder)]
    rows = len(training_labels(folder))

    def work() -> int:
        subprocess.run(["cat", *paths], stdout=subprocess.DEVNULL, check=True)
        return rows

    return work


OURS = "mgc_dist Reader"
CONTENDERS: dict[str, measure.Contender] = {
    OURS: ours,
    "webdataset pipeline, soundfile": webdataset_pipeline,
    "webdataset pipeline, np.frombuffer": webdataset_frombuffer,
    "the same with 1 worker": webdataset_worker,
    "wids": wids_dataset,
    "mosaicml-streaming": mosaic,
    "litdata": lit,
    "Hugging Face datasets": hugging_face,
    "plain files in a DataLoader": plain,
    "plain files, DataLoader with 1 worker": plain_worker,
    "mgc_dist through a DataLoader worker": ours_worker,
    "the original project's way": original,
    "cat": cat,
}


def compare(results: dict[str, Any]) -> dict[str, Any]:
    others = [name for name in CONTENDERS if name != OURS]
    rows = results["cat"]["segments"]  # counted from the index, not from what was read
    more = {
        name: found["segments"] - rows
        for name, found in results.items()
        if found != measure.MISSING and found["segments"] != rows
    }
    ratios = {name: measure.ratio(results, OURS, name) for name in others}
    return {"times_our_cpu": ratios, "training_rows": rows, "delivered_otherwise": more}


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    measure.main(
        "reading",
        CONTENDERS,
        prepare,
        (
            "mgc_dist",
            "torch",
            "soundfile",
            "torchaudio",
            "transformers",
            "webdataset",
            "wids",
            "mosaicml-streaming",
            "litdata",
            "datasets",
        ),
        compare,
    )
