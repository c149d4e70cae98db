"""A short hunt: a few random faults to the whole way. `make hunt` is the long one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_few_faults_leave_nothing(tmp_path: Path) -> None:
    words = ["--faults", "3", "--ranks", "2", "--seed", "1", "--work", str(tmp_path / "hunt")]
    done = subprocess.run(
        [sys.executable, str(HERE / "hunt.py"), *words],
        env=os.environ | {"PYTHONPATH": f"{HERE.parent}:{HERE}", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        check=False,
        timeout=2300,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    lines = (tmp_path / "hunt" / "faults.jsonl").read_text().splitlines()
    assert [json.loads(line)["outcome"] for line in lines] == ["ended"] * 3
