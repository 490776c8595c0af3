"""The report's pictures: for every class a row of real images and a row of each run, as data URIs, with what is known
of where each comes from; below a run's row the real training images that are nearest to its images.

Bounded in number and in bytes, so that a report over a thousand classes still opens: first the images of each row
are limited, then the classes.
"""

import base64
import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

from prism_ray.errors import InputError
from prism_ray.report.comparison import one_per_image_set
from prism_ray.report.contents import RunSummary
from prism_ray.report.format import format_number, format_percent
from prism_ray.storage import open_store

IMAGES_PER_ROW = 10
MAX_CLASSES = 100
MAX_IMAGES = 1500
MAX_BYTES = 4_000_000  # of the gallery's HTML
MAX_SIDE = 128  # pixels; larger images are reduced, smaller ones are shown as stored
MARKUP_BYTES = 220  # of an image besides its data and what is said of it
MAX_TEXT = 300  # characters of a prompt


@dataclass(frozen=True)
class Picture:
    uri: str  # data:image/png;base64,...
    index: int  # k of its class
    origin: str = ""  # where it comes from, in words
    caption: str = ""  # what stands below it: its energy, or its distance


@dataclass(frozen=True)
class GalleryRow:
    label: str  # "real", the run's, or "nearest real"
    pictures: list[Picture]
    kind: str = "run"  # or real, or nearest


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


@dataclass(frozen=True)
class StoredImage:
    class_id: int
    index: int  # k of its class
    png: bytes
    facts: dict[str, Any]  # its other columns, as far as they are there


_Index = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Class id, index in class, file number and row in the file of every image."""


def build_gallery(summaries: Sequence[RunSummary], *, max_bytes: int = MAX_BYTES) -> Gallery:
    """The pictures of runs on one data set; a run or the real data without any shard has no row.

    Raises:
        InputError: a shard is missing or damaged.
    """
    dataset = summaries[0].dataset
    real = next((summary.real_images for summary in summaries if summary.real_images), [])
    runs = [summary for summary in one_per_image_set(summaries) if summary.shards]
    num_rows = bool(real) + len(runs) + sum(_shows_nearest(run, real) for run in runs)
    class_ids = (dataset.class_ids or list(range(len(dataset.class_names))))[:MAX_CLASSES]
    num_shown = len(class_ids)
    per_row = max(1, min(IMAGES_PER_ROW, MAX_IMAGES // max(1, num_shown * num_rows)))

    rows: list[list[GalleryRow]] = [[] for _ in range(num_shown)]

    def add(label: str, kind: str, by_class: Iterable[list[Picture]]) -> None:
        for place, pictures in enumerate(by_class):
            rows[place].append(GalleryRow(label, pictures, kind))

    if real:
        add(
            "real",
            "real",
            [[_picture(i, "real training image") for i in images] for images in _shown(real, class_ids, per_row)],
        )
    for run in runs:
        images = _shown(run.shards, class_ids, per_row)
        nearest = _nearest(run, images, real, dataset.class_names) if _shows_nearest(run, real) else None
        add(run.label, "run", [[_picture(i, _origin(i, dataset.class_names)) for i in of_class] for of_class in images])
        if nearest is not None:
            add("nearest real", "nearest", nearest)
    names = [dataset.class_names[class_id] for class_id in class_ids]
    num_shown, per_row = _fitting(rows, per_row, max_bytes)
    classes = [
        GalleryClass(name, [replace(row, pictures=row.pictures[:per_row]) for row in class_rows])
        for name, class_rows in zip(names[:num_shown], rows[:num_shown], strict=True)
    ]
    return Gallery(classes, dataset.num_chosen, per_row, dataset.image_size > MAX_SIDE)


def _shown(paths: Sequence[str], class_ids: Sequence[int], per_class: int) -> list[list[StoredImage]]:
    """The first images of each class."""
    found: dict[int, list[StoredImage]] = {class_id: [] for class_id in class_ids}
    for image in first_images(paths, class_ids, per_class=per_class):
        found[image.class_id].append(image)
    return list(found.values())


def _picture(image: StoredImage, origin: str, caption: str = "") -> Picture:
    data = base64.b64encode(_thumbnail(image.png)).decode("ascii")
    energy = image.facts.get("energy")
    caption = caption or (format_number(energy, 1) if energy is not None else "")
    return Picture(f"data:image/png;base64,{data}", image.index, origin, caption)


def _origin(image: StoredImage, class_names: Sequence[str]) -> str:
    """Where a run's image comes from, as lines of `what: value`."""
    facts, lines = image.facts, [("image", image.facts.get("image_id")), ("seed", image.facts.get("seed"))]
    lines += [
        ("started from real image", facts.get("source_image_id")),
        ("primary teacher", facts.get("primary_teacher")),
        ("statistics of", ", ".join(facts.get("statistics_teachers") or [])),
        ("energy of", ", ".join(facts.get("energy_teachers") or [])),
        ("energy", None if facts.get("energy") is None else format_number(facts["energy"], 2)),
        ("prompt", (facts.get("prompt") or "")[:MAX_TEXT]),
    ]
    verdict, confidence = facts.get("verifier_class"), facts.get("verifier_confidence")
    if verdict is not None and 0 <= verdict < len(class_names):
        lines.append(("recognized as", f"{class_names[verdict]}; its own class at {format_percent(confidence, 1)} %"))
    return "\n".join(f"{name}: {value}" for name, value in lines if value not in (None, ""))


def _shows_nearest(run: RunSummary, real: Sequence[str]) -> bool:
    """Whether a row of nearest real images says anything: real images are their own."""
    method = run.config.get("method")
    is_real = isinstance(method, dict) and method.get("engine") == "real"
    return run.neighbors is not None and bool(real) and not is_real


def _nearest(
    run: RunSummary, images: Sequence[Sequence[StoredImage]], real: Sequence[str], class_names: Sequence[str]
) -> list[list[Picture]]:
    """For the shown images of each class, the real training images that are nearest to them."""
    assert run.neighbors is not None
    known = {image_id: (row, distance) for image_id, row, distance in run.neighbors.images}
    wanted = [[known.get(image.facts.get("image_id")) for image in of_class] for of_class in images]
    rows = sorted({found[0] for of_class in wanted for found in of_class if found})
    by_row = dict(zip(rows, images_at(real, rows), strict=True))
    return [
        [
            _picture(
                by_row[found[0]],
                f"real training image {by_row[found[0]].facts.get('image_id')}\n"
                f"class: {class_names[by_row[found[0]].class_id]}\n"
                f"nearest to: {image.facts.get('image_id')}\ndistance in features: {found[1]:.3g}",
                f"{found[1]:.2g}",
            )
            for image, found in zip(of_class, places, strict=True)
            if found
        ]
        for of_class, places in zip(images, wanted, strict=True)
    ]


def first_images(paths: Sequence[str], wanted: Sequence[int], *, per_class: int) -> list[StoredImage]:
    """The first images of each of the `wanted` class ids, class by class.

    "First" is by `index_in_class` where the table has it, else by the order of files and rows. Only the row groups that
    hold a chosen image are read.
    """
    index = _image_index(paths)
    class_ids, indices = index[:2]
    order = np.lexsort((indices, class_ids))
    starts, ends = (np.searchsorted(class_ids[order], wanted, side=side) for side in ("left", "right"))
    bounds = zip(starts, ends, strict=True)
    return _stored(paths, index, np.concatenate([order[start : min(start + per_class, end)] for start, end in bounds]))


def images_at(paths: Sequence[str], places: Sequence[int]) -> list[StoredImage]:
    """The images at some places of all rows of the files, in their order.

    Raises:
        InputError: there is no such place.
    """
    index = _image_index(paths)
    if places and not 0 <= min(places) <= max(places) < len(index[0]):
        raise InputError("report: the real images are not those that were measured; run the evaluate stage again")
    return _stored(paths, index, np.array(places, dtype=np.int64))


def _stored(paths: Sequence[str], index: _Index, chosen: np.ndarray) -> list[StoredImage]:
    class_ids, indices, files, rows = index
    images: dict[int, tuple[bytes, dict[str, Any]]] = {}
    for file in np.unique(files[chosen]):
        of_file = chosen[files[chosen] == file]
        images |= dict(zip(of_file.tolist(), _read_images(paths[int(file)], rows[of_file]), strict=True))
    return [StoredImage(int(class_ids[n]), int(indices[n]), *images[n]) for n in chosen.tolist()]


FACTS = (
    *("image_id", "seed", "prompt", "source_image_id", "primary_teacher", "statistics_teachers", "energy_teachers"),
    *("energy", "verifier_class", "verifier_confidence"),
)
"""Columns that tell where an image comes from; real images have the first alone."""


def _image_index(paths: Sequence[str]) -> _Index:
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


def _read_images(path: str, rows: np.ndarray) -> list[tuple[bytes, dict[str, Any]]]:
    """PNG and facts of some rows of a shard, in the order asked for."""
    with _opened(path) as file:
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        found: dict[int, tuple[bytes, dict[str, Any]]] = {}
        columns = [name for name in ("image", *FACTS) if name in file.schema_arrow.names]
        for group in range(len(sizes)):
            wanted = rows[(rows >= starts[group]) & (rows < starts[group + 1])]
            if len(wanted):
                stored = file.read_row_group(group, columns=columns).take(wanted - starts[group]).to_pylist()
                for row, entry in zip(wanted.tolist(), stored, strict=True):
                    found[row] = (entry.pop("image")["bytes"], entry)
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
                sizes[class_id, k] += len(picture.uri) + len(picture.origin) + MARKUP_BYTES
    num_classes = max(1, int(np.searchsorted(np.cumsum(sizes[:, 0]), max_bytes, side="right")))
    columns = np.cumsum(sizes[:num_classes].sum(axis=0))
    return num_classes, max(1, int(np.searchsorted(columns, max_bytes, side="right")))
