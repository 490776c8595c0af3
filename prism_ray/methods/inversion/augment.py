"""The augmentation of one iteration, drawn once and shared by the whole batch: crop, then flip, then cyclic roll.

Shapes: B images, C channels, S x S pixels.
Source: PRISM's and SRe2L's released programs (arXiv:2511.09905, arXiv:2306.13092): RandomResizedCrop (area 0.08 to 1,
ratio 3/4 to 4/3, bilinear), horizontal flip, roll by 0 to 32 pixels per axis. Deviation: draws come from a counter-
based stream, not from global random states, so iteration t is augmented alike whatever runs before it or beside it.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

RATIO_MIN, RATIO_MAX = 3 / 4, 4 / 3
NUM_TRIES = 10
"""Draws of a crop that fits, before the whole image is taken (the largest centre crop of a square one)."""

_NUM_VARIATES = 2 * NUM_TRIES + 5  # per iteration and always drawn: row t of the stream never depends on other rows


@dataclass(frozen=True)
class Augmentations:
    """One augmentation per iteration for images of `size` x `size` pixels. Every array has shape (iterations,)."""

    size: int
    top: NDArray[np.int64]  # first row of the crop
    left: NDArray[np.int64]
    height: NDArray[np.int64]  # of the crop, 1 to size
    width: NDArray[np.int64]
    flip: NDArray[np.bool_]
    roll_y: NDArray[np.int64]  # pixels down, 0 to roll_max; what leaves the image enters on the other side
    roll_x: NDArray[np.int64]  # pixels to the right

    def __len__(self) -> int:
        return len(self.top)


def crop_areas(
    num_iterations: int, *, curriculum: Literal["none", "linear", "cosine"], start: float, end: float, milestone: float
) -> NDArray[np.float64]:
    """Smallest share of the area in the crop of each iteration, (iterations,): from `start` to `end`, then `end`.

    Source: CDA (arXiv:2311.18838), released program: from 1 to 0.08, linearly or along half a cosine.

    Args:
        num_iterations: at least 0.
        curriculum: "none" is `end` throughout.
        start: share at iteration 0, 0 to 1.
        end: likewise, from iteration `milestone * num_iterations` on.
        milestone: share of the iterations, 0 to 1.

    Raises:
        ValueError: the curriculum is unknown.
    """
    if curriculum not in ("none", "linear", "cosine"):
        raise ValueError(f"curriculum={curriculum!r}: unknown; known: cosine, linear, none")
    rise = milestone * num_iterations
    if curriculum == "none" or rise == 0:
        return np.full(num_iterations, end, dtype=np.float64)
    progress = np.minimum(np.arange(num_iterations) / rise, 1)
    left = 1 - progress if curriculum == "linear" else (1 + np.cos(np.pi * progress)) / 2
    return end + (start - end) * left


def draw_augmentations(
    seed: int,
    num_iterations: int,
    *,
    size: int,
    crop_area_min: float | NDArray[np.float64],
    flip_probability: float,
    roll_max: int,
) -> Augmentations:
    """The augmentations of a whole run of iterations; row t is the same for every `num_iterations` above t.

    Args:
        seed: at least 0.
        num_iterations: rows to draw, at least 0.
        size: S, pixels.
        crop_area_min: smallest share of the area in a crop, 0 to 1, of all iterations or of each (iterations,);
            shares are uniform up to 1, where 1 is no crop.
        flip_probability: of a horizontal flip, 0 to 1.
        roll_max: largest roll per axis, pixels, inclusive; may exceed `size`, since a roll wraps.
    """
    generator = np.random.Generator(np.random.Philox(key=seed))
    uniform = generator.random((num_iterations, _NUM_VARIATES))
    area_min = np.broadcast_to(np.asarray(crop_area_min, dtype=np.float64), (num_iterations,))[:, None]
    height, width = _crop_sizes(uniform[:, :NUM_TRIES], uniform[:, NUM_TRIES : 2 * NUM_TRIES], size, area_min)
    top, left, flip, roll_y, roll_x = uniform[:, 2 * NUM_TRIES :].T
    return Augmentations(
        size=size,
        top=(top * (size - height + 1)).astype(np.int64),
        left=(left * (size - width + 1)).astype(np.int64),
        height=height,
        width=width,
        flip=flip < flip_probability,
        roll_y=(roll_y * (roll_max + 1)).astype(np.int64),
        roll_x=(roll_x * (roll_max + 1)).astype(np.int64),
    )


def _crop_sizes(
    area: NDArray[np.float64], ratio: NDArray[np.float64], size: int, area_min: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Height and width of each iteration's first try that fits.

    `area` and `ratio` are uniform in [0, 1), of shape (iterations, tries); `area_min` is of shape (iterations, 1).
    """
    areas = size**2 * (area_min + (1 - area_min) * area)
    ratios = RATIO_MIN * (RATIO_MAX / RATIO_MIN) ** ratio  # log-uniform
    heights, widths = np.rint(np.sqrt(areas / ratios)), np.rint(np.sqrt(areas * ratios))
    fits = (heights >= 1) & (heights <= size) & (widths >= 1) & (widths <= size)
    first = (np.arange(len(fits)), fits.argmax(axis=1))
    any_fits = fits.any(axis=1)
    height, width = (np.where(any_fits, sides[first], size).astype(np.int64) for sides in (heights, widths))
    return height, width


def augment(images: Tensor, augmentations: Augmentations, iteration: int, *, antialias: bool) -> Tensor:
    """The batch (B, C, S, S) under the augmentation of one iteration, differentiable, same shape.

    `antialias` is passed to the resizing of the crop. A crop is never larger than the image, so it only changes
    rounding; on CUDA, its backward pass has no deterministic kernel.

    Raises:
        ValueError: the images are not of the size that the augmentations were drawn for.
    """
    size = augmentations.size
    if images.shape[-2:] != (size, size):
        shape = " x ".join(str(side) for side in images.shape[-2:])
        raise ValueError(f"images of {shape} pixels: augmentations were drawn for {size} x {size}; draw them again")
    top, left = int(augmentations.top[iteration]), int(augmentations.left[iteration])
    height, width = int(augmentations.height[iteration]), int(augmentations.width[iteration])
    if (height, width) != (size, size):
        crop = images[..., top : top + height, left : left + width]
        images = F.interpolate(crop, size=(size, size), mode="bilinear", align_corners=False, antialias=antialias)
    if augmentations.flip[iteration]:
        images = images.flip(-1)
    shifts = int(augmentations.roll_y[iteration]), int(augmentations.roll_x[iteration])
    return images.roll(shifts, dims=(-2, -1)) if any(shifts) else images
