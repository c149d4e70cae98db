"""Weights and optimizer of the DeepSpeed engine: to files, and back on any number of ranks.

Checkpoints go through torch's restricted unpickler, with the few names that DeepSpeed needs: a
stranger's pickle is refused before it runs. DeepSpeed is imported inside functions: it looks at its
environment when it is, which `engine` has set by then.
"""

import argparse
import contextlib
import glob
import io
import pickle
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mgc_dist.cluster.ranks import Ranks
from mgc_dist.errors import EXIT_IO, UserError
from mgc_dist.training import average
from mgc_dist.training.average import Average, Part
from mgc_dist.training.loss_scale import LossScale


class EngineState:
    """What a DeepSpeed engine holds, saved, restored and gathered.

    Args:
        engine: of DeepSpeed; its way to files is made safe here.
        ranks: who takes part.
        zero_stage: 0 to 3.
        settings: the configuration that DeepSpeed was given.
        peak_lrs: of the parameter groups.
        ema_decay: of the averages of the trained weights; 0 keeps none.
        keeps_frozen: checkpoints hold frozen weights too; else the model must have the same
            already when they are loaded, as its fingerprint in a run's identity says.
        loss_scale: of the loss in float16; None elsewhere.

    Attributes:
        loss_scale: as given; a checkpoint brings its own.
        average: of the weights; None where none is kept.
    """

    def __init__(
        self,
        engine: Any,  # noqa: ANN401 - DeepSpeed has no types
        ranks: Ranks,
        *,
        zero_stage: int,
        settings: dict[str, Any],
        peak_lrs: Sequence[float],
        ema_decay: float = 0.0,
        keeps_frozen: bool = True,
        loss_scale: LossScale | None = None,
    ) -> None:
        self.loss_scale = loss_scale
        self._keeps_frozen = keeps_frozen
        self._engine = engine
        self._ranks = ranks
        self._zero_stage = zero_stage
        self._settings = settings
        self._peak_lrs = peak_lrs
        self._files = _Files(engine.checkpoint_engine)
        engine.checkpoint_engine = self._files
        copy_tools = engine._copy_recovery_script  # zero_to_fp32.py, for stock tools
        engine._copy_recovery_script = lambda folder: self._files.hold(copy_tools, folder)
        self.average = Average(ema_decay, self._parts()) if ema_decay else None

    def save(self, folder: Path, tag: str, state: dict[str, Any]) -> list[Path]:
        """Write this rank's part of a checkpoint (a collective).

        Returns:
            The files that this rank has written.

        Raises:
            OSError, RuntimeError: a file could not be written; all ranks have got to the end
                of the collectives nevertheless.
        """
        self._files.begin()
        client: dict[str, Any] = {"mgc_dist": state}
        if self.loss_scale:
            client["mgc_dist_loss_scale"] = asdict(self.loss_scale)
        self._engine.save_checkpoint(
            str(folder),
            tag=tag,
            client_state=client,
            save_latest=False,
            exclude_frozen_parameters=not self._keeps_frozen,
        )
        if self.average and (self._zero_stage > 0 or self._ranks.is_first):
            name = average.FILES.replace("*", f"{self._ranks.rank:05d}")
            self._files.save(self.average.saved(), str(folder / tag / name))
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
        if not reshape or self._zero_stage == 0:  # stage 0 holds everything on every rank
            state = self._load(checkpoint)
        else:
            state = self._load_reshaped(checkpoint)
        self._restore_average(checkpoint)
        return state

    def _load_reshaped(self, checkpoint: Path) -> dict[str, Any]:
        universal = checkpoint.with_name(f"tmp-universal-{checkpoint.name}")
        self._ranks.all_decide(lambda: _convert(checkpoint, universal))
        config = self._engine._config
        config.load_universal_checkpoint = True
        try:
            state = self._load(universal)
        finally:
            config.load_universal_checkpoint = False
        if self._zero_stage == 3:
            self._repair_stage_3()
        self._ranks.barrier()
        if self._ranks.is_first:
            shutil.rmtree(universal)
        return state

    def _restore_average(self, checkpoint: Path) -> None:
        """The averages of a checkpoint; without any, `--change ema-decay` has asked for them."""
        if self.average is None:
            return
        files = sorted(checkpoint.glob(average.FILES))
        if not files:
            self.average.restart()
            return
        with _refusing_code(checkpoint):
            self.average.restore(files)

    def _load(self, checkpoint: Path) -> dict[str, Any]:
        with _refusing_code(checkpoint), _without_patterns(checkpoint.parent) as root:
            path, client = self._engine.load_checkpoint(
                str(root), tag=checkpoint.name, load_module_strict=self._keeps_frozen
            )
        if path is None:
            raise RuntimeError(f"DeepSpeed loaded nothing from {checkpoint}")
        self._keep_settings()
        if self.loss_scale:  # without one, `--change precision` has asked for float16
            self.loss_scale = LossScale(**client.get("mgc_dist_loss_scale", {}))
        state: dict[str, Any] = client["mgc_dist"]
        return state

    def _keep_settings(self) -> None:
        """Undo that a checkpoint brings along the weight decay and the clipping it was made with.

        DeepSpeed 0.19 restores both without a word (clipping at stages 1 and 2 only).
        """
        optimizer = self._engine.optimizer
        for group in optimizer.param_groups:
            group["weight_decay"] = self._settings["optimizer"]["params"]["weight_decay"]
        if self._zero_stage > 0:
            optimizer.clip_grad = self._settings["gradient_clipping"]

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

    def _parts(self) -> list[Part]:
        """What this rank owns of the optimizer's float32 copies of the trained weights."""
        found = []
        for name, parameter in self._engine.module.named_parameters():
            part = self._part_of(parameter) if parameter.requires_grad else None
            if part is not None:
                start, weight = part
                found.append(Part(name=name, start=start, weight=weight.detach()))
        return found

    def _part_of(
        self,
        parameter: Any,  # noqa: ANN401 - DeepSpeed adds to it
    ) -> tuple[int, Tensor] | None:
        """First element, and float32 memory [n]; None where this rank owns nothing of it."""
        if self._zero_stage == 0:
            return 0, parameter.view(-1)
        if self._zero_stage < 3:
            mapping = parameter._hp_mapping
            return mapping and (mapping.lp_fragment_address.start, mapping.get_hp_fragment())
        # safe_get_local_fp32_param copies what lies on the host
        find = self._engine.optimizer._get_fp32_opt_state_partition
        mine, _ = find(parameter, release_swap_buffers=True)
        start = self._ranks.rank * mine.numel()
        length = min(mine.numel(), parameter.ds_numel - start)  # the last ones are padded
        return (start, mine[:length]) if length > 0 else None

    def all_exchange(self) -> None:
        """Compute with the averages and keep the weights aside; or go back (a collective).

        The weights are the same bits afterwards: what is computed with is always a copy of what
        the optimizer holds.
        """
        assert self.average
        self.average.exchange()
        optimizer = self._engine.optimizer
        if self._zero_stage in (1, 2):
            optimizer.update_lp_params()
        elif self._zero_stage == 3:  # as DeepSpeed's own step ends
            optimizer._partition_all_parameters()
            for group in range(len(optimizer.fp16_groups)):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
            optimizer._post_step(())

    def all_weights(self) -> dict[str, Tensor]:
        """Full float32 weights on the CPU of rank 0, {} elsewhere (a collective)."""
        module: nn.Module = self._engine.module
        weights: dict[str, Tensor] = {}
        for name, parameter in module.named_parameters():
            full = self._all_of(parameter)
            if self._ranks.is_first:
                weights[name] = full.float().cpu().clone()
        if self._ranks.is_first:
            kept = module.state_dict(keep_vars=True)
            for name, buffer in module.named_buffers():
                if name in kept:
                    weights[name] = buffer.detach().cpu().clone()
        return weights

    def _all_of(
        self,
        parameter: Any,  # noqa: ANN401 - DeepSpeed adds to it
    ) -> Tensor:
        """A whole weight, where it is trained the optimizer's float32 copy (a collective)."""
        from deepspeed.utils import safe_get_full_fp32_param

        full: Tensor
        if parameter.requires_grad and (self._settings.get("bf16") or self._zero_stage == 3):
            full = safe_get_full_fp32_param(parameter)
            return full
        if self._zero_stage < 3:
            full = parameter.detach()
            return full
        # GatheredParameters gives what a pass left there: under autocast, rounded to bf16
        part = parameter.ds_tensor.detach()
        parts = part.new_empty(self._ranks.world * part.numel())
        torch.distributed.all_gather_into_tensor(parts, part.contiguous())
        full = parts[: parameter.ds_numel].view(parameter.ds_shape)
        return full


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


def whole_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Weights that a verified checkpoint holds outside of the optimizer, whole and on the CPU.

    At stage 3 these are buffers, and the frozen ones, put together from the parts of all ranks.
    """
    files = list(checkpoint.glob("*_model_states.pt"))
    files.sort(key=lambda file: [int(number) for number in re.findall(r"\d+", file.name)])
    with _refusing_code(checkpoint):
        states = [
            torch.load(file, map_location="cpu", weights_only=True, mmap=True) for file in files
        ]
    if not files[0].name.startswith("zero_pp_rank"):
        return dict(states[0]["module"])
    buffers = {name: states[0]["module"][name] for name in states[0]["buffer_names"]}
    return buffers | {
        name: torch.cat([each["frozen_param_fragments"][name] for each in states])[
            : shape.numel()
        ].view(shape)
        for name, shape in (states[0]["frozen_param_shapes"] or {}).items()
    }


def _convert(checkpoint: Path, universal: Path) -> None:
    """Rewrite a checkpoint as DeepSpeed's universal one, which any world size reads (rank 0)."""
    from deepspeed.checkpoint import ds_to_universal

    shutil.rmtree(universal, ignore_errors=True)
    try:
        with _refusing_code(checkpoint), _without_patterns(checkpoint.parent) as root:
            _run_converter(ds_to_universal.main, root / checkpoint.name, root / universal.name)
    except (OSError, RuntimeError) as error:  # torch's writer says "unexpected pos" of a full disk
        shutil.rmtree(universal, ignore_errors=True)  # at once: it may be what fills the disk
        raise UserError(
            f"checkpoint {checkpoint}, to be carried to another number of ranks",
            got=f"{' '.join(str(error).split())[:200]} while {universal.name} was written",
            expected="to read it, and room for another two of its size beside it",
            cure="make room, or go on with as many ranks as before: nothing is lost",
            exit_code=EXIT_IO,
        ) from error
    except BaseException:
        shutil.rmtree(universal, ignore_errors=True)
        raise


def _run_converter(
    convert: Callable[[argparse.Namespace], object], checkpoint: Path, universal: Path
) -> None:
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
    with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        convert(words)


@contextlib.contextmanager
def _without_patterns(folder: Path) -> Iterator[Path]:
    """A folder by a name without brackets: DeepSpeed seeks files by `glob`, and would find none."""
    if glob.escape(str(folder)) == str(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory() as aside:
        link = Path(aside, "checkpoints")
        link.symlink_to(folder.resolve(), target_is_directory=True)
        yield link


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
