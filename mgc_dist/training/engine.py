"""The DeepSpeed engine around the main model; the only file that knows deepspeed.

What is built around here, all measured (docs/design.md): the model is built plainly and
partitioned by `initialize` (zero.Init crashes on wav2vec2's weight-normed convolution); torch's
fused AdamW needs no compiler; autocast keeps float32 weights; DeepSpeed's shared-memory op is
switched off on a CPU, because it compiles at first use, leaks 66 MiB of /dev/shm a run and
hangs on the lock of a killed build. Checkpoints go through torch's restricted unpickler, with the
few names that DeepSpeed needs: a stranger's pickle is refused before it runs.
"""

import argparse
import contextlib
import io
import logging
import math
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from mgc_dist.cluster.ranks import Ranks
from mgc_dist.data.order import Layout
from mgc_dist.errors import UserError
from mgc_dist.models.main import WaveClassifier


class Engine:
    """Forward, backward and step of a model that ZeRO has spread over ranks.

    Args:
        model: with its frozen parts marked.
        layout: of the global batch.
        ranks: who takes part; the process group must be joined.
        zero_stage: 0 to 3.
        bf16: autocast to bfloat16 over float32 weights.
        bf16_weights: bfloat16 weights, frozen ones too, with float32 copies of the trained ones in
            the optimizer; gradients add up in float32. Stages 2 and 3 only.
        lr: peak learning rate of the backbone.
        head_lr: peak learning rate of the head.
        weight_decay: of AdamW.
        clip_norm: largest norm of the gradient.
        bucket_elements: of ZeRO's communication.
        compile_model: through torch.compile; not at stage 3, which then loses gradients.
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
        compile_model: bool = False,
    ) -> None:
        deepspeed = _import_deepspeed(ranks)
        head, backbone = model.head_and_backbone()
        groups = [(backbone, lr), (head, head_lr)]
        self._peak_lrs = [peak for params, peak in groups if params]
        self.ranks = ranks
        self.zero_stage = zero_stage
        self.precision = _precision(bf16, bf16_weights)
        self._bf16_weights = bf16_weights
        self._deepspeed = deepspeed
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
        if bf16_weights:
            assert zero_stage >= 2
            self.config |= {
                "bf16": {"enabled": True, "check_grad_overflow": True},
                "data_types": {"grad_accum_dtype": "fp32"},
            }
        self._scale = layout.world * layout.accumulation
        # DeepSpeed would take GPU number LOCAL_RANK, where Slurm may show each task only its own
        on_gpu = ranks.device.type == "cuda"
        self._engine, *_ = deepspeed.initialize(
            args=argparse.Namespace(device_rank=ranks.device.index) if on_gpu else None,
            model=model,
            model_parameters=[{"params": p, "lr": peak} for p, peak in groups if p],
            config=self.config,
        )
        self._files = _Files(self._engine.checkpoint_engine)
        self._engine.checkpoint_engine = self._files
        copy_tools = self._engine._copy_recovery_script  # zero_to_fp32.py, for stock tools
        self._engine._copy_recovery_script = lambda folder: self._files.hold(copy_tools, folder)
        self._norm: float | Tensor | None = None
        if compile_model:
            assert zero_stage < 3
            self._engine.compile()

    def __call__(self, wave: Tensor) -> Tensor:
        """int16 [B, T] on the device, or features [B, F, D] -> logits [B, K]."""
        logits: Tensor = self._engine(wave)
        return logits

    def with_gain(self, wave: Tensor) -> tuple[Tensor, Tensor]:
        """As above -> logits [B, K], gain of the bias float32 [B]."""
        logits, gain = self._engine(wave, with_gain=True)
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
        self._engine.backward(share * self._scale)

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
        return not refused

    def _is_finite_at_stage_0(self) -> bool:
        """Measure the gradient; drop it if it is not finite, because stage 0 would apply it.

        The gradients have been averaged by now, so all ranks come to the same answer. The
        optimizer passes over parameters without a gradient.
        """
        parameters = [p for p in self._engine.module.parameters() if p.grad is not None]
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
                yield name, grad

    def save(self, folder: Path, tag: str, state: dict[str, Any]) -> list[Path]:
        """Write this rank's part of a checkpoint (a collective).

        Returns:
            The files that this rank has written.

        Raises:
            OSError, RuntimeError: a file could not be written; all ranks have got to the end
                of the collectives nevertheless.
        """
        self._files.begin()
        self._engine.save_checkpoint(
            str(folder), tag=tag, client_state={"mgc_dist": state}, save_latest=False
        )
        return self._files.finish()

    def all_load(self, checkpoint: Path, *, reshape: bool) -> dict[str, Any]:
        """Restore weights and optimizer from a verified checkpoint (a collective).

        Args:
            checkpoint: its folder.
            reshape: it comes from another world size or stage: rank 0 rewrites it first as
                DeepSpeed's universal checkpoint, beside it, and removes that afterwards.
                Frozen weights are not restored then: they must be the same already.

        Returns:
            The state that was given to `save`.

        Raises:
            RuntimeError: DeepSpeed found nothing to load.
            UserError, OSError: the universal checkpoint could not be written.
        """
        if not reshape or self.zero_stage == 0:  # stage 0 holds everything on every rank
            return self._load(checkpoint)
        universal = checkpoint.with_name(f"tmp-universal-{checkpoint.name}")
        self.ranks.all_decide(lambda: _convert(checkpoint, universal))
        config = self._engine._config
        config.load_universal_checkpoint = True
        try:
            state = self._load(universal)
        finally:
            config.load_universal_checkpoint = False
        if self.zero_stage == 3:
            self._repair_stage_3()
        self.ranks.barrier()
        if self.ranks.is_first:
            shutil.rmtree(universal)
        return state

    def _load(self, checkpoint: Path) -> dict[str, Any]:
        with _refusing_code(checkpoint):
            path, client = self._engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
        if path is None:
            raise RuntimeError(f"DeepSpeed loaded nothing from {checkpoint}")
        self._keep_settings()
        state: dict[str, Any] = client["mgc_dist"]
        return state

    def _keep_settings(self) -> None:
        """Undo that a checkpoint brings along the weight decay and the clipping it was made with.

        DeepSpeed 0.19 restores both without a word (clipping at stages 1 and 2 only).
        """
        optimizer = self._engine.optimizer
        for group in optimizer.param_groups:
            group["weight_decay"] = self.config["optimizer"]["params"]["weight_decay"]
        if self.zero_stage > 0:
            optimizer.clip_grad = self.config["gradient_clipping"]

    def _repair_stage_3(self) -> None:
        """Undo what DeepSpeed 0.19 does to more than one parameter group at stage 3.

        It gives all sub-groups one `step` tensor, which each of them then counts up, and the
        first group's settings to all: 4e-4 off after a few steps (docs/design.md).
        """
        inner = self._engine.optimizer.optimizer
        for values in inner.state.values():
            if torch.is_tensor(values.get("step")):
                values["step"] = values["step"].clone()
        for group, peak in zip(self._engine.optimizer.param_groups, self._peak_lrs, strict=True):
            group["lr"] = peak  # set again at every step; all other settings are common to all
        steps = [id(v["step"]) for v in inner.state.values() if torch.is_tensor(v.get("step"))]
        assert len(set(steps)) == len(steps)

    def all_weights(self) -> dict[str, Tensor]:
        """Full float32 weights on the CPU of rank 0, {} elsewhere (a collective)."""
        module: nn.Module = self._engine.module
        weights: dict[str, Tensor] = {}
        for name, parameter in module.named_parameters():
            if self._bf16_weights and parameter.requires_grad:
                full = self._in_optimizer(parameter)
                if self.ranks.is_first:
                    weights[name] = full.cpu().clone()
                continue
            with self._gathered([parameter]):
                if self.ranks.is_first:
                    weights[name] = parameter.detach().float().cpu().clone()
        if self.ranks.is_first:
            kept = module.state_dict(keep_vars=True)
            for name, buffer in module.named_buffers():
                if name in kept:
                    weights[name] = buffer.detach().cpu().clone()
        return weights

    def _in_optimizer(self, parameter: nn.Parameter) -> Tensor:
        """The optimizer's float32 copy of a trained weight (a collective)."""
        from deepspeed.utils import safe_get_full_fp32_param

        full: Tensor = safe_get_full_fp32_param(parameter)
        return full

    def _gathered(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        gathered: AbstractContextManager[None] = self._deepspeed.zero.GatheredParameters(
            parameters, enabled=self.zero_stage == 3
        )
        return gathered


def _precision(bf16: bool, bf16_weights: bool) -> str:
    """In words, for people."""
    if bf16_weights:
        return "bf16 weights"
    return "bf16 autocast" if bf16 else "fp32"


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


class _Files:
    """DeepSpeed's way to files, made safe: it loads no foreign code, and never raises midway.

    A rank that raised inside `save_checkpoint` would leave the others in its barriers.
    """

    def __init__(self, inner: object) -> None:
        self._inner = inner
        self._written: list[Path] = []
        self._error: OSError | RuntimeError | None = None

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def begin(self) -> None:
        self._written, self._error = [], None

    def finish(self) -> list[Path]:
        """The files written since `begin`; raises what went wrong with one."""
        if self._error is not None:
            raise self._error
        return self._written

    def hold(self, act: Callable[[str], object], path: str) -> None:
        """Do something with files; an error is kept for `finish`."""
        try:
            act(path)
        except OSError as error:
            self._error = self._error or error

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self.hold(lambda path: Path(path).mkdir(parents=True, exist_ok=exist_ok), path)

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        if self._error is not None:
            return
        try:
            with open(path, "wb") as file:
                torch.save(state_dict, file)
            self._written.append(Path(path))
        except (OSError, RuntimeError) as error:
            cause = error.__cause__ or error.__context__
            self._error = cause if isinstance(cause, OSError) else error

    def load(self, path: str, map_location: str | torch.device | None = None) -> object:
        return torch.load(path, map_location=map_location, weights_only=True)


def safe_names() -> list[Any]:
    """Classes that DeepSpeed's checkpoints need besides tensors; harmless ones."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, ZeroStageEnum, fragment_address]


def _convert(checkpoint: Path, universal: Path) -> None:
    """Rewrite a checkpoint as DeepSpeed's universal one, which any world size reads (rank 0)."""
    from deepspeed.checkpoint import ds_to_universal

    shutil.rmtree(universal, ignore_errors=True)
    words = argparse.Namespace(
        input_folder=str(checkpoint),
        output_folder=str(universal),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,  # ours are not Megatron's: no universal_checkpoint_info
    )
    silence = io.StringIO()
    with (
        contextlib.redirect_stdout(silence),
        contextlib.redirect_stderr(silence),
        _refusing_code(checkpoint),
    ):
        ds_to_universal.main(words)


@contextlib.contextmanager
def _refusing_code(checkpoint: Path) -> Iterator[None]:
    """Put torch's refusal to unpickle a foreign class into the words of this program."""
    try:
        yield
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)|global (\S+)", str(error))
        name = (found[1] or found[2]) if found else "something that is no tensor"
        raise UserError(
            f"checkpoint {checkpoint}",
            got=f"a file that would run code when it is loaded ({name})",
            expected="tensors, as training writes them",
            cure="do not use it, nor anything else from where it came from",
            this_rank_only=True,
        ) from error


def _import_deepspeed(ranks: Ranks) -> ModuleType:
    on_cpu = ranks.device.type == "cpu"
    if on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    module: ModuleType = deepspeed
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # it passes weights_only=False everywhere
    torch.serialization.add_safe_globals(safe_names())
    if on_cpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return module
