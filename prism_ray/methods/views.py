"""Augmented views of stored images, derived from seeds instead of stored.

A view is a function of the image's seed and the view's number alone: which images share its batch, and in which order
they come, changes neither its parameters nor its pixels. So a label is kept per (image, view), and any batch size fits.

Shapes: N views, B images, C channels, H x W pixels. Boxes are (top, left, height, width).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

RATIO = (3 / 4, 4 / 3)
"""Range of a crop's width / height, as in the field's random resized crop."""
ATTEMPTS = 10
"""Draws of a crop before the whole image is taken, as in torchvision."""


@dataclass(frozen=True)
class ViewParameters:
    """Crop and flip of N views."""

    boxes: np.ndarray  # (N, 4) float64: top, left, height, width as fractions of the image, inside it
    flips: np.ndarray  # (N,) bool: mirrored left to right after the crop


@dataclass(frozen=True)
class Cutmix:
    """One group's CutMix: image i receives the box of image `permutation[i]`."""

    permutation: np.ndarray  # (num_images,) int64, a bijection; an image may be its own partner
    lam: float  # share of the base image's pixels that remain, exactly 1 - box area / image area
    box: tuple[int, int, int, int]  # top, left, height, width, pixels, inside the image; may be empty


def crop_flip(keys: np.ndarray, views: np.ndarray, *, crop_area_min: float, flip_probability: float) -> ViewParameters:
    """Random-resized-crop boxes and flips, each from its own (key, view).

    Args:
        keys: (N,) int64, seed of each image.
        views: (N,) or scalar, number of the view, 0 to 2**32 - 1.
        crop_area_min: smallest share of the image's area in a crop; 1 keeps the whole image.
        flip_probability: 0 never, 1 always.

    Source: torchvision's RandomResizedCrop for square images (area uniform, aspect ratio log-uniform in 3/4 to 4/3,
    10 attempts, then the whole image). Deviation: boxes are not rounded to whole pixels.
    """
    keys, views = np.broadcast_arrays(np.asarray(keys, np.int64), np.asarray(views, np.int64))
    if keys.ndim != 1:
        raise ValueError(f"keys of shape {keys.shape}; expected (N,)")
    flip, first = _uniforms(keys, views, streams=[ATTEMPTS, 0])
    boxes = np.tile(np.array([0.0, 0.0, 1.0, 1.0]), (len(keys), 1))
    if crop_area_min < 1:
        candidates, fits = _candidates(first[None], crop_area_min)
        boxes[fits[0]] = candidates[0, fits[0]]
        rest = np.flatnonzero(~fits[0])  # few, so that all their attempts together cost no more than one of all views
        if len(rest):
            drawn = _uniforms(keys[rest], views[rest], streams=range(1, ATTEMPTS))
            candidates, fits = _candidates(drawn, crop_area_min)
            fitting = fits.any(axis=0)
            boxes[rest[fitting]] = candidates[fits.argmax(axis=0)[fitting], np.flatnonzero(fitting)]
    return ViewParameters(boxes=boxes, flips=flip[0] < flip_probability)


def _candidates(drawn: np.ndarray, crop_area_min: float) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (A, N, 4) of attempts from their draws (A, 4, N), and whether each one fits into the image (A, N)."""
    area, ratio, top, left = np.moveaxis(drawn, 1, 0)
    area = crop_area_min + (1 - crop_area_min) * area
    ratio = np.exp(math.log(RATIO[0]) + (math.log(RATIO[1]) - math.log(RATIO[0])) * ratio)
    height, width = np.sqrt(area / ratio), np.sqrt(area * ratio)
    boxes = np.stack([top * (1 - height), left * (1 - width), height, width], axis=-1)
    return boxes, (height <= 1) & (width <= 1)


def cutmix(seed: int, num_images: int, *, image_size: int) -> Cutmix:
    """Permutation and box of one planned group (one shard in one view); the share is Beta(1, 1), that is uniform.

    Source: Yun et al. 2019 (CutMix, arXiv:1905.04899): a box of area 1 - lam around a uniform centre, cut off at the
    image's border, and lam corrected to the pixels that remain. One box for the whole group, as in FKD.
    """
    (share, *centre), permutation = _group_draw(seed, num_images, num_numbers=3)
    side = int(image_size * math.sqrt(1 - share))
    (top, height), (left, width) = (_clipped(math.floor(c * image_size), side, image_size) for c in centre)
    lam = 1 - height * width / image_size**2
    return Cutmix(permutation=permutation, lam=lam, box=(top, left, height, width))


@dataclass(frozen=True)
class Mixup:
    """One group's Mixup: image i is blended with image `permutation[i]`."""

    permutation: np.ndarray  # (num_images,) int64, a bijection; an image may be its own partner
    lam: float  # share of the base image, 0 to 1


def mixup(seed: int, num_images: int) -> Mixup:
    """Permutation and share of one planned group; the share is Beta(1, 1), that is uniform.

    Source: Zhang et al. 2018 (mixup, arXiv:1710.09412), with one share for the whole group as in FKD.
    """
    (share,), permutation = _group_draw(seed, num_images, num_numbers=1)
    return Mixup(permutation=permutation, lam=share)


def _group_draw(seed: int, num_images: int, *, num_numbers: int) -> tuple[list[float], np.ndarray]:
    """Uniform numbers in [0, 1) and a permutation of a group's images."""
    # Raw words of a bit generator keep their values across numpy versions; `Generator.permutation` does not promise to.
    words = np.random.Philox(key=seed).random_raw(num_images + num_numbers)
    numbers = ((words[:num_numbers] >> np.uint64(11)) * 2.0**-53).tolist()  # 53 bits
    return numbers, np.argsort(words[num_numbers:], kind="stable")


def blend(images: Tensor, partner_images: Tensor, lam: np.ndarray) -> Tensor:
    """lam * images + (1 - lam) * partners, (B, C, H, W) with one share (B,) each."""
    if images.shape != partner_images.shape or lam.shape != (len(images),):
        shapes = f"images {tuple(images.shape)}, partners {tuple(partner_images.shape)}, lam {lam.shape}"
        raise ValueError(f"{shapes}; expected equal images and one share each")
    share = torch.from_numpy(lam).to(images)[:, None, None, None]
    return share * images + (1 - share) * partner_images


def _clipped(centre: int, side: int, size: int) -> tuple[int, int]:
    """Start and length inside 0..size of the interval of `side` pixels around `centre`."""
    start = centre - side // 2
    return max(start, 0), min(start + side, size) - max(start, 0)


def render(images: Tensor, parameters: ViewParameters) -> Tensor:
    """Crop, resize back to the same size and flip, each image by its own row of `parameters`; (B, C, H, W) both ways.

    Bilinear and not antialiased, which is no loss: a crop is never larger than the image, so it is only enlarged.
    Pixels are those of a batch of one, whatever the batch.
    """
    num_images, _, height, width = images.shape
    if len(parameters.flips) != num_images:
        raise ValueError(f"{len(parameters.flips)} views for {num_images} images; expected one each")
    boxes = torch.from_numpy(parameters.boxes)
    rows = _samples(boxes[:, 0], boxes[:, 2], height)
    columns = _samples(boxes[:, 1], boxes[:, 3], width)
    flips = torch.from_numpy(parameters.flips)[:, None]
    columns = torch.where(flips, columns.flip(1), columns)
    grid = torch.stack([columns[:, None, :].expand(-1, height, -1), rows[:, :, None].expand(-1, -1, width)], dim=-1).to(
        images
    )
    return functional.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _samples(start: Tensor, length: Tensor, num_pixels: int) -> Tensor:
    """Centres of `num_pixels` equal pixels of each interval, (N, num_pixels) float64, in grid_sample's -1 to 1."""
    centres = (torch.arange(num_pixels, dtype=torch.float64) + 0.5) / num_pixels
    return 2 * (start[:, None] + length[:, None] * centres) - 1


def paste(images: Tensor, partner_images: Tensor, boxes: np.ndarray | tuple[int, int, int, int]) -> Tensor:
    """`images` (B, C, H, W) with each box taken from the partner; one box for all, or (B, 4), in pixels."""
    if images.shape != partner_images.shape:
        raise ValueError(f"images {tuple(images.shape)} and partners {tuple(partner_images.shape)} differ in shape")
    rows = np.asarray(boxes, dtype=np.int64).reshape(-1, 4)
    if len(rows) not in (1, len(images)):
        raise ValueError(f"{len(rows)} boxes for {len(images)} images; expected one, or one each")
    top, left, height, width = torch.from_numpy(rows).to(images.device).T[:, :, None, None]
    y = torch.arange(images.shape[2], device=images.device)[None, :, None]
    x = torch.arange(images.shape[3], device=images.device)[None, None, :]
    inside = (y >= top) & (y < top + height) & (x >= left) & (x < left + width)
    return torch.where(inside[:, None], partner_images, images)


def _uniforms(keys: np.ndarray, views: np.ndarray, *, streams: Sequence[int]) -> np.ndarray:
    """Uniform float64 in [0, 1), (streams, 4, N): four numbers of each, a pure function of (key, view, stream)."""
    words = keys.astype(np.uint64)
    counter = np.zeros((4, len(streams), len(keys)), dtype=np.uint64)
    counter[0], counter[1] = views.astype(np.uint64), np.array(streams, np.uint64)[:, None]
    key = np.broadcast_to(np.stack([words & _LOW, words >> _HALF])[:, None], (2, len(streams), len(keys)))
    drawn = philox4x32(counter.reshape(4, -1), key.reshape(2, -1)) * 2.0**-32
    return np.moveaxis(drawn.reshape(4, len(streams), len(keys)), 0, 1)


_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=np.uint64)
_WEYL = np.array([[0x9E3779B9], [0xBB67AE85]], dtype=np.uint64)


def philox4x32(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Philox4x32-10: 4 random 32-bit words for each 128-bit counter and 64-bit key, all columns at once.

    Args:
        counter: (4, N) uint64 that hold 32-bit words.
        key: (2, N) uint64 that hold 32-bit words.

    Returns:
        (4, N) uint64 that hold 32-bit words.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3. Written out because numpy's
    Philox makes a stream per object, and here every element needs its own key.
    """
    # Both halves of a round at once: for the few images of a batch, a call of numpy costs more than its numbers.
    even, odd = counter[0::2], counter[1::2]
    for _ in range(10):
        product = _MULTIPLIERS * even
        even, odd = (product >> _HALF)[::-1] ^ odd ^ key, (product & _LOW)[::-1]
        key = (key + _WEYL) & _LOW
    return np.stack([even[0], odd[0], even[1], odd[1]])
