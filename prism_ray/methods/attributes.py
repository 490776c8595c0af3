"""Attributes of a drawn picture that words can name: the world that a small text-to-image model learns, and its shifts.

Light pictures on black, such as Fashion-MNIST's and digits. Shapes: B images (B, C, H, W) in [0, 1]; every random
number comes from one stream per image, so an image does not depend on its batch mates.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

AXES: dict[str, tuple[str, ...]] = {
    "rotation": ("none", "left", "right"),
    "scale": ("none", "small", "large"),
    "thickness": ("none", "thin", "bold"),
    "background": ("black", "gray", "noisy"),
    "blur": ("none", "blurred"),
    "inversion": ("none", "inverted"),
}
"""Values of each axis, the neutral one first; in the order in which they are applied."""

Values = Mapping[str, str]
"""Axis → value; axes that are missing are neutral."""


@dataclass(frozen=True)
class _Strengths:
    """How strongly the attributes of each image show: (B,) each."""

    angle: Tensor  # degrees, counter-clockwise
    zoom: Tensor
    gray: Tensor
    noise: Tensor  # (B, 1, 4, 4), stretched to a pattern
    sigma: Tensor  # of the blur, as a share of the side


MOST_AXES = 3
"""Attributes of an image at most; more would hide what it shows."""


def draw_values(seed: int, *, share: float) -> dict[str, str]:
    """Attributes of one image: with probability `share` one to three axes away from neutral, else none."""
    random = np.random.Generator(np.random.Philox(key=seed))
    if random.random() >= share:
        return {}
    axes = random.permutation(list(AXES))[: 1 + random.integers(MOST_AXES)]
    return {str(axis): AXES[axis][1 + random.integers(len(AXES[axis]) - 1)] for axis in axes}


def apply_attributes(images: Tensor, values: Sequence[Values], seeds: Sequence[int]) -> Tensor:
    """Images with their attributes, (B, C, H, W) in [0, 1].

    Args:
        images: (B, C, H, W) in [0, 1], light on black.
        values: of each image, see `AXES`.
        seeds: of each image; decide by how much.

    Raises:
        ValueError: an axis or a value that does not exist.
    """
    for each in values:
        for axis, value in each.items():
            if value not in AXES.get(axis, ()):
                raise ValueError(f"attribute {axis}={value}; known: {AXES}")
    strengths = _drawn(values, seeds)
    images = _turned(images, strengths.angle, strengths.zoom)
    for axis, value, change in CHANGES:
        chosen = [n for n, each in enumerate(values) if each.get(axis) == value]
        if chosen:
            # Pictures without an attribute stay bit for bit as they are.
            images = images.clone()
            images[chosen] = change(images[chosen], _of(strengths, chosen))
    return images.clamp(0, 1)


def _drawn(values: Sequence[Values], seeds: Sequence[int]) -> _Strengths:
    rows = []
    for each, seed in zip(values, seeds, strict=True):
        random = np.random.Generator(np.random.Philox(key=seed))
        numbers = random.random(4)
        side = {"left": 1.0, "right": -1.0}.get(each.get("rotation", "none"), 0.0)
        zoom = {"small": 0.6 + 0.2 * numbers[1], "large": 1.2 + 0.25 * numbers[1]}.get(each.get("scale", "none"), 1.0)
        rows.append((side * (20 + 25 * numbers[0]), zoom, 0.35 + 0.25 * numbers[2], 0.02 + 0.02 * numbers[3]))
        rows[-1] += (random.random((1, 4, 4)),)
    angle, zoom, gray, sigma = (torch.tensor([row[k] for row in rows], dtype=torch.float32) for k in range(4))
    noise = torch.tensor(np.stack([row[4] for row in rows]), dtype=torch.float32)
    return _Strengths(angle, zoom, gray, noise, sigma)


def _of(strengths: _Strengths, chosen: list[int]) -> _Strengths:
    return _Strengths(**{name: values[chosen] for name, values in vars(strengths).items()})


def _turned(images: Tensor, angle: Tensor, zoom: Tensor) -> Tensor:
    """Rotated and zoomed about the middle; what comes into view is black."""
    moved = (angle != 0) | (zoom != 1)
    if not moved.any():
        return images
    radians = torch.deg2rad(angle[moved])
    cos, sin = radians.cos() / zoom[moved], radians.sin() / zoom[moved]
    zero = torch.zeros_like(cos)
    # In images y points down, so this turns counter-clockwise.
    theta = torch.stack([torch.stack([cos, -sin, zero], dim=1), torch.stack([sin, cos, zero], dim=1)], dim=1)
    grid = functional.affine_grid(theta, list(images[moved].shape), align_corners=False)
    result = images.clone()
    result[moved] = functional.grid_sample(images[moved], grid, mode="bilinear", align_corners=False)
    return result


def _thin(images: Tensor, _: _Strengths) -> Tensor:
    """Every light part a pixel smaller on one side of each axis."""
    padded = functional.pad(images, (1, 0, 1, 0))
    return -functional.max_pool2d(-padded, 2, stride=1)


def _bold(images: Tensor, _: _Strengths) -> Tensor:
    return functional.max_pool2d(images, 3, stride=1, padding=1)


def _on(images: Tensor, background: Tensor) -> Tensor:
    """Pictures in front of a background; what is as good as black is see-through."""
    opacity = (images.amax(dim=1, keepdim=True) / 0.2).clamp(0, 1)
    return images * opacity + background * (1 - opacity)


def _gray_background(images: Tensor, strengths: _Strengths) -> Tensor:
    return _on(images, strengths.gray[:, None, None, None].expand_as(images))


def _noisy_background(images: Tensor, strengths: _Strengths) -> Tensor:
    size = (images.shape[2], images.shape[3])
    pattern = functional.interpolate(strengths.noise, size, mode="bilinear", align_corners=False)
    return _on(images, 0.7 * pattern.expand_as(images))


def _blurred(images: Tensor, strengths: _Strengths) -> Tensor:
    """A Gaussian, separable, of each image's own width."""
    side = images.shape[3]
    offsets = torch.arange(-3, 4, dtype=images.dtype)
    kernels = torch.exp(-0.5 * (offsets / (strengths.sigma[:, None] * side).clamp(min=0.3)).square())
    kernels = kernels / kernels.sum(dim=1, keepdim=True)
    flat = images.transpose(0, 1)  # (C, B, H, W): images become the groups
    for shape, padding in (((-1, 1, 7, 1), (0, 0, 3, 3)), ((-1, 1, 1, 7), (3, 3, 0, 0))):
        flat = functional.conv2d(
            functional.pad(flat, padding, mode="replicate"), kernels.reshape(shape), groups=len(images)
        )
    return flat.transpose(0, 1)


def _inverted(images: Tensor, _: _Strengths) -> Tensor:
    return 1 - images


CHANGES: list[tuple[str, str, Callable[[Tensor, _Strengths], Tensor]]] = [
    ("thickness", "thin", _thin),
    ("thickness", "bold", _bold),
    ("background", "gray", _gray_background),
    ("background", "noisy", _noisy_background),
    ("blur", "blurred", _blurred),
    ("inversion", "inverted", _inverted),
]
"""Axis, value and what it does, after rotation and scale."""


# Shifts that no caption names


def _sheared(images: Tensor, random: np.random.Generator) -> Tensor:
    amount = random.choice([-1, 1]) * random.uniform(0.3, 0.5)
    theta = torch.tensor([[[1.0, amount, 0.0], [0.0, 1.0, 0.0]]], dtype=images.dtype)
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, mode="bilinear", align_corners=False)


def _occluded(images: Tensor, random: np.random.Generator) -> Tensor:
    side = images.shape[-1]
    size = round(side * random.uniform(0.3, 0.45))
    top, left = (int(random.integers(0, side - size + 1)) for _ in range(2))
    images = images.clone()
    images[..., top : top + size, left : left + size] = 0
    return images


def _speckled(images: Tensor, random: np.random.Generator) -> Tensor:
    hit = torch.from_numpy(random.random((1, 1, *images.shape[2:])))
    return torch.where(hit < 0.06, 1.0, torch.where(hit > 0.94, 0.0, images))


def _pixelated(images: Tensor, random: np.random.Generator) -> Tensor:
    side = images.shape[-1]
    coarse = functional.interpolate(images, (side // 3, side // 3), mode="area")
    return functional.interpolate(coarse, images.shape[2:], mode="nearest")


def _faded(images: Tensor, random: np.random.Generator) -> Tensor:
    return images * random.uniform(0.25, 0.4)


def _striped(images: Tensor, random: np.random.Generator) -> Tensor:
    period = int(random.integers(4, 7))
    lines = (torch.arange(images.shape[-1]) + int(random.integers(period))) % period == 0
    return torch.where(lines if random.random() < 0.5 else lines[:, None], 0.6, images)


SHIFTS: dict[str, Callable[[Tensor, np.random.Generator], Tensor]] = {
    "sheared": _sheared,
    "occluded": _occluded,
    "speckled": _speckled,
    "pixelated": _pixelated,
    "faded": _faded,
    "striped": _striped,
}
"""Corruptions of one image (1, C, H, W), by name; none is an attribute, so no generator was told of them."""


def apply_shift(images: Tensor, name: str, seeds: Sequence[int]) -> Tensor:
    """Images under one of `SHIFTS`, or under an attribute written "axis:value", (B, C, H, W) in [0, 1].

    Raises:
        ValueError: there is no such shift.
    """
    if ":" in name:
        axis, value = name.split(":", 1)
        return apply_attributes(images, [{axis: value}] * len(images), seeds)
    if name not in SHIFTS:
        raise ValueError(f"shift {name!r}; known: {', '.join(SHIFTS)}, and axis:value of {AXES}")
    shifted = [
        SHIFTS[name](images[n : n + 1], np.random.Generator(np.random.Philox(key=seed))) for n, seed in enumerate(seeds)
    ]
    return torch.cat(shifted).to(images.dtype).clamp(0, 1)
