"""`python -m mgc_dist.slurm OUT`: batch files that find one another in a folder of any name."""

import os
import subprocess
from pathlib import Path

import pytest

from mgc_dist import slurm
from mgc_dist.errors import UserError
from mgc_dist.slurm import SlurmConfig


def bash(project: Path, *words: str, **stand_ins: str) -> str:
    """What a batch file prints, submitted from the project's folder, with stand-ins for Slurm's."""
    tools = project / "tools"
    tools.mkdir(exist_ok=True)
    for name, body in stand_ins.items():
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(0o755)
    job = {"SLURM_SUBMIT_DIR": str(project), "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_ID": "7"}
    done = subprocess.run(
        ["bash", *words],
        cwd=project,
        env=os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"} | job,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["slurm", "batch.v2"])
def test_files_find_one_another(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):  # the same files again are no other files
        slurm.run(SlurmConfig(out=tmp_path / name))
    assert f"sbatch {name}/train.sbatch --run" in capsys.readouterr().out
    words = ("--data", "music", "--shards", "shards", "--run", "run")
    jobs = tmp_path / "jobs"
    bash(tmp_path, f"{name}/pipeline.sh", *words, sbatch=f'echo "$@" >> {jobs}; echo 7')
    submitted = [word for word in jobs.read_text().split() if word.endswith(".sbatch")]
    assert submitted == [f"{name}/{kind}.sbatch" for kind in ("run", "run", "run", "train", "run")]
    said = bash(
        tmp_path, f"{name}/run.sbatch", "-m", "mgc_dist.bias", srun='echo "srun $@"', scontrol=""
    )
    assert said.split()[-3:] == ["-u", "-m", "mgc_dist.bias"]


def test_files_of_the_user_are_kept(tmp_path: Path) -> None:
    own = tmp_path / "slurm" / "train.sbatch"
    own.parent.mkdir()
    own.write_text("mine\n")
    with pytest.raises(UserError, match="--overwrite replaces it"):
        slurm.run(SlurmConfig(out=own.parent))
    assert [path.name for path in own.parent.iterdir()] == ["train.sbatch"]
    slurm.run(SlurmConfig(out=own.parent, overwrite=True))
    assert own.read_text().startswith("#!/bin/bash\n# Train; ")


def test_names_that_a_shell_takes_apart_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"folder .*my jobs: got my jobs"):
        slurm.run(SlurmConfig(out=tmp_path / "my jobs"))
