"""A Ray cluster of one node on loopback that asks for a token, and jobs submitted to it as people submit them.

with head_node() as head:
    head.ray("submit", "--working-dir", ".", "--", "python", "jobs/pipeline.py", ...)      # ray job submit
    head.submit("pipeline", ...)                                                           # python jobs/submit.py
"""

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
PATIENCE_S = 600
MARK = "PRISM_RAY_TEST_CLUSTER"
RAY = str(Path(sys.executable).with_name("ray"))

PORTS = (
    "port",
    "dashboard-port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "runtime-env-agent-port",
    "metrics-export-port",
    "ray-client-server-port",
    "node-manager-port",
    "object-manager-port",
)


@dataclass(frozen=True)
class Head:
    """A running head node on loopback that asks for a token."""

    address: str
    environment: dict[str, str]

    def ray(self, *arguments: str, **changed: str) -> subprocess.CompletedProcess[str]:
        """`ray job ...` as somebody calls it who has the token."""
        return subprocess.run(
            [RAY, "job", arguments[0], "--address", self.address, *arguments[1:]],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            env={**self.environment, **changed},
        )

    def submit(self, *arguments: str, **changed: str) -> subprocess.CompletedProcess[str]:
        """`python jobs/submit.py ...`."""
        return subprocess.run(
            [sys.executable, "jobs/submit.py", "--address", self.address, *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            env={**self.environment, **changed},
        )

    def job(self, submission_id: str) -> dict[str, object]:
        """What the job server says of a job."""
        request = urllib.request.Request(
            f"{self.address}/api/jobs/{submission_id}",
            headers={"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())

    def works_on(self, submission_id: str) -> bool:
        """Whether a job waits or runs."""
        return self.job(submission_id)["status"] in ("PENDING", "RUNNING")


def free_ports(count: int) -> list[str]:
    """Ports below those that the kernel gives to connections, which could take one before Ray does."""
    found: list[str] = []
    while len(found) < count:
        port = random.SystemRandom().randrange(20_000, 32_000)  # workers have those from 10,002 to 19,999
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("0.0.0.0", port))
            found += [str(port)] if str(port) not in found else []
    return found


@contextmanager
def head_node(more: Mapping[str, str] | None = None) -> Iterator[Head]:
    """`ray start --head` with ports, folder and token of its own; ended by ending the processes that carry its mark.

    Args:
        more: environment variables of the cluster and of all that is submitted to it.
    """
    mark = os.urandom(16).hex()
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": os.urandom(32).hex(),
        "RAY_USAGE_STATS_ENABLED": "0",
        # A machine that does other things as well: workers must not starve, nor be killed for its memory.
        "RAY_worker_niceness": "0",
        "RAY_raylet_start_wait_time_s": "120",
        "RAY_memory_monitor_refresh_ms": "0",
        "RAY_health_check_failure_threshold": "60",
        MARK: mark,
        **(more or {}),
    }
    folder = tempfile.mkdtemp(prefix="ray")  # Ray's sockets allow no long paths
    options = ["--node-ip-address", "127.0.0.1", "--dashboard-host", "127.0.0.1", "--num-cpus", "2"]
    options += ["--object-store-memory", str(200 << 20), "--disable-usage-stats"]
    try:
        errors: list[str] = []
        for attempt in range(3):
            ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
            own = [option for name, port in ports.items() for option in (f"--{name}", port)]
            started = subprocess.run(
                [RAY, "start", "--head", *options, *own, "--temp-dir", f"{folder}/{attempt}"],
                env=environment,
                capture_output=True,
                text=True,
                timeout=PATIENCE_S,
            )
            if started.returncode == 0:
                break
            errors.append(started.stdout[-2000:] + started.stderr[-2000:])
            end_marked(mark)
        else:
            raise RuntimeError(f"no cluster: {errors}")
        yield Head(f"http://127.0.0.1:{ports['dashboard-port']}", environment)
    finally:
        end_marked(mark)
        shutil.rmtree(folder, ignore_errors=True)


def end_marked(mark: str) -> None:
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) == mark:
                process.kill()
