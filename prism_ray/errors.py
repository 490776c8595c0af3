"""What a command can end with: exit codes and the errors that carry them."""

import os
import re
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
    """The message of an error as a single line, without secrets, that does to a terminal what it says."""
    text = printable(redacted(" ".join(str(error).split())))
    return text or type(error).__name__


_SECRET_VARIABLE = re.compile(r"TOKEN(?!IZER)|SECRET|PASSW|API_?KEY|ACCESS_KEY|CREDENTIAL|PRIVATE_KEY")
_NO_SECRET = re.compile(r"_(PATH|FILE|DIR|MODE|URL|URI|CREDENTIALS)$")
_SECRET_TEXT = re.compile(
    r"(?<=://)[^/@\s]*:[^/@\s]*(?=@)"  # user:password@ of an address
    r"|(?<=Bearer )\S+"
    r"|\b(?:sk-[A-Za-z0-9_-]{20,}|(?:hf_|ghp_)[A-Za-z0-9]{20,}|AKIA[A-Z0-9]{16})"  # keys by their form
    r"|(?<=[?&])(?i:[a-z0-9_-]*(?:signature|credential|token|password|secret|apikey|api_key|sig)=)[^&\s'\"]+"
)
REDACTED = "[secret]"


def redacted(text: str) -> str:
    """The text without what environment variables named like secrets hold, and without what looks like one."""
    for name, value in os.environ.items():
        is_secret = _SECRET_VARIABLE.search(name.upper()) and not _NO_SECRET.search(name.upper())
        if is_secret and len(value) >= 8:
            text = text.replace(value, REDACTED)
    return _SECRET_TEXT.sub(REDACTED, text)


def holds_secret(text: str) -> bool:
    """Whether a text has an address with a password or signature in it, or what looks like a key."""
    return _SECRET_TEXT.search(text) is not None


def printable(text: str) -> str:
    """The text with everything escaped that a terminal would act on: colors, movements, titles, text from the right.

    Lines stay lines.
    """
    kept = (c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
    return text if text.isascii() and text.isprintable() else "".join(kept)


def shortened(error: BaseException | str, limit: int = 200) -> str:
    """The beginning of that line, where a library's messages fill pages, or of any text."""
    text = error if isinstance(error, str) else one_line(error)
    return text if len(text) <= limit else f"{text[:limit]}…"
