"""The one exception that a user is meant to read."""

from collections.abc import Callable


class UserError(Exception):
    """Something that the user can put right: printed without a traceback, exit code 2.

    No ValueError: tyro would catch that and print it in its own style.

    Args:
        what: what is wrong, naming the flag, file or key that the user typed.
        got: the value that was met.
        expected: what would have been accepted.
        cure: what to do, with the command where there is one.
        this_rank_only: other ranks may not have met it, so every rank prints it.
    """

    def __init__(
        self, what: str, *, got: object, expected: str, cure: str, this_rank_only: bool = False
    ) -> None:
        super().__init__(f"{what}: got {got}, expected {expected}\n  {cure}")
        self._parts = (what, str(got), expected, cure, this_rank_only)
        self.this_rank_only = this_rank_only

    def __reduce__(self) -> tuple[Callable[..., "UserError"], tuple[object, ...]]:
        """Travel between processes: rank 0 tells the others what is wrong."""
        return _rebuild, self._parts


def _rebuild(what: str, got: str, expected: str, cure: str, this_rank_only: bool) -> UserError:
    return UserError(what, got=got, expected=expected, cure=cure, this_rank_only=this_rank_only)
