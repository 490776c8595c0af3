"""The lock of a run: one driver, and whoever was replaced publishes nothing."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prism_ray.errors import Fenced, InputError
from prism_ray.lock import RunLock, check_epoch, newest_epoch
from prism_ray.storage import LocalStore, read_json, to_json

DRIVER = """
import sys, time
from prism_ray.lock import RunLock
from prism_ray.storage import LocalStore
RunLock(LocalStore(sys.argv[1]), name="r", lease_s=30).acquire()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path)


@pytest.fixture
def other_driver(store: LocalStore) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", DRIVER, store.url], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def lock(store: LocalStore, lease_s: float = 30.0) -> RunLock:
    return RunLock(store, name="r", lease_s=lease_s)


def never(seconds: float) -> None:
    raise AssertionError(f"waited {seconds} s for an owner that is known to be gone")


def claim(store: LocalStore, **changes: Any) -> None:
    """Epoch 1, held by an owner made up for the test."""
    owner = {"host": socket.gethostname(), "boot": "", "pid": 1, "started": "0", **changes}
    store.put("lock/000001.epoch", to_json(owner))
    store.put("lock/000001.beat", to_json({"beats": 7}))


def test_a_free_run_is_taken_at_once_and_a_released_one_too(store: LocalStore) -> None:
    first = lock(store).acquire(sleep=never)
    first.release()
    second = lock(store).acquire(sleep=never)
    assert (first.epoch, second.epoch, newest_epoch(store)) == (1, 2, 2)
    second.release()


def test_a_live_driver_is_refused_by_name_within_seconds_and_unharmed(
    store: LocalStore, other_driver: subprocess.Popen[str]
) -> None:
    started = time.monotonic()
    with pytest.raises(InputError) as refused:
        lock(store).acquire()
    assert time.monotonic() - started < 5
    message = str(refused.value)
    assert f"process {other_driver.pid}" in message
    assert "run r" in message
    assert "another run_id" in message
    check_epoch(store, 1)
    before = read_json(store, "lock/000001.beat")
    time.sleep(2.5)
    assert other_driver.poll() is None
    assert read_json(store, "lock/000001.beat") != before, "its heart still beats"


@pytest.mark.parametrize("reaped", [False, True], ids=["zombie", "gone"])
def test_a_dead_driver_on_this_host_is_replaced_at_once(
    store: LocalStore, other_driver: subprocess.Popen[str], reaped: bool
) -> None:
    other_driver.kill()
    if reaped:
        other_driver.wait()
    else:
        os.waitid(os.P_PID, other_driver.pid, os.WEXITED | os.WNOWAIT)
    taken = lock(store).acquire(sleep=never)
    assert taken.epoch == 2
    taken.release()


def test_a_later_process_with_the_pid_of_a_dead_driver_is_not_taken_for_it(store: LocalStore) -> None:
    with lock(store) as mine:
        identity = read_json(store, f"lock/{mine.epoch:06d}.epoch")
    assert identity is not None
    claim(store, **{**identity, "started": "12345"})
    lock(store).acquire(sleep=never).release()


@pytest.mark.parametrize("elsewhere", [{"host": "elsewhere"}, {"boot": "another boot"}], ids=["host", "boot"])
def test_a_silent_driver_elsewhere_is_replaced_after_one_lease(store: LocalStore, elsewhere: dict[str, str]) -> None:
    claim(store, **elsewhere)
    slept: list[float] = []
    taken = lock(store, lease_s=30).acquire(sleep=slept.append)
    assert taken.epoch == 2
    assert 30 <= sum(slept) < 31
    taken.release()


def test_a_beating_driver_elsewhere_is_refused(store: LocalStore) -> None:
    claim(store, host="elsewhere", pid=4711)

    def beat(_: float) -> None:
        store.put("lock/000001.beat", to_json({"beats": 8}))

    with pytest.raises(InputError, match="process 4711 on elsewhere"):
        lock(store).acquire(sleep=beat)
    assert newest_epoch(store) == 1


def test_a_driver_elsewhere_that_releases_is_not_waited_for(store: LocalStore) -> None:
    claim(store, host="elsewhere")
    slept: list[float] = []

    def release(seconds: float) -> None:
        slept.append(seconds)
        store.put("lock/000001.beat", to_json({"released": True}))

    lock(store).acquire(sleep=release).release()
    assert len(slept) == 1


def test_a_driver_that_died_before_its_first_heartbeat_is_replaced(store: LocalStore) -> None:
    claim(store, host="elsewhere")
    store.remove("lock/000001.beat")
    lock(store).acquire(sleep=lambda _: None).release()


def test_who_was_replaced_may_not_publish_any_more(store: LocalStore) -> None:
    claim(store, host="elsewhere")
    check_epoch(store, 1)
    with lock(store, lease_s=0.01) as taken:
        check_epoch(store, taken.epoch)
        with pytest.raises(Fenced, match="another driver took this run over"):
            check_epoch(store, 1)


def test_a_driver_that_slept_through_many_others_is_still_fenced(store: LocalStore) -> None:
    for _ in range(30):
        lock(store).acquire(sleep=never).release()
    for epoch in range(1, 30):
        with pytest.raises(Fenced):
            check_epoch(store, epoch)
    check_epoch(store, 30)
    assert len(store.keys("lock")) < 30, "old epochs are cleaned away"


def test_of_two_that_take_over_a_dead_driver_one_wins(store: LocalStore) -> None:
    for race in range(5):
        barrier = threading.Barrier(2)
        locks = [lock(store, lease_s=1.0), lock(store, lease_s=1.0)]
        won: list[RunLock] = []
        refused: list[InputError] = []

        def take(
            each: RunLock,
            barrier: threading.Barrier = barrier,
            won: list[RunLock] = won,
            refused: list[InputError] = refused,
        ) -> None:
            barrier.wait()
            try:
                won.append(each.acquire())
            except InputError as error:
                refused.append(error)

        threads = [threading.Thread(target=take, args=(each,)) for each in locks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(won), len(refused)) == (1, 1), f"race {race}"
        check_epoch(store, won[0].epoch)
        won[0].release()


def test_the_heart_beats_on_through_a_full_disk(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with lock(store, lease_s=0.2) as held:
        key = f"lock/{held.epoch:06d}.beat"

        def full(_: int) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", full)
            time.sleep(0.1)
        before = read_json(store, key)
        time.sleep(0.2)
        assert read_json(store, key) != before
