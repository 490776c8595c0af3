"""Which images are optimized together: cross-class batches, one image of each class of a chunk.

Images of a batch share their slice (their index in the class), hence their teachers and their iteration budget, so
batches are independent units of work. Source: PRISM (arXiv:2511.09905), batch formation of its released program, which
is order "sorted"; "permuted" and "strided" are additions, since consecutive class ids are often related classes and a
poor sample of the statistics of the whole data set.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

ClassOrder = Literal["sorted", "permuted", "strided"]


@dataclass(frozen=True)
class Batch:
    """One image of each class in `class_ids` (ascending), all with index `slice_index` in their class."""

    slice_index: int
    chunk_index: int
    class_ids: tuple[int, ...]


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
    counts = {"num_classes": num_classes, "images_per_class": images_per_class, "batch_size": batch_size}
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name}={count}: not allowed; expected an integer of at least 1")
    chunks = _chunks(num_classes, batch_size, order, seed)
    return [
        Batch(slice_index, chunk_index, class_ids)
        for slice_index in range(images_per_class)
        for chunk_index, class_ids in enumerate(chunks)
    ]


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
