"""A census of gradients in the first steps: does everything learn that should?

Some combinations of model, ZeRO stage and compiler lose gradients without a word, while the loss
looks right: ZeRO-3 with torch.compile lost 103 of 105 (docs/design.md).
"""

from collections.abc import Iterable

from torch import Tensor, nn

from mgc_dist.errors import UserError

STEPS = 3
"""Steps in which every trained parameter must have had a gradient; one is nearly always enough."""
EXEMPT = ("k_proj.bias",)
"""Their true gradient is zero: softmax does not see what is added to all keys."""


class Census:
    """Which trained parameters have had a gradient that is not zero.

    Args:
        model: the main model, before training.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._steps = 0
        self._missing = {
            name
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and not name.endswith(EXEMPT)
        }

    @property
    def is_open(self) -> bool:
        """Whether gradients are still wanted."""
        return bool(self._missing) and self._steps < STEPS

    def add(self, grads: Iterable[tuple[str, Tensor]]) -> None:
        """Look at the gradients of a step; one that is not finite makes it a step that counts not.

        Args:
            grads: of the whole global batch, by parameter name; all are taken.

        Raises:
            UserError: after STEPS steps a trained parameter has had none, or a frozen one has.
        """
        found = {name: (bool(grad.isfinite().all()), bool(grad.any())) for name, grad in grads}
        if not all(finite for finite, _ in found.values()):
            return
        self._steps += 1
        self._missing -= {name for name, (_, learns) in found.items() if learns}
        if self._missing and self._steps == STEPS:
            self._refuse(
                f"no gradient for {len(self._missing)}, such as {min(self._missing)}",
                "a gradient for every trained parameter",
            )
        touched = [
            name
            for name, parameter in self._model.named_parameters()
            if not parameter.requires_grad and parameter.grad is not None
        ]
        if touched:
            self._refuse(f"a gradient for the frozen {touched[0]}", "none for frozen parameters")

    def _refuse(self, got: str, expected: str) -> None:
        raise UserError(
            f"gradients of the first {self._steps} steps",
            got=got,
            expected=expected,
            cure="freeze what the model does not use, or try --zero-stage 2 without --compile",
        )
