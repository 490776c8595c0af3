"""One driver per run: epochs claimed by exclusive creation, a heartbeat, and fencing of whoever was replaced.

The driver of a run is the owner of the highest epoch. An epoch is an object that can be created once, so that of two
drivers taking over at the same moment one wins, on a file system and on an object store alike. A worker publishes only
while no higher epoch exists.
"""

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from prism_ray.errors import Fenced, InputError
from prism_ray.storage import Store, read_json, to_json

KEPT_EPOCHS = 8
LOOKED_AT_BEATS = 2.5


@dataclass(frozen=True)
class Owner:
    """Who has claimed a run and not released it."""

    epoch: int
    pid: int | None
    host: str | None
    since: str | None  # UTC
    is_here: bool  # on this machine, where its process can be seen
    is_alive: bool

    def described(self) -> str:
        """For people."""
        state = "at work" if self.is_alive else "gone" if self.is_here else "silent"
        return f"process {self.pid} on {self.host} since {self.since or 'an unknown time'}, {state}"


def look_at_owner(store: Store, *, lease_s: float, sleep: Callable[[float], None] = time.sleep) -> Owner | None:
    """The driver of a run, None if the last one has released it.

    Takes as long as a few heartbeats (seconds) where the process can't be seen from here.
    """
    epoch = newest_epoch(store)
    first = read_json(store, _beat_key(epoch)) if epoch else None
    if not epoch or (first or {}).get("released"):
        return None
    identity = read_json(store, _epoch_key(epoch)) or {}
    is_here = _is_here(identity)
    is_alive = is_here and not _is_dead_here(identity)
    if not is_here:
        sleep(_beat_s(lease_s) * LOOKED_AT_BEATS)
        beat = read_json(store, _beat_key(epoch))
        if (beat or {}).get("released"):
            return None
        is_alive = beat != first or newest_epoch(store) > epoch
    return Owner(epoch, identity.get("pid"), identity.get("host"), identity.get("since"), is_here, is_alive)


class RunLock:
    """Held by a driver while it works on a run.

    Args:
        store: the run folder.
        name: how the run is called in messages.
        lease_s: seconds of silence after which an owner on another host is taken for dead.
    """

    def __init__(self, store: Store, *, name: str, lease_s: float) -> None:
        self._store, self._name, self._lease_s = store, name, lease_s
        self._beat_s = _beat_s(lease_s)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._beats = 0
        self.epoch = 0
        self.replaced: int | None = None
        """Epoch of the driver that had not released the run, if it was taken over from one."""

    def acquire(self, *, sleep: Callable[[float], None] = time.sleep) -> Self:
        """Become the driver.

        A dead owner on this host is replaced at once; a silent one elsewhere after one lease.

        Raises:
            InputError: the owner is alive (its heartbeat moves).
        """
        while True:
            current = newest_epoch(self._store)
            if current:
                was_released = self._wait_for_owner(current, sleep)
                self.replaced = None if was_released else current
            self.epoch = current + 1
            if self._store.create(_epoch_key(self.epoch), to_json(_identity())):
                break
        for epoch in range(max(1, self.epoch - KEPT_EPOCHS - 1), self.epoch - KEPT_EPOCHS):
            self._store.remove(_epoch_key(epoch))
            self._store.remove(_beat_key(epoch))
        self._beat()
        self._thread = threading.Thread(target=self._keep_beating, name=f"heartbeat-{self._name}", daemon=True)
        self._thread.start()
        return self

    def release(self) -> None:
        """Let the next driver start at once."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self._store.put(_beat_key(self.epoch), to_json({"released": True}))

    def __enter__(self) -> Self:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def _wait_for_owner(self, epoch: int, sleep: Callable[[float], None]) -> bool:
        """Return when the owner of `epoch` is gone, whether it said so; raise if it lives."""
        first = read_json(self._store, _beat_key(epoch))
        owner = read_json(self._store, _epoch_key(epoch)) or {}
        if (first or {}).get("released"):
            return True
        if _is_dead_here(owner):
            return False
        waited = 0.0
        while waited < self._lease_s:
            sleep(self._beat_s / 4)
            waited += self._beat_s / 4
            beat = read_json(self._store, _beat_key(epoch))
            if (beat or {}).get("released"):
                return True
            if newest_epoch(self._store) > epoch:
                return False
            if beat != first:
                raise InputError(
                    f"run {self._name}: already being driven by process {owner.get('pid')} on {owner.get('host')}; "
                    "wait for it, stop it, or choose another run_id"
                )
        return False

    def _beat(self) -> None:
        self._beats += 1
        self._store.put(_beat_key(self.epoch), to_json({"beats": self._beats}))

    def _keep_beating(self) -> None:
        while not self._stop.wait(self._beat_s):
            try:
                self._beat()
            except Exception:
                # A full disk must not end the heartbeat: the run reports the same error at its next publish.
                continue


def newest_epoch(store: Store) -> int:
    """Highest epoch claimed on a run, 0 if none."""
    names = [key.rsplit("/", 1)[1].removesuffix(".epoch") for key in store.keys("lock") if key.endswith(".epoch")]
    return max((int(name) for name in names if name.isascii() and name.isdigit()), default=0)


def check_epoch(store: Store, epoch: int) -> None:
    """Refuse to publish for a driver that was replaced.

    Raises:
        Fenced: a higher epoch exists.
    """
    # The newest, not just the next: old epochs are cleaned away, and a driver may have slept through many.
    if newest_epoch(store) > epoch:
        raise Fenced(f"{store.url}: another driver took this run over (epoch {epoch} ended); nothing more is published")


def _epoch_key(epoch: int) -> str:
    return f"lock/{epoch:06d}.epoch"


def _beat_s(lease_s: float) -> float:
    """Seconds between two heartbeats."""
    return min(2.0, lease_s / 10)


def _beat_key(epoch: int) -> str:
    return f"lock/{epoch:06d}.beat"


def _identity() -> dict[str, Any]:
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "boot": _boot_id(),
        "pids": _pid_namespace(),
        "pid": pid,
        "started": _start_time(pid),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "token": uuid.uuid4().hex,  # no two claims are alike: a store may not tell an equal object from our own
    }


def _is_dead_here(owner: dict[str, Any]) -> bool:
    """Whether the owner ran where we can see its process (host, boot, process namespace) and the process is gone."""
    return _is_here(owner) and _start_time(owner["pid"]) != owner.get("started")


def _is_here(owner: dict[str, Any]) -> bool:
    here = (socket.gethostname(), _boot_id(), _pid_namespace())
    is_alike = (owner.get("host"), owner.get("boot"), owner.get("pids")) == here
    return is_alike and type(owner.get("pid")) is int


def _boot_id() -> str:
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""


def _pid_namespace() -> str:
    """Containers may share host name and boot and still not see each other's processes."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _start_time(pid: int) -> str | None:
    """Kernel start time of a process, None if it is gone or a zombie; tells a process from a later one with its id."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in ("Z", "X") else fields[19]
