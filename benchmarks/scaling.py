"""Weak and strong scaling over one and two ranks, and a model of it that is held against them.

    python benchmarks/scaling.py --json benchmarks/results/scaling.json
    python benchmarks/scaling.py --render benchmarks/results/scaling.json

Measured, with one thread a rank on a CPU, the small model of `step.py` and the `train` command
(random weights, product of experts with a table): the seconds of a step for one rank, for two, and
for two single ranks that know nothing of each other at the same time, which tells what sharing a
machine costs from what talking costs. And the bytes that torch's collectives are given in one step,
counted on the way, at each ZeRO stage.

The model. A step of w ranks, each with a micro batches of b rows, takes

    a * compute + optimizer + bytes on the wire / bandwidth + calls * latency

seconds, with nothing overlapped, as the engine is configured at stages 0 to 2 (stage 3 fetches
ahead, which the model leaves out). Compute and optimizer come from one
rank at two accumulations, times what sharing the machine costs; bandwidth and latency from
collectives alone; bytes from what DeepSpeed does (`traffic`), shown beside what was counted. What
it says of 8, 64 and 512 GPUs is a prediction.
"""

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from measure import between_marks, machine, versions, write
from step import (
    PACKAGES,
    PAGE,
    RATE,
    SEGMENT_S,
    SIZES,
    Enough,
    Job,
    free_port,
    listen,
    make_table,
    our_config,
    prepare,
    spread,
)

from mgc_dist.config import ModelConfig

STAGES = (0, 1, 2, 3)
FREEZE = "feature_encoder"
MICRO_BATCH = 4
GPUS = (1, 8, 64, 512)
KEPT_ELEMENTS = 100_000
"""DeepSpeed's stage3_param_persistence_threshold, which the engine leaves as it is."""
FACTOR = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0}
"""Times (w - 1) / w of the whole tensor that a rank sends in a ring."""


# -- the model --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Elements of a model.

    Attributes:
        every, trained: all of them, and those with a gradient.
        kept: of all, in parameters so small that ZeRO-3 gathers them only after an update.
        wide, wide_trained: of those that are not kept, and of the trained ones, in linear layers
            and convolutions: under autocast they, and their gradients, are sent in 16 bits.
    """

    every: int
    trained: int
    kept: int = 0
    wide: int = 0
    wide_trained: int = 0


@dataclass(frozen=True, kw_only=True)
class Link:
    """Between ranks.

    Attributes:
        bytes_per_s: that a rank sends while all do (bus bandwidth, as nccl-tests has it).
        latency_s: of a call, whatever its size.
    """

    bytes_per_s: float
    latency_s: float


Moved = dict[str, float]
"""Collective -> bytes of the whole tensors that it works on in a step."""
Links = dict[str, Link]
"""Collective -> what it reaches."""


def traffic(stage: int, weights: Weights, accumulation: int, bf16: bool) -> Moved:
    """Bytes of the whole tensors that a step gives to each collective, without the few of norms.

    Stages 0 and 1 sum gradients once a step, stage 2 in every micro batch; DeepSpeed does so by an
    all-reduce at stages 1 and 2 too. Stages 1 and 2 then gather the updated weights. Stage 3
    gathers the weights in each micro batch, once: what the backward pass needs again within 1e9
    elements is not given back; and it scatters the gradients.
    """
    gradients = 4 * weights.trained - (2 * weights.wide_trained if bf16 else 0)
    if stage == 0:
        return {"all_reduce": gradients}
    if stage < 3:
        times = accumulation if stage == 2 else 1
        return {"all_reduce": times * gradients, "all_gather": 4.0 * weights.trained}
    gathered = 4 * (weights.every - weights.kept) - (2 * weights.wide if bf16 else 0)
    return {
        "all_gather": accumulation * gathered + 4.0 * weights.kept,
        "reduce_scatter": float(accumulation * gradients),
    }


def communication_s(moved: Moved, world: int, links: Links, *, bucket_bytes: float) -> float:
    """Seconds of a step's collectives, one after another."""
    seconds = 0.0
    for name, whole in moved.items():
        link, calls = links[name], max(1.0, whole / bucket_bytes)
        wire = FACTOR[name] * (world - 1) / world * whole
        seconds += wire / link.bytes_per_s + calls * link.latency_s
    return seconds if world > 1 else 0.0


def predict(
    stage: int,
    world: int,
    accumulation: int,
    *,
    compute_s: float,
    optimizer_s: float,
    weights: Weights,
    links: Links,
    bf16: bool,
    bucket_bytes: float,
) -> float:
    """Seconds of a step."""
    moved = traffic(stage, weights, accumulation, bf16)
    share = 1 if stage == 0 else world
    talking = communication_s(moved, world, links, bucket_bytes=bucket_bytes)
    return accumulation * compute_s + optimizer_s / share + talking


# -- what is measured: ranks in processes of their own --------------------------------------


RUNS = itertools.count()
FEW_BYTES = 10_000
"""Of norms, flags and the loss in a step: what the model leaves out."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A run: its stage, ranks, rows of a step, and number among all runs."""

    stage: int
    world: int
    global_batch: int
    number: int = 0

    @property
    def accumulation(self) -> int:
        """Micro batches of a rank in a step."""
        return self.global_batch // (self.world * MICRO_BATCH)

    @property
    def name(self) -> str:
        """In the results."""
        return f"stage {self.stage}, {self.world} x {self.global_batch // self.world}"


def train(folder: Path, point: Point, warm: int, timed: int) -> dict[str, Any]:
    """One rank of the `train` command: the seconds of its steps, and bytes by collective."""
    counts: Counter[str] = Counter()
    count_collectives(counts)
    from mgc_dist import train as command
    from mgc_dist.events import StepEvent

    at: list[float] = []
    seen: list[Counter[str]] = []

    def told(event: Any) -> None:
        if isinstance(event, StepEvent):
            at.append(time.perf_counter())
            seen.append(Counter(counts))
            if len(at) == warm + timed:
                raise Enough

    listen(told)
    size = replace(SIZES["small"], global_batch=point.global_batch, micro_batch=MICRO_BATCH)
    job = Job(model="small", case="table", freeze=FREEZE, folder=folder, size=size)
    config = our_config(job, folder / "runs" / str(point.number))
    config = replace(config, engine=replace(config.engine, zero_stage=point.stage))
    with suppress(Enough):
        command.run(config)
        raise RuntimeError("the run ended before it was measured")
    steps = [later - earlier for earlier, later in itertools.pairwise(at)]
    moved = {name: seen[-1][name] - seen[-2][name] for name in seen[-1]}
    of_weights = {name: count for name, count in moved.items() if count > FEW_BYTES}
    return {"steps": steps[warm - 1 :], "bytes": of_weights}


def count_collectives(counts: Counter[str]) -> None:
    """Have torch's collectives count the bytes of the whole tensors that they are given."""
    import torch.distributed as dist
    from torch import Tensor

    summed, gathered, scattered = (
        dist.all_reduce,
        dist.all_gather_into_tensor,
        dist.reduce_scatter_tensor,
    )

    def all_reduce(tensor: Tensor, *more: Any, **named: Any) -> Any:
        counts["all_reduce"] += tensor.nbytes
        return summed(tensor, *more, **named)

    def all_gather_into_tensor(output_tensor: Tensor, *more: Any, **named: Any) -> Any:
        counts["all_gather"] += output_tensor.nbytes
        return gathered(output_tensor, *more, **named)

    def reduce_scatter_tensor(output: Tensor, input: Tensor, *more: Any, **named: Any) -> Any:
        counts["reduce_scatter"] += input.nbytes
        return scattered(output, input, *more, **named)

    dist.all_reduce = all_reduce  # type: ignore[assignment]
    dist.all_gather_into_tensor = all_gather_into_tensor  # type: ignore[assignment]
    dist.reduce_scatter_tensor = reduce_scatter_tensor  # type: ignore[assignment]


def collectives(runs: int) -> dict[str, Any]:
    """One of two ranks: bandwidth of a large call, latency of a small one, by collective."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank, world, found = dist.get_rank(), dist.get_world_size(), {}
    for name in FACTOR:
        seconds = {}
        for elements in (256, 1 << 22):
            whole, part = torch.zeros(elements), torch.zeros(elements // world)
            call: dict[str, Callable[[], Any]] = {
                "all_reduce": lambda whole=whole: dist.all_reduce(whole),
                "all_gather": lambda whole=whole, part=part: dist.all_gather_into_tensor(
                    whole, part
                ),
                "reduce_scatter": lambda whole=whole, part=part: dist.reduce_scatter_tensor(
                    part, whole
                ),
            }
            taken = []
            for _ in range(runs + 2):
                dist.barrier()
                started = time.perf_counter()
                call[name]()
                taken.append(time.perf_counter() - started)
            seconds[elements] = statistics.median(taken[2:])
        wire = FACTOR[name] * (world - 1) / world * 4 * (1 << 22)
        latency = seconds[256]
        found[name] = {"bytes_per_s": wire / (seconds[1 << 22] - latency), "latency_s": latency}
    dist.destroy_process_group()
    return {"rank": rank, "links": found}


# -- around it --------------------------------------------------------------------------------


def start(words: Sequence[str], rank: int, world: int, port: int) -> subprocess.Popen[str]:
    """A rank in a process of its own, with one thread."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_SIZE": world}
    variables = {name: str(value) for name, value in place.items()}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    variables |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, __file__, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | variables,
    )


def results_of(processes: Sequence[subprocess.Popen[str]]) -> list[dict[str, Any]]:
    """What the processes hand back."""
    found = []
    for process in processes:
        out, told = process.communicate()
        if process.returncode:
            sys.exit(f"a rank ended with {process.returncode}:\n{told[-4000:]}")
        found.append(dict(json.loads(out.strip().splitlines()[-1])))
    return found


def run_point(folder: Path, point: Point, words: argparse.Namespace, beside: int = 1) -> Any:
    """Steps and bytes of the first rank; with `beside`, of so many runs at once."""
    processes = []
    for _ in range(beside):
        port, numbered = free_port(), replace(point, number=next(RUNS))
        told = ["--point", json.dumps(asdict(numbered)), "--folder", str(folder)]
        told += ["--warm", str(words.warm), "--timed", str(words.timed)]
        processes += [start(told, rank, point.world, port) for rank in range(point.world)]
    return results_of(processes)[:: point.world]


def measure(words: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All points, in turns, and the model held against them."""
    prepare(folder, "small")
    shutil.rmtree(folder / "runs", ignore_errors=True)  # of an earlier time
    job = Job(model="small", case="make-table", freeze=FREEZE, folder=folder, size=SIZES["small"])
    with redirect_stdout(sys.stderr):
        make_table(job, sys.stderr)
    load = os.getloadavg()[0]
    rows = words.rows
    points = [
        Point(stage=stage, world=world, global_batch=batch)
        for stage in words.stages
        for world, batch in ((1, rows), (1, 2 * rows), (2, 2 * rows))
    ]
    steps: dict[str, list[float]] = {point.name: [] for point in points}
    counted: dict[str, dict[str, int]] = {}
    alone = Point(stage=words.stages[-1], world=1, global_batch=rows)
    beside: list[float] = []
    for number in range(words.rounds):
        for point in points:
            (found,) = run_point(folder, point, words)
            steps[point.name] += found["steps"]
            counted[point.name] = found["bytes"]
            told = f"round {number + 1}: {point.name}: {statistics.median(found['steps']):.3f} s"
            print(told, file=sys.stderr, flush=True)
        for found in run_point(folder, alone, words, beside=2):
            beside += found["steps"]
    port = free_port()
    pair = [start(["--collectives"], rank, 2, port) for rank in range(2)]
    links = results_of(pair)[0]["links"]
    content = {
        "benchmark": "scaling",
        "date": str(date.today()),
        "load_before": round(load, 2),
        "micro_batch": MICRO_BATCH,
        "machine": machine(),
        "versions": versions(PACKAGES),
        "links": links,
        "beside": statistics.median(beside) / statistics.median(steps[alone.name]),
        "weights": asdict(weights_of(str(job.own / "main.json"), FREEZE)),
        "stages": {},
    }
    for stage in words.stages:
        names = [point.name for point in points if point.stage == stage]
        content["stages"][str(stage)] = of_stage(stage, names, steps, counted, content)
    return content | {"predicted": predictions(folder)}


def of_stage(
    stage: int,
    names: Sequence[str],
    steps: dict[str, list[float]],
    counted: dict[str, dict[str, int]],
    content: dict[str, Any],
) -> dict[str, Any]:
    """The three points of a stage, and what the model makes of the first two."""
    one, double, two = (statistics.median(steps[name]) for name in names)
    batch = int(names[0].rpartition(" ")[2])
    few, many = batch // MICRO_BATCH, 2 * batch // MICRO_BATCH
    compute_s = (double - one) / (many - few)
    optimizer_s = max(0.0, one - few * compute_s)
    weights = Weights(**content["weights"])
    links = {name: Link(**link) for name, link in content["links"].items()}
    expected = predict(
        stage,
        2,
        few,
        compute_s=compute_s * content["beside"],
        optimizer_s=optimizer_s * content["beside"],
        weights=weights,
        links=links,
        bf16=False,
        bucket_bytes=4.0 * weights.trained,
    )
    return {
        "steps": {name: spread(steps[name]) for name in names},
        "weak_efficiency": round(one / two, 3),
        "strong_speedup": round(double / two, 3),
        "counted_bytes": counted[names[2]],
        "modelled_bytes": {
            name: round(whole) for name, whole in traffic(stage, weights, few, bf16=False).items()
        },
        "modelled_step_s": float(f"{expected:.4g}"),
        "compute_s": float(f"{compute_s:.4g}"),
        "optimizer_s": float(f"{optimizer_s:.4g}"),
    }


def describe(path: str, freeze: str) -> Any:
    """A model without weights, from its configuration."""
    from mgc_dist.models.main import describe_main

    return describe_main(
        path,
        [str(number) for number in range(10)],
        freeze=freeze,
        frozen_layers=ModelConfig(freeze=freeze).frozen_layers,
        activation_checkpointing=False,
        segment_samples=round(SEGMENT_S * RATE),
    )


def weights_of(path: str, freeze: str) -> Weights:
    """Elements of a model from its configuration."""
    from torch import nn

    model = describe(path, freeze)
    wide = {
        id(parameter)
        for module in model.modules()
        if type(module) in (nn.Linear, nn.Conv1d)  # as DeepSpeed's autocast looks at them
        for parameter in module.parameters(recurse=False)
    }
    every = list(model.parameters())
    trained = [parameter for parameter in every if parameter.requires_grad]
    spread_out = [parameter for parameter in every if parameter.numel() > KEPT_ELEMENTS]
    return Weights(
        every=sum(parameter.numel() for parameter in every),
        trained=sum(parameter.numel() for parameter in trained),
        kept=sum(parameter.numel() for parameter in every if parameter.numel() <= KEPT_ELEMENTS),
        wide=sum(parameter.numel() for parameter in spread_out if id(parameter) in wide),
        wide_trained=sum(parameter.numel() for parameter in trained if id(parameter) in wide),
    )


# -- the prediction for GPUs: nothing of it is measured ---------------------------------------

GPU_TFLOP_PER_S, GPU_SHARE = 989.4, 0.4
"""H100's dense bf16 rate by its data sheet, and the share that gpu.py has as its goal."""
GPU_ADAM_BYTES_PER_S = 0.7 * 3.35e12
"""Of its memory by the data sheet; the optimizer moves 28 bytes a trained element."""
NETWORKS = {
    "a 400 Gb/s port a GPU": 0.8 * 8 * 50e9,
    "a 100 Gb/s port a node": 0.8 * 12.5e9,
}
"""Bytes/s that a rank of several nodes sends in a ring: eight ports of 50 GB/s, or one of 12.5, of
which a ring reaches an assumed 80 %."""
NVLINK_BYTES_PER_S = 0.8 * 450e9
"""Within a node: NVLink's rate one way by H100's data sheet, and the same share."""
LATENCY_S = {1: 0.0, 8: 2e-5, 64: 6e-5, 512: 1e-4}
"""Of a call, assumed."""
GPU_BUCKET_BYTES = 4 * 50e6


def predictions(folder: Path) -> list[dict[str, Any]]:
    """Steps of wav2vec2-large on H100s, by the model and the assumptions above."""
    from mgc_dist.models.flops import count

    path = folder / "large.json"
    path.write_text(json.dumps(SIZES["large"].main))
    found = []
    for freeze, (network, speed) in itertools.product(("none", "layers:12"), NETWORKS.items()):
        counted = count(describe(str(path), freeze), round(SEGMENT_S * RATE))
        row_s = counted.training / (1e12 * GPU_TFLOP_PER_S * GPU_SHARE)
        weights = weights_of(str(path), freeze)
        optimizer_s = 28 * weights.trained / GPU_ADAM_BYTES_PER_S
        for world, stage in itertools.product(GPUS, (1, 2, 3)):
            link = Link(
                bytes_per_s=NVLINK_BYTES_PER_S if world <= 8 else speed,
                latency_s=LATENCY_S[world],
            )
            strong_rows = 1024 // max(2, world)
            step_s = {
                rows: predict(
                    stage,
                    world,
                    1,
                    compute_s=rows * row_s,
                    optimizer_s=optimizer_s,
                    weights=weights,
                    links=dict.fromkeys(FACTOR, link),
                    bf16=True,
                    bucket_bytes=GPU_BUCKET_BYTES,
                )
                for rows in (32, strong_rows)
            }
            alone_s = 32 * row_s + optimizer_s
            found.append(
                {
                    "freeze": freeze,
                    "network": network,
                    "gpus": world,
                    "stage": stage,
                    "weak_efficiency": round(alone_s / step_s[32], 3),
                    "weak_segments_per_s": round(32 * world / step_s[32]),
                    "rows_a_rank_at_1024": strong_rows,
                    "strong_segments_per_s": round(strong_rows * world / step_s[strong_rows]),
                }
            )
    return found


# -- the tables -------------------------------------------------------------------------------


def table(content: dict[str, Any]) -> str:
    """The figures as Markdown."""
    where, links = content["machine"], content["links"]
    reached = ", ".join(
        f"{name} {link['bytes_per_s'] / 1e9:.2f} GB/s and {1e6 * link['latency_s']:.0f} us a call"
        for name, link in links.items()
    )
    lines = [
        f"{content['date']}, {where['cores']} cores ({where['cpu']}), one thread a rank, float32, "
        f"micro batch {content['micro_batch']}; load of the machine before: "
        f"{content['load_before']:g}. Two single ranks beside each other take "
        f"{content['beside']:.2f} times as long as one. Between two ranks: {reached}.",
        "",
        "| ZeRO | 1 rank, s | 1 rank, twice the rows | 2 ranks, twice the rows | weak: efficiency "
        "| strong: times as fast | 2 ranks by the model | off by | MB counted | MB by the model |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for stage, found in content["stages"].items():
        medians = [f"{step['median']:.3f}" for step in found["steps"].values()]
        measured, expected = float(medians[2]), found["modelled_step_s"]
        cells = [stage, *medians, f"{100 * found['weak_efficiency']:.0f} %"]
        cells += [f"{found['strong_speedup']:.2f}", f"{expected:.3f}"]
        cells += [f"{100 * (expected / measured - 1):+.0f} %"]
        cells += [
            f"{sum(found[key].values()) / 1e6:.1f}" for key in ("counted_bytes", "modelled_bytes")
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *predicted_table(content["predicted"])])


def predicted_table(predicted: Sequence[dict[str, Any]]) -> list[str]:
    """What the model says of GPUs."""
    lines = [
        "**Predicted, not measured**, for wav2vec2-large on H100s: each computes at "
        f"{100 * GPU_SHARE:.0f} % of its data sheet's {GPU_TFLOP_PER_S:g} TFLOP/s, rings reach "
        "80 % of NVLink and of the network, nothing overlaps (stage 3 does fetch ahead). Weak: 32 "
        "rows a GPU; strong: 1,024 rows a step; at ZeRO stages 1 / 2 / 3.",
        "",
        "| --freeze | between nodes | GPUs | weak: efficiency | strong: segments/s |",
        "|---|---|---|---|---|",
    ]
    key = ("freeze", "network", "gpus")
    for (freeze, network, gpus), group in itertools.groupby(
        predicted, lambda found: tuple(found[name] for name in key)
    ):
        if gpus == 1 or (gpus == 8 and network != next(iter(NETWORKS))):
            continue
        stages = list(group)
        weak = " / ".join(f"{100 * found['weak_efficiency']:.0f} %" for found in stages)
        strong = " / ".join(f"{found['strong_segments_per_s']:,}" for found in stages)
        between = "one node" if gpus == 8 else network
        lines.append(f"| {freeze} | {between} | {gpus} | {weak} | {strong} |")
    return lines


def render(content: dict[str, Any], page: str) -> str:
    """The page with the tables between their marks."""
    return between_marks(page, "scaling", "scaling", table(content))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stages", nargs="+", type=int, choices=STAGES, default=list(STAGES))
    parser.add_argument("--rounds", type=int, default=2, help="processes of each point")
    parser.add_argument("--rows", type=int, default=8, help="of a rank in a step")
    parser.add_argument("--warm", type=int, default=2, help="steps before the timed ones")
    parser.add_argument("--timed", type=int, default=6, help="timed steps of a process")
    parser.add_argument("--folder", type=Path, help="keep the data here, or find it here")
    parser.add_argument("--json", type=Path, help="write the result here as well")
    parser.add_argument("--render", type=Path, help="write a result's tables into docs, and stop")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    parser.add_argument("--collectives", action="store_true", help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.render:
        page = render(json.loads(words.render.read_text()), PAGE.read_text(encoding="utf-8"))
        PAGE.write_text(page, encoding="utf-8")
        return
    if words.point or words.collectives:
        with redirect_stdout(sys.stderr):
            if words.collectives:
                found = collectives(20)
            else:
                point = Point(**json.loads(words.point))
                found = train(words.folder, point, words.warm, words.timed)
        print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as temporary:
        content = measure(words, (words.folder or Path(temporary)).resolve())
    print(json.dumps(content))
    if words.json:
        write(words.json, content)
    print(f"\n{table(content)}")


if __name__ == "__main__":
    main()
