"""Faults put into the product from outside: it has no switch for any of them.

`install` is called in every process of a run before the product is imported or used: by `site/sitecustomize.py` in
processes that Ray starts, by `product.py` in forked ones. It always logs which units a process starts and publishes
(monotonic seconds, which all processes of a machine share); faults come on top.

File-system faults count what the product does below a folder: opening for writing, writing, syncing, linking, renaming,
removing. The n-th operation that matches dies (SIGKILL before it, in the middle of it, or after it) or fails with an
error number, once or from then on.
"""

import builtins
import contextlib
import ctypes
import dataclasses
import errno
import importlib.abc
import importlib.util
import io
import json
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

VARIABLE = "INJECTED_FAULTS"
"""Environment variable with the JSON that `install` takes."""

STAGES = {
    "synthesize": ("prism_ray.stages.synthesize", "Synthesizer"),
    "relabel": ("prism_ray.stages.relabel", "Relabeler"),
}


def install(wanted: dict[str, Any]) -> None:
    """Put faults into this process.

    Args:
        wanted: `log`: file for events; `units` and `slow_worker`: see `_wrap_stage`; `shuffle`: seed of the order of
            units; `files`: see `_FileFaults`; `clock`: see `_jump`.
    """
    log = _logger(wanted["log"])
    for stage, (module, owner) in STAGES.items():
        _when_imported(module, lambda found, stage=stage, owner=owner: _wrap_stage(found, owner, stage, wanted, log))
    _when_imported("prism_ray.ledger", lambda found: _wrap_receipts(found, log))
    if "shuffle" in wanted:
        _when_imported("prism_ray.runtime.inline", lambda found: _shuffle(found, wanted["shuffle"]))
    if "files" in wanted:
        _FileFaults(wanted["files"], log).install()
    if "clock" in wanted:
        _jump(wanted["clock"])


def read_log(path: Path) -> list[dict[str, Any]]:
    """What processes noted so far; a line that a kill cut off is left out."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def _logger(path: str) -> Callable[..., None]:
    def log(event: str, **content: Any) -> None:
        line = json.dumps({"event": event, "at": time.monotonic(), "pid": os.getpid(), **content}) + "\n"
        descriptor = _os_open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(descriptor, line.encode())
        os.close(descriptor)

    return log


_os_open, _open = os.open, builtins.open


class _Finder(importlib.abc.MetaPathFinder):
    """Calls `patch` with a module right after it was imported."""

    def __init__(self, name: str, patch: Callable[[Any], None]) -> None:
        self._name, self._patch = name, patch

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        assert spec is not None
        assert spec.loader is not None
        execute, patch = spec.loader.exec_module, self._patch

        def exec_module(module: Any) -> None:
            execute(module)
            patch(module)

        spec.loader.exec_module = exec_module  # pyright: ignore[reportAttributeAccessIssue]
        return spec


def _when_imported(name: str, patch: Callable[[Any], None]) -> None:
    if name in sys.modules:
        patch(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Finder(name, patch))


# Units


def _wrap_stage(module: Any, owner: str, stage: str, wanted: dict[str, Any], log: Callable[..., None]) -> None:
    """Log every try of a unit, and let those of `units` ({stage: {index: fault}}, index "*" for all) fail."""
    kind = getattr(module, owner)
    compute, faults = kind.compute, wanted.get("units", {}).get(stage, {})
    slow = wanted.get("slow_worker") if stage == "synthesize" else None

    def wrapped(self: Any, unit: Any, *rest: Any) -> Any:
        log("start", stage=stage, unit=unit.index)
        if slow:
            time.sleep(slow["slow_s"] if _is_first(slow["claim"]) else slow["fast_s"])
        fault = faults.get(str(unit.index), faults.get("*"))
        if fault == "small_pixels":
            log("fault", what=fault)
            return _with_small_pixels(self, lambda: compute(self, unit, *rest))
        if fault is None:
            return compute(self, unit, *rest)
        return _fail(fault, lambda: compute(self, unit, *rest), log)

    kind.compute = wrapped


def _fail(fault: str, compute: Callable[[], Any], log: Callable[..., None]) -> Any:
    """What a poison unit does instead of, or with, its table."""
    log("fault", what=fault)
    name, _, value = fault.partition(":")
    if name == "raise":
        raise ValueError("poison")
    if name == "segfault":
        ctypes.string_at(0)
    if name == "hang":
        while True:
            time.sleep(3600)
    if name == "spin":  # in C code that never gives up the interpreter's lock
        re.match(r"(a+)+$", "a" * 64 + "b")
    if name == "exit":
        os._exit(0)
    if name == "oom":
        import torch

        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
    if name == "memory":
        raise MemoryError
    if name == "sleep":
        time.sleep(float(value))
        return compute()
    table, receipt = compute()
    if name == "lost_row":
        return table.slice(1), receipt
    if name == "doubled_row":
        return table.take([0, *range(1, len(table)), 0]), receipt
    if name == "lost_column":
        return table.drop_columns([table.column_names[-1]]), receipt
    if name == "swapped_rows":
        return table.take(list(reversed(range(len(table))))), receipt
    raise AssertionError(f"unknown fault {fault}")


def _with_small_pixels(synthesizer: Any, compute: Callable[[], Any]) -> Any:
    """Images of a unit with half the side they should have."""
    make = type(synthesizer)._make

    def small(*rest: Any) -> Any:
        made = make(synthesizer, *rest)
        return dataclasses.replace(made, pixels=made.pixels[..., ::2, ::2])

    synthesizer._make = small
    try:
        return compute()
    finally:
        del synthesizer._make


def _shuffle(module: Any, seed: int) -> None:
    """Units in another order than the plan's."""
    units = module.InlineRuntime.units

    def shuffled(self: Any, specs: Any, chains: Any) -> Any:
        return units(self, specs, random.Random(seed).sample(list(chains), len(chains)))

    module.InlineRuntime.units = shuffled


def _is_first(claim: str) -> bool:
    """Whether this process is the one that first asked."""
    try:
        descriptor = _os_open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        with _open(claim) as file:
            return file.read() == str(os.getpid())
    os.write(descriptor, str(os.getpid()).encode())
    os.close(descriptor)
    return True


def _wrap_receipts(module: Any, log: Callable[..., None]) -> None:
    write = module.Ledger.write_receipt

    def wrapped(self: Any, receipt: Any) -> None:
        write(self, receipt)
        log("published", stage=receipt.stage, unit=receipt.name)

    module.Ledger.write_receipt = wrapped


# Files


class _FileFaults:
    """The n-th operation on files of a folder dies or fails.

    Settings: `root`; `op`: regular expression of operations; `key`: regular expression searched in the path below
    root; `nth`: which match, from 1, 0 for none (then operations are only counted); `then`: "before", "middle",
    "after" (killed) or an errno name; `lasts`: whether everything fails from there on.
    """

    def __init__(self, wanted: dict[str, Any], log: Callable[..., None]) -> None:
        self._root = os.path.abspath(wanted["root"])
        self._op, self._key = re.compile(wanted.get("op", "")), re.compile(wanted.get("key", ""))
        self._nth, self._then, self._lasts = wanted["nth"], wanted.get("then", ""), wanted.get("lasts", False)
        self._log, self._seen = log, 0
        self._traces = wanted.get("trace", False)

    def install(self) -> None:
        for name in ("link", "replace", "rename", "unlink", "rmdir", "mkdir"):
            setattr(os, name, self._wrapped(name, getattr(os, name), two=name in ("link", "replace", "rename")))
        os.fsync = self._wrapped("fsync", os.fsync, two=False)
        builtins.open = io.open = self._opened

    def _wrapped(self, op: str, call: Callable[..., Any], *, two: bool) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            path = args[1] if two else args[0]
            return self._around(op, path, lambda: call(*args, **kwargs))

        return wrapped

    def _opened(self, file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if not set(mode) & set("wax+"):
            return _open(file, mode, *args, **kwargs)
        opened = self._around("open", file, lambda: _open(file, mode, *args, **kwargs))
        if not isinstance(opened, io.BufferedWriter | io.TextIOWrapper) or self._below(file) is None:
            return opened
        write = opened.write

        def halves(data: Any) -> Any:
            def half() -> None:
                write(data[: len(data) // 2])
                opened.flush()

            return self._around("write", file, lambda: write(data), middle=half)

        return _Writing(opened, halves)

    def _below(self, path: Any) -> str | None:
        """A path, or what a descriptor refers to, relative to the root; None outside of it."""
        try:
            text = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else os.fspath(path)
        except (OSError, TypeError):
            return None
        full = os.path.abspath(text if isinstance(text, str) else text.decode())
        return os.path.relpath(full, self._root) if full.startswith(self._root + os.sep) else None

    def _around(self, op: str, path: Any, call: Callable[[], Any], middle: Callable[[], None] | None = None) -> Any:
        key = self._below(path)
        if key is None or not self._op.search(op) or not self._key.search(key):
            return call()
        self._seen += 1
        if self._traces:
            self._log("file", op=op, key=key)
        is_due = self._nth and (self._seen == self._nth or (self._lasts and self._seen > self._nth))
        if not is_due:
            return call()
        if self._seen == self._nth:
            self._log("fault", what=f"{self._then} {op} {key}")
        if self._then in ("before", "middle", "after"):
            if self._then == "middle" and middle:
                middle()
            if self._then == "after":
                with contextlib.suppress(OSError):  # such as a folder that is there already
                    call()
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
        if op in ("unlink", "rmdir"):
            return call()  # a full disk lets one remove
        if middle:
            middle()
        number = getattr(errno, self._then)
        raise OSError(number, os.strerror(number), str(path))


class _Writing:
    """A file whose `write` is another."""

    def __init__(self, file: Any, write: Callable[[Any], Any]) -> None:
        self._file, self.write = file, write

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "_Writing":
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        return self._file.__exit__(*error)

    def __iter__(self) -> Any:
        return iter(self._file)


# Clock


def _jump(wanted: dict[str, Any]) -> None:
    """Wall-clock time that jumps by `seconds` and back at every `every`-th look."""
    now, looks = time.time, [0]

    def jumping() -> float:
        looks[0] += 1
        return now() + wanted["seconds"] * (looks[0] // wanted["every"] % 2)

    time.time = jumping
