"""Fashion-MNIST from its four gzipped IDX files, in a folder or at any URL.

Source: Xiao, Rasul and Vollgraf 2017, arXiv 1708.07747; its split into train and t10k is kept. The files of any other
set in the same format and naming with ten classes would be read too, under Fashion-MNIST's class names.
"""

import gzip
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from PIL import Image

from prism_ray.config import DatasetConfig
from prism_ray.data.files import file_entry, files_fingerprint, open_location
from prism_ray.data.pixels import MAX_PIXELS
from prism_ray.data.records import RealImage, Split
from prism_ray.errors import InputError, one_line

CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
DEBIAN_FOLDER = "/usr/share/datasets/fashion-mnist"
URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
PREFIXES: dict[Split, str] = {"train": "train", "test": "t10k"}
IMAGES, LABELS = "images-idx3-ubyte.gz", "labels-idx1-ubyte.gz"
FILES = [f"{prefix}-{kind}" for prefix in PREFIXES.values() for kind in (IMAGES, LABELS)]
WAY_OUT = (
    "install the Debian package dataset-fashion-mnist, or set dataset.path to a folder with "
    f"{', '.join(FILES)} from {URL}"
)
MAX_IMAGES = 10_000_000  # a header can announce 2**32, and a few megabytes of gzip hold as many labels
IMAGES_MAGIC, LABELS_MAGIC = 0x00000803, 0x00000801  # unsigned bytes in three dimensions, in one


class FashionMnist:
    """The canonical split; source order is the files'. Images are read one after the other, never all at once."""

    def __init__(self, dataset: DatasetConfig) -> None:
        path = dataset.path
        if path is None:
            if not Path(DEBIAN_FOLDER).is_dir():
                raise InputError(f"dataset.path=null: {DEBIAN_FOLDER} does not exist; {WAY_OUT}")
            path = DEBIAN_FOLDER
        self.class_names: list[str] = list(CLASS_NAMES)
        self._path = path
        self._fs, self._root = open_location(path, source="fashion_mnist")
        missing = [name for name in FILES if not self._fs.exists(f"{self._root}/{name}")]
        if missing:
            raise InputError(f"dataset.path={path!r}: lacks {', '.join(missing)}; {WAY_OUT}")

    def check(self) -> None:
        for split in PREFIXES:
            with self._open(split, IMAGES) as images, self._open(split, LABELS) as labels:
                self._read_headers(images, labels, split=split)

    def fingerprint(self) -> str:
        entries = [(name, file_entry(self._fs, f"{self._root}/{name}", shown=name)) for name in FILES]
        # A gzip file ends with the CRC-32 and length of its content: eight bytes that tell equal sizes apart.
        tails = [self._fs.tail(entry.path, size=8).hex() for _, entry in entries]
        return files_fingerprint(
            (f"{name} {tail}", entry._replace(tag="")) for (name, entry), tail in zip(entries, tails, strict=True)
        )

    def split_description(self) -> dict[str, Any]:
        return {"kind": "canonical", "train": "train", "test": "t10k"}

    def images(self, split: Split) -> Iterator[RealImage]:
        with self._open(split, IMAGES) as images, self._open(split, LABELS) as labels:
            count, rows, columns = self._read_headers(images, labels, split=split)
            class_ids = np.frombuffer(self._read(labels, count, split, LABELS), dtype=np.uint8)
            self._expect_end(labels, split, LABELS)
            if count and class_ids.max() >= len(CLASS_NAMES):
                raise self._damaged(split, LABELS, f"holds the label {class_ids.max()}; expected 0 to 9")
            for index, class_id in enumerate(class_ids.tolist()):
                data = self._read(images, rows * columns, split, IMAGES)
                pixels = np.frombuffer(data, dtype=np.uint8).reshape(rows, columns)
                yield RealImage(class_id, f"{index:05d}", partial(Image.fromarray, pixels))
            self._expect_end(images, split, IMAGES)

    def _read_headers(self, images: BinaryIO, labels: BinaryIO, *, split: Split) -> tuple[int, int, int]:
        """(images, rows, columns) after checking that both files are what their names say and belong together."""
        magic, count, rows, columns = struct.unpack(">4I", self._read(images, 16, split, IMAGES))
        if magic != IMAGES_MAGIC:
            raise self._damaged(
                split, IMAGES, f"starts with {magic:#010x}; expected the IDX magic {IMAGES_MAGIC:#010x}"
            )
        if count > MAX_IMAGES:
            raise self._damaged(split, IMAGES, f"says it holds {count} images; expected at most {MAX_IMAGES}")
        if not 0 < rows * columns <= MAX_PIXELS:
            raise self._damaged(split, IMAGES, f"says images have {rows} x {columns} pixels")
        magic, num_labels = struct.unpack(">2I", self._read(labels, 8, split, LABELS))
        if magic != LABELS_MAGIC:
            raise self._damaged(
                split, LABELS, f"starts with {magic:#010x}; expected the IDX magic {LABELS_MAGIC:#010x}"
            )
        if num_labels != count:
            raise self._damaged(split, LABELS, f"says {num_labels} labels for {count} images")
        return count, rows, columns

    @contextmanager
    def _open(self, split: Split, kind: str) -> Iterator[BinaryIO]:
        with (
            self._fs.open(f"{self._root}/{PREFIXES[split]}-{kind}", "rb") as compressed,
            gzip.GzipFile(fileobj=compressed) as stream,
        ):
            yield cast(BinaryIO, stream)

    def _read(self, stream: BinaryIO, size_bytes: int, split: Split, kind: str) -> bytes:
        try:
            data = stream.read(size_bytes)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise self._damaged(split, kind, f"is no complete gzip file ({one_line(error)})") from error
        if len(data) != size_bytes:
            raise self._damaged(split, kind, "ends before the last of the entries its header announces")
        return data

    def _expect_end(self, stream: BinaryIO, split: Split, kind: str) -> None:
        """Nothing may follow; looking also makes gzip compare its checksum."""
        try:
            rest = stream.read(1)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise self._damaged(split, kind, f"is no complete gzip file ({one_line(error)})") from error
        if rest:
            raise self._damaged(split, kind, "goes on after the last of the entries its header announces")

    def _damaged(self, split: Split, kind: str, what: str) -> InputError:
        return InputError(f"dataset.path={self._path!r}: {PREFIXES[split]}-{kind} {what}; replace it, or {WAY_OUT}")
