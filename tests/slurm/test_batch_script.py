"""slurm/train.sbatch: which exit code, and whether it requeues. srun and scontrol are stand-ins."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

SLURM = Path(__file__).resolve().parents[2] / "slurm"
TRIED = """
status() { printf '{\\n "state": "x",\\n "attempt": "%s",\\n "first_step": %s%s\\n}' $1 $2 "$3" \\
    > $RUN/status.json; }
reached() { mkdir -p $RUN/heartbeats
    echo "{\\"rank\\": 1, \\"step\\": $2, \\"phase\\": \\"x\\"}" \\
        > $RUN/heartbeats/$1-rank00001.json; }
saved() { mkdir -p $RUN/checkpoints/step-$1; }
failed() { status $1 $2; reached $1 $3; exit 137; }
code() { status $1 0 ",
 \\"exit_code\\": $2,
 \\"reason\\": \\"PeerLost: a, \\\\\\"b\\\\\\"\\""; reached $1 9; exit 137; }
"""


def submit(
    folder: Path, trainer: str, *, run: str = "run", flag: str = "--run", **variables: str
) -> tuple[int, str, str]:
    """The batch script with a trainer of shell lines: its exit code, what scontrol was asked, and
    what it said.
    """
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    (folder / "requeued").unlink(missing_ok=True)
    if not (folder / "slurm").exists():
        (folder / "slurm").symlink_to(SLURM)
    for name, body in (
        ("srun", TRIED + trainer),
        ("scontrol", '[ "$1" = show ] && echo node1 || echo "$@" >> requeued'),
        ("scancel", "true"),
    ):
        (tools / name).write_text(f"#!/bin/bash\nRUN={shlex.quote(run)}\n{body}\n")
        (tools / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(folder),
        "SLURM_JOB_NODELIST": "node1",
        "SLURM_JOB_ID": "7",
    }
    done = subprocess.run(
        ["bash", str(SLURM / "train.sbatch"), flag, run],
        env=environment | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    asked = folder / "requeued"
    said = done.stdout + done.stderr
    return done.returncode, asked.read_text().strip() if asked.exists() else "", said


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
        ("", "failed a 0 3", 0, True),  # three steps, then a rank was killed
        ("", "failed a 20 21", 0, True),  # resumed at 20
        ("", "failed a 20 20", 137, False),  # no step was gained
        ("", "status a 0; exit 137", 137, False),  # nobody has told of a step
        ("", "code a 75", 0, True),  # a rank was lost: rank 0 has said so
        ("", "code a 2", 2, False),
        ("", "code a 65", 65, False),
        ("", "code a 70", 70, False),
        ("", "code a 74", 74, False),
        ("", "touch $RUN/REQUEUE; kill -TERM $PPID; sleep 0.3", 143, False),  # scancel
        ("", "kill -TERM $PPID; sleep 0.3; touch $RUN/DONE", 0, False),
    ],
)
def test_the_files_of_this_try_decide(
    before: str, trainer: str, code: int, requeued: bool, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    if before:
        (tmp_path / "run" / before).touch()
    got = submit(tmp_path, trainer)
    assert got[:2] == (code, "requeue 7" if requeued else ""), got[2]


def test_both_names_of_the_run_folder_are_known(tmp_path: Path) -> None:
    assert submit(tmp_path, "touch $RUN/DONE", run=f"{tmp_path}/a", flag="--run-folder")[0] == 0
    assert (tmp_path / "a" / "logs").is_dir()


def test_the_status_of_an_earlier_try_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert submit(tmp_path, "failed a 0 3")[1] == "requeue 7"
    code, asked, said = submit(tmp_path, "exit 1")  # as when a rank cannot start
    assert (code, asked) == (1, "")
    assert "failed before the run began" in said


def test_a_crash_loop_ends(tmp_path: Path) -> None:
    """The same step again, after the same checkpoint: starting again does not help."""
    (tmp_path / "run").mkdir()
    assert submit(tmp_path, "saved 00000020; failed a 0 25")[1] == "requeue 7"
    code, asked, said = submit(tmp_path, "failed b 20 25")
    assert (code, asked) == (137, "")
    assert "without a step further than step 25" in said
    assert submit(tmp_path, "failed c 20 26")[1] == "requeue 7"


def test_failures_from_one_checkpoint_are_counted(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for number in range(3):
        assert submit(tmp_path, f"failed {number} 0 {5 + number}")[1] == "requeue 7"
    code, asked, said = submit(tmp_path, "failed x 0 9")
    assert (code, asked) == (137, "")
    assert "again after 3 requeues" in said
    assert submit(tmp_path, "failed y 0 10", RETRIES="9")[1] == "requeue 7"
    got = submit(tmp_path, "saved 00000010; failed z 0 10")  # a new checkpoint: counted anew
    assert got[1] == "requeue 7"


def test_a_task_that_slurm_did_not_launch(tmp_path: Path) -> None:
    """As "Job credential revoked" on a node that was cut off: the run has not begun, nor failed."""
    (tmp_path / "run").mkdir()
    one = "touch $RUN/logs/7-try0-rank0.log; exit 137"
    for _ in range(3):
        assert submit(tmp_path, one, SLURM_NTASKS="2")[1] == "requeue 7"
    code, asked, said = submit(tmp_path, one, SLURM_NTASKS="2")
    assert (code, asked) == (137, "")
    assert "did not launch all tasks again after 3 requeues" in said
    both = "touch $RUN/logs/7-try0-rank1.log; exit 2"
    assert submit(tmp_path, both, SLURM_NTASKS="2")[:2] == (2, ""), "a refusal of the trainer's"


def test_a_run_folder_with_brackets_has_its_logs(tmp_path: Path) -> None:
    run = "run[1]"
    refused = 'touch "$RUN/logs/7-try0-rank0.log"; exit 2'
    code, asked, said = submit(tmp_path, refused, run=run, SLURM_NTASKS="1")
    assert (code, asked) == (2, ""), said
    assert "did not launch" not in said


def test_stops_on_request_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for number in range(6):
        got = submit(tmp_path, f"status {number} {number}; touch $RUN/REQUEUE")
        assert got[:2] == (0, "requeue 7")
    assert submit(tmp_path, "failed x 6 7")[1] == "requeue 7"


def test_an_array_requeues_its_own_task(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    task = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    assert submit(tmp_path, "touch $RUN/REQUEUE", **task)[1] == "requeue 7_3"


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({}, ".venv/bin/python -u -m mgc_dist.train --resume auto --run run"),
        ({"VENV": "/opt/v"}, "/opt/v/bin/python -u -m mgc_dist.train"),
        ({"CONTAINER": "apptainer exec --nv a.sif"}, "apptainer exec --nv a.sif python -u -m mgc"),
        ({"CONTAINER": "--container-image=a.sqsh"}, "--container-image=a.sqsh --output=run/logs/7"),
        ({"CONTAINER": "run a", "VENV": "/v"}, "run a /v/bin/python -u -m mgc_dist.train"),
    ],
)
def test_the_environment_of_the_ranks(
    variables: dict[str, str], words: str, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    said = submit(tmp_path, 'echo "srun $@"; touch $RUN/DONE', **variables)[2]
    assert f"{words}" in said
    assert "srun --kill-on-bad-exit=1 --cpus-per-task=1" in said


def test_it_must_be_submitted_from_the_project(tmp_path: Path) -> None:
    environment = os.environ | {"SLURM_SUBMIT_DIR": str(tmp_path)}
    done = subprocess.run(
        ["bash", str(SLURM / "train.sbatch"), "--run", "run"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "submit from the project's folder" in done.stdout
