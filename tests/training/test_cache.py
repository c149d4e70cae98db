"""The cache of frozen outputs: cached runs follow uncached ones; kills, damage, refusals."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BASE_FLAVOUR, NOISY, build_tiny, run_ranks, write_model
from harness import Patch, die, losses_of, slow, start, until, weights_hash, weights_of
from metrics import read_metrics
from trainings import config, losses, train_on, train_until

from mgc_dist import train
from mgc_dist.cluster.ranks import seed_everything
from mgc_dist.config import DataConfig, ModelConfig, TrainConfig
from mgc_dist.data import features, rowstore
from mgc_dist.data.features import STORE, Features, FeaturesKey
from mgc_dist.data.order import sweep_batches
from mgc_dist.data.reader import Reader, ShardSet
from mgc_dist.data.rowstore import CHECKSUMS
from mgc_dist.encoders import kind
from mgc_dist.errors import UserError
from mgc_dist.files import locked
from mgc_dist.journal import read_status
from mgc_dist.models.classifier import WaveClassifier
from mgc_dist.models.main import frozen_fingerprint
from mgc_dist.scoring import rows
from mgc_dist.training import cache
from mgc_dist.training.caches import LOCK, USES
from mgc_dist.training.engine import Engine

MODES = [  # freeze, cache, SpecAugment: off where it would lie below the boundary
    ("feature_encoder", "cnn", True),
    ("feature_encoder", "trunk", True),
    ("layers:1", "cnn", True),
    ("layers:1", "trunk", False),
]
EXACT = 1e-6
"""Largest difference of a loss or a weight in fp32; measured: 0, as one batch has the same rows."""

Train = Callable[..., Path]


@pytest.fixture(scope="module")
def plain(shards: Path, table: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Uncached runs of one epoch (7 steps) on two ranks, each trained once."""
    runs: dict[str, Path] = {}

    def run(model: Path, **knobs: Any) -> Path:
        name = json.dumps(knobs, sort_keys=True) + str(model)
        if name not in runs:
            runs[name] = tmp_path_factory.mktemp("plain") / "run"
            train_on(2, config(shards, model, runs[name], epochs=1.0, **knobs))
        return runs[name]

    return run


def farthest(one: Path, other: Path, stage: int = 2) -> float:
    """Largest difference of a loss, or of a weight in the last checkpoint."""
    pairs = list(zip(losses(one), losses(other), strict=True))
    assert len(pairs) == 7
    ours, theirs = weights_of(one, stage), weights_of(other, stage)
    assert ours.keys() == theirs.keys()
    apart = [float((ours[name].detach() - theirs[name].detach()).abs().max()) for name in ours]
    return max([abs(a - b) for a, b in pairs] + apart)


@pytest.mark.parametrize("stage", [0, slow(1), 2, slow(3)])
@pytest.mark.parametrize(("freeze", "kind", "masks"), MODES)
def test_a_cached_run_is_the_uncached_one(
    freeze: str, kind: str, masks: bool, stage: int, plain: Train, noisy: Path, tmp_path: Path
) -> None:
    """Dropout, SpecAugment, padding and accumulation on two ranks; validation reads it too."""
    knobs: dict[str, Any] = {"freeze": freeze, "zero_stage": stage, "spec_augment": masks}
    whole, run = plain(noisy, **knobs), tmp_path / "run"
    settings = shards_of(whole)
    caches = tmp_path / "caches"
    train_on(2, config(settings, noisy, run, epochs=1.0, cache=kind, cache_dir=caches, **knobs))
    assert farthest(run, whole, stage) <= EXACT
    assert figures(run) == pytest.approx(figures(whole), abs=1e-6)
    (folder,) = caches.iterdir()
    assert {path.name for path in folder.iterdir()} == {
        STORE.array,
        CHECKSUMS,
        STORE.header,
        USES,
    }
    log = (run / "train.log").read_text()
    assert "cache of " in log
    assert "made in fp32 on cpu: 132 rows of [24, " in log


def figures(run: Path) -> list[float]:
    return [line["track_nll"] for line in read_metrics(run, "validation")]


def shards_of(run: Path) -> Path:
    """The shards that a run read."""
    from mgc_dist import cli

    return cli.parse("train", TrainConfig, ["--config", str(run / "config.yaml")]).data.shards


@pytest.mark.parametrize(
    "knobs",
    [
        {"loss": "learned-mixin", "freeze": "layers:1"},
        {"activation_checkpointing": True, "freeze": "layers:1"},
        slow({"activation_checkpointing": True, "freeze": "layers:1", "zero_stage": 3}),
        {"freeze": "backbone", "zero_stage": 3},
        {"freeze": "layers:1", "precision": "bf16"},
        slow({"freeze": "feature_encoder", "precision": "bf16"}),
    ],
)
def test_with_what_else_a_run_may_be(knobs: dict[str, Any], plain: Train, tiny_model: Path) -> None:
    """The gain of the learned mixins, checkpointing, a head alone, autocast in its own dtype."""
    whole = plain(tiny_model, **knobs)
    run = plain(tiny_model, cache="trunk", **knobs)
    assert farthest(run, whole, knobs.get("zero_stage", 2)) <= EXACT
    if "precision" in knobs:
        assert "in bf16, made in bf16 on cpu" in (run / "train.log").read_text()


@pytest.mark.slow
def test_compiled_models_read_features(plain: Train, tiny_model: Path) -> None:
    """The compiler takes a minute on a busy core: longer than a rank may hang elsewhere."""
    words: dict[str, Any] = {"freeze": "layers:1", "cache": "trunk"}
    compiled = plain(tiny_model, compile=True, hang_timeout_s=600.0, **words)
    assert losses(compiled) == pytest.approx(losses(plain(tiny_model, freeze="layers:1")), abs=1e-5)


@pytest.mark.parametrize("flavour", [{}, BASE_FLAVOUR])
def test_a_bf16_cache_of_a_float32_run_rounds(
    flavour: dict[str, Any], plain: Train, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = write_model(tmp_path_factory.mktemp("flavour") / "m.json", **flavour)
    whole = plain(model, freeze="layers:1")
    run = plain(model, freeze="layers:1", cache="trunk", cache_dtype="bf16")
    apart = [abs(a - b) for a, b in zip(losses(run), losses(whole), strict=True)]
    print(f"bf16 cache: losses at most {max(apart):.2e} apart")
    assert 0 < max(apart) < 2e-4


def test_a_float32_cache_of_a_bf16_run_loses_nothing(plain: Train, tiny_model: Path) -> None:
    knobs: dict[str, Any] = {"freeze": "layers:1", "precision": "bf16"}
    run = plain(tiny_model, cache="trunk", cache_dtype="fp32", **knobs)
    assert "in fp32, made in bf16 on cpu" in (run / "train.log").read_text()
    assert farthest(run, plain(tiny_model, **knobs)) <= EXACT


def cut(
    file: Path, at: str, masks: bool = True, **changes: Any
) -> tuple[WaveClassifier, torch.Tensor]:
    """A model with a cache at a boundary, and waves."""
    freeze, kind = ("layers:1", "cnn") if at == "cnn" else (at, "trunk")
    layers = int(freeze[-1]) if freeze.startswith("layers") else None
    model = build_tiny(
        file, freeze=freeze, frozen_layers=layers, cache=kind, spec_augment=masks, **changes
    )
    rng = np.random.default_rng(1)
    return model, torch.from_numpy(rng.integers(-9000, 9000, (3, 8000)).astype(np.int16))


def called(model: WaveClassifier, x: torch.Tensor, **words: Any) -> tuple[torch.Tensor, set[str]]:
    """What a model gives, and its modules with weights of their own that were called."""
    names: set[str] = set()
    handles = [
        module.register_forward_hook(lambda *_, name=name: names.add(name))
        for name, module in model.named_modules()
        if list(module.parameters(recurse=False))
    ]
    output = model(x, **words)
    for handle in handles:
        handle.remove()
    return output, names


RELATIVES: list[dict[str, Any]] = [
    {},
    BASE_FLAVOUR,
    {"model_type": "hubert"},
    {"model_type": "hubert"} | BASE_FLAVOUR,
    {"model_type": "wavlm"},
    {"model_type": "data2vec-audio", "conv_pos_kernel_size": 3},
    {"model_type": "unispeech-sat"},
    {"model_type": "unispeech-sat"} | BASE_FLAVOUR,
]


@pytest.mark.parametrize("relative", RELATIVES)
@pytest.mark.parametrize("at", ["cnn", "layers:1", "layers:2", "backbone"])
def test_both_halves_are_the_whole_model(at: str, relative: dict[str, Any], tmp_path: Path) -> None:
    """With dropout everywhere, and SpecAugment where it lies above or is off."""
    noise = NOISY | {"feat_proj_dropout": 0.2, "activation_dropout": 0.1, "mask_feature_prob": 0.1}
    noise |= {"mask_feature_length": 3, "mask_feature_min_masks": 0}
    file = write_model(tmp_path / "m.json", **(noise | relative))
    masks = not at.startswith("layers")
    model, wave = cut(file, at, masks)
    for training in (True, False):
        model.train(training)
        seed_everything(7)
        whole = model(wave)
        seed_everything(8)  # nothing below draws numbers
        inner, lower = called(model, wave, only_below=True)
        assert not inner.requires_grad
        seed_everything(7)
        logits, upper = called(model, inner)
        assert logits.equal(whole)
        assert lower
        twice = {n for n in lower & upper if not n.endswith("rel_attn_embed")}  # WavLM's, for all
        assert not twice, "what lies below is not computed"
    whole.sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    model(inner).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, grads[name]), name
        else:
            assert parameter.grad is None


def described(model: WaveClassifier, shards: Path, **changes: Any) -> FeaturesKey:
    settings: dict[str, Any] = {"device": torch.device("cpu"), "bf16": False, "dtype": "auto"}
    with ShardSet(shards) as data:
        return cache.describe(model, data, **(settings | changes))


def test_facts_tell_what_changes_the_features_and_nothing_else(
    shards: Path, tmp_path: Path
) -> None:
    file = write_model(tmp_path / "m.json")
    first = described(cut(file, "layers:1")[0], shards)
    assert (first.rows, first.frames, first.width, first.dtype) == (132, 24, 32, "fp32")
    assert first.bytes == 132 * 24 * 32 * 4
    same = write_model(tmp_path / "same.json", hidden_dropout=0.3, classifier_proj_size=8)
    assert described(cut(same, "layers:1")[0], shards).name == first.name
    others = [
        described(cut(file, "layers:2")[0], shards),
        described(cut(file, "cnn")[0], shards),
        described(cut(file, "backbone")[0], shards),
        described(cut(file, "layers:1", seed=1)[0], shards),
        described(cut(file, "layers:1")[0], shards, dtype="bf16"),
        described(cut(file, "layers:1")[0], shards, bf16=True),
        described(
            cut(write_model(tmp_path / "e.json", layer_norm_eps=1e-3), "layers:1")[0], shards
        ),
    ]
    assert len({facts.name for facts in [first, *others]}) == 8
    model = cut(file, "layers:1")[0]
    before = kind.fingerprint(model.net, "layers:1")
    with torch.no_grad():
        model.net.wav2vec2.encoder.layers[1].final_layer_norm.bias[0] += 1  # above
    assert kind.fingerprint(model.net, "layers:1") == before
    with torch.no_grad():
        model.net.wav2vec2.encoder.layers[0].final_layer_norm.bias[0] += 1
    assert kind.fingerprint(model.net, "layers:1") != before


def test_the_cnn_of_two_ways_to_freeze_is_one_cache(shards: Path, tiny_model: Path) -> None:
    other = build_tiny(tiny_model, freeze="feature_encoder", cache="trunk")
    assert described(cut(tiny_model, "cnn")[0], shards) == described(other, shards)


# what would not be exact


def test_nothing_frozen_is_refused() -> None:
    with pytest.raises(UserError, match=r"--cache cnn: got --freeze none.*\n.*feature_encoder"):
        TrainConfig(data=DataConfig(cache="cnn"), main=ModelConfig(freeze="none"))


@pytest.mark.parametrize(
    "changes", [{}, {"mask_time_prob": 0.0, "mask_feature_prob": 0.2, "mask_feature_length": 3}]
)
def test_masks_below_the_boundary_are_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    file = write_model(tmp_path / "m.json", **(NOISY | changes))
    with pytest.raises(UserError, match=r"layers:1: got SpecAugment.*\n.*--no-spec-augment"):
        cut(file, "layers:1")
    for at in ("cnn", "backbone"):  # above it; in eval mode as a whole
        cut(file, at)


def test_models_without_a_frozen_part_like_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--cache trunk.*got logmel-cnn"):
        build_tiny("logmel-cnn", freeze="backbone", cache="trunk")
    with pytest.raises(UserError, match=r"--cache cnn.*got logmel-cnn"):
        build_tiny("logmel-cnn", freeze="feature_encoder", cache="cnn")
    weighted = write_model(tmp_path / "m.json", use_weighted_layer_sum=True)
    for at in ("layers:1", "backbone"):
        with pytest.raises(UserError, match="reads the states of all layers"):
            cut(weighted, at)
    model, wave = cut(weighted, "cnn")
    model.eval()
    assert model(model(wave, only_below=True)).equal(model(wave))


def test_noise_that_no_rule_knows_of_is_found(shards: Path, tiny_model: Path) -> None:
    model, _ = cut(tiny_model, "layers:1")
    layer = model.net.wav2vec2.encoder.layers[0]
    forward = layer.forward

    def noisy_layer(hidden: torch.Tensor, **words: Any) -> torch.Tensor:
        return forward(hidden, **words) + 0.1 * torch.rand_like(hidden)

    layer.forward = noisy_layer
    with pytest.raises(UserError, match=r"--cache at layers:1.*logits that differ by"):
        described(model, shards)


# the pass


def settings_of(shards: Path, model: Path, tmp_path: Path, **changes: Any) -> TrainConfig:
    knobs: dict[str, Any] = {"freeze": "layers:1", "cache": "trunk", "epochs": 0.3}
    knobs |= {"cache_dir": tmp_path / "caches", "resume": "auto"} | changes
    return config(shards, model, knobs.pop("run", tmp_path / "run"), **knobs)


def files_of(caches: Path) -> dict[str, bytes]:
    (folder,) = caches.iterdir()
    files = sorted(path for path in folder.iterdir() if path.name != USES)
    return {str(path.relative_to(caches)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def made(
    shards: Path, table: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A cache that one rank has made."""
    work = tmp_path_factory.mktemp("made")
    train_on(1, settings_of(shards, tiny_model, work))
    return work / "caches"


def test_rows_are_what_the_model_gives(shards: Path, made: Path, tiny_model: Path) -> None:
    model, _ = cut(tiny_model, "layers:1")
    facts = described(model, shards)
    net = build_tiny(tiny_model).eval().net
    with ShardSet(shards) as data, Features(made / facts.name, facts) as found:
        into = np.ones((5, facts.row_bytes), np.uint8)
        found.read_batch(np.array([0, 65, -1, 66, 131]), into)
        values = into.view(np.float32).reshape(5, 24, 32)
        assert not values[2].any()
        for row, got in zip((0, 65, 66, 131), values[[0, 1, 3, 4]], strict=True):
            x = torch.from_numpy(data.read(row).copy())[None].float() / 32768
            x = (x - x.mean()) / torch.sqrt(x.var(correction=0) + 1e-7)
            with torch.no_grad():
                states = net(x, output_hidden_states=True).hidden_states[1]
            assert got == pytest.approx(states[0].numpy(), abs=1e-5)
    shape = np.load(made / facts.name / STORE.array, mmap_mode="r").shape
    assert shape == (132, 24, 32), "any reader of .npy can map it"


def test_the_reader_gives_features_and_labels_in_order(
    shards: Path, made: Path, tiny_model: Path
) -> None:
    facts = described(cut(tiny_model, "layers:1")[0], shards)
    every = np.load(made / facts.name / STORE.array)
    with ShardSet(shards) as data, Features(made / facts.name, facts) as found:
        plan = list(sweep_batches(66, 8, 1, 0))
        words: dict[str, Any] = {"read_ahead": 2, "pin": False, "threads": 2, "features": found}
        with Reader(data, "validation", iter(plan), **words) as reader:
            for number, batch in enumerate(reader):
                true = batch.row >= 0
                rows = batch.row[true].numpy()
                assert rows.tolist() == list(range(66 + 8 * number, min(74 + 8 * number, 132)))
                assert (batch.input[true].numpy() == every[rows]).all()
                assert not batch.input[~true].any()
                assert batch.label[true].tolist() == data.labels[rows].tolist()
                assert batch.weight.tolist() == true.float().tolist()


def test_two_ranks_make_the_same_bytes(
    shards: Path, made: Path, tiny_model: Path, tmp_path: Path
) -> None:
    train_on(2, settings_of(shards, tiny_model, tmp_path, zero_stage=3))
    assert files_of(tmp_path / "caches") == files_of(made)


def killed_at(name: str, count: int) -> Patch:
    """Kill rank 0 in call number `count` of a function of the pass."""

    def patch(rank: int) -> None:
        whole, calls = getattr(rowstore, name), iter(range(1000))

        def dying(*words: Any) -> Any:
            here = "caches" in str(words) + str(getattr(words[0], "path", ""))
            if rank == 0 and here and next(calls) == count:
                die()
            return whole(*words)

        setattr(rowstore, name, dying)

    return patch


@pytest.mark.parametrize(
    ("name", "count", "world", "left"),
    [("note", 0, 1, 44), ("note", 20, 2, 24), ("replace_text", 0, 1, 0)],
)
def test_a_killed_pass_goes_on_and_gives_the_same_bytes(
    name: str,
    count: int,
    world: int,
    left: int,
    shards: Path,
    made: Path,
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    """In the first batch, in the middle, and between the last two renames."""
    settings = settings_of(shards, tiny_model, tmp_path)
    job = start(settings, tmp_path, world=world, patch=killed_at(name, count))
    assert job.wait()[0] == -signal.SIGKILL, job.said
    assert not list((tmp_path / "caches").glob(f"*/{STORE.header}"))
    again = start(settings, tmp_path, world=2)
    assert again.wait() == [0, 0], again.said
    assert f"{left} of 44 batches to go" in again.said
    assert files_of(tmp_path / "caches") == files_of(made)


def test_what_a_crash_has_lost_is_computed_again(
    shards: Path, made: Path, tiny_model: Path, tmp_path: Path
) -> None:
    settings = settings_of(shards, tiny_model, tmp_path)
    start(settings, tmp_path, world=1, patch=killed_at("note", 20)).wait()
    (part,) = (tmp_path / "caches").glob(f"*/{STORE.partial}")
    data = bytearray(part.read_bytes())
    data[128 + 24 * 32 * 4 * 4] ^= 1  # row 4: the second batch of three
    part.write_bytes(data)
    again = start(settings, tmp_path, world=1)
    assert again.wait() == [0]
    assert "25 of 44 batches to go" in again.said
    assert files_of(tmp_path / "caches") == files_of(made)


def test_a_stop_in_the_pass_keeps_what_is_done(
    shards: Path, made: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(shards, tiny_model, tmp_path)

    def stopping(rank: int) -> None:
        rows._AT_ONCE_BYTES = 1  # a group is a batch of each rank
        put, calls = rowstore.RowFile.put, iter(range(1000))

        def signalled(*words: Any) -> None:
            put(*words)
            if next(calls) == 9:
                os.kill(os.getpid(), signal.SIGUSR1)

        rowstore.RowFile.put = signalled  # type: ignore[method-assign]

    job = start(settings, tmp_path, patch=stopping)
    assert job.wait() == [0, 0], job.said
    assert (tmp_path / "run" / "REQUEUE").exists()
    assert read_status(tmp_path / "run")["state"] == "stopped"
    again = start(settings, tmp_path)
    assert again.wait() == [0, 0], again.said
    assert "34 of 44 batches to go" in again.said
    assert (tmp_path / "run" / "DONE").exists()
    assert files_of(tmp_path / "caches") == files_of(made)


def test_a_cache_is_made_once_and_reused(
    shards: Path, made: Path, tiny_model: Path, tmp_path: Path
) -> None:
    def times() -> dict[Path, int]:
        paths = (path for path in made.rglob("*") if path.name != USES)
        return {path: path.stat().st_mtime_ns for path in paths}

    before = times()
    train_on(2, settings_of(shards, tiny_model, tmp_path, cache_dir=made))
    assert times() == before
    log = (tmp_path / "run" / "train.log").read_text()
    assert "reused" in log
    assert "making" not in log


def test_the_folder_is_beside_the_shards_by_default(shards: Path) -> None:
    assert DataConfig(shards=shards).caches == shards / "cache"
    assert DataConfig(shards=shards, cache_dir=Path("x")).caches == Path("x")


def test_two_runs_do_not_make_the_same_one(
    shards: Path, tiny_model: Path, made: Path, tmp_path: Path
) -> None:
    """The second waits, and says so; then it reads what the first has made."""
    settings = settings_of(shards, tiny_model, tmp_path)
    (folder,) = made.iterdir()
    mine = tmp_path / "caches" / folder.name
    mine.mkdir(parents=True)
    with locked(mine / LOCK, wait_s=0, purpose="test"):
        job = start(settings, tmp_path)
        until(lambda: "another training is making the cache" in job.said, 120)
        beat = next((tmp_path / "run" / "heartbeats").glob("*-rank00001.json"))
        until(lambda: json.loads(beat.read_text())["phase"] == "waiting for the cache")
        for path in folder.iterdir():
            shutil.copy(path, mine)
    assert job.wait() == [0, 0], job.said
    assert ", reused" in job.said
    assert "making the cache of" not in job.said


def test_a_run_that_waits_for_a_cache_can_be_stopped(
    shards: Path, tiny_model: Path, made: Path, tmp_path: Path
) -> None:
    settings = settings_of(shards, tiny_model, tmp_path)
    mine = tmp_path / "caches" / next(made.iterdir()).name
    mine.mkdir(parents=True)
    with locked(mine / LOCK, wait_s=0, purpose="test"):
        job = start(settings, tmp_path)
        until(lambda: "another training is making the cache" in job.said, 120)
        job.signal(1, signal.SIGTERM)
        assert job.wait() == [0, 0], job.said
    assert (tmp_path / "run" / "REQUEUE").exists()


def no_space(settings: TrainConfig) -> int:
    usage = shutil.disk_usage("/")
    cache.shutil.disk_usage = lambda path: usage._replace(free=1000)
    return train.run(settings)


def test_free_space_is_looked_at_before_the_pass(
    shards: Path, tiny_model: Path, tmp_path: Path
) -> None:
    settings = settings_of(shards, tiny_model, tmp_path)
    with pytest.raises(UserError, match=r"--cache-dir .*got 0\.00 GB of free space") as error:
        run_ranks(2, no_space, settings)
    assert error.value.exit_code == 74
    assert not (tmp_path / "caches").exists()


def blind(settings: TrainConfig) -> int:
    """Rank 1 does not see what rank 0 writes, as on another node's own disk."""
    if os.environ["RANK"] == "1":
        features.is_whole = lambda folder, facts: False
    return train.run(settings)


def test_a_rank_that_does_not_see_the_cache_ends_all(
    shards: Path, tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"on this node.*\n.*all nodes share"):
        run_ranks(2, blind, settings_of(shards, tiny_model, tmp_path))


# damage


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "caches"))


def test_a_damaged_row_is_named(
    shards: Path, copied: Path, tiny_model: Path, tmp_path: Path
) -> None:
    (file,) = copied.glob(f"*/{STORE.array}")
    data = bytearray(file.read_bytes())
    data[128 + 3072 * 17 + 5] ^= 16
    file.write_bytes(data)
    settings = settings_of(shards, tiny_model, tmp_path, epochs=1.0)
    message = rf"damaged cache: row 17 of {file}, offset {128 + 3072 * 17}: got checksum"
    with pytest.raises(UserError, match=message) as error:
        run_ranks(1, train.run, settings)
    assert error.value.this_rank_only
    shutil.rmtree(copied)
    train_on(1, settings)
    assert (tmp_path / "run" / "DONE").exists(), "as the message said"


def header(folder: Path, **changes: Any) -> None:
    path = folder / STORE.header
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: header(f, dataset_id="other"), "frozen features of another dataset_id"),
        (lambda f: header(f, frozen="0", boundary="cnn"), "another frozen, boundary"),
        (lambda f: header(f, dtype="bf16", format_version=2), "another format_version, dtype"),
        (lambda f: (f / STORE.header).write_text("{"), "got Expecting"),
        (lambda f: (f / STORE.header).write_text("[]"), "no attribute"),
        (lambda f: (f / CHECKSUMS).write_bytes(b"x" * 1184), "another xxh3_128"),
        (lambda f: (f / CHECKSUMS).unlink(), "No such file"),
        (lambda f: (f / STORE.array).unlink(), "No such file"),
        (lambda f: os.truncate(f / STORE.array, 5000), "cache .*: got"),
        (lambda f: np.save(f / STORE.array, np.zeros((132, 24, 3))), r"float64 \(132, 24, 3"),
    ],
)
def test_another_cache_in_its_place_is_refused(
    damage: Callable[[Path], object], message: str, shards: Path, copied: Path, tiny_model: Path
) -> None:
    (folder,) = copied.iterdir()
    damage(folder)
    facts = described(cut(tiny_model, "layers:1")[0], shards)
    with pytest.raises(UserError, match=rf"{message}[\s\S]*remove that folder"):
        Features(folder, facts)


def test_a_file_cut_after_it_was_opened_is_an_error(
    shards: Path, copied: Path, tiny_model: Path
) -> None:
    facts = described(cut(tiny_model, "layers:1")[0], shards)
    with Features(copied / facts.name, facts) as found:
        os.truncate(copied / facts.name / STORE.array, 128 + 3072 * 100)
        into = np.zeros((1, facts.row_bytes), np.uint8)
        found.read_batch(np.array([99]), into)
        with pytest.raises(UserError, match=r"row 100 .* got fewer bytes"):
            found.read_batch(np.array([100]), into)


def test_weights_that_are_not_finite_are_told(
    shards: Path, table: Path, tiny_model: Path, tmp_path: Path
) -> None:
    def broken(settings: TrainConfig) -> int:
        give = Engine.features
        Engine.features = lambda self, wave: give(self, wave) * float("inf")  # type: ignore
        return train.run(settings)

    with pytest.raises(UserError, match="frozen features of row 0 that are not finite"):
        run_ranks(2, broken, settings_of(shards, tiny_model, tmp_path))


# the identity of a run


@pytest.mark.parametrize(
    ("kind", "masks", "stage"), [("cnn", True, 2), ("trunk", False, 2), slow("cnn", True, 3)]
)
def test_a_resumed_cached_run_ends_with_the_same_bits(
    kind: str, masks: bool, stage: int, shards: Path, table: Path, noisy: Path, tmp_path: Path
) -> None:
    knobs: dict[str, Any] = {"freeze": "layers:1", "cache": kind, "spec_augment": masks}
    knobs |= {"zero_stage": stage, "epochs": 1.0}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_on(2, config(shards, noisy, whole, cache_dir=tmp_path / "caches", **knobs))
    knobs["cache_dir"] = tmp_path / "others"  # made again: the same bytes
    first = config(shards, noisy, parts, **knobs)
    assert run_ranks(2, train_until, 2, first) == [0, 0]
    assert (parts / "REQUEUE").exists()
    train_on(2, config(shards, noisy, parts, resume="auto", **knobs))
    assert losses_of(parts) == losses_of(whole)
    assert weights_hash(parts, stage) == weights_hash(whole, stage)
    best = (parts / "best" / "model.safetensors").read_bytes()
    assert best == (whole / "best" / "model.safetensors").read_bytes()


def test_another_cache_is_another_run_unless_it_is_allowed(
    shards: Path, table: Path, tiny_model: Path, plain: Train, tmp_path: Path
) -> None:
    run, knobs = tmp_path / "run", {"freeze": "layers:1", "epochs": 1.0}
    caches: dict[str, Any] = {"cache_dir": tmp_path / "caches"}
    assert run_ranks(2, train_until, 2, config(shards, tiny_model, run, **knobs)) == [0, 0]
    again = config(shards, tiny_model, run, resume="auto", cache="trunk", **knobs, **caches)
    message = (
        r"--cache: got layers:1 in fp32, made in fp32 on cpu, expected none.*\n.*--change cache"
    )
    with pytest.raises(UserError, match=message):
        run_ranks(2, train.run, again)
    assert not (tmp_path / "caches").exists(), "refused before the pass"
    allowed = replace(again, output=replace(again.output, change=("cache",)))
    train_on(2, allowed)
    whole = plain(tiny_model, freeze="layers:1")
    assert farthest(run, whole) <= EXACT, "and it goes on as before"
    assert "--cache: none -> layers:1 in fp32" in (run / "train.log").read_text()


def test_masks_switched_off_are_another_run(
    shards: Path, table: Path, noisy: Path, tmp_path: Path
) -> None:
    knobs: dict[str, Any] = {"freeze": "feature_encoder", "epochs": 1.0}
    settings = config(shards, noisy, tmp_path / "run", **knobs)
    assert run_ranks(1, train_until, 2, settings) == [0]
    other = config(shards, noisy, tmp_path / "run", resume="auto", spec_augment=False, **knobs)
    with pytest.raises(UserError, match="--spec-augment: got False, expected True"):
        run_ranks(1, train.run, other)


def test_frozen_weights_are_exported_with_a_cache_as_without(
    plain: Train, tiny_model: Path
) -> None:
    from mgc_dist.models.folder import load_exported

    runs = [plain(tiny_model, freeze="layers:1", **c) for c in ({}, {"cache": "trunk"})]
    exports = [load_exported(run / "best").state_dict() for run in runs]
    assert exports[0].keys() == exports[1].keys()
    for name, value in exports[0].items():
        assert torch.allclose(exports[1][name], value, atol=EXACT), name
    whole = build_tiny(tiny_model, freeze="layers:1", frozen_layers=1)
    assert frozen_fingerprint(whole) == frozen_fingerprint(cut(tiny_model, "layers:1")[0])
