"""Kill a run's whole process group at random times, run the same command again, and compare with an undisturbed run.

    python benchmarks/kill_and_resume.py --kills 5 --storage DIR [overrides ...]

Prints one JSON line: the kill times, whether every shard and student has the sha256 of the undisturbed run, what was
quarantined, and what was left behind.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

PATTERNS = ("images/*.parquet", "labels/*.parquet", "student/*/model.safetensors")


def hashes(storage: Path) -> dict[str, str]:
    """sha256 of every shard and student below a storage, by path within it."""
    found = [path for run in storage.glob("runs/*") for pattern in PATTERNS for path in run.glob(pattern)]
    return {str(path.relative_to(storage)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(found)}


def killed_run(command: list[str], *, kills: int, longest_s: float, seed: int) -> tuple[list[float], list[int]]:
    """Run until it ends by itself, killing its process group `kills` times; returns kill times and leftover counts."""
    chosen = random.Random(seed)
    times: list[float] = []
    leftovers: list[int] = []
    while True:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        assert process.stdout is not None
        started_ray = {p.pid for p in psutil.process_iter()}
        process.stdout.readline()
        if len(times) == kills:
            process.stdout.read()
            if process.wait() != 0:
                raise SystemExit(f"the last run ended with {process.returncode}")
            return times, leftovers
        delay_s = chosen.uniform(0, longest_s)
        try:
            process.wait(delay_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            times.append(round(delay_s, 2))
            leftovers.append(orphans(started_ray))
        else:
            longest_s *= 0.7  # it finished before the kill: aim earlier
            if not times:
                raise SystemExit("the run ended before the first kill; lower --longest")
            return times, leftovers


def orphans(before: set[int], *, patience_s: float = 30.0) -> int:
    """Ray processes that a killed command left, once they had time to notice."""
    until = time.monotonic() + patience_s
    while time.monotonic() < until:
        alive = [p for p in psutil.process_iter(["name", "cmdline"]) if p.pid not in before and is_ray(p)]
        if not alive:
            return 0
        time.sleep(0.5)
    return len(alive)


def is_ray(process: psutil.Process) -> bool:
    """Whether a process belongs to a Ray cluster."""
    line = " ".join(process.info["cmdline"] or [])
    return process.info["name"] in ("raylet", "gcs_server") or line.startswith("ray::") or "/ray/" in line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--storage", type=Path, required=True)
    parser.add_argument("--reference", type=Path, help="storage of an undisturbed run of the same command")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--longest", type=float, default=60.0, help="latest kill after the first line, seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("arguments", nargs="+", help="verb and overrides")
    options = parser.parse_args()
    command = [sys.executable, "-m", "prism_ray", *options.arguments]
    reference = options.reference
    if reference is None:
        reference = options.storage / "reference"
        subprocess.run([*command, f"storage={reference}"], check=True, stdout=subprocess.DEVNULL)
    storage = options.storage / "killed"
    times, leftovers = killed_run(
        [*command, f"storage={storage}"], kills=options.kills, longest_s=options.longest, seed=options.seed
    )
    quarantined = [str(p.relative_to(storage)) for p in storage.glob("runs/*/quarantine/units/*/*.json")]
    expected, found = hashes(reference), hashes(storage)
    result = {
        "kills_s": times,
        "objects": len(expected),
        "identical": expected == found,
        "quarantined": quarantined,
        "processes_left": leftovers,
        "temporary_left": len(list(storage.glob("runs/*/.tmp/*"))),
    }
    print(json.dumps(result))
    sys.exit(0 if result["identical"] and not quarantined else 1)


if __name__ == "__main__":
    main()
