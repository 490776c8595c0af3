"""Every kind of fault: inject it, let the run go on, compare with the undisturbed one. The tests run a few of each,
`benchmarks/faults.py` all.

A kind is a function of a `Lab` that returns a `Tally`; counts are arguments, randomness is seeded.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
from injected import read_log
from product import (
    UNITS,
    Ended,
    Product,
    Reference,
    Running,
    Tally,
    fired,
    manifest,
    no_ray_left,
    ray_processes,
    rows,
)
from s3_server import BUCKET, Server, environment, faulty, s3_server

from prism_ray.storage import open_store

CONTINUES = "run the same command"
ON_RAY = ["compute=ray", "compute.actors=2", "compute.cpus=2"]


class Lab:
    """Where faults are injected: a folder, the product, an undisturbed run.

    Args:
        folder: emptied by nobody; each storage in it is new.
        teachers: storage with artifacts to begin with, so that nothing is trained again.
    """

    def __init__(self, folder: Path, *, teachers: Path | None = None) -> None:
        self.folder = folder
        self.product = Product(folder / "output")
        self.reference = Reference(folder / "reference", UNITS)
        self._count = 0
        if not self.reference.storage.exists():
            self._make_reference(teachers)

    def _make_reference(self, teachers: Path | None) -> None:
        storage = self.reference.storage
        if teachers is not None:
            shutil.copytree(teachers / "artifacts", storage / "artifacts")
            shutil.rmtree(storage / "artifacts/same_images", ignore_errors=True)
        done = self.product.run(self.reference.command(storage))
        assert done.code == 0, done.err

    def fresh(self) -> Path:
        return self.reference.fresh(self._new())

    def finished(self) -> Path:
        return self.reference.finished(self._new())

    def log(self, storage: Path) -> Path:
        """Where the events of a storage's runs go."""
        return storage / "events.log"

    def _new(self) -> Path:
        self._count += 1
        return self.folder / f"storage-{self._count:04d}"

    def done_with(self, tally: Tally, storage: Path) -> None:
        """Make room, unless there is something to look at."""
        if tally.is_passed:
            shutil.rmtree(storage, ignore_errors=True)

    def run(self, storage: Path, *more: str, **options: Any) -> Ended:
        return self.product.run(self.reference.command(storage, *more), log=self.log(storage), **options)

    def start(self, storage: Path, *more: str, **options: Any) -> Running:
        return self.product.start(self.reference.command(storage, *more), log=self.log(storage), **options)

    @cached_property
    def trial(self) -> tuple[float, int]:
        """Seconds of an undisturbed run on this machine, and the file operations it does in its folder."""
        storage = self.fresh()
        ended = self.run(storage, faults={"files": {"root": str(storage / "runs"), "nth": 0, "trace": True}})
        operations = sum(event["event"] == "file" for event in read_log(self.log(storage)))
        shutil.rmtree(storage)
        return ended.seconds, operations


def complete(lab: Lab, tally: Tally, storage: Path, kills: Sequence[float] = (), *more: str, **options: Any) -> None:
    """Run to the end and compare."""
    ended = lab.run(storage, *more, **options)
    tally.runs += 1
    tally.expect(ended.code == 0, f"{storage}: the last run ended with {ended.code}: {ended.err}")
    tally.compare(lab.reference, storage)
    tally.count_work(lab.log(storage), kills)
    lab.done_with(tally, storage)


def one_line(tally: Tally, ended: Ended, code: int, *words: str) -> None:
    """Expect an exit code and one line on stderr that holds these words."""
    seen = f"code {ended.code}, stderr {ended.err!r}"
    tally.expect(ended.code == code, f"expected code {code}: {seen}")
    tally.expect(ended.err.count("\n") == 1, f"expected one line: {seen}")
    for word in words:
        tally.expect(word in ended.err, f"expected {word!r}: {seen}")


# Kills, inline


def driver_killed(lab: Lab, *, kills: int, per_run: int = 5, seed: int = 0) -> Tally:
    """SIGKILL at random times after the first line; the same command again."""
    tally, rng = Tally("driver killed"), random.Random(seed)
    longest_s = lab.trial[0]
    while tally.faults < kills:
        storage, at = lab.fresh(), []
        while len(at) < per_run and tally.faults < kills:
            running = lab.start(storage)
            running.wait_for("\n")
            time.sleep(rng.uniform(0, longest_s * 0.7))
            if not running.is_alive:
                break  # done before the kill
            running.kill()
            at.append(time.monotonic())
            tally.faults += 1
            tally.runs += 1
        complete(lab, tally, storage, at)
    tally.expect(tally.recomputed <= tally.faults, f"{tally.recomputed} units tried again after {tally.faults} kills")
    return tally


def killed_again_and_again(lab: Lab, *, cycles: int, seed: int = 0) -> Tally:
    """Start, wait 0.2 to 3 s, SIGKILL; over and over, on one run."""
    tally, rng, storage, at = Tally("killed again and again"), random.Random(seed), lab.fresh(), []
    slow = {"units": {stage: {"*": f"sleep:{cycles * 0.02}"} for stage in ("synthesize", "relabel")}}
    for _ in range(cycles):
        running = lab.start(storage, faults=slow)
        time.sleep(rng.uniform(0.2, 3))
        running.kill()
        at.append(time.monotonic())
        tally.faults += 1
        tally.runs += 1
    complete(lab, tally, storage, at)
    tally.expect(tally.recomputed <= cycles, f"{tally.recomputed} units tried again after {cycles} kills")
    return tally


CRASH_POINTS: dict[str, dict[str, Any]] = {
    "before the temporary shard": {"op": "open", "key": "/.tmp/", "nth": 9, "then": "before"},
    "half of a temporary shard": {"op": "write", "key": "/.tmp/", "nth": 9, "then": "middle"},
    "before it is synced": {"op": "fsync", "key": "/.tmp/", "nth": 9, "then": "before"},
    "after it is synced": {"op": "fsync", "key": "/.tmp/", "nth": 9, "then": "after"},
    "before the images get their name": {"op": "link", "key": "/images/", "nth": 3, "then": "before"},
    "between images and receipt": {"op": "link", "key": "/images/", "nth": 3, "then": "after"},
    "before the labels get their name": {"op": "link", "key": "/labels/", "nth": 3, "then": "before"},
    "between labels and receipt": {"op": "link", "key": "/labels/", "nth": 3, "then": "after"},
    "before a receipt": {"op": "replace", "key": "/receipts/synthesize/", "nth": 4, "then": "before"},
    "after a receipt": {"op": "replace", "key": "/receipts/synthesize/", "nth": 4, "then": "after"},
    "before a start marker": {"op": "replace", "key": "/attempts/", "nth": 5, "then": "before"},
    "before the run's settings": {"op": "replace", "key": "/config.yaml", "nth": 1, "then": "before"},
    "before the lock": {"op": "link", "key": "/lock/", "nth": 1, "then": "before"},
    "after the lock": {"op": "link", "key": "/lock/", "nth": 1, "then": "after"},
    "before a student's folder gets its name": {"op": "rename|replace", "key": "/student/", "nth": 1, "then": "before"},
    "between student and receipt": {"op": "replace", "key": "/receipts/distill/", "nth": 1, "then": "before"},
    "before the manifest": {"op": "replace", "key": "/manifest.json", "nth": 1, "then": "before"},
    "after the manifest": {"op": "replace", "key": "/manifest.json", "nth": 1, "then": "after"},
}
"""Moments in which a process dies, see `injected._FileFaults`."""


def crashed_at(lab: Lab, points: Sequence[str]) -> Tally:
    """SIGKILL at chosen moments of publishing; the same command again."""
    tally = Tally("crash points")
    for point in points:
        crash(lab, tally, CRASH_POINTS[point], point)
    return tally


def crashed_anywhere(lab: Lab, *, crashes: int, seed: int = 0) -> Tally:
    """SIGKILL before, in the middle of, or after file operations drawn from all that a run does in its folder."""
    tally, rng, total = Tally("crash at any file operation"), random.Random(seed), lab.trial[1]
    for number in range(crashes):
        low, high = 1 + number * total // crashes, 1 + (number + 1) * total // crashes  # one of each stretch
        fault = {"nth": rng.randrange(low, high), "then": rng.choice(["before", "middle", "after"])}
        crash(lab, tally, fault, f"operation {fault['nth']} of {total}, {fault['then']}", may_miss=True)
    tally.figures["operations_of_a_run"] = total
    return tally


def crash(lab: Lab, tally: Tally, fault: dict[str, Any], name: str, *, may_miss: bool = False) -> None:
    storage = lab.fresh()
    ended = lab.run(storage, faults={"files": {"root": str(storage / "runs"), **fault}})
    tally.runs += 1
    hits = fired(lab.log(storage))
    tally.faults += hits
    tally.expect(hits == 1 or may_miss, f"{name}: the fault did not act")
    tally.expect(ended.code == (-9 if hits else 0), f"{name}: ended with {ended.code}: {ended.err}")
    if "manifest" not in fault.get("key", ""):
        had_manifest = [path for path in storage.glob("runs/*/manifest.json") if hits and not may_miss]
        tally.expect(not had_manifest, f"{name}: a manifest, although the run was not done")
    complete(lab, tally, storage, [])


# Disk


def disk_full_anywhere(lab: Lab, *, times: int, seed: int = 0) -> Tally:
    """No space left from a file operation on, drawn from all of a run; then there is space again."""
    return failing(lab, Tally("no space left, any operation"), times, seed, "ENOSPC", lasts=True)


def write_error_anywhere(lab: Lab, *, times: int, seed: int = 0) -> Tally:
    """One file operation fails with an input/output error."""
    return failing(lab, Tally("input/output error, any operation"), times, seed, "EIO", lasts=False)


def failing(lab: Lab, tally: Tally, times: int, seed: int, code: str, *, lasts: bool) -> Tally:
    rng, total, unharmed = random.Random(seed), lab.trial[1], 0
    for number in range(times):
        low, high = 1 + number * total // times, 1 + (number + 1) * total // times
        storage = lab.fresh()
        fault = {"root": str(storage / "runs"), "nth": rng.randrange(low, high), "then": code, "lasts": lasts}
        ended = lab.run(storage, faults={"files": fault})
        tally.runs += 1
        acted = [event["what"] for event in read_log(lab.log(storage)) if event["event"] == "fault"]
        tally.faults += len(acted)
        where = f"operation {fault['nth']} of {total} ({acted})"
        if ended.code == 0:
            unharmed += 1  # what failed was a note for people, a heartbeat or the removal of something
            tally.expect(manifest(next(storage.glob("runs/*"))) is not None, f"{where}: done without a manifest")
        else:
            had = list(storage.glob("runs/*/manifest.json"))
            tally.expect(not had, f"{where}: a manifest, although the run was not done")
            tally.expect(
                ended.code in (1, 2) and ended.err.count("\n") == 1, f"{where}: code {ended.code}: {ended.err[-600:]}"
            )
        complete(lab, tally, storage)
    tally.figures["runs_that_went_on"] = unharmed
    return tally


@contextmanager
def small_disk(folder: Path, size: str) -> Any:
    """A file system of a size of its own; None where this process may not mount one."""
    folder.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    try:
        yield (
            (lambda new: subprocess.run(["mount", "-o", f"remount,size={new}", str(folder)], check=True))
            if (mounted.returncode == 0)
            else None
        )
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", str(folder)], check=True)


def disk_full(lab: Lab, *, sizes_kb: Sequence[int]) -> Tally:
    """A file system that is really full; then it grows."""
    tally = Tally("full file system")
    for number, size_kb in enumerate(sizes_kb):
        disk = lab.folder / f"disk-{tally.faults}-{number}"
        with small_disk(disk, "200m") as resize:
            if resize is None:
                tally.notes.append("not run: this process may not mount a file system")
                return tally
            storage = lab.reference.fresh(disk / "storage")
            used_kb = sum(path.stat().st_blocks // 2 for path in storage.rglob("*"))
            resize(f"{used_kb + size_kb}k")
            ended = lab.product.run(lab.reference.command(storage))
            tally.faults += 1
            tally.runs += 1
            one_line(tally, ended, 1, "no space left", "bytes free", CONTINUES)
            tally.expect(not list(storage.glob("runs/*/manifest.json")), "a manifest, although the run was not done")
            resize("200m")
            ended = lab.product.run(lab.reference.command(storage))
            tally.runs += 1
            tally.expect(ended.code == 0, f"with space again: {ended.code} {ended.err}")
            tally.compare(lab.reference, storage)
    return tally


# Signals, drivers, settings


def signalled(lab: Lab, *, number: int, times: int, seed: int = 0) -> Tally:
    """SIGTERM or SIGINT at random times: an orderly end with its code, and the same command again."""
    code = {int(signal.SIGTERM): 75, int(signal.SIGINT): 130}[number]
    tally, rng, storage = Tally(signal.Signals(number).name), random.Random(seed), lab.fresh()
    longest_s, seconds = lab.trial[0], []
    while tally.faults < times:
        if tally.faults and tally.faults % 4 == 0:
            complete(lab, tally, storage)
            storage = lab.fresh()
        running = lab.start(storage)
        running.wait_for("\n")
        time.sleep(rng.uniform(0, longest_s / 4))
        sent = time.monotonic()
        running.signal(number)
        ended = running.wait(60)
        tally.runs += 1
        if ended.code == 0:
            complete(lab, tally, storage)
            storage = lab.fresh()
            continue
        tally.faults += 1
        seconds.append(round(time.monotonic() - sent, 2))
        one_line(tally, ended, code, CONTINUES)
    complete(lab, tally, storage)
    tally.figures["seconds_to_exit"] = seconds
    tally.expect(max(seconds) < 20, f"took {max(seconds)} s to end")
    return tally


def two_drivers(lab: Lab, *, times: int) -> Tally:
    """The same command twice at once: one drives, the other says so."""
    tally = Tally("two drivers at once")
    slow = {"units": {"synthesize": {"*": "sleep:0.4"}}}
    for number in range(times):
        storage = lab.fresh()
        first = lab.start(storage, faults=slow)
        if number % 2 == 0:
            first.wait_for(r"synthesize\] \d")
        second = lab.start(storage, faults=slow)
        ends = [first.wait(), second.wait()]
        tally.faults += 1
        tally.runs += 2
        refused = [ended for ended in ends if ended.code != 0]
        tally.expect(len(refused) == 1, f"ended with {[ended.code for ended in ends]}")
        for ended in refused:
            one_line(tally, ended, 2, "already being driven")
        if number % 2 == 0:
            tally.expect(ends[0].code == 0, f"the first was harmed: {ends[0].err}")
        complete(lab, tally, storage)
    return tally


def changed_settings(lab: Lab) -> Tally:
    """Another number of images, seed or teacher under the same run id is refused, and changes nothing."""
    tally, storage = Tally("settings changed"), lab.fresh()
    named = "run_id=one"
    ended = lab.run(storage, named)
    tally.expect(ended.code == 0, ended.err)
    before = {path: path.stat().st_mtime_ns for path in (storage / "runs").rglob("*") if path.is_file()}
    changes = {
        "images_per_class": "images_per_class=6",
        "seed": "seed=1",
        "teachers.primary": "teachers.primary=convnet",
    }
    for key, change in changes.items():
        ended = lab.run(storage, named, change)
        tally.faults += 1
        tally.runs += 1
        one_line(tally, ended, 2, key, "run_id")
    after = {path: path.stat().st_mtime_ns for path in (storage / "runs").rglob("*") if path.is_file()}
    changed = [str(path) for path in after if after[path] != before.get(path) and "/lock/" not in str(path)]
    tally.expect(not changed, f"a refused command wrote {changed[:3]}")
    ended = lab.run(storage, "run_id=two", "seed=1")
    tally.expect(ended.code == 0, f"another run id: {ended.err}")
    return tally


# Damage


def _flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def _truncate(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(1, len(data))])


def _empty(path: Path, rng: random.Random) -> None:
    path.write_bytes(b"")


DAMAGE: dict[str, Callable[[Path, random.Random], None]] = {
    "flipped bit": _flip,
    "truncated": _truncate,
    "empty": _empty,
    "missing": lambda path, rng: path.unlink(),
}


def damaged(lab: Lab, *, kind: str, shards: int, seed: int = 0) -> Tally:
    """Shards of a finished run damaged on disk: `verify` finds each, `repair=true` makes each again."""
    tally, rng, storage = Tally(f"shards damaged: {kind}"), random.Random(seed), lab.finished()
    (run_dir,) = (storage / "runs").iterdir()
    paths = rng.sample(sorted([*run_dir.glob("images/*.parquet"), *run_dir.glob("labels/*.parquet")]), shards)
    if kind == "swapped":
        for one, two in zip(paths[::2], paths[1::2], strict=True):
            first, second = one.read_bytes(), two.read_bytes()
            one.write_bytes(second)
            two.write_bytes(first)
    else:
        for path in paths:
            DAMAGE[kind](path, rng)
    tally.faults = shards
    verify = ["verify", *lab.reference.command(storage)[1:]]
    ended = lab.product.run(verify)
    said = [line.partition(": ")[0] for line in ended.out.splitlines()]
    found = sum(path.relative_to(run_dir).as_posix() in said for path in paths)
    tally.figures |= {"damaged": shards, "found": found}
    tally.expect(ended.code == 1, f"verify ended with {ended.code}: {ended.err}")
    tally.expect(found == shards, f"verify found {found} of {shards}: {ended.out}")
    ended = lab.product.run([*verify, "repair=true"], log=lab.log(storage))
    tally.runs += 2
    tally.expect(ended.code == 0, f"repair ended with {ended.code}: {ended.err}")
    ended = lab.product.run(verify)
    tally.expect(ended.code == 0, f"after the repair: {ended.out}")
    tally.compare(lab.reference, storage)
    starts = [event for event in read_log(lab.log(storage)) if event["event"] == "start"]
    tally.recomputed = len(starts)
    lab.done_with(tally, storage)
    return tally


# Poison units


LABEL_POISON = ("raise", "memory", "oom", "lost_row", "doubled_row", "swapped_rows", "lost_column")
IMAGE_POISON = (*LABEL_POISON, "small_pixels")
REASONS = {
    "small_pixels": "pixels are",
    "raise": "ValueError: poison",
    "memory": "lower method.batch_size",
    "oom": "lower method.batch_size",
    "lost_row": "holds images",
    "doubled_row": "holds images",
    "swapped_rows": "holds images",
    "lost_column": "has columns",
    "segfault": "its process died",
    "exit": "its process died",
    "hang": "compute.unit_timeout_s",
    "spin": "its process died",
}


def poison(
    lab: Lab,
    *,
    what: Sequence[str],
    stage: str = "synthesize",
    timeout_s: float = 60,
    on_ray: bool,
    limit_s: float = 240,
) -> Tally:
    """Units that always fail, each in its way, in one run: three tries each, the rest completes, exit code 3."""
    tally, storage = Tally(f"poison units, {stage}", "ray" if on_ray else "inline"), lab.fresh()
    units = {2 * n + 1: fault for n, fault in enumerate(what)}
    faults = {"units": {stage: {str(unit): fault for unit, fault in units.items()}}}
    made = ["stages=[prepare,teach,synthesize,relabel]", f"compute.unit_timeout_s={timeout_s:g}"]
    executor = [*ON_RAY, *made] if on_ray else made
    started = time.monotonic()
    running = lab.start(storage, *executor, forked=not on_ray, faults=faults)
    with no_ray_left(tally, running):
        ended = running.wait(limit_s)
    (run_dir,) = (storage / "runs").iterdir()
    entries = [json.loads(path.read_text()) for path in run_dir.glob("quarantine/units/*/*.json")]
    tries = [e for e in read_log(lab.log(storage)) if e["event"] == "fault"]
    tally.faults, tally.runs = len(tries), 1
    tally.expect(ended.code == 3, f"ended with {ended.code}: {ended.err}")
    by_unit = {int(entry["name"].split("-")[1]): entry for entry in entries}
    tally.expect(set(by_unit) == set(units), f"quarantined {sorted(by_unit)}, poison were {sorted(units)}")
    for unit, fault in units.items():
        entry = by_unit.get(unit, {"attempts": 0, "reason": ""})
        tally.expect(entry["attempts"] == 3, f"{fault}: {entry['attempts']} attempts")
        tally.expect(REASONS[fault] in entry["reason"], f"{fault}: reason {entry['reason']!r}")
    tally.expect(len(tries) == 3 * len(units), f"{len(tries)} tries of {len(units)} units")
    folder = "images" if stage == "synthesize" else "labels"
    done = len(list(run_dir.glob(f"{folder}/*.parquet")))
    total = len(list(lab.reference.run_dir.glob(f"{folder}/*.parquet")))
    tally.expect(done == total - len(units), f"{done} of {total - len(units)} other units")
    tally.figures |= {"units": total, "poison": len(units), "others_done": done, "tries": len(tries)}
    tally.figures["wall_s"] = round(time.monotonic() - started, 1)
    healed = lab.product.run(["retry", *lab.reference.command(storage)[1:]])
    tally.runs += 1
    tally.expect(healed.code == 0, f"retry without the fault: {healed.err}")
    tally.compare(lab.reference, storage)
    lab.done_with(tally, storage)
    return tally


def hanging_inline(lab: Lab, *, what: str, timeout_s: float = 20, tries: int = 3) -> Tally:
    """A unit that hangs in this process: each command is cut and counts a try, the one after them quarantines it.

    A process cut in C code has no say any more: its tries don't count, as inline has nobody who saw it die.
    """
    tally, storage = Tally(f"unit that hangs inline ({what})"), lab.fresh()
    faults = {"units": {"synthesize": {"3": what}}}
    made = ["stages=[prepare,teach,synthesize,relabel]"]
    made += [f"compute.unit_timeout_s={timeout_s:g}", f"compute.max_attempts={tries}"]
    for _ in range(tries):
        ended = lab.run(storage, *made, faults=faults)
        tally.runs += 1
        tally.expect(ended.code == 1, f"ended with {ended.code}: {ended.err}")
        if what == "hang":
            one_line(tally, ended, 1, "compute.unit_timeout_s", CONTINUES)
    tally.faults = fired(lab.log(storage))
    if what == "hang":
        ended = lab.run(storage, *made, faults=faults)
        tally.runs += 1
        tally.expect(ended.code == 3, f"ended with {ended.code}: {ended.err}")
        tally.expect(fired(lab.log(storage)) == tries, "tried once more than it may")
        ended = lab.product.run(["retry", *lab.reference.command(storage)[1:]])
        tally.expect(ended.code == 0, ended.err)
    complete(lab, tally, storage)
    return tally


# On Ray


def workers_killed(lab: Lab, *, kills: int, seed: int = 0) -> Tally:
    """SIGKILL of a worker in a unit, again and again, in one run that nobody restarts."""
    tally, rng, storage, at = Tally("Ray workers killed", "ray"), random.Random(seed), lab.fresh(), []
    slow = {"units": {stage: {"*": "sleep:0.3"} for stage in ("synthesize", "relabel")}}
    running = lab.start(storage, *ON_RAY, forked=False, faults=slow)
    log, killed = lab.log(storage), set()
    while len(at) < kills and running.is_alive:
        time.sleep(rng.uniform(0.05, 0.5))
        in_flight: dict[int, tuple[str, int]] = {}
        for event in read_log(log):
            if event["event"] == "start":
                in_flight[event["pid"]] = (event["stage"], event["unit"])
            elif event["event"] == "published":
                in_flight.pop(event["pid"], None)
        # Each unit at most once: one that is killed three times is rightly given up.
        found = [pid for pid, unit in in_flight.items() if unit not in killed and psutil.pid_exists(pid)]
        if not found:
            continue
        pid = rng.choice(found)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            killed.add(in_flight[pid])
            at.append(time.monotonic())
    tally.faults = len(at)
    with no_ray_left(tally, running):
        ended = running.wait(400)
    tally.runs = 1
    tally.expect(ended.code == 0, f"ended with {ended.code}: {ended.err}")
    tally.compare(lab.reference, storage)
    tally.count_work(log, at)
    tally.expect(tally.recomputed <= tally.faults, f"{tally.recomputed} units tried again after {tally.faults} kills")
    lab.done_with(tally, storage)
    return tally


def ray_part_killed(lab: Lab, *, part: str, kills: int, per_run: int = 3, seed: int = 0) -> Tally:
    """SIGKILL of the driver alone, its whole group, the raylet or the GCS at random times of the work on units."""
    tally, rng = Tally(f"{part} killed", "ray"), random.Random(seed)
    slow = {"units": {stage: {"*": "sleep:0.3"} for stage in ("synthesize", "relabel")}}
    seconds = []
    while tally.faults < kills:
        storage, at = lab.fresh(), []
        while len(at) < per_run and tally.faults < kills:
            running = lab.start(storage, *ON_RAY, forked=False, faults=slow)
            before = len(read_log(lab.log(storage)))
            while len(read_log(lab.log(storage))) == before and running.is_alive:
                time.sleep(0.05)
            time.sleep(rng.uniform(0, 3))
            with no_ray_left(tally, running):
                if not running.is_alive:
                    break
                killed_at = time.monotonic()
                if part == "whole process group":
                    running.kill()
                elif part == "driver":
                    running.signal(signal.SIGKILL)
                    running.wait()
                else:
                    name = {"raylet": "raylet", "head (GCS)": "gcs_server"}[part]
                    (process,) = [p for p in ray_processes(running.pid) if p.name() == name]
                    process.kill()
                    one_line(tally, running.wait(120), 1, CONTINUES)
                    seconds.append(round(time.monotonic() - killed_at, 1))
            at.append(killed_at)
            tally.faults += 1
            tally.runs += 1
        complete(lab, tally, storage, at, *ON_RAY, forked=False)
    if seconds:
        tally.figures["seconds_to_exit"] = seconds
    return tally


def ray_signalled(lab: Lab, *, number: int, times: int, seed: int = 0) -> Tally:
    """SIGTERM or SIGINT while actors work: an orderly end within seconds, no process left, the same command again."""
    code = {int(signal.SIGTERM): 75, int(signal.SIGINT): 130}[number]
    tally, rng, storage, at = Tally(signal.Signals(number).name, "ray"), random.Random(seed), lab.fresh(), []
    slow = {"units": {stage: {"*": "sleep:0.5"} for stage in ("synthesize", "relabel")}}
    seconds = []
    for _ in range(times):
        running = lab.start(storage, *ON_RAY, forked=False, faults=slow)
        before = len(read_log(lab.log(storage)))
        while len(read_log(lab.log(storage))) == before and running.is_alive:
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 2))
        at.append(time.monotonic())
        running.signal(number)
        with no_ray_left(tally, running):
            ended = running.wait(60)
        seconds.append(round(time.monotonic() - at[-1], 1))
        tally.faults += 1
        tally.runs += 1
        one_line(tally, ended, code, CONTINUES)
    complete(lab, tally, storage, at, *ON_RAY, forked=False)
    tally.figures["seconds_to_exit"] = seconds
    tally.expect(max(seconds) < 20, f"took {max(seconds)} s to end")
    return tally


def slow_worker(lab: Lab) -> Tally:
    """One of two actors ten times slower: units go to whoever is free."""
    tally, storage = Tally("slow worker", "ray"), lab.fresh()
    slow_s, fast_s = 5.0, 0.5
    faults = {"slow_worker": {"claim": str(storage / "slow"), "slow_s": slow_s, "fast_s": fast_s}}
    running = lab.start(storage, *ON_RAY, forked=False, faults=faults)
    with no_ray_left(tally, running):
        ended = running.wait(400)
    tally.faults, tally.runs = 1, 1
    tally.expect(ended.code == 0, f"ended with {ended.code}: {ended.err}")
    tally.compare(lab.reference, storage)
    tally.count_work(lab.log(storage))
    events = [event for event in read_log(lab.log(storage)) if event.get("stage") == "synthesize"]
    units = sum(event["event"] == "start" for event in events)
    wall_s = events[-1]["at"] - events[0]["at"]
    ideal_s = units / (1 / slow_s + 1 / fast_s)
    by_pid = Counter(event["pid"] for event in events if event["event"] == "start")
    tally.figures |= {"units": units, "wall_s": round(wall_s, 1), "ideal_s": round(ideal_s, 1)}
    tally.figures["units_by_worker"] = sorted(by_pid.values())
    # What an actor has begun, or was handed beside it, is waited for.
    tally.expect(wall_s <= 1.5 * ideal_s + 2 * slow_s, f"{wall_s:.1f} s, ideal {ideal_s:.1f} s")
    lab.done_with(tally, storage)
    return tally


def orders(lab: Lab, *, shuffles: int, on_ray: bool = True) -> Tally:
    """Units in other orders, by one worker and by two: the same bytes."""
    tally = Tally("order and number of workers", "both" if on_ray else "inline")
    for seed in range(shuffles):
        storage = lab.fresh()
        complete(lab, tally, storage, faults={"shuffle": seed})
    for actors in (1, 2) if on_ray else ():
        sizes = ["compute=ray", f"compute.actors={actors}", f"compute.train_workers={actors}", "compute.cpus=2"]
        complete(lab, tally, lab.fresh(), (), *sizes, forked=False)
    return tally


# Surroundings


PLACES: dict[str, tuple[str, dict[str, str]]] = {
    "C locale": ("plain", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
    "Latin-1 output": ("plain", {"PYTHONIOENCODING": "latin-1", "LC_ALL": "C", "PYTHONUTF8": "0"}),
    "time zone 14 h ahead": ("plain", {"TZ": "Pacific/Kiritimati"}),
    "spaces in the path": ("a folder  with spaces", {}),
    "Unicode in the path": ("données-数据-🙂", {}),
    "Unicode in the path, C locale": ("données-数据", {"LC_ALL": "C"}),
    "Unicode in the path, ASCII only": ("données", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
    "200 characters in the path": ("x" * 200, {}),
    "quotes, = and , in the path": ("it's a=b, {c}", {}),
}


def odd_places(lab: Lab, *, names: Sequence[str], executor: Sequence[str] = ("compute=inline",)) -> Tally:
    """Locales, time zones and paths; the real command, with all stages."""
    tally = Tally("locale, time zone, path", executor[0].removeprefix("compute="))
    for name in names:
        folder, environment = PLACES[name]
        base = lab.fresh()
        storage = base / folder
        storage.mkdir()
        shutil.move(base / "artifacts", storage / "artifacts")
        tally.faults += 1
        command = lab.reference.command(storage, "stages=[]", *executor)
        command = [part if not part.startswith("storage=") else f"storage={quoted(storage)}" for part in command]
        ended = lab.product.run(command, forked=False, environment=environment)
        tally.runs += 1
        if name == "Unicode in the path, ASCII only":
            one_line(tally, ended, 2, "PYTHONUTF8=1")  # Python itself has no text for such a path
        else:
            tally.expect(ended.code == 0, f"{name}: ended with {ended.code}: {ended.err[-400:]}")
            tally.compare(lab.reference, storage)
        lab.done_with(tally, base)
    return tally


def quoted(path: Path) -> str:
    """A value as the command line's grammar takes any text."""
    text = str(path).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{text}'"


def clock_jumps(lab: Lab, *, jumps: Sequence[float]) -> Tally:
    """A wall clock that jumps to and fro."""
    tally = Tally("clock jumps")
    for seconds in jumps:
        tally.faults += 1
        complete(lab, tally, lab.fresh(), faults={"clock": {"seconds": seconds, "every": 7}})
    return tally


def too_many_gpus(lab: Lab) -> Tally:
    """More GPUs than there are: refused at once, before Ray."""
    tally = Tally("wrong GPU count", "ray", faults=1, runs=1)
    storage = lab.fresh()
    sizes = ["compute=ray", "compute.actors=8", "compute.gpus_per_actor=1"]
    ended = lab.run(storage, *sizes, forked=False, environment={"CUDA_VISIBLE_DEVICES": ""})
    one_line(tally, ended, 2, "needs 8 GPUs")
    tally.figures["seconds_to_exit"] = round(ended.seconds, 1)
    tally.expect(not (storage / "runs").exists(), "something was written")
    return tally


def soak(lab: Lab, *, units: int, on_ray: bool) -> Tally:
    """Very many very small units: what the driver holds does not grow with them."""
    tally, storage = Tally(f"soak of {units} units", "ray" if on_ray else "inline"), lab.fresh()
    settings = [f"images_per_class={units // 10}", "method.batch_size=1", "method.engine=initial", "method.init=noise"]
    settings += ["recipe=digits_smoke", "stages=[prepare,teach,synthesize]"]
    executor = ["compute=ray", "compute.actors=1", "compute.cpus=2"] if on_ray else ["compute=inline"]
    command = ["run", *settings, f"storage={storage}", *executor]
    log = lab.log(storage)
    running = lab.product.start(command, forked=False, log=log)
    driver, sizes = psutil.Process(running.pid), []
    while running.is_alive:
        done = sum(1 for _ in storage.glob("runs/*/receipts/synthesize/*"))
        with suppress(psutil.NoSuchProcess):
            sizes.append((done, driver.memory_info().rss))
        time.sleep(1)
    with no_ray_left(tally, running):
        ended = running.wait(10)
    tally.runs = 1
    tally.expect(ended.code == 0, f"ended with {ended.code}: {ended.err}")
    (run_dir,) = (storage / "runs").iterdir()
    images = rows(run_dir)
    tally.rows_expected, tally.rows_found = units, len(images)
    tally.duplicates, tally.lost = len(images) - len(set(images)), units - len(set(images))
    begun = [rss for done, rss in sizes if done >= units // 20]
    growth_mb = (max(begun) - begun[0]) / 2**20 if begun else 0.0
    events = [event["at"] for event in read_log(log) if event["event"] == "published"]
    tally.figures |= {
        "units": units,
        "growth_mb": round(growth_mb, 1),
        "units_per_s": round(len(events) / (events[-1] - events[0]), 1),
    }
    tally.expect(growth_mb < 50 or not on_ray, f"the driver grew by {growth_mb:.0f} MB")
    lab.done_with(tally, storage)
    return tally


# Object storage


def object_store_faults(lab: Lab, *, seeds: Sequence[int], share: float = 0.1) -> Tally:
    """Errors, silence, cut lines and lost answers for a share of all requests of a run on S3."""
    tally = Tally(f"object store: {share:.0%} of requests spoilt")
    requests = 0
    with s3_server() as server, environment(server):
        clean = _clean_storage(lab, server)
        for seed in seeds:
            url = _copied(clean, f"s3://{BUCKET}/seed-{seed}")
            with faulty(server, share=share, seed=seed) as proxy:
                command = ["run", *UNITS, "compute=inline", f"storage={url}"]
                ended = lab.product.run(command, environment=proxy.environment, limit_s=900)
            tally.runs += 1
            tally.faults += sum(proxy.faults.values())
            requests += sum(proxy.requests.values())
            tally.expect(ended.code == 0, f"seed {seed}: ended with {ended.code}: {ended.err}")
            _compare_copy(lab, tally, url)
    tally.figures["requests"] = requests
    return tally


def object_store_kills(lab: Lab, *, kills: int, seed: int = 0) -> Tally:
    """SIGKILL of the driver at random times of a run on S3; the same command again."""
    tally, rng, at = Tally("driver killed, object store"), random.Random(seed), []
    with s3_server() as server, environment(server):
        url = _copied(_clean_storage(lab, server), f"s3://{BUCKET}/killed")
        log = lab.folder / "object-store-kills.log"
        command = ["run", *UNITS, "compute=inline", f"storage={url}"]
        while len(at) < kills:
            before = len(read_log(log))
            running = lab.product.start(command, environment=server.environment, log=log)
            while len(read_log(log)) == before and running.is_alive:
                time.sleep(0.02)
            time.sleep(rng.uniform(0, 1.5))
            if not running.is_alive:
                break
            running.kill()
            at.append(time.monotonic())
        ended = lab.product.run(command, environment=server.environment, log=log)
        tally.faults, tally.runs = len(at), len(at) + 1
        tally.expect(ended.code == 0, f"ended with {ended.code}: {ended.err}")
        _compare_copy(lab, tally, url)
        tally.count_work(log, at)
    tally.expect(tally.recomputed <= len(at), f"{tally.recomputed} units tried again after {len(at)} kills")
    return tally


def _clean_storage(lab: Lab, server: Server) -> str:
    """A storage on the server with a finished run, made without faults."""
    url = f"s3://{BUCKET}/clean"
    ended = lab.product.run(["run", *UNITS, "compute=inline", f"storage={url}"], environment=server.environment)
    assert ended.code == 0, ended.err
    return url


def _copied(clean: str, url: str) -> str:
    """A storage in which the same run begins with its data set and teachers there."""
    source, target = open_store(clean), open_store(url)
    for key in source.keys("artifacts"):
        if "/same_images/" not in key:
            target.put(key, source.read(key))
    return url


def _compare_copy(lab: Lab, tally: Tally, url: str) -> None:
    """Compare a run of an object store by a local copy."""
    copy, store = lab.folder / f"copy-{tally.runs}", open_store(url)
    for key in store.keys("runs"):
        path = copy / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(store.read(key))
    if (copy / "runs").exists():
        tally.compare(lab.reference, copy, shown=url)
    shutil.rmtree(copy, ignore_errors=True)
