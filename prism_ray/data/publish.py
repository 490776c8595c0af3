"""Publish a local folder in one step: complete or absent, whoever else builds it and whenever a process dies."""

import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prism_ray.storage import abandoned, storage_errors, sync_files, sync_path, to_json

MARKER = "prism_ray.json"
"""File of an artifact folder that says how it was made; a folder with it is complete."""


@contextmanager
def published_folder(folder: Path, *, marker: str) -> Iterator[Path]:
    """A new folder beside `folder`, renamed to it when the block ends well and removed otherwise.

    `marker` is the file, written last inside the block, that tells a complete folder. If another process publishes a
    complete `folder` first, that one stays.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for leftover in abandoned(folder.parent, f".{folder.name}.*"):
        shutil.rmtree(leftover, ignore_errors=True)  # folders alone: a checkpoint beside them has such a name too
    building = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:12]}")
    building.mkdir()
    try:
        yield building
        if folder.exists() and not (folder / marker).exists():
            # Somebody deleted the marker, or copied half a folder: out of the way, in one step.
            os.rename(folder, building.with_name(f"{building.name}.incomplete"))
        try:
            os.rename(building, folder)
        except OSError:
            if not (folder / marker).exists():
                raise
    finally:
        for leftover in folder.parent.glob(f"{building.name}*"):
            shutil.rmtree(leftover, ignore_errors=True)


def publish_built(folder: Path, build: Callable[[Path], None]) -> None:
    """Publish an artifact folder that `build` fills, its marker last, and wait until it is on the disk.

    Raises:
        StorageError: the disk is full or refuses to be written.
    """
    with storage_errors(folder):
        with published_folder(folder, marker=MARKER) as building:
            build(building)
            sync_files(building)
        sync_path(folder.parent)


def publish_files(folder: Path, files: Mapping[str, bytes], *, facts: dict[str, Any]) -> None:
    """Publish an artifact folder of these files by name, with `facts` in its marker, see `publish_built`."""

    def build(building: Path) -> None:
        for name, content in {**files, MARKER: to_json(facts)}.items():
            (building / name).write_bytes(content)

    publish_built(folder, build)


def write_durably(path: Path, data: bytes) -> None:
    """Write a file and wait until it is on the disk, so that what is renamed later is never empty after a crash."""
    with path.open("wb") as sink:
        sink.write(data)
        sink.flush()
        os.fsync(sink.fileno())
