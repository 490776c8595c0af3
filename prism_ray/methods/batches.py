"""Which images are optimized together: one image of each class of a chunk, or all images of a few classes.

Cross-class: images of a batch share their slice (their index in the class), hence their teachers and their iteration
budget, so batches are independent units of work. Source: PRISM (arXiv:2511.09905), batch formation of its released
program, which is order "sorted"; "permuted" and "strided" are additions, since consecutive class ids are often related
classes and a poor sample of the statistics of the whole data set.
Class-major: for terms that compare images of one class. Source: released programs of G-VBSM (arXiv:2311.17950) and DELT
(arXiv:2411.19946).
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

ClassOrder = Literal["sorted", "permuted", "strided"]


@dataclass(frozen=True)
class Batch:
    """Images as pairs (class id, index in the class).

    Cross-class: one of each class, ascending, all with index `slice_index`. Class-major: class by class; `slice_index`
    counts the parts that a class is cut into.
    """

    slice_index: int
    chunk_index: int
    images: tuple[tuple[int, int], ...]

    @property
    def class_ids(self) -> tuple[int, ...]:
        """Class of each image."""
        return tuple(class_id for class_id, _ in self.images)


def cross_class_batches(
    num_classes: int, images_per_class: int, *, batch_size: int, order: ClassOrder, seed: int
) -> list[Batch]:
    """Every batch of a data set, slice-major: all chunks of slice 0, then of slice 1, and so on.

    The classes are cut into chunks once, for all slices. "sorted" and "permuted" fill each chunk but the last;
    "strided" takes every n-th class, so that sizes differ by at most one.

    Args:
        num_classes: C; class ids are 0 to C - 1.
        images_per_class: number of slices.
        batch_size: largest number of classes in a batch.
        order: how classes are cut: consecutive ids, consecutive after a permutation, or every n-th id.
        seed: at least 0; of the permutation, unused by the other orders.

    Raises:
        ValueError: a count is below 1, or the order is unknown.
    """
    _check(num_classes=num_classes, images_per_class=images_per_class, batch_size=batch_size)
    chunks = _chunks(num_classes, batch_size, order, seed)
    return [
        Batch(slice_index, chunk_index, tuple((class_id, slice_index) for class_id in class_ids))
        for slice_index in range(images_per_class)
        for chunk_index, class_ids in enumerate(chunks)
    ]


def class_major_batches(
    num_classes: int,
    images_per_class: int,
    *,
    batch_size: int,
    order: ClassOrder,
    seed: int,
    max_classes: int | None = None,
) -> list[Batch]:
    """Every batch of a data set, chunk by chunk: as many whole classes as fit into a batch, at most `max_classes`.

    A class larger than a batch is cut into the fewest parts, of sizes that differ by at most one. Arguments and errors
    are those of `cross_class_batches`, except that `batch_size` counts images.
    """
    _check(num_classes=num_classes, images_per_class=images_per_class, batch_size=batch_size)
    fitting = max(1, batch_size // images_per_class)
    chunks = _chunks(num_classes, fitting if max_classes is None else min(fitting, max_classes), order, seed)
    num_parts = math.ceil(images_per_class / batch_size)
    cuts = [part * images_per_class // num_parts for part in range(num_parts + 1)]
    return [
        Batch(part, chunk_index, tuple((class_id, k) for class_id in class_ids for k in range(first, end)))
        for chunk_index, class_ids in enumerate(chunks)
        for part, (first, end) in enumerate(pairwise(cuts))
    ]


def _check(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name}={count}: not allowed; expected an integer of at least 1")


def _chunks(num_classes: int, batch_size: int, order: ClassOrder, seed: int) -> list[tuple[int, ...]]:
    starts = range(0, num_classes, batch_size)
    if order == "sorted":
        return [tuple(range(start, min(start + batch_size, num_classes))) for start in starts]
    if order == "permuted":
        # Sorting uniform numbers, because numpy promises no stable stream for `Generator.permutation`.
        keys = np.random.Generator(np.random.Philox(key=seed)).random(num_classes)
        permuted = np.argsort(keys, kind="stable").tolist()
        return [tuple(sorted(permuted[start : start + batch_size])) for start in starts]
    if order == "strided":
        return [tuple(range(first, num_classes, len(starts))) for first in range(len(starts))]
    raise ValueError(f"order={order!r}: unknown; known: permuted, sorted, strided")
