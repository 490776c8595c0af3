"""SIGTERM and Ctrl-C as orderly ends: nothing is lost, so that preemption costs what was in flight at most.

Long calls run in a thread of their own while the main thread waits in plain Python: there a signal's exception can be
raised at any moment, inside torch, pyarrow or Ray it could tear their state.
"""

import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import TypeVar

from prism_ray.errors import Drained, ExitCode

T = TypeVar("T")
THREAD = "prism-ray-work"
WAIT_S = 0.2
"""Longest wait of the main thread without looking up; a signal's handler runs then at the latest."""


def install_sigterm() -> None:
    """Make SIGTERM end the command where it waits; a second one ends the process at once."""

    def drain(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, force)
        raise Drained("stopped by SIGTERM; what was in flight is made again: run the same command to continue")

    def force(number: int, frame: object) -> None:
        os._exit(int(ExitCode.terminated))

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, drain)


@contextmanager
def drained_by_sigterm() -> Iterator[None]:
    """SIGTERM as an orderly end inside; the former handler afterwards."""
    before = signal.getsignal(signal.SIGTERM)
    install_sigterm()
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread() and callable(before):
            signal.signal(signal.SIGTERM, before)


@contextmanager
def sigterm_deferred() -> Iterator[None]:
    """Keep SIGTERM waiting until the end of the block, and put our handler back after it.

    Ray installs one of its own while it starts, which exits with the signal's number: that counts as received too.
    """
    received: list[int] = []
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        yield
    except SystemExit as error:
        if error.code != signal.SIGTERM:
            raise
        received.append(signal.SIGTERM)
    install_sigterm()
    if received:
        signal.raise_signal(signal.SIGTERM)


def leave(code: ExitCode) -> ExitCode:
    """End the process at once if a call was abandoned in it or Ray was, else hand the code back.

    Waiting for the abandoned call would hold a preempted node for as long as its unit takes, and Ray, interrupted
    while it started, aborts when the interpreter ends in order.
    """
    if "ray" in sys.modules or any(thread.name == THREAD for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(code))
    return code


def interruptible(function: Callable[[], T]) -> T:
    """The result of a call, made in another thread. If a signal ends the wait, the call is abandoned."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, name=THREAD, daemon=True).start()
    while not future.done():
        wait([future], WAIT_S)
    return future.result()


def interruptible_items(make: Callable[[], Iterator[T]]) -> Iterator[T]:
    """The items of an iterator that runs in another thread; abandoned if a signal ends the wait."""
    items: queue.Queue[T] = queue.Queue()
    ended: Future[None] = Future()

    def work() -> None:
        try:
            for item in make():
                items.put(item)
            ended.set_result(None)
        except BaseException as error:
            ended.set_exception(error)

    threading.Thread(target=work, name=THREAD, daemon=True).start()
    while True:
        # Asked before the queue is: what was put before the end is then still found.
        is_last_look = ended.done()
        try:
            yield items.get(timeout=0 if is_last_look else WAIT_S)
        except queue.Empty:
            if is_last_look:
                ended.result()
                return
