"""What the control plane costs: the runtime's own path on Ray with units that do nothing but sleep.

    python benchmarks/control_plane.py [--units 2000] [--actors 8] [--sleep-s 0.05] [--cpus 2]

A local cluster of so many CPUs, shared by the actors. Units go through `prism_ray.runtime.units.run_units` as in a run;
in its actors `prism_ray.stages.worker` is another module, put there by a sitecustomize.py on their path, whose worker
sleeps and answers "done". It imports neither torch nor a method, so that what is left is Ray's and the runtime's own.

Prints one JSON line. `driver_cpu_ms_per_unit` is the CPU time of this process (Ray's other processes not counted) from
the first answer to the last, by unit; `driver_rss_mb` its resident memory at the first answer and the most since;
`gap_ms` how long an actor was idle between two units (median and 95th percentile over all). Ends with 1 if a unit is
lost, doubled or not done.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

SITECUSTOMIZE = """
import json, os, sys, time, types

class Worker:
    def __init__(self, specs, **facts):
        pass

    def process(self, chain):
        from prism_ray.ledger import Outcome
        began = time.time()
        time.sleep({seconds})
        entry = {{"pid": os.getpid(), "began": began, "ended": time.time(), "torch": "torch" in sys.modules}}
        return [(ref, Outcome("done", json.dumps(entry), images=1)) for ref in chain]

module = types.ModuleType("prism_ray.stages.worker")
module.Worker = Worker
sys.modules[module.__name__] = module
"""
"""Of every process with it on its path: the fake is there before the runtime asks for the worker."""


def inner(units: int, actors: int, cpus: int) -> dict[str, Any]:
    """The measurement, in a process that has the fake worker."""
    import psutil

    from prism_ray.config import ComputeConfig
    from prism_ray.options import Executor
    from prism_ray.runtime import session
    from prism_ray.work import UnitRef

    compute = ComputeConfig(executor=Executor.ray, cpus=cpus, actors=actors, cpus_per_actor=cpus / actors)
    session.start(compute)
    from prism_ray.runtime.units import run_units

    process, answers = psutil.Process(), []
    chains = [[UnitRef(0, "synthesize", n)] for n in range(units)]
    asked = time.monotonic()
    try:
        first, cpu, memory, most = 0.0, 0.0, 0, 0
        for ref, outcome in run_units(compute, [], chains):
            if not answers:
                first, cpu, memory = time.monotonic(), time.process_time(), process.memory_info().rss
            if len(answers) % 50 == 0:
                most = max(most, process.memory_info().rss)
            answers.append((ref.unit, outcome))
        seconds, cpu = time.monotonic() - first, time.process_time() - cpu
    finally:
        session.stop()
    worked = defaultdict(list)
    for _, outcome in answers:
        entry = json.loads(outcome.name)
        worked[entry["pid"]].append(entry)
    gaps = []
    for own in worked.values():
        own.sort(key=lambda entry: entry["began"])
        gaps += [after["began"] - before["ended"] for before, after in pairwise(own)]
    cuts = statistics.quantiles(gaps, n=20)
    return {
        "units": len(answers),
        "distinct": len({unit for unit, _ in answers}),
        "outcomes": dict(Counter(outcome.status for _, outcome in answers)),
        "actors": len(worked),
        "torch_in_actors": any(entry["torch"] for own in worked.values() for entry in own),
        "start_s": round(first - asked, 1),
        "seconds": round(seconds, 1),
        "driver_cpu_ms_per_unit": round(1e3 * cpu / max(1, len(answers) - 1), 3),
        "driver_rss_mb": [round(memory / 1e6, 1), round(most / 1e6, 1)],
        "gap_ms": {"median": round(1e3 * cuts[9], 1), "p95": round(1e3 * cuts[18], 1)},
    }


def measure(*, units: int, actors: int, sleep_s: float, cpus: int = 2) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="sleep-", dir="/tmp") as folder:
        (Path(folder) / "sitecustomize.py").write_text(SITECUSTOMIZE.format(seconds=sleep_s))
        environment = {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}", "RAY_ADDRESS": "", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--inner", f"--units={units}", f"--actors={actors}", f"--cpus={cpus}"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"ended with {done.returncode}:\n{done.stderr[-3000:]}")
    commit = subprocess.run(["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True, cwd=ROOT)
    where = {"machine": platform.machine(), "cpus": cpus, "load": round(os.getloadavg()[0], 1)}
    found = json.loads(done.stdout.splitlines()[-1])
    return {"cell": "sleep", "sleep_s": sleep_s, **found, **where, "commit": commit.stdout.strip()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, default=2000)
    parser.add_argument("--actors", type=int, default=8)
    parser.add_argument(
        "--sleep-s", type=float, default=0.05, help="of every unit, seconds: a thousandth of a real one"
    )
    parser.add_argument("--cpus", type=int, default=2, help="of the local cluster")
    parser.add_argument("--inner", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inner:
        print(json.dumps(inner(options.units, options.actors, options.cpus)))
        return
    result = measure(units=options.units, actors=options.actors, sleep_s=options.sleep_s, cpus=options.cpus)
    print(json.dumps(result))
    sys.exit(result["outcomes"] != {"done": options.units} or result["distinct"] != options.units)


if __name__ == "__main__":
    main()
