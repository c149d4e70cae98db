"""Does the host wait for the device inside a step? Who asks a tensor for numbers, and where.

On a CPU nobody waits, but the calls that would on a GPU are the same: numbers taken from a tensor,
copies to the host, indexing by a mask (which counts its ones). Each is noted with the innermost
function of this package or of a library that made it.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_ranks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from trainings import config

from mgc_dist import train
from mgc_dist.training import loop
from mgc_dist.training.engine import Engine
from mgc_dist.training.logbook import _clock
from mgc_dist.training.losses import Objective
from mgc_dist.training.meters import Census, Tally

Place = tuple[str, str]
"""File below site-packages or mgc_dist, and function."""

_NUMBERS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal")
_COPIES = ("cpu", "tolist", "numpy")
_LIBRARIES = ("/mgc_dist/", "/deepspeed/", "/transformers/")


def place() -> Place:
    """The innermost function of ours or of a library that is running."""
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        for library in _LIBRARIES:
            if library in file and "/tests/" not in file:
                return library.strip("/") + "/" + file.rsplit(library, 1)[1], frame.f_code.co_name
        assert frame.f_back is not None
        frame = frame.f_back
    raise AssertionError("nobody called")


class Dispatched(TorchDispatchMode):
    """Notes operators whose result has to come to the host."""

    def __init__(self, seen: set[Place]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        masked = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in _NUMBERS or masked:
            self.seen.add(place())
        return func(*args, **(kwargs or {}))


class Called(TorchFunctionMode):
    """Notes methods that copy to the host; on a CPU they dispatch nothing."""

    def __init__(self, seen: set[Place]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _COPIES and isinstance(args[0], torch.Tensor):
            self.seen.add(place())
        return func(*args, **(kwargs or {}))


def waits_of(settings: Any, wrong: bool = False) -> set[Place]:
    """Train; who took numbers to the host in the steps after the census, log lines left out."""
    seen: set[Place] = set()

    def watch(kind: type, name: str, is_watched: Callable[[], bool]) -> None:
        own = getattr(kind, name)

        def watched(*args: Any) -> Any:
            if not is_watched():
                return own(*args)
            with Dispatched(seen), Called(seen):
                return own(*args)

        setattr(kind, name, watched)

    if wrong:
        lose = Objective.micro_loss

        def waiting(self: Any, *args: Any) -> Any:
            lost = lose(self, *args)
            assert _clock(float(lost.share))
            return lost

        Objective.micro_loss = waiting  # type: ignore[method-assign]
    closed = [False]
    add = Census.add

    def census(self: Any, grads: Any) -> None:
        add(self, grads)
        closed[0] = not self.is_open

    Census.add = census  # type: ignore[method-assign]
    for kind, name in (
        (loop, "forward"),
        (loop.Refusals, "keep"),
        (loop.Refusals, "all_note"),
        (loop.Deadline, "is_up"),
        (Engine, "backward"),
        (Engine, "step"),
        (Tally, "add"),
        (Tally, "reduce"),
    ):
        watch(kind, name, lambda: closed[0])
    train.run(replace(settings, output=replace(settings.output, log_every_steps=1000)))
    assert closed[0]
    return seen


HOST = {("mgc_dist/bias_model/table.py", "lookup"), ("mgc_dist/training/meters.py", "_settle")}
"""Row numbers, which are on the host; the copy of the step before, whose arrival is waited for."""
REFUSING = {
    0: {("mgc_dist/training/engine.py", "_is_finite_at_stage_0")},
    1: {("deepspeed/runtime/utils.py", "is_invalid_grad_norm")},
    2: {("deepspeed/runtime/utils.py", "is_invalid_grad_norm")},
    3: {("deepspeed/runtime/utils.py", "is_invalid_grad_norm")},
}
"""Once a step: a gradient that is not finite must not be applied."""


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_nobody_waits_but_for_the_norm_of_the_gradient(
    stage: int, shards: Path, table: Path, tiny_model: Path, tmp_path: Path
) -> None:
    settings = config(shards, tiny_model, tmp_path / "run", zero_stage=stage, epochs=0.8)
    assert run_ranks(1, waits_of, settings) == [HOST | REFUSING[stage]]


def test_nobody_waits_for_dropout_and_masks(
    shards: Path, table: Path, noisy: Path, tmp_path: Path
) -> None:
    """Transformers' own SpecAugment indexes by a mask, whose ones have to be counted."""
    settings = config(shards, noisy, tmp_path / "run", epochs=0.8)
    assert run_ranks(1, waits_of, settings) == [HOST | REFUSING[2]]


def test_a_number_taken_in_the_step_is_seen(
    shards: Path, table: Path, tiny_model: Path, tmp_path: Path
) -> None:
    settings = config(shards, tiny_model, tmp_path / "run", epochs=0.8)
    (found,) = run_ranks(1, waits_of, settings, True)
    assert found - HOST - REFUSING[2] == {("mgc_dist/training/loop.py", "forward")}
