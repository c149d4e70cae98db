"""slurm/train.sbatch: which exit code, and whether it requeues. srun and scontrol are stand-ins."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "slurm" / "train.sbatch"


def submit(folder: Path, trainer: str) -> tuple[int, str]:
    """The batch script's exit code with a trainer of shell lines, and what scontrol was asked."""
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    for name, body in (
        ("srun", trainer),
        ("scontrol", '[ "$1" = show ] && echo node1 || echo "$@" >> requeued'),
        ("scancel", "true"),
    ):
        (tools / name).write_text(f"#!/bin/bash\nRUN=run\n{body}\n")
        (tools / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(folder),
        "SLURM_JOB_NODELIST": "node1",
        "SLURM_JOB_ID": "7",
    }
    done = subprocess.run(
        ["bash", str(SCRIPT), "--run", "run"], env=environment, capture_output=True, check=False
    )
    asked = folder / "requeued"
    return done.returncode, asked.read_text() if asked.exists() else ""


@pytest.mark.parametrize(
    ("before", "trainer", "code", "requeued"),
    [
        ("", "touch $RUN/DONE", 0, False),
        ("", "touch $RUN/DONE; exit 137", 0, False),  # srun merges codes: the file decides
        ("", "touch $RUN/REQUEUE", 0, True),
        ("", "exit 65", 65, False),
        ("", "exit 0", 1, False),  # a node that is lost may give 0
        ("DONE", "exit 0", 0, False),  # it says "already complete"
        ("DONE", "exit 2", 2, False),  # refused: --epochs differs from the complete run's
        ("DONE", "rm $RUN/DONE; touch $RUN/REQUEUE", 0, True),  # --change epochs, and stopped
        ("DONE", "rm $RUN/DONE; exit 75", 75, False),
        ("DONE", "rm $RUN/DONE; touch $RUN/DONE; exit 137", 0, False),
        ("REQUEUE", "exit 75", 75, False),  # a leftover
    ],
)
def test_the_files_of_this_try_decide(
    before: str, trainer: str, code: int, requeued: bool, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    if before:
        (tmp_path / "run" / before).touch()
    assert submit(tmp_path, trainer) == (code, "requeue 7\n" if requeued else "")
