"""Attributes and shifts of drawn pictures: what they do, to whom, and that they repeat."""

import pytest
import torch
from torch import Tensor

from prism_ray.methods.attributes import AXES, SHIFTS, apply_attributes, apply_shift

MARKED = [(axis, value) for axis, values in AXES.items() for value in values[1:]]
ALL_SHIFTS = [*SHIFTS, *(f"{axis}:{value}" for axis, value in MARKED)]


def pictures(num: int = 4, side: int = 16) -> Tensor:
    """A bright bar on black, upright and left of the middle, each a little longer."""
    images = torch.zeros(num, 1, side, side)
    for n in range(num):
        images[n, :, 3 : 10 + n, 5:8] = 0.9
    return images


@pytest.mark.parametrize(("axis", "value"), MARKED)
def test_an_attribute_changes_its_pictures_and_no_others(axis: str, value: str) -> None:
    images = pictures()
    changed = apply_attributes(images, [{}, {axis: value}, {axis: AXES[axis][0]}, {axis: value}], [1, 2, 3, 4])
    assert torch.equal(changed[0], images[0])
    assert torch.equal(changed[2], images[2])
    assert not torch.equal(changed[1], images[1])
    assert not torch.equal(changed[3], images[3])


@pytest.mark.parametrize("name", ALL_SHIFTS)
def test_pictures_stay_in_range_and_repeat_with_their_seeds(name: str) -> None:
    images = pictures()
    shifted = apply_shift(images, name, [1, 2, 3, 4])
    assert shifted.shape == images.shape
    assert shifted.min() >= 0
    assert shifted.max() <= 1
    assert torch.equal(shifted, apply_shift(images, name, [1, 2, 3, 4]))


@pytest.mark.parametrize("name", ALL_SHIFTS)
def test_a_picture_does_not_depend_on_its_batch_mates(name: str) -> None:
    images = pictures()
    together = apply_shift(images, name, [1, 2, 3, 4])
    alone = torch.cat([apply_shift(images[n : n + 1], name, [n + 1]) for n in range(4)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)


def center(image: Tensor) -> tuple[float, float]:
    """Row and column of the light's middle."""
    rows, columns = torch.meshgrid(*(torch.arange(float(side)) for side in image.shape[1:]), indexing="ij")
    weight = image[0] / image[0].sum()
    return float((rows * weight).sum()), float((columns * weight).sum())


def test_left_turns_counterclockwise_and_right_clockwise() -> None:
    """The upper end of an upright bar through the middle goes to the side that the word says."""
    images = torch.zeros(2, 1, 17, 17)
    images[:, :, 2:8, 8] = 1
    left, right = apply_attributes(images, [{"rotation": "left"}, {"rotation": "right"}], [1, 1])
    assert center(left)[1] < 7.5
    assert center(right)[1] > 8.5


def test_small_and_large_change_the_lights_area() -> None:
    images = pictures(3)
    images[:] = images[0]
    small, plain, large = apply_attributes(images, [{"scale": "small"}, {}, {"scale": "large"}], [1, 1, 1])
    assert small.sum() < 0.75 * plain.sum()
    assert large.sum() > 1.25 * plain.sum()


def test_thin_and_bold_change_the_strokes_width() -> None:
    images = pictures(3)
    images[:] = images[0]
    thin, plain, bold = apply_attributes(images, [{"thickness": "thin"}, {}, {"thickness": "bold"}], [1, 1, 1])
    assert thin.sum() < plain.sum() < bold.sum()


def test_a_background_shows_only_where_the_picture_is_black() -> None:
    images = pictures(1)
    (gray,) = apply_attributes(images, [{"background": "gray"}], [1])
    assert torch.equal(gray[images[0] > 0.5], images[0][images[0] > 0.5])
    assert (gray[images[0] == 0] > 0.3).all()


def test_inverted_is_one_minus_the_picture() -> None:
    images = pictures(1)
    assert torch.equal(apply_attributes(images, [{"inversion": "inverted"}], [1]), 1 - images)


@pytest.mark.parametrize("name", ["magic", "blur:magic", "magic:left"])
def test_what_does_not_exist_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match="magic"):
        apply_shift(pictures(), name, [1, 2, 3, 4])
