"""The DeepSpeed engine around the main model; with `engine_state`, all that knows deepspeed.

What is built around here, all measured (docs/design.md): the model is built plainly and
partitioned by `initialize` (zero.Init crashes on wav2vec2's weight-normed convolution); torch's
fused AdamW needs no compiler; autocast keeps float32 weights; DeepSpeed's shared-memory op is
switched off on a CPU, because it compiles at first use, leaks 66 MiB of /dev/shm a run and
hangs on the lock of a killed build.
"""

import argparse
import contextlib
import inspect
import logging
import math
import os
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from mgc_dist.cluster.ranks import Ranks
from mgc_dist.config import OptimConfig
from mgc_dist.config.train import Schedule
from mgc_dist.data.order import Layout
from mgc_dist.errors import UserError
from mgc_dist.models.classifier import WaveClassifier
from mgc_dist.training.engine_state import EngineState, safe_names
from mgc_dist.training.loss_scale import LossScale


class Engine:
    """Forward, backward and step of a model that ZeRO has spread over ranks.

    Args:
        model: with its frozen parts marked.
        layout: of the global batch.
        ranks: who takes part; the process group must be joined.
        zero_stage: 0 to 3.
        bf16: autocast to bfloat16 over float32 weights.
        fp16: autocast to float16 over float32 weights, the loss scaled.
        bf16_weights: bfloat16 weights, frozen ones too, with float32 copies of the trained ones in
            the optimizer; gradients add up in float32. Stages 2 and 3 only.
        lr: peak learning rate of the backbone, or of its last encoder layer.
        layer_lr_decay: factor of that rate from an encoder layer to the one below it.
        head_lr: peak learning rate of the head.
        weight_decay: of AdamW.
        clip_norm: largest norm of the gradient.
        bucket_elements: of ZeRO's communication.
        compile_model: through torch.compile; not at stage 3, which then loses gradients.
        ema_decay: of the averages of the trained weights; 0 keeps none.
        offload: the optimizer's weights, moments and step are on the host; stages 2 and 3 only.
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
        bf16_weights: bool = False,
        fp16: bool = False,
        offload: bool = False,
        compile_model: bool = False,
        ema_decay: float = 0.0,
        layer_lr_decay: float = 1.0,
    ) -> None:
        deepspeed = _import_deepspeed(ranks)
        groups = _groups(model, lr, head_lr, layer_lr_decay)
        self._peak_lrs = [peak for params, peak in groups if params]
        self.ranks = ranks
        self.zero_stage = zero_stage
        self.precision = _precision(bf16, bf16_weights, fp16)
        self.config = _settings(
            layout,
            zero_stage=zero_stage,
            lr=lr,
            weight_decay=weight_decay,
            clip_norm=clip_norm,
            bucket_elements=bucket_elements,
        )
        if offload:
            assert zero_stage >= 2
            self.config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        dtype = "float16" if fp16 else "bfloat16"
        self.config["torch_autocast"] = {"enabled": bf16 or fp16, "dtype": dtype}
        if bf16_weights:
            assert zero_stage >= 2
            self.config["bf16"] = {"enabled": True, "check_grad_overflow": True}
            self.config["data_types"] = {"grad_accum_dtype": "fp32"}
        self._scale = layout.world * layout.accumulation
        # DeepSpeed would take GPU number LOCAL_RANK, where Slurm may show each task only its own
        on_gpu = ranks.device.type == "cuda"
        self._engine, *_ = deepspeed.initialize(
            args=argparse.Namespace(device_rank=ranks.device.index) if on_gpu else None,
            model=model,
            model_parameters=[{"params": p, "lr": peak} for p, peak in groups if p],
            config=self.config,
        )
        self.state = EngineState(
            self._engine,
            ranks,
            zero_stage=zero_stage,
            settings=self.config,
            peak_lrs=self._peak_lrs,
            ema_decay=ema_decay,
            keeps_frozen=not model.is_adapted,
            loss_scale=LossScale() if fp16 else None,
        )
        # ours takes their place; and who comes after float16 in a process would get one, unused
        self._engine.torch_autocast_z0_gradscaler = None
        self._engine.optimizer.torch_autocast_gradscaler = None
        self._norm: float | Tensor | None = None
        if compile_model:
            assert zero_stage < 3
            self._engine.compile()

    def __call__(self, wave: Tensor, draw: Tensor | None = None) -> Tensor:
        """int16 [B, T] on the device, or features [B, F, D] -> logits [B, K].

        In training, `draw`, int64 [B] on the device, decides the masks of each row.
        """
        logits: Tensor = self._engine(wave, draw)
        return logits

    def with_gain(self, wave: Tensor, draw: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As above -> logits [B, K], gain of the bias float32 [B]."""
        logits, gain = self._engine(wave, draw, with_gain=True)
        return logits, gain

    def features(self, wave: Tensor) -> Tensor:
        """int16 [B, T] on the device -> what its frozen part gives, [B, F, D]."""
        features: Tensor = self._engine(wave, only_below=True)
        return features

    def train(self, mode: bool) -> None:
        """Switch between training and evaluation mode."""
        self._engine.train(mode)

    def set_lr(self, factor: float) -> list[float]:
        """Set each group's learning rate to its peak times a factor; returns the rates."""
        rates = [peak * factor for peak in self._peak_lrs]
        for group, rate in zip(self._engine.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        return rates

    def backward(self, share: Tensor) -> None:
        """Back-propagate one micro batch.

        DeepSpeed divides the loss by the accumulation and averages gradients over ranks; the
        factor here undoes both, so that the update follows the sum of all shares: the mean over
        the true rows of the global batch, whatever is padding and wherever it lies.

        Args:
            share: of this micro batch in the loss of the step, a scalar: what its true rows
                lose, divided by what the rows of the whole global batch count.
        """
        scale = self.loss_scale
        if self.zero_stage > 0:  # multiplies by it, and divides gradients before they are clipped
            self._engine.optimizer.override_loss_scale(scale)
        self._engine.backward(share * self._scale * (1.0 if self.zero_stage else scale))

    def step(self) -> bool:
        """End a micro batch; at the end of the accumulation, update the weights.

        Returns:
            False, on every rank alike, if a gradient was not finite: the weights and the
            optimizer are as they were.
        """
        at_boundary = self._engine.is_gradient_accumulation_boundary()
        refused = at_boundary and self.zero_stage == 0 and not self._is_finite_at_stage_0()
        config = self._engine._config
        clip_norm = config.gradient_clipping
        config.gradient_clipping = 0.0 if refused else clip_norm  # it fails without a gradient
        self._engine.step()
        config.gradient_clipping = clip_norm
        if at_boundary and self.zero_stage > 0:
            refused = bool(self._engine.optimizer.overflow)
            self._norm = self._engine.get_global_grad_norm()  # on a GPU not waited for
        if at_boundary and not refused and self.state.average:
            self.state.average.update()
        if at_boundary and self.state.loss_scale:
            self.state.loss_scale.follow(not refused)
        return not refused

    @property
    def loss_scale(self) -> float:
        """Factor of the loss and of gradients until a step takes it out; 1 but in float16."""
        return self.state.loss_scale.value if self.state.loss_scale else 1.0

    @property
    def keeps_average(self) -> bool:
        """Whether averages of the weights are kept."""
        return self.state.average is not None

    @contextlib.contextmanager
    def all_averaged(self) -> Iterator[None]:
        """Compute with the averages, and export them (a collective).

        After an error the weights do not come back: the other ranks would not take part.
        """
        self.state.all_exchange()
        yield
        self.state.all_exchange()

    def _is_finite_at_stage_0(self) -> bool:
        """Measure the gradient; drop it if it is not finite, because stage 0 would apply it.

        The gradients have been averaged by now, so all ranks come to the same answer. The
        optimizer passes over parameters without a gradient.
        """
        parameters = [p for p in self._engine.module.parameters() if p.grad is not None]
        for parameter in parameters if self.state.loss_scale else ():
            parameter.grad = parameter.grad / self.loss_scale
        norm = float(
            torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        )
        if math.isfinite(norm):
            self._norm = norm
            return True
        for parameter in parameters:
            parameter.grad = None
        self._norm = None
        return False

    def grad_norm(self) -> float | None:
        """Norm of the last step's gradient before clipping; None if it was not finite."""
        norm = None if self._norm is None else float(self._norm)
        return norm if norm is not None and math.isfinite(norm) else None

    def all_grads(self) -> Iterator[tuple[str, Tensor]]:
        """Full gradients of the trained parameters that have one (a collective at each of them).

        Between the last `backward` of a step and its `step`, for the census and for tests, because
        it is slow. Every rank must go through all of them.

        Yields:
            Name, and gradient in the parameter's shape; one at a time, because together they take
            as much memory as the weights.
        """
        from deepspeed.utils import safe_get_full_grad

        for name, parameter in self._engine.module.named_parameters():
            if not parameter.requires_grad:
                continue
            grad = parameter.grad if self.zero_stage == 0 else safe_get_full_grad(parameter)
            if grad is not None:
                yield name, grad / self.loss_scale if self.state.loss_scale else grad

    def close(self) -> None:
        """Remove the hooks of autograd, which would keep the engine and its sockets for ever.

        Python's collector does not see through them. DeepSpeed's `destroy` waits for the device,
        where a rank may be lost.
        """
        for hook in getattr(self._engine.optimizer, "_grad_acc_hooks", ()):  # ZeRO-0 has none
            hook.remove()


def _groups(
    model: WaveClassifier, lr: float, head_lr: float, layer_lr_decay: float
) -> list[tuple[list[nn.Parameter], float]]:
    """Trainable parameters and their peak learning rates, the head last.

    With a decay, layer l of L has lr * decay^(L - l), and all below layer 1 has lr * decay^L.

    Source: Howard and Ruder, "Universal language model fine-tuning" (ULMFiT), ACL 2018, section
    3.2, where the decay is 1 / 2.6; Bao et al., "BEiT", ICLR 2022, counts the head as a layer
    more, which here has a rate of its own.
    """
    head, backbone = model.head_and_backbone()
    if layer_lr_decay == 1:
        return [(backbone, lr), (head, head_lr)]
    by_layer = model.backbone_by_layer().items()
    return [*((each, lr * layer_lr_decay**above) for above, each in by_layer), (head, head_lr)]


def _settings(
    layout: Layout,
    *,
    zero_stage: int,
    lr: float,
    weight_decay: float,
    clip_norm: float,
    bucket_elements: int,
) -> dict[str, Any]:
    """What DeepSpeed is configured with, but for the precision."""
    return {
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
    }


def _precision(bf16: bool, bf16_weights: bool, fp16: bool) -> str:
    """In words, for people."""
    if bf16_weights or fp16:
        return "bf16 weights" if bf16_weights else "fp16 autocast"
    return "bf16 autocast" if bf16 else "fp32"


def lr_factor(
    samples_seen: int, total: int, *, warmup: float, final: float, schedule: Schedule = "cosine"
) -> float:
    """Linear warm-up, then a fall by a schedule: a function of samples_seen alone.

    Args:
        samples_seen: positions consumed after the step, 1 to total.
        total: positions of the run.
        warmup: share of the run, 0 to below 1.
        final: factor at the end, of `cosine` and `linear`.
        schedule: as `--schedule`.

    Returns:
        Factor of the peak rate, above 0 to 1.

    Source: Loshchilov and Hutter, "SGDR", ICLR 2017, eq. 5 (`cosine`); Vaswani et al., "Attention
    is all you need", NeurIPS 2017, eq. 3 (`inverse-sqrt`); after a linear warm-up.
    """
    done = samples_seen / total
    if done < warmup:
        return done / warmup
    if schedule == "constant":
        return 1.0
    if schedule == "inverse-sqrt":
        return math.sqrt(warmup / done)
    fallen = (done - warmup) / (1 - warmup)  # 0 to 1
    left = 1 - fallen if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * fallen))
    return final + (1 - final) * left


def factor_at(config: OptimConfig, samples_seen: int, total: int) -> float:
    """Factor of the peak learning rates by the schedule of a configuration."""
    return lr_factor(
        samples_seen,
        total,
        warmup=config.warmup_fraction,
        final=config.final_lr_fraction,
        schedule=config.schedule,
    )


def _import_deepspeed(ranks: Ranks) -> ModuleType:
    on_cpu = ranks.device.type == "cpu"
    if on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    module: ModuleType = deepspeed
    taken = deepspeed.accelerator.get_accelerator().device_name()
    if taken != ranks.device.type:
        raise UserError(
            "--device",
            got=f"{ranks.device.type}, where DeepSpeed was imported for {taken}",
            expected="the same device for all trainings in a process",
            cure="train in a new Python process",
        )
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)  # torch refuses to load with both
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # it passes weights_only=False everywhere
    torch.serialization.add_safe_globals(safe_names())
    if on_cpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _import_muon()
    return module


def _import_muon() -> None:
    """Import DeepSpeed's Muon without torch's compiler.

    DeepSpeed imports it to see that our AdamW is none. Its functions are compiled at their first
    call, but the compiler is imported at once: 0.8 CPU seconds and 44 MiB a rank.
    """
    from deepspeed.runtime import compiler

    plain = compiler.compile
    compiler.compile = lambda *_, **__: lambda function: function
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        compiler.compile = plain


def forget() -> None:
    """Let DeepSpeed forget a training that has ended, for the sake of the next in this process.

    It keeps process groups ('Group "..." is not registered'), models of ZeRO-3, that autocast was
    on, and torch's linear layer replaced by that of ZeRO-3, which adds up in another order.
    """
    if "deepspeed" not in sys.modules:
        return
    from deepspeed.runtime import torch_autocast
    from deepspeed.runtime.zero import parameter_offload, partition_parameters
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
    from deepspeed.utils import groups

    groups._release_process_group_references()
    torch_autocast.TORCH_AUTOCAST_INITIALIZED = False
    if torch.nn.functional.linear is partition_parameters.zero3_linear_wrap:
        plain = partition_parameters.InsertPostInitMethodToModuleSubClasses.linear_bk
        torch.nn.functional.linear = plain
    parameter_offload.FWD_MODULE_STACK.clear()
    cached = PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release
    inspect.getclosurevars(cached).nonlocals["func"].cache_clear()  # models are in its keys
