"""The mark `gpu`: its tests run where `-m gpu` asks for them, and such a run fails without any.

Everywhere else GPUs are hidden from torch. conftest.py takes these hooks over; they import no
torch before a test does, because xdist's workers and the tests of these hooks read them too.
"""

import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import torch

_ON = "ran on the GPU"
"""Property of a test that had a GPU; it travels with the report from the workers of xdist."""
_FIGURE = "figure"
"""Property of a test that has measured something."""


def asks_for_gpu(config: pytest.Config) -> bool:
    """Whether tests of a GPU are asked for by their mark, as `-m gpu` does."""
    words = str(config.option.markexpr)
    return bool(re.search(r"\bgpu\b", words)) and not re.search(r"\bnot\s+gpu\b", words)


def pytest_configure(config: pytest.Config) -> None:
    if not asks_for_gpu(config):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not hasattr(config, "workerinput"):
        config.pluginmanager.register(_CountGpuTests(config))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is None:
        return
    if not asks_for_gpu(item.config):
        pytest.skip("a test of the GPU, which is hidden: ask for these with -m gpu")
    import torch

    if not torch.cuda.is_available():
        pytest.skip("NO GPU HERE, nothing about GPUs is shown: torch.cuda.is_available() is False")
    item.user_properties.append((_ON, "yes"))


class _CountGpuTests:
    """Fails a run that asked for tests of a GPU and had none that ran on one; shows its figures."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._ran, self._only_collects = 0, bool(config.option.collectonly)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        on_gpu = any(name == _ON for name, _ in report.user_properties)
        self._ran += on_gpu and report.when == "call" and report.outcome != "skipped"
        writer = self._config.get_terminal_writer()
        if report.when == "teardown":  # now, because a visit may be cut off before the end
            for name, value in report.user_properties:
                if name == _FIGURE:
                    writer.line(f"\n{report.nodeid.rpartition('::')[2]}: {value}")

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if not self._ran and not self._only_collects:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if not self._ran and not self._only_collects:
            terminalreporter.section("NO GPU TEST RAN, and -m gpu asks for them", red=True)


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> "torch.device":
    """Where a test of the GPU runs: on the CPU, which rehearses it, and with `-m gpu` there."""
    import torch

    return torch.device(request.param)


@pytest.fixture
def tell(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Says what a test has measured: on a GPU also where it passes."""

    def say(text: str) -> None:
        print(text)
        record_property(_FIGURE, text)

    return say
