from dataclasses import fields

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as tv

from prism_ray.methods.inversion.augment import Augmentations, augment, crop_areas, draw_augmentations

ARRAYS = [f.name for f in fields(Augmentations) if f.name != "size"]


def released(seed: int = 0, num_iterations: int = 2000, *, size: int = 224) -> Augmentations:
    return draw_augmentations(seed, num_iterations, size=size, crop_area_min=0.08, flip_probability=0.5, roll_max=32)


def one(size: int, **changes: int | bool) -> Augmentations:
    """A single augmentation: none but for the changes."""
    values = {"top": 0, "left": 0, "height": size, "width": size, "flip": False, "roll_y": 0, "roll_x": 0} | changes
    return Augmentations(size=size, **{name: np.array([value]) for name, value in values.items()})  # pyright: ignore[reportArgumentType]


def pixels(size: int, num_images: int = 3) -> Tensor:
    return torch.rand(num_images, 3, size, size, generator=torch.Generator().manual_seed(size))


@pytest.mark.parametrize("size", [1, 2, 7, 16, 32, 223, 224])
def test_no_crop_no_flip_and_no_roll_is_the_exact_identity(size):
    augmentations = draw_augmentations(1, 300, size=size, crop_area_min=1, flip_probability=0, roll_max=0)
    images = pixels(size, 1)
    for iteration in range(300):
        for antialias in (False, True):
            assert torch.equal(augment(images, augmentations, iteration, antialias=antialias), images)


def test_a_draw_does_not_depend_on_the_number_of_iterations():
    few, many = released(7, 10), released(7, 1000)
    for name in ARRAYS:
        assert np.array_equal(getattr(few, name), getattr(many, name)[:10])
    assert len(few) == 10
    assert len(many) == 1000


def test_turning_the_crop_off_leaves_flips_and_rolls_as_they_are():
    cropped = released(3)
    whole = draw_augmentations(3, 2000, size=224, crop_area_min=1, flip_probability=0.5, roll_max=32)
    for name in ("flip", "roll_y", "roll_x"):
        assert np.array_equal(getattr(cropped, name), getattr(whole, name))


def test_same_seed_same_draws_and_another_seed_other_draws():
    for name in ARRAYS:
        assert np.array_equal(getattr(released(1), name), getattr(released(1), name))
        assert (getattr(released(1), name) != getattr(released(2), name)).mean() > 0.3


def test_no_draws_are_an_empty_set():
    assert len(released(0, 0)) == 0


@pytest.mark.parametrize("size", [8, 16, 224])
def test_crops_lie_inside_the_image(size):
    draws = released(2, 5000, size=size)
    for start, extent in ((draws.top, draws.height), (draws.left, draws.width)):
        assert start.min() == 0
        assert extent.min() >= 1
        assert (start + extent).max() == size


def test_crop_positions_reach_both_ends_and_every_place_between():
    draws = draw_augmentations(4, 20_000, size=8, crop_area_min=0.3, flip_probability=0.5, roll_max=0)
    for start, extent in ((draws.top, draws.height), (draws.left, draws.width)):
        counts = np.bincount(start[extent == 6])
        assert len(counts) == 3
        assert counts.min() > 0.9 * counts.mean()
    of_one_size = (draws.height == 6) & (draws.width == 6)
    assert abs(np.corrcoef(draws.top[of_one_size], draws.left[of_one_size])[0, 1]) < 0.1


def ks_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Kolmogorov-Smirnov distance of two samples."""
    grid = np.union1d(a, b)
    cdfs = [np.searchsorted(np.sort(sample), grid, side="right") / len(sample) for sample in (a, b)]
    return float(np.abs(cdfs[0] - cdfs[1]).max())


@pytest.mark.parametrize("area_min", [0.08, 0.5])
def test_crops_follow_the_law_of_torchvision(area_min):
    num_draws = 4000
    ours = draw_augmentations(5, num_draws, size=224, crop_area_min=area_min, flip_probability=0, roll_max=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        image = torch.empty(3, 224, 224)
        theirs = np.array(
            [RandomResizedCrop.get_params(image, [area_min, 1], [3 / 4, 4 / 3]) for _ in range(num_draws)], dtype=float
        )
    critical = 1.95 * (2 / num_draws) ** 0.5  # p = 0.001
    top, left, height, width = theirs.T
    assert ks_distance(ours.height * ours.width, height * width) < critical
    assert ks_distance(ours.height / ours.width, height / width) < critical
    assert ks_distance(ours.top, top) < critical
    assert ks_distance(ours.left, left) < critical


@pytest.mark.parametrize(
    ("curriculum", "milestone", "expected"),
    [
        ("none", 1.0, [0.08, 0.08, 0.08, 0.08]),
        ("linear", 1.0, [1.0, 0.77, 0.54, 0.31]),
        ("linear", 0.5, [1.0, 0.54, 0.08, 0.08]),
        ("linear", 0.0, [0.08, 0.08, 0.08, 0.08]),
        ("cosine", 1.0, [1.0, 0.54 + 0.46 * 0.5**0.5, 0.54, 0.54 - 0.46 * 0.5**0.5]),
        ("cosine", 0.5, [1.0, 0.54, 0.08, 0.08]),
    ],
)
def test_the_curriculum_of_crops_has_the_values_of_the_released_program(curriculum, milestone, expected):
    areas = crop_areas(4, curriculum=curriculum, start=1.0, end=0.08, milestone=milestone)
    assert areas == pytest.approx(expected, abs=1e-12)


def test_a_curriculum_can_also_rise_and_can_have_no_iterations():
    assert crop_areas(2, curriculum="linear", start=0.2, end=0.6, milestone=1).tolist() == pytest.approx([0.2, 0.4])
    assert crop_areas(0, curriculum="cosine", start=1, end=0.08, milestone=0.5).shape == (0,)


def test_an_unknown_curriculum_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'step': unknown; known: cosine, linear, none"):
        crop_areas(4, curriculum="step", start=1, end=0.08, milestone=1)  # pyright: ignore[reportArgumentType] - on purpose


def test_a_share_for_each_iteration_is_that_of_its_row_alone():
    areas = crop_areas(2000, curriculum="linear", start=1.0, end=0.08, milestone=0.5)
    drawn = draw_augmentations(3, 2000, size=224, crop_area_min=areas, flip_probability=0.5, roll_max=32)
    late = released(3)
    for name in ARRAYS:
        assert np.array_equal(getattr(drawn, name)[1000:], getattr(late, name)[1000:])
    shares = drawn.height * drawn.width / 224**2
    assert (shares >= areas * 0.98).all()  # sides are rounded to pixels
    assert shares[:200].mean() > shares[1000:].mean() + 0.2


def test_rolls_are_uniform_from_zero_to_the_largest_inclusive():
    draws = draw_augmentations(6, 10_000, size=8, crop_area_min=1, flip_probability=0, roll_max=4)
    for roll in (draws.roll_y, draws.roll_x):
        counts = np.bincount(roll)
        assert len(counts) == 5
        assert np.abs(counts - 2000).max() < 160  # four standard deviations
    assert abs(np.corrcoef(draws.roll_y, draws.roll_x)[0, 1]) < 0.04


@pytest.mark.parametrize("probability", [0, 0.25, 1])
def test_flips_have_their_probability(probability):
    draws = draw_augmentations(7, 10_000, size=8, crop_area_min=1, flip_probability=probability, roll_max=0)
    assert draws.flip.mean() == pytest.approx(probability, abs=0.02 if 0 < probability < 1 else 0)


def test_identical_images_of_a_batch_stay_identical():
    images = pixels(16, 1).expand(5, -1, -1, -1)
    augmentations = released(8, 50, size=16)
    for iteration in range(50):
        augmented = augment(images, augmentations, iteration, antialias=False)
        assert augmented.shape == images.shape
        assert torch.equal(augmented, augmented[:1].expand_as(augmented))


def test_an_image_is_augmented_alike_in_any_batch():
    images = pixels(16, 4)
    augmentations = released(9, 30, size=16)
    for iteration in range(30):
        together = augment(images, augmentations, iteration, antialias=False)
        alone = torch.cat([augment(image[None], augmentations, iteration, antialias=False) for image in images])
        assert torch.equal(together, alone)


@pytest.mark.parametrize("antialias", [False, True])
def test_augmentation_is_torchvisions_crop_then_flip_then_roll(antialias):
    images = pixels(16)
    draws = released(10, 60, size=16)
    assert 10 < draws.flip.sum() < 50
    for t in range(60):
        box = [int(side[t]) for side in (draws.top, draws.left, draws.height, draws.width)]
        expected = tv.resized_crop(images, *box, size=[16, 16], antialias=antialias)
        if draws.flip[t]:
            expected = tv.horizontal_flip(expected)
        expected = torch.roll(expected, (int(draws.roll_y[t]), int(draws.roll_x[t])), dims=(2, 3))
        # Rounding only: torchvision may resize in another memory format.
        torch.testing.assert_close(augment(images, draws, t, antialias=antialias), expected, rtol=0, atol=1e-6)


def test_a_crop_is_enlarged_to_the_whole_image():
    images = pixels(8)
    augmented = augment(images, one(8, top=2, left=5, height=1, width=1), 0, antialias=False)
    torch.testing.assert_close(augmented, images[:, :, 2:3, 5:6].expand_as(images))


def test_a_flip_comes_before_the_roll():
    row = torch.tensor([[[[0.0, 1, 2], [0, 1, 2], [0, 1, 2]]]])
    augmented = augment(row, one(3, flip=True, roll_x=1), 0, antialias=False)
    assert augmented[0, 0, 0].tolist() == [0, 2, 1]


def test_a_roll_moves_down_and_to_the_right_and_wraps():
    image = torch.zeros(1, 1, 3, 3)
    image[0, 0, 2, 0] = 1
    assert augment(image, one(3, roll_y=1, roll_x=2), 0, antialias=False)[0, 0, 0, 2] == 1
    assert torch.equal(augment(image, one(3, roll_y=3, roll_x=6), 0, antialias=False), image)


def test_antialiasing_only_changes_rounding_because_crops_are_enlarged():
    images = pixels(24)
    draws = released(11, 40, size=24)
    for t in range(40):
        plain, smooth = (augment(images, draws, t, antialias=antialias) for antialias in (False, True))
        torch.testing.assert_close(plain, smooth, rtol=0, atol=1e-6)


def test_augmentation_keeps_the_range_and_passes_gradients():
    images = pixels(16).requires_grad_()
    augmented = augment(images, released(12, 1, size=16), 0, antialias=False)
    assert augmented.min() >= images.min()
    assert augmented.max() <= images.max() + 1e-6
    (gradient,) = torch.autograd.grad(augmented.sum(), images)
    # Bilinear weights of each output pixel sum to 1, so the gradient spreads exactly one unit per pixel.
    assert gradient.sum().item() == pytest.approx(images.numel(), rel=1e-5)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"16 x 12 pixels.*8 x 8"):
        augment(torch.zeros(1, 3, 16, 12), one(8), 0, antialias=False)
