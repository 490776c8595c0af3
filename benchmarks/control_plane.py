"""What the control plane costs: the runtime's own path on Ray with units that do nothing but sleep.

    python benchmarks/control_plane.py [--units 2000] [--actors 8] [--sleep-s 0.05] [--preemptions-per-hour 0]

A local cluster of so many CPUs, shared by the actors. Units go through `prism_ray.runtime.units.run_units` as in a run;
in its actors `prism_ray.stages.worker` is another module, put there by a sitecustomize.py on their path, whose worker
sleeps and answers "done". It imports neither torch nor a method, so that what is left is Ray's and the runtime's own.
Actors end themselves at seeded random moments, so often an hour of the benchmark's own time, and Ray starts them again.

A unit stands for one of 60 seconds: `scale` is 60 by what it sleeps. Only the work is scaled. What the control plane
takes is taken in real time, so its share of a real unit is that of 60 s; units per second are `scale` times those of
as many real actors, or those of `scale` times as many.

Prints one JSON line. `driver_cpu_ms_per_unit` is the CPU time of this process (Ray's other processes not counted) from
the first answer to the last, by unit, `by_tenth` in each tenth of the answers; `driver_rss_mb` its resident memory at
the first answer and after each tenth; `gap_ms` how long an actor was idle between two units (mean, median and 95th
percentile over all); `actor_mb` resident and proportional memory of an actor (medians). `model` has what
`prism_ray.scaling` foresees of the whole, from the call to the last answer, with this run's own start, gap, driver and
recovery: what it checks is how these add up. Ends with 1 if a unit is lost, doubled or not done.
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
UNIT_S = 60.0
"""What a unit stands for."""

SITECUSTOMIZE = """
import json, os, random, sys, threading, time, types

def memory():
    with open("/proc/self/smaps_rollup") as lines:
        found = {{line.split(":")[0]: int(line.split()[1]) / 1e3 for line in lines if line.startswith(("Rss", "Pss:"))}}
    return [found["Rss"], found["Pss"]]

def end(actor):
    with open("{folder}/deaths", "a") as deaths:
        deaths.write(json.dumps({{"actor": actor, "at": time.time()}}) + "\\n")
    os._exit(1)

class Worker:
    def __init__(self, specs, **facts):
        import ray
        self.actor, self.memory = ray.get_runtime_context().get_actor_id(), None
        if {preemptions}:
            life = 0
            while True:
                try:
                    os.close(os.open(f"{folder}/life-{{life}}", os.O_CREAT | os.O_EXCL))
                    break
                except FileExistsError:
                    life += 1
            timer = threading.Timer(random.Random(life).expovariate({preemptions} / 3600), end, [self.actor])
            timer.daemon = True
            timer.start()

    def process(self, chain):
        from prism_ray.ledger import Outcome
        began = time.time()
        time.sleep({seconds})
        self.memory = self.memory or memory()
        entry = {{"pid": os.getpid(), "actor": self.actor, "began": began, "ended": time.time()}}
        entry |= {{"mb": self.memory, "torch": "torch" in sys.modules}}
        return [(ref, Outcome("done", json.dumps(entry), images=1)) for ref in chain]

module = types.ModuleType("prism_ray.stages.worker")
module.Worker = Worker
sys.modules[module.__name__] = module
"""
"""Of every process with it on its path: the fake is there before the runtime asks for the worker."""


def inner(units: int, actors: int, cpus: int) -> dict[str, Any]:
    """Every answer and what the driver took, in a process that has the fake worker."""
    import psutil

    from prism_ray.config import ComputeConfig
    from prism_ray.options import Executor
    from prism_ray.runtime import session
    from prism_ray.work import UnitRef

    compute = ComputeConfig(executor=Executor.ray, cpus=cpus, actors=actors, cpus_per_actor=cpus / actors)
    session.start(compute)
    from prism_ray.runtime.units import run_units

    process, answers, looks = psutil.Process(), [], []
    chains = [[UnitRef(0, "synthesize", n)] for n in range(units)]
    tenths = {1, *(max(1, units * n // 10) for n in range(1, 11))}
    asked = time.time()
    try:
        for ref, outcome in run_units(compute, [], chains):
            answers.append((ref.unit, outcome.status, outcome.name))
            if len(answers) in tenths:
                looks.append((len(answers), time.time(), time.process_time(), process.memory_info().rss / 1e6))
    finally:
        session.stop()
    return {"asked": asked, "answers": answers, "looks": looks}


def counted(found: dict[str, Any], deaths: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures of what `inner` saw, and of when actors ended themselves."""
    answers = [(unit, status, json.loads(name)) for unit, status, name in found["answers"]]
    looks, asked = found["looks"], found["asked"]
    lives, own = defaultdict(list), defaultdict(list)
    for _, _, entry in answers:
        lives[entry["actor"], entry["pid"]].append(entry)
        own[entry["actor"]].append(entry["began"])
    gaps = []
    for life in lives.values():
        life.sort(key=lambda entry: entry["began"])
        gaps += [after["began"] - before["ended"] for before, after in pairwise(life)]
    cuts = statistics.quantiles(gaps, n=20)
    back = [min((at for at in own[d["actor"]] if at > d["at"]), default=None) for d in deaths]
    recovery = [at - d["at"] for at, d in zip(back, deaths, strict=True) if at is not None]
    cpu_ms = [1e3 * (b[2] - a[2]) / (b[0] - a[0]) for a, b in pairwise(looks)]
    first, last = looks[0], looks[-1]
    return {
        "units": len(answers),
        "distinct": len({unit for unit, _, _ in answers}),
        "outcomes": dict(Counter(status for _, status, _ in answers)),
        "actors": len(own),
        "torch_in_actors": any(entry["torch"] for _, _, entry in answers),
        "actor_mb": [round(statistics.median(e["mb"][n] for _, _, e in answers)) for n in (0, 1)],
        "start_s": round(statistics.fmean(min(began) for began in own.values()) - asked, 2),
        "makespan_s": round(last[1] - asked, 1),
        "units_per_s": round((last[0] - first[0]) / (last[1] - first[1]), 2),
        "driver_cpu_ms_per_unit": round(1e3 * (last[2] - first[2]) / max(1, last[0] - first[0]), 3),
        "by_tenth": [round(each, 2) for each in cpu_ms],
        "driver_rss_mb": [round(look[3], 1) for look in looks],
        "gap_ms": {
            "mean": round(1e3 * statistics.fmean(gaps), 1),
            "median": round(1e3 * cuts[9], 1),
            "p95": round(1e3 * cuts[18], 1),
        },
        "gap_share_of_unit": round(statistics.fmean(gaps) / UNIT_S, 5),
        "preemptions": len(deaths),
        "recovery_s": round(statistics.fmean(recovery), 2) if recovery else None,
    }


def foreseen(found: dict[str, Any], *, actors: int, sleep_s: float, preemptions_per_hour: float) -> dict[str, Any]:
    """What the model says of the same units on the same actors."""
    from prism_ray.scaling import Actors, Overheads, forecast

    overheads = Overheads(
        start_s=found["start_s"],
        gap_s=found["gap_ms"]["mean"] / 1e3,
        driver_s=found["driver_cpu_ms_per_unit"] / 1e3,
        recovery_s=found["recovery_s"] or 0.0,
    )
    alike = Actors(count=actors, preemptions_per_hour=preemptions_per_hour)
    result = forecast([sleep_s] * found["units"], [alike], overheads)
    return {
        "makespan_s": round(result.makespan_s, 1),
        "simulated_over_model": round(found["makespan_s"] / result.makespan_s, 3),
        "efficiency": round(result.efficiency, 3),
        "driver": round(result.driver, 3),
        "preemptions": round(preemptions_per_hour * actors * result.makespan_s / 3600, 1),
    }


def measure(
    *, units: int, actors: int, sleep_s: float, cpus: int = 2, preemptions_per_hour: float = 0.0
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="sleep-", dir="/tmp") as folder:
        fake = SITECUSTOMIZE.format(seconds=sleep_s, preemptions=preemptions_per_hour, folder=folder)
        (Path(folder) / "sitecustomize.py").write_text(fake)
        environment = {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}", "RAY_ADDRESS": "", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--inner", f"--units={units}", f"--actors={actors}", f"--cpus={cpus}"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        deaths = Path(folder) / "deaths"
        died = [json.loads(line) for line in deaths.read_text().splitlines()] if deaths.exists() else []
    if done.returncode:
        raise SystemExit(f"ended with {done.returncode}:\n{done.stderr[-3000:]}")
    commit = subprocess.run(["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True, cwd=ROOT)
    where = {"machine": platform.machine(), "cpus": cpus, "load": round(os.getloadavg()[0], 1)}
    found = counted(json.loads(done.stdout.splitlines()[-1]), died)
    model = foreseen(found, actors=actors, sleep_s=sleep_s, preemptions_per_hour=preemptions_per_hour)
    told = {
        "cell": "sleep",
        "sleep_s": sleep_s,
        "scale": UNIT_S / sleep_s,
        "preemptions_per_hour": preemptions_per_hour,
    }
    return {**told, **found, "model": model, **where, "commit": commit.stdout.strip()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, default=2000)
    parser.add_argument("--actors", type=int, default=8)
    parser.add_argument("--sleep-s", type=float, default=0.05, help="of every unit, seconds")
    parser.add_argument("--cpus", type=int, default=2, help="of the local cluster")
    parser.add_argument("--preemptions-per-hour", type=float, default=0.0, help="of every actor, in real time")
    parser.add_argument("--inner", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inner:
        print(json.dumps(inner(options.units, options.actors, options.cpus)))
        return
    result = measure(
        units=options.units,
        actors=options.actors,
        sleep_s=options.sleep_s,
        cpus=options.cpus,
        preemptions_per_hour=options.preemptions_per_hour,
    )
    print(json.dumps(result))
    sys.exit(result["outcomes"] != {"done": options.units} or result["distinct"] != options.units)


if __name__ == "__main__":
    main()
