"""What Prometheus reads while a run works on a cluster."""

import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

START_S, RUN_S = 180, 300


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports


def scrape(port: int) -> dict[str, float]:
    """Our series, by name and the labels that we gave them."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found = {}
    for name, labels, value in re.findall(r"^(ray_prism_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        ours = {key: label for key, label in re.findall(r'(\w+)="([^"]*)"', labels) if key in ("stage", "outcome")}
        found["/".join([name, *ours.values()])] = float(value)
    return found


@contextmanager
def head(folder: Path, environment: dict[str, str]) -> Iterator[tuple[int, int]]:
    """A cluster of one node; its port and the port of its metrics."""
    gcs, metrics, agent, dashboard, client = free_ports(5)
    options = [f"--port={gcs}", f"--metrics-export-port={metrics}", f"--dashboard-agent-listen-port={agent}"]
    options += [f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}", "--num-cpus=2"]
    options += ["--node-ip-address=127.0.0.1", f"--temp-dir={folder}", "--block"]
    ray = Path(sys.executable).with_name("ray")
    with (folder / "head.log").open("w") as log:
        process = subprocess.Popen([ray, "start", "--head", *options], stdout=log, stderr=log, env=environment)
    try:
        deadline = time.monotonic() + START_S
        while True:
            with suppress(OSError):
                socket.create_connection(("127.0.0.1", metrics), timeout=1).close()
                break
            assert process.poll() is None, (folder / "head.log").read_text()
            assert time.monotonic() < deadline, "the head did not start"
            time.sleep(0.5)
        yield gcs, metrics
    finally:
        children = psutil.Process(process.pid).children(recursive=True)
        for one in (process, *children):
            with suppress(psutil.NoSuchProcess, ProcessLookupError):
                one.kill()
        process.wait(30)


@pytest.mark.slow
@pytest.mark.timeout(START_S + RUN_S + 100)
def test_a_run_on_a_cluster_counts_its_units_images_and_seconds(
    pristine_storage: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("m")  # short, for Ray's sockets
    for kind in ("datasets", "teachers", "statistics", "starts"):
        if (pristine_storage / "artifacts" / kind).is_dir():
            shutil.copytree(pristine_storage / "artifacts" / kind, folder / "outputs/artifacts" / kind)
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    # Actors report every ten seconds otherwise, which is longer than they live here.
    quick = {"RAY_metrics_report_interval_ms": "500", "RAY_worker_niceness": "0", "RAY_raylet_start_wait_time_s": "120"}
    environment = {**os.environ, **token, **quick}
    found: dict[str, float] = {}
    with head(folder, environment) as (gcs, metrics):
        settings = ["recipe=digits_smoke", f"storage={folder / 'outputs'}", f"compute.address=127.0.0.1:{gcs}"]
        settings += ["compute.actors=1", "stages=[prepare,teach,synthesize,relabel]"]
        with (folder / "run.log").open("w") as log:
            command = [sys.executable, "-m", "prism_ray", "run", *settings]
            run = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        deadline = time.monotonic() + RUN_S
        while run.poll() is None:
            assert time.monotonic() < deadline, (folder / "run.log").read_text()
            found |= scrape(metrics)
            time.sleep(0.5)
        assert run.returncode == 0, (folder / "run.log").read_text()
    assert found["ray_prism_units_total/done/synthesize"] == found["ray_prism_units_total/done/relabel"] == 4
    assert found["ray_prism_images_total"] == 20
    assert found["ray_prism_unit_seconds_count/synthesize"] == found["ray_prism_unit_seconds_count/relabel"] == 4
    assert found["ray_prism_actor_busy_seconds_total"] > 0
    assert found["ray_prism_actor_idle_seconds_total"] > 0
