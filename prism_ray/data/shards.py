"""A split of real images written as deterministic parquet files, in bounded memory.

Reading, decoding and encoding run on a few threads (they wait for storage, or hold no interpreter lock); rows are
written in source order whatever finishes first, so the files are the same for any number of threads.
"""

import hashlib
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from prism_ray import schema
from prism_ray.artifacts import write_durably
from prism_ray.data.pixels import encode_png
from prism_ray.data.records import RealImage, Split

log = logging.getLogger(__name__)

MAX_ROWS = 5_000
MAX_BYTES = 64 * 1024**2  # PNG bytes per file; writing one takes about three times as much memory
MAX_THREADS = 16
BATCH = 16  # images per task: small enough to bound memory, large enough to hide the cost of a task


class EncodedImage(NamedTuple):
    """A row, and what it adds to the statistics of its split."""

    png: bytes
    class_id: int
    image_id: str
    value_sum: np.ndarray  # int64 (C,)
    square_sum: np.ndarray  # int64 (C,)


@dataclass(frozen=True)
class ShardFile:
    """A published file: name within the folder, and what it must contain."""

    name: str
    split: Split
    rows: int
    size_bytes: int
    sha256: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class SplitSummary:
    """Files, class counts and exact pixel sums of a written split."""

    counts: np.ndarray  # int64 (K,)
    value_sum: np.ndarray  # int64 (C,)
    square_sum: np.ndarray  # int64 (C,)
    files: list[ShardFile] = field(default_factory=list)

    def mean_std(self, *, image_size: int) -> tuple[list[float], list[float]]:
        """Mean and biased standard deviation per channel, in [0, 1].

        From integer sums, so exact and independent of order. A standard deviation below one gray level (a channel that
        is constant) counts as one gray level, because everything that normalizes divides by it.
        """
        n = int(self.counts.sum()) * image_size**2
        mean, std = [], []
        for s, q in zip(self.value_sum.tolist(), self.square_sum.tolist(), strict=True):
            mean.append(s / n / 255)
            std.append(max(((n * q - s * s) / n**2) ** 0.5, 1.0) / 255)
        return mean, std


def write_split(
    images: Iterable[RealImage],
    folder: Path,
    *,
    split: Split,
    class_names: list[str],
    channels: int,
    to_pixels: Callable[[RealImage], np.ndarray],
) -> SplitSummary:
    """Write `<split>-00000.parquet`, ... into `folder`; each file complete on disk before the next begins."""
    zeros = np.zeros(channels, dtype=np.int64)
    summary = SplitSummary(np.zeros(len(class_names), dtype=np.int64), zeros.copy(), zeros.copy())
    table_schema = schema.image_schema(schema.REAL_COLUMNS, class_names)
    for rows in _file_loads(_encoded(images, to_pixels)):
        for row in rows:
            summary.counts[row.class_id] += 1
            summary.value_sum += row.value_sum
            summary.square_sum += row.square_sum
        data = schema.table_bytes(_table(rows, table_schema))
        name = f"{split}-{len(summary.files):05d}.parquet"
        write_durably(folder / name, data)
        summary.files.append(ShardFile(name, split, len(rows), len(data), hashlib.sha256(data).hexdigest()))
        log.info("prepared %s rows=%d size_bytes=%d", name, len(rows), len(data))
    return summary


def _encoded(images: Iterable[RealImage], to_pixels: Callable[[RealImage], np.ndarray]) -> Iterator[EncodedImage]:
    """Encode on threads, in order; the first error in source order is the one raised."""

    def encode_batch(batch: list[RealImage]) -> list[EncodedImage]:
        return [_encode(image, to_pixels(image)) for image in batch]

    num_threads = min(MAX_THREADS, (os.cpu_count() or 1) + 2)
    remaining = iter(images)
    pending: deque[Future[list[EncodedImage]]] = deque()
    with ThreadPoolExecutor(num_threads, thread_name_prefix="prepare") as pool:
        try:
            while batch := list(islice(remaining, BATCH)):
                pending.append(pool.submit(encode_batch, batch))
                if len(pending) >= 2 * num_threads:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _encode(image: RealImage, pixels: np.ndarray) -> EncodedImage:
    values = pixels.reshape(pixels.shape[0] * pixels.shape[1], -1).astype(np.int64)
    return EncodedImage(
        encode_png(pixels), image.class_id, image.image_id, values.sum(axis=0), (values * values).sum(axis=0)
    )


def _file_loads(images: Iterator[EncodedImage]) -> Iterator[list[EncodedImage]]:
    """Cut the stream into files: `MAX_ROWS` rows, or fewer once they hold `MAX_BYTES`."""
    rows: list[EncodedImage] = []
    size_bytes = 0
    for image in images:
        rows.append(image)
        size_bytes += len(image.png)
        if len(rows) >= MAX_ROWS or size_bytes >= MAX_BYTES:
            yield rows
            rows, size_bytes = [], 0
    if rows:
        yield rows


def _table(rows: list[EncodedImage], table_schema: pa.Schema) -> pa.Table:
    columns = {
        "image": [{"bytes": row.png, "path": None} for row in rows],
        "label": [row.class_id for row in rows],
        "image_id": [row.image_id for row in rows],
    }
    return pa.table(columns, schema=table_schema)
