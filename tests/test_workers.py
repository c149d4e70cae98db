"""Work in processes: in order, with its errors, and no orphans."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mgc_dist.errors import UserError
from mgc_dist.workers import keep_memory, spread


def square(number: int) -> int:
    if number == 1313:
        raise ValueError("unlucky")
    if number == 1314:
        os.kill(os.getpid(), signal.SIGKILL)
    return number**2


@pytest.mark.parametrize("jobs", [1, 2])
def test_results_come_in_the_order_of_the_items(jobs: int) -> None:
    assert list(spread(square, range(100), jobs)) == [n**2 for n in range(100)]
    assert list(spread(square, [], jobs)) == []
    with pytest.raises(ValueError, match="unlucky"):
        list(spread(square, [1, 1313, 2], jobs))


def test_items_are_not_read_far_ahead() -> None:
    taken = []
    stream = spread(square, (taken.append(n) or n for n in range(10_000)), 2)
    next(stream)
    stream.close()
    assert len(taken) < 50


def test_a_killed_process_is_named() -> None:
    with pytest.raises(UserError, match=r"a worker process.*\n.*fewer --jobs"):
        list(spread(square, [1314], 2))


def test_no_worker_outlives_a_killed_parent(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, sys, time\n"
        "from mgc_dist.workers import spread\n"
        "def slow(n):\n"
        "    open(f'{sys.argv[1]}/{os.getpid()}', 'w').close()\n"
        "    time.sleep(60)\n"
        "if __name__ == '__main__':\n"
        "    list(spread(slow, range(4), 2))\n"
    )
    parent = subprocess.Popen([sys.executable, script, tmp_path])
    deadline = time.monotonic() + 60
    while len(found := [p.name for p in tmp_path.iterdir() if p.name.isdigit()]) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    while any(_runs(int(pid)) for pid in found):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_memory_may_be_kept_twice() -> None:
    keep_memory()
    keep_memory()
