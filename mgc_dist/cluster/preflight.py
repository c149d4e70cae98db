"""What goes wrong on clusters, looked at by each rank alone before it waits for another one.

Imports no torch: in a job it runs in the first second. Each question has a function, and each
answer is a sentence that says what is there, or an error that names the variable, flag or file.
`python -m mgc_dist.doctor` prints all answers; a command only heeds what is wrong.
"""

import logging
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mgc_dist import console
from mgc_dist.cluster.lease import holder_of
from mgc_dist.cluster.seat import MET, Seat, seat
from mgc_dist.cluster.stop import given_to_deepspeed
from mgc_dist.errors import UserError
from mgc_dist.events import CheckpointEvent, only
from mgc_dist.files import nearest
from mgc_dist.journal import read_events

log = logging.getLogger(__name__)

Verdict = Literal["ok", "note", "wrong"]

OLD_LOCK_S = 600.0
"""torch builds extensions in seconds to minutes; a lock that is older is a killed build's."""
_SCONTROL_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Finding:
    """An answer.

    Attributes:
        question: in a word or two.
        verdict: `note` is unusual, and may be meant so.
        sentence: for people.
        error: to end with, where it is wrong.
    """

    question: str
    verdict: Verdict
    sentence: str
    error: UserError | None = None


def look(here: Seat, *, run: Path | None, device: str) -> list[Finding]:
    """Answer every question that a rank can answer alone.

    Args:
        here: which rank this is.
        run: the run folder, if there is one.
        device: that the ranks want: `auto`, `cpu` or `cuda`.
    """
    found: list[Finding] = []
    if here.address is not None and here.world > 1:
        found += [*_address(here), *_own_name(here, device), *_port(here)]
    found += [*_gpus(here, device), *_visible(here, device), *_cores(), *_locks()]
    if run is not None:
        found += _disk(run)
        if here.rank == 0:  # Slurm is asked once, not by every rank
            found += _time(run)
    return found


def begin(*, run: Path | None, device: str) -> None:
    """Start a command on a rank: log what is unusual, and end with the first thing that is wrong.

    Args:
        run: the run folder, if there is one.
        device: that the ranks want.

    Raises:
        UserError: on the rank that has found it.
    """
    here = seat()
    console.start_logging(here.rank)
    for finding in look(here, run=run, device=device):
        if finding.error:
            raise finding.error
        if finding.verdict == "note":
            log.warning("%s", finding.sentence)


def _wrong(question: str, what: str, *, got: str, expected: str, cure: str) -> Finding:
    error = UserError(what, got=got, expected=expected, cure=cure, this_rank_only=True)
    sentence = f"{what} is {got}, where {expected} is needed: {cure}"
    return Finding(question=question, verdict="wrong", sentence=sentence, error=error)


def _ok(question: str, sentence: str) -> Finding:
    return Finding(question=question, verdict="ok", sentence=sentence)


def _note(question: str, sentence: str) -> Finding:
    return Finding(question=question, verdict="note", sentence=sentence)


def _address(here: Seat) -> Iterator[Finding]:
    """Does MASTER_ADDR name a host, and on rank 0 this one?"""
    question, name = "MASTER_ADDR", str(here.address)
    host = socket.gethostname()
    try:
        addresses = sorted({str(found[4][0]) for found in socket.getaddrinfo(name, None)})
    except OSError as error:
        yield _wrong(
            question,
            f"MASTER_ADDR on {host}",
            got=f"{name} ({error.strerror})",
            expected="a name or address that this host knows",
            cure="take the first word of `scontrol show hostnames $SLURM_JOB_NODELIST`, or the "
            "address of rank 0's host",
        )
        return
    if here.rank == 0 and not any(map(_is_ours, addresses)):
        elsewhere = f"{name} ({', '.join(addresses)}), which is no address of {host}"
        if "SLURM_JOB_ID" in os.environ:
            yield _wrong(
                question,
                "MASTER_ADDR",
                got=elsewhere,
                expected=f"the host of rank 0, {host}",
                cure="take the first word of `scontrol show hostnames $SLURM_JOB_NODELIST`",
            )
        else:  # a service's address, as in Kubernetes, is no host's own
            yield _note(question, f"MASTER_ADDR is {elsewhere}, where rank 0 is")
        return
    yield _ok(question, f"MASTER_ADDR {name} is {', '.join(addresses)}")


def _is_ours(address: str) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True


def _own_name(here: Seat, device: str) -> Iterator[Finding]:
    """Would gloo, which serves CPUs, tell other hosts an address of the loop?"""
    on_gpu = device == "cuda" or (device == "auto" and _has_gpu())
    if here.local_world == here.world or on_gpu or os.environ.get("GLOO_SOCKET_IFNAME"):
        return
    host = socket.gethostname()
    try:
        own = socket.gethostbyname(host)
    except OSError:
        own = "unknown"
    if own == "unknown" or own.startswith("127."):
        yield _wrong(
            "own address",
            f"the address of {host} on itself",
            got=own,
            expected="one that other hosts reach, because gloo tells it to them",
            cure="set GLOO_SOCKET_IFNAME to the network's interface, such as eth0, or mend "
            "/etc/hosts",
        )
    else:
        yield _ok("own address", f"{host} is {own}")


def _has_gpu() -> bool:
    """Whether a driver of NVIDIA's or AMD's is there; torch would know, and takes seconds."""
    return Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists()


def _port(here: Seat) -> Iterator[Finding]:
    """Is rank 0's port free, or this process's own?"""
    if here.rank or here.port in MET or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return
    host = socket.gethostname()
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", here.port))
    except OSError as error:
        yield _wrong(
            "MASTER_PORT",
            f"MASTER_PORT on {host}",
            got=f"{here.port} ({error.strerror})",
            expected="a free port",
            cure="another job is using it, or an older try still ends: deepspeed --master_port "
            "29501 launch/..., or export MASTER_PORT",
        )
        return
    yield _ok("MASTER_PORT", f"MASTER_PORT {here.port} is free on {host}")


def _gpus(here: Seat, device: str) -> Iterator[Finding]:
    """Is there one task for each GPU that Slurm gave?"""
    given = os.environ.get("SLURM_GPUS_ON_NODE", "")
    if device == "cpu" or not given.isdigit():
        return
    tasks, host = here.local_world, socket.gethostname()
    if tasks > int(given):
        yield _wrong(
            "GPUs",
            f"tasks on {host}",
            got=f"{tasks} for {given} GPUs",
            expected="one task a GPU",
            cure=f"sbatch --ntasks-per-node={given} --gpus-per-node={given}",
        )
    elif tasks < int(given):
        yield _note(
            "GPUs",
            f"{tasks} task{'s' * (tasks > 1)} for {given} GPUs on {host}: the others are idle; "
            f"sbatch --ntasks-per-node={given} uses them",
        )
    else:
        yield _ok("GPUs", f"{tasks} task{'s' * (tasks > 1)} for as many GPUs on {host}")


def _visible(here: Seat, device: str) -> Iterator[Finding]:
    """Are the GPUs those of CUDA_VISIBLE_DEVICES? `deepspeed --num_gpus` takes the first."""
    asked = given_to_deepspeed("CUDA_VISIBLE_DEVICES")
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if device == "cpu" or here.local_rank or not asked:
        return
    if set(given.split(",")) <= set(asked.split(",")):
        yield _ok("visible GPUs", f"CUDA_VISIBLE_DEVICES {given} is of {asked}, as it was set")
    else:
        yield _note(
            "visible GPUs",
            f"CUDA_VISIBLE_DEVICES={asked} was set, and deepspeed's --num_gpus does not heed it: "
            f"the ranks have {given}; deepspeed --include localhost:{asked} takes those that "
            "were asked for",
        )


def _cores() -> Iterator[Finding]:
    """Has this rank the cores that were asked for?"""
    have, wanted = len(os.sched_getaffinity(0)), os.environ.get("SLURM_CPUS_PER_TASK", "")
    if wanted.isdigit() and have < int(wanted):
        yield _note(
            "cores",
            f"{have} of the {wanted} cores of --cpus-per-task: srun does not take them from sbatch "
            "by itself; srun --cpus-per-task=$SLURM_CPUS_PER_TASK",
        )
    else:
        yield _ok("cores", f"{have} cores for this rank to use")


def _locks() -> Iterator[Finding]:
    """Has a killed build left a lock that torch waits for without limit, and without a word?"""
    usual = os.path.expanduser("~/.cache/torch_extensions")  # Path.home() fails without a home
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR", usual))
    stale = []
    for lock in [*root.glob("*/lock"), *root.glob("*/*/lock")]:
        try:
            if time.time() - lock.stat().st_mtime > OLD_LOCK_S:
                stale.append(str(lock))
        except OSError:
            continue
    if stale:
        yield _note(
            "build locks",
            f"{stale[0]} was left by a build that was killed: whoever builds this extension again "
            "waits for ever; remove it (mgc_dist itself builds none)",
        )
    else:
        yield _ok("build locks", f"none that is stale in {root}")


def _disk(run: Path) -> Iterator[Finding]:
    """Does another checkpoint fit?"""
    existing = nearest(run.resolve())
    free, saved = shutil.disk_usage(existing).free, _size_of_newest(run)
    room = f"{free / 2**30:.1f} GiB free at {existing}"
    if saved and free < 1.2 * saved:
        yield _note("disk", f"{room}, and a checkpoint takes {saved / 2**30:.1f}: make room")
    elif not os.access(existing, os.W_OK):
        yield _wrong(
            "disk",
            f"--run {run}",
            got=f"{existing}, where {socket.gethostname()} may not write",
            expected="a folder that can be written",
            cure="choose another --run, or mend the permissions",
        )
    else:
        yield _ok("disk", room + (f"; a checkpoint takes {saved / 2**30:.1f}" if saved else ""))


def _size_of_newest(run: Path) -> int:
    folders = sorted((run / "checkpoints").glob("step-*"))
    return sum(path.stat().st_size for path in folders[-1].rglob("*")) if folders else 0


def lease(run: Path) -> Iterator[Finding]:
    """Is another process at work in the run folder? Training itself looks longer."""
    holder = holder_of(run)
    if holder is None:
        yield _ok("run folder", f"{run} is held by nobody")
    elif holder.seen_dead():
        yield _ok("run folder", f"{run} was held by {holder.where}, which is gone")
    else:
        yield _note("run folder", f"{run} is held by {holder.where}: only one of two can have it")


def _time(run: Path) -> Iterator[Finding]:
    """Is there time to save before the job ends, and before a preemption kills it?"""
    if "SLURM_JOB_ID" not in os.environ:
        return
    saves = [event.save_s for event in only(read_events(run), CheckpointEvent)]
    longest = max(saves, default=0.0)
    ends = _end_of_job()
    left = "an unknown time" if ends is None else f"{max(0.0, ends - time.time()) / 60:.0f} min"
    grace = _grace()
    shown = f"a checkpoint took up to {longest:.1f} s" if saves else "no checkpoint was timed yet"
    sentence = f"{left} until the job's limit; {shown}"
    if grace is not None:
        sentence += f"; after a SIGTERM of Slurm {grace:.0f} s are left"
    if (ends is not None and ends - time.time() < 2 * longest) or (
        grace is not None and grace < 1.5 * longest
    ):
        yield _note("time", f"{sentence}: too little; ask for more --time, or an earlier --signal")
    else:
        yield _ok("time", sentence)


def _end_of_job() -> float | None:
    """When Slurm will end this job, in seconds since 1970; Slurm 23 says so to the job."""
    told = os.environ.get("SLURM_JOB_END_TIME", "")
    if told.isdigit():
        return float(told)
    shown = _scontrol("show", "job", "--oneliner", os.environ["SLURM_JOB_ID"])
    found = re.search(r"EndTime=(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)", shown)
    return time.mktime(time.strptime(found[1], "%Y-%m-%dT%H:%M:%S")) if found else None


def _grace() -> float | None:
    """Seconds between SIGTERM and SIGKILL when this job is preempted, if Slurm can be asked."""
    wait = re.search(r"KillWait\s*=\s*(\d+)", _scontrol("show", "config"))
    partition = os.environ.get("SLURM_JOB_PARTITION", "")
    grace = re.search(r"GraceTime=(\d+)", _scontrol("show", "partition", partition))
    return float(max(int(wait[1]), int(grace[1]))) if wait and grace else None


def _scontrol(*words: str) -> str:
    try:
        done = subprocess.run(
            ["scontrol", *words], capture_output=True, text=True, check=False, timeout=_SCONTROL_S
        )
    except (OSError, subprocess.TimeoutExpired):  # containers have none
        return ""
    return done.stdout
