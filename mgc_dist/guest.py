"""A command that Python code calls is a guest in its process, and leaves it as it was found.

A command line has no use for this: a signal that comes late must not end a process whose work is
done, and `cli.main` still asks the environment which rank this is.
"""

import gc
import logging
import os
import random
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from mgc_dist.cluster import stop
from mgc_dist.encoders import hub
from mgc_dist.training import engine


@contextmanager
def as_found() -> Iterator[None]:
    """A block that may train, after which the process is as it was before, and may train again.

    Given back are handlers of signals, logging, warnings, the environment, and what torch, numpy
    and `random` hold for a process. What stays: modules, the fonts that matplotlib holds open, on
    several ranks the store that they met at, malloc's habit to keep memory, a higher limit of open
    files. An exception that is kept alive keeps the memory of its run.
    """
    try:
        with (
            warnings.catch_warnings(),
            hub.heard_again(),
            _same_handlers(),
            _same_logging(),
            _same_environment(),
            _same_torch(),
        ):
            yield
    finally:
        engine.forget()
        for _ in range(2):  # engines refer to themselves, and their `__del__` keeps the groups once
            gc.collect()


@contextmanager
def _same_handlers() -> Iterator[None]:
    numbers = stop.SIGNALS if stop.may_listen() else ()
    handlers = [(number, signal.getsignal(number)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in handlers:
            signal.signal(number, handler)


@contextmanager
def _same_logging() -> Iterator[None]:
    names = ("mgc_dist", *(("DeepSpeed",) if "deepspeed" in sys.modules else ()))
    loggers = [logging.getLogger(name) for name in names]
    before = [(each, each.level, each.propagate, each.handlers[:]) for each in loggers]
    try:
        yield
    finally:
        for logger, level, propagate, handlers in before:
            for handler in set(logger.handlers) - set(handlers):
                handler.close()
            logger.setLevel(level)
            logger.propagate, logger.handlers[:] = propagate, handlers


@contextmanager
def _same_environment() -> Iterator[None]:
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


@contextmanager
def _same_torch() -> Iterator[None]:
    """Threads, random numbers, the current GPU, what may be unpickled, and its hook of a group."""
    threads, safe = torch.get_num_threads(), torch.serialization.get_safe_globals()
    hook, drawn, drawn_by_numpy = sys.excepthook, random.getstate(), np.random.get_state()
    has_gpu = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    gpu = torch.cuda.current_device() if has_gpu else None
    try:
        with torch.random.fork_rng(devices=[] if gpu is None else [gpu]):
            yield
    finally:
        sys.excepthook = hook
        torch.set_num_threads(threads)
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(safe)
        random.setstate(drawn)
        np.random.set_state(drawn_by_numpy)
        if gpu is not None:
            torch.cuda.set_device(gpu)
