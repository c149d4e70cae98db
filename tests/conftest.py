"""Fixtures: ranks by fork, a tiny packed data set, a tiny wav2vec2. No network.

No GPU either: it is hidden from torch, but for a run that asks for the tests of one, `-m gpu`.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: two ranks on two cores
os.environ["HF_HUB_OFFLINE"] = "1"
# Asking whether there is a GPU starts CUDA, which no fork survives; asking the driver does not.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"

import gc
import importlib
import json
import multiprocessing
import shutil
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
import soundfile
import torch
from gpu_marker import device, pytest_configure, pytest_runtest_setup, tell  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from mgc_dist import shard
from mgc_dist.config import BiasConfig, ShardConfig
from mgc_dist.models.classifier import WaveClassifier
from mgc_dist.models.main import build_main
from mgc_dist.packing import music
from mgc_dist.training import engine

if TYPE_CHECKING:
    from cluster import Cluster

torch.set_num_threads(1)

_NEEDED = (
    "deepspeed",
    "transformers.models.wav2vec2.modeling_wav2vec2",
    "matplotlib.backends.backend_agg",
    "matplotlib.backends.backend_svg",
    "torch.utils.tensorboard",
    "mgc_dist.training.command",
    "mgc_dist.evaluate",
    "mgc_dist.bias",
)
"""What a rank imports, in 10 s: once, in the process that ranks are forked from."""


hypothesis.settings.register_profile("no clock", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("no clock")


@cache
def afresh() -> str:
    """The way to start a rank that may use the GPU, whatever this process has done with it.

    Ranks are forked from a server that has imported all, unless an import starts CUDA.
    """
    multiprocessing.set_forkserver_preload(list(_NEEDED))
    (starts,) = run_ranks(1, torch.cuda._is_in_bad_fork, method="forkserver")
    return "spawn" if starts else "forkserver"


@cache
def import_once() -> None:
    """Before the first fork of a process that hides GPUs: what ranks would import, each anew."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        for name in _NEEDED:
            importlib.import_module(name)
        engine._import_muon()
        get_checkpoint_conversion_mapping("wav2vec2")  # compiles 1,000 regular expressions
    gc.collect()
    gc.freeze()  # forks need not look at them again


TINY = {
    "model_type": "wav2vec2",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": [16] * 7,
    "conv_bias": True,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "classifier_proj_size": 16,
    "apply_spec_augment": False,
    "mask_time_prob": 0.0,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "final_dropout": 0.0,
    "layerdrop": 0.1,
}
NOISY = {
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
    "apply_spec_augment": True,
    "mask_time_prob": 0.2,
    "mask_time_length": 3,
}
BASE_FLAVOUR = {"conv_bias": False, "feat_extract_norm": "group", "do_stable_layer_norm": False}


def run_ranks(
    world: int,
    body: Callable[..., Any],
    *args: Any,
    timeout_s: float = 540,
    method: str = "fork",
) -> list[Any]:
    """Call body(*args) on ranks of their own; returns each rank's value, raises the first error.

    Ranks that use a GPU need the method `afresh()`, and a body that another process can import.
    """
    if method == "fork":
        import_once()
    port = _free_port()
    context: Any = multiprocessing.get_context(method)
    pipes, processes = [], []
    for rank in range(world):
        here, there = context.Pipe(duplex=False)
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        process = context.Process(target=_child, args=(there, environment, body, args))
        process.start()
        there.close()
        pipes.append(here)
        processes.append(process)
    results, errors = [], []
    for rank, pipe in enumerate(pipes):
        kind, value = _answer(pipe, 0.0 if errors else timeout_s) or (
            "error",
            f"rank {rank} gave no answer",
        )
        (results if kind == "value" else errors).append(value)
    for process in processes:
        process.join(1.0 if errors else 30.0)
        process.kill()
    if errors:
        raise next((e for e in errors if isinstance(e, BaseException)), RuntimeError(errors))
    return results


def _answer(pipe: Any, timeout_s: float) -> tuple[str, Any] | None:
    """What a rank has sent; None if it has died or is late."""
    try:
        return pipe.recv() if pipe.poll(timeout_s) else None
    except EOFError:
        return None


def _child(pipe: Any, environment: dict[str, str], body: Callable[..., Any], args: Any) -> None:
    os.environ.update(environment)
    # torch gives a forked process its pool of threads back at the first call that needs it. Two
    # threads that call at once, such as a compiler's backward, end it: "Invalid thread pool!".
    torch.set_num_threads(torch.get_num_threads())
    try:
        answer = ("value", body(*args))
    except BaseException as error:
        traceback.print_exc()
        answer = ("error", error)
    try:
        pipe.send(answer)
    except Exception:
        pipe.send(("error", RuntimeError(repr(answer))))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def write_tracks(
    folder: Path, *, genres: int = 3, tracks: int = 6, duration_s: float = 3.0
) -> None:
    """A small tree of GENRE/*.wav and artists.csv, two tracks an artist."""
    lines = ["track,genre,artist"]
    for genre in list(music.STYLES)[:genres]:
        (folder / genre).mkdir(parents=True)
        for number in range(tracks):
            wave = music.compose(genre, number, seed=5, duration_s=duration_s, per_artist=2)
            name = f"{genre}.{number:05d}"
            soundfile.write(folder / genre / f"{name}.wav", wave, music.SAMPLE_RATE, "PCM_16")
            lines.append(f"{name},{genre},{genre} artist {number // 2}")
    (folder / "artists.csv").write_text("\n".join(lines) + "\n")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that start whole scripts come first: at the end, one of them would run alone."""
    items.sort(key=lambda item: item.path.name not in ("test_benchmarks.py", "test_shortcut.py"))


@pytest.fixture(scope="session")
def tracks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 genres x 6 tracks of 3 s at 22,050 Hz, two tracks an artist."""
    folder = tmp_path_factory.mktemp("tracks")
    write_tracks(folder)
    return folder


def shard_config(tracks: Path, out: Path, **changes: Any) -> ShardConfig:
    """Segments of 0.5 s with a hop of 0.25 s: 11 a track."""
    settings: dict[str, Any] = {
        "data": tracks,
        "out": out,
        "groups": tracks / "artists.csv",
        "segment_s": 0.5,
        "hop_s": 0.25,
        "rows_per_shard": 20,
        "validation_fraction": 0.3,
        "test_fraction": 0.3,
        "jobs": 1,
    }
    return ShardConfig(**(settings | changes))


@pytest.fixture(scope="session")
def shards(tracks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tracks, packed: 66 rows in each split."""
    out = tmp_path_factory.mktemp("data") / "shards"
    shard.run(shard_config(tracks, out))
    return out


@pytest.fixture
def copy(shards: Path, tmp_path: Path) -> Path:
    """A copy of the shards that may be damaged."""
    out = tmp_path / "copy"
    out.mkdir()
    for path in shards.iterdir():
        if path.is_file():
            shutil.copy(path, out)
    return out


def bias_config(shards: Path, **changes: Any) -> BiasConfig:
    """A log-mel bias model in two folds (there are two training artists a genre at most)."""
    settings: dict[str, Any] = {"shards": shards, "backbone": "logmel", "folds": 2, "batch": 8}
    return BiasConfig(**(settings | changes))


def make_table(config: BiasConfig) -> None:
    """Run the bias command; for `run_ranks`."""
    from mgc_dist import bias

    bias.run(config)


@pytest.fixture(scope="session")
def table(shards: Path) -> Path:
    """The bias table of the shards."""
    run_ranks(1, make_table, bias_config(shards))
    return shards / "bias"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Config file of a tiny wav2vec2 of the large flavour, without dropout."""
    return write_model(tmp_path_factory.mktemp("model") / "tiny.json")


def build_tiny(
    name: Path | str, genres: tuple[str, ...] = ("a", "b", "c"), **changes: Any
) -> WaveClassifier:
    """A main model for segments of 0.5 s, nothing frozen, in training mode."""
    settings: dict[str, Any] = {
        "freeze": "none",
        "frozen_layers": None,
        "activation_checkpointing": False,
        "seed": 0,
        "segment_samples": 8000,
        "sample_rate": 16_000,
    }
    return build_main(str(name), genres, **(settings | changes))


def write_model(path: Path, **changes: Any) -> Path:
    """A config file of a tiny wav2vec2."""
    path.write_text(json.dumps(TINY | changes))
    return path


@pytest.fixture(scope="session")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Config file of the tiny wav2vec2 with dropout and SpecAugment."""
    return write_model(tmp_path_factory.mktemp("model") / "noisy.json", **NOISY)


@pytest.fixture(scope="session")
def undisturbed(
    shards: Path, table: Path, noisy: Path, tmp_path_factory: pytest.TempPathFactory
) -> str:
    """Hash of the final weights of a run on two ranks that nothing happened to: 13 steps."""
    from harness import start, weights_hash
    from trainings import config

    work = tmp_path_factory.mktemp("undisturbed")
    settings = config(shards, noisy, work / "run", checkpoint_every_epochs=0.3, resume="auto")
    job = start(settings, work)
    assert job.wait() == [0, 0], job.said
    return weights_hash(work / "run")


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Cluster"]:
    """A real Slurm of two nodes, for all tests of a session."""
    import cluster as clusters

    reason = clusters.why_not()
    if reason:
        pytest.skip(f"NO SLURM TESTS HERE, nothing about Slurm is shown: {reason}")
    with clusters.running(tmp_path_factory.mktemp("slurm")) as found:
        yield found


@pytest.fixture
def cluster(slurm: "Cluster", tmp_path: Path) -> Iterator["Cluster"]:
    """The cluster, with nothing running; what jobs write goes into tmp_path."""
    slurm.folder = tmp_path
    yield slurm
    slurm.restore()
