"""Where a run is kept: a few object operations that a local folder and an object store can both do exactly.

Keys are relative, '/'-separated. The two operations everything else is built on are `create` (publish under a new name,
fails if the name is taken: a hard link here, a conditional put there) and `put` (replace whole, never half).
A reader sees an object complete or not at all.
"""

import errno
import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import is_dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, cast

from prism_ray.documents import fits, parse_json, record
from prism_ray.errors import InputError, PrismError, StorageError, shortened
from prism_ray.stores import SCHEMES, ObjectStore

TEMPORARY = ".tmp"
"""Folder inside a store for objects that are not published yet; never listed."""


ABANDONED_AFTER_S = 3600.0

SETTLED_S, KNOWN_S = 2.0, 5.0
"""A folder that has not changed for this long is known by its time of change, for so long."""

NO_HARD_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
"""What file systems without hard links answer (exFAT, some FUSE mounts)."""

FAILING_DISK = (errno.EIO, errno.ESTALE, errno.ENXIO, errno.ENODEV, errno.EFBIG)
"""What disks and network mounts answer that fail, were replaced, or hold no larger files."""


class Store(Protocol):
    """Objects by key below one root."""

    url: str

    def url_of(self, key: str) -> str: ...
    def read(self, key: str) -> bytes: ...
    def open(self, key: str) -> BinaryIO: ...
    def fetch(self, key: str, path: Path) -> None: ...
    def read_all(self, prefix: str) -> Mapping[str, bytes]: ...
    def size(self, key: str) -> int | None: ...
    def sizes(self, prefix: str) -> Mapping[str, int]: ...
    def keys(self, prefix: str) -> list[str]: ...
    def sha256(self, key: str) -> str: ...
    def put(self, key: str, data: bytes) -> None: ...
    def create(self, key: str, data: bytes, *, check: Callable[[Any], None] | None = None) -> bool: ...
    def put_file(self, key: str, path: Path) -> None: ...
    def copy(self, key: str, source: "Store", source_key: str) -> None: ...
    def built_folder(self) -> AbstractContextManager[Path]: ...
    def publish_folder(self, built: Path, key: str) -> None: ...
    def remove(self, key: str) -> None: ...
    def move(self, key: str, to: str) -> None: ...
    def append(self, key: str, line: str) -> None: ...
    def check_writable(self) -> None: ...


class _Tag(NamedTuple):
    """By which a file is known to be the one that was read: objects are only ever replaced, each by a new file."""

    inode: int
    modified_ns: int
    size: int


class _Listing(NamedTuple):
    """The files of a folder, as of a change of it."""

    changed: tuple[int, int]
    until: float
    files: dict[str, tuple[str, _Tag]]
    sizes: dict[str, int]


class LocalStore:
    """A folder on a file system with rename and hard links (any POSIX one)."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).absolute()
        self.url = str(self.root)
        self._read: dict[str, tuple[dict[str, tuple[str, _Tag]], dict[str, bytes]]] = {}
        self._listed: dict[str, _Listing] = {}

    def url_of(self, key: str) -> str:
        """An object's address: its path."""
        return str(self.path(key))

    def path(self, key: str) -> Path:
        """Where an object lies; refuses a key that would leave the store."""
        parts = key.split("/")
        if not key or any(part in ("", ".", "..") for part in parts):
            raise InputError(f"storage key {key!r}: leaves the run folder or is empty; expected a plain relative name")
        return self.root.joinpath(*parts)

    def read(self, key: str) -> bytes:
        """The whole object. Raises FileNotFoundError."""
        return self.path(key).read_bytes()

    def open(self, key: str) -> BinaryIO:
        """An object to read parts of. Raises FileNotFoundError."""
        return self.path(key).open("rb")

    def fetch(self, key: str, path: Path) -> None:
        """Copy an object to a file. Raises FileNotFoundError."""
        shutil.copyfile(self.path(key), path)

    def read_all(self, prefix: str) -> Mapping[str, bytes]:
        """Every object below a folder, by key in order. What has not changed since the last call isn't read again.

        Where nothing at all has changed the answer is the same object.
        """
        files = self._listing(prefix).files
        before, seen = self._read.get(prefix, ({}, {}))
        if before is not files:
            known, seen = seen, {}
            for key, (path, tag) in files.items():
                if key in known and before[key][1] == tag:
                    seen[key] = known[key]
                    continue
                with suppress(FileNotFoundError):  # removed since it was listed
                    seen[key] = _content(path)
            self._read[prefix] = (files, seen)
        return seen

    def size(self, key: str) -> int | None:
        """Bytes, or None where there is no such object."""
        return _size(self.path(key))

    def sizes(self, prefix: str) -> Mapping[str, int]:
        """Bytes of every object below a folder by its key, sorted; the same object where nothing has changed."""
        return self._listing(prefix).sizes

    def keys(self, prefix: str) -> list[str]:
        """Every key below a folder, sorted."""
        return list(self._listing(prefix).files)

    def _listing(self, prefix: str) -> _Listing:
        """Path and tag of every file below a folder, by key, sorted.

        Objects come and go by changes of their folder, so one that was looked at a moment ago is known by its time of
        change: a command asks often, of thousands of objects.
        """
        folder = str(self.path(prefix))
        began, changed = time.time(), _changed(folder)
        if prefix in self._listed:
            listing = self._listed[prefix]
            if listing.changed == changed and began < listing.until:
                return listing
        found, folders = {}, [(folder, prefix)]
        for at, above in folders:  # which grows
            with suppress(FileNotFoundError, NotADirectoryError, PermissionError), os.scandir(at) as entries:
                for entry in entries:
                    key = f"{above}/{entry.name}"
                    if entry.is_dir(follow_symlinks=False):
                        folders.append((entry.path, key))
                        continue
                    with suppress(FileNotFoundError):  # removed since it was listed, or a link to nowhere
                        status = entry.stat()
                        if stat.S_ISREG(status.st_mode):
                            found[key] = (entry.path, _Tag(status.st_ino, status.st_mtime_ns, status.st_size))
        found = dict(sorted(found.items()))
        listing = _Listing(
            changed or (0, 0), began + KNOWN_S, found, {key: tag.size for key, (_, tag) in found.items()}
        )
        # One that has just changed may change again unseen, in the same tick of the file system's clock; and what
        # changes inside of a folder in it does not show.
        if changed is not None and len(folders) == 1 and began - changed[1] / 1e9 > SETTLED_S:
            self._listed[prefix] = listing
        return listing

    def sha256(self, key: str) -> str:
        """Digest of an object's content. Raises FileNotFoundError."""
        return sha256_of_file(self.path(key))

    def put(self, key: str, data: bytes) -> None:
        """Write or replace an object as a whole."""
        with self._written(key, data) as temporary:
            os.replace(temporary, self.path(key))
            sync_path(self.path(key).parent)

    def create(self, key: str, data: bytes, *, check: Callable[[Any], None] | None = None) -> bool:
        """Publish a new object; False, and nothing changed, if the key exists.

        `check` looks at the temporary file after it was written and synced, and raises to refuse it.
        """
        with self._written(key, data) as temporary:
            if check is not None:
                check(temporary)
            try:
                _link_new(temporary, self.path(key))
            except FileExistsError:
                return False
            sync_path(self.path(key).parent)
        return True

    def put_file(self, key: str, path: Path) -> None:
        """Write or replace an object with the content of a file."""
        with self._temporary(key) as temporary:
            shutil.copyfile(path, temporary)
            sync_path(temporary)
            os.replace(temporary, self.path(key))
            sync_path(self.path(key).parent)

    def copy(self, key: str, source: Store, source_key: str) -> None:
        """Write or replace an object as another file's second name, as a copy where there are no hard links.

        No object is ever changed in place, so neither can change through the other.
        """
        if not isinstance(source, LocalStore):
            self.put(key, source.read(source_key))
            return
        path = source.path(source_key)
        with self._temporary(key) as temporary:
            try:
                os.link(path, temporary)
            except OSError as error:
                if error.errno not in (*NO_HARD_LINKS, errno.EXDEV):
                    raise
                shutil.copyfile(path, temporary)
                sync_path(temporary)
            os.replace(temporary, self.path(key))
            sync_path(self.path(key).parent)

    @contextmanager
    def built_folder(self) -> Iterator[Path]:
        """A folder of this store to fill for `publish_folder`, gone at the end."""
        built = self.root / TEMPORARY / uuid.uuid4().hex
        with storage_errors(built):
            built.mkdir(parents=True)
        try:
            yield built
        finally:
            shutil.rmtree(built, ignore_errors=True)

    def publish_folder(self, built: Path, key: str) -> None:
        """Replace a folder of objects by a built one.

        Raises:
            PrismError: what is there can't be removed.
        """
        final = self.path(key)
        self.remove(key)
        final.parent.mkdir(parents=True, exist_ok=True)
        if not publish_folder(built, final):
            raise PrismError(f"{final}: could not be replaced; remove it and run the same command again")

    def remove(self, key: str) -> None:
        """Delete an object or a folder of objects; fine if there is none."""
        remove_path(self.path(key))

    def move(self, key: str, to: str) -> None:
        """Rename an object, replacing what is there."""
        target = self.path(to)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(self.path(key), target)

    def append(self, key: str, line: str) -> None:
        """Add a line to a log; for people, so neither synced nor atomic."""
        with storage_errors(self.path(key)):
            self.path(key).parent.mkdir(parents=True, exist_ok=True)
            with open(self.path(key), "a", encoding="utf-8") as file:
                file.write(line + "\n")

    def check_writable(self) -> None:
        """Refuse a storage that cannot be written, before anything expensive starts."""
        try:
            with storage_errors(self.root):
                self.root.mkdir(parents=True, exist_ok=True)
                probe = self.root / f"{TEMPORARY}-{uuid.uuid4().hex}"
                probe.write_bytes(b"")
                probe.unlink()
        except OSError as error:
            raise InputError(f"{self.root}: not writable ({error.strerror}); choose another storage=...") from error

    @contextmanager
    def _written(self, key: str, data: bytes) -> Iterator[Path]:
        """The data in a synced temporary file, gone at the end."""
        with self._temporary(key) as temporary:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield temporary

    @contextmanager
    def _temporary(self, key: str) -> Iterator[Path]:
        """A name to write an object under first, gone at the end; full and read-only disks become one-line errors."""
        temporary = self.root / TEMPORARY / uuid.uuid4().hex
        with storage_errors(self.path(key)):
            temporary.parent.mkdir(parents=True, exist_ok=True)
            self.path(key).parent.mkdir(parents=True, exist_ok=True)
            try:
                yield temporary
            finally:
                temporary.unlink(missing_ok=True)


@contextmanager
def storage_errors(path: Path | str, *, setting: str = "storage") -> Iterator[None]:
    """Turn 'no space', 'not permitted' and a failing disk into one line with the path, the free bytes and the way out.

    `setting` chooses the folder that is written. An object store reports its own troubles; around one, copies of this
    node are meant.
    """
    if is_remote(path):
        path, setting = Path(tempfile.gettempdir()), "TMPDIR"
    path = Path(path)
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(
                f"{path}: no space left ({_free_bytes(path)} bytes free); make room and run the same command again"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise InputError(f"{path}: not writable; choose another {setting}=... or change its permissions") from error
        if error.errno in (errno.ENOTDIR, errno.ENAMETOOLONG):
            raise InputError(f"{path}: {error.strerror}; choose another {setting}=...") from error
        if error.errno in FAILING_DISK:
            raise StorageError(f"{path}: {error.strerror}; check the disk and run the same command again") from error
        raise


def is_remote(url: str | Path) -> bool:
    """Whether an address is one of an object store, and not a local path."""
    scheme, separator, _ = str(url).partition("://")
    return bool(separator) and scheme != "file"


def open_store(url: str) -> Store:
    """The store behind `storage=...`.

    Raises:
        InputError: an unknown URL scheme, an address without a bucket, or a package that is not installed.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        try:
            return _local_store(str(Path(url).expanduser().absolute()))
        except RuntimeError as error:
            raise InputError(f"storage={url!r}: has no home folder; write the path without ~") from error
    if scheme == "file":
        if not rest.startswith("/"):
            raise InputError(f"storage={url!r}: no absolute path; expected file:///FOLDER")
        return _local_store(rest)
    if not rest.strip("/"):
        raise InputError(f"storage={url!r}: names no bucket; expected {scheme}://BUCKET/FOLDER")
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in ("file", *SCHEMES))
        raise InputError(f"storage={url!r}: scheme {scheme!r} is not supported; known: a local path, {known}")
    return _object_store(url.rstrip("/"))


@lru_cache(maxsize=256)
def _local_store(path: str) -> LocalStore:
    """One per process and folder, as for addresses."""
    return LocalStore(path)


@lru_cache(maxsize=256)
def _object_store(url: str) -> ObjectStore:
    """One per process and address: it remembers what it has read."""
    return ObjectStore(url)


def check_new_file(path: str, *, suffix: str) -> None:
    """Refuse a file to write that is there already, has no folder, or is called what it is not.

    Raises:
        InputError: as said, with `out=`, the setting that names it.
    """
    file = Path(path)
    if file.suffix.lower() != suffix:
        raise InputError(f"out={path!r}: expected a name that ends in {suffix}; rename it")
    if file.exists() or file.is_symlink():
        raise InputError(f"out={path!r}: is there already, and nothing is written over it; choose another name")
    if not file.absolute().parent.is_dir():
        raise InputError(f"out={path!r}: its folder does not exist; make it, or choose another")


def write_new_file(path: str, data: bytes) -> None:
    """Write a file that was not there.

    Raises:
        InputError: it appeared meanwhile, or may not be written.
    """
    try:
        with open(path, "xb") as file:
            file.write(data)
    except OSError as error:
        raise InputError(f"out={path!r}: cannot be written ({error.strerror}); choose another") from error


def sha256_of(data: bytes) -> str:
    """Hex digest of an object's content."""
    return hashlib.sha256(data).hexdigest()


def sha256_of_file(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_json(content: Any) -> bytes:
    """Readable, canonical JSON: the same content gives the same bytes."""
    return (json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def read_json(store: Store, key: str, kind: Any = dict[str, Any]) -> Any | None:
    """Parsed content of a JSON object, or None where there is none.

    Args:
        kind: what it must hold: an annotation that `documents.fits` knows, or a dataclass to make of it.

    Raises:
        PrismError: it is damaged. No kill leaves it so, only the disk or a hand.
    """
    try:
        data = store.read(key)
    except FileNotFoundError:
        return None
    return parsed_json(data, partial(store.url_of, key), kind)


def parsed_json(data: bytes, shown: Callable[[], str], kind: Any = dict[str, Any]) -> Any:
    """Content of a JSON object, in a message called what `shown` answers; see `read_json` for `kind`.

    Raises:
        PrismError: it is damaged.
    """
    try:
        content = parse_json(data)
        if is_dataclass(kind):
            return record(cast(type, kind), content)
        if not fits(content, kind):
            raise ValueError(f"is a {type(content).__name__}")
        return content
    except ValueError as error:
        raise PrismError(
            f"{shown()}: damaged, not what belongs there ({shortened(error)}); delete it and run the same command again"
        ) from error


def publish_folder(built: Path, final: Path) -> bool:
    """Rename a finished folder to its content-addressed name; False if another process was first."""
    sync_files(built)
    try:
        os.rename(built, final)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        shutil.rmtree(built, ignore_errors=True)
        return False
    sync_path(final.parent)
    return True


def _link_new(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in NO_HARD_LINKS:
            raise
        # No hard links here (exFAT, some FUSE mounts): an exclusive empty file claims the name, the rename fills it.
        os.close(os.open(target, os.O_CREAT | os.O_EXCL))
        os.replace(source, target)


def abandoned(folder: Path, pattern: str) -> Iterator[Path]:
    """What killed processes left under such a name, in an hour in which a living one would have written again."""
    for path in folder.glob(pattern):
        try:
            age_s = time.time() - path.lstat().st_mtime
        except FileNotFoundError:
            continue  # another process was first
        if age_s > ABANDONED_AFTER_S:
            yield path


def remove_path(path: Path) -> None:
    """Delete a file or a folder; fine if there is none."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync_files(folder: Path) -> None:
    """Make the content of every file in a folder survive a power cut."""
    for path in folder.rglob("*"):
        if path.is_file():
            sync_path(path)


def sync_path(path: Path) -> None:
    """Make a file's content, or the renames in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _content(path: str) -> bytes:
    """A small file, in half the time that a file object takes: a run has thousands."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return b"".join(iter(lambda: os.read(descriptor, 2**16), b""))
    finally:
        os.close(descriptor)


def _changed(folder: str) -> tuple[int, int] | None:
    """Inode of a folder and when its entries last changed, in ns; None where there is none."""
    with suppress(FileNotFoundError, NotADirectoryError):
        status = os.stat(folder)
        return status.st_ino, status.st_mtime_ns
    return None


def _size(path: Path) -> int | None:
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return None if stat.S_ISDIR(status.st_mode) else status.st_size


def _free_bytes(path: Path) -> int:
    existing = next(p for p in (path, *path.parents) if p.exists())
    return shutil.disk_usage(existing).free
