"""A real Slurm of two nodes on this host (cluster.sh), and the shipped batch files on it."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("cluster.sh")
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1")


def why_not() -> str:
    """Why there can be no cluster here; empty if there can."""
    if os.geteuid() != 0:
        return "needs root: it makes network namespaces"
    if not shutil.which("apt-get") and not shutil.which("slurmctld"):
        return "needs Debian or Ubuntu, whose packages of Slurm it installs"
    if subprocess.run(["unshare", "--net", "--uts", "--mount", "true"], check=False).returncode:
        return "may not make namespaces, as in a container without privileges"
    return ""


@dataclass(frozen=True)
class Ended:
    """How a job ended."""

    state: str
    code: str
    restarts: int


class Cluster:
    """The login node and n1, n2."""

    def __init__(self, name: str, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {
            "CLUSTER_NAME": name,
            "VENV": sys.prefix,
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
        }

    def do(self, *words: str | Path, cwd: Path = ROOT) -> str:
        """A command of cluster.sh; what it printed."""
        done = subprocess.run(
            [SCRIPT, *map(str, words)],
            env=self.environment,
            cwd=cwd,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def slurm(self, *words: str | Path) -> str:
        """A command on the login node, as a user types it there in the project's folder."""
        return self.do("exec", *words)

    def on(self, node: str) -> list[str]:
        """What to put before a command that runs on a node, past Slurm."""
        return [str(SCRIPT), "on", node]

    def sbatch(self, *words: str | Path) -> str:
        """Submit; the job's number. Its output is in `folder`."""
        out = f"--output={self.folder}/%x-%j.out"
        said = self.slurm("sbatch", out, "--time=20", *words)
        return re.findall(r"Submitted batch job (\d+)", said)[0]

    def facts(self, job: str) -> dict[str, str]:
        """What Slurm says of a job now."""
        shown = self.slurm("scontrol", "--oneliner", "show", "job", job)
        return dict(re.findall(r"(\w+)=(\S*)", shown.splitlines()[0]))

    def wait(self, job: str, timeout_s: float = 240) -> Ended:
        """Wait for the end of a job."""
        deadline = time.monotonic() + timeout_s
        while True:
            facts = self.facts(job)
            if facts["JobState"] not in _ALIVE:
                return Ended(facts["JobState"], facts["ExitCode"], int(facts["Restarts"]))
            assert time.monotonic() < deadline, f"{facts}\n{self.said()}"
            time.sleep(0.3)

    def said(self) -> str:
        """What all jobs have written so far, for people."""
        files = sorted(self.folder.rglob("*.out")) + sorted(self.folder.rglob("logs/*.log"))
        return "\n".join(f"--- {file}\n{file.read_text(errors='replace')}" for file in files)

    def restore(self) -> None:
        """Plug and boot what a test has left cut or down, and cancel what runs."""
        self.slurm("scancel", "--user=root")
        for node in ("n1", "n2"):
            self.do("plug", node)
            if self.node_state(node) not in ("idle", "mixed", "allocated", "completing"):
                self.do("crash", node)
                self.do("boot", node)
        deadline = time.monotonic() + 60
        while {self.node_state("n1"), self.node_state("n2")} != {"idle"}:
            assert time.monotonic() < deadline, self.slurm("sinfo", "-N")
            time.sleep(0.3)

    def node_state(self, node: str) -> str:
        """As sinfo shows it."""
        words = ("sinfo", "-h", "-N", "-p", "train", "-n", node, "-o", "%T")
        return self.slurm(*words).strip()


_ALIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "PREEMPTED", "SUSPENDED")


@contextmanager
def running(folder: Path) -> Iterator[Cluster]:
    """A cluster that is up."""
    cluster = Cluster(f"mgc{os.getpid()}", folder)
    cluster.do("up")
    try:
        yield cluster
    finally:
        cluster.do("down")
