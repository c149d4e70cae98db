"""What all benchmarks share: contenders in processes of their own, CPU counted, facts noted.

A script defines contenders (name -> function) and calls `main`. Each contender runs several
times, in turns with the others, each time in a fresh process; CPU is user + system time of that
process and of those it starts, from after its imports to its end. A contender whose package is
missing is reported as missing.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mgc_dist import __version__
from mgc_dist.config import SynthConfig
from mgc_dist.synth import run as synthesise

Contender = Callable[[Path, Path], Callable[[], int]]
"""(data, scratch folder) -> a function that does the work and returns how many segments."""

MISSING = "missing"


def main(
    title: str,
    contenders: dict[str, Contender],
    prepare: Callable[[Path, int], None],
    packages: tuple[str, ...],
    compare: Callable[[dict[str, Any]], dict[str, Any]],
) -> None:
    """Parse the command line and run: all contenders, or (internally) one of them."""
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--runs", type=int, default=5, help="runs of each contender")
    parser.add_argument("--tracks", type=int, default=100, help="tracks of 30 s")
    parser.add_argument("--folder", type=Path, help="keep the data here, or find it here")
    parser.add_argument("--json", type=Path, help="write the result here as well")
    parser.add_argument("--only", choices=contenders, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        _run_one(contenders[options.only], options.folder)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        prepare(folder, options.tracks)
        results = _run_all(contenders, folder, options.runs)
    facts = {"benchmark": title, "date": str(date.today()), "tracks": options.tracks}
    facts |= {"runs": options.runs, "machine": machine(), "versions": versions(packages)}
    content = facts | {"results": results} | compare(results)
    line = json.dumps(content)
    print(line)
    if options.json:
        write(options.json, content)
    _print_table(results)


def tracks(folder: Path, count: int) -> Path:
    """A folder of synthetic tracks in GTZAN's layout (22,050 Hz, mono, 16 bits, 30 s)."""
    if not (folder / "artists.csv").is_file():
        synthesise(SynthConfig(out=folder, tracks_per_genre=max(3, count // 10)))
    return folder / "genres_original"


def ratio(results: dict[str, Any], ours: str, theirs: str) -> float | None:
    """How many times the CPU of ours they take (medians); None if they are missing."""
    found = results[theirs]
    if found == MISSING:
        return None
    return round(found["cpu_us"]["median"] / results[ours]["cpu_us"]["median"], 2)


def _run_one(contender: Contender, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        try:
            work = contender(folder, Path(scratch))
        except ImportError as error:
            print(json.dumps({"missing": str(error)}))
            return
        cpu, wall = _cpu_s(), time.perf_counter()
        segments = work()
        cpu, wall = _cpu_s() - cpu, time.perf_counter() - wall
    print(json.dumps({"segments": segments, "cpu_s": cpu, "wall_s": wall}))


def _cpu_s() -> float:
    used = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(part.ru_utime + part.ru_stime for part in used)


def _run_all(contenders: dict[str, Contender], folder: Path, runs: int) -> dict[str, Any]:
    collected: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    missing: set[str] = set()
    for number in range(runs):
        for name in contenders:
            if name in missing:
                continue
            found = _spawn(name, folder)
            if "missing" in found:
                missing.add(name)
                print(f"{name}: missing: {found['missing']}", file=sys.stderr)
                continue
            collected[name].append(found)
            each = 1e6 * found["cpu_s"] / found["segments"]
            print(f"run {number + 1}: {name}: {each:.0f} us CPU a segment", file=sys.stderr)
    return {
        name: MISSING if name in missing else _summary(found) for name, found in collected.items()
    }


def _spawn(name: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, sys.argv[0], "--only", name, "--folder", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def _summary(found: list[dict[str, float]]) -> dict[str, Any]:
    def spread(values: list[float]) -> dict[str, float]:
        middle = statistics.median(values)
        return {
            "min": round(min(values), 1),
            "median": round(middle, 1),
            "max": round(max(values), 1),
        }

    return {
        "segments": int(found[0]["segments"]),
        "cpu_us": spread([1e6 * run["cpu_s"] / run["segments"] for run in found]),
        "segments_per_s": spread([run["segments"] / run["wall_s"] for run in found]),
    }


def machine() -> dict[str, Any]:
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def write(path: Path, content: dict[str, Any]) -> None:
    """Keep a result."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def between_marks(page: str, name: str, script: str, text: str) -> str:
    """A page of docs with new text between the marks of that name."""
    begin, end = f"<!-- {name}: made by benchmarks/{script}.py -->", f"<!-- end of {name} -->"
    before, rest = page.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n{text}\n{end}{after}"


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Name -> version of packages; `missing` for one that is not installed."""
    found = dict.fromkeys(packages, MISSING)
    for name in found:
        with suppress(PackageNotFoundError):
            found[name] = __version__ if name == "mgc_dist" else version(name)
    return found


def _print_table(results: dict[str, Any]) -> None:
    print("\n| | CPU us/segment: median (min to max) | segments/s: median (min to max) |")
    print("|---|---|---|")
    for name, found in results.items():
        if found == MISSING:
            print(f"| {name} | missing | |")
            continue
        cells = [
            f"{part['median']:,.0f} ({part['min']:,.0f} to {part['max']:,.0f})"
            for part in (found["cpu_us"], found["segments_per_s"])
        ]
        print(f"| {name} | {cells[0]} | {cells[1]} |")
