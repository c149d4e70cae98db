"""An exponential moving average of the trained weights, in the parts of them that a rank owns.

After each optimizer step each average moves to its weight by 1 - decay of their difference, in
float32. It starts from the weights that training starts from, so a run of fewer than 3 / (1 -
decay) steps ends with more than 5 % of those in it.

Source: Tarvainen and Valpola, "Mean teachers are better role models", NeurIPS 2017, section 2;
torch.optim.swa_utils has the formula.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

FILES = "average-*.pt"
"""In a checkpoint: name of a weight -> first element and values of the part, one file a rank."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a rank owns of a trained weight.

    Attributes:
        name: of the weight.
        start: its first element, in the flattened weight.
        weight: float32 [n], the memory that the optimizer updates.
    """

    name: str
    start: int
    weight: Tensor


class Average:
    """The averages of a rank's parts.

    Args:
        decay: above 0 to below 1.
        parts: of this rank; those of all ranks make up the trained weights.
    """

    def __init__(self, decay: float, parts: Sequence[Part]) -> None:
        self._parts = parts
        self._weights = [part.weight for part in parts]
        self._values = [weight.clone() for weight in self._weights]
        self._average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]

    def update(self) -> None:
        """Follow an optimizer step that was taken."""
        if self._values:
            self._average(self._values, self._weights, 0)

    def restart(self) -> None:
        """Begin from the weights as they are."""
        for value, weight in zip(self._values, self._weights, strict=True):
            value.copy_(weight)

    def exchange(self) -> None:
        """Put the averages where the weights are, and the weights aside; or back, to the bit."""
        for value, weight in zip(self._values, self._weights, strict=True):
            kept = weight.clone()
            weight.copy_(value)
            value.copy_(kept)

    def saved(self) -> dict[str, tuple[int, Tensor]]:
        """As it stands in a checkpoint."""
        found = zip(self._parts, self._values, strict=True)
        return {part.name: (part.start, value) for part, value in found}

    def restore(self, files: Iterable[Path]) -> None:
        """Take what this rank owns from the files of all ranks of a verified checkpoint.

        The ranks may have been other ones: parts are cut and put together.

        Raises:
            pickle.UnpicklingError: a file would run code.
        """
        missing = sum(value.numel() for value in self._values)
        for file in files:
            saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            for part, value in zip(self._parts, self._values, strict=True):
                if part.name in saved:
                    missing -= _copy_common(part.start, value, *saved[part.name])
        assert missing == 0


def _copy_common(start: int, value: Tensor, their_start: int, theirs: Tensor) -> int:
    """Copy the elements that two parts of a weight have in common; returns how many."""
    first = max(start, their_start)
    count = min(start + len(value), their_start + len(theirs)) - first
    if count <= 0:
        return 0
    value[first - start : first - start + count].copy_(
        theirs[first - their_start : first - their_start + count]
    )
    return count
