"""What the pipeline around the kernel costs: runs on Ray beside a bare loop over the same units, and a finished run.

    python benchmarks/pipeline.py CELL ... [--pairs 7] [--folder DIR]

Cells, each a JSON line of medians (least, largest) over rounds in turn:

- `long`: one actor of one thread, units of about 10 seconds. `ratio`: seconds per unit of the run over those of the
  bare loop, in which a process makes the same units in a `for` with the same kernel and a thread of it writes the
  files, without ledger, checksum or sync.
- `short`: the same with units of about 100 ms.
- `pair`: two actors of one thread beside two bare processes of one thread and beside one actor. `ratio`: units per
  second of the actors over those of the processes. The sides of a round run at once, but only one goes on at a time,
  for 8 seconds, while the others are stopped. `cores`: CPU time of the processes that make units, per second.
- `publish`: attempt, checksum, sync, receipt and footer check of such a unit, in milliseconds, and as a share of units
  of 10 s, 1 s and 100 ms.
- `finished`: seconds of the whole command on a run of 10,000 units that is done, and of the same command on one of 20.

A run's seconds per unit are those between its first receipt and its last, so that neither the start of Ray nor of torch
is in them; `start_s` is the time from the command to the first receipt, less a unit. `busy`: the share of an actor's
time in which it makes and publishes units, the rest is between calls. Units are `method=sre2l`'s on digits, all alike.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read once, when torch is imported: what follows comes after it

import pyarrow.parquet as pq  # noqa: E402

from benchmarks.measuring import circumstances, spread  # noqa: E402
from prism_ray import pipeline  # noqa: E402
from prism_ray.cli.compose import compose  # noqa: E402
from prism_ray.config import Row  # noqa: E402
from prism_ray.ledger import Attempt, run_unit  # noqa: E402
from prism_ray.progress import Progress  # noqa: E402
from prism_ray.runs import open_run  # noqa: E402
from prism_ray.stages.synthesize import Synthesizer  # noqa: E402
from prism_ray.work import RunSpec, image_receipt  # noqa: E402

SHARDS = "*.parquet"  # of a bare loop
RECEIPTS = "runs/*/receipts/synthesize/*.json"
TURN_S = 8.0
CELLS = ("long", "short", "pair", "publish", "finished")
BATCH = 50
RECIPE = ["recipe=digits", "method=sre2l", "method.batch_plan=single_class"]
ALIKE = [*RECIPE, f"method.batch_size={BATCH}", "stages=[prepare,teach,synthesize]", "compute.unit_checkpoint_s=null"]
MANY = [
    *("recipe=digits_smoke", "method.init=noise", "method.batch_size=1", "method.iterations=1", "labels.views=1"),
    *("student.steps=2", "compute=inline", "stages=[prepare,teach,synthesize,relabel,distill]"),
]


class Lab:
    """Storages with trained teachers, and commands on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.source = folder / "source"
        if not self.source.exists():
            product(self.source, [*ALIKE, "stages=[prepare,teach]", "compute=inline"])

    def fresh(self) -> Path:
        storage = Path(tempfile.mkdtemp(prefix="storage-", dir=self.folder))
        shutil.copytree(self.source / "artifacts", storage / "artifacts", copy_function=os.link)
        return storage

    def settings(self, storage: Path, *, units: int, iterations: int) -> list[str]:
        classes = [str(n) for n in range(min(units, 10))]  # a unit holds images of one class
        per_class = BATCH * (units // len(classes))
        own = [f"images_per_class={per_class}", f"classes={json.dumps(classes)}", f"method.iterations={iterations}"]
        return [*ALIKE, *own, f"storage={storage}"]

    def step_s(self) -> float:
        """Seconds of an iteration on this machine."""
        storage = self.fresh()
        loop(self.settings(storage, units=3, iterations=200), storage)
        return between(stamps_of(storage, SHARDS), 1) / 200


def run_command(storage: Path, settings: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "prism_ray", "run", *settings, f"storage={storage}"]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": ""}


def product(storage: Path, settings: Sequence[str]) -> tuple[float, float]:
    """Run the product's own command; when it began, and its seconds."""
    began = time.time()
    command = run_command(storage, settings)
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-500:]}{done.stderr[-2000:]}"
        )
    return began, time.time() - began


def spec_of(settings: Sequence[str]) -> RunSpec:
    """The run as a worker sees it."""
    config = compose([*settings, "compute=inline", "compute.threads=1"])
    with open(os.devnull, "w") as nowhere, ExitStack() as stack:
        run = open_run(Row("benchmark", config), stack)
        runtime = stack.enter_context(pipeline.make_runtime(config))
        command = pipeline.Command([run], runtime, stack.enter_context(Progress(nowhere)), [])
        for stage in (pipeline.prepare, pipeline.teach):
            stage(command)
        return run.spec()


def loop(settings: Sequence[str], folder: Path, *, part: int = 0, parts: int = 1) -> None:
    """The bare loop over every `parts`-th unit."""
    spec = spec_of(settings)
    units, synthesizer = spec.units()[part::parts], Synthesizer(spec)
    with ThreadPoolExecutor(1) as writer:
        for unit in units:
            table, _ = synthesizer.compute(unit)
            writer.submit(pq.write_table, table, folder / f"{unit.name}.parquet")


def bare(lab: Lab, *, units: int, iterations: int) -> dict[str, float]:
    """Seconds per unit of one process."""
    storage = lab.fresh()
    settings = lab.settings(storage, units=units, iterations=iterations)
    spec_of(settings)  # what the process finds
    done = subprocess.run(loop_command(settings, storage), stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise SystemExit(f"the bare loop ended with {done.returncode}")
    unit_s = between(stamps_of(storage, SHARDS), 1)
    shutil.rmtree(storage)
    return {"unit_s": unit_s}


def loop_command(settings: Sequence[str], storage: Path, *, part: int = 0, parts: int = 1) -> list[str]:
    return [sys.executable, __file__, "--loop", json.dumps(settings), str(storage), str(part), str(parts)]


def on_ray(lab: Lab, *, units: int, iterations: int) -> dict[str, float]:
    """Seconds per unit of a run with one actor, the share of them that its receipts count as making, and its start."""
    storage = lab.fresh()
    began, seconds = product(storage, ray_settings(lab, storage, actors=1, units=units, iterations=iterations))
    files = list(storage.glob(RECEIPTS))
    assert len(files) == units
    ended = sorted((file.stat().st_mtime, json.loads(file.read_text())["seconds"]) for file in files)
    stamps, made = zip(*ended, strict=True)
    unit_s = between(stamps, 1)
    shutil.rmtree(storage)
    return {
        "unit_s": unit_s,
        "making": fmean(made[1:]) / unit_s,  # of the units in the same time
        "start_s": stamps[0] - began - made[0],
        "end_s": began + seconds - stamps[-1],
    }


def ray_settings(lab: Lab, storage: Path, *, actors: int, units: int, iterations: int) -> list[str]:
    placed = ["compute=ray", f"compute.actors={actors}", "compute.threads=1", "compute.cpus=2"]
    return [*lab.settings(storage, units=units, iterations=iterations), *placed]


class Side:
    """Commands whose units leave files, with all that they start: stopped and let go on from outside.

    Sides that go on in turn for seconds see the same machine; whole commands one after the other don't, where another
    guest of the host comes and goes.
    """

    def __init__(self, commands: Sequence[Sequence[str]], storage: Path, pattern: str, *, workers: int) -> None:
        self._storage, self._pattern, self._workers = storage, pattern, workers
        self._roots = [psutil.Popen(each, env=environment(), stdout=subprocess.DEVNULL) for each in commands]

    def stamps(self) -> list[float]:
        return stamps_of(self._storage, self._pattern)

    def is_ended(self) -> bool:
        return any(root.poll() is not None for root in self._roots)

    def wait_and_stop(self) -> None:
        """Let it make two units per worker, and stop it."""
        while len(self.stamps()) < 2 * self._workers:
            if self.is_ended():
                raise SystemExit(f"{self._roots[0].args} ended before its first units were made")
            time.sleep(0.2)
        self._signal(signal.SIGSTOP)

    def go_on(self, seconds: float) -> dict[str, float]:
        """Seconds per unit while it went on for so long, and cores that processes which make units had."""
        before = self._makers_cpu_s()
        began = time.time()
        self._signal(signal.SIGCONT)
        time.sleep(seconds)
        self._signal(signal.SIGSTOP)
        made = [stamp for stamp in self.stamps() if stamp >= began]
        if self.is_ended() or len(made) < 2 * self._workers:
            raise SystemExit(
                f"{len(made)} units in {seconds:g} s: units are too long or too few; see --seconds, --units"
            )
        return {"unit_s": between(made, self._workers), "cores": (self._makers_cpu_s() - before) / seconds}

    def end(self) -> None:
        """Kill all its processes, and remove what they wrote."""
        for process in self._family():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        for root in self._roots:
            root.wait()
        shutil.rmtree(self._storage)

    def _makers_cpu_s(self) -> float:
        makers = [
            each
            for each in self._family()
            if any(part.startswith(("--loop", "ray::MapWorker")) for part in each.cmdline())
        ]
        return sum(sum(each.cpu_times()[:2]) for each in makers)

    def _signal(self, number: signal.Signals) -> None:
        for process in self._family():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def _family(self) -> list[psutil.Process]:
        found: list[psutil.Process] = []
        for root in self._roots:
            with suppress(psutil.NoSuchProcess):
                found += [root, *root.children(recursive=True)]
        return found


def stamps_of(folder: Path, pattern: str) -> list[float]:
    """When the files that units leave were written."""
    return sorted(file.stat().st_mtime for file in folder.glob(pattern))


def between(stamps: Sequence[float], workers: int) -> float:
    """Seconds per unit from when every worker has made one."""
    ordered = sorted(stamps)
    return (ordered[-1] - ordered[workers - 1]) / (len(ordered) - workers)


def in_turn(sides: dict[str, Callable[[], dict[str, float]]], *, pairs: int) -> dict[str, list[dict[str, float]]]:
    """What each side measured, round after round, in an order that turns around."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for number in range(pairs):
        for name in list(sides)[:: 1 if number % 2 else -1]:
            found[name].append(sides[name]())
            print(f"{name} {found[name][-1]}", file=sys.stderr, flush=True)
    return found


def one_actor(lab: Lab, *, unit_s: float, units: int, pairs: int) -> dict[str, Any]:
    iterations = max(1, round(unit_s / lab.step_s()))
    same = {"units": units, "iterations": iterations}
    sides = {"ray": partial(on_ray, lab, **same), "bare": partial(bare, lab, **same)}
    found = in_turn(sides, pairs=pairs)
    publish_s = publishing(lab)
    return {
        **same,
        "unit_s": {name: spread([each["unit_s"] for each in own]) for name, own in found.items()},
        "ratio": spread([a["unit_s"] / b["unit_s"] for a, b in zip(found["ray"], found["bare"], strict=True)]),
        "making": spread([each["making"] for each in found["ray"]]),
        "busy": spread([each["making"] + publish_s / each["unit_s"] for each in found["ray"]]),
        "start_s": spread([each["start_s"] for each in found["ray"]]),
        "end_s": spread([each["end_s"] for each in found["ray"]]),
    }


def two_actors(lab: Lab, *, unit_s: float, units: int, pairs: int, turn_s: float = TURN_S) -> dict[str, Any]:
    iterations = max(1, round(unit_s / lab.step_s()))
    same = {"units": units, "iterations": iterations}
    found = [beside_processes(lab, **same, turn_s=turn_s) for _ in range(pairs)]
    return {
        **same,
        "unit_s": {name: spread([each[name]["unit_s"] for each in found]) for name in found[0]},
        "cores": {name: spread([each[name]["cores"] for each in found]) for name in found[0]},
        "ratio": spread([each["two processes"]["unit_s"] / each["two actors"]["unit_s"] for each in found]),
        "over_one_actor": spread([each["one actor"]["unit_s"] / each["two actors"]["unit_s"] for each in found]),
    }


def beside_processes(lab: Lab, *, units: int, iterations: int, turn_s: float) -> dict[str, dict[str, float]]:
    """What `Side.go_on` says of two actors, two bare processes and one actor, all just started, that go on in turn."""

    def on_actors(actors: int) -> Side:
        storage = lab.fresh()
        settings = ray_settings(lab, storage, actors=actors, units=units, iterations=iterations)
        return Side([run_command(storage, settings)], storage, RECEIPTS, workers=actors)

    def processes() -> Side:
        storage = lab.fresh()
        settings = lab.settings(storage, units=units, iterations=iterations)
        spec_of(settings)  # what the processes find
        commands = [loop_command(settings, storage, part=part, parts=2) for part in range(2)]
        return Side(commands, storage, SHARDS, workers=2)

    begin = {"two actors": partial(on_actors, 2), "two processes": processes, "one actor": partial(on_actors, 1)}
    sides: dict[str, Side] = {}
    try:
        for name, beginning in begin.items():
            sides[name] = beginning()
            sides[name].wait_and_stop()
        found = in_turn({name: partial(side.go_on, turn_s) for name, side in sides.items()}, pairs=2)
    finally:
        for side in sides.values():
            side.end()
    return {name: {key: fmean(each[key] for each in own) for key in own[0]} for name, own in found.items()}


def publishing(lab: Lab, *, repeats: int = 30) -> float:
    """Seconds that a unit's attempt and publication take besides its making, median."""
    storage, seconds = lab.fresh(), []
    spec = spec_of(lab.settings(storage, units=repeats, iterations=1))
    synthesizer, ledger = Synthesizer(spec), spec.ledger()
    attempt = Attempt(spec.epoch, "node", lambda: {"node"}, 3, 3600.0)
    for unit in spec.units():
        made = synthesizer.compute(unit)
        began = time.monotonic()
        outcome = run_unit(ledger, image_receipt(unit), lambda made=made: made, attempt)
        seconds.append(time.monotonic() - began)
        assert outcome.status == "done", outcome
    shutil.rmtree(storage)
    return median(seconds)


def publish(lab: Lab, *, pairs: int) -> dict[str, Any]:
    found = [publishing(lab) for _ in range(pairs)]
    shares = {f"of {unit:g} s": round(100 * median(found) / unit, 3) for unit in (10, 1, 0.1)}
    return {"ms": spread([1e3 * each for each in found]), "percent": shares, "images": BATCH}


def finished(lab: Lab, *, units: int, pairs: int) -> dict[str, Any]:
    storages = {}
    for count in (units, 20):
        settings = [*MANY, f"images_per_class={max(1, count // 10)}"]
        storages[count] = (lab.folder / f"finished-{count}", settings)
        product(*storages[count])
    again = {str(n): partial(lambda at: {"s": product(*at)[1]}, at) for n, at in storages.items()}
    found = in_turn(again, pairs=pairs)
    return {"units": units, "s": {name: spread([each["s"] for each in own]) for name, own in found.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="*", metavar="CELL", default=[], help=f"of {', '.join(CELLS)}; all otherwise")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--seconds", type=float, help="of a unit of `long` (10) and `pair` (0.5)")
    parser.add_argument("--units", type=int, help="of `long` (3), `short` (200), `pair` (200) and `finished` (10000)")
    parser.add_argument("--folder", type=Path, help="where storages are kept; a temporary folder otherwise")
    parser.add_argument("--loop", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.loop:
        settings, folder, part, parts = options.loop
        loop(json.loads(settings), Path(folder), part=int(part), parts=int(parts))
        return
    if unknown := set(options.cells) - set(CELLS):
        parser.error(f"unknown cells {', '.join(sorted(unknown))}; known: {', '.join(CELLS)}")
    pairs, seconds, units = options.pairs, options.seconds, options.units
    with tempfile.TemporaryDirectory(prefix="pipeline-") as temporary:
        lab = Lab(options.folder or Path(temporary))
        cells: dict[str, Callable[[], dict[str, Any]]] = {
            "long": lambda: one_actor(lab, unit_s=seconds or 10.0, units=units or 3, pairs=pairs),
            "short": lambda: one_actor(lab, unit_s=0.1, units=units or 200, pairs=pairs),
            "pair": lambda: two_actors(lab, unit_s=seconds or 0.5, units=units or 200, pairs=pairs),
            "publish": lambda: publish(lab, pairs=pairs),
            "finished": lambda: finished(lab, units=units or 10_000, pairs=pairs),
        }
        for name in options.cells or CELLS:
            print(json.dumps({"cell": name, **cells[name](), **circumstances(pairs)}), flush=True)


if __name__ == "__main__":
    main()
