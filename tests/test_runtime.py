"""One contract, two executors: where and by how many a run is made changes nothing in it. Kills, poison: `faults/`."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest

from prism_ray.config import ComputeConfig
from prism_ray.errors import InputError
from prism_ray.runtime.placement import Node
from prism_ray.runtime.session import check_fits, preflight

PATTERNS = ("images/*.parquet", "labels/*.parquet", "student/*/model.safetensors")
SMOKE = ["run", "recipe=digits_smoke"]
TIMEOUT_S = 240
MARK = "PRISM_RAY_TEST_COMMAND"


def hashes(storage: Path) -> dict[str, str]:
    """sha256 of every shard and student, by path within the storage."""
    found = [path for pattern in PATTERNS for path in storage.glob(f"runs/*/{pattern}")]
    return {str(path.relative_to(storage)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(found)}


def prism_ray(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "prism_ray", *arguments],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env={**os.environ, **environment},
    )


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run in this process's own way: inline."""
    storage = tmp_path_factory.mktemp("inline")
    done = prism_ray([*SMOKE, "compute=inline", f"storage={storage}"])
    assert done.returncode == 0, done.stderr
    return storage


@pytest.mark.slow
def test_one_actor_makes_the_bytes_that_inline_makes(reference: Path, tmp_path: Path) -> None:
    shutil.copytree(reference / "artifacts", tmp_path / "artifacts")
    done = prism_ray([*SMOKE, "compute=ray", "compute.actors=1", f"storage={tmp_path}"])
    assert done.returncode == 0, done.stderr
    assert len(hashes(reference)) == 4 + 4 + 2
    assert hashes(tmp_path) == hashes(reference)


def test_two_actors_and_two_training_workers_make_the_bytes_that_inline_makes(reference: Path, tmp_path: Path) -> None:
    sizes = ["compute.actors=2", "compute.train_workers=2", "compute.cpus=2"]
    mark = uuid.uuid4().hex
    done = prism_ray([*SMOKE, "compute=ray", *sizes, f"storage={tmp_path}"], **{MARK: mark})
    assert done.returncode == 0, done.stderr
    assert hashes(tmp_path) == hashes(reference)
    wait_until_gone(mark)


def test_a_finished_run_does_nothing_more_and_starts_no_ray(reference: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in reference.glob("runs/*/receipts/*/*.json")}
    started = time.monotonic()
    done = prism_ray([*SMOKE, "compute=ray", f"storage={reference}"], RAY_ADDRESS="")
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started < 10
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("moment", ["imports", "start", pytest.param("work", marks=pytest.mark.slow)])
def test_a_signal_at_any_moment_of_a_run_on_ray_ends_it_soon_and_leaves_no_process(
    moment: str, number: signal.Signals, code: int, reference: Path, tmp_path: Path
) -> None:
    shutil.copytree(reference / "artifacts", tmp_path / "artifacts")
    command = [sys.executable, "-m", "prism_ray", *SMOKE, "compute=ray", f"storage={tmp_path}"]
    mark = uuid.uuid4().hex
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, MARK: mark}
    ) as process:
        assert process.stdout is not None
        if moment == "imports":
            while not answers_sigterm(process.pid):
                time.sleep(0.001)
        elif moment == "start":  # Ray has one process now, and has to wait for the next
            while not ray_processes(mark):
                time.sleep(0.01)
        else:
            while not list(tmp_path.glob("runs/*/attempts/synthesize/*/*")):
                time.sleep(0.05)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert errors.count("\n") == 1, errors
    assert "run the same command to continue" in errors
    wait_until_gone(mark)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_signals_at_random_moments_end_a_run_in_order_and_it_continues(reference: Path, tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "stop_at_any_moment.py"
    done = subprocess.run(
        [sys.executable, str(script), "--times", "8", "--storage", str(tmp_path), "--seed", "3"],
        capture_output=True,
        text=True,
        timeout=1100,
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert (summary["signals"], summary["as_wanted"], summary["one_line"], summary["left"]) == (8, 8, 8, 0), done.stdout


@pytest.mark.parametrize("cpus", [1, 2, 4])
@pytest.mark.parametrize("actors", [1, 2, 4, 8])
def test_a_pool_that_could_wait_for_ever_is_refused_before_ray_starts(cpus: int, actors: int) -> None:
    compute = ComputeConfig(cpus=cpus, actors=actors, cpus_per_actor=1.0)
    if actors <= cpus:
        check_fits(compute, [Node({"CPU": cpus})], where="this machine")
    else:
        with pytest.raises(InputError, match=r"compute\.actors"):
            check_fits(compute, [Node({"CPU": cpus})], where="this machine")


@pytest.mark.slow
@pytest.mark.parametrize("cpus", [1, 2, 4])
def test_the_largest_pool_that_fits_finishes(cpus: int, reference: Path, tmp_path: Path) -> None:
    # Two CPUs and two whole-CPU actors is the case that hangs where a read has to be placed beside the pool.
    sizes = [f"compute.cpus={cpus}", f"compute.actors={cpus}", "compute.cpus_per_actor=1.0"]
    done = prism_ray([*SMOKE, "compute=ray", f"storage={tmp_path}", *sizes])
    assert done.returncode == 0, done.stderr
    assert hashes(tmp_path) == hashes(reference)


def test_more_gpus_than_the_machine_has_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(InputError, match="needs 8 GPUs, this machine has 0"):
        preflight(ComputeConfig(actors=8, gpus_per_actor=1.0))


def ray_processes(mark: str) -> list[psutil.Process]:
    """Ray's daemons of one command, known by the mark in their environment; other tests have clusters of their own."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.name() in ("raylet", "gcs_server") and process.environ().get(MARK) == mark:
                found.append(process)
        except psutil.Error:  # it ended, or is another user's
            continue
    return found


def wait_until_gone(mark: str) -> None:
    until = time.monotonic() + 30
    while ray_processes(mark):
        assert time.monotonic() < until, "Ray outlived its driver"
        time.sleep(0.2)


def answers_sigterm(pid: int) -> bool:
    """Whether a process has come so far that its handlers are in place."""
    (mask,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt:")]
    return bool(int(mask.split()[1], 16) >> (signal.SIGTERM - 1) & 1)
