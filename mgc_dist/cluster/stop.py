"""What asks a run to stop: signals, a time limit, a launcher that is gone.

All of it is recorded here and acted on at the next step boundary, where all ranks agree.
Imports nothing heavy: the handlers must stand before `import torch`, because a signal that
arrives earlier kills the rank ("srun: task 0: User defined signal 1").
"""

import ctypes
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
"""That ask for a stop."""
_PR_SET_PDEATHSIG = 1
_LAUNCHERS = (
    "deepspeed.launcher.launch",
    "torch.distributed.run",
    "torchrun",
    "bin/accelerate",
    "accelerate.commands.launch",
)


class Stop:
    """Records the last of the signals SIGTERM, SIGINT, SIGUSR1 and SIGHUP.

    Attributes:
        signal: number of the signal, 0 while none has come.
        started_at_s: time.monotonic() when the process began to listen.
    """

    def __init__(self) -> None:
        self.signal = 0
        self.started_at_s = time.monotonic()
        self._runner = 0

    def listen(self) -> "Stop":
        """Install the handlers, if this thread may; safe to be signalled any number of times."""
        nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # its users want to go on
        for number in SIGNALS if may_listen() else ():
            if number != signal.SIGHUP or not nohup:
                signal.signal(number, self._record)
        return self

    def follow_launcher(self) -> "Stop":
        """Be stopped when the launcher of this rank ends, however it ends.

        `deepspeed` starts launch.py, which starts the ranks. launch.py killed: the kernel sends
        SIGTERM here. `deepspeed` killed, or ended by Ctrl-C: it tells nobody, so launch.py's
        parent is remembered, and `launcher_is_gone` asks whether it has changed. Started by a
        shell or by Slurm, a rank follows nobody.
        """
        parent = os.getppid()
        if not _is_launcher(parent):
            return self
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before prctl
            self.signal = signal.SIGTERM
        if _is_launcher(parent, _LAUNCHERS[:1]):
            self._runner = _parent_of(parent)
        return self

    def launcher_is_gone(self) -> bool:
        """Whether the process that started our launcher has ended."""
        return bool(self._runner) and _parent_of(os.getppid()) != self._runner

    def record(self, number: int) -> None:
        """Ask for a stop as a signal would."""
        self.signal = number

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.signal = number


def given_to_deepspeed(name: str) -> str:
    """An environment variable as `deepspeed` itself was started with it; "" if it started no rank.

    It changes CUDA_VISIBLE_DEVICES before it starts launch.py, which starts the ranks.
    """
    launch = os.getppid()
    if not _is_launcher(launch, _LAUNCHERS[:1]):
        return ""
    try:
        content = Path(f"/proc/{_parent_of(launch)}/environ").read_bytes()
    except OSError:
        return ""
    pairs = (line.partition("=") for line in content.decode(errors="replace").split("\0"))
    return next((value for key, _, value in pairs if key == name), "")


def may_listen() -> bool:
    """Whether this thread may install handlers: "signal only works in main thread"."""
    return threading.current_thread() is threading.main_thread()


def describe(number: int) -> str:
    """Name of a signal number, as people write it."""
    return signal.Signals(number).name


def _is_launcher(pid: int, names: tuple[str, ...] = _LAUNCHERS) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return False
    return any(name in words for name in names)


def _parent_of(pid: int) -> int:
    """Parent of a process; 0 if it is gone."""
    try:
        content = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(content.rpartition(")")[2].split()[1])
