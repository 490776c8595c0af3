"""SIGTERM as an orderly end: exit code 75 and nothing lost, so that preemption costs what was in flight at most."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from prism_ray.errors import Drained, ExitCode


def install_sigterm() -> None:
    """Make SIGTERM end the command between two units' results; a second one ends the process at once."""

    def drain(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, force)
        raise Drained("stopped by SIGTERM; what was in flight is made again: run the same command to continue")

    def force(number: int, frame: object) -> None:
        sys.exit(int(ExitCode.terminated))

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
