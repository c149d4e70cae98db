"""What ends a command: errors that a person is meant to read, and the exit codes of all.

0   done; or stopped on request and saved (the run folder then holds REQUEUE)
1   what nobody has foreseen: a defect, with its traceback in a file
2   usage or input that the user can put right: starting again as it is would not help
65  there are checkpoints, and none of them is whole; or all that were saved are gone
70  losses or gradients were not finite, too often in a row
74  a file cannot be read or written, such as on a full disk
75  something passing: a rank was lost, or hung; the same command may go on
"""

from collections.abc import Callable
from typing import Any

EXIT_BAD_INPUT = 2
EXIT_NO_CHECKPOINT = 65  # sysexits.h: EX_DATAERR
EXIT_NON_FINITE = 70  # EX_SOFTWARE
EXIT_IO = 74  # EX_IOERR
EXIT_TEMPORARY = 75  # EX_TEMPFAIL
EXIT_BROKEN_PIPE = 141  # as a shell reports SIGPIPE: the work was not finished


class UserError(Exception):
    """Something that the user can put right: printed without a traceback, exit code 2.

    No ValueError: tyro would catch that and print it in its own style.

    Args:
        what: what is wrong, naming the flag, file or key that the user typed.
        got: the value that was met.
        expected: what would have been accepted.
        cure: what to do, with the command where there is one.
        this_rank_only: other ranks may not have met it, so every rank prints it.
        exit_code: where it is not 2.
    """

    def __init__(
        self,
        what: str,
        *,
        got: object,
        expected: str,
        cure: str,
        this_rank_only: bool = False,
        exit_code: int = EXIT_BAD_INPUT,
    ) -> None:
        super().__init__(f"{what}: got {got}, expected {expected}\n  {cure}")
        self._parts = (what, str(got), expected, cure, this_rank_only, exit_code)
        self.this_rank_only = this_rank_only
        self.exit_code = exit_code

    @property
    def parts(self) -> dict[str, Any]:
        """The arguments that it was made of; JSON can hold them."""
        names = ("what", "got", "expected", "cure", "this_rank_only", "exit_code")
        return dict(zip(names, self._parts, strict=True))

    def __reduce__(self) -> tuple[Callable[..., "UserError"], tuple[object, ...]]:
        """Travel between processes: rank 0 tells the others what is wrong."""
        return _rebuild, self._parts


def _rebuild(
    what: str, got: str, expected: str, cure: str, this_rank_only: bool, exit_code: int
) -> UserError:
    return UserError(
        what,
        got=got,
        expected=expected,
        cure=cure,
        this_rank_only=this_rank_only,
        exit_code=exit_code,
    )


class RunFailed(Exception):
    """A run that cannot go on, through nobody's typing; printed without a traceback.

    Args:
        message: what happened, and what is kept.
        exit_code: as listed above.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message, exit_code)
        self.message = message
        self.exit_code = exit_code

    def __str__(self) -> str:
        return self.message


class PeerLost(RunFailed):
    """Another rank is gone or hangs: the process group cannot be used any more, nor left."""

    def __init__(self, message: str, exit_code: int = EXIT_TEMPORARY) -> None:
        super().__init__(message, exit_code)


def exit_code_of(error: BaseException) -> int:
    """The exit code that an exception ends its process with."""
    if isinstance(error, UserError | RunFailed):
        return error.exit_code
    return EXIT_IO if isinstance(error, OSError) else 1
