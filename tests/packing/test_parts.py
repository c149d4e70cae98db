"""Parts on several machines, joined: the bytes of one process, and every hole named."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import shard_config
from test_pack import digests

from mgc_dist import shard
from mgc_dist.data import manifest
from mgc_dist.errors import UserError
from mgc_dist.packing import parts


def run_part(tracks: Path, out: Path, part: str, **changes: object) -> None:
    shard.run(shard_config(tracks, out, part=part, **changes))


@pytest.fixture
def copy(tracks: Path, tmp_path: Path) -> Path:
    """A copy of the tracks that may be changed."""
    return Path(shutil.copytree(tracks, tmp_path / "tracks"))


@pytest.mark.parametrize("total", [1, 3, 25])
def test_joined_parts_are_the_bytes_of_one_process(
    total: int, tracks: Path, shards: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for number in range(total, 0, -1):  # in any order
        run_part(tracks, out, f"{number}/{total}", jobs=2 if number == 1 else 1)
    shard.run(shard_config(tracks, out, join=True, jobs=2))
    assert digests(out) == digests(shards)
    assert not (out / parts.FOLDER).exists()


def test_parts_made_elsewhere_are_joined_where_they_are_brought_together(
    tracks: Path, shards: Path, tmp_path: Path
) -> None:
    for number in (1, 2):
        run_part(tracks, tmp_path / f"host{number}", f"{number}/2")
    shutil.copytree(tmp_path / "host2" / "parts", tmp_path / "host1" / "parts", dirs_exist_ok=True)
    shard.run(shard_config(tracks, tmp_path / "host1", join=True))
    assert digests(tmp_path / "host1") == digests(shards)


def test_a_killed_part_goes_on_and_a_finished_one_does_nothing(
    tracks: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, read, decoded = tmp_path / "out", parts.audio.decode, []

    def killed_at_fifth(path: Path, rate: int) -> np.ndarray:
        decoded.append(path)
        if len(decoded) == 5:
            raise KeyboardInterrupt
        return read(path, rate)

    monkeypatch.setattr(parts.audio, "decode", killed_at_fifth)
    with pytest.raises(KeyboardInterrupt):
        run_part(tracks, out, "1/2")
    with pytest.raises(UserError, match=r"--join in .*: got no finished part"):
        shard.run(shard_config(tracks, out, join=True))
    run_part(tracks, out, "1/2")
    assert len(decoded) == len(set(decoded)) + 1 == 10  # 9 tracks, one of them twice
    run_part(tracks, out, "1/2")
    assert len(decoded) == 10
    run_part(tracks, out, "2/2")
    shard.run(shard_config(tracks, out, join=True))
    assert digests(out) == digests(shards)


def test_missing_foreign_and_damaged_parts_are_refused(copy: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_part(copy, out, "1/2")
    with pytest.raises(UserError, match="part-0002-of-0002 is missing"):
        shard.run(shard_config(copy, out, join=True))
    run_part(copy, out, "2/2")
    run_part(copy, out, "1/3")
    with pytest.raises(UserError, match="part-0001-of-0003 is of another number of parts"):
        shard.run(shard_config(copy, out, join=True))
    for path in (out / "parts").glob("*-of-0003*"):
        path.unlink()
    with pytest.raises(UserError, match=r"got waves at 16000 Hz, expected 8000 Hz"):
        shard.run(shard_config(copy, out, join=True, sample_rate=8000))
    (waves,) = (out / "parts").glob("part-0002-of-0002.*.pcm")
    content = bytearray(waves.read_bytes())
    content[1000] ^= 4
    waves.write_bytes(content)
    with pytest.raises(UserError, match=r"part-0002-of-0002\..*\.pcm: track .*another checksum"):
        shard.run(shard_config(copy, out, join=True, allow_bad="9"))  # no bad file: a bad copy
    run_part(copy, out, "1/2")
    (out / "parts" / "part-0001-of-0002.json").write_text("{")
    with pytest.raises(UserError, match=r"part-0001-of-0002\.json.*\n.*run this part again"):
        shard.run(shard_config(copy, out, join=True))
    (out / "parts" / "part-0001-of-0002.json").unlink()
    run_part(copy, out, "1/2")
    (copy / "blues" / "blues.00000.wav").write_bytes(b"another file")
    with pytest.raises(UserError, match=r"track blues_00000: got made from .* bytes"):
        shard.run(shard_config(copy, out, join=True))
    assert not list(out.glob("*.tar"))


def test_files_that_only_decoding_finds_bad_cost_the_other_parts_nothing(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    soundfile.write(copy / "blues" / "blues.00001.wav", np.zeros(66_150), 22_050)
    (copy / "blues" / "blues.00002.wav").write_bytes(b"no audio")
    out = tmp_path / "out"
    for number in (1, 2):
        run_part(copy, out, f"{number}/2")
    assert "unusable: blues_00001: silence" in capsys.readouterr().out
    with pytest.raises(
        UserError, match=r"(?s)got 2.*blues\.00001\.wav: silence.*blues\.00002\.wav: no read"
    ):
        shard.run(shard_config(copy, out, join=True))
    shard.run(shard_config(copy, out, join=True, allow_bad="2"))
    shard.run(shard_config(copy, tmp_path / "whole", allow_bad="2"))
    assert digests(out) == digests(tmp_path / "whole")
    assert len(manifest.read(out).excluded) == 2


def test_a_list_of_another_format_is_refused(copy: Path, tmp_path: Path) -> None:
    run_part(copy, tmp_path / "out", "1/1")
    path = tmp_path / "out" / "parts" / "part-0001-of-0001.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": "mgc_dist part 9"}))
    with pytest.raises(UserError, match="mgc_dist part 9"):
        shard.run(shard_config(copy, tmp_path / "out", join=True))


def test_run_this_part_again_heals_what_is_damaged(
    copy: Path, shards: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for number in (1, 2):
        run_part(copy, out, f"{number}/2")
    waves = next((out / "parts").glob("part-0001-of-0002.*.pcm"))
    listed = out / "parts" / "part-0001-of-0002.json"
    content = bytearray(waves.read_bytes())
    content[7000] ^= 1
    waves.write_bytes(content)
    run_part(copy, out, "1/2")
    for text in ("{", "{}", "5"):
        listed.write_text(text)
        run_part(copy, out, "1/2")
    shard.run(shard_config(copy, out, join=True))
    assert digests(out) == digests(shards)


@pytest.mark.parametrize("left", [1, 3, 4])
def test_a_kill_after_joining_is_finished_by_the_same_command(
    left: int, tracks: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    for number in (1, 2):
        run_part(tracks, out, f"{number}/2")
    (out / "parts" / "notes.txt").write_text("mine")

    def killed(out: Path, **_: bool) -> None:
        for path in sorted((out / "parts").glob("part-*"))[left:]:
            path.unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(parts, "remove", killed)
        with pytest.raises(KeyboardInterrupt):
            shard.run(shard_config(tracks, out, join=True))
    shard.run(shard_config(tracks, out, join=True))
    assert digests(out) == digests(shards)
    assert [path.name for path in (out / "parts").iterdir()] == ["notes.txt"]


def test_parts_know_nothing_of_rows_and_a_dry_run_writes_nothing(
    tracks: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run_part(tracks, out, "1/1", dry_run=True)
    assert not out.exists()
    run_part(tracks, out, "1/1")
    other = {"rows_per_shard": 50, "segment_s": 1.0, "hop_s": 0.5}
    shard.run(shard_config(tracks, out, join=True, **other))
    shard.run(shard_config(tracks, tmp_path / "whole", **other))
    assert digests(out) == digests(tmp_path / "whole")
