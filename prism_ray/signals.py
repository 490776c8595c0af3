"""SIGTERM and Ctrl-C as orderly ends: nothing is lost, so that preemption costs what was in flight at most.

Long calls run in a thread of their own while the main thread waits in plain Python: there a signal's exception can be
raised at any moment, inside torch, pyarrow or Ray it could tear their state.

A watcher reads every signal from a wakeup descriptor too, which works whatever handler a library puts in our handler's
place and while the main thread is inside a call of C: so no signal is lost, and none waits for ever.
"""

import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import NoReturn, TypeVar

import psutil

from prism_ray import garbage
from prism_ray.errors import ExitCode, PrismError, Stopped, one_line

T = TypeVar("T")
THREAD = "prism-ray-work"
WAIT_S = 0.2
"""Longest wait of the main thread without looking up; a signal's handler runs then at the latest."""

GRACE_S = 5.0
"""Longest orderly end; after it the process ends where it is, with the same line and exit code."""

LINES = {
    signal.SIGTERM: "stopped by SIGTERM; what was in flight is made again: run the same command to continue",
    signal.SIGINT: "interrupted; run the same command to continue",
}
CODES = {signal.SIGTERM: ExitCode.drained, signal.SIGINT: ExitCode.interrupted}
CODES_AT_ONCE = {signal.SIGTERM: ExitCode.terminated, signal.SIGINT: ExitCode.interrupted}


@dataclass
class _Request:
    """What the process was asked by signals. There is one, because signals belong to the process."""

    number: int | None = None
    is_raised: bool = False
    is_said: bool = False


_request = _Request()


@contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM raises `Stopped` inside and Ctrl-C `KeyboardInterrupt`; the former handlers are back afterwards.

    A second signal ends the process at once, and so does the first when the end it asked for takes too long.
    """
    global _request
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) is _handle:
        yield
        return
    _request = _Request()
    before = {number: signal.getsignal(number) for number in LINES}
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    stderr = os.dup(2)  # Ray's start is silenced by putting another file in its place
    former = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(receiver, stderr), name="signals", daemon=True)
    watcher.start()
    _install()
    try:
        yield
    finally:
        signal.set_wakeup_fd(former)
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        sender.close()
        watcher.join()
        receiver.close()
        os.close(stderr)


def _install() -> None:
    if threading.current_thread() is threading.main_thread():
        for number in LINES:
            signal.signal(number, _handle)


def _handle(number: int, frame: object) -> None:
    if not _request.is_raised:
        _raise(number)


def _raise(number: int) -> None:
    _request.number, _request.is_raised = number, True
    raise KeyboardInterrupt if number == signal.SIGINT else Stopped(LINES[signal.SIGTERM])


def raise_if_asked() -> None:
    """Raise what a signal asked for, where its own exception was swallowed or another handler took it."""
    if _request.number is not None:
        _raise(_request.number)


def _watch(receiver: socket.socket, stderr: int) -> None:
    """Note signals as they come; end the process at the second, or when the first is not answered in time."""
    first: int | None = None
    while True:
        try:
            data = receiver.recv(1)
        except TimeoutError:
            assert first is not None
            if not _request.is_said:
                os.write(stderr, f"prism-ray: {LINES[signal.Signals(first)]}\n".encode())
            _end_now(CODES[signal.Signals(first)])
        if not data:  # the end of the block
            return
        number = data[0]
        if number not in LINES:
            continue
        if first is not None:
            _end_now(CODES_AT_ONCE[signal.Signals(number)])
        first = number
        if _request.number is None:
            _request.number = number
        receiver.settimeout(GRACE_S)


def _end_now(code: ExitCode) -> NoReturn:
    end_children()
    os._exit(int(code))


def end_children() -> None:
    """Kill every process below this one."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            process.kill()


@contextmanager
def handlers_replaced() -> Iterator[None]:
    """For calls that put handlers of their own in the place of ours: afterwards ours are back.

    A signal that came meanwhile is answered then; those handlers end with `SystemExit`, or make the call fail.
    """
    try:
        yield
    except SystemExit:
        if _request.number is None:
            _request.number = signal.SIGTERM  # the watcher has not come to read it yet
    except Exception:
        if _request.number is None:
            raise
    finally:
        _install()
    raise_if_asked()


def ends_in_order(command: Callable[[], int]) -> int:
    """The exit code of a command; signals, refusals and failures end it with one line.

    Where something abandoned is still running, the process ends here.
    """
    with stoppable():
        try:
            return int(command())
        except PrismError as error:
            _say(one_line(error))
            return int(error.exit_code)
        except Stopped:
            return _leave(signal.SIGTERM)
        except KeyboardInterrupt:
            return _leave(signal.SIGINT)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return int(ExitCode.failure)


def exit_with(command: Callable[[], int]) -> NoReturn:
    """End the process with a command's exit code; what comes after the command is over no longer changes it."""
    code = ends_in_order(command)
    for number in LINES:
        signal.signal(number, signal.SIG_IGN)
    garbage.never_again()
    sys.exit(code)


def _say(line: str) -> None:
    _request.is_said = True
    print(f"prism-ray: {line}", file=sys.stderr)


def _leave(number: signal.Signals) -> int:
    """Say how a command was stopped, and end the process if a call was abandoned in it or Ray was.

    Waiting for the abandoned call would hold a preempted node for as long as its unit takes, and Ray, interrupted
    while it started, aborts when the interpreter ends in order.
    """
    _say(LINES[number])
    # An import of Ray that was interrupted leaves its parts loaded, without the package itself.
    has_ray = any(name.partition(".")[0] == "ray" for name in list(sys.modules))  # another thread may import
    if has_ray or any(thread.name == THREAD for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(CODES[number]))
    return int(CODES[number])


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
        raise_if_asked()
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
        raise_if_asked()
        # Asked before the queue is: what was put before the end is then still found.
        is_last_look = ended.done()
        try:
            yield items.get(timeout=0 if is_last_look else WAIT_S)
        except queue.Empty:
            if is_last_look:
                ended.result()
                return
