"""The way a user goes: real processes, the real deepspeed launcher, errors and exit codes."""

import importlib
import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import NoReturn

import pytest
from conftest import _free_port, import_once, shard_config, write_model, write_tracks

from mgc_dist import shard

ROOT = Path(__file__).resolve().parent.parent
DEEPSPEED = str(Path(sys.executable).with_name("deepspeed"))


def call(
    *words: str | Path, ranks: int = 0, timeout_s: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run a script or module; with ranks, under the deepspeed launcher."""
    command = [sys.executable, *map(str, words)]
    if ranks:
        port = ["--master_port", str(_free_port())]
        command = [DEEPSPEED, "--log_level", "error", "--num_gpus", str(ranks), *port]
        command += [*map(str, words), "--device", "cpu"]
    # the launcher sets CUDA_VISIBLE_DEVICES anew: the CPU must be asked for
    environment = {"DS_ACCELERATOR": "cpu"} | {
        k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")
    }
    return subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout_s,
    )


def answer(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """As `call` without ranks, in a fork: imports take five seconds, and are not the point."""
    import_once()
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            become([*map(str, words)], out, err)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return subprocess.CompletedProcess(words, code, out.read_text(), err.read_text())


def become(words: list[str], out: Path, err: Path) -> NoReturn:
    """End this fork as `python WORDS` would end."""
    code: object = 1
    try:
        for number, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False) for n in (1, 2))
        os.chdir(ROOT)
        os.environ["DS_ACCELERATOR"] = "cpu"
        module = words[0] == "-m"
        sys.argv = words[module:]
        if module:
            importlib.import_module(words[1]).main()
        else:
            runpy.run_path(words[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


def test_smoke_preset_through_the_launcher(tmp_path: Path) -> None:
    data, shards, run = tmp_path / "data", tmp_path / "shards", tmp_path / "run"
    steps = [
        (0, "-m", "mgc_dist.synth", data, "--preset", "smoke"),
        (
            0,
            "-m",
            "mgc_dist.shard",
            "--preset",
            "smoke",
            "--data",
            data / "genres_original",
            "--groups",
            data / "artists.csv",
            "--out",
            shards,
        ),
        (2, "launch/bias.py", "--preset", "smoke", "--shards", shards),
        (2, "launch/train.py", "--preset", "smoke", "--shards", shards, "--run", run),
        (2, "launch/train.py", "--config", run / "config.yaml", "--resume", "auto"),
        (2, "launch/evaluate.py", run),
        (0, "-m", "mgc_dist.predict", run, data / "genres_original/jazz/jazz.00000.wav", "--json"),
        (0, "-m", "mgc_dist.export", run, tmp_path / "exported"),
    ]
    shown = []
    for ranks, *words in steps:
        done = call(*words, ranks=ranks) if ranks else answer(*words)
        assert done.returncode == 0, done.stdout + done.stderr
        shown.append(done.stdout)
    assert "Bias report: logmel" in shown[2]
    assert "already complete" in shown[4]
    assert "run: test, data set" in shown[5]
    assert len(json.loads(shown[6])[0]["probabilities"]) == 10
    log = (run / "train.log").read_text()
    assert "global batch 32 = 2 ranks x micro batch 16" in log
    assert "ZeRO-2" in log
    assert json.loads((run / "env.json").read_text())["world"] == 2


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small packed data set without a bias table."""
    folder = tmp_path_factory.mktemp("packed")
    write_tracks(folder / "tracks", duration_s=1.0)
    shard.run(shard_config(folder / "tracks", folder / "shards"))
    return folder


def test_own_folder_on_one_process_as_readme_says(packed: Path, tmp_path: Path) -> None:
    shards, run = tmp_path / "shards", tmp_path / "run"
    pack = ("-m", "mgc_dist.shard", "--data", packed / "tracks", "--out", shards)
    small = ("--segment-s", "0.5", "--hop-s", "0.25")
    steps = [
        (*pack, *small, "--dry-run"),
        (*pack, *small),
        ("launch/bias.py", "--shards", shards, "--backbone", "logmel"),
        (
            "launch/train.py",
            "--shards",
            shards,
            "--run",
            run,
            "--epochs",
            "1",
            "--model",
            "wav2vec2-demo",
            "--freeze",
            "none",
            "--lr",
            "2e-3",
            "--head-lr",
            "2e-3",
        ),
        ("launch/evaluate.py", run),
    ]
    for words in steps:
        training = words[0] == "launch/train.py"
        done = call("-X", "importtime", *words) if training else answer(*words)
        assert done.returncode == 0, done.stdout + done.stderr
        if training:
            assert " deepspeed.runtime.engine" in done.stderr
            assert " torch._inductor.compile_fx" not in done.stderr, "a second a start"
    assert (run / "evaluation" / "confusion-test.png").is_file()
    assert json.loads((run / "env.json").read_text())["world"] == 1


def test_shards_from_elsewhere_are_staged_by_two_ranks(packed: Path, tmp_path: Path) -> None:
    node, source = tmp_path / "node", f"pipe:cat {packed / 'shards'}/{{}}"
    model = write_model(tmp_path / "tiny.json")
    common = ("--shards", node, "--shards-from", source, "--model", model, "--loss", "ce")
    small = ("--freeze", "none", "--epochs", "0.5", "--global-batch", "8")
    run = tmp_path / "run"
    done = call("launch/train.py", *common, *small, "--run", run, ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    names = {path.name for path in (packed / "shards").glob("*.tar")}
    assert {path.name for path in node.glob("*.tar")} == names
    heads = ("--backbone", "logmel", "--folds", "2")
    done = answer("launch/evaluate.py", run, "--shards-from", source)
    assert done.returncode == 0, done.stdout + done.stderr
    done = answer("launch/bias.py", "--shards", node, "--shards-from", source, *heads)
    assert done.returncode == 0, done.stdout + done.stderr
    refused(
        answer("launch/bias.py", "--shards", tmp_path / "n2", "--shards-from", "s3://bucket/x"),
        "--shards-from s3://bucket/x",
        "pipe:aws s3 cp",
    )


def test_verify_and_info(packed: Path, tmp_path: Path) -> None:
    done = answer("-m", "mgc_dist.shard", "info", packed / "shards")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tracks by genre" in done.stdout
    done = answer("-m", "mgc_dist.shard", "verify", packed / "shards")
    assert done.returncode == 0, done.stdout + done.stderr
    copy = Path(shutil.copytree(packed / "shards", tmp_path / "copy"))
    content = bytearray((copy / "test-000000.tar").read_bytes())
    content[-1] ^= 1
    (copy / "test-000000.tar").write_bytes(content)
    done = answer("-m", "mgc_dist.shard", "verify", copy)
    refused(done, "test-000000.tar: archive tail: got byte 1", "sha256")


def refused(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    """Exit code 2, no traceback, one message of two lines that names what matters."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    messages = [line for line in done.stderr.splitlines() if ": error: " in line]
    assert len(messages) == 1
    for part in parts:
        assert part in done.stderr


def test_errors_of_the_data(packed: Path, tmp_path: Path) -> None:
    refused(answer("-m", "mgc_dist.shard", "--data", tmp_path), "no audio files in its sub-folders")
    (tmp_path / "file").touch()
    done = answer(
        "-m",
        "mgc_dist.shard",
        "--data",
        packed / "tracks",
        "--out",
        tmp_path / "file",
        "--segment-s",
        "0.5",
    )
    assert done.returncode == 74
    assert "error: [Errno" in done.stderr
    assert "Traceback" not in done.stderr
    broken = tmp_path / "in" / "rock"
    broken.mkdir(parents=True)
    (broken / "rock.1.wav").write_bytes(b"no audio")
    refused(
        answer("-m", "mgc_dist.shard", "--data", tmp_path / "in"), "rock.1.wav", "--allow-bad 1"
    )
    nothing = tmp_path / "nothing"
    for script in ("launch/train.py", "launch/bias.py"):
        done = answer(script, "--shards", nothing)
        refused(done, f"data set {nothing}", "python -m mgc_dist.shard --data")
    shards = packed / "shards"
    done = answer("launch/train.py", "--shards", shards, "--run", tmp_path / "run")
    refused(done, "no such table", "deepspeed launch/bias.py")
    assert not (tmp_path / "run").exists()


def test_errors_of_models_presets_and_arithmetic(packed: Path, tmp_path: Path) -> None:
    shards, run = packed / "shards", tmp_path / "run"
    common = ("launch/train.py", "--shards", shards, "--loss", "ce", "--run", run)
    refused(answer(*common, "--model", tmp_path / "none"), "correct the path")
    assert not run.exists()  # the next try may use the name
    refused(
        answer("launch/bias.py", "--shards", shards, "--folds", "3"),
        "facebook/wav2vec2-base",
        "a network",
    )
    (tmp_path / "p.yaml").write_text("train: {optim: {global_bach: 3}}\n")
    refused(answer(*common, "--preset", tmp_path / "p.yaml"), "did you mean global_batch?")
    assert answer(*common, "--lrr", "1").returncode == 2
    refused(answer(*common, "--global-batch", "0"), "--global-batch", "1 to 1000000")
    few = call(*common, "--global-batch", "1", "--micro-batch", "1", ranks=2)
    refused(few, "--global-batch 1 on 2 ranks", "at least one row a rank")


def test_errors_of_tables_and_runs(packed: Path, tmp_path: Path) -> None:
    shards = packed / "shards"
    made = answer(
        "launch/bias.py",
        "--shards",
        shards,
        "--backbone",
        "logmel",
        "--folds",
        "2",
        "--bias-table",
        tmp_path / "bias",
    )
    assert made.returncode == 0, made.stderr
    other = tmp_path / "other"
    shard.run(shard_config(packed / "tracks", other, hop_s=0.1))
    common = ("launch/train.py", "--bias-table", tmp_path / "bias", "--run", tmp_path / "run")
    refused(answer(*common, "--shards", other), "a table of data set", "launch/bias.py --overwrite")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    refused(answer(*common, "--shards", shards), "not empty", "--resume auto")
    refused(answer("launch/evaluate.py", tmp_path / "run"), "model folder")
    shutil.rmtree(tmp_path / "run")
    refused(answer("-m", "mgc_dist.predict", tmp_path / "run", "x.wav"), "no such folder")
