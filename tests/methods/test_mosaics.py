"""Mosaics: crops follow from their key, tiles fill the image, and nothing but what was cut is in it."""

import numpy as np
import pytest
import torch

from prism_ray.methods.mosaics import CROP_AREA_MIN, cells, compose, cut, draw_crops, padded


def image(seed: int, size: int = 8, channels: int = 3) -> torch.Tensor:
    return torch.rand(channels, size, size, generator=torch.Generator().manual_seed(seed))


KEYS = np.arange(2000, dtype=np.int64) * 2**33 + 7


def test_crops_are_square_inside_the_image_and_of_every_allowed_area() -> None:
    boxes = draw_crops(KEYS, 3, size=28)
    assert boxes.shape == (2000, 3, 4)
    top, left, height, width = boxes.reshape(-1, 4).T
    assert (height == width).all()
    assert min(top.min(), left.min()) == 0
    assert max((top + height).max(), (left + width).max()) == 28
    assert height.min() == round(28 * CROP_AREA_MIN**0.5)
    assert height.max() == 28
    # The area is uniform; sides are whole pixels.
    assert (height**2 / 28**2).mean() == pytest.approx((1 + CROP_AREA_MIN) / 2, abs=0.01)
    for start in (top, left):
        free = 28 - height[height < 28]
        assert (start[height < 28] / free).mean() == pytest.approx(0.5, abs=0.02)


def test_the_crops_of_an_image_follow_from_its_key_alone() -> None:
    many = draw_crops(KEYS, 5, size=28)
    assert (draw_crops(KEYS[::-1][:10], 2, size=28) == many[::-1][:10, :2]).all()
    assert len({tuple(row) for row in many[:, 0].tolist()}) > 500, "keys give crops of their own"


@pytest.mark.parametrize(("size", "tiles"), [(8, 1), (8, 2), (28, 3), (7, 7)])
def test_tiles_cover_every_pixel_once_and_differ_by_a_pixel_at_most(size: int, tiles: int) -> None:
    covered = np.zeros((size, size), dtype=int)
    for top, left, height, width in cells(size, tiles):
        covered[top : top + height, left : left + width] += 1
        assert {height, width} <= {size // tiles, -(-size // tiles)}
    assert (covered == 1).all()
    assert len(cells(size, tiles)) == tiles**2


def test_more_tiles_than_pixels_are_refused() -> None:
    with pytest.raises(ValueError, match="9 tiles along 8 pixels"):
        cells(8, 9)


def test_a_whole_image_and_a_box_of_the_tiles_size_are_taken_bit_for_bit() -> None:
    whole = image(0)
    assert torch.equal(compose([whole], [(0, 0, 8, 8)]), whole)
    boxes = [(0, 0, 4, 4), (4, 0, 4, 4), (1, 2, 4, 4), (3, 3, 4, 4)]
    images = [image(n) for n in range(4)]
    mosaic = compose(images, boxes)
    for (row, column), picture, (top, left, *_) in zip([(0, 0), (0, 4), (4, 0), (4, 4)], images, boxes, strict=True):
        tile = mosaic[:, row : row + 4, column : column + 4]
        assert torch.equal(tile, picture[:, top : top + 4, left : left + 4])


def test_a_crop_is_resized_antialiased_and_never_sees_the_rest_of_the_image() -> None:
    picture = image(0)
    other = image(1)
    other[:, 2:6, 1:5] = picture[:, 2:6, 1:5]
    small = cut(picture, (2, 1, 4, 4), height=2, width=2)
    assert torch.equal(small, cut(other, (2, 1, 4, 4), height=2, width=2))
    assert small.min() >= 0
    assert small.max() <= 1
    checkered = torch.arange(64).reshape(1, 8, 8).sum(dim=0, keepdim=True).float() % 2
    assert cut(checkered, (0, 0, 8, 8), height=2, width=2).sub(0.5).abs().max() < 0.1, "averaged, not sampled"


def test_a_judged_crop_lies_in_the_middle_of_one_colour() -> None:
    crops = torch.stack([image(n, size=3) for n in range(2)])
    shown = padded(crops, size=8, fill=torch.tensor([0.1, 0.2, 0.3]))
    assert torch.equal(shown[:, :, 2:5, 2:5], crops)
    outside = torch.ones(8, 8, dtype=torch.bool)
    outside[2:5, 2:5] = False
    assert torch.equal(shown[:, :, outside], torch.tensor([0.1, 0.2, 0.3])[None, :, None].expand(2, 3, 64 - 9))


def test_a_number_of_crops_that_is_no_square_is_refused() -> None:
    with pytest.raises(ValueError, match="2 images and 2 boxes"):
        compose([image(0)] * 2, [(0, 0, 8, 8)] * 2)
