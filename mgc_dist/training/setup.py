"""What a training run is made of: the plan, the model, DeepSpeed around it, and its identity."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mgc_dist.bias_model.table import BiasTable
from mgc_dist.board import Draw
from mgc_dist.cluster.ranks import Ranks
from mgc_dist.cluster.stop import Stop
from mgc_dist.cluster.watch import start_limit
from mgc_dist.config import TrainConfig, identity
from mgc_dist.data.features import Features, FeaturesKey
from mgc_dist.data.manifest import Manifest
from mgc_dist.data.order import ORDER_VERSION, Layout, Plan, lay_out
from mgc_dist.data.reader import ShardSet
from mgc_dist.errors import UserError
from mgc_dist.journal import Journal
from mgc_dist.models.classifier import Base, WaveClassifier
from mgc_dist.models.flops import SegmentFlops, count
from mgc_dist.models.main import (
    build_main,
    configuration,
    configuration_hash,
    draws_dropout,
    frozen_fingerprint,
)
from mgc_dist.sound.augment import Augment
from mgc_dist.training import cache
from mgc_dist.training.engine import Engine
from mgc_dist.training.engine_state import whole_weights
from mgc_dist.training.losses import Objective, class_weights

_LIBRARIES = ("torch", "transformers", "deepspeed")
"""Libraries whose versions may change digits."""
_TENSOR_CORES = (7, 0)
"""Compute capability from which on float16 is faster: Volta; before it often slower."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training run, ready to go.

    Attributes:
        config: of the run.
        identity: what a checkpoint must agree with to be resumed here.
        shards: the data.
        objective: the loss, with the bias table in it.
        plan, layout: the order of rows, and how a step's rows lie over ranks.
        flops: of a segment, but what a cache holds.
        model, engine: the main model, and DeepSpeed around it.
        ranks, journal, stop: peers, metrics.jsonl, and what asks for a stop.
        cached: what the cache of the frozen part is of; None without a cache.
        features: read in place of waves; None without a cache, and before it is there.
        held_rate: factor of the peak learning rates; None where they follow the schedule.
    """

    config: TrainConfig
    identity: dict[str, Any]
    shards: ShardSet
    objective: Objective
    plan: Plan
    layout: Layout
    flops: SegmentFlops
    model: WaveClassifier
    engine: Engine
    ranks: Ranks
    journal: Journal
    stop: Stop
    cached: FeaturesKey | None = None
    features: Features | None = None
    held_rate: float | None = None

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.config.output.run


def build(
    config: TrainConfig,
    own: dict[str, Any],
    shards: ShardSet,
    table: BiasTable | None,
    plan: Plan,
    ranks: Ranks,
    stop: Stop,
    pictures: Mapping[str, Draw] | None = None,
    base: Base | None = None,
    origin: Path | None = None,
) -> Run:
    """Build the model and DeepSpeed around it (a collective).

    Args:
        config: of the run.
        own: identity, from `identity_of`; what the model adds to it is added here.
        shards: the data.
        table: of the bias model; None where the loss needs none.
        plan: from `plan_of`.
        ranks: peers.
        stop: what asks for a stop.
        pictures: how values of events are drawn for TensorBoard, by key.
        base: what the model is built from, where `--model` is not at hand.
        origin: a verified checkpoint, which has the frozen weights then.

    Raises:
        UserError: the model does not fit; or the checkpoint has no frozen weights.
    """
    layout = layout_of(config, ranks.world)
    model = _main_model(config, shards.manifest, base)
    if origin:
        _take_frozen(model, origin)
    model = model.to(ranks.device)
    precision, cached = precision_of(config, ranks), None
    if model.boundary is not None:
        dtype = config.data.cache_dtype
        bf16 = precision == "bf16"
        cached = cache.describe(model, shards, device=ranks.device, bf16=bf16, dtype=dtype)
    of_model = {
        "frozen_weights": frozen_fingerprint(model),
        "shapes": _shapes(model),
        "cache": cached.description if cached else "none",
        "weights_precision": "bf16" if precision == "bf16-weights" else "fp32",
        "micro_batch": layout.micro_batch if draws_dropout(model.net.config) else "any",
        "device": ranks.device.type,
        "libraries": ", ".join(f"{name} {version(name)}" for name in _LIBRARIES),
    }
    flops = count(model, model.segment_samples)  # before ZeRO-3 leaves nothing in place
    if model.boundary is not None:
        flops = flops.above(model.boundary)
    engine = _engine(config, model, layout, ranks, precision)
    return Run(
        config=config,
        identity=own | of_model,
        shards=shards,
        objective=Objective(config.objective, plan, shards, table),
        plan=plan,
        layout=layout,
        flops=flops,
        model=model,
        engine=engine,
        ranks=ranks,
        journal=Journal(config.output.run, writes=ranks.is_first, pictures=pictures),
        stop=stop,
        cached=cached,
    )


def _engine(
    config: TrainConfig, model: WaveClassifier, layout: Layout, ranks: Ranks, precision: str
) -> Engine:
    """DeepSpeed around the model; who does not get that far in time ends (a collective)."""
    with start_limit(ranks.rank, config.engine.group_timeout_s):
        return Engine(
            model,
            layout,
            ranks,
            zero_stage=config.engine.zero_stage,
            bf16=precision == "bf16",
            fp16=precision == "fp16",
            lr=config.optim.lr,
            head_lr=config.optim.head_lr,
            weight_decay=config.optim.weight_decay,
            clip_norm=config.optim.clip_norm,
            bucket_elements=config.engine.bucket_elements,
            bf16_weights=precision == "bf16-weights",
            compile_model=config.engine.compile,
            ema_decay=config.optim.ema_decay,
            layer_lr_decay=config.optim.layer_lr_decay,
            offload=config.engine.offload == "optimizer",
        )


def from_position(run: Run, first_position: int, first_step: int, held_rate: float | None) -> Run:
    """A run whose plan counts steps from a position on."""
    plan = replace(run.plan, first_position=first_position, first_step=first_step)
    objective = Objective(run.config.objective, plan, run.shards, run.objective.table)
    return replace(run, plan=plan, objective=objective, held_rate=held_rate)


def plan_of(config: TrainConfig, shards: ShardSet) -> Plan:
    """The order of the training rows over the whole run."""
    first, end = shards.rows_of("train")
    return Plan(
        rows=end - first,
        total=max(1, round(config.optim.epochs * (end - first))),
        global_batch=config.optim.global_batch,
        seed=config.output.seed,
        window_shards=config.data.window_shards,
        shard_rows=shards.shard_rows_of("train"),
    )


def layout_of(config: TrainConfig, world: int) -> Layout:
    """How a global batch is divided among ranks.

    Raises:
        UserError: a rank would get no row.
    """
    return lay_out(
        global_batch=config.optim.global_batch,
        world=world,
        largest_micro_batch=config.engine.micro_batch,
    )


def identity_of(
    config: TrainConfig, shards: ShardSet, table: BiasTable | None, plan: Plan
) -> dict[str, Any]:
    """What must be the same for a checkpoint to go on here: knobs, and what they have found."""
    window = plan.window_shards
    found = {
        "shards": shards.manifest.dataset_id,
        "genres": ", ".join(shards.manifest.genres),
        "order_version": ORDER_VERSION,
    }
    return found | {
        **{name: value for name, value in identity.own(config).items() if name != "model"},
        "window_shards": f"{window} of {plan.shard_rows[0]} rows" if window else 0,
        "epochs": plan.total,
        "class_weight": _said(class_weights(config.objective.class_weight, shards)),
        "bias_table": table.sha256 if table else "none",
    }


def found_of_model(
    config: TrainConfig, manifest: Manifest, base: Base | None = None
) -> dict[str, str] | UserError:
    """What of the model must be the same for a checkpoint to go on: configuration, revision.

    Returns:
        The error where it is not there, which must wait: a run that is complete needs none. Asked
        again, a hub that cannot be reached would take its half a minute again.
    """
    main = config.main
    try:
        model = configuration(
            main.model,
            manifest.genres,
            spec_augment=main.spec_augment,
            revision=main.revision,
            trust_remote_code=main.trust_remote_code,
            base=base,
            head=main.head,
        )
    except UserError as error:
        return error
    commit = base.commit if base else getattr(model, "_commit_hash", None)
    return {"model": configuration_hash(model), "revision": commit or "none"}


def _said(weights: Tensor | None) -> str:
    return "none" if weights is None else " ".join(f"{each:.6g}" for each in weights.tolist())


def _main_model(config: TrainConfig, manifest: Manifest, base: Base | None) -> WaveClassifier:
    return build_main(
        config.main.model,
        manifest.genres,
        freeze=config.main.freeze,
        frozen_layers=config.main.frozen_layers,
        activation_checkpointing=config.main.activation_checkpointing,
        seed=config.output.seed,
        segment_samples=heard_samples(config, manifest),
        sample_rate=manifest.sample_rate,
        crop_of=None if config.data.crop_s is None else manifest.segment_samples,
        learns_gain=config.objective.learns_gain,
        cache=config.data.cache,
        spec_augment=config.main.spec_augment,
        revision=config.main.revision,
        trust_remote_code=config.main.trust_remote_code,
        lora=config.main.adapters,
        head=config.main.head,
        base=base,
        augment=Augment(config.augmentation, manifest.sample_rate),
    )


def heard_samples(config: TrainConfig, manifest: Manifest) -> int:
    """Samples that the model hears at a time: of a crop, else of a segment.

    Raises:
        UserError: crops are not shorter than segments.
    """
    whole, rate, crop_s = manifest.segment_samples, manifest.sample_rate, config.data.crop_s
    if crop_s is None:
        return whole
    crop = round(crop_s * rate)
    if not 0 < crop < whole:
        raise UserError(
            f"--crop-s {crop_s:g}",
            got=f"{crop} samples",
            expected=f"1 to {whole - 1}: the segments of the shards have {whole / rate:g} s",
            cure="leave it out; for longer crops pack longer segments: python -m mgc_dist.shard "
            "--segment-s 30",
        )
    return crop


def _take_frozen(model: WaveClassifier, checkpoint: Path) -> None:
    """Give a model the frozen weights of a checkpoint."""
    kept = whole_weights(checkpoint)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, value in model.state_dict(keep_vars=True).items():  # statistics of norms too
        if name in trained:
            continue
        found = kept.get(name)
        if found is None or found.dtype != value.dtype:
            raise UserError(
                f"frozen weights of --model in checkpoint {checkpoint}",
                got=f"no {name}" if found is None else f"{name} in {found.dtype}, rounded",
                expected="them as the model has them, because --model is not at hand",
                cure="bring the model back to where it was, or name its folder: --model FOLDER",
            )
        value.data.copy_(found)


def precision_of(config: TrainConfig, ranks: Ranks) -> str:
    """What `--precision` comes to on this rank: `fp32`, `bf16`, `fp16` or `bf16-weights`."""
    asked = config.engine.precision
    if asked != "auto":
        return asked
    if ranks.device.type != "cuda":
        return "fp32"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16"
    is_fast = torch.cuda.get_device_capability(ranks.device) >= _TENSOR_CORES
    return "fp16" if is_fast and config.data.cache == "none" else "fp32"


def _shapes(model: nn.Module) -> str:
    """A hash of what is trained and frozen, by name and shape: what an optimizer's state fits."""
    lines = [f"{n} {tuple(p.shape)} {p.requires_grad}" for n, p in model.named_parameters()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
