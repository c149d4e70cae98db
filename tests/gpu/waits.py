"""Where the host waits for the GPU inside training steps: counted, and refused where not known.

A patch for a rank: torch's sync debug mode, and a look at the waits that it does not see, around
the steps of the real loop. On a CPU, which nobody waits for, the known waits are only counted.
"""

import json
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
import transformers
from deepspeed.runtime.zero import stage_1_and_2

import mgc_dist
from mgc_dist.training import loop

RECORDED = range(5, 9)
"""Steps whose waits are written down; the census of gradients, which waits, ends with the third."""
STRICT = range(9, 12)
"""Steps in which a wait that is not known is an error."""
KNOWN = {
    "utils.py:mask_nan_or_inf_with_val_inplace": "DeepSpeed: the norm of each group of parameters",
    "utils.py:is_invalid_grad_norm": "DeepSpeed: whether the norm is finite, clipping once a group",
    "meters.py:_settle": "ours: the loss and the stop flag of the step before",
}
"""In float32 and under autocast, at stages 1 and 2."""
_WHERE = tuple(
    str(Path(str(module.__file__)).parent) for module in (mgc_dist, deepspeed, transformers)
)


def watch(file: Path, rank: int) -> None:
    """Write down the waits of some steps of this rank, and refuse unknown ones in some others."""
    _Waits(file).install()


class _Waits:
    def __init__(self, file: Path) -> None:
        self._file, self._mode = file, "default"
        self._places: Counter[str] = Counter()
        self._calls: Counter[str] = Counter()

    def install(self) -> None:
        for owner in (torch.cuda, torch.cuda.Event, torch.cuda.Stream):
            owner.synchronize = self._noted(owner.synchronize)
        for name in ("mask_nan_or_inf_with_val_inplace", "is_invalid_grad_norm"):
            inner = getattr(stage_1_and_2, name)
            setattr(stage_1_and_2, name, self._excused(name, inner))
        begin = loop.begin_step

        def beginning(run: Any, step: int) -> None:
            self._enter(step)
            begin(run, step)

        loop.begin_step = beginning

    def _enter(self, step: int) -> None:
        self._mode = "warn" if step in RECORDED else "default"
        if step in STRICT:
            self._mode = "error"
        if step == STRICT.stop:
            found = {"places": self._places, "calls": self._calls}
            self._file.write_text(json.dumps(found | {"steps": len(RECORDED)}))
        self._set(self._mode)

        if step == RECORDED.start:
            warnings.simplefilter("always")
            show = warnings.showwarning

            def note(message: Warning | str, *rest: Any) -> None:
                if "synchroniz" in str(message):
                    self._note(raises=False)
                else:
                    show(message, *rest)

            warnings.showwarning = note

    def _set(self, mode: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode(mode)

    def _excused(self, name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        def waiting(*args: Any, **words: Any) -> Any:
            self._calls[name] += self._mode == "warn"
            if self._mode == "error":
                self._set("default")
            try:
                return inner(*args, **words)
            finally:
                self._set(self._mode)

        return waiting

    def _noted(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def waiting(*args: Any, **words: Any) -> Any:
            self._note(raises=True)
            return inner(*args, **words)

        return waiting

    def _note(self, *, raises: bool) -> None:
        frames = [f for f in traceback.extract_stack() if f.filename.startswith(_WHERE)]
        place = f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else "elsewhere"
        self._places[place] += self._mode == "warn"
        if raises and self._mode == "error" and place not in KNOWN:
            raise RuntimeError(f"the host waits for the GPU in {place}")
