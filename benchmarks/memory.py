"""Memory of reading, however large the data set is: a bound that the kernel enforces.

A process opens the shards, walks a little, and then limits its own data (RLIMIT_DATA: heap and
other private memory, not the page cache) to what it has plus the stated bound,

    (read_ahead + 2) batches x B x T x 2 bytes  +  16 MiB for thread stacks and small change,

and reads every row of the training split in a shuffled order. Without that memory it would
die. The page cache is the kernel's to give and to take; under a limit on it too (a container,
or a cgroup smaller than the data set) the same command shows the same.

    python benchmarks/memory.py --tracks 1000 --json benchmarks/results/memory.json
"""

import argparse
import contextlib
import io
import json
import resource
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import measure

from mgc_dist import shard
from mgc_dist.config import ShardConfig
from mgc_dist.data.order import Plan, lay_out, training_batches
from mgc_dist.data.reader import Reader, ShardSet

BATCH, READ_AHEAD, SLACK = 32, 4, 16 << 20


def private_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmData")).split()[1])


def walk(shards: ShardSet, epochs: float) -> int:
    first, stop = shards.rows_of("train")
    rows = stop - first
    plan = Plan(rows=rows, total=max(1, int(epochs * rows)), global_batch=BATCH, seed=0)
    layout = lay_out(global_batch=BATCH, world=1, largest_micro_batch=BATCH)
    count, batches = 0, training_batches(plan, layout, 0, 0)
    with Reader(shards, "train", batches, read_ahead=READ_AHEAD, pin=False) as reader:
        for batch in reader:
            count += int(batch.weight.sum())
    return count


def read_within_bound(folder: Path) -> None:
    with ShardSet(folder) as shards:
        walk(shards, 0.02)
        bound = (READ_AHEAD + 2) * BATCH * 2 * shards.manifest.segment_samples + SLACK
        before = private_bytes()
        resource.setrlimit(resource.RLIMIT_DATA, (before + bound, before + bound))
        started = time.perf_counter()
        rows = walk(shards, 1)
        wall_s = time.perf_counter() - started
        size = sum(s.bytes for s in shards.manifest.shards if s.name.startswith("train-"))
    found = {"rows": rows, "data_mb": size // 10**6, "bound_mb": bound // 10**6}
    found |= {"private_before_mb": before // 10**6, "segments_per_s": round(rows / wall_s)}
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tracks", type=int, default=1000, help="tracks of 30 s")
    parser.add_argument("--folder", type=Path, help="keep the data here, or find it here")
    parser.add_argument("--json", type=Path, help="write the result here as well")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        read_within_bound(options.read)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        with contextlib.redirect_stdout(io.StringIO()):
            data = measure.tracks(folder, options.tracks)
            shard.run(ShardConfig(data=data, out=folder / "shards", split="stratified"))
        command = [sys.executable, __file__, "--read", str(folder / "shards")]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    content = {"benchmark": "memory", "date": str(date.today())}
    content |= {"machine": measure.machine()} | json.loads(done.stdout)
    print(json.dumps(content))
    if options.json:
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
