"""The real training images, read once from beginning to end in batches that a network takes."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from prism_ray.data.prepared import PreparedDataset

ROWS_PER_READ = 2048
"""Rows decoded at once: 300 MB at 224 pixels, and no row group of 1000 is read much more often than once."""


def real_batches(dataset: PreparedDataset, rows: np.ndarray, *, batch_size: int) -> Iterator[tuple[np.ndarray, Tensor]]:
    """(rows, their pixels (B, C, H, W) uint8) of ascending training rows, in order."""
    at_once = max(1, ROWS_PER_READ // batch_size) * batch_size
    for first in range(0, len(rows), at_once):
        read = rows[first : first + at_once]
        pixels = torch.from_numpy(dataset.images("train", read))
        for n in range(0, len(read), batch_size):
            yield read[n : n + batch_size], pixels[n : n + batch_size]
