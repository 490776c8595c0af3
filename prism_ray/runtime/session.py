"""A Ray session for one command: started when there is work, shut down at its end, refused if the work can't fit."""

import importlib
import json
import logging
import os
import platform
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from prism_ray.config import ComputeConfig
from prism_ray.errors import InputError, PrismError, shortened
from prism_ray.runtime.placement import Node, check_one_kind, check_room, pools_of, train_need
from prism_ray.signals import end_children

CONNECT_TIMEOUT_S = 3.0
LOOK_TIMEOUT_S = 10.0
IMPORT_TIMEOUT_S = 120.0
METADATA = (b"CLUSTER_METADATA", b"cluster")
"""Key and namespace under which a cluster keeps its versions."""

LAST_WORDS = "prism-ray: ended at once, by Ray or from outside; run the same command to continue"


def local_resources(compute: ComputeConfig) -> tuple[float, float]:
    """Logical CPUs and GPUs that a local cluster will have. Imports nothing heavy."""
    affinity = getattr(os, "sched_getaffinity", None)
    cpus = compute.cpus or (len(affinity(0)) if affinity else os.cpu_count() or 1)
    return float(cpus), float(_visible_gpus())


def local_node(compute: ComputeConfig) -> Node:
    """The one node of a local cluster."""
    cpus, gpus = local_resources(compute)
    return Node({"CPU": cpus, "GPU": gpus})


def _visible_gpus() -> int:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([entry for entry in visible.split(",") if entry.strip() not in ("", "-1", "NoDevFiles")])
    folder = Path("/proc/driver/nvidia/gpus")
    return len(list(folder.iterdir())) if folder.is_dir() else 0


def check_ray() -> None:
    """Import Ray in a process of its own, which a broken one may end.

    Raises:
        PrismError: with the last line of what it says.
    """
    command = [sys.executable, "-c", "import ray"]
    tried = subprocess.run(command, capture_output=True, text=True, timeout=IMPORT_TIMEOUT_S, check=False)
    if tried.returncode:
        last = (tried.stderr.strip() or f"exit code {tried.returncode}").splitlines()[-1]
        raise PrismError(f"Ray {version('ray')} cannot be imported ({shortened(last)})")


def cluster_address(compute: ComputeConfig) -> str | None:
    """The cluster to join, None for a local one."""
    address = compute.address or os.environ.get("RAY_ADDRESS")
    return None if address in (None, "", "local") else address


def preflight(compute: ComputeConfig) -> None:
    """Refuse, without starting Ray, what could never be scheduled here or a cluster that does not answer.

    Raises:
        InputError: one line with the way out.
    """
    _check_gpu_shares(compute)
    _check_autoscaling(compute)
    address = cluster_address(compute)
    if address is None:
        check_fits(compute, [local_node(compute)], where="this machine")
    else:
        _check_reachable(address, key="compute.address" if compute.address else "RAY_ADDRESS")


def check_fits(compute: ComputeConfig, nodes: Sequence[Node], *, where: str) -> None:
    """Refuse a pool of actors or training workers that would wait for ever, or that would mix kinds of devices."""
    may_grow = cluster_address(compute) is not None
    if not compute.autoscaling:
        for pool in pools_of(compute):
            check_room(pool.key, pool.most or 1, pool.need, nodes, where=where, may_grow=may_grow)
        for key, count in {
            "compute.train_workers": compute.train_workers or 1,
            "compute.workers_per_student": compute.min_workers_per_student or compute.workers_per_student,
        }.items():
            check_room(key, count, train_need(compute), nodes, where=where, may_grow=may_grow)
    check_one_kind(compute, nodes)


def _check_autoscaling(compute: ComputeConfig) -> None:
    """Refuse a cluster that is to grow without anything that says how far."""
    if not compute.autoscaling:
        return
    if cluster_address(compute) is None:
        raise InputError(
            "compute.autoscaling=true: a local cluster does not grow; join one (compute.address or RAY_ADDRESS), or "
            "leave it out"
        )
    for pool in pools_of(compute):
        if pool.most is None:
            raise InputError(
                f"compute.autoscaling=true: {pool.key} must say how many actors to ask the cluster for; set it"
            )


def _check_gpu_shares(compute: ComputeConfig) -> None:
    shares = {"compute.gpus_per_actor": compute.gpus_per_actor}
    shares |= {f"compute.pools.{name}.gpus": pool.gpus or 0.0 for name, pool in compute.pools.items()}
    for key, gpus in shares.items():
        if gpus > 1 and gpus != int(gpus):
            raise InputError(
                f"{key}={gpus}: above 1 only whole GPUs can be reserved; use {int(gpus)} or a fraction below 1"
            )


def _check_reachable(address: str, *, key: str) -> None:
    """Refuse what is no address of a cluster, or one at which nobody answers. `key` is where it was given."""
    shown = f"{key}={address!r}"
    if address == "auto":
        if not _runs_here():
            raise InputError(f"{shown}: no Ray cluster runs on this machine; start it, give HOST:PORT, or unset it")
        return
    if address.startswith(("http://", "https://")):
        raise InputError(
            f"{shown}: is a web address, such as that of a dashboard; expected HOST:PORT of the cluster itself; submit "
            "a job to a dashboard with `ray job submit`"
        )
    host, _, port = address.removeprefix("ray://").rstrip("/").rpartition(":")
    host = host.removeprefix("[").removesuffix("]")  # of an IPv6 address
    if not host or not (port.isascii() and port.isdigit() and 0 < int(port) < 2**16):
        raise InputError(f"{shown}: not an address; expected HOST:PORT, 'auto' or nothing for a local cluster")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, UnicodeError) as error:  # the latter for names that no host can have
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{shown}: no Ray cluster answers there ({reason}); start it, correct compute.address or RAY_ADDRESS, or "
            "unset both for a local cluster"
        ) from error
    if not address.startswith("ray://"):  # where Ray's proxy for clients answers, and not the cluster itself
        _look_at(address, shown=shown)


def _look_at(address: str, *, shown: str) -> None:
    """Ask a cluster for its versions, with the token of this environment. Imports ray and starts nothing."""
    try:
        client = importlib.import_module("ray._raylet").GcsClient
    except (ImportError, AttributeError):
        return  # a Ray that keeps this client elsewhere; joining finds out
    answer: Future[bytes | None] = Future()

    def ask() -> None:
        try:
            answer.set_result(client(address=address).internal_kv_get(*METADATA, timeout=CONNECT_TIMEOUT_S))
        except BaseException as error:
            answer.set_exception(error)

    # In a thread of its own: the client waits long for what listens and is no cluster.
    threading.Thread(target=ask, name="look at the cluster", daemon=True).start()
    try:
        with _silenced_stderr():
            found = answer.result(timeout=LOOK_TIMEOUT_S)
    except Exception as error:
        if type(error).__name__ == "AuthenticationError":
            raise InputError(
                f"{shown}: the cluster refuses the token of this environment; set RAY_AUTH_MODE=token and its "
                "RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH)"
            ) from error
        raise InputError(
            f"{shown}: something answers there, but not as a Ray cluster ({shortened(error)}); check the port, which "
            "is 6379 unless it was chosen"
        ) from error
    theirs = json.loads(found) if found else {}
    ours = {"ray_version": version("ray"), "python_version": platform.python_version()}
    if os.environ.get("RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL") == "minor" and "python_version" in theirs:
        theirs["python_version"], ours["python_version"] = (
            known["python_version"].rpartition(".")[0] for known in (theirs, ours)
        )
    differing = [
        f"{key.partition('_')[0]} {theirs[key]} there, {ours[key]} here"
        for key in ours
        if theirs.get(key, ours[key]) != ours[key]
    ]
    if differing:
        raise InputError(f"{shown}: other versions than here ({'; '.join(differing)}); install the same on both sides")


def _runs_here() -> bool:
    """Whether a node of a Ray cluster is on this machine."""
    return any(process.info["name"] == "raylet" for process in psutil.process_iter(["name"]))


def start(compute: ComputeConfig) -> None:
    """Join or start the cluster of this command.

    A local one is bound to loopback, needs no home folder and no network, and asks for a token of its own.

    Raises:
        InputError: the cluster refused the connection or is too small.
    """
    address = cluster_address(compute)
    local = address is None
    _last_words.promise()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # Both ask the dashboard, which a local cluster does not start.
    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_ACTOR_RECONCILIATION", "0")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # Workers start at nice 15 otherwise, and starve beside anything else the machine does.
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if local:
        # Read when ray is imported: on SIGTERM Ray would wait for the work of a node whose work ends anyway.
        os.environ.setdefault("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "0")
        # Read then too: where clusters of several machines are off, all of Ray listens on loopback alone; otherwise it
        # takes the machine's own address for `_node_ip_address=127.0.0.1`.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        # What a dashboard would show of tasks and of Ray's own events; both cost CPU time of the cores that work.
        os.environ.setdefault("RAY_task_events_report_interval_ms", "0")
        os.environ.setdefault("RAY_event_stats", "0")
        cpus, gpus = local_resources(compute)
        options |= {"address": "local", "num_cpus": int(cpus), "num_gpus": int(gpus), "_node_ip_address": "127.0.0.1"}
        options |= {"include_dashboard": False, "object_store_memory": 256 << 20}
    else:
        options["address"] = address
    import ray

    try:
        with _silenced_stderr():
            ray.init(**options)
    except (ConnectionError, RuntimeError, TimeoutError) as error:
        if local:
            raise PrismError(
                f"Ray could not be started on this machine ({shortened(error)}); look at free memory and disk, or use "
                "compute=inline"
            ) from error
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"compute.address={address!r}: cannot join ({reason}); check versions, RAY_AUTH_MODE and RAY_AUTH_TOKEN"
        ) from error
    if not local:
        check_fits(compute, list(cluster_nodes().values()), where=f"the cluster at {address}")


@contextmanager
def _silenced_stderr() -> Iterator[None]:
    """Keep Ray's C++ core from printing about its own log level; errors of Python are raised, not printed."""
    sys.stderr.flush()
    kept, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(sink)


def all_nodes() -> dict[str, Node]:
    """Nodes of the cluster that are alive, by id."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    return {node["NodeID"]: Node(node["Resources"], node.get("Labels") or {}) for node in nodes}


def cluster_nodes() -> dict[str, Node]:
    """Those of them that are not about to leave."""
    leaving = draining_nodes()
    return {node_id: node for node_id, node in all_nodes().items() if node_id not in leaving}


def draining_nodes() -> set[str]:
    """Ids of the nodes that are about to leave: preempted, scaled down, or told to by SIGTERM.

    Ray has no public call for it; this is the one by which its own libraries find out.
    """
    from ray._private import state

    return set(state.state.get_draining_nodes())


class Notice:
    """Whether a node is about to leave. Stages ask in every step, the cluster is asked once in `POLL_S` seconds."""

    POLL_S = 2.0

    def __init__(self, node_id: str) -> None:
        self._node_id, self._asked, self._given = node_id, -self.POLL_S, False

    def __call__(self) -> bool:
        if not self._given and time.monotonic() - self._asked >= self.POLL_S:
            self._asked, self._given = time.monotonic(), self._node_id in draining_nodes()
        return self._given


class _LastWords:
    """A line on stderr for the case that Ray's core ends this process where it stands, which no handler here sees.

    It does when the raylet or the head of the cluster is lost. A shell waits at the end of a pipe: it says the line if
    the pipe closes without a word, as it does with this process.
    """

    SCRIPT = 'read -r word || printf "%s\\n" "$0" >&2'

    def __init__(self) -> None:
        self._shell: subprocess.Popen[bytes] | None = None

    def promise(self) -> None:
        """From here on this process leaves with a line, however it ends. Does nothing where there is no shell."""
        self.unsay()
        # In a session of its own: what kills the group of this process is to be told of too.
        with suppress(OSError):
            self._shell = subprocess.Popen(
                ["/bin/sh", "-c", self.SCRIPT, LAST_WORDS],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )

    def unsay(self) -> None:
        """From here on the process ends in order."""
        if self._shell is not None:
            with suppress(OSError):  # it may have been killed with the other processes below this one
                self._shell.communicate(b"unsaid\n")
            self._shell = None


_last_words = _LastWords()


def abandon(compute: ComputeConfig) -> None:
    """End a local cluster without waiting for its work. One that was joined ends this driver's actors by itself."""
    if cluster_address(compute) is None:
        end_children()
    _last_words.unsay()


def stop() -> None:
    """Leave the cluster; a local one ends."""
    import ray

    ray.shutdown()
    _last_words.unsay()
