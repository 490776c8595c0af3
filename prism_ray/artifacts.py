"""Artifacts: folders named by all that decides their content, complete or absent, shared by the runs of a storage.

In local storage an artifact is a folder, renamed into place and used where it lies; its marker, written last inside,
tells that it is complete. In an object store it is

    <artifact>/files.json               written last and once: which version counts, and sha256 and bytes of its files
    <artifact>/<version>/...            the files; a version is named by a digest of them

so that of two that publish at once one wins whole. Files of it that are needed on a node are copied there once, checked
by their sha256, and shared by the node's processes.
"""

import fcntl
import os
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import Any

from prism_ray.errors import InputError, PrismError
from prism_ray.identity import content_hash
from prism_ray.storage import (
    LocalStore,
    Store,
    abandoned,
    is_remote,
    open_store,
    read_json,
    sha256_of_file,
    storage_errors,
    sync_files,
    sync_path,
    to_json,
)

MARKER = "prism_ray.json"
"""File of an artifact folder that says how it was made; a local folder with it is complete."""
LISTING = "files.json"

ALL = ("*",)
UNUSED_AFTER_S = 7 * 24 * 3600.0
"""Copies of this node that nobody asked for in that time are removed."""
FETCHED_AT_ONCE = 4
TRIES = 3


@dataclass(frozen=True)
class Listing:
    """The files of a published artifact."""

    version: str
    files: dict[str, dict[str, Any]]  # by name: sha256 and bytes


def join(folder: str | Path, *names: str) -> str:
    """The address of something in a folder, local or not."""
    return "/".join([str(folder).rstrip("/"), *names])


def split(folder: str | Path) -> tuple[str, str]:
    """The address that a folder is in, and its name."""
    parent, _, name = str(folder).rstrip("/").rpartition("/")
    return parent, name


# Publishing


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


def publish_built(folder: str | Path, build: Callable[[Path], None], *, marker: str = MARKER) -> None:
    """Publish an artifact that `build` fills a local folder with, its marker last.

    Raises:
        StorageError: the disk is full or refuses to be written, or the object store gives no answer.
    """
    if is_remote(folder):
        _publish_objects(str(folder), build)
        return
    folder = Path(folder)
    with storage_errors(folder):
        with published_folder(folder, marker=marker) as building:
            build(building)
            sync_files(building)
        sync_path(folder.parent)


def publish_files(folder: str | Path, files: Mapping[str, bytes], *, facts: dict[str, Any]) -> None:
    """Publish an artifact of these files by name, with `facts` in its marker, see `publish_built`."""

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


def _publish_objects(folder: str, build: Callable[[Path], None]) -> None:
    store = open_store(folder)
    with storage_errors(folder), store.built_folder() as built:
        build(built)
        names = sorted(path.relative_to(built).as_posix() for path in built.rglob("*") if path.is_file())
        files = {
            name: {"sha256": sha256_of_file(built / name), "bytes": (built / name).stat().st_size} for name in names
        }
        version = content_hash(files)
        for name in names:
            store.put_file(f"{version}/{name}", built / name)
    listing = {"version": version, "files": files}
    if not store.create(LISTING, to_json(listing)) and read_json(store, LISTING) != listing:
        store.remove(version)  # another process was first, with other bytes


# Looking


def is_complete(folder: str | Path, *, marker: str = MARKER) -> bool:
    """Whether an artifact is there."""
    if is_remote(folder):
        return open_store(str(folder)).size(LISTING) is not None
    return (Path(folder) / marker).is_file()


def artifact_facts(folder: str | Path) -> dict[str, Any]:
    """What was found out when an artifact was made; nothing where it is not complete."""
    if is_remote(folder):
        return dict(_remote_facts(str(folder))) if is_complete(folder) else {}
    return read_json(LocalStore(folder), MARKER) or {}


def listing_of(folder: str) -> Listing:
    """The files of an artifact in an object store.

    Raises:
        PrismError: it isn't there, or damaged.
    """
    return _listing(folder)


def sha256_in(folder: str | Path, name: str) -> str:
    """Digest of a file of an artifact; in an object store as it was published, without reading it."""
    return listing_of(str(folder)).files[name]["sha256"] if is_remote(folder) else sha256_of_file(Path(folder) / name)


def damaged_files(folder: str) -> list[str]:
    """Names of an artifact's objects that are missing or not the published ones. Reads all of them."""
    store, listing = open_store(folder), listing_of(folder)

    def is_whole(name: str) -> bool:
        key = f"{listing.version}/{name}"
        return store.size(key) is not None and store.sha256(key) == listing.files[name]["sha256"]

    return [name for name in listing.files if not is_whole(name)]


@lru_cache(maxsize=1024)
def _listing(folder: str) -> Listing:
    """Read once per process: it never changes."""
    content = read_json(open_store(folder), LISTING)
    if content is None:
        raise PrismError(f"{folder}: is not there; run the same command again, which makes it")
    return Listing(content["version"], content["files"])


@lru_cache(maxsize=1024)
def _remote_facts(folder: str) -> dict[str, Any]:
    return read_json(open_store(folder), f"{_listing(folder).version}/{MARKER}") or {}


# Copies of this node


def local_folder(folder: str | Path, *, only: Sequence[str] = ALL) -> Path:
    """An artifact as a local folder: itself in local storage, else this node's copy.

    Args:
        only: patterns of the names that are wanted; others may be missing from a copy.

    Raises:
        PrismError: an object is damaged.
    """
    if not is_remote(folder):
        return Path(folder)
    folder = str(folder)
    listing, copy = listing_of(folder), _copy_of(folder)
    names = [name for name in listing.files if any(fnmatch(name, pattern) for pattern in only)]
    with storage_errors(folder), _locked(copy):
        missing = [name for name in names if not _is_here(copy, name, listing.files[name]["sha256"])]
        with ThreadPoolExecutor(FETCHED_AT_ONCE, "fetch") as pool:
            list(pool.map(lambda name: _fetch(folder, listing, name, copy), missing))
    return copy


def _copy_of(folder: str) -> Path:
    """Where this node's copy of an artifact belongs."""
    return node_folder() / "artifacts" / content_hash([folder, listing_of(folder).version])


@lru_cache(maxsize=100_000)
def _digest(path: Path, size: int, changed_ns: int) -> str:
    """sha256 of a file, computed once per process as long as nobody touches it."""
    return sha256_of_file(path)


def _is_here(copy: Path, name: str, sha256: str) -> bool:
    try:
        status = (copy / name).stat()
    except FileNotFoundError:
        return False
    return _digest(copy / name, status.st_size, status.st_mtime_ns) == sha256


def _fetch(folder: str, listing: Listing, name: str, copy: Path) -> None:
    path = copy / name
    path.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(TRIES):
        try:
            open_store(folder).fetch(f"{listing.version}/{name}", path)
        except FileNotFoundError:
            break
        if _is_here(copy, name, listing.files[name]["sha256"]):
            return
        path.unlink(missing_ok=True)
    raise PrismError(
        f"{folder}/{listing.version}/{name}: is missing or differs from what was published; delete {folder} and run "
        "the same command again"
    )


@contextmanager
def _locked(copy: Path) -> Iterator[None]:
    """Work on a copy while no other process of this node does; says that it is in use."""
    is_new = not copy.exists()
    copy.mkdir(parents=True, exist_ok=True)
    with open(copy.with_suffix(".lock"), "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        os.utime(file.fileno())
        yield
    if is_new:
        _remove_unused(copy.parent)


def _remove_unused(folder: Path) -> None:
    """Delete copies that nobody has asked for in a week."""
    for path in folder.glob("*.lock"):
        with suppress(OSError), open(path, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() - path.stat().st_mtime > UNUSED_AFTER_S:
                shutil.rmtree(path.with_suffix(""), ignore_errors=True)
                path.unlink()


def node_folder() -> Path:
    """This user's folder for files of this node, in TMPDIR; another's of that name is not trusted."""
    folder = Path(tempfile.gettempdir()) / f"prism_ray-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or not stat.S_ISDIR(status.st_mode) or status.st_mode & 0o022:
        raise InputError(f"{folder}: others may write there; remove it, or set TMPDIR to a folder of your own")
    return folder


# Files that are replaced


@dataclass(frozen=True)
class StoredFile:
    """A file of a store that programs want as a path, such as a checkpoint."""

    store: Store
    key: str

    @classmethod
    def at(cls, address: str | Path) -> "StoredFile":
        folder, name = split(address)
        return cls(open_store(folder), name)

    def __str__(self) -> str:
        return self.store.url_of(self.key)

    @contextmanager
    def reading(self) -> Iterator[Path]:
        """Where it can be read inside the block; no file is there if there is none."""
        if isinstance(self.store, LocalStore):
            yield self.store.path(self.key)
            return
        with self.store.built_folder() as folder:
            path = folder / self.key.rpartition("/")[2]
            with suppress(FileNotFoundError):
                self.store.fetch(self.key, path)
            try:
                yield path
            except InputError as error:
                raise InputError(str(error).replace(str(path), str(self))) from error

    @contextmanager
    def writing(self) -> Iterator[Path]:
        """Where to write it, whole and atomically; published at the end of the block."""
        if isinstance(self.store, LocalStore):
            yield self.store.path(self.key)
            return
        with self.store.built_folder() as folder:
            path = folder / self.key.rpartition("/")[2]
            yield path
            self.store.put_file(self.key, path)

    def remove(self) -> None:
        """Fine if there is none."""
        self.store.remove(self.key)
