"""Energies of a teacher: identities, bounds, margins."""

import math

import pytest
import torch
from nets import ConvBnNet
from torch import Tensor

from prism_ray.methods.diffusion.energies import (
    Guide,
    free_energy,
    guidance_loss,
    hinge,
    joint_energy,
    margin_of,
    teacher_energy,
)

TEMPERATURES = (0.1, 1.0, 10.0)


def logits(*, dtype: torch.dtype = torch.float64, scale: float = 20.0) -> Tensor:
    return scale * torch.randn(64, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_free_energy_is_its_definition(temperature: float) -> None:
    f = logits(scale=2.0)
    expected = -temperature * (f / temperature).exp().sum(dim=1).log()
    torch.testing.assert_close(free_energy(f, temperature=temperature), expected, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_single_precision_loses_only_its_last_bit(temperature: float) -> None:
    f = logits(dtype=torch.float32)
    exact = free_energy(f.double(), temperature=temperature)
    torch.testing.assert_close(free_energy(f, temperature=temperature).double(), exact, rtol=1e-6, atol=0)


def test_huge_logits_have_finite_energies() -> None:
    assert free_energy(torch.tensor([[1e4, -1e4], [-1e4, -1e4]]), temperature=0.1).isfinite().all()


def test_adding_to_all_logits_subtracts_from_the_energy() -> None:
    f = logits()
    torch.testing.assert_close(free_energy(f + 3.5), free_energy(f) - 3.5)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_free_energy_keeps_its_bounds(temperature: float) -> None:
    f = logits()
    energy, top = free_energy(f, temperature=temperature), f.amax(dim=1)
    assert (energy <= -top + 1e-9).all()
    assert (energy >= -top - temperature * math.log(10) - 1e-9).all()


def test_at_low_temperature_the_energy_is_minus_the_largest_logit() -> None:
    f = logits()
    torch.testing.assert_close(free_energy(f, temperature=1e-3), -f.amax(dim=1), rtol=0, atol=1e-2)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_a_class_weight_of_one_is_the_joint_energy(temperature: float) -> None:
    f, y = logits(), torch.arange(64) % 10
    energy = teacher_energy(f, y, temperature=temperature, class_weight=1.0)
    torch.testing.assert_close(energy, joint_energy(f, y), rtol=1e-6, atol=1e-9)


def test_the_gradient_is_the_softmax_mean_of_the_logits_gradients() -> None:
    f = logits(scale=2.0).requires_grad_()
    (gradient,) = torch.autograd.grad(free_energy(f, temperature=2.0).sum(), f)
    torch.testing.assert_close(gradient, -(f / 2.0).softmax(dim=1).detach())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_gradient_through_decoder_and_teacher_matches_finite_differences(temperature: float) -> None:
    torch.manual_seed(0)
    decoder = torch.nn.Sequential(
        torch.nn.Conv2d(4, 6, 3, padding=1),
        torch.nn.SiLU(),
        torch.nn.Upsample(scale_factor=2),
        torch.nn.Conv2d(6, 3, 1),
    ).double()
    teacher = ConvBnNet().double().eval().requires_grad_(False)

    def energy(latents: Tensor) -> Tensor:
        return free_energy(teacher(decoder(latents / 0.18215) * 0.5 + 0.5), temperature=temperature)

    assert torch.autograd.gradcheck(energy, torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True))


def test_below_the_margin_nothing_is_left_to_gain() -> None:
    energies = torch.tensor([-9.0, -5.0, -1.0], requires_grad=True)
    loss = hinge(energies, -5.0)
    (gradient,) = torch.autograd.grad(loss.sum(), energies)
    assert loss.tolist() == [0.0, 0.0, 4.0]
    assert gradient[0] == 0
    assert gradient[2] == 1


def test_teachers_weigh_alike_whatever_the_scale_of_their_logits() -> None:
    torch.manual_seed(0)
    images, y = torch.rand(3, 3, 8, 8), torch.tensor([0, 1, 2])
    teacher = ConvBnNet().eval()
    one = guidance_loss(images, y, [Guide(teacher)])
    louder = Guide(lambda x: 100 * teacher(x), spread=100.0)
    # Of 100 times the logits the energy is about the largest, so only their order of size is compared.
    both = guidance_loss(images, y, [Guide(teacher), louder])
    assert (both.abs() < 2 * one.abs() + 1).all()


def test_the_margin_is_the_median_energy_of_samples_named_as_meant() -> None:
    energies = torch.tensor([-8.0, -6.0, -4.0, 0.0])
    margin, spread = margin_of(energies, torch.tensor([1, 1, 1, 0]), torch.tensor([1, 1, 1, 1]))
    assert margin == -6.0
    assert spread == pytest.approx(energies.double().std(correction=0).item())


def test_without_a_sample_named_as_meant_the_margin_is_of_all() -> None:
    margin, _ = margin_of(torch.tensor([-8.0, -6.0]), torch.tensor([0, 0]), torch.tensor([1, 1]))
    assert margin == -7.0


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature"):
        free_energy(logits(), temperature=temperature)
