"""One GPU: builds, checks and times what this project does there, in under 8 minutes.

    python benchmarks/gpu.py --json benchmarks/results/gpu.json
    python benchmarks/gpu.py --device cpu --quick     # a small model, to try the script itself

It needs no weights and no network. A wav2vec2-large with random weights is trained by the `train`
command itself: at three freeze modes, and with half of the layers frozen also from a cache,
compiled, and with bf16 weights; each case is a process of its own. Segments are 3 s, read from
shards in the page cache. Dropout and SpecAugment are off, so that cases can be compared: those
with half of the layers frozen must lose alike, or the run ends with an error. Before that the
device must agree with the CPU on the logits of small models, in float32 and in bf16.

The goal is 40 % of what the device reaches in one large bf16 product, which is measured first. The
micro batch is the largest power of two for which the dry run's arithmetic sees room, 64 at most;
where memory runs out all the same, it is halved. What does not fit into the time is named.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from measure import machine, versions, write
from step import CALM, LAYER_NORM, PACKAGES, SIZES, Enough, free_port, sized_net

from mgc_dist.config import (
    DataConfig,
    EngineConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    ShardConfig,
    SynthConfig,
    TrainConfig,
)

SAMPLES, RATE = 48_000, 16_000
PARTS = ("rates", "checks", "bias pass", "reader")
"""What is measured besides training, in this order; training comes in the middle."""
GOAL = 0.4
"""Of the measured rate of one bf16 product."""
MOST = 64
"""Segments of a micro batch that are tried first."""
ROOM = 0.8
"""Share of the memory that states and activations may take by arithmetic."""
TINY = {
    "main": CALM | LAYER_NORM | sized_net(64, 4, 4, 32),
    "bias": CALM | sized_net(64, 2, 4, 32),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way to train."""

    freeze: str
    cache: str = "none"
    compile: bool = False
    precision: str = "bf16"


def cases(layers: int) -> dict[str, Case]:
    """What is timed, by the name in the table."""
    half = f"layers:{layers // 2}"
    return {
        "none": Case(freeze="none"),
        "feature_encoder": Case(freeze="feature_encoder"),
        half: Case(freeze=half),
        f"{half}, cache": Case(freeze=half, cache="trunk"),
        f"{half}, compile": Case(freeze=half, compile=True),
        f"{half}, bf16 weights": Case(freeze=half, precision="bf16-weights"),
    }


SAME = {"cache": 1e-3, "compile": 2e-2, "bf16 weights": 2e-2}
"""How far the first loss may be from that of the case without."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a process does.

    Attributes:
        device: cuda or cpu.
        folder: of shards, models and the table.
        micro_batch: of a training case.
        warm, timed: windows of `every` steps, before the timed ones and timed.
    """

    device: str
    folder: Path
    micro_batch: int = 8
    warm: int = 1
    timed: int = 4
    every: int = 5

    def model(self, name: str) -> str:
        """Path of the configuration of `main` or `bias`."""
        return str(self.folder / f"{name}.json")


# -- in a process of its own ------------------------------------------------------------------


def rates(job: Job) -> dict[str, Any]:
    """What the device reaches: one large product in bf16 and in float32, and copying."""
    device, on_gpu = torch.device(job.device), job.device == "cuda"
    size = 8192 if on_gpu else 512
    found: dict[str, Any] = {"name": "CPU", "memory_gib": None}
    if on_gpu:
        about = torch.cuda.get_device_properties(0)
        found = {"name": about.name, "memory_gib": round(about.total_memory / 2**30, 1)}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        seconds = timed(lambda left=left, right=right: left @ right, job)
        found[f"{name}_tflop_per_s"] = float(f"{2 * size**3 / seconds / 1e12:.4g}")
    source = torch.empty(2**30 if on_gpu else 2**24, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = timed(lambda: target.copy_(source), job)
    found["copy_gb_per_s"] = float(f"{2 * source.numel() / seconds / 1e9:.4g}")
    return found


def timed(work: Callable[[], Any], job: Job) -> float:
    """Median seconds of some work, each waited for, once the clocks have settled."""
    seconds, started = [], time.perf_counter()
    warm_s, timed_s = (1.0, 2.0) if job.device == "cuda" else (0.1, 0.3)
    while not seconds or time.perf_counter() - started < warm_s + timed_s:
        before = time.perf_counter()
        work()
        if job.device == "cuda":
            torch.cuda.synchronize()
        after = time.perf_counter()
        if after - started > warm_s:
            seconds.append(after - before)
    return statistics.median(seconds)


def checks(job: Job) -> dict[str, Any]:
    """Largest difference of the device's logits from the CPU's in float32, in standard deviations.

    For both flavours of wav2vec2, in float32 (no TF32) and under bf16 autocast.
    """
    from mgc_dist.bias_model.states import float32

    torch.manual_seed(0)
    wave = torch.randint(-9000, 9000, (4, SAMPLES), dtype=torch.int16)
    found: dict[str, Any] = {}
    for flavour, settings in TINY.items():
        path = job.folder / f"tiny-{flavour}.json"
        path.write_text(json.dumps(settings))
        model = build(path, "none", "none").eval()
        with torch.no_grad(), float32():
            expected = model(wave)
            there, moved = wave.to(job.device), model.to(job.device)
            plain = moved(there).cpu()
            # oneDNN's bf16 is wrong on CPUs with AMX for grouped convolutions as narrow as these
            exact = torch.backends.mkldnn.flags(enabled=job.device != "cpu")
            with exact, torch.autocast(job.device, torch.bfloat16):
                rough = moved(there).float().cpu()
        deviation = float(expected.std())
        for name, got, most in (("fp32", plain, 1e-3), ("bf16", rough, 0.2)):
            apart = float((got - expected).abs().max()) / deviation
            if not apart < most:
                sys.exit(f"{flavour}, {name}: logits are {apart:.2g} deviations from the CPU's")
            found[f"{flavour} {name}"] = float(f"{apart:.2g}")
    return found


def build(model: str | Path, freeze: str, cache: str) -> Any:
    """A main model from random weights."""
    from mgc_dist.models.main import build_main

    return build_main(
        str(model),
        [str(number) for number in range(10)],
        freeze=freeze,
        frozen_layers=ModelConfig(freeze=freeze).frozen_layers,
        activation_checkpointing=False,
        seed=0,
        segment_samples=SAMPLES,
        sample_rate=RATE,
        cache=cache,
        spec_augment=False,
    )


def train(job: Job, case: Case) -> dict[str, Any]:
    """The `train` command, until enough windows of steps are logged."""
    from mgc_dist import journal
    from mgc_dist import train as command
    from mgc_dist.errors import UserError
    from mgc_dist.events import Event, StepEvent, only
    from mgc_dist.training import setup

    windows = job.warm + job.timed

    class Short(journal.Journal):
        def write(self, event: Event) -> None:
            super().write(event)
            if isinstance(event, StepEvent) and event.step >= windows * job.every:
                raise Enough

    setup.Journal = Short  # type: ignore[misc]
    with tempfile.TemporaryDirectory(dir=job.folder) as folder:
        run, started = Path(folder) / "run", time.perf_counter()
        try:
            with suppress(Enough):
                command.run(configuration(job, case, run))
                raise AssertionError("the run ended before it was measured")
        except UserError as error:  # in whose words was short of memory, the command knows
            if "memory" in str(error):
                return {"out_of_memory": str(error)}
            raise
        steps = only(journal.read_events(run), StepEvent)
        seconds = time.perf_counter() - started
    timed_steps = steps[job.warm :]
    found: dict[str, Any] = {
        "micro_batch": job.micro_batch,
        "losses": [step.loss for step in steps],
        "process_s": round(seconds, 1),
        "peak_gib": max(step.peak_memory_gib for step in steps),
    }
    for name in ("segments_per_s", "model_tflop_per_s", "step_s", "mfu", "data_wait_share"):
        values = [value for step in timed_steps if (value := getattr(step, name)) is not None]
        found[name] = float(f"{statistics.median(values):.4g}") if values else None
    return found


def configuration(job: Job, case: Case, run: Path) -> TrainConfig:
    """Settings of `train`: nothing is due before the run is cut."""
    return TrainConfig(
        data=DataConfig(
            shards=job.folder / "shards",
            bias_table=job.folder / "bias.npy",
            cache=case.cache,
            cache_dir=job.folder / "cache",
        ),
        main=ModelConfig(model=job.model("main"), freeze=case.freeze, spec_augment=False),
        objective=LossConfig(loss="poe"),
        optim=OptimConfig(
            epochs=1e5,
            global_batch=2 * job.micro_batch,
            lr=1e-4,
            head_lr=1e-3,
            warmup_fraction=0.0,  # wrong gradients are to show in the losses
            final_lr_fraction=1.0,
        ),
        engine=EngineConfig(
            micro_batch=job.micro_batch,
            device=job.device,
            precision=case.precision,
            compile=case.compile,
        ),
        output=RunConfig(
            run=run,
            log_every_steps=job.every,
            validate_every_epochs=1e5,
            checkpoint_every_epochs=1e5,
        ),
    )


def bias_pass(job: Job) -> dict[str, Any]:
    """The frozen bias model in float32, as its pass has it: batches of 32 on the device."""
    from transformers import AutoConfig, AutoModel

    from mgc_dist.bias_model.states import float32
    from mgc_dist.models.backbone import HiddenMean
    from mgc_dist.models.flops import count

    torch.manual_seed(0)
    settings = json.loads(Path(job.model("bias")).read_text())
    net = AutoModel.from_config(AutoConfig.for_model(**settings))
    module = HiddenMean(net, do_normalize=True).eval().requires_grad_(False).to(job.device)
    counted = count(build(job.model("bias"), "backbone", "none"), SAMPLES)
    rows = 32 if job.device == "cuda" else 4
    wave = torch.randint(-9000, 9000, (rows, SAMPLES), dtype=torch.int16).to(job.device)
    with torch.no_grad(), float32():
        seconds = timed(lambda: module(wave), job)
    return {
        "segments_per_s": float(f"{rows / seconds:.4g}"),
        "model_tflop_per_s": float(f"{counted.forward * rows / seconds / 1e12:.4g}"),
    }


def reader(job: Job) -> dict[str, Any]:
    """Segments a second that one thread reads from the shards, as training asks for them."""
    from mgc_dist.data.order import Plan, lay_out, training_batches
    from mgc_dist.data.reader import Reader, ShardSet

    with ShardSet(job.folder / "shards") as shards:
        first, stop = shards.rows_of("train")
        count = 20_000 if job.device == "cuda" else 1000
        plan = Plan(rows=stop - first, total=count, global_batch=32, seed=0)
        layout = lay_out(global_batch=32, world=1, largest_micro_batch=32)
        batches = training_batches(plan, layout, 0, 0)
        pin = job.device == "cuda"
        torch.empty(1, pin_memory=pin).to(job.device)  # the device's own start is not timed
        started = time.perf_counter()
        with Reader(shards, "train", batches, read_ahead=4, pin=pin) as stream:
            for batch in stream:
                batch.input.to(job.device, non_blocking=True)
        if pin:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    return {"segments_per_s": float(f"{count / seconds:.4g}")}


# -- around it --------------------------------------------------------------------------------


def prepare(folder: Path, models: dict[str, dict[str, Any]], tracks_per_genre: int) -> None:
    """Shards of synthetic music, a bias table of noise, and the models' configurations."""
    import numpy as np

    from mgc_dist import shard, synth
    from mgc_dist.data.reader import ShardSet

    with redirect_stdout(sys.stderr):
        synth.run(SynthConfig(out=folder, tracks_per_genre=tracks_per_genre))
        shard.run(ShardConfig(data=folder / "genres_original", out=folder / "shards"))
    for name, settings in models.items():
        (folder / f"{name}.json").write_text(json.dumps(settings))
    with ShardSet(folder / "shards") as shards:
        keys, genres = shards.keys(), shards.manifest.genres
    columns = [("key", f"U{max(map(len, keys))}"), *((genre, "f8") for genre in genres)]
    table = np.zeros(len(keys), columns)
    table["key"] = keys
    rng = np.random.default_rng(0)
    for genre in genres:
        table[genre] = rng.normal(size=len(keys))
    np.save(folder / "bias.npy", table)


def largest_micro_batch(job: Job, case: Case, memory_gib: float | None) -> int:
    """The largest power of two that arithmetic sees room for."""
    from mgc_dist.models.main import describe_main
    from mgc_dist.training.forecast import activation_bytes, count_parts, memory_of

    if memory_gib is None:
        return 4
    model = describe_main(
        job.model("main"),
        [str(number) for number in range(10)],
        freeze=case.freeze,
        frozen_layers=ModelConfig(freeze=case.freeze).frozen_layers,
        activation_checkpointing=False,
        segment_samples=SAMPLES,
        spec_augment=False,
    )
    every, trained = (sum(part) for part in zip(*count_parts(model).values(), strict=True))
    states = memory_of(2, every, trained, 1, EngineConfig().bucket_elements).all
    room = ROOM * memory_gib * 2**30 - states
    most = room / activation_bytes(model, 1, SAMPLES)
    return next((size for size in (MOST, 32, 16, 8, 4, 2) if size <= most), 1)


class Budget:
    """The time that is left; what no longer fits is named."""

    def __init__(self, minutes: float) -> None:
        self._end = time.monotonic() + 60 * minutes
        self.left_out: list[str] = []

    def run(self, what: str, job: Job, quick: bool) -> dict[str, Any] | None:
        """What a process hands back; None if there is no time for it."""
        left_s = self._end - time.monotonic()
        if left_s > 1:
            try:
                return spawn(what, job, quick, left_s)
            except subprocess.TimeoutExpired:
                pass
        self.left_out.append(f"{what} (no time)")
        print(f"{what}: left out, the time is up", file=sys.stderr, flush=True)
        return None


def spawn(what: str, job: Job, quick: bool, timeout_s: float) -> dict[str, Any]:
    """Run a part in a process of its own."""
    command = [sys.executable, __file__, "--only", what]
    command += ["--job", json.dumps(asdict(job) | {"folder": str(job.folder)})]
    command += ["--quick"] if quick else []
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
    alone |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    if job.device == "cpu":
        alone |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    environment = os.environ | alone | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=timeout_s
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        return {"failed": f"ended with {done.returncode}: {done.stderr[-3000:]}"}
    return dict(json.loads(lines[-1]))


def measure(words: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything, in the order of its worth."""
    started, budget = time.monotonic(), Budget(words.minutes)
    job = Job(device=words.device, folder=folder)
    if words.quick:
        job = replace(job, warm=1, timed=1, every=1)
    models = TINY if words.quick else {"main": SIZES["large"].main, "bias": SIZES["large"].bias}
    prepare(folder, models, 3 if words.quick else 6)
    found: dict[str, Any] = {}
    for what in PARTS[:2]:
        found[what] = budget.run(what, job, words.quick)
        tell(what, found[what])
    memory_gib = (found["rates"] or {}).get("memory_gib")
    found["training"] = {}
    for name, case in cases(models["main"]["num_hidden_layers"]).items():
        if case.compile and not any(map(shutil.which, ("cc", "gcc", "g++", "clang"))):
            budget.left_out.append(f"{name} (no C compiler)")
            continue
        micro = largest_micro_batch(job, case, memory_gib)
        result = budget.run(name, replace(job, micro_batch=micro), words.quick)
        while result and "out_of_memory" in result and micro > 1:
            tell(name, {"micro_batch": micro, "out_of_memory": True})
            micro //= 2
            result = budget.run(name, replace(job, micro_batch=micro), words.quick)
        if result:
            found["training"][name] = result
        tell(name, result)
    for what in PARTS[2:]:
        found[what] = budget.run(what, job, words.quick)
        tell(what, found[what])
    return {
        "benchmark": "gpu",
        "date": str(date.today()),
        "quick": words.quick,
        "seconds": round(time.monotonic() - started),
        "left_out": budget.left_out,
        "machine": machine(),
        "versions": versions(PACKAGES),
    } | found


def tell(what: str, found: dict[str, Any] | None) -> None:
    """A line of progress."""
    print(f"{what}: {json.dumps(found)}", file=sys.stderr, flush=True)


def differences(training: dict[str, dict[str, Any]]) -> list[str]:
    """What must lose alike in the first window and does not, a sentence each."""
    found = []
    for name, case in training.items():
        plain, _, how = name.partition(", ")
        other = training.get(plain)
        if not how or not other or not ("losses" in case and "losses" in other):
            continue
        if case["micro_batch"] == other["micro_batch"]:
            both = case["losses"][0], other["losses"][0]
            if None in both or not abs(both[0] - both[1]) < SAME[how]:
                found.append(f"{name} loses {both[0]}, {plain} {both[1]}")
    return found


def failures(found: dict[str, Any]) -> list[str]:
    """What went wrong, a sentence each; nothing of it keeps the other figures from being told."""
    parts = {**found["training"], **{name: found[name] for name in PARTS}}
    failed = [
        f"{name} {part['failed']}" for name, part in parts.items() if part and "failed" in part
    ]
    return failed + differences(found["training"])


def table(found: dict[str, Any]) -> str:
    """The figures as Markdown; the last that is printed."""
    rates_found = found["rates"] or {}
    reached = rates_found.get("bf16_tflop_per_s")
    lines = [
        f"{found['date']}, {rates_found.get('name')}, {found['seconds']} s; one bf16 product: "
        f"{reached} TFLOP/s, float32: {rates_found.get('fp32_tflop_per_s')}, copying: "
        f"{rates_found.get('copy_gb_per_s')} GB/s"
        + (f"; left out: {', '.join(found['left_out'])}" if found["left_out"] else ""),
        "",
        "| --freeze | segments/s | TFLOP/s | of the product | of the sheet | micro batch | GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, case in found["training"].items():
        if "losses" not in case:
            why = "failed" if "failed" in case else "out of memory"
            lines.append(f"| {name} | {why} | | | | | |")
            continue
        cells = [name, f"{case['segments_per_s']:g}", f"{case['model_tflop_per_s']:g}"]
        cells += [percent(share(case, reached)), percent(case["mfu"])]
        cells += [str(case["micro_batch"]), f"{case['peak_gib']:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    bias, stream = (found[part] or {} for part in PARTS[2:])
    if "segments_per_s" in bias:
        of_product = percent(share(bias, rates_found.get("fp32_tflop_per_s")))
        cells = ["bias pass, float32", f"{bias['segments_per_s']:g}"]
        cells += [f"{bias['model_tflop_per_s']:g}", of_product, "", "", ""]
        lines.append("| " + " | ".join(cells) + " |")
    speeds = [case["segments_per_s"] for case in found["training"].values() if "losses" in case]
    if "segments_per_s" in stream and speeds:
        headroom = stream["segments_per_s"] / max(speeds)
        lines.append(
            f"| reader, one thread | {stream['segments_per_s']:g} | {headroom:.1f} times the "
            "fastest case | | | | |"
        )
    return "\n".join([*lines, "", *failures(found), verdict(found, reached)])


def share(part: dict[str, Any], rate: float | None) -> float | None:
    """Of a product's rate in the same precision."""
    return part["model_tflop_per_s"] / rate if rate else None


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def verdict(found: dict[str, Any], reached: float | None) -> str:
    """Whether the goal is met, in a sentence."""
    goal = f"the goal of {percent(GOAL)} of the measured product"
    shares = {
        name: share(case, reached) for name, case in found["training"].items() if "losses" in case
    }
    known = {name: reached for name, reached in shares.items() if reached is not None}
    if not known:
        return f"nothing to hold against {goal}"
    below = [f"{name} {percent(of)}" for name, of in known.items() if of < GOAL]
    return f"{goal} is missed by {', '.join(below)}" if below else f"all of the above meet {goal}"


def only(words: argparse.Namespace) -> None:
    """What a process that `spawn` has started does."""
    given = json.loads(words.job)
    job = Job(**(given | {"folder": Path(given["folder"])}))
    parts: dict[str, Callable[[Job], dict[str, Any]]] = {
        "rates": rates,
        "checks": checks,
        "bias pass": bias_pass,
        "reader": reader,
    }
    torch.set_float32_matmul_precision("highest")  # a variable of some containers allows TF32
    with redirect_stdout(sys.stderr):
        if words.only in parts:
            result = parts[words.only](job)
        else:
            layers = json.loads(Path(job.model("main")).read_text())["num_hidden_layers"]
            result = train(job, cases(layers)[words.only])
    print(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--minutes", type=float, default=7.5, help="after which no part begins")
    parser.add_argument("--quick", action="store_true", help="a small model, two steps a case")
    parser.add_argument("--json", type=Path, help="write the result here as well")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.only:
        only(words)
        return
    if words.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no GPU is at hand: --device cpu --quick only tries the script itself")
    with tempfile.TemporaryDirectory() as temporary:
        found = measure(words, Path(temporary).resolve())
    print(json.dumps(found))
    if words.json:
        write(words.json, found)
    print(f"\n{table(found)}")
    if failures(found):
        sys.exit(1)


if __name__ == "__main__":
    main()
