"""The report's pictures: for every class a row of real images and a row of each run, as data URIs.

Bounded in number and in bytes, so that a report over a thousand classes still opens: first the images of each row
are limited, then the classes.
"""

import base64
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

from prism_ray.errors import InputError
from prism_ray.report.comparison import one_per_image_set
from prism_ray.report.contents import RunSummary
from prism_ray.storage import open_store

IMAGES_PER_ROW = 10
MAX_CLASSES = 100
MAX_IMAGES = 1500
MAX_BYTES = 4_000_000  # of the gallery's HTML
MAX_SIDE = 128  # pixels; larger images are reduced, smaller ones are shown as stored
MARKUP_BYTES = 160  # of an image besides its data


@dataclass(frozen=True)
class Picture:
    uri: str  # data:image/png;base64,...
    index: int  # k of its class
    energy: float | None = None  # None where no teacher's steered it
    prompt: str | None = None


@dataclass(frozen=True)
class GalleryRow:
    label: str  # "real" or the run's
    pictures: list[Picture]


@dataclass(frozen=True)
class GalleryClass:
    name: str
    rows: list[GalleryRow]


@dataclass(frozen=True)
class Gallery:
    classes: list[GalleryClass]
    num_classes: int  # of the data set, shown or not
    images_per_row: int  # at most
    is_reduced: bool  # whether stored images are larger than MAX_SIDE


def build_gallery(summaries: Sequence[RunSummary], *, max_bytes: int = MAX_BYTES) -> Gallery:
    """The pictures of runs on one data set; a run or the real data without any shard has no row.

    Raises:
        InputError: a shard is missing or damaged.
    """
    dataset = summaries[0].dataset
    real = next((summary.real_images for summary in summaries if summary.real_images), [])
    sources = [("real", real), *((summary.label, summary.shards) for summary in one_per_image_set(summaries))]
    sources = [(label, paths) for label, paths in sources if paths]
    class_ids = (dataset.class_ids or list(range(len(dataset.class_names))))[:MAX_CLASSES]
    num_shown = len(class_ids)
    per_row = max(1, min(IMAGES_PER_ROW, MAX_IMAGES // max(1, num_shown * len(sources))))

    rows: list[list[GalleryRow]] = [[] for _ in range(num_shown)]
    for label, paths in sources:
        for place, pictures in enumerate(_pictures(paths, class_ids, per_class=per_row)):
            rows[place].append(GalleryRow(label, pictures))
    names = [dataset.class_names[class_id] for class_id in class_ids]
    num_shown, per_row = _fitting(rows, per_row, max_bytes)
    classes = [
        GalleryClass(name, [GalleryRow(row.label, row.pictures[:per_row]) for row in class_rows])
        for name, class_rows in zip(names[:num_shown], rows[:num_shown], strict=True)
    ]
    return Gallery(classes, dataset.num_chosen, per_row, dataset.image_size > MAX_SIDE)


def _pictures(paths: Sequence[str], class_ids: Sequence[int], *, per_class: int) -> list[list[Picture]]:
    pictures: dict[int, list[Picture]] = {class_id: [] for class_id in class_ids}
    for image in first_images(paths, class_ids, per_class=per_class):
        data = base64.b64encode(_thumbnail(image.png)).decode("ascii")
        uri = f"data:image/png;base64,{data}"
        pictures[image.class_id].append(Picture(uri, image.index, image.energy, image.prompt))
    return list(pictures.values())


@dataclass(frozen=True)
class StoredImage:
    class_id: int
    index: int  # k of its class
    png: bytes
    energy: float | None
    prompt: str | None


def first_images(paths: Sequence[str], wanted: Sequence[int], *, per_class: int) -> list[StoredImage]:
    """The first images of each of the `wanted` class ids, class by class.

    "First" is by `index_in_class` where the table has it, else by the order of files and rows. Only the row groups that
    hold a chosen image are read.
    """
    class_ids, indices, files, rows = _image_index(paths)
    order = np.lexsort((indices, class_ids))
    starts, ends = (np.searchsorted(class_ids[order], wanted, side=side) for side in ("left", "right"))
    bounds = zip(starts, ends, strict=True)
    chosen = np.concatenate([order[start : min(start + per_class, end)] for start, end in bounds])
    images: dict[int, _Stored] = {}
    for file in np.unique(files[chosen]):
        of_file = chosen[files[chosen] == file]
        images |= dict(zip(of_file.tolist(), _read_images(paths[int(file)], rows[of_file]), strict=True))
    return [StoredImage(int(class_ids[n]), int(indices[n]), *images[n]) for n in chosen.tolist()]


_Stored = tuple[bytes, float | None, str | None]
"""PNG, energy and prompt of an image."""


def _image_index(paths: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Class id, index in class, file number and row in the file of every image."""
    class_ids, indices, files, rows = [], [], [], []
    for number, path in enumerate(paths):
        with _opened(path) as file:
            table = file.read(columns=[c for c in ("label", "index_in_class") if c in file.schema_arrow.names])
        class_ids.append(table["label"].to_numpy())
        files.append(np.full(table.num_rows, number))
        rows.append(np.arange(table.num_rows))
        if "index_in_class" in table.column_names:
            indices.append(table["index_in_class"].to_numpy())
    labels = np.concatenate(class_ids)
    order_in_class = np.concatenate(indices) if len(indices) == len(paths) else _running_count(labels)
    return labels, order_in_class, np.concatenate(files), np.concatenate(rows)


def _running_count(class_ids: np.ndarray) -> np.ndarray:
    """For each entry, how many earlier entries have the same class."""
    order = np.argsort(class_ids, kind="stable")
    sorted_ids = class_ids[order]
    count = np.empty(len(class_ids), dtype=np.int64)
    count[order] = np.arange(len(class_ids)) - np.searchsorted(sorted_ids, sorted_ids)
    return count


def _read_images(path: str, rows: np.ndarray) -> list[_Stored]:
    """Some rows of a shard, in the order asked for; real images have neither energy nor prompt."""
    with _opened(path) as file:
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        found: dict[int, _Stored] = {}
        columns = [name for name in ("image", "energy", "prompt") if name in file.schema_arrow.names]
        for group in range(len(sizes)):
            wanted = rows[(rows >= starts[group]) & (rows < starts[group + 1])]
            if len(wanted):
                stored = file.read_row_group(group, columns=columns).take(wanted - starts[group]).to_pylist()
                for row, entry in zip(wanted.tolist(), stored, strict=True):
                    found[row] = (entry["image"]["bytes"], entry.get("energy"), entry.get("prompt"))
    return [found[row] for row in rows.tolist()]


@contextmanager
def _opened(path: str) -> Iterator[pq.ParquetFile]:
    """A shard of any storage, closed at the end."""
    folder, _, name = path.rpartition("/")
    try:
        with open_store(folder or ".").open(name) as source:
            yield pq.ParquetFile(source)
    except FileNotFoundError as error:
        raise InputError(f"{path}: the shard is missing; run `prism-ray verify repair=true` on its run") from error
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: the shard is damaged; run `prism-ray verify repair=true` on its run") from error


def _thumbnail(png: bytes) -> bytes:
    """The image as stored, or reduced to MAX_SIDE."""
    try:
        with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
            if max(image.size) <= MAX_SIDE:
                return png
            image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
            sink = io.BytesIO()
            image.save(sink, "PNG", optimize=True)
            return sink.getvalue()
    except UnidentifiedImageError as error:
        raise InputError(
            "report: a shard has an image that is not a PNG; run `prism-ray verify repair=true`"
        ) from error


def _fitting(rows: Sequence[Sequence[GalleryRow]], per_row: int, max_bytes: int) -> tuple[int, int]:
    """How many classes and how many images of each row fit: all classes with one image first, then more images."""
    if not rows:
        return 0, per_row
    # sizes: (classes, images of a row), summed over the rows of a class
    sizes = np.zeros((len(rows), per_row), dtype=np.int64)
    for class_id, class_rows in enumerate(rows):
        for row in class_rows:
            for k, picture in enumerate(row.pictures):
                sizes[class_id, k] += len(picture.uri) + MARKUP_BYTES
    num_classes = max(1, int(np.searchsorted(np.cumsum(sizes[:, 0]), max_bytes, side="right")))
    columns = np.cumsum(sizes[:num_classes].sum(axis=0))
    return num_classes, max(1, int(np.searchsorted(columns, max_bytes, side="right")))
