"""Signals that ask a run to stop: recorded, and acted on at the next step boundary.

Imports nothing heavy: the handlers must stand before `import torch`, because a signal that
arrives earlier kills the rank ("srun: task 0: User defined signal 1").
"""

import signal
from types import FrameType


class Stop:
    """Records the last of the signals SIGTERM, SIGINT and SIGUSR1.

    Attributes:
        signal: number of the signal, 0 while none has come.
    """

    def __init__(self) -> None:
        self.signal = 0

    def listen(self) -> "Stop":
        """Install the handlers; safe to be signalled any number of times."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._record)
        return self

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
