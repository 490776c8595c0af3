import pytest
import torch
from torch import Tensor

from prism_ray.methods.inversion.regularizers import image_norm, spectrum_divergence, total_variation


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def divergence(images: Tensor, temperature: float = 4.0) -> Tensor:
    return spectrum_divergence(images, [torch.arange(len(images))], temperature=temperature)


# --- total variation and norm ---


def test_total_variation_has_its_golden_value():
    assert total_variation(torch.arange(9.0).view(1, 1, 3, 3)).item() == pytest.approx(21.79796, abs=5e-6)


def test_total_variation_of_constant_images_is_zero_with_a_finite_gradient():
    images = torch.full((2, 3, 4, 4), 0.3, requires_grad=True)
    variation = total_variation(images)
    assert variation.item() == 0
    (gradient,) = torch.autograd.grad(variation, images)
    assert gradient.isfinite().all()


def test_total_variation_is_the_same_for_mirrored_images_and_ignores_their_mean():
    images = seeded(2, 3, 5, 5)
    for same in (images.flip(-1), images.flip(-2), images.transpose(-1, -2), images + 7):
        torch.testing.assert_close(total_variation(same), total_variation(images), rtol=1e-9, atol=0)


def test_the_norm_of_images_is_the_mean_of_their_norms():
    images = torch.zeros(2, 1, 2, 2)
    images[0, 0, 0] = torch.tensor([3.0, 4])
    images[1, 0, 1, 1] = 7
    assert image_norm(images).item() == 6


# --- divergence of spectra ---


def test_two_identical_unit_images_have_the_golden_divergence():
    assert divergence(torch.ones(2, 1, 1, 1)).item() == pytest.approx(0.2192, abs=5e-5)


def test_single_images_and_orthogonal_images_of_one_norm_have_no_divergence():
    assert divergence(seeded(1, 3, 8, 8)).item() == 0
    assert divergence(3 * torch.eye(4).view(4, 1, 2, 2)).item() == pytest.approx(0, abs=1e-6)
    assert divergence(torch.tensor([[1.0, 0], [0, 3]]).view(2, 1, 1, 2)).item() > 0.01


def test_the_divergence_is_the_sum_over_classes_whatever_their_order():
    images = 0.2 * seeded(7, 3, 4, 4)
    groups = [torch.tensor([0, 3, 4]), torch.tensor([1]), torch.tensor([6, 2, 5])]
    parts = sum(divergence(images[rows]).item() for rows in groups)
    assert spectrum_divergence(images, groups, temperature=4.0).item() == pytest.approx(parts, rel=1e-9)
    shuffled = [groups[2].flip(0), groups[0], groups[1]]
    assert spectrum_divergence(images, shuffled, temperature=4.0).item() == pytest.approx(parts, rel=1e-9)


def test_the_divergence_matches_its_definition_and_has_no_gradient_through_the_softened_side():
    images = (0.2 * seeded(4, 1, 3, 3)).requires_grad_()
    units = images.flatten(1)
    eigenvalues = torch.linalg.eigvals(units @ units.T).real
    q = eigenvalues.softmax(0)
    p = (eigenvalues.detach() / 4).softmax(0)
    expected = (p * (p.log() - q.log())).sum()
    found = divergence(images)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    gradients = [torch.autograd.grad(value, images)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-12)


def test_its_gradient_flattens_the_spectrum_and_is_finite_for_identical_images():
    images = (0.3 * seeded(1, 3, 4, 4) + 0.05 * seeded(3, 3, 4, 4, seed=1)).requires_grad_()

    def largest_share(x: Tensor) -> float:
        eigenvalues = torch.linalg.eigvalsh(x.flatten(1) @ x.flatten(1).T)
        return (eigenvalues.max() / eigenvalues.sum()).item()

    (gradient,) = torch.autograd.grad(divergence(images), images)
    assert largest_share(images.detach() - 0.1 * gradient) < largest_share(images.detach())
    same = 0.3 * seeded(1, 3, 4, 4).expand(3, -1, -1, -1).clone().requires_grad_()
    assert torch.autograd.grad(divergence(same), same)[0].isfinite().all()


def test_larger_images_are_pooled_to_32_pixels_and_smaller_ones_are_not():
    small = 0.02 * seeded(3, 1, 32, 32)
    large = small.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)
    torch.testing.assert_close(divergence(large), divergence(small), rtol=1e-9, atol=0)
    tiny = 0.1 * seeded(3, 1, 5, 5)
    repeated = tiny.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)
    assert divergence(repeated).item() != pytest.approx(divergence(tiny).item(), rel=1e-2)
