"""Signals end a command in order, also where its exception is lost, its handler replaced or the main thread busy."""

import signal
import subprocess
import sys
import time

import pytest

SCRIPT = """
import hashlib, signal, sys, time
from prism_ray import signals
from prism_ray.errors import Drained

signals.GRACE_S = {grace_s}

def other_handler(number, frame):
    sys.exit(1)

def command():
    print("ready", flush=True)
    {body}
    return 0

signals.exit_with(command)
"""

SWALLOWED = """
    try:
        time.sleep(60)
    except BaseException:
        pass
    signals.interruptible(lambda: time.sleep(60))
"""
REPLACED = """
    with signals.handlers_replaced():
        signal.signal(signal.SIGTERM, other_handler)
        print("replaced", flush=True)
        time.sleep(60)
"""
FAILS_INSTEAD = """
    with signals.handlers_replaced():
        signal.signal(signal.SIGTERM, lambda number, frame: None)
        until = time.monotonic() + 60
        print("replaced", flush=True)
        while signals._request.number is None and time.monotonic() < until:
            time.sleep(0.01)
        raise ConnectionError("the cluster is gone")
"""
IN_C = "hashlib.pbkdf2_hmac('sha512', b'x', b'y', 1_000_000_000)"
HANGS_WHILE_ENDING = """
    try:
        time.sleep(60)
    finally:
        time.sleep(60)
"""


def start(body: str, grace_s: float) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(body=body, grace_s=grace_s)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    if "replaced" in body:
        assert process.stdout.readline() == "replaced\n"
    time.sleep(0.1)
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
@pytest.mark.parametrize(
    ("body", "grace_s"),
    [
        pytest.param("time.sleep(60)", 60, id="waiting"),
        pytest.param(SWALLOWED, 60, id="exception-swallowed"),
        pytest.param(REPLACED, 60, id="handler-replaced"),
        pytest.param(IN_C, 0.2, id="in-a-call-of-C"),
        pytest.param(HANGS_WHILE_ENDING, 0.2, id="hangs-while-ending"),
    ],
)
def test_a_signal_ends_a_command_with_its_code_and_one_line(
    body: str, grace_s: float, number: signal.Signals, code: int
) -> None:
    with start(body, grace_s) as process:
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == code, errors
    assert errors.count("\n") == 1, errors
    assert "run the same command to continue" in errors


def test_a_start_that_fails_because_of_a_signal_is_no_failure() -> None:
    with start(FAILS_INSTEAD, 60) as process:
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors.count("\n")) == (75, 1), errors


def test_a_second_signal_ends_the_process_at_once() -> None:
    with start(HANGS_WHILE_ENDING, 60) as process:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    assert process.returncode == 143


def test_a_command_that_is_over_stays_over() -> None:
    with start("import atexit; atexit.register(time.sleep, 1)", 60) as process:
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    assert process.returncode == 0
