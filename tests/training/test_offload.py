"""The optimizer on the host: the same steps, checkpoints and averages as without."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import run_ranks
from harness import slow, weights_hash
from safetensors.torch import load_file
from test_equality import CLIP, Trajectory, build, reference, trajectory
from test_forecast import of
from torch.optim import AdamW
from trainings import config, losses, train_on, train_until

from mgc_dist.cluster import ranks
from mgc_dist.config import EngineConfig
from mgc_dist.errors import UserError
from mgc_dist.training.forecast import memory_of, show

FREEZES = ("none", "layers:1", "backbone")


def offloaded(files: tuple[Path, ...], stage: int, settings: dict[str, Any]) -> list[Trajectory]:
    with ranks.join("cpu") as peers:
        return [
            trajectory(build(file, freeze, False), peers, stage, False, offload=True, **settings)
            for file in files
            for freeze in FREEZES
        ]


@pytest.mark.parametrize("world", [slow(1), 2])
@pytest.mark.parametrize("stage", [2, 3])
def test_steps_on_the_host_follow_plain_autograd(stage: int, world: int, tiny_model: Path) -> None:
    found = run_ranks(world, offloaded, (tiny_model,), stage, {})[0]
    for freeze, (values, grads, norms) in zip(FREEZES, found, strict=True):
        expected, first, steep = reference(tiny_model, freeze)
        assert max(steep) > CLIP, "the clipping bites"
        assert values == pytest.approx(expected, abs=2e-6), freeze
        assert norms == pytest.approx(steep, rel=1e-4, abs=1e-6)
        assert grads.keys() == first.keys()
        for name, grad in first.items():
            np.testing.assert_allclose(grads[name], grad, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("stage", [2, 3])
def test_bf16_weights_follow(stage: int, tiny_model: Path) -> None:
    for freeze, (values, _, _) in zip(
        FREEZES,
        run_ranks(2, offloaded, (tiny_model,), stage, {"bf16_weights": True})[0],
        strict=True,
    ):
        assert values == pytest.approx(reference(tiny_model, freeze)[0], abs=0.02)


def kind_of_optimizer(file: Path, stage: int) -> tuple[bool, str]:
    from test_equality import make_engine

    with ranks.join("cpu") as peers:
        engine = make_engine(build(file, "none", False), peers, stage, False, offload=True)
        inner = engine._engine.optimizer
        host = inner.offload_optimizer if stage == 3 else inner.cpu_offload
        return bool(host), type(inner.optimizer).__name__


@pytest.mark.parametrize("stage", [2, 3])
def test_it_is_torchs_optimizer_which_needs_no_compiler(stage: int, tiny_model: Path) -> None:
    assert run_ranks(1, kind_of_optimizer, tiny_model, stage) == [(True, AdamW.__name__)]


@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_goes_on_with_the_optimizer_anywhere(
    stage: int, shards: Path, table: Path, noisy: Path, tmp_path: Path
) -> None:
    names = ("whole", "parts", "fewer", "inside", "device")
    whole, parts, fewer, inside, device = (tmp_path / name for name in names)
    knobs: dict[str, Any] = {"zero_stage": stage, "epochs": 1.0, "freeze": "feature_encoder"}
    knobs |= {"ema_decay": 0.5}
    on_host: dict[str, Any] = knobs | {"offload": "optimizer"}
    train_on(2, config(shards, noisy, whole, **on_host))
    train_on(2, config(shards, noisy, device, **knobs))
    assert losses(device) == pytest.approx(losses(whole), abs=2e-6)
    assert run_ranks(2, train_until, 2, config(shards, noisy, parts, **on_host)) == [0, 0]
    for copy in (fewer, inside):
        shutil.copytree(parts, copy)
    train_on(2, config(shards, noisy, parts, resume="auto", **on_host))
    assert losses(parts) == losses(whole)
    assert weights_hash(parts, stage) == weights_hash(whole, stage)
    train_on(1, config(shards, noisy, fewer, resume="auto", **on_host))
    assert losses(fewer) == pytest.approx(losses(whole), abs=1e-5)
    train_on(2, config(shards, noisy, inside, resume="auto", **knobs))
    assert losses(inside) == pytest.approx(losses(whole), abs=2e-6)
    for run in (parts, fewer, inside, device):
        for kind in ("best", "best-ema"):
            ours, theirs = (load_file(r / kind / "model.safetensors") for r in (run, whole))
            assert all(float((ours[n] - v).abs().max()) < 1e-4 for n, v in theirs.items())


@pytest.mark.parametrize("stage", [0, 1])
def test_stages_that_keep_gradients_whole_are_refused(stage: Any) -> None:
    message = f"--offload optimizer with --zero-stage {stage}: got both, expected --zero-stage 2 or"
    with pytest.raises(UserError, match=rf"{message} 3\n  use --zero-stage 2, or --offload none"):
        EngineConfig(zero_stage=stage, offload="optimizer")
    assert EngineConfig(zero_stage=2, offload="optimizer").offload == "optimizer"
    assert EngineConfig(zero_stage=stage, offload="none").offload == "none"


@pytest.mark.parametrize("each", [4, 2])
@pytest.mark.parametrize("stage", [2, 3])
def test_memory_moves_to_the_host(stage: int, each: int) -> None:
    # on two ranks, of tensors that are alive in a step: 4.0 shares of 4 bytes more than without at
    # stage 3; at stage 2 8.0 and 6.0 (bf16), and two buffers of the largest weight
    every, trained, world = 1_000, 800, 4
    plain, moved = (
        memory_of(stage, every, trained, world, 100, weight_bytes=each, offload=offload)
        for offload in (False, True)
    )
    share = trained // world
    assert plain.host == 0
    assert moved.weights == each * (every // world if stage == 3 else every)
    assert moved.optimizer == 0
    assert moved.gradients == (4 * share if (stage, each) == (2, 2) else 0)
    assert moved.buckets == plain.buckets
    more = 4 * share if stage == 3 else {4: 8, 2: 6}[each] * share
    assert moved.all + moved.host == plain.all + more
    others = (memory_of(s, every, trained, world, 100, offload=True) for s in (0, 1))
    assert not any(memory.host for memory in others)


def test_the_dry_run_shows_the_host(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for offload in ("none", "optimizer"):
        show(of(tiny_model, tmp_path, offload=offload))
        said = "--offload optimizer: 0.3 MiB more of the host's memory, a rank"
        assert (said in capsys.readouterr().out) == (offload == "optimizer")
