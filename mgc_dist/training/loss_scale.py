"""The factor that keeps small gradients of a loss from vanishing in float16.

It moves as torch.amp.GradScaler's does: halved where a gradient is not finite, doubled after 2000
steps that were. DeepSpeed 0.19 uses GradScalers itself, and here they are switched off. At stages
1 to 3 it clips before they have taken their factor out, and never halves it where a step is
skipped, so that the skipping does not end (measured). No checkpoint has their state.

Source: Micikevicius et al., "Mixed precision training", ICLR 2018, section 3.2.
"""

from dataclasses import dataclass

_INTERVAL = 2000


@dataclass
class LossScale:
    """The factor, the same on all ranks, which see the same steps.

    Attributes:
        value: that the loss is multiplied by.
        steps: taken since it last moved.
    """

    value: float = 2.0**16
    steps: int = 0

    def follow(self, applied: bool) -> None:
        """Move after an optimizer step, which was applied or, with an overflow, was not."""
        self.steps += 1
        if applied and self.steps < _INTERVAL:
            return
        self.value *= 2.0 if applied else 0.5
        self.steps = 0
