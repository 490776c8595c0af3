"""A deadline for work that nothing else could end: the process ends, and what it was doing is written down first."""

import faulthandler
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prism_ray.errors import ExitCode

BACKSTOP_S = 15.0
"""How much later a process ends in which no Python code runs any more."""

STDERR = 2


@contextmanager
def ended_after(seconds: float, expired: Callable[[str], None]) -> Iterator[None]:
    """End this process, with exit code 1, if the block takes longer.

    Args:
        seconds: above 0, at most `threading.TIMEOUT_MAX`.
        expired: called first, in a thread of its own, with the stack of the block. Work that never gives up the
            interpreter's lock keeps it from running; a timer that needs no lock ends the process then.
    """
    worker, ending = threading.get_ident(), threading.Lock()
    is_finished = False

    def end() -> None:
        with ending:  # a block that finishes meanwhile waits here, and ends with the process
            if is_finished:
                return
            try:
                frame = sys._current_frames().get(worker)
                expired("".join(traceback.format_stack(frame)) if frame else "")
            finally:
                os._exit(int(ExitCode.failure))

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    faulthandler.dump_traceback_later(seconds + BACKSTOP_S, exit=True, file=STDERR)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        timer.cancel()
        with ending:
            is_finished = True
