"""Presets from packing to a dry run, with small stand-ins for models of the hub."""

import csv
import re
from pathlib import Path

import pytest
from conftest import write_model, write_tracks
from test_custom import write_mert
from test_families import write
from test_launcher import answer

from mgc_dist import cli
from mgc_dist.config import ModelConfig, ShardConfig, TrainConfig
from mgc_dist.data import manifest
from mgc_dist.errors import UserError

MUSIC = [name for name in cli.preset_names() if name.startswith(("gtzan", "fma"))]
LEFT = ["gtzan-mert2", "gtzan-mert2-lora"]
"""Whose model is for the user to name."""


@pytest.fixture(scope="module")
def music(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two genres, in folders and as FMA has them."""
    root = tmp_path_factory.mktemp("music")
    write_tracks(root / "tracks", genres=2, duration_s=10.1)
    (root / "fma_small" / "000").mkdir(parents=True)
    (root / "fma_metadata").mkdir()
    with (root / "fma_metadata" / "tracks.csv").open("w", newline="") as file:
        write_line = csv.writer(file).writerow
        write_line(["", "set", "track", "artist"])
        write_line(["", "split", "genre_top", "id"])
        write_line(["track_id", "", "", ""])
        for number, path in enumerate(sorted((root / "tracks").glob("*/*.wav"))):
            artist = number // 2
            split = ("training", "validation", "test")[artist % 3]
            write_line([number, split, path.parent.name, artist])
            (root / "fma_small" / "000" / f"{number:06d}.wav").hardlink_to(path)
    return root


@pytest.fixture(scope="module")
def packed(music: Path) -> dict[tuple[str, ...], Path]:
    """Folders of shards, by what of a preset decides on them."""
    return {}


def pack(name: str, music: Path, packed: dict[tuple[str, ...], Path]) -> Path:
    asked = cli.parse("shard", ShardConfig, ["--preset", name])
    key = (asked.layout, str(asked.sample_rate), str(asked.segment_s))
    if key not in packed:
        out = packed[key] = music / f"shards {' '.join(key)}"
        words = ["--preset", name, "--out", str(out), "--jobs", "1"]
        if asked.layout == "fma":
            words += ["--data", str(music / "fma_small")]
        else:
            words += ["--data", str(music / "tracks"), "--split", "stratified"]
            words += ["--groups", str(music / "tracks" / "artists.csv")]
            words += ["--validation-fraction", "0.3", "--test-fraction", "0.3"]
        done = answer("-m", "mgc_dist.shard", *words)
        assert done.returncode == 0, done.stdout + done.stderr
    return packed[key]


def stand_in(name: str, folder: Path) -> list[str]:
    """A small model of the same form."""
    if "mert" in name or "muq" in name:
        return ["--model", str(write_mert(folder / "MERT")), "--trust-remote-code"]
    if "ast" in name:
        return ["--model", str(write(folder, "audio-spectrogram-transformer", max_length=1024))]
    return ["--model", str(write_model(folder / "tiny.json"))]


@pytest.mark.parametrize("name", [name for name in MUSIC if not name.endswith("probe")])
def test_a_preset_goes_from_packing_to_a_dry_run(
    name: str, music: Path, packed: dict[tuple[str, ...], Path], tmp_path: Path
) -> None:
    shards = str(pack(name, music, packed))
    asked = cli.parse("shard", ShardConfig, ["--preset", name])
    found = manifest.read(Path(shards))
    assert (found.sample_rate, found.segment_samples) == (asked.sample_rate, asked.segment_samples)
    words = ["--preset", name, "--shards", shards, "--device", "cpu"]
    trained = [*words, *stand_in(name, tmp_path), "--run", str(tmp_path / "run")]
    settings = cli.parse("train", TrainConfig, trained)
    own = cli.parse("train", TrainConfig, ["--preset", name, "--model", "any"])
    assert own.data.shards == asked.out, "what it packs is what it trains on"
    if settings.objective.loss != "ce":
        done = answer("launch/bias.py", *words, "--backbone", "logmel", "--folds", "2")
        assert done.returncode == 0, done.stderr
    done = answer("launch/train.py", *trained, "--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\bsteps\b", done.stdout)


def test_the_probe_goes_from_packing_to_figures(
    music: Path, packed: dict[tuple[str, ...], Path], tmp_path: Path
) -> None:
    name = "gtzan-muq-probe"
    shards, out = pack(name, music, packed), tmp_path / "out"
    words = ["--preset", name, "--shards", str(shards), "--out", str(out), "--device", "cpu"]
    words += [*stand_in(name, tmp_path), "--head", "linear", "--c", "1"]
    done = answer("launch/probe.py", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (out / "probe.json").is_file()


@pytest.mark.parametrize("name", LEFT)
def test_a_model_that_cannot_be_known_is_left_to_the_user(name: str) -> None:
    wanted = (
        r"--model: got a preset that leaves it to you, expected MERT v2: .*https://huggingface\.co/"
        r"m-a-p\n  add --model NAME --revision COMMIT, or --model FOLDER"
    )
    with pytest.raises(UserError, match=wanted):
        cli.parse("train", TrainConfig, ["--preset", name])
    made = cli.parse("train", TrainConfig, ["--preset", name, "--model", "models/mert2"])
    assert made.main.model == "models/mert2"
    assert not made.main.trust_remote_code, "which is for the user to say, too"
    with pytest.raises(UserError, match="add --model"):
        ModelConfig(model="?")


def test_presets_name_no_model_that_a_reader_could_not_find() -> None:
    """They are known from their publications; others may exist or not."""
    known = {
        *("facebook/wav2vec2-base", "facebook/wav2vec2-large-960h-lv60-self", "logmel"),
        *("MIT/ast-finetuned-audioset-10-10-0.4593", "OpenMuQ/MuQ-large-msd-iter"),
    }
    found = re.findall(
        r"^ +(?:model|backbone): ([^?\"\n]+/[^\n]+)$",
        "\n".join((cli.PRESETS / f"{name}.yaml").read_text() for name in MUSIC),
        re.M,
    )
    assert found
    assert set(found) <= known
