"""The dry run against what is really built, kept and written."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import BASE_FLAVOUR, build_tiny, run_ranks, write_model
from test_slow import LARGE
from trainings import config

from mgc_dist import train
from mgc_dist.cluster import ranks
from mgc_dist.data.order import Plan, lay_out
from mgc_dist.data.reader import ShardSet
from mgc_dist.errors import UserError
from mgc_dist.models.main import describe_main
from mgc_dist.training import forecast as module
from mgc_dist.training.engine import Engine
from mgc_dist.training.forecast import (
    Forecast,
    activation_bytes,
    checkpoint_bytes,
    count_parts,
    forecast,
    memory_of,
)

PLAN = Plan(rows=1000, total=3000, global_batch=16, seed=0)


def of(model: Path, tmp_path: Path, *, world: int = 2, **changes: Any) -> Forecast:
    settings = config(tmp_path, model, tmp_path / "run", **changes)
    genres = [str(number) for number in range(10)]
    return forecast(
        settings,
        world=world,
        plan=PLAN,
        genres=genres,
        segment_samples=8000,
        sample_rate=16_000,
    )


@pytest.mark.parametrize("flavour", [{}, BASE_FLAVOUR])
@pytest.mark.parametrize("freeze", ["none", "feature_encoder", "layers:1", "backbone"])
def test_parts_are_those_of_the_model_that_is_built(
    freeze: str, flavour: dict[str, Any], tmp_path: Path
) -> None:
    file, layers = write_model(tmp_path / "m.json", **flavour), {"layers:1": 1}.get(freeze)
    built = build_tiny(file, freeze=freeze, frozen_layers=layers)
    found = of(file, tmp_path, freeze=freeze).parts
    expected = count_parts(built)
    assert {part: counts for part, counts in found.items() if part != "head"} == {
        part: counts for part, counts in expected.items() if part != "head"
    }
    assert sum(every for every, _ in expected.values()) == sum(
        parameter.numel() for parameter in built.parameters()
    )


def kept_by_autograd(file: Path, rows: int) -> int:
    """Bytes that the real model keeps, on the CPU."""
    net, kept = build_tiny(file), {}
    own = {parameter.data_ptr() for parameter in net.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = net.train()(torch.zeros((rows, 8000), dtype=torch.int16))
    assert output.requires_grad
    return sum(kept.values())


def test_activations_are_those_that_autograd_keeps(tiny_model: Path) -> None:
    empty = describe_main(
        str(tiny_model),
        ["a", "b", "c"],
        freeze="none",
        frozen_layers=None,
        activation_checkpointing=False,
        segment_samples=8000,
    )
    estimate = activation_bytes(empty, 4, 8000)
    assert estimate == pytest.approx(kept_by_autograd(tiny_model, 4), rel=0.25)


def saved(file: Path, stage: int, ema: float, folder: Path) -> tuple[int, int]:
    """Save a checkpoint; its parameters, all and trained."""
    with ranks.join("cpu") as peers:
        model = build_tiny(file, freeze="layers:1", frozen_layers=1)
        counts = [sum(c) for c in zip(*count_parts(model).values(), strict=True)]
        engine = Engine(
            model,
            lay_out(global_batch=2, world=peers.world, largest_micro_batch=1),
            peers,
            zero_stage=stage,
            bf16=False,
            lr=1e-3,
            head_lr=1e-3,
            weight_decay=0.0,
            clip_norm=1.0,
            bucket_elements=10**7,
            ema_decay=ema,
        )
        engine.train(True)
        engine.backward(engine(torch.ones((1, 8000), dtype=torch.int16)).sum() / 2)
        engine.step()
        engine.state.save(folder, "step", {})
        peers.barrier()
        return counts[0], counts[1]


@pytest.mark.parametrize(("stage", "ema"), [(0, 0.0), (1, 0.0), (2, 0.0), (2, 0.5), (3, 0.0)])
def test_checkpoints_are_as_large_as_was_said(stage: int, ema: float, tmp_path: Path) -> None:
    wide = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4}
    file = write_model(tmp_path / "wide.json", **wide)
    every, trained = run_ranks(2, saved, file, stage, ema, tmp_path)[0]
    size = sum(path.stat().st_size for path in (tmp_path / "step").rglob("*.pt"))
    least = 4 * every + 8 * trained
    most = checkpoint_bytes(every, trained, averaged=ema > 0)
    assert 0.9 * least < size < 1.1 * most
    if stage in (1, 2):
        assert size == pytest.approx(most, rel=0.1)


def largest_buffer(file: Path, stage: int, bucket: int) -> int:
    """Elements of the largest tensor that DeepSpeed makes for itself in a start and a step."""
    empty, sizes = torch.empty, [0]

    def noted(*args: Any, **words: Any) -> torch.Tensor:
        made = empty(*args, **words)
        sizes.append(made.numel())
        return made

    with ranks.join("cpu") as peers:
        model = build_tiny(file)
        torch.empty = noted
        engine = Engine(
            model,
            lay_out(global_batch=1, world=1, largest_micro_batch=1),
            peers,
            zero_stage=stage,
            bf16=False,
            lr=1e-3,
            head_lr=1e-3,
            weight_decay=0.0,
            clip_norm=1.0,
            bucket_elements=bucket,
        )
        engine.train(True)
        engine.backward(engine(torch.ones((1, 8000), dtype=torch.int16)).sum())
        engine.step()
    return max(sizes)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_rank_needs_a_bucket_too(stage: int, tiny_model: Path, tmp_path: Path) -> None:
    """However small the model is: 190 MiB of a GPU with the usual bucket."""
    bucket = 1_000_000
    (found,) = run_ranks(1, largest_buffer, tiny_model, stage, bucket)
    buckets = memory_of(stage, 34_000, 34_000, 1, bucket).buckets
    assert buckets == 4 * (found if found >= bucket else 0)
    assert (buckets > 0) == (stage > 0)


def test_the_large_model_needs_no_weights(tmp_path: Path) -> None:
    file = tmp_path / "large.json"
    file.write_text(json.dumps({"model_type": "wav2vec2", **LARGE}))
    found = of(file, tmp_path, world=8, freeze="feature_encoder", zero_stage=3)
    every, trained = (sum(counts) for counts in zip(*found.parts.values(), strict=True))
    assert every == 315_438_720 + 256 * 1024 + 256 + 10 * 256 + 10  # and projector, classifier
    assert trained < every
    assert found.memory[2].all < found.memory[1].all < found.memory[0].all
    assert found.memory[0].weights == 4 * every
    assert found.flops is not None
    assert found.flops.training / found.flops.forward == pytest.approx(2.7, abs=0.3)


@pytest.mark.parametrize(
    ("knobs", "shape", "gain"),
    [
        # GFLOP of a training step: 300.6 and 202.5; forward: 14.72 of the CNN, 63.48 up to layer 12
        ({"freeze": "feature_encoder", "cache": "cnn"}, (149, 512), 300.6 / (300.6 - 14.72)),
        ({"freeze": "layers:12", "cache": "cnn"}, (149, 512), 202.5 / (202.5 - 14.72)),
        ({"freeze": "layers:12", "cache": "trunk"}, (149, 1024), 202.5 / (202.5 - 63.48)),
    ],
)
def test_a_cache_of_the_large_model_is_worked_out(
    knobs: dict[str, Any], shape: tuple[int, int], gain: float, tmp_path: Path
) -> None:
    file = tmp_path / "large.json"
    file.write_text(json.dumps({"model_type": "wav2vec2", **LARGE}))
    settings = config(tmp_path, file, tmp_path / "run", spec_augment=False, **knobs)
    words: dict[str, Any] = {"plan": PLAN, "genres": list("0123456789"), "sample_rate": 16_000}
    found = forecast(settings, world=1, segment_samples=48_000, cached_rows=18_060, **words)
    assert found.cached is not None
    assert found.cached.shape == shape
    assert found.cached.bytes == 18_060 * 4 * shape[0] * shape[1]
    assert found.cached.gain == pytest.approx(gain, abs=1e-3)
    masked = config(tmp_path, file, tmp_path / "run", **knobs)
    if knobs["cache"] == "trunk":
        with pytest.raises(UserError, match="--no-spec-augment"):
            forecast(masked, world=1, segment_samples=48_000, **words)


def test_a_cache_that_does_not_fit_the_disk(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root, usage = tmp_path / "caches", shutil.disk_usage(tmp_path)
    knobs: dict[str, Any] = {"freeze": "layers:1", "cache": "trunk", "cache_dir": root}
    rows, size = 10**9, 10**9 * 24 * 32 * 4

    def told(**changes: Any) -> tuple[str, ...]:
        settings = config(tmp_path, tiny_model, tmp_path / "run", **(knobs | changes))
        words: dict[str, Any] = {"genres": list("abc"), "sample_rate": 16_000, "plan": PLAN}
        found = forecast(settings, world=2, segment_samples=8000, cached_rows=rows, **words)
        module.show(found)
        return found.problems

    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage._replace(free=size - 1))
    (problem,) = told()
    assert "2861.02 GiB of cache do not fit" in problem
    assert f"free at {root}: name another --cache-dir" in problem
    assert told(cache_dtype="bf16") == ()
    said = " ".join(capsys.readouterr().out.split())
    assert "cache at layers:1: 24 frames of 32 values a segment, 2861.02 GiB in fp32 (half" in said
    assert "a step then takes 1/" in said
    (root / "abc").mkdir(parents=True)
    with (root / "abc" / "features.npy").open("wb") as sparse:
        sparse.truncate(size + 128)
    assert told() == (), "it is there already"
    assert "one of that size is there" in capsys.readouterr().out


def test_problems_and_notes(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert of(tiny_model, tmp_path).problems == ()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    (problem,) = of(tiny_model, tmp_path).problems
    assert "lower --keep-checkpoints" in problem
    assert "padding" in of(tiny_model, tmp_path, global_batch=9, world=4).notes[0]


def test_the_micro_batch_that_a_gpu_has_room_for(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a batch fits by the same arithmetic, and one of a tenth more does not."""
    total = 2**29
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    about = SimpleNamespace(total_memory=total)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: about)
    (note,) = of(tiny_model, tmp_path, micro_batch=2, global_batch=16).notes
    assert note.startswith("the GPU's 0.50 GiB have room for about --micro-batch ")
    most = int(note.split("--micro-batch ")[1].split()[0])
    knobs = {"world": 1, "zero_stage": 2}
    fits = of(tiny_model, tmp_path, micro_batch=most, global_batch=most, **knobs)
    more = most + most // 10
    full = of(tiny_model, tmp_path, micro_batch=more, global_batch=more, **knobs)
    assert fits.memory[2].all + fits.activation_bytes <= 0.9 * total
    assert full.memory[2].all + full.activation_bytes > 0.9 * total
    crowded = SimpleNamespace(total_memory=1000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: crowded)
    found = of(tiny_model, tmp_path)
    assert not any("room" in note for note in found.notes)
    assert "lower --micro-batch" in found.problems[0]


def test_the_command(
    shards: Path, table: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from dataclasses import replace

    settings = config(shards, tiny_model, tmp_path / "run")
    dry = replace(settings, output=replace(settings.output, dry_run=True, ranks=4))
    with ShardSet(shards):
        assert run_ranks(1, train.run, dry) == [0]
    assert not (tmp_path / "run").exists()
    found = of(tiny_model, tmp_path, freeze="layers:1")
    module.show(found)
    work = found.flops
    assert work is not None
    said = " ".join(capsys.readouterr().out.split())
    for words in (
        "2 ranks x micro batch",
        "layers 1 to 1 of the encoder",
        "frozen",
        "-> 2",
        f"a segment takes {work.forward / 1e9:.5g} GFLOP forward and {work.training / 1e9:.5g} in "
        f"training, {100 * work.frozen / work.training:.0f} % of it in the frozen part",
    ):
        assert words in said
