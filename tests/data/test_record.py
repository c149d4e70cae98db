"""The bytes of a record, read by clients that are not ours."""

import io
import json
import subprocess
import tarfile

import numpy as np
import pytest
import soundfile

from mgc_dist.data import record
from mgc_dist.errors import UserError


def segment(**changes: object) -> record.Segment:
    settings: dict = {
        "row": 7,
        "track": "blues_00000",
        "group": "John Lee Hooker",
        "genre": "blues",
        "label": 0,
        "segment": 3,
        "start_s": 4.5,
        "sample_rate": 16_000,
        "split": "train",
    }
    return record.Segment(**(settings | changes))


WAVE = np.random.default_rng(0).integers(-32768, 32768, 8001).astype(np.int16)


def test_record_is_two_tar_members_at_the_known_places(tmp_path) -> None:
    data = record.encode(segment(), WAVE)
    assert len(data) == record.record_bytes(len(WAVE))
    path = tmp_path / "x.tar"
    path.write_bytes(data.ljust(record.shard_bytes(1, len(WAVE)), b"\0"))
    with tarfile.open(path, "r:") as tar:
        text, wave = tar.getmembers()
        assert [m.name for m in (text, wave)] == ["blues_00000_03.json", "blues_00000_03.wav"]
        assert (text.mtime, text.uid, text.gid, text.mode, text.uname) == (0, 0, 0, 0o644, "")
        assert wave.offset_data == record.WAVE_OFFSET - record.RIFF_BYTES
        described = json.load(tar.extractfile(text))
        samples, rate = soundfile.read(io.BytesIO(tar.extractfile(wave).read()), dtype="int16")
    assert described["group"] == "John Lee Hooker"
    assert described["start_s"] == 4.5
    assert rate == 16_000
    assert (samples == WAVE).all()
    start = record.WAVE_OFFSET
    assert (np.frombuffer(data, "<i2", len(WAVE), start) == WAVE).all()
    assert record.key_at(data) == "blues_00000_03"


def test_shards_have_the_length_that_tar_writes(tmp_path) -> None:
    for rows in (1, 3, 20):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for name, size in (("x.json", 100), ("x.wav", 44 + 2 * 8001)) * rows:
                info = tarfile.TarInfo(name)
                info.size = size
                tar.addfile(info, io.BytesIO(b"\0" * size))
        assert len(buffer.getvalue()) == record.shard_bytes(rows, 8001)


def test_gnu_tar_lists_it(tmp_path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(record.encode(segment(), WAVE).ljust(record.shard_bytes(1, 8001), b"\0"))
    listed = subprocess.run(["tar", "tf", path], capture_output=True, text=True, check=True)
    assert listed.stdout.split() == ["blues_00000_03.json", "blues_00000_03.wav"]


@pytest.mark.parametrize("track", ["blues.00000", "a/b", "ä", "x" * 89])
def test_keys_that_tools_would_misread_are_refused(track: str) -> None:
    with pytest.raises(UserError, match="sample key"):
        record.encode(segment(track=track), WAVE)


def test_long_descriptions_are_refused() -> None:
    with pytest.raises(UserError, match=r"description of track blues_00000.*at most 512"):
        record.encode(segment(group="x" * 400), WAVE)
    record.encode(segment(group="宇多田ヒカル"), WAVE)
