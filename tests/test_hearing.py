"""A short form of `make hear`: what real programs write is heard as FFmpeg's program hears it."""

import json
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import hearing  # noqa: E402
import repetitions  # noqa: E402

SOME = (
    "mp3-vbr-lame-pipe",
    "mp3-sox",
    "mp3-vbr-ffmpeg",
    "mp3-joined-lame",
    "ogg-oggenc",
    "ogg-chained-oggenc",
    "opus-opusenc",
    "opus-soundfile",
    "aac-m4a-ffmpeg",
    "aac-mp4-video-ffmpeg",
    "wma-2-ffmpeg",
    "flac-ffmpeg-pipe",
    "wav-ffmpeg-pipe",
    "wav-rifx-sox",
    "au-mu-law-sox",
)
missing = [program for program in hearing.PROGRAMS if not shutil.which(program)]


@pytest.mark.skipif(bool(missing), reason=f"no {', '.join(missing)} here: apt-get installs them")
@pytest.mark.parametrize("name", SOME)
def test_a_file_is_heard_as_ffmpeg_hears_it(name: str, tmp_path: Path) -> None:
    rows = hearing.hear([name], tmp_path)
    assert hearing.faults(rows) == []


def test_faults_are_seen() -> None:
    good = {"longer_ms": 0.1, "correlation": 0.9999, "cut": {"WRONG": 0}}
    bad = [{"longer_ms": -2.0}, {"correlation": 0.99}, {"cut": {"WRONG": 1}}, {"refused": "why"}]
    rows = {"good": good} | {str(n): good | change for n, change in enumerate(bad)}
    assert hearing.faults(rows) == ["0", "1", "2", "3"]


def test_the_page_shows_the_result() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "hearing.json").read_text())
    page = hearing.PAGE.read_text(encoding="utf-8")
    assert hearing.render(result, page) == page, "make hear"
    assert list(result["rows"]) == list(hearing.WRITERS)
    assert hearing.faults(result["rows"]) == []


def test_the_page_shows_what_was_found_twice() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "repetitions.json").read_text())
    page = repetitions.PAGE.read_text(encoding="utf-8")
    assert repetitions.render(result, page) == page, "make hear"
    assert set(result["result"]["found"]) == set(repetitions.COPIES)
    assert result["result"]["wrong_pairs"] == []
    assert min(result["result"]["found"].values()) >= 0.95 * result["result"]["planted"]
