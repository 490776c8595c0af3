"""What a command can end with: exit codes and the errors that carry them."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum


class ExitCode(IntEnum):
    """Exit status of every verb."""

    done = 0
    failure = 1
    bad_input = 2
    quarantined = 3
    drained = 75  # EX_TEMPFAIL: stopped cleanly after SIGTERM, the same command continues
    interrupted = 130
    terminated = 143


class PrismError(Exception):
    """An error whose message is one line for the user; the run can be repeated once its cause is gone."""

    exit_code = ExitCode.failure


class InputError(PrismError):
    """Input or configuration is wrong: what, with the value; what was expected; what to do."""

    exit_code = ExitCode.bad_input


class StorageError(PrismError):
    """Storage refused a write: nothing was published, and the run continues once it takes one."""


class Stopped(BaseException):
    """SIGTERM asked the command to stop. No `Exception`, like `KeyboardInterrupt`: nobody is to take it for a fault."""


class Drained(PrismError):
    """The run was asked to stop and did so between two units of work."""

    exit_code = ExitCode.drained


class Fenced(PrismError):
    """Another driver took this run over, so this one may not publish any more."""


@contextmanager
def within(key: str) -> Iterator[None]:
    """Put the setting's owner before refusals that name a setting of its own: `arch: ...` → `student.arch: ...`."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{key}.{one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """The message of an error as a single line."""
    text = " ".join(str(error).split())
    return text or type(error).__name__


def shortened(error: BaseException, limit: int = 200) -> str:
    """The beginning of that line, where a library's messages fill pages."""
    text = one_line(error)
    return text if len(text) <= limit else f"{text[:limit]}…"
