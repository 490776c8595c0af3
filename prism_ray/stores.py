"""Object stores behind `storage=...`: S3, Google Cloud Storage, and a process's own memory, through fsspec.

What is promised: an object is there whole or not at all. `create` is a conditional put (S3: `If-None-Match: *`, Google:
`ifGenerationMatch=0`), also of objects uploaded in parts, so of two creators one wins. A store that answers "not
implemented" to it gets a look before an ordinary put: between the two another process may slip in, and two drivers must
then not be started on one run at the same moment. A store that ignores the condition in silence is no better off.

Every call is tried again, a bounded number of times and after random pauses, when the store is busy, slow or cut off.
Nothing is answered from a cache of listings, so what another process wrote is seen at once.
"""

import errno
import hashlib
import io
import math
import os
import random
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from enum import Enum
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO, TypeVar

from prism_ray.errors import InputError, PrismError, StorageError

T = TypeVar("T")

SCHEMES = {"s3": ("s3fs", "s3"), "gs": ("gcsfs", "gcs"), "memory": ("fsspec", "")}
"""By URL scheme: the package that reads it, and our extra that installs it."""

TRIES = 8
TRIES_OF_MISSING = 4
"""Where the store says 'not found' of what must be there."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 10.0
"""A pause is drawn evenly between nothing and a limit that doubles from the first to the longest."""

PART_BYTES = 16 << 20
"""Objects of twice that size or more are uploaded in parts."""
READERS = 16
"""Small objects that are read at once."""

TIMEOUTS_S = {"connect_timeout": 10, "read_timeout": 60}
TIMEOUTS_OF_PROBE_S = {"connect_timeout": 1.5, "read_timeout": 4}
PATIENCE_OF_PROBE_S = 2.5

NO_CREDENTIALS = (
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "ProfileNotFound",
    "TokenRetrievalError",
    "UnauthorizedSSOTokenError",
    "DefaultCredentialsError",
    "RefreshError",
)
"""Exceptions of botocore and google.auth, which are not imported for their names."""

_pauses = random.Random()  # of its own: seeds of a run must not be spent, nor repeat our pauses


class Purpose(Enum):
    """What calls are for; each has a client with its own patience."""

    small = "whole objects at once"
    large = "objects in parts"
    probe = "a look before a start"


class ObjectStore:
    """Objects by key below the prefix of a bucket. One instance serves any number of threads."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._scheme, _, rest = self.url.partition("://")
        self._root = f"/{rest}" if self._scheme == "memory" else rest  # as fsspec names it
        self._seen: dict[str, tuple[Any, bytes]] = {}

    def url_of(self, key: str) -> str:
        """An object's address; refuses a key that would leave the store."""
        return f"{self.url}/{_checked(key)}"

    @property
    def _fs(self) -> Any:
        return _filesystem(self._scheme, Purpose.small)

    def _fs_for(self, size: int) -> Any:
        """For an object of so many bytes."""
        return _filesystem(self._scheme, Purpose.small if size < 2 * PART_BYTES else Purpose.large)

    # Reading

    def read(self, key: str) -> bytes:
        """The whole object. Raises FileNotFoundError."""
        at = self._at(key)
        # By default s3fs asks for an object's size before it reads it.
        options = {"max_concurrency": 1} if self._scheme == "s3" else {}
        return self._try(key, lambda: self._fs.cat_file(at, **options))

    def read_range(self, key: str, start: int, end: int) -> bytes:
        """Bytes `start` to `end` (exclusive) of an object."""
        at = self._at(key)
        return self._try(key, lambda: self._fs.cat_file(at, start=start, end=end)) if end > start else b""

    def open(self, key: str) -> BinaryIO:
        """An object to read parts of: of a parquet file only the wanted columns travel. Raises FileNotFoundError."""
        size = self.size(key)
        if size is None:
            raise FileNotFoundError(self.url_of(key))
        return io.BufferedReader(_Ranges(self, key, size), buffer_size=1 << 16)

    def fetch(self, key: str, path: Path) -> None:
        """Copy an object to a local file, which is there afterwards or was not touched. Raises FileNotFoundError."""
        at, temporary = self._at(key), path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        if self.size(key) is None:
            raise FileNotFoundError(self.url_of(key))
        fs = _filesystem(self._scheme, Purpose.large)
        try:
            self._try(key, lambda: fs.get_file(at, str(temporary)))
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def read_all(self, prefix: str) -> Mapping[str, bytes]:
        """Every object below a folder, by key in order. What has not changed since the last call isn't read again."""
        found = {key: _tag(info) for key, info in self._infos(prefix).items()}
        seen = {key: self._seen.get(key, (None, b"")) for key in found}
        changed = [key for key, tag in found.items() if tag is None or seen[key][0] != tag]

        def read(key: str) -> None:
            try:
                seen[key] = (found[key], self.read(key))
            except FileNotFoundError:  # removed since it was listed
                del seen[key]

        if changed:
            with ThreadPoolExecutor(READERS, "read") as pool:
                list(pool.map(read, changed))
        # Other threads may be here too, so what is remembered is only ever replaced or dropped key by key.
        for key in [key for key in list(self._seen) if key.startswith(f"{prefix}/") and key not in seen]:
            self._seen.pop(key, None)
        self._seen.update(seen)
        return {key: seen[key][1] for key in found if key in seen}

    def size(self, key: str) -> int | None:
        """Bytes, or None where there is no such object."""
        info = self._listed(key)
        return None if info is None else int(info["size"])

    def sizes(self, prefix: str) -> Mapping[str, int]:
        """Bytes of every object below a folder by its key, sorted; one request for each thousand."""
        return {key: int(info["size"]) for key, info in self._infos(prefix).items()}

    def keys(self, prefix: str) -> list[str]:
        """Every key below a folder, sorted."""
        return list(self.sizes(prefix))

    def sha256(self, key: str) -> str:
        """Digest of an object's content. Raises FileNotFoundError."""
        return hashlib.sha256(self.read(key)).hexdigest()

    # Writing

    def put(self, key: str, data: bytes) -> None:
        """Write or replace an object as a whole."""
        at, fs = self._at(key), self._fs_for(len(data))
        self._try(key, lambda: fs.pipe_file(at, data, **self._parts()), never_missing=True)

    def create(self, key: str, data: bytes, *, check: Callable[[Any], None] | None = None) -> bool:
        """Publish a new object; False, and nothing changed, if the key exists.

        An object of the very same bytes counts as this call's own: a put whose answer was lost is tried again, and then
        finds itself. `check` looks at the bytes and raises to refuse them.
        """
        if check is not None:
            check(io.BytesIO(data))
        at, fs = self._at(key), self._fs_for(len(data))

        def put() -> None:
            try:
                fs.pipe_file(at, data, mode="create", **self._parts())
            except Exception as error:
                if _code(error) in ("PreconditionFailed", "412"):
                    raise FileExistsError(at) from error
                if _code(error) not in ("NotImplemented", "501"):
                    raise
                if self.size(key) is not None:
                    raise FileExistsError(at) from error
                fs.pipe_file(at, data, **self._parts())

        try:
            self._try(key, put, never_missing=True)
        except FileExistsError:
            with suppress(FileNotFoundError):
                return self.read(key) == data
            return False  # somebody published it and removed it again
        return True

    def put_file(self, key: str, path: Path) -> None:
        """Write or replace an object with the content of a local file."""
        at, fs = self._at(key), self._fs_for(path.stat().st_size)
        self._try(key, lambda: fs.put_file(str(path), at, **self._parts()), never_missing=True)

    def copy(self, key: str, source: Any, source_key: str) -> None:
        """Write or replace an object as a copy of another, within the store where both lie in the same one."""
        if not isinstance(source, ObjectStore) or source._scheme != self._scheme:
            self.put(key, source.read(source_key))
            return
        origin, at = source._at(source_key), self._at(key)
        self._try(key, lambda: self._fs.cp_file(origin, at), never_missing=True)

    @contextmanager
    def built_folder(self) -> Iterator[Path]:
        """A local folder to fill for `publish_folder`, gone at the end."""
        with TemporaryDirectory(prefix="prism_ray-") as folder:
            yield Path(folder)

    def publish_folder(self, built: Path, key: str) -> None:
        """Replace the objects below a key by the files of a local folder. Not in one step: a receipt comes after it."""
        self.remove(key)
        for path in sorted(path for path in built.rglob("*") if path.is_file()):
            self.put_file(f"{key}/{path.relative_to(built).as_posix()}", path)

    def remove(self, key: str) -> None:
        """Delete an object or a folder of objects; fine if there is none."""
        for name in (key, *self.keys(key)):
            at = self._at(name)
            with suppress(FileNotFoundError):
                self._try(name, lambda at=at: self._fs.rm_file(at))

    def move(self, key: str, to: str) -> None:
        """Rename an object, replacing what is there: a copy, then the removal of the old one."""
        self.copy(to, self, key)
        self.remove(key)

    def append(self, key: str, line: str) -> None:
        """Add a line to a log: an object of its own below the log's name, because objects don't grow."""
        now = time.time_ns()
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(now // 10**9)) + f".{now % 10**9 // 1000:06d}Z"
        folder, _, extension = key.rpartition(".")
        self.put(f"{folder}/{stamp}-{uuid.uuid4().hex[:8]}.{extension.removesuffix('l')}", line.encode() + b"\n")

    # Looking before a start

    def check_writable(self) -> None:
        """Write, read and remove a probe, within seconds.

        Raises:
            InputError: no bucket, no credentials, no permission, or no answer.
        """
        fs, at = _filesystem(self._scheme, Purpose.probe), self._at(f"probe-{uuid.uuid4().hex}")
        data = at.encode()

        def read() -> None:
            if fs.cat_file(at) != data:
                raise OSError(errno.EIO, "other bytes came back")

        try:
            for call in (lambda: fs.pipe_file(at, data), read, lambda: fs.rm_file(at)):
                self._try("", call, never_missing=True, patience_s=PATIENCE_OF_PROBE_S)
        except StorageError as error:
            raise InputError(
                f"storage={self.url!r}: the object store gives no answer ({_reason(error.__cause__ or error)}); check "
                f"network and endpoint{' (AWS_ENDPOINT_URL)' if self._scheme == 's3' else ''}, or choose another "
                "storage=..."
            ) from error

    # Calls

    def _at(self, key: str) -> str:
        """An object's name in the file system."""
        return f"{self._root}/{_checked(key)}"

    def _parts(self) -> dict[str, int]:
        return {} if self._scheme == "memory" else {"chunksize": PART_BYTES}

    def _infos(self, prefix: str) -> dict[str, Mapping[str, Any]]:
        """What a listing says of every object below a folder, by key in order."""
        folder = f"{self._at(prefix)}/"
        parent, _, name = folder[:-1].rpartition("/")
        found = self._found(parent, f"{name}/")
        names = sorted(at for at, info in found.items() if at.startswith(folder) and info["type"] == "file")
        return {at.removeprefix(f"{self._root}/"): found[at] for at in names if not at.endswith("/")}

    def _listed(self, key: str) -> Mapping[str, Any] | None:
        """What a listing says of one object, None if there is none."""
        at = self._at(key)
        parent, _, name = at.rpartition("/")
        info = self._found(parent, name).get(at)
        return info if info is not None and info["type"] == "file" else None

    def _found(self, parent: str, prefix: str) -> Mapping[str, Mapping[str, Any]]:
        """Everything in a folder whose name starts so; stores other than memory say 'not found' of no listing."""
        # Without a prefix s3fs looks for the folder itself where it finds nothing.
        return self._try("", lambda: self._fs.find(parent, prefix=prefix, detail=True), never_missing=True)

    def _try(self, key: str, call: Callable[[], T], *, never_missing: bool = False, patience_s: float = math.inf) -> T:
        """A call's answer, after as many tries as it takes; no third one begins after `patience_s`.

        Raises:
            FileNotFoundError, FileExistsError: the store says so. 'Not found' is believed if a listing agrees.
            InputError: credentials or permissions are missing; or the bucket, where `never_missing` is answered so.
            StorageError: all tries failed.
        """
        began, attempt = time.monotonic(), 0
        while True:
            attempt, tries = attempt + 1, TRIES
            try:
                return call()
            except (FileExistsError, PrismError):
                raise
            except FileNotFoundError as error:
                if not never_missing and self._listed(key) is None:
                    raise
                failure: Exception = error
                tries = TRIES_OF_MISSING
            except Exception as error:
                self._refuse(error)
                failure = error
            if attempt >= tries or (attempt > 1 and time.monotonic() - began > patience_s):
                if isinstance(failure, FileNotFoundError) and never_missing:
                    raise InputError(
                        f"storage={self.url!r}: the bucket {self._root.partition('/')[0]!r} does not exist; create it, "
                        "or choose another storage=..."
                    ) from failure
                raise StorageError(
                    f"{self.url}{'/' if key else ''}{key}: the object store failed {attempt} times "
                    f"({_reason(failure)}); run the same command again once it answers"
                ) from failure
            time.sleep(_pauses.uniform(0, min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (attempt - 1))))

    def _refuse(self, error: Exception) -> None:
        """Raise what trying again can't mend. Names the kind of error only: messages may hold keys."""
        shown = f"storage={self.url!r}"
        names = {type(each).__name__ for each in _causes(error)}
        if names & set(NO_CREDENTIALS):
            how = {"s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or a role"}
            ways = how.get(self._scheme, "GOOGLE_APPLICATION_CREDENTIALS, or log in with gcloud")
            raise InputError(f"{shown}: no usable credentials ({_reason(error)}); set {ways}") from error
        if isinstance(error, PermissionError) or _code(error) in ("AccessDenied", "403", "401"):
            raise InputError(
                f"{shown}: access refused ({_reason(error)}); expected leave to list, read, write and delete below it; "
                "check the credentials and the bucket's policy"
            ) from error
        if "ParamValidationError" in names or _code(error) == "InvalidBucketName":
            raise InputError(f"{shown}: is no valid bucket name; correct storage=...") from error


class _Ranges(io.RawIOBase):
    """An object as a file of which parts are read."""

    def __init__(self, store: ObjectStore, key: str, size: int) -> None:
        self._store, self._key, self._size, self._place = store, key, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        return self._place

    def readinto(self, buffer: Any) -> int:
        data = self._store.read_range(self._key, self._place, min(self._size, self._place + len(buffer)))
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)


@lru_cache(maxsize=16)
def _filesystem(scheme: str, purpose: Purpose) -> Any:
    """The fsspec file system of a scheme, made once per process and purpose. It caches no listing.

    Raises:
        InputError: its package is not installed.
    """
    package, extra = SCHEMES[scheme]
    if find_spec(package) is None:
        raise InputError(f"storage={scheme}://…: needs the package {package}; run `pip install 'prism-ray[{extra}]'`")
    import fsspec
    import fsspec.config

    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if scheme == "s3":
        set_by_user = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
        # Parts of a large object are tried again one by one, by botocore; whole calls by us, after shorter pauses.
        tries = {"mode": "standard", "total_max_attempts": 4 if purpose is Purpose.large else 1}
        timeouts = TIMEOUTS_OF_PROBE_S if purpose is Purpose.probe else TIMEOUTS_S
        options["config_kwargs"] = {"retries": tries, **timeouts, **set_by_user}
    fs = fsspec.filesystem(scheme, **options)
    if scheme == "s3":
        fs.retries = 1
        fs.connect()  # reads botocore's tables, which must not count as waiting for the store
    return fs


def _checked(key: str) -> str:
    if not key or any(part in ("", ".", "..") for part in key.split("/")):
        raise InputError(f"storage key {key!r}: leaves the run folder or is empty; expected a plain relative name")
    return key


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _tag(info: Mapping[str, Any]) -> str | None:
    """What changes with an object's content, as a listing tells it; None where it doesn't."""
    return next((f"{info[name]} {info['size']}" for name in ("ETag", "etag", "md5Hash") if info.get(name)), None)


def _code(error: BaseException) -> str:
    """What an S3 store calls the error, empty where it didn't say."""
    for each in _causes(error):
        response = getattr(each, "response", None)
        if isinstance(response, Mapping):
            return str(response.get("Error", {}).get("Code", ""))
    return ""


def _reason(error: BaseException) -> str:
    """An error's kind in a word or two; never its message, which may hold addresses with keys."""
    code = _code(error)
    if code:
        return code
    innermost = list(_causes(error))[-1]
    number = getattr(innermost, "errno", None)
    return os.strerror(number) if isinstance(number, int) and number > 0 else type(innermost).__name__
