"""Parquet files in the Hugging Face conventions, on any fsspec URL: an image column, and labels with class names.

<path>/train*.parquet and <path>/test*|validation*.parquet (or both in <path>/data/), one file, or a pattern with *
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prism_ray.config import DatasetConfig
from prism_ray.data.files import Entry, file_entry, files_fingerprint, list_folder, open_location
from prism_ray.data.pixels import MAX_BYTES, decode, too_many_bytes
from prism_ray.data.records import RealImage, Split, held_out_description, held_out_rows
from prism_ray.documents import fits, parse_json
from prism_ray.errors import InputError, one_line

TEST_PREFIXES = ("test", "validation", "val")
SAMPLE = 8  # rows that a check decodes
BATCH = 64  # rows read at once
MAX_GROUP_BYTES = 2**32  # of a row group, unpacked
MAX_BATCH_BYTES = 2**28


class HfParquet:
    """Rows in the order of the sorted file names. Without a test file, a test split is held out by class."""

    def __init__(self, dataset: DatasetConfig) -> None:
        self._dataset = dataset
        self._path = str(dataset.path)
        self._split = {"fraction": dataset.test_fraction, "seed": dataset.split_seed}
        self._fs, root = open_location(dataset.path, source="parquet")
        self._files = self._find_files(root)
        self.class_names = self._read_class_names(self._files["train"][0])

    def check(self) -> None:
        for files in self._files.values():
            for class_id, name, data in islice(self._rows(files[:1]), SAMPLE):
                self._check_label(class_id, name)
                decode(self._image_bytes(data, name), name)

    def fingerprint(self) -> str:
        return files_fingerprint((file.name, file) for files in self._files.values() for file in files)

    def split_description(self) -> dict[str, Any]:
        if "test" not in self._files:
            return held_out_description(**self._split)
        return {"kind": "files"} | {split: [file.name for file in files] for split, files in self._files.items()}

    def images(self, split: Split) -> Iterator[RealImage]:
        rows = self._rows(self._files.get(split, self._files["train"]))
        for row, (class_id, name, data) in enumerate(rows):
            if "test" not in self._files and self._is_test[row] != (split == "test"):
                continue
            yield RealImage(
                self._check_label(class_id, name), name, partial(decode, self._image_bytes(data, name), name)
            )

    @cached_property
    def _is_test(self) -> np.ndarray:
        """Held-out rows of the train files, from a scan of their labels alone."""
        column = self._dataset.label_column
        labels: list[np.ndarray] = []
        for file in self._files["train"]:
            with self._open(file) as parquet:
                labels += [
                    batch.column(0).cast(pa.int64()).fill_null(-1).to_numpy()
                    for batch in parquet.iter_batches(batch_size=65_536, columns=[column])
                ]
        return held_out_rows(np.concatenate(labels), **self._split)

    def _find_files(self, root: str) -> dict[Split, list[Entry]]:
        """Files of each split, sorted by name; no "test" entry where one is to be held out."""
        if root.endswith(".parquet"):
            if "*" not in root:
                return self._by_split([file_entry(self._fs, root, shown=self._path)], any_name=True)
            found = [file_entry(self._fs, str(path), shown=self._path) for path in sorted(self._fs.glob(root))]
            return self._by_split(found, any_name=True)
        entries = list_folder(self._fs, root, shown=self._path)
        if not any(entry.name.endswith(".parquet") for entry in entries):
            nested = [entry for entry in entries if entry.is_dir and entry.name == "data"]
            entries = list_folder(self._fs, nested[0].path, shown=f"{self._path}/data") if nested else []
        return self._by_split([e for e in entries if not e.is_dir and e.name.endswith(".parquet")], any_name=False)

    def _by_split(self, files: list[Entry], *, any_name: bool) -> dict[Split, list[Entry]]:
        """`any_name`: files that were asked for by name or pattern need no split in their names."""
        if not files:
            raise InputError(
                f"dataset.path={self._path!r}: no parquet files; expected train*.parquet and test*.parquet or "
                "validation*.parquet; check the path"
            )
        files = sorted(files, key=lambda file: file.name)
        tests = [[file for file in files if file.name.startswith(prefix)] for prefix in TEST_PREFIXES]
        train = [file for file in files if file.name.startswith("train")]
        if not train and any_name and not any(tests):
            train = files
        if not train:
            raise InputError(
                f"dataset.path={self._path!r}: no train*.parquet among {', '.join(f.name for f in files[:3])}"
                f"{', ...' if len(files) > 3 else ''}; rename the files, or give a pattern such as "
                f"{self._path.rstrip('/')}/*.parquet"
            )
        for candidates in filter(None, tests):
            if self._is_labelled(candidates[0]):
                return {"train": train, "test": candidates}
        return {"train": train}

    def _is_labelled(self, file: Entry) -> bool:
        """False where every label of the first rows is -1, the convention for test labels that are not public."""
        with self._open(file) as parquet:
            self._check_columns(parquet.schema_arrow, file)
            batch = next(parquet.iter_batches(batch_size=BATCH, columns=[self._dataset.label_column]), None)
        return batch is None or any(label != -1 for label in batch.column(0).to_pylist())

    @contextmanager
    def _open(self, file: Entry) -> Iterator[pq.ParquetFile]:
        try:
            with self._fs.open(file.path, "rb") as stream, pq.ParquetFile(stream) as parquet:
                yield parquet
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"dataset.path={self._path!r}: {file.name} cannot be read as parquet ({one_line(error)}); replace it"
            ) from error

    def _check_columns(self, table_schema: pa.Schema, file: Entry) -> None:
        """Refuse a file without the two columns, or with types no image or class id can be read from."""
        image_type = self._column_type(table_schema, file, key="image_column", column=self._dataset.image_column)
        label_type = self._column_type(table_schema, file, key="label_column", column=self._dataset.label_column)
        is_struct = pa.types.is_struct(image_type) and image_type.get_field_index("bytes") >= 0
        if not _is_binary(image_type.field("bytes").type if is_struct else image_type):
            raise InputError(
                f"dataset.image_column={self._dataset.image_column!r}: has the type {image_type} in {file.name}; "
                "expected encoded images as binary or struct<bytes, path>; save the data set with the images embedded"
            )
        if not pa.types.is_integer(label_type):
            raise InputError(
                f"dataset.label_column={self._dataset.label_column!r}: has the type {label_type} in {file.name}; "
                "expected integers with class names; cast the column to datasets.ClassLabel and save again"
            )

    def _column_type(self, table_schema: pa.Schema, file: Entry, *, key: str, column: str) -> pa.DataType:
        if table_schema.names.count(column) != 1:
            raise InputError(
                f"dataset.{key}={column!r}: not one column of {file.name}; it has {', '.join(table_schema.names)}; "
                f"set dataset.{key} to one of them"
            )
        data_type = table_schema.field(column).type
        if isinstance(data_type, pa.BaseExtensionType):
            raise InputError(
                f"dataset.{key}={column!r}: has the extension type {data_type} in {file.name}; expected plain storage; "
                "cast the column to its storage type and save again"
            )
        return data_type

    def _read_class_names(self, file: Entry) -> list[str]:
        with self._open(file) as parquet:
            table_schema = parquet.schema_arrow
        self._check_columns(table_schema, file)
        names = _class_names(table_schema, self._dataset.label_column)
        if names is None:
            raise InputError(
                f"dataset.label_column={self._dataset.label_column!r}: {file.name} carries no class names; expected a "
                "ClassLabel in its Hugging Face metadata; cast the column to datasets.ClassLabel and save again"
            )
        return names

    def _rows(self, files: list[Entry]) -> Iterator[tuple[int | None, str, dict[str, Any] | bytes | None]]:
        """(class id, row's name, image cell) of every row; each file's columns and class names are checked first."""
        image, label = self._dataset.image_column, self._dataset.label_column
        for file in files:
            with self._open(file) as parquet:
                self._check_columns(parquet.schema_arrow, file)
                names = _class_names(parquet.schema_arrow, label)
                if names is not None and names != self.class_names:
                    raise InputError(
                        f"dataset.path={self._path!r}: {file.name} has other class names than "
                        f"{self._files['train'][0].name}; expected the same in every file; save the data set again"
                    )
                row = 0
                for batch in parquet.iter_batches(batch_size=self._batch_rows(parquet, file), columns=[image, label]):
                    cells, labels = batch.column(image), batch.column(label).to_pylist()
                    for cell, class_id in zip(cells, labels, strict=True):
                        yield class_id, f"{file.name.removesuffix('.parquet')}:{row:06d}", cell.as_py()
                        row += 1

    def _batch_rows(self, parquet: pq.ParquetFile, file: Entry) -> int:
        """How many rows fit into memory, whatever they hold: a dictionary repeats a value for a few bits a row.

        A file of one kilobyte can so hold a million images of four megabytes. What a row group says of its own size is
        believed here; Arrow itself refuses pages of more than 2 GiB.
        """
        # Of row groups alone: Arrow ends the process when asked for the columns of some damaged ones.
        sizes = [parquet.metadata.row_group(group).total_byte_size for group in range(parquet.num_row_groups)]
        largest = max(sizes, default=0)
        if min(sizes, default=0) < 0 or largest > MAX_GROUP_BYTES:
            raise InputError(
                f"dataset.path={self._path!r}: {file.name} has a row group of {largest} bytes; expected at most "
                f"{MAX_GROUP_BYTES}; save it with smaller row groups"
            )
        return max(1, min(BATCH, MAX_BATCH_BYTES // max(1, largest)))

    def _check_label(self, class_id: int | None, name: str) -> int:
        if class_id is None or not 0 <= class_id < len(self.class_names):
            raise InputError(
                f"dataset.label_column={self._dataset.label_column!r}: row {name} has the label {class_id}; "
                f"expected 0 to {len(self.class_names) - 1}; remove the row or complete the class names"
            )
        return class_id

    def _image_bytes(self, cell: dict[str, Any] | bytes | None, name: str) -> bytes:
        data = cell["bytes"] if isinstance(cell, dict) else cell
        if data is None:
            raise InputError(
                f"dataset.image_column={self._dataset.image_column!r}: row {name} has no image bytes; expected encoded "
                "images inside the file; save the data set with the images embedded"
            )
        if len(data) > MAX_BYTES:
            raise too_many_bytes(name, len(data))
        return data


def _class_names(table_schema: pa.Schema, column: str) -> list[str] | None:
    """Class names of a column in the Hugging Face metadata, None where there are none or they make no sense."""
    try:
        names = parse_json((table_schema.metadata or {})[b"huggingface"])["info"]["features"][column]["names"]
    except (LookupError, TypeError, ValueError):
        return None
    return names if fits(names, list[str]) else None


def _is_binary(data_type: pa.DataType) -> bool:
    return pa.types.is_binary(data_type) or pa.types.is_large_binary(data_type)
