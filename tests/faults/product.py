"""The product as the fault suite runs it: in processes of its own that are killed, resumed and compared.

Most runs are forked from a process that has imported the product already, so that a hundred kills cost what they
interrupt and not a hundred imports of torch. Those on Ray, and those that concern the start of the interpreter, are
the real command.
"""

import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import fsspec.config
import psutil
import pyarrow.parquet as pq
from injected import VARIABLE, install, read_log

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PRODUCTS = ("images/*.parquet", "labels/*.parquet", "student/*/*.safetensors")
UNITS = [
    *("recipe=digits_smoke", "images_per_class=4", "method.batch_size=2", "method.iterations=3", "student.steps=5"),
    "stages=[prepare,teach,synthesize,relabel,distill]",
]
"""The smoke recipe in 20 small units, without measurements and report."""
LIMIT_S = 240.0


@dataclass
class Ended:
    """How a command ended. `code` is negative for a signal, as `subprocess` has it."""

    code: int
    out: str
    err: str
    seconds: float


class Running:
    """A command under way, in a session of its own so that it can be killed with all it started."""

    def __init__(self, process: Any, pid: int, out: Path) -> None:
        self._process, self.pid, self._out = process, pid, out
        self._started = time.monotonic()

    @property
    def is_alive(self) -> bool:
        if isinstance(self._process, subprocess.Popen):
            return self._process.poll() is None
        return self._process.is_alive()

    def output(self) -> str:
        return self._out.read_text() if self._out.exists() else ""

    def wait_for(self, pattern: str, *, limit_s: float = LIMIT_S) -> bool:
        """Wait until the output matches; False if the command ended before."""
        until = time.monotonic() + limit_s
        while not re.search(pattern, self.output()):
            if not self.is_alive:
                return bool(re.search(pattern, self.output()))
            assert time.monotonic() < until, f"no {pattern!r} in {limit_s:g} s: {self.output()}"
            time.sleep(0.01)
        return True

    def wait(self, limit_s: float = LIMIT_S) -> Ended:
        """Wait for the end; a command that takes longer is killed, and the caller fails."""
        if isinstance(self._process, subprocess.Popen):
            try:
                code = self._process.wait(limit_s)
            except subprocess.TimeoutExpired:
                code = None
        else:
            self._process.join(limit_s)
            code = self._process.exitcode
        if code is None:
            self.kill()
            raise AssertionError(f"not ended in {limit_s:g} s: {self.output()}")
        err = self._out.with_suffix(".err").read_text()
        return Ended(code, self.output(), err, time.monotonic() - self._started)

    def signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL to the whole group, and wait for the command's own end."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait() if isinstance(self._process, subprocess.Popen) else self._process.join()


class Product:
    """Starts commands.

    Args:
        folder: for their output and logs of events.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        folder.mkdir(parents=True, exist_ok=True)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["imported"])
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), str(ROOT), *filter(None, [before])])  # where it looks
        try:
            forkserver.ensure_running()
        finally:
            os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)

    def start(
        self,
        arguments: Sequence[str],
        *,
        forked: bool = True,
        faults: dict[str, Any] | None = None,
        log: Path | None = None,
        environment: dict[str, str] | None = None,
    ) -> Running:
        """Start `prism-ray` with these arguments.

        Args:
            forked: from the process that has imported everything, instead of the real command.
            faults: see `injected.install`.
            log: where events go; without it none are kept.
            environment: variables to set.
        """
        self._count += 1
        out = self._folder / f"{self._count:04d}.out"
        wanted = {**(faults or {}), "log": str(log or self._folder / "unread.log")}
        variables = {"OMP_NUM_THREADS": "1", **(environment or {})}
        if forked:
            process = self._context.Process(target=_run_forked, args=(list(arguments), str(out), variables, wanted))
            process.start()
            assert process.pid is not None
            return Running(process, process.pid, out)
        paths = [str(HERE / "site"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        variables |= {VARIABLE: json.dumps(wanted), "PYTHONPATH": os.pathsep.join(paths)}
        with open(out, "wb") as stdout, open(out.with_suffix(".err"), "wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "prism_ray", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
                env={**os.environ, **variables},
            )
        return Running(process, process.pid, out)

    def run(self, arguments: Sequence[str], *, limit_s: float = LIMIT_S, **options: Any) -> Ended:
        """The same, to its end."""
        return self.start(arguments, **options).wait(limit_s)


def _run_forked(arguments: list[str], out: str, variables: dict[str, str], faults: dict[str, Any]) -> None:
    """In the forked process: become the command."""
    assert "prism_ray.stages.worker" in sys.modules, "not forked from a process that has imported the product"
    os.setsid()
    for descriptor, path in ((1, out), (2, str(Path(out).with_suffix(".err")))):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(opened, descriptor)
        os.close(opened)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let what they start in the background ignore it
    os.environ.update(variables)
    fsspec.config.set_conf_env(fsspec.config.conf)  # variables that the parent's import has read already
    install(faults)
    from prism_ray import cli

    sys.exit(cli.main(arguments))


# What a run has made


def products(run_dir: Path) -> dict[str, str]:
    """sha256 of every shard and student, by path in the run folder."""
    paths = [path for pattern in PRODUCTS for path in run_dir.glob(pattern)]
    return {
        path.relative_to(run_dir).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(paths)
    }


def rows(run_dir: Path) -> list[str]:
    """Every row of images and labels, as folder and image id."""
    found = []
    for folder in ("images", "labels"):
        for path in sorted((run_dir / folder).glob("*.parquet")):
            ids = pq.read_table(path, columns=["image_id"])["image_id"].to_pylist()
            found += [f"{folder}/{image_id}" for image_id in ids]
    return found


def manifest(run_dir: Path) -> dict[str, Any] | None:
    path = run_dir / "manifest.json"
    return json.loads(path.read_text()) if path.exists() else None


@dataclass
class Reference:
    """An undisturbed run, and a storage with nothing but what it was made from."""

    storage: Path
    settings: list[str]

    @property
    def run_dir(self) -> Path:
        (folder,) = (self.storage / "runs").iterdir()
        return folder

    def fresh(self, storage: Path) -> Path:
        """A storage in which the same run begins with its data set and teachers there."""
        shutil.copytree(self.storage / "artifacts", storage / "artifacts")
        shutil.rmtree(storage / "artifacts/same_images", ignore_errors=True)  # nothing to take units over from
        return storage

    def finished(self, storage: Path) -> Path:
        """A storage with a copy of the finished run."""
        self.fresh(storage)
        shutil.copytree(self.storage / "runs", storage / "runs")
        return storage

    def command(self, storage: Path, *more: str) -> list[str]:
        executor = [] if any(setting.startswith("compute=") for setting in more) else ["compute=inline"]
        return ["run", *self.settings, f"storage={storage}", *executor, *more]


@dataclass
class Tally:
    """The figures of one kind of fault."""

    kind: str
    executor: str = "inline"
    faults: int = 0
    runs: int = 0
    rows_expected: int = 0
    rows_found: int = 0
    duplicates: int = 0
    lost: int = 0
    compared: int = 0
    identical: int = 0
    recomputed: int = 0
    recover_s: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def expect(self, holds: bool, otherwise: str) -> None:
        """Note a problem, with what was seen, if something does not hold."""
        if not holds:
            self.problems.append(otherwise)

    def compare(self, reference: Reference, storage: Path, *, shown: str | None = None) -> None:
        """Compare a run that has ended with the undisturbed one: rows, bytes, manifest, leftovers.

        Args:
            shown: how the storage is called in problems, if it is a copy.
        """
        found_dirs = list((storage / "runs").iterdir())
        self.expect(len(found_dirs) == 1, f"{shown or storage}: {len(found_dirs)} runs")
        run_dir = found_dirs[0]
        expected, found = rows(reference.run_dir), rows(run_dir)
        counts = Counter(found)
        lost = set(expected) - set(counts)
        self.rows_expected += len(expected)
        self.rows_found += len(found)
        self.duplicates += sum(count - 1 for count in counts.values())
        self.lost += len(lost)
        self.compared += 1
        same_products = products(reference.run_dir) == products(run_dir)
        same_manifest = manifest(run_dir) is not None and manifest(reference.run_dir) == manifest(run_dir)
        self.identical += same_products and same_manifest and found == expected
        self.expect(same_products, f"{shown or storage}: products differ from the undisturbed run's")
        self.expect(
            same_manifest, f"{shown or storage}: the manifest differs from the undisturbed run's, or is missing"
        )
        self.expect(
            found == expected,
            f"{shown or storage}: {len(found)} rows, expected {len(expected)}; lost {sorted(lost)[:3]}",
        )
        left = [*run_dir.glob(".tmp/*"), *run_dir.glob(".train-*"), *run_dir.glob("quarantine/units/*/*")]
        self.expect(not left, f"{shown or storage}: left behind {left[:3]}")

    def count_work(self, log: Path, kills: Sequence[float] = ()) -> None:
        """Units tried more often than once, and seconds from each kill to the next published unit."""
        events = read_log(log)
        starts = Counter((event["stage"], event["unit"]) for event in events if event["event"] == "start")
        self.recomputed += sum(count - 1 for count in starts.values())
        published = [event["at"] for event in events if event["event"] == "published"]
        for kill in kills:
            later = [at - kill for at in published if at > kill]
            if later:
                self.recover_s.append(round(min(later), 2))

    @property
    def is_passed(self) -> bool:
        return not self.problems and self.duplicates == self.lost == 0 and self.identical == self.compared


def fired(log: Path) -> int:
    """How many injected faults came to act, by the log of events."""
    return sum(event["event"] == "fault" for event in read_log(log))


# Processes


def ray_processes(session: int | None = None) -> list[psutil.Process]:
    """Processes of Ray that belong to a session (of `start`), living and no zombies."""
    found = []
    for process in psutil.process_iter(["name", "cmdline", "status"]):
        line = " ".join(process.info["cmdline"] or [])
        is_ray = process.info["name"] in ("raylet", "gcs_server") or line.startswith("ray::") or "/ray/" in line
        if not is_ray or process.info["status"] == psutil.STATUS_ZOMBIE:
            continue
        with suppress(ProcessLookupError, PermissionError):
            if session is None or os.getsid(process.pid) == session:
                found.append(process)
    return found


@contextmanager
def no_ray_left(tally: Tally, running: Running, *, patience_s: float = 180.0) -> Iterator[None]:
    """Expect that the processes of a command's Ray are gone soon after the block; how soon is among the figures.

    After a SIGKILL of the driver Ray's two agents report to a GCS that is gone, for the better part of a minute.
    """
    yield
    began = time.monotonic()
    until = began + patience_s
    while ray_processes(running.pid) and time.monotonic() < until:
        time.sleep(0.2)
    left = [process.name() for process in ray_processes(running.pid)]
    tally.figures.setdefault("ray_gone_after_s", []).append(round(time.monotonic() - began, 1))
    tally.expect(not left, f"Ray processes outlived their command: {left}")
