import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from sklearn.datasets import load_digits
from torch import Tensor

from prism_ray.models.extractors import fid, kid


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def frechet(real: Tensor, fake: Tensor) -> float:
    """The formula, with a square root of the product of covariances."""
    a, b = real.double().numpy(), fake.double().numpy()
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    mean_term = np.square(a.mean(axis=0) - b.mean(axis=0)).sum()
    return float(mean_term + np.trace(cov_a + cov_b - 2 * np.real(sqrtm(cov_a @ cov_b))))


def mmd(real: Tensor, fake: Tensor) -> float:
    """The unbiased estimate, pair by pair."""

    def kernel(x: Tensor, y: Tensor) -> float:
        return ((x @ y).item() / len(x) + 1) ** 3

    def within(rows: Tensor) -> float:
        return float(np.mean([kernel(rows[i], rows[j]) for i in range(len(rows)) for j in range(len(rows)) if i != j]))

    return within(real) + within(fake) - 2 * float(np.mean([kernel(x, y) for x in real for y in fake]))


def test_fid_is_the_formula() -> None:
    real, fake = randn(120, 7) @ randn(7, 7, seed=2), randn(90, 7, seed=1) * 1.3 + 0.4
    assert fid(real, fake) == pytest.approx(frechet(real, fake), rel=1e-9)
    assert fid(real.float(), fake.float()) == pytest.approx(frechet(real, fake), rel=1e-6)
    assert fid(fake, real) == pytest.approx(fid(real, fake), rel=1e-9)


def test_fid_of_real_images_of_two_classes_is_the_formula() -> None:
    images, class_ids = load_digits(return_X_y=True)
    # Of few features, because pixels that never vary make the formula's square root one of a singular matrix.
    features = torch.tensor(images) @ randn(64, 8)
    zeros, ones = (features[torch.tensor(class_ids == class_id)] for class_id in (0, 1))
    assert fid(zeros, ones) == pytest.approx(frechet(zeros, ones), rel=1e-9)
    assert fid(zeros[::2], zeros[1::2]) < fid(zeros, ones) / 20


def test_fid_of_a_shift_is_its_squared_length_and_of_identical_sets_zero() -> None:
    real, shift = randn(60, 5), randn(5, seed=1)
    assert fid(real, real + shift) == pytest.approx(shift.square().sum().item(), rel=1e-9)
    assert fid(real, real) == pytest.approx(0, abs=1e-9)
    assert fid(real[:4], real[:4]) == pytest.approx(0, abs=1e-6), "fewer images than features"


def test_fid_of_features_far_from_zero_is_as_exact() -> None:
    real, fake = randn(100, 6), randn(100, 6, seed=1) * 1.2
    # The sums of torchmetrics alone were off by 31% at this offset (300 images, 32 features; 2026-11-23).
    assert fid(real + 1e7, fake + 1e7) == pytest.approx(fid(real, fake), rel=1e-6)


@pytest.mark.parametrize("per_dimension", [1, 10])
def test_fid_of_two_samples_of_one_gaussian_is_the_documented_share_of_their_variance(per_dimension: int) -> None:
    dim = 64
    num = per_dimension * dim
    distances = [fid(randn(num, dim, seed=seed), randn(num, dim, seed=seed + 100)) for seed in range(3)]
    # Measured 0.52 to 0.55 D / N.
    assert np.mean(distances) / dim == pytest.approx(dim / (2 * num), rel=0.15)


def test_kid_of_one_subset_of_all_images_is_the_unbiased_estimate() -> None:
    real, fake = randn(24, 6), randn(24, 6, seed=1) * 1.2 + 0.3
    expected = mmd(real, fake)
    assert kid(real, fake, subset_size=24, seed=0, num_subsets=1) == pytest.approx(expected, rel=1e-9)
    assert kid(real.float(), fake.float(), subset_size=24, seed=0) == pytest.approx(expected, rel=1e-5)


def test_kid_is_the_mean_over_subsets_of_both_sets() -> None:
    real, fake = randn(30, 4), randn(40, 4, seed=1) + 0.5
    singles = [kid(real, fake, subset_size=15, seed=seed, num_subsets=1) for seed in range(100)]
    standard_error = float(np.std(singles)) / math.sqrt(400)
    # Both sets whole, of unequal size, have the expectation of their subsets.
    assert standard_error > 0
    assert kid(real, fake, subset_size=15, seed=0, num_subsets=400) == pytest.approx(
        mmd(real, fake), abs=4 * standard_error
    )


def test_kid_has_no_bias_of_few_images_and_rises_with_the_distance() -> None:
    alike = [kid(randn(20, 8, seed=s), randn(20, 8, seed=s + 50), subset_size=20, seed=0) for s in range(40)]
    assert min(alike) < 0
    assert abs(np.mean(alike)) < 3 * np.std(alike) / math.sqrt(40)
    real, fake = randn(50, 8), randn(50, 8, seed=1)
    moved = [kid(real, fake + shift, subset_size=25, seed=0) for shift in (0.0, 0.5, 1.0, 2.0)]
    assert moved == sorted(moved)


def test_kid_depends_on_its_seed_alone_and_leaves_other_draws_as_they_were() -> None:
    real, fake = randn(30, 4), randn(30, 4, seed=1)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = kid(real, fake, subset_size=10, seed=5)
    assert torch.equal(torch.rand(3), expected)
    assert kid(real, fake, subset_size=10, seed=5) == first
    assert kid(real, fake, subset_size=10, seed=6) != first


def test_sets_that_cannot_be_compared_are_refused() -> None:
    real = randn(9, 3)
    for fake in (randn(9, 2), randn(9), randn(1, 3), randn(9, 3, 1)):
        with pytest.raises(ValueError, match=r"expected \(N, D\) and \(M, D\)"):
            fid(real, fake)
        with pytest.raises(ValueError, match=r"expected \(N, D\) and \(M, D\)"):
            kid(real, fake, subset_size=2, seed=0)
    for fake in (real * math.nan, real * math.inf):
        with pytest.raises(ValueError, match="not finite"):
            fid(real, fake)
        with pytest.raises(ValueError, match="not finite"):
            kid(fake, real, subset_size=2, seed=0)


@pytest.mark.parametrize(("subset_size", "num_subsets"), [(1, 5), (10, 5), (3, 0)])
def test_subsets_that_cannot_be_drawn_are_refused(subset_size: int, num_subsets: int) -> None:
    with pytest.raises(ValueError, match="expected 2 to 9 and at least 1"):
        kid(randn(9, 3), randn(12, 3), subset_size=subset_size, seed=0, num_subsets=num_subsets)
