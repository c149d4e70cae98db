"""One GPU: what this project does there, timed in under 6 minutes, in the order of its worth.

    python benchmarks/gpu.py --json benchmarks/results/gpu.json
    python benchmarks/gpu.py --device cpu --quick   # a small model, to try the script itself

It needs no weights and no network: a wav2vec2-large with random weights is trained by the `train`
command itself, on noise in shards of 3 s. Each row is a process of its own with its own time limit,
its result is written when it is there, and what finds no time is named. Dropout and SpecAugment are
off, so that rows can be compared: those with half of the layers frozen must lose alike.

- `rates`: what the device reaches in one large product, which MFU is told of, and in copying.
- training: freeze modes, from a cache, compiled, with bf16 weights, at ZeRO stage 1, and with other
  micro batches.
- `trainer`: the same step in Hugging Face's Trainer, with plain cross-entropy and with the bias
  model beside it, in turns with ours (benchmarks/step.py).
- `parts`: time by part of the model, forward and backward, from torch's profiler.
- `run`: two epochs of the gtzan preset on a fifth of its rows, and the evaluation. What it costs
  besides steps is measured; the minutes for all of GTZAN are computed from that, and marked so.
- the bias pass, and one reader thread.

Whether the numbers are right is for `make test-gpu`.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout, suppress
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from measure import machine, versions, write
from step import PACKAGES, SIZES, Enough, blank_table, free_port, listen, make_table, take_turns
from step import Job as StepJob

from mgc_dist import cli
from mgc_dist.config import (
    DataConfig,
    EngineConfig,
    EvaluateConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)

SAMPLES, RATE = 48_000, 16_000
GOAL = 0.4
"""Of the measured rate of one bf16 product."""
TARGETS = {"table over trainer-poe": 1.15, "table over trainer-ce": 1.0, "cache": 1.4}
GTZAN = {"train": 443, "validation": 197, "test": 290}
"""Tracks of the fault-filtered split, of 19 segments each."""
SHARE = 5
"""One of so many tracks is in the shards."""
SAME = {"cache": 2e-2, "compile": 2e-2, "bf16 weights": 5e-2, "stage 1": 2e-2}
"""How far the first loss may be from that of the row without."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way to train."""

    freeze: str = "feature_encoder"
    cache: str = "none"
    compile: bool = False
    precision: str = "bf16"
    stage: int = 2
    micro_batch: int = 32


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one process measures, and how long it may take."""

    name: str
    limit_s: float
    case: Case | None = None


def rows(layers: int, micro_batch: int) -> list[Row]:
    """All rows, in the order of their worth."""
    half, base = f"layers:{layers // 2}", Case(micro_batch=micro_batch)

    def train(name: str, limit_s: float = 40, **changes: Any) -> Row:
        return Row(name=name, limit_s=limit_s, case=replace(base, **changes))

    return [
        Row(name="rates", limit_s=25),
        train("feature_encoder"),
        Row(name="trainer", limit_s=90, case=replace(base, micro_batch=micro_batch // 2)),
        train(half, freeze=half),
        train(f"{half}, cache", 60, freeze=half, cache="trunk"),
        Row(name="parts", limit_s=45, case=base),
        train("none", freeze="none"),
        train("feature_encoder, compile", 100, compile=True),
        train("feature_encoder, bf16 weights", precision="bf16-weights"),
        train(f"feature_encoder, micro batch {4 * micro_batch}", micro_batch=4 * micro_batch),
        Row(name="run", limit_s=100, case=base),
        train(f"feature_encoder, micro batch {micro_batch // 4}", micro_batch=micro_batch // 4),
        train("feature_encoder, stage 1", stage=1),
        train(f"feature_encoder, micro batch {2 * micro_batch}", micro_batch=2 * micro_batch),
        train(f"feature_encoder, micro batch {micro_batch // 2}", micro_batch=micro_batch // 2),
        Row(name="bias pass", limit_s=30),
        Row(name="reader", limit_s=20),
    ]


@dataclass(frozen=True, kw_only=True)
class Job:
    """Where and how long a process works.

    Attributes:
        device: cuda or cpu.
        folder: of shards, and of models in FOLDER/SIZE.
        size: `large`, or `tiny` to try the script.
        warm, timed: windows of `every` steps, before the timed ones and timed.
    """

    device: str
    folder: Path
    size: str = "large"
    warm: int = 1
    timed: int = 3
    every: int = 4

    @property
    def own(self) -> Path:
        """Folder of the models' configurations and of the bias table."""
        return self.folder / self.size

    @property
    def on_gpu(self) -> bool:
        """Else it is the script that is tried."""
        return self.device == "cuda"


# -- in a process of its own ------------------------------------------------------------------


def rates(job: Job, case: Case | None) -> dict[str, Any]:
    """What the device reaches: one large product in bf16 and in float32, and copying."""
    device = torch.device(job.device)
    size = 8192 if job.on_gpu else 512
    found: dict[str, Any] = {"name": "CPU", "memory_gib": None}
    if job.on_gpu:
        about = torch.cuda.get_device_properties(0)
        found = {"name": about.name, "memory_gib": round(about.total_memory / 2**30, 1)}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        seconds = timed(lambda left=left, right=right: left @ right, job)
        found[f"{name}_tflop_per_s"] = digits(2 * size**3 / seconds / 1e12)
    source = torch.empty(2**30 if job.on_gpu else 2**24, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = timed(lambda: target.copy_(source), job)
    found["copy_gb_per_s"] = digits(2 * source.numel() / seconds / 1e9)
    return found


def timed(work: Callable[[], Any], job: Job) -> float:
    """Median seconds of some work, each waited for, once the clocks have settled."""
    seconds, started = [], time.perf_counter()
    warm_s, timed_s = (1.0, 2.0) if job.on_gpu else (0.1, 0.3)
    while not seconds or time.perf_counter() - started < warm_s + timed_s:
        before = time.perf_counter()
        work()
        if job.on_gpu:
            torch.cuda.synchronize()
        after = time.perf_counter()
        if after - started > warm_s:
            seconds.append(after - before)
    return statistics.median(seconds)


def digits(value: float) -> float:
    """To four digits."""
    return float(f"{value:.4g}")


def train(job: Job, case: Case) -> dict[str, Any]:
    """The `train` command, until enough windows of steps are logged."""
    from mgc_dist.events import StepEvent, only
    from mgc_dist.journal import read_events

    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=job.folder) as folder:
        run = Path(folder) / "run"
        stop_at((job.warm + job.timed) * job.every)
        if short := shortage(configuration(job, case, run)):
            return {"out_of_memory": short, "micro_batch": case.micro_batch}
        steps = only(read_events(run), StepEvent)
    found: dict[str, Any] = {
        "micro_batch": case.micro_batch,
        "losses": [step.loss for step in steps],
        "process_s": round(time.perf_counter() - started, 1),
        "peak_gib": max(step.peak_memory_gib for step in steps),
    }
    for name in ("segments_per_s", "model_tflop_per_s", "step_s", "mfu", "data_wait_share"):
        values = [getattr(step, name) for step in steps[job.warm :]]
        known = [value for value in values if value is not None]
        found[name] = digits(statistics.median(known)) if known else None
    return found


def stop_at(last_step: int, seen: Callable[[int], None] = lambda step: None) -> None:
    """Let the journal of the `train` command end it after a step."""
    from mgc_dist.events import StepEvent

    def told(event: Any) -> None:
        if isinstance(event, StepEvent):
            seen(event.step)
            if event.step >= last_step:
                raise Enough

    listen(told)


def shortage(config: TrainConfig) -> str:
    """Run `train` to where the journal ends it; what it says if memory is short, else ""."""
    from mgc_dist import train as command
    from mgc_dist.errors import UserError

    try:
        with suppress(Enough):
            command.run(config)
            raise AssertionError("the run ended before it was measured")
    except UserError as error:  # in whose words was short of memory, the command knows
        if "memory" in str(error):
            return str(error)
        raise
    return ""


def configuration(job: Job, case: Case, run: Path) -> TrainConfig:
    """Settings of `train`: nothing is due before the run is cut."""
    return TrainConfig(
        data=DataConfig(
            shards=job.folder / "shards",
            bias_table=job.own / "bias.npy",
            cache=case.cache,
            cache_dir=job.folder / "cache",
        ),
        main=ModelConfig(model=str(job.own / "main.json"), freeze=case.freeze, spec_augment=False),
        objective=LossConfig(loss="poe"),
        optim=OptimConfig(
            epochs=1e5,
            global_batch=2 * case.micro_batch,
            lr=1e-4,
            head_lr=1e-3,
            warmup_fraction=0.0,  # wrong gradients are to show in the losses
            final_lr_fraction=1.0,
        ),
        engine=EngineConfig(
            micro_batch=case.micro_batch,
            device=job.device,
            precision=case.precision,
            compile=case.compile,
            zero_stage=case.stage,
        ),
        output=RunConfig(
            run=run,
            log_every_steps=job.every,
            validate_every_epochs=1e5,
            checkpoint_every_epochs=1e5,
        ),
    )


def trainer(job: Job, case: Case) -> dict[str, Any]:
    """Steps in turns: ours, the Trainer with the bias model beside it, the Trainer without."""
    warm, steps = (3, 8) if job.on_gpu else (1, 2)
    size = replace(
        SIZES[job.size],
        micro_batch=case.micro_batch,
        global_batch=2 * case.micro_batch,
        warm=warm,
        timed=steps,
    )
    names = ("table", "trainer-poe", "trainer-ce")
    folder = job.folder / "turns"  # with a table of the bias model that the Trainer has beside it
    (folder / job.size).mkdir(parents=True)
    (folder / "shards").symlink_to(job.folder / "shards")
    for name in ("main.json", "bias.json"):
        shutil.copy(job.own / name, folder / job.size)
    jobs = [
        StepJob(
            model=job.size,
            case=name,
            freeze="feature_encoder",
            folder=folder,
            size=size,
            device=job.device,
        )
        for name in names
    ]
    make_table(jobs[0], sys.stderr)
    turns = dict(zip(names, take_turns(jobs, threads=2), strict=True))
    seconds = {name: [step["s"] for step in turns[name]["steps"][warm:]] for name in names}
    found: dict[str, Any] = {"micro_batch": case.micro_batch}
    for name in names:
        found[name] = {
            "segments_per_s": digits(size.global_batch / statistics.median(seconds[name])),
            "losses": [digits(loss) for loss in turns[name]["losses"]],
        }
    for name in names[1:]:
        pairs = zip(seconds["table"], seconds[name], strict=True)
        found[f"table over {name}"] = digits(statistics.median(b / a for a, b in pairs))
    return found


def parts(job: Job, case: Case) -> dict[str, Any]:
    """Shares of the time of steps by part of the model, forward and backward.

    Kernels of the backward pass are given to the part whose forward operation autograd names.
    """
    from torch.profiler import ProfilerActivity, profile

    from mgc_dist.training import engine

    step, make = engine.Engine.step, engine.Engine.__init__

    def stepping(self: Any) -> bool:
        with torch.profiler.record_function("part:optimizer"):
            return step(self)

    def making(self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        make(self, model, *args, **kwargs)
        base = model.net.base_model
        marked = {"CNN": [base.feature_extractor], "head": [model.net.projector]}
        marked["head"].append(model.net.classifier)
        marked["transformer"] = [base.feature_projection, base.encoder]
        for name, modules in marked.items():
            for module in modules:
                mark(module, name)

    engine.Engine.step = stepping  # type: ignore[method-assign]
    engine.Engine.__init__ = making  # type: ignore[method-assign]
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * job.on_gpu
    watch, count, began = profile(activities=kinds), 3 if job.on_gpu else 1, [0.0]

    def seen(number: int) -> None:
        if number == 4:
            if job.on_gpu:
                torch.cuda.synchronize()
            watch.start()
            began[0] = time.perf_counter()

    with tempfile.TemporaryDirectory(dir=job.folder) as folder:
        stop_at(4 + count, seen)
        config = configuration(job, case, Path(folder) / "run")
        config = replace(config, output=replace(config.output, log_every_steps=1))
        if short := shortage(config):
            return {"out_of_memory": short, "micro_batch": case.micro_batch}
        if job.on_gpu:
            torch.cuda.synchronize()
        wall_s = time.perf_counter() - began[0]
        watch.stop()
    busy = by_part(watch.events(), on_gpu=job.on_gpu)
    idle = max(0.0, wall_s - sum(busy.values()) / 1e6)
    shares = {name: digits(us / 1e6 / wall_s) for name, us in sorted(busy.items())}
    return {
        "steps": count,
        "wall_s": digits(wall_s),
        "shares": shares | {"idle": digits(idle / wall_s)},
    }


def mark(module: torch.nn.Module, part: str) -> None:
    """Name the part in the profile, around each call of a module."""
    forward = module.forward

    def marked(*args: Any, **kwargs: Any) -> Any:
        with torch.profiler.record_function(f"part:{part}"):
            return forward(*args, **kwargs)

    module.forward = marked  # type: ignore[method-assign]


def by_part(events: Any, *, on_gpu: bool) -> Counter[str]:
    """Microseconds of each part: of the device's kernels, or of the CPU's operations."""

    def ancestors(event: Any) -> Iterator[Any]:
        while event is not None:
            yield event
            event = event.cpu_parent

    def own_part(event: Any) -> str:
        named = (each.name for each in ancestors(event) if each.name.startswith("part:"))
        return next(named, "")[5:]

    forward_of: dict[int, str] = {}
    for event in sorted(events, key=lambda event: event.time_range.start):
        if event.sequence_nr >= 0 and (part := own_part(event)):
            forward_of[event.sequence_nr] = part  # the last of a number is who has used it
    busy: Counter[str] = Counter()
    for event in events:
        us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if event.name.startswith("ProfilerStep") or not us:
            continue
        part = own_part(event)
        if not part:
            numbers = (each.sequence_nr for each in ancestors(event) if each.sequence_nr >= 0)
            part = next((forward_of[n] for n in numbers if n in forward_of), "")
            part = f"{part}, backward" if part not in ("", "optimizer") else "loss and all else"
        busy[part] += us
    return busy


def run(job: Job, case: Case) -> dict[str, Any]:
    """Two epochs of the gtzan preset on a fifth of its rows, and the evaluation of the test."""
    from mgc_dist import evaluate
    from mgc_dist import train as command
    from mgc_dist.events import CheckpointEvent, StartEvent, StepEvent, ValidationEvent, only
    from mgc_dist.journal import read_events

    with tempfile.TemporaryDirectory(dir=job.folder) as folder:
        path = Path(folder) / "run"
        words = ["--preset", "gtzan", "--shards", str(job.folder / "shards"), "--run", str(path)]
        words += ["--model", str(job.own / "main.json"), "--bias-table", str(job.own / "bias.npy")]
        words += ["--device", job.device, "--log-every-steps", "1", "--micro-batch"]
        words += [str(case.micro_batch), "--epochs", "2" if job.on_gpu else "1"]
        config = cli.parse("train", TrainConfig, words)
        started = time.time()
        command.run(config)
        trained = time.time()
        os.environ["MASTER_PORT"] = str(free_port())  # the other one may linger
        evaluate.run(EvaluateConfig(run=path, device=job.device))
        evaluated = time.time()
        events = read_events(path)
    steps, start = only(events, StepEvent), only(events, StartEvent)[0]
    checks, saves = only(events, ValidationEvent), only(events, CheckpointEvent)
    before = [max(e.time_s for e in events if e.time_s < check.time_s) for check in checks]
    found = {
        "start_s": steps[0].time_s - started,
        "validation_s": statistics.median(
            check.time_s - at for check, at in zip(checks, before, strict=True)
        ),
        "checkpoint_s": statistics.median(save.save_s for save in saves),
        "end_s": trained - events[-1].time_s,
        "evaluation_s": evaluated - trained,
        "step_s": statistics.median(step.step_s for step in steps[1:]),
        "all_s": evaluated - started,
    }
    assert start.world == 1
    return {name: digits(value) for name, value in found.items()} | computed(found, config)


def computed(found: dict[str, float], config: TrainConfig) -> dict[str, Any]:
    """Minutes for all of GTZAN and ten epochs, worked out from what a fifth of it cost."""
    epochs, rows_of = 10, {split: 19 * count for split, count in GTZAN.items()}
    steps_s = epochs * rows_of["train"] / config.optim.global_batch * found["step_s"]
    other_s = found["start_s"] + found["end_s"] + SHARE * found["evaluation_s"]
    other_s += epochs * (SHARE * found["validation_s"] + found["checkpoint_s"])
    return {
        "computed_step_minutes": digits(steps_s / 60),
        "computed_minutes": digits((steps_s + other_s) / 60),
        "computed_over_steps": digits((steps_s + other_s) / steps_s),
    }


def bias_pass(job: Job, case: Case | None) -> dict[str, Any]:
    """The frozen bias model in float32, as its pass has it: batches of 32 on the device."""
    from transformers import AutoConfig, AutoModel

    from mgc_dist.bias_model.states import float32
    from mgc_dist.models.backbone import HiddenMean
    from mgc_dist.models.flops import count
    from mgc_dist.models.main import describe_main

    torch.manual_seed(0)
    path = job.own / "bias.json"
    net = AutoModel.from_config(AutoConfig.for_model(**json.loads(path.read_text())))
    module = HiddenMean(net, do_normalize=True).eval().requires_grad_(False).to(job.device)
    described = describe_main(
        str(path),
        ["a", "b"],
        freeze="backbone",
        frozen_layers=None,
        activation_checkpointing=False,
        segment_samples=SAMPLES,
    )
    batch = 32 if job.on_gpu else 4
    wave = torch.randint(-9000, 9000, (batch, SAMPLES), dtype=torch.int16).to(job.device)
    with torch.no_grad(), float32():
        seconds = timed(lambda: module(wave), job)
    flop = count(described, SAMPLES).forward * batch
    return {
        "segments_per_s": digits(batch / seconds),
        "model_tflop_per_s": digits(flop / seconds / 1e12),
    }


def reader(job: Job, case: Case | None) -> dict[str, Any]:
    """Segments a second that one thread reads from the shards, as training asks for them."""
    from mgc_dist.data.order import Plan, lay_out, training_batches
    from mgc_dist.data.reader import Reader, ShardSet

    with ShardSet(job.folder / "shards") as shards:
        first, stop = shards.rows_of("train")
        count = 20_000 if job.on_gpu else 1000
        plan = Plan(rows=stop - first, total=count, global_batch=32, seed=0)
        layout = lay_out(global_batch=32, world=1, largest_micro_batch=32)
        batches = training_batches(plan, layout, 0, 0)
        torch.empty(1, pin_memory=job.on_gpu).to(job.device)  # the device's start is not timed
        started = time.perf_counter()
        with Reader(shards, "train", batches, read_ahead=4, pin=job.on_gpu) as stream:
            for batch in stream:
                batch.input.to(job.device, non_blocking=True)
        if job.on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    return {"segments_per_s": digits(count / seconds)}


# -- around it --------------------------------------------------------------------------------


def prepare(job: Job) -> None:
    """Shards of noise, a bias table of noise, and the models' configurations."""
    import numpy as np

    from mgc_dist.data.reader import ShardSet
    from mgc_dist.data.tracks import Track
    from mgc_dist.packing.cut import Cut, make_plan
    from mgc_dist.packing.pack import alone, pack

    share = SHARE if job.on_gpu else 10 * SHARE
    tracks = [
        Track(
            id=f"genre{genre}_{split}_{number}",
            genre=f"genre{genre}",
            group=None,
            split=split,
            path=Path(f"genre{genre}") / f"{split}-{number}.wav",
        )
        for split, count in GTZAN.items()
        for genre in range(10)
        for number in range(max(1, round(count / share / 10)))
    ]
    cut = Cut(
        segment_samples=SAMPLES, hop_samples=SAMPLES // 2, sample_rate=RATE, rows_per_shard=512
    )
    plan = make_plan(tracks, {track.id: 19 for track in tracks}, {}, cut)
    out = job.folder / "shards"
    with alone(out):
        pack(
            plan,
            out,
            {"split": "table"},
            Noise(),
            overwrite=False,
            jobs=0,
            progress=lambda done: done,
        )
    job.own.mkdir()
    for name, settings in (("main", SIZES[job.size].main), ("bias", SIZES[job.size].bias)):
        (job.own / f"{name}.json").write_text(json.dumps(settings))
    with ShardSet(job.folder / "shards") as shards:
        keys, genres = shards.keys(), shards.manifest.genres
    table = blank_table(keys, genres)
    rng = np.random.default_rng(0)
    for genre in genres:
        table[genre] = rng.normal(size=len(keys))
    np.save(job.own / "bias.npy", table)


class Noise:
    """Stands in for the source files: 30 s of noise a track."""

    def __call__(self, track: Any) -> tuple[Any, str]:
        """The wave of a track, and what stands for the hash of its file."""
        import numpy as np

        rng = np.random.default_rng(list(track.id.encode()))
        return rng.integers(-9000, 9000, 30 * RATE, np.int16), "0" * 32

    def only(self, track: Any) -> "Noise":
        """What a worker is sent: itself."""
        return self

    def about(self, track: Any) -> dict[str, Any]:
        """Nothing: there is no file."""
        return {}

    def stamp(self, track: Any) -> str:
        """The same for the same track."""
        return str(track.id)


def spawn(row: Row, job: Job, limit_s: float) -> dict[str, Any]:
    """Measure a row in a process of its own, which is ended with all it has started."""
    command = [sys.executable, __file__, "--only", row.name]
    command += ["--job", json.dumps(asdict(job) | {"folder": str(job.folder)})]
    command += ["--case", json.dumps(asdict(row.case) if row.case else None)]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
    alone |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    if not job.on_gpu:
        alone |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=errors,
            text=True,
            env=os.environ | alone | {"HF_HUB_OFFLINE": "1"},
            start_new_session=True,
        )
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return {"failed": f"not done after {limit_s:.0f} s"}
        out.seek(0)
        lines = [line for line in out if line.startswith("{")]
        if code or not lines:
            errors.seek(0)
            return {"failed": f"ended with {code}: {errors.read()[-3000:]}"}
    return dict(json.loads(lines[-1]))


def measure(words: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All rows that there is time for; the result so far is written after each."""
    began = time.monotonic()
    job = Job(device=words.device, folder=folder, size="tiny" if words.quick else "large")
    if words.quick:
        job = replace(job, warm=1, timed=1, every=1)
    with redirect_stdout(sys.stderr):
        prepare(job)
    found: dict[str, Any] = {
        "benchmark": "gpu",
        "date": str(date.today()),
        "quick": words.quick,
        "left_out": [],
        "machine": machine(),
        "versions": versions(PACKAGES),
        "rows": {},
    }
    layers = SIZES[job.size].main["num_hidden_layers"]
    for row in rows(layers, 32 if job.on_gpu else 4):
        if row.case and row.case.compile and not any(map(shutil.which, ("cc", "gcc", "clang"))):
            found["left_out"].append(f"{row.name} (no C compiler)")
            continue
        left_s = 60 * words.minutes - (time.monotonic() - began)
        if left_s < min(10, row.limit_s):
            found["left_out"].append(row.name)
            continue
        limit_s = min(left_s, row.limit_s * (1 if job.on_gpu else 10))
        found["rows"][row.name] = spawn(row, job, limit_s)
        found["seconds"] = round(time.monotonic() - began)
        told = json.dumps(found["rows"][row.name])
        print(f"{found['seconds']} s, {row.name}: {told}", file=sys.stderr, flush=True)
        if words.json:
            write(words.json, found)
    return found


# -- the table --------------------------------------------------------------------------------


def trained(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows that have trained, by name."""
    return {
        name: row
        for name, row in found["rows"].items()
        if "segments_per_s" in row and "losses" in row
    }


def failures(found: dict[str, Any]) -> list[str]:
    """What went wrong, a sentence each; nothing of it keeps the other figures from being told."""
    told = [f"{name}: {row['failed']}" for name, row in found["rows"].items() if "failed" in row]
    training = trained(found)
    for name, row in training.items():
        plain, _, how = name.partition(", ")
        other = training.get(plain)
        if how in SAME and other and row["micro_batch"] == other["micro_batch"]:
            one, two = row["losses"][0], other["losses"][0]
            if None in (one, two) or not abs(one - two) < SAME[how]:
                told.append(f"{name} loses {one}, {plain} {two}")
    turns = found["rows"].get("trainer", {})
    if "table" in turns:
        pairs = zip(turns["table"]["losses"], turns["trainer-poe"]["losses"], strict=True)
        if not all(abs(one - two) < 5e-2 for one, two in pairs):
            told.append("trainer: ours and the Trainer with the bias model lose differently")
    return told


def table(found: dict[str, Any]) -> str:
    """The figures as Markdown; the last that is printed."""
    reached = found["rows"].get("rates", {})
    rate = reached.get("bf16_tflop_per_s")
    lines = [
        f"{found['date']}, {reached.get('name')}, {found.get('seconds')} s; one bf16 product: "
        f"{rate} TFLOP/s, float32: {reached.get('fp32_tflop_per_s')}, copying: "
        f"{reached.get('copy_gb_per_s')} GB/s"
        + (f"; left out: {', '.join(found['left_out'])}" if found["left_out"] else ""),
        "",
        "| --freeze | segments/s | TFLOP/s | of the product | micro batch | GiB | data wait |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in found["rows"].items():
        if "out_of_memory" in row:
            lines.append(f"| {name} | out of memory | | | {row['micro_batch']} | | |")
    for name, row in trained(found).items():
        cells = [name, f"{row['segments_per_s']:g}", f"{row['model_tflop_per_s']:g}"]
        cells += [percent(share(row, rate)), str(row["micro_batch"]), f"{row['peak_gib']:.1f}"]
        lines.append("| " + " | ".join([*cells, percent(row["data_wait_share"])]) + " |")
    bias, stream = (found["rows"].get(name, {}) for name in ("bias pass", "reader"))
    if "segments_per_s" in bias:
        of_product = percent(share(bias, reached.get("fp32_tflop_per_s")))
        cells = ["bias pass, float32", f"{bias['segments_per_s']:g}"]
        lines.append(
            "| " + " | ".join([*cells, f"{bias['model_tflop_per_s']:g}", of_product]) + " | | | |"
        )
    if "segments_per_s" in stream:
        lines.append(f"| reader, one thread | {stream['segments_per_s']:g} | | | | | |")
    return "\n".join([*lines, "", *sentences(found), *failures(found), verdict(found)])


def sentences(found: dict[str, Any]) -> list[str]:
    """What does not fit the table's columns."""
    told, turns = [], found["rows"].get("trainer", {})
    for name in ("table over trainer-poe", "table over trainer-ce"):
        if name in turns:
            told.append(
                f"{name}: {turns[name]:g} times as many segments/s, at micro batch "
                f"{turns['micro_batch']}; the goal is {TARGETS[name]:g}"
            )
    training = trained(found)
    for name, row in training.items():
        plain = training.get(name.removesuffix(", cache"))
        if name.endswith(", cache") and plain:
            gain = row["segments_per_s"] / plain["segments_per_s"]
            told.append(f"the trunk cache: {gain:.2f} times; the goal is {TARGETS['cache']:g}")
    shares = found["rows"].get("parts", {}).get("shares", {})
    if shares:
        told.append("time by part: " + ", ".join(f"{n} {percent(v)}" for n, v in shares.items()))
    costs = found["rows"].get("run", {})
    if "computed_minutes" in costs:
        told.append(
            f"GTZAN, ten epochs, computed: {costs['computed_minutes']:g} minutes to a model that "
            f"is validated and evaluated, {costs['computed_over_steps']:g} times its steps alone; "
            "the goal is 1.5"
        )
    return told


def share(row: dict[str, Any], rate: float | None) -> float | None:
    """Of a product's rate in the same precision."""
    return row["model_tflop_per_s"] / rate if rate else None


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def verdict(found: dict[str, Any]) -> str:
    """Whether the goal is met with the CNN frozen, in a sentence."""
    goal = f"the goal of {percent(GOAL)} of the measured product"
    rate = found["rows"].get("rates", {}).get("bf16_tflop_per_s")
    shares = {name: share(row, rate) for name, row in trained(found).items()}
    known = {
        name: of
        for name, of in shares.items()
        if of is not None and name.startswith("feature_encoder")
    }
    if not known:
        return f"nothing to hold against {goal}"
    best = max(known, key=lambda name: known[name])
    word = "meets" if known[best] >= GOAL else "misses"
    return f"with the CNN frozen, {best} {word} {goal}: {percent(known[best])}"


PARTS: dict[str, Callable[[Job, Any], dict[str, Any]]] = {
    "rates": rates,
    "trainer": trainer,
    "parts": parts,
    "run": run,
    "bias pass": bias_pass,
    "reader": reader,
}
"""Rows that do not train; all others do."""


def measure_alone(words: argparse.Namespace) -> None:
    """What a process that `spawn` has started does."""
    given, case = json.loads(words.job), json.loads(words.case)
    job = Job(**(given | {"folder": Path(given["folder"])}))
    torch.set_float32_matmul_precision("highest")  # a variable of some containers allows TF32
    with redirect_stdout(sys.stderr):
        result = PARTS.get(words.only, train)(job, Case(**case) if case else None)
    print(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--minutes", type=float, default=6.0, help="after which no row begins")
    parser.add_argument("--quick", action="store_true", help="a small model, a few steps a row")
    parser.add_argument("--json", type=Path, help="write the result here, after each row")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.only:
        measure_alone(words)
        return
    if words.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no GPU is at hand: --device cpu --quick only tries the script itself")
    with tempfile.TemporaryDirectory() as temporary:
        found = measure(words, Path(temporary).resolve())
    print(json.dumps(found))
    print(f"\n{table(found)}")
    if failures(found):
        sys.exit(1)


if __name__ == "__main__":
    main()
