"""The card and `shard info` say what is in a data set, and what is not controlled."""

from pathlib import Path

import pytest
from conftest import shard_config

from mgc_dist import shard
from mgc_dist.config import InfoConfig
from mgc_dist.data import manifest
from mgc_dist.packing import card


def test_info_shows_splits_genres_settings(
    shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard.info(InfoConfig(shards=shards))
    shown = capsys.readouterr().out
    for part in ("train", "validation", "test", "blues", "segment_samples 8000", "soxr"):
        assert part in shown
    assert manifest.read(shards).dataset_id[:12] in shown
    assert "not controlled" not in shown  # every artist is known


def test_the_card_counts_tracks_hours_and_bytes(shards: Path) -> None:
    text = (shards / card.NAME).read_text()
    size = sum(path.stat().st_size for path in shards.glob("train-*.tar"))
    assert f"| train | 6 | 3 | 66 | 0.01 | 4 | {size / 1e6:.1f} |" in text
    assert "| 0 | blues | 2 | 2 | 2 |" in text
    assert "- nothing known" in text


def test_hours_count_overlaps_once(shards: Path) -> None:
    found = manifest.read(shards)
    assert card.split_rows(found)[0][4] == f"{6 * 3.0 / 3600:.2f}"


def test_the_card_names_what_is_unknown_or_left_out(tracks: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shard.run(shard_config(tracks, out, groups=None))
    text = (out / card.NAME).read_text()
    assert "18 tracks have no known artist" in text
    (out / card.NAME).unlink()
    shard.run(shard_config(tracks, out, groups=None))  # nothing to do but the card
    assert (out / card.NAME).read_text() == text


def test_lists_made_by_artist_need_no_warning() -> None:
    assert card.not_controlled("fault-filtered", 929, 929) == ""
    assert "3 tracks" in card.not_controlled("fault-filtered", 3, 929)
    assert card.not_controlled("kfold", 0, 10) == ""


def test_a_page_of_the_users_own_stays(tracks: Path, tmp_path: Path) -> None:
    shard.run(shard_config(tracks, tmp_path))
    text = (tmp_path / card.NAME).read_bytes()
    (tmp_path / card.NAME).write_bytes(b"mine \xff\xfe")
    shard.run(shard_config(tracks, tmp_path))
    assert (tmp_path / card.NAME).read_bytes() == b"mine \xff\xfe"
    assert (tmp_path / card.BESIDE).read_bytes() == text
    (tmp_path / card.NAME).unlink()  # as an older data set has it
    shard.run(shard_config(tracks, tmp_path))
    assert (tmp_path / card.NAME).read_bytes() == text
    assert not (tmp_path / card.BESIDE).exists()
