"""The DeepSpeed engine around the main model; the only file that knows deepspeed.

What is built around here, all measured (docs/design.md): the model is built plainly and
partitioned by `initialize` (zero.Init crashes on wav2vec2's weight-normed convolution); torch's
fused AdamW needs no compiler; autocast keeps float32 weights; DeepSpeed's shared-memory op is
switched off on a CPU, because it compiles at first use, leaks 66 MiB of /dev/shm a run and
hangs on the lock of a killed build.
"""

import logging
import math
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from mgc_dist.model import WaveClassifier
from mgc_dist.plan import Layout
from mgc_dist.ranks import Ranks


class Engine:
    """Forward, backward and step of a model that ZeRO has spread over ranks.

    Args:
        model: with its frozen parts marked.
        layout: of the global batch.
        ranks: who takes part; the process group must be joined.
        zero_stage: 0 to 3.
        bf16: autocast to bfloat16 over float32 weights.
        lr: peak learning rate of the backbone.
        head_lr: peak learning rate of the head.
        weight_decay: of AdamW.
        clip_norm: largest norm of the gradient.
        bucket_elements: of ZeRO's communication.
    """

    def __init__(
        self,
        model: WaveClassifier,
        layout: Layout,
        ranks: Ranks,
        *,
        zero_stage: int,
        bf16: bool,
        lr: float,
        head_lr: float,
        weight_decay: float,
        clip_norm: float,
        bucket_elements: int,
    ) -> None:
        deepspeed = _import_deepspeed(ranks)
        head, backbone = model.head_and_backbone()
        groups = [(backbone, lr), (head, head_lr)]
        self._peak_lrs = [peak for params, peak in groups if params]
        self.ranks = ranks
        self.zero_stage = zero_stage
        self.bf16 = bf16
        self._gather = deepspeed.zero.GatheredParameters
        self.config: dict[str, Any] = {
            "train_batch_size": layout.slots,
            "train_micro_batch_size_per_gpu": layout.micro_batch,
            "gradient_accumulation_steps": layout.accumulation,
            "gradient_clipping": clip_norm,
            "steps_per_print": 2**31,
            "optimizer": {
                "type": "AdamW",
                "params": {
                    "lr": lr,
                    "weight_decay": weight_decay,
                    "torch_adam": True,
                    "fused": True,
                },
            },
            "zero_optimization": {
                "stage": zero_stage,
                "reduce_bucket_size": bucket_elements,
                "allgather_bucket_size": bucket_elements,
            },
            "torch_autocast": {"enabled": bf16, "dtype": "bfloat16"},
        }
        self._scale = layout.world * layout.accumulation
        self._engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=[{"params": p, "lr": peak} for p, peak in groups if p],
            config=self.config,
        )

    def __call__(self, wave: Tensor) -> Tensor:
        """int16 [B, T] on the device -> logits [B, K]."""
        logits: Tensor = self._engine(wave)
        return logits

    def train(self, mode: bool) -> None:
        """Switch between training and evaluation mode."""
        self._engine.train(mode)

    def set_lr(self, factor: float) -> list[float]:
        """Set each group's learning rate to its peak times a factor; returns the rates."""
        rates = [peak * factor for peak in self._peak_lrs]
        for group, rate in zip(self._engine.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        return rates

    def step(self, loss_sum: Tensor, true_rows: int) -> None:
        """Back-propagate one micro batch; at the end of the accumulation, update the weights.

        DeepSpeed divides the loss by the accumulation and averages gradients over ranks, so
        that the factor here makes the update follow the mean over the true rows of the whole
        global batch, whatever is padding and wherever it lies.

        Args:
            loss_sum: sum of the losses of this micro batch's true rows.
            true_rows: D, true rows of the whole global batch, over all ranks.
        """
        self._engine.backward(loss_sum * (self._scale / true_rows))
        self._engine.step()

    def grad_norm(self) -> float | None:
        """Norm of the last step's gradient before clipping; None at stage 0 in float32."""
        norm = self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def save(self, folder: Path, tag: str, state: dict[str, Any]) -> None:
        """Write this rank's part of a checkpoint (a collective)."""
        self._engine.save_checkpoint(
            str(folder), tag=tag, client_state={"mgc_dist": state}, save_latest=False
        )

    def load(self, checkpoint: Path) -> dict[str, Any]:
        """Restore weights and optimizer from a verified checkpoint (a collective).

        Returns:
            The state that was given to `save`.

        Raises:
            RuntimeError: DeepSpeed found nothing to load.
        """
        path, client = self._engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
        if path is None:
            raise RuntimeError(f"DeepSpeed loaded nothing from {checkpoint}")
        state: dict[str, Any] = client["mgc_dist"]
        return state

    def all_weights(self) -> dict[str, Tensor]:
        """Full float32 weights on the CPU of rank 0, {} elsewhere (a collective)."""
        module: nn.Module = self._engine.module
        weights: dict[str, Tensor] = {}
        for name, parameter in module.named_parameters():
            with self._gathered([parameter]):
                if self.ranks.is_first:
                    weights[name] = parameter.detach().float().cpu().clone()
        if self.ranks.is_first:
            kept = module.state_dict(keep_vars=True)
            for name, buffer in module.named_buffers():
                if name in kept:
                    weights[name] = buffer.detach().cpu().clone()
        return weights

    def _gathered(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        gathered: AbstractContextManager[None] = self._gather(
            parameters, enabled=self.zero_stage == 3
        )
        return gathered


def lr_factor(samples_seen: int, total: int, *, warmup: float, final: float) -> float:
    """Linear warm-up, then a cosine to `final`: a function of samples_seen alone.

    Args:
        samples_seen: positions consumed after the step, 1 to total.
        total: positions of the run.
        warmup: share of the run, 0 to below 1.
        final: factor at the end.

    Returns:
        Factor of the peak rate, above 0 to 1.

    Source: Loshchilov and Hutter, "SGDR", ICLR 2017, eq. 5, after a linear warm-up.
    """
    done = samples_seen / total
    if done < warmup:
        return done / warmup
    angle = math.pi * (done - warmup) / (1 - warmup)
    return final + (1 - final) * 0.5 * (1 + math.cos(angle))


def _import_deepspeed(ranks: Ranks) -> ModuleType:
    on_cpu = ranks.device.type == "cpu"
    if on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    module: ModuleType = deepspeed
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if on_cpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return module
