"""A real data set as one parquet contract, whatever it was made from: prepared once, read by every stage.

    <artifacts>/datasets/<name>-<hash>/
        train-00000.parquet ...  test-00000.parquet ...     `schema.REAL_COLUMNS`, PNG, Hugging Face metadata
        dataset.json                                        written last: names, counts, statistics, checksums

The hash covers the settings that affect the pixels and a fingerprint of the source's files. It is an artifact, see
`prism_ray.artifacts`: complete or absent, and preparing it twice at once is harmless. From an object store a node
copies the files whose pixels it reads; of the others it reads the columns it needs.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prism_ray import schema
from prism_ray.artifacts import (
    damaged_files,
    is_complete,
    join,
    listing_of,
    local_folder,
    publish_built,
    write_durably,
)
from prism_ray.config import DatasetConfig
from prism_ray.data import imagenet_names
from prism_ray.data.pixels import decode_png, fit
from prism_ray.data.records import SPLITS, RealImage, RealSource, Split
from prism_ray.data.shards import ShardFile, SplitSummary, write_split
from prism_ray.data.sources import open_source
from prism_ray.documents import is_plain, parse_json, record
from prism_ray.errors import InputError, PrismError, one_line, shortened
from prism_ray.identity import content_hash, plain, walk
from prism_ray.options import Source
from prism_ray.storage import is_remote, open_store, sha256_of_file

SUMMARY = "dataset.json"
MAX_SIDE = 8192  # pixels; beyond it a damaged file is likelier than such a data set


def check_dataset(dataset: DatasetConfig) -> list[str]:
    """Look at a bounded sample of the source, for at most about two seconds; the full scan belongs to preparing.

    Returns:
        The class names.

    Raises:
        InputError: one line that names the setting, file or class that is wrong and what to do.
    """
    source = open_source(dataset)
    source.check()
    return source.class_names


def prepare_dataset(dataset: DatasetConfig, artifacts_dir: str | Path) -> "PreparedDataset":
    """The prepared data set of these settings and this source, made if it is not there yet.

    Raises:
        InputError: the source is missing, damaged or unusable; names the file, image or class.
    """
    source = open_source(dataset)
    fingerprint = source.fingerprint()
    folder = _folder(dataset, artifacts_dir, fingerprint)
    if not is_complete(folder, marker=SUMMARY):
        source.check()

        def build(building: Path) -> None:
            summary = _write(source, dataset, building) | {"source_fingerprint": fingerprint}
            write_durably(building / SUMMARY, _json_lines(summary))

        publish_built(folder, build, marker=SUMMARY)
    return PreparedDataset.open(folder)


def find_prepared(dataset: DatasetConfig, artifacts_dir: str | Path) -> "PreparedDataset | None":
    """The prepared data set of these settings and this source, None if it was not made yet."""
    folder = _folder(dataset, artifacts_dir, open_source(dataset).fingerprint())
    return PreparedDataset.open(folder) if is_complete(folder, marker=SUMMARY) else None


def class_names_hash(class_names: Sequence[str]) -> str:
    """16 hex digits over class names in order: equal where a classifier and a data set mean the same classes."""
    return content_hash(list(class_names))


@dataclass(frozen=True)
class PreparedDataset:
    """A prepared data set. Opening reads `dataset.json` and file sizes only; tables are read when asked for.

    A data set of class names alone is one without images in either split.
    """

    url: str  # its folder, or its address in an object store
    name: str
    class_names: list[str]
    image_size: int  # pixels
    channels: int
    counts: dict[Split, list[int]]  # images of each class
    mean: list[float]  # of the train split per channel, in [0, 1]; ImageNet's where there are only class names
    std: list[float]
    split: dict[str, Any]  # how the test split came about
    files: list[ShardFile]

    @classmethod
    def open(cls, folder: str | Path) -> "PreparedDataset":
        """Raises `PrismError` if the folder is not a complete prepared data set of a known version."""
        url = str(folder)
        try:
            summary = parse_json((local_folder(url, only=[SUMMARY]) / SUMMARY).read_bytes())
            if summary["version"] > schema.VERSION:
                raise PrismError(
                    f"data set {url!r}: version {summary['version']} is newer than {schema.VERSION}, "
                    "the newest known; update prism_ray"
                )
            facts = record(_Summary, {key: summary[key] for key in (*_SUMMARY_FIELDS, "files")})
            files = [record(ShardFile, file) for file in facts.files]
            dataset = cls(url, files=files, **{key: summary[key] for key in _SUMMARY_FIELDS})
            _check_summary(dataset)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PrismError(
                f"data set {url!r}: not a prepared data set ({one_line(error)}); delete the folder and prepare again"
            ) from error
        sizes = _sizes(url)
        for file in files:
            if sizes.get(file.name) != file.size_bytes:
                raise PrismError(
                    f"data set {url!r}: {file.name} is missing or has the wrong size; "
                    f"expected {file.size_bytes} bytes; delete the folder and prepare again"
                )
        return dataset

    @property
    def folder(self) -> Path:
        """Where its files are in local storage, or this node's copies of those that were used."""
        return local_folder(self.url, only=[SUMMARY])

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @cached_property
    def content_hash(self) -> str:
        """16 hex digits over everything a stage can see: classes, image shape and the bytes of every file."""
        return content_hash(
            {
                "class_names": self.class_names,
                "image_size": self.image_size,
                "channels": self.channels,
                "files": [[file.split, file.sha256] for file in self.files],
            }
        )

    @cached_property
    def class_names_hash(self) -> str:
        """See the function of the same name."""
        return class_names_hash(self.class_names)

    def num_images(self, split: Split) -> int:
        return sum(self.counts[split])

    def addresses(self, split: Split) -> list[str]:
        """The parquet files of a split, in order: paths, or addresses in an object store."""
        folder = join(self.url, listing_of(self.url).version) if is_remote(self.url) else self.url
        return [join(folder, file.name) for file in self.files if file.split == split]

    def labels(self, split: Split) -> np.ndarray:
        """Class ids in source order: int64 (N,)."""
        # Not by pyarrow's own way to numpy, which imports pandas where it is installed: half a second of every command.
        chunks = [np.from_dlpack(chunk) for chunk in self._column(split, "label").chunks]
        return np.concatenate([np.empty(0, np.int64), *chunks])

    def image_ids(self, split: Split) -> list[str]:
        """Names of the images in their source, in source order; unique within the split."""
        return self._column(split, "image_id").to_pylist()

    def rows_by_class(self, split: Split) -> list[np.ndarray]:
        """For every class the rows that hold it, int64 and ascending: entry k of class c is its k-th image."""
        labels = self.labels(split)
        order = np.argsort(labels, kind="stable")
        return np.split(order, np.cumsum(np.bincount(labels, minlength=self.num_classes))[:-1])

    def images(self, split: Split, indices: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """Pixels of rows `indices` in that order (repeats allowed), or of all: uint8 (N, C, H, W).

        Only the row groups that hold a wanted row are read.

        Raises:
            IndexError: an index outside 0 ... N-1.
        """
        num_images = self.num_images(split)
        wanted = np.arange(num_images) if indices is None else np.asarray(indices, dtype=np.int64).reshape(-1)
        if wanted.size and not 0 <= wanted.min() <= wanted.max() < num_images:
            raise IndexError(f"{split} indices {wanted.min()} ... {wanted.max()}: expected 0 ... {num_images - 1}")
        images = np.empty((len(wanted), self.channels, self.image_size, self.image_size), dtype=np.uint8)
        order = np.argsort(wanted, kind="stable")
        ascending = wanted[order]
        for first, pngs in self._png_groups(split, ascending):
            begin, end = np.searchsorted(ascending, [first, first + len(pngs)])
            for position in order[begin:end].tolist():
                row = int(wanted[position])
                images[position] = self._pixels(pngs[row - first].as_py(), split=split, row=row)
        return images

    def verify(self) -> list[str]:
        """Names of the files whose bytes are not those that were written; empty if all is well."""
        if is_remote(self.url):
            return damaged_files(self.url)
        return [file.name for file in self.files if not self._is_whole(file)]

    def _is_whole(self, file: ShardFile) -> bool:
        path = self.folder / file.name
        return path.is_file() and sha256_of_file(path) == file.sha256

    def _path(self, file: ShardFile) -> Path:
        """A file as one of this node."""
        return local_folder(self.url, only=[file.name]) / file.name

    def _column(self, split: Split, name: str) -> pa.ChunkedArray:
        kind = dict(schema.REAL_COLUMNS)[name]
        chunks = [chunk for address in self.addresses(split) for chunk in _read_column(address, name).chunks]
        return pa.chunked_array(chunks, type=kind)

    def _png_groups(self, split: Split, ascending: np.ndarray) -> Iterator[tuple[int, pa.ChunkedArray]]:
        """(first row, PNG bytes) of the row groups that hold one of the given rows; nothing else is read."""

        def holds_any(first: int, rows: int) -> bool:
            begin, end = np.searchsorted(ascending, [first, first + rows])
            return bool(begin < end)

        file_first = 0
        for file in (file for file in self.files if file.split == split):
            if holds_any(file_first, file.rows):
                with _opened(self._path(file)) as parquet:
                    first = file_first
                    for group in range(parquet.num_row_groups):
                        rows = parquet.metadata.row_group(group).num_rows
                        if holds_any(first, rows):
                            table = parquet.read_row_group(group, columns=["image.bytes"]).flatten()
                            if table.num_columns != 1:
                                raise OSError("has no bytes of images")
                            if len(table) != rows:
                                raise OSError(f"holds {len(table)} rows where it says {rows}")
                            yield first, table.column(0)
                        first += rows
            file_first += file.rows

    def _pixels(self, png: bytes, *, split: Split, row: int) -> np.ndarray:
        """PNG bytes to (C, H, W)."""
        try:
            pixels = decode_png(png, shape=(self.image_size, self.image_size, self.channels))
        except (OSError, SyntaxError, ValueError) as error:
            raise PrismError(
                f"data set {self.url!r}: {split} image {row} is damaged ({one_line(error)}); "
                "delete the folder and prepare again"
            ) from error
        return pixels[None] if self.channels == 1 else pixels.transpose(2, 0, 1)


@dataclass(frozen=True)
class _Summary:
    """What `dataset.json` says, of these types; see `PreparedDataset`."""

    name: str
    class_names: list[str]
    image_size: int
    channels: int
    counts: dict[Split, list[int]]
    mean: list[float]
    std: list[float]
    split: dict[str, Any]
    files: list[dict[str, Any]]


def _check_summary(dataset: PreparedDataset) -> None:
    """Refuse numbers at odds with each other, before anything is allocated by them.

    Raises:
        ValueError: names what does not agree.
    """
    if dataset.channels not in (1, 3) or not 1 <= dataset.image_size <= MAX_SIDE:
        raise ValueError(f"images of {dataset.channels} channels and {dataset.image_size} pixels")
    if {len(dataset.mean), len(dataset.std)} != {dataset.channels}:
        raise ValueError("mean and std are not one number per channel")
    for split in SPLITS:
        rows, counts = sum(file.rows for file in dataset.files if file.split == split), dataset.counts[split]
        if len(counts) != dataset.num_classes or min(counts, default=0) < 0 or sum(counts) != rows:
            raise ValueError(f"the {split} split counts other images than its files hold")
    for file in dataset.files:
        if not is_plain(file.name):
            raise ValueError(f"{file.name!r} is no name of a file in it")


_SUMMARY_FIELDS = ("name", "class_names", "image_size", "channels", "counts", "mean", "std", "split")


def _folder(dataset: DatasetConfig, artifacts_dir: str | Path, fingerprint: str) -> str:
    return join(artifacts_dir, "datasets", f"{dataset.name}-{_dataset_hash(dataset, fingerprint)}")


def _sizes(url: str) -> dict[str, int]:
    """Bytes of the files of a data set by name."""
    if is_remote(url):
        return {name: facts["bytes"] for name, facts in listing_of(url).files.items()}
    return {path.name: path.stat().st_size for path in Path(url).iterdir() if path.is_file()}


def _dataset_hash(dataset: DatasetConfig, fingerprint: str) -> str:
    settings = {key: plain(value) for key, value, metadata in walk(dataset) if metadata["output"]}
    return content_hash({"version": schema.VERSION, "settings": settings, "source": fingerprint})


def _write(source: RealSource, dataset: DatasetConfig, folder: Path) -> dict[str, Any]:
    """Write every split into `folder` and describe the result, JSON-ready."""

    def to_pixels(image: RealImage) -> np.ndarray:
        return fit(image.load(), image_size=dataset.image_size, channels=dataset.channels, pad=dataset.pad)

    splits: dict[Split, SplitSummary] = {}
    for split in SPLITS:
        splits[split] = write_split(
            source.images(split),
            folder,
            split=split,
            class_names=source.class_names,
            channels=dataset.channels,
            to_pixels=to_pixels,
        )
        if dataset.source is not Source.imagenet_names:
            _check_counts(splits[split].counts, source.class_names, split=split)
    if dataset.source is Source.imagenet_names:
        mean, std = imagenet_names.MEAN, imagenet_names.STD
    else:
        mean, std = splits["train"].mean_std(image_size=dataset.image_size)
    return {
        "version": schema.VERSION,
        "name": dataset.name,
        "source": dataset.source.name,
        "class_names": source.class_names,
        "image_size": dataset.image_size,
        "channels": dataset.channels,
        "pad": dataset.pad,
        "counts": {split: splits[split].counts.tolist() for split in SPLITS},
        "mean": mean,
        "std": std,
        "split": source.split_description(),
        "files": [file.as_json() for split in SPLITS for file in splits[split].files],
    }


def _check_counts(counts: np.ndarray, class_names: list[str], *, split: Split) -> None:
    if split == "train" and not counts.all():
        empty = [class_names[class_id] for class_id in np.flatnonzero(counts == 0)]
        raise InputError(
            f"dataset: {len(empty)} of {len(class_names)} classes have no training image: {', '.join(empty[:5])}"
            f"{', ...' if len(empty) > 5 else ''}; expected at least one of each; add images or remove the class"
        )
    if not counts.any():
        raise InputError(f"dataset: the {split} split has no image; expected at least one; add images")


def _json_lines(content: dict[str, Any]) -> bytes:
    """A JSON object with one line per key: readable, and not thousands of lines for as many classes."""
    lines = [f"{json.dumps(key)}: {json.dumps(content[key], ensure_ascii=False)}" for key in sorted(content)]
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def _read_column(address: str, name: str) -> pa.ChunkedArray:
    if is_remote(address):
        return _read_remote_column(address, name)
    with _opened(address) as file:
        return _column_of(file, name)


@lru_cache(maxsize=4096)
def _read_remote_column(address: str, name: str) -> pa.ChunkedArray:
    """Read once per process: it never changes, and costs a few requests each time."""
    folder, _, file_name = address.rpartition("/")
    with open_store(folder).open(file_name) as source, _opened(source, shown=address) as file:
        return _column_of(file, name)


def _column_of(file: pq.ParquetFile, name: str) -> pa.ChunkedArray:
    """A column, of the type that it was written with."""
    column, kind = file.read(columns=[name]).column(name), dict(schema.REAL_COLUMNS)[name]
    if column.type != kind:
        raise OSError(f"column {name} is {column.type}, expected {kind}")
    return column


@contextmanager
def _opened(source: Any, *, shown: str | None = None) -> Iterator[pq.ParquetFile]:
    """A file of the data set, by its path or open already and called `shown`.

    Raises:
        PrismError: it is damaged.
    """
    try:
        with pq.ParquetFile(source) as file:
            yield file
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise PrismError(
            f"data set: {shown or source} is damaged ({shortened(error)}); delete its folder and prepare again"
        ) from error
