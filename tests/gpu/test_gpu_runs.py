"""The whole train command on a GPU, each run in a process of its own."""

import json
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import waits
from conftest import afresh, bias_config, make_table, run_ranks, write_model
from fresh import Tell, at_once, train_alone
from harness import Job, at_step, both, weights_hash, weights_of
from metrics import read_metrics
from test_cache import farthest
from test_gpu_engine import FOREVER_CYCLES
from trainings import config, losses

from mgc_dist.config import TrainConfig
from mgc_dist.data.reader import ShardSet
from mgc_dist.journal import read_status
from mgc_dist.training import engine, setup
from mgc_dist.training.forecast import Forecast, forecast

SIGNALLED_IN = 2
"""The step, counted from 0, in whose middle a signal arrives."""


@pytest.fixture(scope="module")
def data(device: torch.device, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of this device's own, with a bias table that was made on it."""
    folder = tmp_path_factory.mktemp("data") / "shards"
    shutil.copytree(shards, folder, ignore=shutil.ignore_patterns("bias"))
    settings = replace(bias_config(folder), device=device.type)
    run_ranks(1, make_table, settings, method=afresh())
    return folder


def deterministic(rank: int) -> None:
    """Only kernels that add up in one order; attention has one only where others are errors."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)


def any_kernel(rank: int) -> None:
    """Whatever torch takes."""


def signalled(rank: int) -> None:
    """A signal between a forward and a backward pass, with kernels under way."""
    backward, calls = engine.Engine.backward, Counter[str]()

    def interrupted(self: engine.Engine, share: torch.Tensor) -> None:
        accumulation = self._engine.gradient_accumulation_steps()
        calls["backward"] += 1
        if calls["backward"] == accumulation * SIGNALLED_IN + 2:
            os.kill(os.getpid(), signal.SIGTERM)
        backward(self, share)

    engine.Engine.backward = interrupted  # type: ignore[method-assign]


def both_of(one: Any, other: Any, rank: int) -> None:
    both(one, other)(rank)


KERNELS = (deterministic, any_kernel)


def test_runs_signalled_in_a_step_resume(
    device: torch.device, data: Path, noisy: Path, tmp_path: Path, tell: Tell
) -> None:
    """Dropout, SpecAugment, padding, accumulation, in the precision that the device takes."""
    ways = KERNELS if device.type == "cuda" else KERNELS[:1]

    def job(kernels: Any, name: str, patch: Any = None, resume: str = "never") -> Job:
        work = tmp_path / kernels.__name__ / (name if resume == "never" else "resumed")
        knobs: dict[str, Any] = {"device": device.type, "checkpoint_every_epochs": 100.0}
        settings = config(data, noisy, work.parent / f"run-{name}", resume=resume, **knobs)
        patch = partial(both_of, kernels, patch) if patch else kernels
        done = train_alone(settings, work, patch=patch)
        assert done.codes == [0], done.said
        assert ("bf16 autocast" in done.said) == (device.type == "cuda")
        return done

    jobs = at_once(
        *(partial(job, kernels, "parts", signalled) for kernels in ways),
        *(partial(job, kernels, "whole") for kernels in ways),
    )
    for kernels, done in zip(ways, jobs, strict=False):
        assert "stopped by SIGTERM after step" in done.said
        status = read_status(tmp_path / kernels.__name__ / "run-parts")
        # the flag travels with the step that was interrupted, and is read with the next one
        assert (status["state"], status["samples_seen"]) == ("stopped", 10 * (SIGNALLED_IN + 2))
    at_once(*(partial(job, kernels, "parts", None, "auto") for kernels in ways))
    for kernels in ways:
        parts, whole = (tmp_path / kernels.__name__ / f"run-{name}" for name in ("parts", "whole"))
        ours, theirs = weights_of(parts), weights_of(whole)
        weights = max(float((ours[n].detach() - theirs[n].detach()).abs().max()) for n in ours)
        steps = [abs(a - b) for a, b in zip(losses(parts), losses(whole), strict=True)]
        tell(f"{kernels.__name__}: weights at most {weights} apart, losses {max(steps)}")
        if kernels is deterministic:
            assert losses(parts) == losses(whole)
            assert weights_hash(parts) == weights_hash(whole)
        else:
            assert max(steps) < 0.05


CACHES = (("feature_encoder", "cnn"), ("layers:1", "trunk"))


def test_cached_runs_are_the_uncached_ones(
    device: torch.device, data: Path, tiny_model: Path, tmp_path: Path, tell: Tell
) -> None:
    def train_one(freeze: str, cache: str) -> Path:
        run = tmp_path / freeze / cache
        knobs: dict[str, Any] = {"freeze": freeze, "cache": cache, "device": device.type}
        settings = config(data, tiny_model, run, epochs=1.0, eval_batch=3, **knobs)
        job = train_alone(settings, tmp_path / f"{freeze}-{cache}", patch=deterministic)
        assert job.codes == [0], job.said
        return run

    caches = CACHES if device.type == "cuda" else CACHES[1:]
    cases = [(freeze, cache) for freeze, kind in caches for cache in ("none", kind)]
    runs = at_once(*(partial(train_one, *case) for case in cases))
    for (freeze, kind), plain, cached in zip(caches, runs[::2], runs[1::2], strict=True):
        off = farthest(cached, plain)
        tell(f"--cache {kind} under {freeze}: losses and weights at most {off} apart")
        assert f"on {device.type}: 132 rows" in (cached / "train.log").read_text()
        assert off <= 1e-6


def hang(rank: int) -> None:
    """After the third step, something that never ends: a kernel, or the host itself."""

    def act() -> None:
        if torch.cuda.is_available():
            torch.cuda._sleep(FOREVER_CYCLES)
        else:
            time.sleep(600)

    at_step(3, 0, act)(rank)


@pytest.fixture(scope="module", autouse=True)
def hung(
    device: torch.device, data: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Future[tuple[Job, float]]]:
    """A run that hangs while other tests run, and how many seconds it took to end."""
    work, knobs = tmp_path_factory.mktemp("hung"), {"device": device.type, "hang_timeout_s": 12.0}

    def train_one() -> tuple[Job, float]:
        began_s = time.monotonic()
        job = train_alone(config(data, tiny_model, work / "run", **knobs), work, patch=hang)
        return job, time.monotonic() - began_s

    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(train_one)


def test_a_gpu_that_hangs_ends_the_rank(hung: Future[tuple[Job, float]], tell: Tell) -> None:
    job, seconds = hung.result()
    tell(f"ended with {job.codes} after {seconds:.0f} s")
    assert job.codes == [75], job.said
    assert "has come no further for" in job.said
    assert "Thread" in job.said, "the stacks of all threads"


FAULTS = {
    "building": "at --zero-stage 2: got",
    "forward": "--micro-batch 3: got",
    "backward": "--micro-batch 3: got",
    "validation": "--eval-batch 32: got",
}
"""Where memory runs out, and the flag that a user is told of."""


def short_of_memory(where: str, rank: int) -> None:
    """Ask the device for a PiB there."""
    call = engine.Engine.__call__
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def ask(*_: Any) -> None:
        torch.empty(2**50, dtype=torch.uint8, device=device)

    def called(self: engine.Engine, wave: torch.Tensor, *rest: Any) -> torch.Tensor:
        trains = self._engine.module.training
        if (where == "forward" and trains) or (where == "validation" and not trains):
            ask()
        logits = call(self, wave, *rest)
        if where == "backward" and trains:
            logits.register_hook(ask)
        return logits

    engine.Engine.__call__ = called  # type: ignore[method-assign]
    if where == "building":
        engine._import_deepspeed = ask


def test_memory_that_runs_out_is_named_with_its_flag(
    device: torch.device, data: Path, tiny_model: Path, tmp_path: Path
) -> None:
    def train_one(where: str) -> Job:
        settings = config(data, tiny_model, tmp_path / where, device=device.type)
        patch = partial(short_of_memory, where)
        return train_alone(settings, tmp_path / f"try-{where}", patch=patch)

    jobs = at_once(*(partial(train_one, where) for where in FAULTS))
    for job, flag in zip(jobs, FAULTS.values(), strict=True):
        assert job.codes == [2], job.said
        assert flag in job.said
        assert "Traceback" not in job.said
        if device.type == "cuda":
            assert "CUDA out of memory" in job.said


def hardly_any_memory(rank: int) -> None:
    """From the first forward pass on this rank may have no more of the GPU than it has, and 2 MiB.

    So memory runs out wherever it does, in kernels' workspaces too.
    """
    call, calls = engine.Engine.__call__, Counter[str]()

    def called(self: engine.Engine, wave: torch.Tensor, *rest: Any) -> torch.Tensor:
        if not calls["forward"]:
            torch.cuda.empty_cache()
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(
                (torch.cuda.memory_reserved() + 2**21) / total
            )
        calls["forward"] += 1
        return call(self, wave, *rest)

    engine.Engine.__call__ = called  # type: ignore[method-assign]


@pytest.mark.gpu
def test_a_micro_batch_that_is_too_large_is_named(data: Path, tmp_path: Path) -> None:
    model = write_model(tmp_path / "m.json", hidden_size=128, conv_dim=[128] * 7)
    knobs = {"device": "cuda", "micro_batch": 10}
    settings = config(data, model, tmp_path / "run", **knobs)
    job = train_alone(settings, tmp_path, patch=hardly_any_memory)
    assert job.codes == [2], job.said
    assert "--micro-batch 10: got" in job.said


def test_the_host_waits_nowhere_else_in_a_step(
    device: torch.device, data: Path, noisy: Path, tmp_path: Path, tell: Tell
) -> None:
    """With dropout and SpecAugment on."""
    knobs = {"device": device.type, "checkpoint_every_epochs": 100.0}
    settings = config(data, noisy, tmp_path / "run", validate_every_epochs=100.0, **knobs)
    settings = replace(settings, output=replace(settings.output, log_every_steps=100))
    file = tmp_path / "waits.json"
    job = train_alone(settings, tmp_path, patch=partial(waits.watch, file))
    assert job.codes == [0], job.said
    found = json.loads(file.read_text())
    tell(f"waits in {len(waits.RECORDED)} steps: {found}")
    of_groups = 2 * len(waits.RECORDED)  # the head, and what is below it
    assert found["calls"] == {
        "mask_nan_or_inf_with_val_inplace": of_groups,
        "is_invalid_grad_norm": of_groups + len(waits.RECORDED),
    }
    assert not found["places"].keys() - waits.KNOWN.keys()
    if device.type == "cuda":
        assert found["places"].keys() >= {"utils.py:is_invalid_grad_norm", "meters.py:_settle"}


SIZES = {
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "intermediate_size": 1536,
    "conv_dim": [512] * 7,
    "num_conv_pos_embeddings": 128,
    "num_conv_pos_embedding_groups": 16,
}
"""16 M parameters; as much memory in activations as in states at 32 rows."""


def planned(settings: TrainConfig) -> Forecast:
    with ShardSet(settings.data.shards) as found:
        return forecast(
            settings,
            world=1,
            plan=setup.plan_of(settings, found),
            genres=found.manifest.genres,
            segment_samples=found.manifest.segment_samples,
            sample_rate=found.manifest.sample_rate,
        )


def test_peak_memory_is_what_the_dry_run_says(
    device: torch.device, data: Path, tmp_path: Path, tell: Tell
) -> None:
    on_gpu = device.type == "cuda"
    model = write_model(tmp_path / "m.json", **(SIZES if on_gpu else {}))
    rows = 32 if on_gpu else 4
    knobs: dict[str, Any] = {"device": device.type, "epochs": 2 * rows / 66, "eval_batch": rows}
    knobs |= {"global_batch": rows, "micro_batch": rows}

    def train_one(precision: str) -> float:
        settings = config(data, model, tmp_path / precision, precision=precision, **knobs)
        said = planned(settings)
        job = train_alone(settings, tmp_path / f"try-{precision}")
        assert job.codes == [0], job.said
        peak_gib = read_metrics(tmp_path / precision, "step")[-1]["peak_memory_gib"]
        parts = {"states": said.memory[2].all, "activations": said.activation_bytes}
        gib = {part: size / 2**30 for part, size in parts.items()}
        said_gib = sum(gib.values())
        tell(f"{precision}: peak {peak_gib:.3f} GiB, dry run {said_gib:.3f} GiB of {gib}")
        return float(peak_gib / said_gib)

    ratios = at_once(partial(train_one, "fp32"), partial(train_one, "bf16"))
    assert min(ratios) > 0
    if on_gpu:
        assert ratios == pytest.approx([1.0, 1.0], abs=0.15)
