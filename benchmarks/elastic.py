"""The real pipeline on clusters that change under it, on one machine.

    python benchmarks/elastic.py killed|raylets|changing|autoscaler --storage DIR [--units-s 2] [overrides ...]

Nodes are Ray nodes of their own (processes of `ray start --block`, each with one CPU and one fake GPU: a resource
`a100` or `t4` beside the label ray.io/accelerator-type, while the device stays the CPU). `killed`: two of
them, one killed in its first unit. `raylets`: four of them.
`changing`: two kinds in two pools, one node killed (SIGKILL), one drained (SIGTERM) and one that joins, in the middle.
`autoscaler`: a head without room for any worker, and Ray's autoscaler with its fake provider, which starts up to three
nodes on this machine and takes idle ones away. Each prints one JSON line: what was compared with an undisturbed run in
one process, which nodes made which units, and how long scaling took. Ends with 1 if anything differs or was lost.

Work is made to last by a delay in each unit, and logged, from a sitecustomize.py on the workers' path: the product has
no switch for it.
"""

import argparse
import hashlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
PATTERNS = ("images/*.parquet", "labels/*.parquet", "student/*/model.safetensors")
RECIPE = ["recipe=digits_smoke", "images_per_class=6", "method.batch_size=5", "method.mosaic_tiles=1"]
TIMEOUT_S = 800.0
DRAIN_S = 60
START_TRIES = 3
TYPE = "ray.io/accelerator-type"

SITECUSTOMIZE = """
import importlib.abc, importlib.util, json, os, socket, sys, time

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "prism_ray.stages.synthesize":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module
        def exec_module(module):
            execute(module)
            compute = module.Synthesizer.compute
            def logged(self, unit):
                entry = {"unit": unit.name, "pid": os.getpid(), "began": time.time()}
                with open({log!r}, "a") as log:
                    log.write(json.dumps(entry) + "\\n")
                time.sleep({seconds})
                return compute(self, unit)
            module.Synthesizer.compute = logged
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder())
"""


class Cluster:
    """A Ray cluster on loopback. Every node is a process tree of its own, and ends as a machine does.

    Args:
        folder: for its sockets, whose paths have to be short.
        units_s: delay of every unit, seconds.
    """

    def __init__(self, folder: Path, *, units_s: float, port: int | None = None) -> None:
        self.port = port or free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.folder, self.log = folder, folder / "units.jsonl"
        self.log.touch()
        text = SITECUSTOMIZE.replace("{log!r}", repr(str(self.log))).replace("{seconds}", str(units_s))
        (folder / "sitecustomize.py").write_text(text)
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self.environment = {
            **os.environ,
            **token,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
            "RAY_raylet_start_wait_time_s": "120",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(DRAIN_S),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{folder}:{ROOT}",
        }
        self.nodes: list[psutil.Popen] = []
        self.drivers: list[subprocess.Popen[str]] = []

    def start_head(self, *, cpus: int, more: tuple[str, ...] = (), **environment: str) -> None:
        """The first node."""
        arguments = ["--head", f"--port={self.port}", f"--temp-dir={self.folder}", "--include-dashboard=false"]
        self._up([*arguments, f"--num-cpus={cpus}", *more], environment)

    def add(self, kind: str, market: str = "on-demand") -> psutil.Popen:
        """A node with one CPU and one fake GPU of a kind."""
        labels = f"--labels={TYPE}={kind.upper()},ray.io/market-type={market}"
        resources = f'--resources={{"{kind}": 1}}'
        return self._up([f"--address={self.address}", "--num-cpus=1", resources, labels], {})

    def _up(self, arguments: list[str], environment: dict[str, str]) -> psutil.Popen:
        """A node that has started. A busy machine may need several tries: Ray gives a node half a minute."""
        for _ in range(START_TRIES):
            node, log = self._start(arguments, environment)
            wait_until(
                lambda node=node, log=log: node.poll() is not None or "Ray runtime started" in log.read_text(),
                "a node starts",
            )
            if node.poll() is None:
                return node
            self.kill(node)
        raise SystemExit("a node did not start")

    def _start(self, arguments: list[str], environment: dict[str, str]) -> tuple[psutil.Popen, Path]:
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--node-ip-address=127.0.0.1"]
        command += [f"--object-store-memory={100 << 20}", *arguments]
        path = self.folder / f"node-{len(list(self.folder.glob('node-*.log')))}.log"
        with path.open("w") as log:
            node = psutil.Popen(command, env={**self.environment, **environment}, stdout=log, stderr=log)
        self.nodes.append(node)
        return node, path

    def kill(self, node: psutil.Popen) -> None:
        """End a node at once, with all that runs on it."""
        processes = [*node.children(recursive=True), node] if node.is_running() else []
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=10)
        self.nodes.remove(node)

    def drain(self, node: psutil.Popen) -> Callable[[], float]:
        """Give a node notice, as Kubernetes does; returns what waits until it has left and says after how long."""
        began = time.monotonic()
        node.send_signal(signal.SIGTERM)

        def left() -> float:
            node.wait(DRAIN_S + 30)
            self.nodes.remove(node)
            return time.monotonic() - began

        return left

    def begun(self) -> list[dict[str, Any]]:
        """Every computation of a unit's images that began, whether it ended or not."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def close(self) -> None:
        for driver in self.drivers:
            driver.kill()
        for node in reversed(self.nodes.copy()):
            self.kill(node)


@contextmanager
def cluster(**options: Any) -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        made = Cluster(Path(folder), **options)
        try:
            yield made
        except SystemExit:
            for log in sorted(made.folder.glob("node-*.log")):
                print(f"{log.name}: {log.read_text()[-2000:]}", file=sys.stderr)
            raise
        finally:
            made.close()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_until(condition: Callable[[], bool], what: str, *, timeout_s: float = TIMEOUT_S) -> float:
    """Seconds until a condition held."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > timeout_s:
            raise SystemExit(f"not within {timeout_s:g} s: {what}")
        time.sleep(0.2)
    return time.monotonic() - began


def hashes(storage: Path) -> dict[str, str]:
    """sha256 of every shard and student below a storage, by path within it."""
    found = [path for run in storage.glob("runs/*") for pattern in PATTERNS for path in run.glob(pattern)]
    return {str(path.relative_to(storage)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(found)}


def receipts(storage: Path, stage: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(storage.glob(f"runs/*/receipts/{stage}/*.json"))]


def reference(storage: Path, overrides: list[str]) -> Path:
    """An undisturbed run in one process, made once."""
    folder = storage / "inline"
    command = [sys.executable, "-m", "prism_ray", "run", *RECIPE, *overrides, "compute=inline", f"storage={folder}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": ""}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    return folder


class Driver:
    """A run of the pipeline on a cluster, in a process of its own.

    Args:
        artifacts: teachers and data to begin with, from another storage.
    """

    def __init__(self, cluster: Cluster, storage: Path, overrides: list[str], artifacts: Path | None = None) -> None:
        self.storage = storage
        if artifacts is not None:
            shutil.copytree(artifacts / "artifacts", storage / "artifacts")
            shutil.rmtree(storage / "artifacts/same_images", ignore_errors=True)  # or it would take its units over
        command = [sys.executable, "-m", "prism_ray", "run", *RECIPE, *overrides, "compute=ray", f"storage={storage}"]
        command.append(f"compute.address={cluster.address}")
        self.began = time.monotonic()
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, env=cluster.environment, stdout=pipe, stderr=subprocess.STDOUT, text=True
        )
        cluster.drivers.append(self._process)

    def published(self, stage: str = "synthesize") -> int:
        return len(list(self.storage.glob(f"runs/*/receipts/{stage}/*.json")))

    def is_running(self) -> bool:
        return self._process.poll() is None

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Until a condition holds while the run goes on."""
        wait_until(lambda: not self.is_running() or condition(), what)
        if not condition():
            self.finish()
            raise SystemExit(f"the run ended before: {what}")

    def wait_for(self, units: int) -> None:
        """Until so many units are published."""
        self.wait_until(lambda: self.published() >= units, f"{units} units are published")

    def finish(self) -> float:
        """Wait for its end; returns the seconds it took."""
        out, _ = self._process.communicate(timeout=TIMEOUT_S)
        if self._process.returncode != 0:
            raise SystemExit(f"the run ended with {self._process.returncode}:\n{out}")
        return time.monotonic() - self.began


def outcome(cluster: Cluster, expected: Path, driver: Driver) -> dict[str, Any]:
    """What a run made, compared with the undisturbed one."""
    found, wanted = hashes(driver.storage), hashes(expected)
    made = receipts(driver.storage, "synthesize")
    begun = Counter(entry["unit"] for entry in cluster.begun())
    quarantined = [path.name for path in driver.storage.glob("runs/*/quarantine/units/*/*.json")]
    result = {
        "objects": len(wanted),
        "identical": found == wanted,
        "quarantined": quarantined,
        "attempts_left": len(list(driver.storage.glob("runs/*/attempts/*/*/*.json"))),
        "units": len(made),
        "begun_again": sorted(unit for unit, times in begun.items() if times > 1),
        "units_by_pool_and_type": dict(
            Counter(f"{r['worker']['pool']}:{r['worker']['labels'].get(TYPE)}" for r in made)
        ),
        "units_by_node": dict(Counter(r["worker"]["node"][-8:] for r in made)),
    }
    result["passed"] = result["identical"] and not quarantined and not result["attempts_left"]
    return result


def raylets(storage: Path, overrides: list[str], units_s: float) -> dict[str, Any]:
    """Four nodes of one fake GPU each."""
    expected = reference(storage, overrides)
    with cluster(units_s=units_s) as nodes:
        nodes.start_head(cpus=1)
        for _ in range(4):
            nodes.add("a100")
        sizes = ["compute.autoscaling=true", "compute.pools={gpu: {actors: 4, resources: {a100: 1}}}"]
        driver = Driver(nodes, storage / "raylets", [*overrides, *sizes], expected)
        seconds = driver.finish()
        result = {"scenario": "raylets", "seconds": round(seconds, 1), **outcome(nodes, expected, driver)}
    result["passed"] = result["passed"] and len(result["units_by_node"]) > 1
    return result


def killed(storage: Path, overrides: list[str], units_s: float) -> dict[str, Any]:
    """Two nodes, of which one is killed in the middle of its first unit."""
    expected = reference(storage, overrides)
    with cluster(units_s=units_s) as nodes:
        nodes.start_head(cpus=1)
        both = nodes.add("a100"), nodes.add("a100")
        sizes = ["compute.autoscaling=true", "compute.pools={gpu: {actors: 2, resources: {a100: 1}}}"]
        driver = Driver(nodes, storage / "killed", [*overrides, *sizes], expected)
        driver.wait_until(lambda: len(nodes.begun()) > 0, "a unit begins")
        pid = nodes.begun()[0]["pid"]
        nodes.kill(next(node for node in both if pid in [child.pid for child in node.children(recursive=True)]))
        seconds = driver.finish()
        return {"scenario": "killed", "seconds": round(seconds, 1), **outcome(nodes, expected, driver)}


def changing(storage: Path, overrides: list[str], units_s: float) -> dict[str, Any]:
    """Two kinds of nodes; one is killed, one drained and one joins while units are made."""
    expected = reference(storage, overrides)
    with cluster(units_s=units_s) as nodes:
        nodes.start_head(cpus=1)
        killed, drained = nodes.add("a100", "spot"), nodes.add("a100", "spot")
        nodes.add("t4")
        pools = f"big: {{actors: 3, labels: {{{TYPE}: A100}}}}, small: {{actors: 1, resources: {{t4: 1}}}}"
        sizes = [f"compute.pools={{{pools}}}", "compute.mixed_devices=true", "compute.autoscaling=true"]
        driver = Driver(nodes, storage / "changing", [*overrides, *sizes], expected)
        driver.wait_for(3)
        nodes.kill(killed)
        driver.wait_for(5)
        left = nodes.drain(drained)
        nodes.add("a100")
        drained_s = left()
        seconds = driver.finish()
        result = {"scenario": "changing", "seconds": round(seconds, 1), "drained_s": round(drained_s, 1)}
        result |= outcome(nodes, expected, driver)
    placed = set(result["units_by_pool_and_type"])
    result["passed"] = result["passed"] and placed == {"big:A100", "small:T4"} and drained_s < DRAIN_S
    return result


def autoscaler(storage: Path, overrides: list[str], units_s: float) -> dict[str, Any]:
    """From no worker to three on backlog, and back to none."""
    expected = reference(storage, overrides)
    with cluster(units_s=units_s) as nodes:
        config = nodes.folder / "autoscaler.json"
        config.write_text(json.dumps(autoscaling_config(nodes.address)))
        # The provider knows the head by this id; it must be Ray's own constant.
        head_id = {"RAY_OVERRIDE_NODE_ID_FOR_TESTING": "f" * 51 + "00000"}
        fake = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", **head_id}
        nodes.start_head(cpus=0, more=(f"--autoscaling-config={config}",), **fake)
        driver = Driver(nodes, storage / "autoscaler", [*overrides, *AUTOSCALED])
        scale: list[tuple[float, int]] = [(0.0, 0)]

        def look() -> bool:
            workers = num_raylets(nodes.nodes[0]) - 1
            if workers != scale[-1][1]:
                scale.append((round(time.monotonic() - driver.began, 1), workers))
            return not driver.is_running()

        wait_until(look, "the run ends", timeout_s=2 * TIMEOUT_S)
        seconds = driver.finish()
        idle_s = wait_until(lambda: look() and scale[-1][1] == 0, "no worker is left")
        result = {"scenario": "autoscaler", "seconds": round(seconds, 1), "workers_at_s": scale}
        result |= {"back_to_none_s": round(idle_s, 1), **outcome(nodes, expected, driver)}
    most = max(workers for _, workers in scale)
    result["passed"] = result["passed"] and most == WORKERS and len(result["units_by_node"]) > 1
    return result


WORKERS = 3
AUTOSCALED = ["compute.autoscaling=true", f"compute.pools={{gpu: {{actors: {WORKERS}, resources: {{a100: 1}}}}}}"]
IDLE_S = 10


def autoscaling_config(address: str) -> dict[str, Any]:
    """What `ray start --autoscaling-config` reads: nothing is filled in by Ray for this provider."""
    provider = {"type": "fake_multinode", "use_node_id_as_ip": True, "gcs_address": address}
    provider |= {"disable_node_updaters": True, "disable_launch_config_check": True}
    head = {"resources": {"CPU": 0}, "node_config": {}, "min_workers": 0, "max_workers": 0}
    resources = {"CPU": 1, "a100": 1, "object_store_memory": 100 << 20}
    worker = {"resources": resources, "labels": {TYPE: "A100"}, "node_config": {}}
    worker |= {"min_workers": 0, "max_workers": WORKERS}
    commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    return {
        "cluster_name": "elastic",
        "max_workers": WORKERS,
        "upscaling_speed": 10.0,
        "idle_timeout_minutes": IDLE_S / 60,
        "provider": provider,
        "available_node_types": {"ray.head.default": head, "gpu": worker},
        "head_node_type": "ray.head.default",
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        **{f"{name}_commands": [] for name in commands},
    }


def num_raylets(head: psutil.Popen) -> int:
    """Nodes below the head's process, itself among them."""
    count = 0
    for process in head.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            count += process.name() == "raylet" and process.status() != psutil.STATUS_ZOMBIE
    return count


SCENARIOS = {"killed": killed, "raylets": raylets, "changing": changing, "autoscaler": autoscaler}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenario", choices=SCENARIOS)
    parser.add_argument("--storage", type=Path, required=True)
    parser.add_argument("--units-s", type=float, default=2.0, help="delay of every unit, seconds")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that no node is left
    result = SCENARIOS[options.scenario](options.storage.resolve(), options.overrides, options.units_s)
    print(json.dumps(result))
    sys.exit(0 if result["passed"] else 1)


if __name__ == "__main__":
    main()
