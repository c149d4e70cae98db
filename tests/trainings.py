"""Short trainings on forked ranks, for the tests of all rooms."""

import os
import signal
from pathlib import Path
from typing import Any

from conftest import run_ranks
from metrics import read_metrics

from mgc_dist import train
from mgc_dist.config import (
    DataConfig,
    EngineConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)
from mgc_dist.training.logbook import Logbook


def config(shards: Path, model: Path, run: Path, **changes: Any) -> TrainConfig:
    """A short run: 66 training rows, global batch 10, two epochs less four rows: 13 steps."""
    knobs: dict[str, Any] = {
        "loss": "poe",
        "zero_stage": 2,
        "resume": "never",
        "epochs": 128 / 66,
        "freeze": "none",
        "micro_batch": 3,
        "eval_batch": 32,
        "global_batch": 10,
        "checkpoint_every_epochs": 0.5,
        "seed": 0,
        "precision": "auto",
        "offload": "none",
        "window_shards": 0,
        "reader_threads": 1,
        "hang_timeout_s": 60.0,
        "max_refused_steps": 3,
        "time_limit_s": 0.0,
        "max_tries": 3,
        "fresh": False,
        "lr": 1e-3,
        "head_lr": 3e-3,
        "weight_decay": 0.01,
        "clip_norm": 1.0,
        "ema_decay": 0.0,
        "layer_lr_decay": 1.0,
        "warmup_fraction": 0.1,
        "final_lr_fraction": 0.02,
        "change": (),
        "validate_every_epochs": 1.0,
        "select": "nll",
        "cache": "none",
        "cache_dtype": "auto",
        "cache_dir": None,
        "activation_checkpointing": False,
        "spec_augment": True,
        "lora": None,
        "compile": False,
        "device": "cpu",
    } | changes
    return TrainConfig(
        data=DataConfig(
            shards=shards,
            window_shards=knobs["window_shards"],
            reader_threads=knobs["reader_threads"],
            cache=knobs["cache"],
            cache_dtype=knobs["cache_dtype"],
            cache_dir=knobs["cache_dir"],
        ),
        main=ModelConfig(
            model=str(model),
            freeze=knobs["freeze"],
            activation_checkpointing=knobs["activation_checkpointing"],
            spec_augment=knobs["spec_augment"],
            lora=knobs["lora"],
        ),
        objective=LossConfig(loss=knobs["loss"]),
        optim=OptimConfig(
            epochs=knobs["epochs"],
            global_batch=knobs["global_batch"],
            lr=knobs["lr"],
            head_lr=knobs["head_lr"],
            weight_decay=knobs["weight_decay"],
            warmup_fraction=knobs["warmup_fraction"],
            final_lr_fraction=knobs["final_lr_fraction"],
            clip_norm=knobs["clip_norm"],
            ema_decay=knobs["ema_decay"],
            layer_lr_decay=knobs["layer_lr_decay"],
        ),
        engine=EngineConfig(
            zero_stage=knobs["zero_stage"],
            micro_batch=knobs["micro_batch"],
            eval_batch=knobs["eval_batch"],
            precision=knobs["precision"],
            offload=knobs["offload"],
            device=knobs["device"],
            compile=knobs["compile"],
            hang_timeout_s=knobs["hang_timeout_s"],
            max_refused_steps=knobs["max_refused_steps"],
        ),
        output=RunConfig(
            run=run,
            resume=knobs["resume"],
            seed=knobs["seed"],
            log_every_steps=1,
            checkpoint_every_epochs=knobs["checkpoint_every_epochs"],
            time_limit_s=knobs["time_limit_s"],
            max_tries=knobs["max_tries"],
            fresh=knobs["fresh"],
            change=knobs["change"],
            validate_every_epochs=knobs["validate_every_epochs"],
            select=knobs["select"],
        ),
    )


def train_on(world: int, settings: TrainConfig) -> None:
    """Run the train command on forked ranks."""
    assert run_ranks(world, train.run, settings) == [0] * world


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run, "step")]


def stop_after(step: int) -> None:
    """Make this rank signal itself once it has taken a step; inherited by forked ranks."""
    note = Logbook.all_note

    def signalled(self: Any, now: int, *rest: Any) -> None:
        ranks = self._run.ranks
        if now == step and ranks.rank == ranks.world - 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        note(self, now, *rest)

    Logbook.all_note = signalled  # type: ignore[method-assign]


def train_until(step: int, settings: TrainConfig) -> int:
    """Train on this rank, which is signalled after a step, as by Slurm."""
    stop_after(step)
    return train.run(settings)
