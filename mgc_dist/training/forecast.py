"""`--dry-run` of training: what a run would be, from arithmetic and from a model without weights.

Nothing here needs a GPU or the weights. Bytes of states are those of float32 weights with AdamW
(autocast keeps them): exact but for allocators. Activations are counted on torch's meta device:
what autograd would keep for the backward pass, in float32; bf16 autocast keeps less.
"""

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from mgc_dist.config import TrainConfig
from mgc_dist.data.features import STORE
from mgc_dist.data.order import Layout, Plan, lay_out
from mgc_dist.files import nearest
from mgc_dist.models import flops
from mgc_dist.models.classifier import WaveClassifier
from mgc_dist.models.flops import SegmentFlops
from mgc_dist.models.main import describe_main

STAGES = (0, 1, 2, 3)
GIB = 2**30
_DTYPES = {"fp32": "fp32", "bf16": "bf16", "auto": "fp32 (half if the run has bf16 there)"}
_USABLE = 0.9
"""Share of a GPU that is counted on; kernels, NCCL and the allocator take the rest."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of a rank at one ZeRO stage.

    Attributes:
        weights: float32, and at stages 1 to 3 this rank's share of the optimizer's own copy.
        gradients, optimizer: of the trained weights; AdamW's two moments, and the averages.
        buckets: of communication.
        host: of the host in place of the device, with `--offload optimizer`.
    """

    weights: int
    gradients: int
    optimizer: int
    buckets: int
    host: int = 0

    @property
    def all(self) -> int:
        """Their sum but for the host's, without activations."""
        return self.weights + self.gradients + self.optimizer + self.buckets


@dataclass(frozen=True, kw_only=True)
class Cached:
    """What a cache of the frozen part would be.

    Attributes:
        boundary: of the model's cut.
        shape: of a row, F and D.
        dtype: of a value, in words.
        bytes: of all rows, in float32 unless bf16 is asked for.
        free_bytes: where it will be.
        is_there: a cache of that size lies there already.
        gain: factor by which steps need fewer FLOPs.
    """

    boundary: str
    shape: tuple[int, int]
    dtype: str
    bytes: int
    free_bytes: int
    is_there: bool
    gain: float


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a run would be.

    Attributes:
        layout: of the global batch.
        plan: of the rows.
        parts: part of the model -> (parameters, trained ones).
        flops: of a segment, by part.
        memory: by ZeRO stage.
        activation_bytes: of one micro batch, in float32.
        checkpoint_bytes: of one checkpoint.
        disk_bytes: of all that is kept, with one being written.
        free_bytes: where the run folder will be.
        stage: that is asked for.
        cached: what a cache would be; None without one.
        problems: contradictions, a sentence each.
        notes: what a user might not expect.
    """

    layout: Layout
    plan: Plan
    parts: dict[str, tuple[int, int]]
    flops: SegmentFlops
    memory: dict[int, Memory]
    activation_bytes: int
    checkpoint_bytes: int
    disk_bytes: int
    free_bytes: int
    stage: int
    cached: Cached | None
    problems: tuple[str, ...]
    notes: tuple[str, ...]


def forecast(
    config: TrainConfig,
    *,
    world: int,
    plan: Plan,
    genres: Sequence[str],
    segment_samples: int,
    sample_rate: int,
    cached_rows: int = 0,
) -> Forecast:
    """Work out a run.

    Args:
        config: of the run.
        world: ranks to plan for.
        plan: of the rows.
        genres: in label order.
        segment_samples: T.
        sample_rate: in Hz.
        cached_rows: that a cache would hold.

    Raises:
        UserError: the model cannot be found or does not fit; a cache would not be exact; more
            ranks than rows in a batch.
    """
    stage = config.engine.zero_stage
    layout = lay_out(
        global_batch=config.optim.global_batch,
        world=world,
        largest_micro_batch=config.engine.micro_batch,
    )
    model = _model_of(config, genres, segment_samples, sample_rate)
    parts = count_parts(model)
    every, trained = (sum(counts) for counts in zip(*parts.values(), strict=True))
    averaged = config.optim.ema_decay > 0
    memory = _memory_by_stage(config, every, trained, world)
    counted = flops.count(model, segment_samples)
    activations = activation_bytes(model, layout.micro_batch, segment_samples)
    states = memory[stage].all
    kept = trained if model.is_adapted else every
    checkpoint = checkpoint_bytes(kept, trained, averaged=averaged)
    disk = (config.output.keep_checkpoints + 1) * checkpoint + (2 + averaged) * 4 * every
    run = config.output.run.resolve()
    free = _free_bytes(run)
    cached = None
    if model.boundary is not None:
        cached = _cached(config, model, counted, cached_rows, segment_samples)
    return Forecast(
        layout=layout,
        plan=plan,
        parts=parts,
        flops=counted,
        memory=memory,
        activation_bytes=activations,
        checkpoint_bytes=checkpoint,
        disk_bytes=disk,
        free_bytes=free,
        stage=stage,
        cached=cached,
        problems=tuple(
            _problems(run, disk, free, states + activations)
            + _cache_problems(config.data.caches, cached)
        ),
        notes=(
            *_notes(layout, plan, segment_samples / sample_rate),
            *_room(layout, states, activations),
        ),
    )


def _memory_by_stage(
    config: TrainConfig, every: int, trained: int, world: int
) -> dict[int, Memory]:
    return {
        stage: memory_of(
            stage,
            every,
            trained,
            world,
            config.engine.bucket_elements,
            weight_bytes=2 if config.engine.precision == "bf16-weights" else 4,
            averaged=config.optim.ema_decay > 0,
            offload=config.engine.offload == "optimizer",
        )
        for stage in STAGES
    }


def _model_of(
    config: TrainConfig, genres: Sequence[str], segment_samples: int, sample_rate: int
) -> WaveClassifier:
    model = describe_main(
        config.main.model,
        genres,
        freeze=config.main.freeze,
        frozen_layers=config.main.frozen_layers,
        activation_checkpointing=config.main.activation_checkpointing,
        segment_samples=segment_samples,
        sample_rate=sample_rate,
        cache=config.data.cache,
        spec_augment=config.main.spec_augment,
        revision=config.main.revision,
        trust_remote_code=config.main.trust_remote_code,
        lora=config.main.adapters,
        head=config.main.head,
    )
    if config.optim.layer_lr_decay != 1:
        model.backbone_by_layer()  # refused without layers
    return model


def count_parts(model: WaveClassifier) -> dict[str, tuple[int, int]]:
    """Parameters of each part of the model, and how many of them are trained."""
    every: Counter[str] = Counter()
    trained: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        every[model.kind.part_of(name)] += parameter.numel()
        trained[model.kind.part_of(name)] += parameter.numel() * parameter.requires_grad
    return {part: (every[part], trained[part]) for part in every}


def memory_of(
    stage: int,
    every: int,
    trained: int,
    world: int,
    bucket: int,
    *,
    weight_bytes: int = 4,
    averaged: bool = False,
    offload: bool = False,
) -> Memory:
    """Bytes of a rank, activations apart.

    Args:
        stage: of ZeRO.
        every: parameters.
        trained: parameters.
        world: ranks.
        bucket: elements of a communication bucket.
        weight_bytes: of an element of the weights that are computed with, 4 or 2.
        averaged: averages of the trained weights are kept.
        offload: what the optimizer has is on the host, at stages 2 and 3.

    Source: Rajbhandari et al., "ZeRO", SC 2020, section 5, for float32 weights; stages 1 to 3
    of DeepSpeed 0.19 keep a float32 copy of the trained weights in the optimizer, and a whole
    bucket for gradients, on one rank and for the smallest model too.
    """
    share = -(-trained // world)
    copy = 4 * share if stage else 0
    gathered = min(bucket, trained) if world > 1 else 0
    whole = Memory(
        weights=weight_bytes * (-(-every // world) if stage == 3 else every) + copy,
        gradients=4 * (share if stage >= 2 else trained),
        optimizer=(8 + 4 * averaged) * (share if stage else trained),
        buckets=4 * (gathered + (bucket if stage else 0)),
    )
    return _offloaded(whole, stage, share, weight_bytes) if offload and stage >= 2 else whole


def _offloaded(whole: Memory, stage: int, share: int, weight_bytes: int) -> Memory:
    """The same with what is moved, and buffers of DeepSpeed's for the way.

    Gradients that add up in another type than the weights have, at stage 2, stay on the device.
    """
    stays = stage == 2 and weight_bytes != 4
    buffers = weight_bytes * share + (0 if stays else 4 * share) if stage == 2 else 4 * share
    return replace(
        whole,
        weights=whole.weights - 4 * share,
        gradients=whole.gradients if stays else 0,
        optimizer=0,
        host=8 * share + whole.optimizer + buffers,
    )


def checkpoint_bytes(kept: int, trained: int, *, averaged: bool = False) -> int:
    """Bytes of a checkpoint: kept weights; the optimizer's copy, moments, averages of the trained.

    All weights are kept, but with adapters only the trained ones.

    At stage 0 there is no copy and at stage 3 the trained weights are in the copy only: less.
    """
    return 4 * kept + (12 + 4 * averaged) * trained


def activation_bytes(model: WaveClassifier, rows: int, segment_samples: int) -> int:
    """Bytes that autograd keeps between the forward and the backward pass, in float32.

    Args:
        model: on the meta device.
        rows: B.
        segment_samples: T.
    """
    kept: dict[int, int] = {}
    own = {id(parameter.untyped_storage()) for parameter in model.parameters()}
    alive: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and id(tensor.untyped_storage()) not in own:
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            alive.append(tensor)  # else a later storage may have its address
        return tensor

    model.net.config.apply_spec_augment = False  # it looks at numbers, of which there are none
    wave = torch.zeros((rows, segment_samples), dtype=torch.int16, device="meta")
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with torch.device("meta"), hooks:
        output = model.train()(wave)
    del output
    return sum(kept.values())


def _cached(
    config: TrainConfig, model: WaveClassifier, work: SegmentFlops, rows: int, samples: int
) -> Cached:
    root = config.data.caches.resolve()
    assert model.boundary is not None
    wave = torch.zeros((1, samples), dtype=torch.int16, device="meta")
    with torch.no_grad():
        features = model(wave, only_below=True)  # [1, F, D]
    value = 2 if config.data.cache_dtype == "bf16" else 4
    size = rows * value * features[0].numel()
    return Cached(
        boundary=model.boundary,
        shape=(features.shape[1], features.shape[2]),
        dtype=_DTYPES[config.data.cache_dtype],
        bytes=size,
        free_bytes=_free_bytes(root),
        is_there=any(path.stat().st_size >= size for path in root.glob(f"*/{STORE.array}")),
        gain=work.training / work.above(model.boundary).training,
    )


def _free_bytes(folder: Path) -> int:
    """Free space where a folder is, or will be."""
    return shutil.disk_usage(nearest(folder)).free


def _cache_problems(root: Path, cached: Cached | None) -> list[str]:
    if cached is None or cached.is_there or cached.bytes <= cached.free_bytes:
        return []
    return [
        f"{_size(cached.bytes)} of cache do not fit into {_size(cached.free_bytes)} free at "
        f"{root}: name another --cache-dir, or take --cache-dtype bf16 or --cache cnn"
    ]


def _problems(run: Path, disk: int, free: int, memory: int) -> list[str]:
    problems = []
    if disk > free:
        problems.append(
            f"{_size(disk)} of checkpoints do not fit into {_size(free)} free at {run}: lower "
            "--keep-checkpoints, or choose another --run"
        )
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        if memory > total:
            problems.append(
                f"{_size(memory)} a rank do not fit into the GPU's {_size(total)}: lower "
                "--micro-batch, or use --activation-checkpointing"
            )
    return problems


def _notes(layout: Layout, plan: Plan, seconds: float) -> list[str]:
    notes = []
    if layout.waste > 0.1:
        notes.append(
            f"{100 * layout.waste:.0f} % of each step computes padding; --global-batch "
            f"{layout.slots} would waste none"
        )
    if plan.rows < plan.global_batch:
        notes.append(f"a step holds {plan.global_batch} rows, of only {plan.rows}: some come twice")
    if plan.steps < 10:
        notes.append(f"only {plan.steps} optimizer steps of {seconds:g} s segments")
    return notes


def _room(layout: Layout, states: int, activations: int) -> list[str]:
    """The micro batch that the GPU has room for; nothing to say without one."""
    if not torch.cuda.is_available():
        return []
    total = torch.cuda.get_device_properties(0).total_memory
    a_row = activations / layout.micro_batch
    most = int((_USABLE * total - states) / a_row)
    if most < 1:
        return []
    return [
        f"the GPU's {_size(total)} have room for about --micro-batch {most} of float32 "
        f"activations ({_size(round(a_row))} a segment), and for more under bf16 autocast; "
        f"{layout.micro_batch} is planned"
    ]


def show(planned: Forecast) -> None:
    """Print it."""
    console = Console(highlight=False, soft_wrap=True)
    layout, plan = planned.layout, planned.plan
    console.print(
        f"global batch {layout.global_batch} = {layout.world} ranks x micro batch "
        f"{layout.micro_batch} x accumulation {layout.accumulation} ({layout.slots} slots, "
        f"{100 * layout.waste:.0f} % padding)\n"
        f"{plan.rows:,} training rows, {plan.total:,} positions, {plan.steps:,} optimizer steps"
    )
    table = Table(title="Parameters, and GFLOP of a segment")
    for column in ("part", "all", "trained", "forward", "training"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for part, (every, trained, *work) in _grouped(_with_work(planned)).items():
        shown = [f"{flop / 1e9:.3f}" if flop else "" for flop in work]
        table.add_row(part, f"{every:,}", f"{trained:,}" if trained else "frozen", *shown)
    console.print(table)
    console.print(
        f"a segment takes {planned.flops.forward / 1e9:.5g} GFLOP forward and "
        f"{planned.flops.training / 1e9:.5g} in training, "
        f"{100 * planned.flops.frozen / planned.flops.training:.0f} % of it in the frozen part"
    )
    table = Table(title="Memory of a rank, estimated")
    for column in ("ZeRO", "weights", "gradients", "optimizer", "buckets", "activations", "all"):
        table.add_column(column, justify="right")
    for stage, memory in planned.memory.items():
        sizes = (memory.weights, memory.gradients, memory.optimizer, memory.buckets)
        total = memory.all + planned.activation_bytes
        cells = map(_size, (*sizes, planned.activation_bytes, total))
        table.add_row(f"{'-> ' if stage == planned.stage else ''}{stage}", *cells)
    console.print(table)
    host = planned.memory[planned.stage].host
    if host:
        console.print(f"--offload optimizer: {_size(host)} more of the host's memory, a rank")
    console.print(
        f"activations in float32, less under bf16 autocast; a checkpoint is "
        f"{_size(planned.checkpoint_bytes)}, all that is kept {_size(planned.disk_bytes)}, free "
        f"{_size(planned.free_bytes)}"
    )
    if planned.cached:
        _show_cached(planned.cached)
    for note in planned.notes:
        console.print(f"note: {note}")
    for problem in planned.problems:
        console.print(f"problem: {problem}")


def _show_cached(cached: Cached) -> None:
    frames, width = cached.shape
    Console(highlight=False, soft_wrap=True).print(
        f"cache at {cached.boundary}: {frames} frames of {width} values a segment, "
        f"{_size(cached.bytes)} in {cached.dtype}, {_size(cached.free_bytes)} free"
        + (", one of that size is there" if cached.is_there else "")
        + f"; a step then takes 1/{cached.gain:.2f} of the FLOPs"
    )


def _with_work(planned: Forecast) -> dict[str, tuple[int, ...]]:
    """Part -> parameters, trained ones, FLOP forward, FLOP of a training step (0: none)."""
    rows: dict[str, tuple[int, ...]] = {}
    for part, counts in planned.parts.items():
        work = planned.flops.parts.get(part)
        rows[part] = (
            (*counts, work.forward, work.forward + work.backward) if work else (*counts, 0, 0)
        )
    return rows


def _grouped(parts: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Neighbouring layers that are all trained, or all frozen, in one line."""
    grouped: dict[str, tuple[int, ...]] = {}
    for trains in (False, True):
        layers = {p: c for p, c in parts.items() if p.startswith("layer ") and bool(c[1]) == trains}
        if layers:
            numbers = sorted(int(part.split()[1]) for part in layers)
            title = f"layers {numbers[0] + 1} to {numbers[-1] + 1} of the encoder"
            grouped[title] = tuple(sum(counts) for counts in zip(*layers.values(), strict=True))
    rest = {part: counts for part, counts in parts.items() if not part.startswith("layer ")}
    head = {part: rest.pop(part) for part in ("head",) if part in rest}
    return rest | grouped | head


def _size(count: int) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:.1f} MiB"
