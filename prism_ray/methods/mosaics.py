"""Images put together from crops of real ones: which crops are tried, how a judge sees one, how tiles become an image.

Shapes: N images, B crops, C channels, S x S pixels. Boxes are (top, left, height, width) in pixels.
Source: Sun et al. 2024 (RDED, arXiv:2312.03526) and its released program: square crops of 8 to 100 % of the area,
resized (bilinear, antialiased) to one tile, judged in the middle of an otherwise empty image.
Deviations: crops come from a counter-based stream, an image's from its own key; what is empty has the data set's mean
colour, where the program takes the judge's (the same for a teacher trained here); a tile that is a pixel larger than
others is resized from the crop itself, not from the smaller tile.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from prism_ray.methods.views import philox4x32

CROP_AREA_MIN = 0.08

Box = tuple[int, int, int, int]


def draw_crops(keys: NDArray[np.int64], num_crops: int, *, size: int) -> NDArray[np.int64]:
    """Square boxes (N, num_crops, 4) inside images of `size` pixels; those of an image follow from its key alone.

    The first crops of an image are the same for every `num_crops`.

    Args:
        keys: (N,), at least 0.
    """
    words = np.repeat(keys.astype(np.uint64), num_crops)
    counter = np.zeros((4, len(words)), dtype=np.uint64)
    counter[0] = np.tile(np.arange(num_crops, dtype=np.uint64), len(keys))
    key = np.stack([words & np.uint64(0xFFFFFFFF), words >> np.uint64(32)])
    area, top, left, _ = philox4x32(counter, key) * 2.0**-32
    side = np.rint(size * np.sqrt(CROP_AREA_MIN + (1 - CROP_AREA_MIN) * area)).clip(1, size).astype(np.int64)
    start = [(place * (size - side + 1)).astype(np.int64) for place in (top, left)]
    return np.stack([*start, side, side], axis=1).reshape(len(keys), num_crops, 4)


def cells(size: int, tiles: int) -> list[Box]:
    """Boxes of the `tiles` x `tiles` tiles of an image, row by row; the first are a pixel larger where need be."""
    if not 1 <= tiles <= size:
        raise ValueError(f"{tiles} tiles along {size} pixels; expected 1 to {size}")
    lengths = [size // tiles + (n < size % tiles) for n in range(tiles)]
    starts = [sum(lengths[:n]) for n in range(tiles)]
    spans = list(zip(starts, lengths, strict=True))
    return [(top, left, height, width) for top, height in spans for left, width in spans]


def cut(image: Tensor, box: Sequence[int], *, height: int, width: int) -> Tensor:
    """A box of an image (C, S, S) as (C, height, width); as it is where it has that size already."""
    top, left, box_height, box_width = box
    crop = image[:, top : top + box_height, left : left + box_width]
    if (box_height, box_width) == (height, width):
        return crop
    return functional.interpolate(
        crop[None], size=(height, width), mode="bilinear", align_corners=False, antialias=True
    )[0]


def padded(crops: Tensor, *, size: int, fill: Tensor) -> Tensor:
    """Crops (B, C, s, s) in the middle of images (B, C, size, size) of one colour `fill` (C,)."""
    start = (size - crops.shape[-1]) // 2
    images = fill.to(crops).reshape(1, -1, 1, 1).repeat(len(crops), 1, size, size)
    images[:, :, start : start + crops.shape[-2], start : start + crops.shape[-1]] = crops
    return images


def compose(images: Sequence[Tensor], boxes: Sequence[Sequence[int]]) -> Tensor:
    """One image (C, S, S) whose tiles, row by row, are a box of each of t*t images (C, S, S)."""
    tiles = round(len(images) ** 0.5)
    if tiles**2 != len(images) or len(boxes) != len(images):
        raise ValueError(f"{len(images)} images and {len(boxes)} boxes; expected a square number of both")
    composed = torch.empty_like(images[0])
    for image, box, cell in zip(images, boxes, cells(composed.shape[-1], tiles), strict=True):
        top, left, height, width = cell
        composed[:, top : top + height, left : left + width] = cut(image, box, height=height, width=width)
    return composed
