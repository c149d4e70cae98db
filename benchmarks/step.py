"""A training step of ours against what one would run without it: same weights, same segments.

    python benchmarks/step.py --model small --json benchmarks/results/step.json
    python benchmarks/step.py --model large --json benchmarks/results/step.json
    python benchmarks/step.py --render benchmarks/results/step.json

Five ways to train a wav2vec2 (random weights, ten genres, segments of 3 s) with the same global
batch, micro batch and precision (float32), as one process:

- `original`: as the project before this one is described: both models in every step, frozen by
  `requires_grad = False` alone, a WAV file a segment at 22,050 Hz that is resampled and normalised
  when it is asked for, a plain torch loop with AdamW, a mixture of both models' probabilities.
- `trainer-poe`: Hugging Face's Trainer with DeepSpeed, our settings of it, product of experts with
  the bias model beside it in every step (eval mode, no_grad).
- `trainer-ce`: the same with plain cross-entropy and no bias model.
- `table`: our `train` command; the bias model's logits come from a table.
- `cache`: the same with `--cache trunk`, where this version has it.

What is fair: both Trainers get their segments from memory, normalised before the clock runs, and
freeze as transformers means it (`freeze_feature_encoder`, and no gradient for the lower layers), so
that their autograd stops where ours does. Dropout and SpecAugment are off everywhere, so that
`trainer-poe`, `table` and `cache` must lose the same in every step: the run ends with an error if
they do not, or if DeepSpeed was not configured alike. Ours logs every step, as the Trainers do.
Start-up, making the table or the cache, the first steps and what comes after the last are not
timed; what the bias pass costs is told.

Each case is a process of its own. With `--lockstep` (the small model's default) all cases of a
freeze mode are started, and then take one step each in turn while the others sleep, so that a
machine that grows slower for a while does so for all. The large model's processes do not fit 24
GiB together: there each case does so with `table` alone, in pairs.
"""

import argparse
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import date
from pathlib import Path
from typing import Any, TextIO

from measure import between_marks, machine, versions, write

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

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "performance.md"
BETA, RATIO, LR, CLIP_NORM, ZERO_STAGE = 0.5, 0.1, 1e-4, 1.0, 2
SEGMENT_S, HOP_S, RATE = 3.0, 1.5, 16_000
CALM = {
    "model_type": "wav2vec2",
    "apply_spec_augment": False,
    "mask_time_prob": 0.0,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "final_dropout": 0.0,
    "layerdrop": 0.0,
}
LAYER_NORM = {"conv_bias": True, "feat_extract_norm": "layer", "do_stable_layer_norm": True}


@dataclass(frozen=True, kw_only=True)
class Size:
    """A main model with its bias model, and how it is trained here."""

    main: dict[str, Any]
    bias: dict[str, Any]
    global_batch: int
    micro_batch: int
    rounds: int
    warm: int
    timed: int
    lockstep: bool

    @property
    def half(self) -> int:
        """Half of the main model's layers."""
        return int(self.main["num_hidden_layers"]) // 2

    @property
    def steps(self) -> int:
        """Steps of one process."""
        return self.warm + self.timed


def sized_net(hidden: int, layers: int, heads: int, channels: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
        "conv_dim": [channels] * 7,
    }


SIZES = {
    "small": Size(
        main=CALM | LAYER_NORM | sized_net(256, 8, 4, 128),
        bias=CALM | sized_net(192, 4, 4, 96),
        global_batch=16,
        micro_batch=8,
        rounds=2,
        warm=2,
        timed=8,
        lockstep=True,
    ),
    "large": Size(  # facebook/wav2vec2-large-960h-lv60-self and facebook/wav2vec2-base
        main=CALM | LAYER_NORM | sized_net(1024, 24, 16, 512),
        bias=CALM | sized_net(768, 12, 12, 512),
        global_batch=16,
        micro_batch=2,
        rounds=1,
        warm=1,
        timed=2,
        lockstep=False,
    ),
}
SIZES["tiny"] = replace(  # to try scripts with
    SIZES["small"],
    main=CALM | LAYER_NORM | sized_net(64, 4, 4, 32),
    bias=CALM | sized_net(64, 2, 4, 32),
    global_batch=4,
    micro_batch=2,
)
CASES = {
    "original": "the original project's step, plain torch",
    "trainer-poe": "Hugging Face Trainer, bias model beside it",
    "trainer-ce": "Hugging Face Trainer, plain cross-entropy",
    "table": "`train`, bias table",
    "cache": "`train --cache trunk`, bias table",
}
RATIOS = {  # times as many segments/s: of the first, against the second
    "table over trainer-poe": ("table", "trainer-poe", {"feature_encoder": 1.1, "half": 1.15}),
    "table over original": ("table", "original", {"half": 1.5}),
    "table over trainer-ce": ("table", "trainer-ce", {"feature_encoder": 0.98, "half": 0.98}),
    "cache over table": ("cache", "table", {"half": 1.3}),
}
FREEZES = ("feature_encoder", "half")
Turns = list[dict[str, dict[str, Any]]]
"""Of those that took their steps in turn: case -> what its process has handed back."""
NOT_THERE = "not there"
SAME = 2e-4
"""How far the losses of the same step may be apart: rounding that a few steps have grown."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one process does."""

    model: str
    case: str
    freeze: str
    folder: Path
    size: Size
    device: str = "cpu"

    @property
    def on_gpu(self) -> bool:
        """Under bf16 autocast there, in float32 on a CPU."""
        return self.device == "cuda"

    @property
    def freeze_flag(self) -> str:
        """As `--freeze` has it."""
        return f"layers:{self.size.half}" if self.freeze == "half" else self.freeze

    @property
    def frozen_layers(self) -> int | None:
        """N of `layers:N`."""
        return self.size.half if self.freeze == "half" else None

    @property
    def own(self) -> Path:
        """Folder of this model's configurations and table."""
        return self.folder / self.model


# -- what is measured: in a process of its own ------------------------------------------------


class Clock:
    """Notes the wall and CPU time of each step, and the optimizer's part of it.

    Before each step it asks the process that started this one, by a line, and sleeps until there
    is an answer: it is another case's turn.

    Args:
        steps: to be taken.
        say: where lines are written to.
    """

    def __init__(self, steps: int, say: TextIO) -> None:
        self.steps: list[dict[str, float]] = []
        self.losses: list[float] = []
        self.optimizer_s = 0.0
        self._left, self._say = steps, say

    def start(self) -> None:
        """Begin a step, when it is this process's turn."""
        self._say.write("ready\n")
        self._say.flush()
        if not sys.stdin.readline():
            raise SystemExit("nobody asks for another step")
        self.optimizer_s = 0.0
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def end_step(self, loss: float) -> bool:
        """End a step, and begin the next; whether there is one."""
        wall, cpu = time.perf_counter(), time.process_time()
        found = {"s": wall - self._wall, "cpu_s": cpu - self._cpu}
        self.steps.append(found | {"optimizer_s": self.optimizer_s})
        self.losses.append(loss)
        self._left -= 1
        if self._left:
            self.start()
        return self._left > 0

    @contextmanager
    def optimizing(self) -> Iterator[None]:
        """A block that is the optimizer's."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.optimizer_s += time.perf_counter() - started

    def result(self, **more: Any) -> dict[str, Any]:
        """What the process hands back."""
        peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        return {"steps": self.steps, "losses": self.losses, "peak_gib": peak_gib} | more


def run_case(job: Job, say: TextIO) -> dict[str, Any]:
    """The figures of one process."""
    clock = Clock(job.size.steps, say)
    if job.case == "original":
        return train_as_the_original(job, clock)
    time_deepspeed(clock)
    if job.case.startswith("trainer"):
        return train_with_trainer(job, clock)
    return train_ours(job, clock)


def time_deepspeed(clock: Clock) -> None:
    """Let the clock see DeepSpeed's optimizer: norm, clipping, AdamW, and the copies around it."""
    import deepspeed
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer as Optimizer

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it is compiled at first use
    step = Optimizer.step

    def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
        with clock.optimizing():
            return step(self, *args, **kwargs)

    Optimizer.step = timed


def genres_and_order(job: Job) -> tuple[list[str], list[int], list[int]]:
    """Genres, labels by place in the training split, and the places in the order of `train`."""
    import numpy as np

    from mgc_dist.data.order import Plan
    from mgc_dist.data.reader import ShardSet

    with ShardSet(job.folder / "shards") as shards:
        first, stop = shards.rows_of("train")
        labels = shards.labels[first:stop].tolist()
        genres = list(shards.manifest.genres)
    count = job.size.global_batch * job.size.steps
    plan = Plan(rows=len(labels), total=2 * count, global_batch=job.size.global_batch, seed=0)
    return genres, labels, plan.places(np.arange(count)).tolist()


def main_net(job: Job, genres: Sequence[str]) -> Any:
    """The main model as transformers knows it, with the weights that `train` gives it."""
    from mgc_dist.models.main import build_main

    return build_main(
        str(job.own / "main.json"),
        genres,
        freeze="none",
        frozen_layers=None,
        activation_checkpointing=False,
        seed=0,
        segment_samples=round(SEGMENT_S * RATE),
        sample_rate=RATE,
    ).net.train()


def bias_net(job: Job, genres: Sequence[str]) -> Any:
    """The bias model, its head too from random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForAudioClassification

    torch.manual_seed(1)
    settings = json.loads((job.own / "bias.json").read_text())
    config = AutoConfig.for_model(**settings, num_labels=len(genres))
    return AutoModelForAudioClassification.from_config(config).requires_grad_(False)


def mark_frozen(job: Job, net: Any) -> None:
    """No gradients for the lower parts' weights; autograd may still go through them."""
    base = net.base_model
    base.feature_extractor.requires_grad_(False)
    if job.frozen_layers:
        base.feature_projection.requires_grad_(False)
        base.encoder.pos_conv_embed.requires_grad_(False)
        base.encoder.layers[: job.frozen_layers].requires_grad_(False)


def train_as_the_original(job: Job, clock: Clock) -> dict[str, Any]:
    """Both models in every step, files resampled item by item, a plain loop."""
    import torch
    from reading import OriginalFiles
    from torch.utils.data import DataLoader, Subset

    genres, labels, order = genres_and_order(job)
    main, bias = main_net(job, genres), bias_net(job, genres).train()
    mark_frozen(job, main)
    data = Subset(OriginalFiles(job.folder / "original", labels), order)
    batches = DataLoader(data, job.size.micro_batch, num_workers=0)
    trained = [parameter for parameter in main.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0)
    accumulation = job.size.global_batch // job.size.micro_batch
    total = 0.0
    clock.start()
    for number, (wave, label) in enumerate(batches, start=1):
        with torch.no_grad():
            biased = bias(wave).logits.softmax(1)
        mixed = (1 - RATIO) * main(wave).logits.softmax(1) + RATIO * biased
        loss = torch.nn.functional.nll_loss(mixed.log(), label) / accumulation
        loss.backward()
        total += loss.item()
        if number % accumulation == 0:
            with clock.optimizing():
                torch.nn.utils.clip_grad_norm_(trained, CLIP_NORM)
                optimizer.step()
                optimizer.zero_grad()
            clock.end_step(total)
            total = 0.0
    return clock.result()


def deepspeed_settings(job: Job) -> dict[str, Any]:
    """DeepSpeed's, as `train` writes them into ds_config.json."""
    size, bucket = job.size, EngineConfig().bucket_elements
    adam = {"lr": LR, "weight_decay": 0.0, "torch_adam": True, "fused": True}
    return {
        "train_batch_size": size.global_batch,
        "train_micro_batch_size_per_gpu": size.micro_batch,
        "gradient_accumulation_steps": size.global_batch // size.micro_batch,
        "gradient_clipping": CLIP_NORM,
        "steps_per_print": 2**31,
        "optimizer": {"type": "AdamW", "params": adam},
        "zero_optimization": {
            "stage": ZERO_STAGE,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
        "torch_autocast": {"enabled": job.on_gpu, "dtype": "bfloat16"},
    }


def segments_in_memory(job: Job, labels: list[int], order: list[int]) -> list[dict[str, Any]]:
    """The segments in the order of `train`, normalised as float32."""
    import torch

    from mgc_dist.data.reader import ShardSet
    from mgc_dist.encoders.hub import normalise

    with ShardSet(job.folder / "shards") as shards:
        first, _ = shards.rows_of("train")
        waves = [torch.from_numpy(shards.read(first + at)) for at in range(len(labels))]
        ready = [normalise(wave[None])[0] for wave in waves]
    return [{"input_values": ready[at], "labels": labels[at]} for at in order]


def train_with_trainer(job: Job, clock: Clock) -> dict[str, Any]:
    """Hugging Face's Trainer with DeepSpeed, as its users have it."""
    import torch
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_utils import set_seed

    genres, labels, order = genres_and_order(job)
    net = main_net(job, genres)
    mark_frozen(job, net)
    net.freeze_feature_encoder()
    biases = bias_net(job, genres).eval().to(job.device) if job.case == "trainer-poe" else None

    class Case(Trainer):
        loss_is_scaled_for_ga = False

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return SequentialSampler(train_dataset or self.train_dataset)

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if biases is None:
                return model(**inputs).loss
            precision = torch.autocast(job.device, torch.bfloat16, enabled=job.on_gpu)
            with torch.no_grad(), precision:
                biased = biases(inputs["input_values"]).logits.float().log_softmax(1)
            own = model(inputs["input_values"]).logits.float().log_softmax(1)
            return torch.nn.functional.cross_entropy(own + BETA * biased, inputs["labels"])

    class Steps(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            clock.start()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any, **kwargs: Any) -> None:
            if "loss" in logs:
                clock.end_step(logs["loss"])

    set_seed(0)
    with tempfile.TemporaryDirectory(dir=job.folder) as out:
        arguments = TrainingArguments(
            output_dir=out,
            use_cpu=not job.on_gpu,
            deepspeed=deepspeed_settings(job),
            per_device_train_batch_size=job.size.micro_batch,
            gradient_accumulation_steps=job.size.global_batch // job.size.micro_batch,
            max_steps=job.size.steps,
            learning_rate=LR,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=CLIP_NORM,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        data = segments_in_memory(job, labels, order)
        trainer = Case(model=net, args=arguments, train_dataset=data, callbacks=[Steps()])
        trainer.train()
        optimizer = trainer.model_wrapped.optimizer
        assert optimizer.partition_gradients, "not the ZeRO stage that was asked for"
    return clock.result(deepspeed=deepspeed_settings(job))


class Enough(Exception):
    """As many steps as were to be measured have been taken."""


def listen(told: Callable[[Any], None]) -> None:
    """Let something be told of each event of `train`, once it is written; `Enough` ends the run."""
    from mgc_dist import journal
    from mgc_dist.training import setup

    class Listening(journal.Journal):
        def write(self, event: Any) -> None:
            super().write(event)
            told(event)

    setup.Journal = Listening  # type: ignore[misc]


def train_ours(job: Job, clock: Clock) -> dict[str, Any]:
    """The `train` command; a journal that looks at the clock ends it."""
    from mgc_dist import journal, train
    from mgc_dist.events import StartEvent, StepEvent, only

    def told(event: Any) -> None:
        if isinstance(event, StartEvent):
            clock.start()
        if isinstance(event, StepEvent):
            assert event.loss is not None
            if not clock.end_step(event.loss):
                raise Enough

    listen(told)
    with tempfile.TemporaryDirectory(dir=job.folder) as folder:
        run = Path(folder) / "run"
        with suppress(Enough):
            train.run(our_config(job, run))
            raise RuntimeError("the run ended before it was measured")
        settings = json.loads((run / "ds_config.json").read_text())
        steps = only(journal.read_events(run), StepEvent)
    # the journal's step holds the sleep until the next turn, the clock's does not
    waited_s = [step.data_wait_share * step.step_s for step in steps]
    waits = [waited / step["s"] for waited, step in zip(waited_s, clock.steps, strict=True)]
    return clock.result(deepspeed=settings, data_wait_share=waits)


def our_config(job: Job, run: Path) -> TrainConfig:
    """Settings of `train`: constant rates, and nothing due before the run is cut."""
    size = job.size
    config = TrainConfig(
        data=DataConfig(shards=job.folder / "shards", bias_table=job.own / "bias.npy"),
        main=ModelConfig(model=str(job.own / "main.json"), freeze=job.freeze_flag),
        objective=LossConfig(loss="poe", beta=BETA),
        optim=OptimConfig(
            epochs=1e4,
            global_batch=size.global_batch,
            lr=LR,
            head_lr=LR,
            weight_decay=0.0,
            warmup_fraction=0.0,
            final_lr_fraction=1.0,
            clip_norm=CLIP_NORM,
        ),
        engine=EngineConfig(
            zero_stage=ZERO_STAGE,
            micro_batch=size.micro_batch,
            precision="bf16" if job.on_gpu else "fp32",
            device=job.device,
            hang_timeout_s=1e5,  # it sleeps while others take their turns
        ),
        output=RunConfig(
            run=run, log_every_steps=1, validate_every_epochs=1e4, checkpoint_every_epochs=1e4
        ),
    )
    return with_cache(config) if job.case == "cache" else config


def with_cache(config: TrainConfig) -> TrainConfig:
    """`--cache trunk`, in the section that has it.

    Raises:
        LookupError: this version has no such flag.
    """
    for section in fields(config):
        settings = getattr(config, section.name)
        if "cache" in {field.name for field in fields(settings)}:
            return replace(config, **{section.name: replace(settings, cache="trunk")})
    raise LookupError("--cache")


def blank_table(keys: Sequence[str], genres: Sequence[str]) -> Any:
    """A bias table from elsewhere, as a structured array of zeros."""
    import numpy as np

    columns = [("key", f"U{max(map(len, keys))}"), *((genre, "f8") for genre in genres)]
    table = np.zeros(len(keys), columns)
    table["key"] = keys
    return table


def make_table(job: Job, say: TextIO) -> dict[str, Any]:
    """The bias model's logits as a table from elsewhere; rows that are not trained on get zeros."""
    import numpy as np
    import torch

    from mgc_dist.data.reader import ShardSet
    from mgc_dist.encoders.hub import normalise

    with ShardSet(job.folder / "shards") as shards:
        genres, keys, (first, stop) = shards.manifest.genres, shards.keys(), shards.rows_of("train")
        net = bias_net(job, genres).eval().to(job.device)
        table = blank_table(keys, genres)
        started = time.perf_counter()
        size = 32 if job.on_gpu else 1
        for at in range(first, stop, size):
            rows = range(at, min(at + size, stop))
            wave = torch.from_numpy(np.stack([shards.read(row) for row in rows])).to(job.device)
            with torch.no_grad():
                logits = net(normalise(wave)).logits.cpu().numpy()  # [rows, K]
            for k, genre in enumerate(genres):
                table[genre][at : at + len(rows)] = logits[:, k]
        seconds = time.perf_counter() - started
    np.save(job.own / "bias.npy", table)
    return {"rows": stop - first, "seconds": seconds}


# -- around it --------------------------------------------------------------------------------


def prepare(folder: Path, model: str) -> None:
    """Tracks, shards, a file a segment for the original, and the models' configurations."""
    from reading import copy_original, once

    from mgc_dist import shard, synth

    def pack(out: Path) -> None:
        shard.run(
            ShardConfig(
                data=folder / "genres_original",
                groups=folder / "artists.csv",
                out=out,
                split="stratified",
                segment_s=SEGMENT_S,
                hop_s=HOP_S,
            )
        )

    folder.mkdir(parents=True, exist_ok=True)
    with redirect_stdout(sys.stderr):
        if not (folder / "artists.csv").is_file():
            counts = {"tracks_per_genre": 3, "tracks_per_artist": 1}
            synth.run(SynthConfig(out=folder, duration_s=9.0, **counts))
        once(folder / "shards", pack)
        once(folder / "original", lambda out: copy_original(folder, out))
    (folder / model).mkdir(exist_ok=True)
    for name in ("main", "bias"):
        settings = asdict(SIZES[model])[name]
        (folder / model / f"{name}.json").write_text(json.dumps(settings))


class Process:
    """A case in a process of its own, which takes a step when it is told to."""

    def __init__(self, job: Job, threads: int) -> None:
        self._job = job
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by `end`
        command = [sys.executable, __file__, "--only", job.case, "--freeze", job.freeze]
        command += ["--model", job.model, "--folder", str(job.folder)]
        command += ["--warm", str(job.size.warm), "--timed", str(job.size.timed)]
        command += ["--global-batch", str(job.size.global_batch)]
        command += ["--micro-batch", str(job.size.micro_batch), "--device", job.device]
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
        alone |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        quiet = {"HF_HUB_OFFLINE": "1"}
        if not job.on_gpu:
            quiet |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=os.environ | alone | quiet | {"OMP_NUM_THREADS": str(threads)},
        )
        self._line = self._read()

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            told = self._errors.read()[-4000:]
            sys.exit(f"{self._job.case}, {self._job.freeze}: ended with {self.end()}:\n{told}")
        return line

    def step(self) -> None:
        """Let it take a step, and wait for its end."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        self._line = self._read()

    def result(self) -> dict[str, Any]:
        """What it has handed back after its last step."""
        if self.end():
            sys.exit(f"{self._job.case}, {self._job.freeze}: ended with {self.end()}")
        return dict(json.loads(self._line))

    def end(self) -> int:
        """Wait for its end."""
        code = self._process.wait()
        self._errors.close()
        return code


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def take_turns(jobs: Sequence[Job], threads: int) -> list[dict[str, Any]]:
    """Start the jobs, and let each take a step until all have taken theirs; the first one moves."""
    processes = [Process(job, threads) for job in jobs]
    for turn in range(jobs[0].size.steps):
        first = turn % len(processes)
        for process in processes[first:] + processes[:first]:
            process.step()
    return [process.result() for process in processes]


def measure(model: str, words: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All cases of a model, in turns, and what they show."""
    size = sized(model, words)
    prepare(folder, model)
    first = Job(model=model, case="make-table", freeze="half", folder=folder, size=size)
    load = os.getloadavg()[0]
    made = Process(first, words.threads).result()
    cases = [case for case in words.cases if case != "cache" or has_cache()]
    found: dict[str, Turns] = {freeze: [] for freeze in words.freezes}
    for number in range(size.rounds):
        for freeze in words.freezes:
            for group in groups_of(cases, together=size.lockstep):
                jobs = [replace(first, case=case, freeze=freeze) for case in group]
                turn = dict(zip(group, take_turns(jobs, words.threads), strict=True))
                found[freeze].append(turn)
                for case, result in turn.items():
                    tell(number + 1, freeze, case, result, size)
    for freeze, turns in found.items():
        check(freeze, turns)
    return {
        "date": str(date.today()),
        "global_batch": size.global_batch,
        "micro_batch": size.micro_batch,
        "timed_steps": size.rounds * size.timed,
        "lockstep": size.lockstep,
        "threads": words.threads,
        "load_before": round(load, 2),
        "machine": machine(),
        "versions": versions(PACKAGES),
        "bias_pass": {"rows": made["rows"], "s_per_segment": made["seconds"] / made["rows"]},
        "freezes": {
            freeze: summarise(turns, replace(first, freeze=freeze), words)
            for freeze, turns in found.items()
        },
    }


def groups_of(cases: Sequence[str], *, together: bool) -> list[list[str]]:
    """Cases that take their steps in turn: all, or `table` with one of the others."""
    others = [case for case in cases if case != "table"]
    if together or "table" not in cases or not others:
        return [list(cases)] if together else [[case] for case in cases]
    return [["table", other] for other in others]


def tell(number: int, freeze: str, case: str, result: dict[str, Any], size: Size) -> None:
    """A line of progress."""
    seconds = statistics.median(step["s"] for step in result["steps"][size.warm :])
    told = f"round {number}: {freeze}: {case}: {seconds:.2f} s a step"
    print(told, file=sys.stderr, flush=True)


PACKAGES = ("mgc_dist", "torch", "transformers", "deepspeed", "accelerate", "torchaudio")


def sized(model: str, words: argparse.Namespace) -> Size:
    """The size with the numbers of rounds and steps that the command line asks for."""
    size = SIZES[model]
    if words.quick:
        size = replace(size, rounds=1, warm=1, timed=2)
    asked = {"rounds": words.rounds, "warm": words.warm, "timed": words.timed}
    asked |= {"lockstep": words.lockstep, "global_batch": words.global_batch}
    return replace(size, **{name: value for name, value in asked.items() if value is not None})


def has_cache() -> bool:
    """Whether this version has `--cache`."""
    try:
        with_cache(TrainConfig())
    except LookupError:
        return False
    return True


def check(freeze: str, turns: Turns) -> None:
    """The comparison is one of equals: losses of every step, and DeepSpeed's settings."""
    settings = []
    for turn in turns:
        settings += [run["deepspeed"] for run in turn.values() if "deepspeed" in run]
        for other in ("trainer-poe", "cache"):
            if "table" not in turn or other not in turn:
                continue
            pairs = zip(turn["table"]["losses"], turn[other]["losses"], strict=True)
            far = [abs(a - b) for a, b in pairs]
            if not all(apart < SAME for apart in far):  # nor where one is not a number
                sys.exit(f"{freeze}: table and {other} lose differently, by {far}")
    if any(other != settings[0] for other in settings):
        sys.exit(f"{freeze}: DeepSpeed was not configured alike: {settings}")


def summarise(turns: Turns, job: Job, words: argparse.Namespace) -> dict[str, Any]:
    """Spreads over all timed steps, the ratios, and what arithmetic expects of them."""
    results: dict[str, Any] = {}
    for case in words.cases:
        runs = [turn[case] for turn in turns if case in turn]
        results[case] = of_case(runs, job.size) if runs else NOT_THERE
    ratios = {}
    for name, (above, below, targets) in RATIOS.items():
        pairs = [(turn[above], turn[below]) for turn in turns if above in turn and below in turn]
        if pairs:
            ratios[name] = ratio(pairs, job.size) | {"target": targets.get(job.freeze)}
    return {"cases": results, "ratios": ratios, "gflop": work(job)}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Minimum, median, maximum, to four digits."""
    found = {"min": min(values), "median": statistics.median(values), "max": max(values)}
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def of_case(runs: list[dict[str, Any]], size: Size) -> dict[str, Any]:
    """Figures of one case over all its runs."""
    steps = [step for run in runs for step in run["steps"][size.warm :]]
    figures = {
        "step_s": spread([step["s"] for step in steps]),
        "segments_per_s": spread([size.global_batch / step["s"] for step in steps]),
        "cpu_s_per_segment": spread([step["cpu_s"] / size.global_batch for step in steps]),
        "optimizer_share": spread([step["optimizer_s"] / step["s"] for step in steps]),
        "peak_gib": float(f"{max(run['peak_gib'] for run in runs):.3g}"),
        "losses": [round(loss, 6) for loss in runs[0]["losses"]],
    }
    waits = [wait for run in runs for wait in run.get("data_wait_share", [])[size.warm :]]
    return figures | ({"data_wait_share": spread(waits)} if waits else {})


def ratio(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]], size: Size) -> dict[str, Any]:
    """How many times the segments/s, and how many times less CPU, the first of each pair has.

    Medians over pairs of steps that were taken one after the other.
    """

    def of_steps(key: str) -> dict[str, float]:
        steps = [
            (ours[key], theirs[key])
            for above, below in pairs
            for ours, theirs in list(zip(above["steps"], below["steps"], strict=True))[size.warm :]
        ]
        return spread([theirs / ours for ours, theirs in steps])

    return {"speed": of_steps("s"), "cpu": of_steps("cpu_s")}


def work(job: Job) -> dict[str, float]:
    """GFLOP of a segment as it is frozen, and the ratios of speed that follow from them alone."""
    from mgc_dist.models import flops
    from mgc_dist.models.main import describe_main

    def counted(name: str, freeze: str, layers: int | None) -> flops.SegmentFlops:
        model = describe_main(
            str(job.own / name),
            [str(number) for number in range(10)],
            freeze=freeze,
            frozen_layers=layers,
            activation_checkpointing=False,
            segment_samples=round(SEGMENT_S * RATE),
        )
        return flops.count(model, round(SEGMENT_S * RATE))

    main = counted("main.json", job.freeze_flag, job.frozen_layers)
    bias = counted("bias.json", "backbone", None)
    return {
        "training": round(main.training / 1e9, 3),
        "frozen_forward": round(main.frozen / 1e9, 3),
        "bias_forward": round(bias.forward / 1e9, 3),
        "table over trainer-poe": round(1 + bias.forward / main.training, 3),
        "cache over table": round(main.training / (main.training - main.frozen), 3),
    }


# -- the table --------------------------------------------------------------------------------


def table(content: dict[str, Any]) -> str:
    """The figures of one model as Markdown."""
    lines = []
    for freeze, found in content["freezes"].items():
        title = (
            "the CNN frozen" if freeze == "feature_encoder" else "the CNN and half of the layers"
        )
        lines += [
            f"**{title}**: {found['gflop']['training']:g} GFLOP a segment in training, "
            f"{found['gflop']['frozen_forward']:g} of them in the frozen part; the bias model's "
            f"forward {found['gflop']['bias_forward']:g}",
            "",
            "| | segments/s: median (min to max) | CPU s/segment | optimizer's share | peak GiB |",
            "|---|---|---|---|---|",
        ]
        for case, figures in found["cases"].items():
            lines.append(case_line(case, figures))
        lines += ["", "| times as fast | median (min to max) | in CPU | by FLOP alone | target |"]
        lines.append("|---|---|---|---|---|")
        for name, of in found["ratios"].items():
            expected, target = found["gflop"].get(name), of["target"]
            cells = [name]
            for part in (of["speed"], of["cpu"]):
                cells.append(f"{part['median']:.2f} ({part['min']:.2f} to {part['max']:.2f})")
            cells += [f"{expected:.2f}" if expected else "", f"{target:g}" if target else ""]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines).rstrip()


def case_line(case: str, figures: dict[str, Any] | str) -> str:
    """A line of the table."""
    if isinstance(figures, str):
        return f"| {CASES[case]} (`{case}`) | {figures} | | | |"
    speed = figures["segments_per_s"]
    cells = [
        f"{CASES[case]} (`{case}`)",
        f"{speed['median']:.3g} ({speed['min']:.3g} to {speed['max']:.3g})",
        f"{figures['cpu_s_per_segment']['median']:.3g}",
        f"{100 * figures['optimizer_share']['median']:.0f} %",
        f"{figures['peak_gib']:.2f}",
    ]
    return "| " + " | ".join(cells) + " |"


def render(results: dict[str, Any], page: str) -> str:
    """The page with the tables of a result between its marks."""
    for model, content in results["models"].items():
        where = content["machine"]
        told = (
            f"{content['date']}, {where['cores']} cores ({where['cpu']}), "
            f"{content['threads']} threads, float32, global batch {content['global_batch']}, micro "
            f"batch {content['micro_batch']}, {content['timed_steps']} timed steps a case, "
            f"{'all' if content['lockstep'] else 'each with `table`'} in lockstep; load of the "
            "machine before: "
            f"{content['load_before']:g}. The bias pass, once: "
            f"{content['bias_pass']['s_per_segment']:.2f} s a segment."
        )
        page = between_marks(page, model, "step", f"{told}\n\n{table(content)}")
    return page


def add(path: Path, model: str, content: dict[str, Any]) -> None:
    """Put the result of a model beside that of the others."""
    models = json.loads(path.read_text())["models"] if path.is_file() else {}
    write(path, {"benchmark": "step", "models": models | {model: content}})


def only(words: argparse.Namespace) -> None:
    """What a process that `spawn` has started does."""
    numbers = {"warm": words.warm, "timed": words.timed, "global_batch": words.global_batch}
    size = replace(SIZES[words.model], micro_batch=words.micro_batch, **numbers)
    job = Job(
        model=words.model,
        case=words.only,
        freeze=words.freeze,
        folder=words.folder.resolve(),
        size=size,
        device=words.device,
    )
    act = make_table if words.only == "make-table" else run_case
    with redirect_stdout(sys.stderr):
        result = act(job, sys.__stdout__)
    print(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=SIZES, default="small")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--freezes", nargs="+", choices=FREEZES, default=list(FREEZES))
    parser.add_argument("--quick", action="store_true", help="one round of two timed steps")
    parser.add_argument("--rounds", type=int, help="processes of each case")
    parser.add_argument("--warm", type=int, help="steps of a process before the timed ones")
    parser.add_argument("--timed", type=int, help="timed steps of a process")
    parser.add_argument("--global-batch", type=int, help="16; a multiple of the micro batch")
    parser.add_argument(
        "--lockstep", action=argparse.BooleanOptionalAction, help="all cases at once, not in pairs"
    )
    parser.add_argument("--threads", type=int, default=2, help="of each process")
    parser.add_argument("--folder", type=Path, help="keep the data here, or find it here")
    parser.add_argument("--json", type=Path, help="write the result here, beside the other model's")
    parser.add_argument("--render", type=Path, help="write a result's tables into docs, and stop")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--freeze", choices=FREEZES, help=argparse.SUPPRESS)
    parser.add_argument("--micro-batch", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.render:
        page = render(json.loads(words.render.read_text()), PAGE.read_text(encoding="utf-8"))
        PAGE.write_text(page, encoding="utf-8")
        return
    if words.only:
        only(words)
        return
    with tempfile.TemporaryDirectory() as temporary:
        content = measure(words.model, words, (words.folder or Path(temporary)).resolve())
    print(json.dumps({"benchmark": "step", "model": words.model} | content))
    if words.json:
        add(words.json, words.model, content)
    print(f"\n{table(content)}")


if __name__ == "__main__":
    main()
