"""Files of a source on any fsspec URL: where they are, what they are called, what is in them."""

import hashlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import fsspec
from fsspec.core import url_to_fs

from prism_ray.errors import InputError, PrismError, one_line, printable, shortened


class Entry(NamedTuple):
    """A name in a folder."""

    name: str
    path: str  # in the file system's own form
    is_dir: bool
    size_bytes: int
    tag: str  # entity tag of an object store, empty elsewhere
    is_file: bool = True  # neither a folder, nor a broken link, a pipe or a device


def open_location(path: str | None, *, source: str) -> tuple[Any, str]:
    """The fsspec file system of `dataset.path` and the path within it. Nothing is read.

    Raises:
        InputError: no path, an unknown URL scheme, or a scheme whose package is not installed.
    """
    if not path:
        raise InputError(f"dataset.path={path!r}: empty; source {source!r} needs one; give a folder or URL")
    try:
        fs, root = url_to_fs(path)
    except ImportError as error:
        raise InputError(
            f"dataset.path={path!r}: this URL scheme needs a package that is not installed ({one_line(error)}); "
            "install it, or copy the data to a local folder"
        ) from error
    except OSError as error:  # of an archive that the rest of the address lies in
        raise InputError(f"dataset.path={path!r}: cannot be opened ({one_line(error)}); check dataset.path") from error
    except ValueError as error:
        known = ", ".join(sorted(fsspec.available_protocols()))
        raise InputError(
            f"dataset.path={path!r}: {one_line(error)}; known URL schemes: {known}; use one of them or a local folder"
        ) from error
    # Another process may have written there since this one listed it.
    fs.invalidate_cache()
    return fs, root.rstrip("/") or root


def list_folder(fs: Any, folder: str, *, shown: str) -> list[Entry]:
    """What lies in a folder, sorted by name; hidden names (leading dot) are left out.

    Raises:
        InputError: the folder, called `shown` in the message, is missing, not a folder, or not readable.
    """
    try:
        infos = fs.ls(folder, detail=True)
    except FileNotFoundError as error:
        raise InputError(f"dataset.path: folder {shown!r} does not exist; check dataset.path") from error
    except NotADirectoryError as error:
        raise InputError(f"dataset.path: {shown!r} is a file; expected a folder; check dataset.path") from error
    except PermissionError as error:
        raise InputError(f"dataset.path: folder {shown!r} may not be read; change its permissions") from error
    except Exception as error:  # a client of a network, of a store or of an archive raises its own
        raise _unreadable("folder", shown, error) from error
    entries = [_entry(fs, info) for info in infos]
    for entry in entries:
        if not entry.name.isascii() and entry.name != entry.name.encode(errors="replace").decode():
            raise InputError(
                f"dataset.path: {printable(entry.name)!r} in {shown!r} has a name that is not UTF-8; rename it"
            )
    if [entry.path.strip("/") for entry in entries] == [folder.strip("/")] and not entries[0].is_dir:
        raise InputError(f"dataset.path: {shown!r} is a file; expected a folder; check dataset.path")
    # An object store may list the folder itself as an empty object of the same name.
    inside = [e for e in entries if e.path.strip("/") != folder.strip("/") and not e.name.startswith(".")]
    return sorted(inside, key=lambda entry: entry.name)


def file_entry(fs: Any, path: str, *, shown: str) -> Entry:
    """One file, described.

    Raises:
        InputError: it does not exist or may not be looked at.
    """
    try:
        return _entry(fs, fs.info(path))
    except (FileNotFoundError, PermissionError) as error:
        raise InputError(f"dataset.path: file {shown!r} is missing or may not be read; check dataset.path") from error
    except Exception as error:  # as above
        raise _unreadable("file", shown, error) from error


def read_file(fs: Any, path: str, *, shown: str) -> bytes:
    """The bytes of a file.

    Raises:
        InputError: it vanished or may not be read.
        PrismError: the network or the store failed, which may have passed when the command is run again.
    """
    try:
        return fs.cat_file(path)
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise InputError(
            f"dataset.path: file {shown!r} is missing or may not be read; restore it or its permissions"
        ) from error
    except Exception as error:  # as above
        raise PrismError(
            f"dataset.path: file {shown!r} cannot be read now ({_reason(error)}); run the same command again"
        ) from error


def files_fingerprint(files: Iterable[tuple[str, Entry]]) -> str:
    """16 hex digits over (relative name, size, entity tag), independent of their order."""
    digest = hashlib.blake2b(digest_size=8)
    for line in sorted(repr((name, entry.size_bytes, entry.tag)) for name, entry in files):
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()


def _entry(fs: Any, info: dict[str, Any]) -> Entry:
    path = str(info["name"]).rstrip("/")
    tag = next((str(info[key]) for key in ("ETag", "etag", "md5Hash") if info.get(key)), "")
    # fsspec calls a local symbolic link "other", whatever it points to.
    is_dir = info["type"] == "directory" or (info["type"] == "other" and fs.isdir(path))
    is_file = info["type"] == "file" or (info["type"] == "other" and fs.isfile(path))
    return Entry(path.rsplit("/", 1)[-1], path, is_dir, int(info.get("size") or 0), tag, is_file)


def _unreadable(kind: str, shown: str, error: Exception) -> InputError:
    return InputError(
        f"dataset.path: {kind} {shown!r} cannot be read ({_reason(error)}); check dataset.path, the network and the "
        "store's credentials"
    )


def _reason(error: Exception) -> str:
    strerror = getattr(error, "strerror", None)
    return strerror if isinstance(strerror, str) else f"{type(error).__name__}: {shortened(error)}"
