"""Deadlines: work that never ends takes its process with it, and says so first where it can."""

import subprocess
import sys

SCRIPT = """
import re, sys, time
from prism_ray import deadline
deadline.BACKSTOP_S = 0.5

def hang():
    time.sleep(600)

def spin():  # in C code that never gives up the interpreter's lock
    re.match(r"(a+)+$", "a" * 64 + "b")

with deadline.ended_after(float(sys.argv[2]), lambda stack: print("expired", stack, flush=True)):
    globals()[sys.argv[1]]() if sys.argv[1] else None
print("went on")
"""


def run(work: str, seconds: float) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SCRIPT, work, str(seconds)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_work_that_ends_in_time_goes_on() -> None:
    done = run("", 30)
    assert (done.returncode, done.stdout) == (0, "went on\n"), done.stderr


def test_work_that_hangs_ends_its_process_after_its_stack_was_handed_over() -> None:
    done = run("hang", 0.3)
    assert done.returncode == 1
    assert done.stdout.startswith("expired")
    assert "in hang" in done.stdout
    assert "went on" not in done.stdout


def test_work_that_keeps_the_interpreter_from_running_ends_its_process_all_the_same() -> None:
    done = run("spin", 0.3)
    assert done.returncode == 1
    assert "went on" not in done.stdout
    assert "in spin" in done.stderr, "the stack is on stderr"


def test_the_longest_deadline_that_settings_allow_can_be_set() -> None:
    assert run("", 3.2e7).stdout == "went on\n"
