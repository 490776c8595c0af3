"""Decoded pixels of a run's images by row: all in memory, or read from a local file and decoded when asked for.

The file is an uncompressed Arrow one of the very PNG bytes, mapped into memory, so that any row costs one read of its
own pages. It is written once per node, shard by shard, whatever the images take together, under a name that hashes the
shards; workers of a node share it, and the last one that closes it deletes it. Both kinds give the same pixels.
"""

import fcntl
import io
import os
import uuid
import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from prism_ray.artifacts import node_folder
from prism_ray.identity import content_hash
from prism_ray.storage import Store, abandoned, storage_errors, sync_path

DECODERS = 4
"""Threads that decode a batch. Workers of a node share its CPUs, and PNG costs little beside a training step."""


class Pixels(Protocol):
    """Images of one size by row."""

    @property
    def image_size(self) -> int:
        """Side of the square images, pixels."""
        ...

    def __len__(self) -> int: ...

    def rows(self, indices: np.ndarray) -> Tensor:
        """Images (B, C, H, W) uint8 of rows (B,), in that order, repeats allowed."""
        ...


class DecodedPixels:
    """All images in memory: uint8 (N, C, H, W)."""

    def __init__(self, images: np.ndarray) -> None:
        self._images = torch.from_numpy(images)

    @property
    def image_size(self) -> int:
        return self._images.shape[-1]

    def __len__(self) -> int:
        return len(self._images)

    def rows(self, indices: np.ndarray) -> Tensor:
        return self._images[torch.from_numpy(np.asarray(indices, dtype=np.int64))]


class MappedPixels:
    """Images in a file that `mapped_pixels` wrote; held open, and shared with other workers of the node."""

    def __init__(self, path: Path) -> None:
        self._source = pa.memory_map(str(path))
        self._chunks = pa.ipc.open_file(self._source).read_all().column(0).chunks
        self._starts = np.cumsum([0, *(len(chunk) for chunk in self._chunks)])
        self._pool = ThreadPoolExecutor(DECODERS, thread_name_prefix="decode")
        self._shape = self._decoded(0).shape

    @property
    def image_size(self) -> int:
        return self._shape[-1]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def rows(self, indices: np.ndarray) -> Tensor:
        indices = np.asarray(indices, dtype=np.int64)
        if indices.size and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"rows {indices.min()} ... {indices.max()}: expected 0 ... {len(self) - 1}")
        images = np.empty((len(indices), *self._shape), dtype=np.uint8)

        def decode(places: np.ndarray) -> None:
            for place in places.tolist():
                images[place] = self._decoded(int(indices[place]))

        for done in [self._pool.submit(decode, part) for part in np.array_split(np.arange(len(indices)), DECODERS)]:
            done.result()
        return torch.from_numpy(images)

    def _decoded(self, row: int) -> np.ndarray:
        chunk = int(np.searchsorted(self._starts, row, side="right")) - 1
        return decode_image(self._chunks[chunk][row - int(self._starts[chunk])].as_buffer())


def decode_image(png: bytes | pa.Buffer) -> np.ndarray:
    """One stored PNG as (C, H, W) uint8."""
    with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
        pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)


def open_pixels(
    store: Store, shards: Mapping[str, str], *, num_images: int, image_bytes: int, in_memory_gb: float
) -> Pixels:
    """Pixels of image shards, in their order: in memory if they fit there, else from a file of this node.

    Args:
        shards: sha256 by key in `store`.
        num_images, image_bytes: how many images they hold, and bytes of each one decoded.
        in_memory_gb: most that may be held in memory, 10^9 bytes.
    """
    if num_images * image_bytes > in_memory_gb * 1e9:
        return mapped_pixels(store, shards)
    decoded = [decode_image(png.as_buffer()) for pngs in _pngs(store, list(shards)) for png in pngs]
    return DecodedPixels(np.stack(decoded))


def mapped_pixels(store: Store, shards: Mapping[str, str], *, folder: Path | None = None) -> MappedPixels:
    """The node's file of these shards, written if it is not there yet.

    Args:
        folder: where the file lies; None for one of this user's in the system's folder for temporary files (TMPDIR).
    """
    folder = node_folder() if folder is None else folder
    path = folder / f"images-{content_hash(list(shards.items()))}.arrow"
    with storage_errors(path):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _remove_abandoned(folder)
        lock = _shared(path.with_suffix(".lock"))
        if not path.exists():
            _write(path, store, list(shards))
    pixels = MappedPixels(path)
    # Also at the end of the process; a killed one leaves the file for the worker that takes its place.
    weakref.finalize(pixels, _release, lock, path)
    return pixels


def _pngs(store: Store, keys: Sequence[str]) -> Iterator[pa.Array]:
    """PNG bytes of image shards, one row group at a time."""
    for key in keys:
        with store.open(key) as source, pq.ParquetFile(source) as file:
            for group in range(file.num_row_groups):
                yield from file.read_row_group(group, columns=["image.bytes"]).flatten().column(0).chunks


def _write(path: Path, store: Store, keys: Sequence[str]) -> None:
    """Publish the file as a whole; of two workers that write it at once, the second replaces the same bytes."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    schema = pa.schema([("png", pa.binary())])
    try:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for pngs in _pngs(store, keys):
                writer.write_batch(pa.record_batch([pngs], schema=schema))
        sync_path(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _shared(path: Path) -> IO[bytes]:
    """An open lock file that this process shares with the other users of what it guards."""
    while True:
        file = open(path, "ab")  # noqa: SIM115 - stays open for as long as the share is held
        fcntl.flock(file, fcntl.LOCK_SH)
        with suppress(FileNotFoundError):
            if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                return file
        file.close()  # deleted by the last user before the lock was ours


def _release(lock: IO[bytes], path: Path) -> None:
    """Give up a share of a file; the last one deletes it. A mapping that is still open stays valid."""
    with lock, suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
        Path(lock.name).unlink(missing_ok=True)


def _remove_abandoned(folder: Path) -> None:
    """Delete what killed workers left and nobody came back for."""
    for path in abandoned(folder, "*"):
        if path.suffix == ".tmp":
            path.unlink(missing_ok=True)
        elif path.suffix == ".arrow":
            _release(_shared(path.with_suffix(".lock")), path)
