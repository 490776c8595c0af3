"""Resizing by matrix products, against PyTorch's own."""

import pytest
import torch
from torch.nn import functional

from prism_ray.methods.resizing import resized


@pytest.mark.parametrize(("height", "width", "size"), [(64, 64, 28), (28, 28, 32), (40, 24, 17), (512, 512, 224)])
def test_it_is_antialiased_bilinear_interpolation(height: int, width: int, size: int) -> None:
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = functional.interpolate(images, (size, size), mode="bilinear", align_corners=False, antialias=True)
    torch.testing.assert_close(resized(images, size), expected, rtol=0, atol=1e-6)


def test_images_of_that_size_are_left_as_they_are() -> None:
    images = torch.rand(1, 1, 8, 8)
    assert resized(images, 8) is images


def test_its_gradient_matches_finite_differences() -> None:
    images = torch.rand(1, 2, 6, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: resized(x, 3), images)
