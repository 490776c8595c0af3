"""The guided loop on a problem with a known answer: a Gaussian, whose denoiser is exact, and a quadratic energy."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from prism_ray.methods.diffusion.clean_images import Level
from prism_ray.methods.diffusion.guidance import Guidance, displacement, guided_steps, usable
from prism_ray.methods.diffusion.sampling import Cfg, Energy, sample

STEPS, SHAPE = 10, (6, 2, 4, 4)
ALPHAS = torch.linspace(0.02, 0.98, STEPS, dtype=torch.float64).tolist()
FULL = Guidance(scale=0.1, reference="state")


class Ddim:
    """Deterministic DDIM over ten noise levels; counts its steps."""

    num_steps = STEPS

    def __init__(self) -> None:
        self.taken: list[int] = []
        self.again: list[bool] = []
        self.back: list[int] = []

    def level(self, step: int) -> Level:
        return Level("epsilon", math.sqrt(ALPHAS[step]), math.sqrt(1 - ALPHAS[step]))

    def model_input(self, step: int, x: Tensor) -> Tensor:
        return x

    def advance(self, step: int, output: Tensor, x: Tensor, *, again: bool = False) -> Tensor:
        self.taken.append(step)
        self.again.append(again)
        after = ALPHAS[step + 1] if step + 1 < STEPS else 1.0
        return math.sqrt(after) * self.level(step).clean(x, output) + math.sqrt(1 - after) * output

    def go_back(self, step: int, x: Tensor) -> Tensor:
        self.back.append(step)
        return x


class Denoiser:
    """The exact noise in a sample of data N(mean, 0.25); without a condition the mean is 0. Keeps what it returned."""

    def __init__(self, mean: float = 1.0) -> None:
        self.mean = mean
        self.outputs: list[Tensor] = []
        self.calls: list[bool] = []

    def __call__(self, step: int, x: Tensor, both: bool) -> tuple[Tensor, Tensor | None]:
        self.calls.append(both)
        level = Ddim().level(step)

        def noise(mean: float) -> Tensor:
            variance = level.signal**2 * 0.25 + level.noise**2
            return level.noise * (x - level.signal * mean) / variance

        self.outputs.append(noise(self.mean))
        return self.outputs[-1], noise(0.0) if both else None


def start() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def towards(target: float) -> Energy:
    return lambda clean: (clean - target).square().flatten(1).mean(dim=1)


NEAR_THREE = towards(3.0)


def run(guidance: Guidance, *, x: Tensor | None = None, energy: Energy | None = NEAR_THREE) -> Tensor:
    start_at = start() if x is None else x
    return sample(start_at, denoise=Denoiser(), steps=Ddim(), cfg=Cfg(), guidance=guidance, energy=energy)[0]


def plain() -> Tensor:
    x, steps, denoiser = start(), Ddim(), Denoiser()
    for step in range(STEPS):
        x = steps.advance(step, denoiser(step, x, False)[0], x)
    return x


RULES = [
    pytest.param(FULL, id="clean, noise kept"),
    pytest.param(replace(FULL, form="rederive_noise"), id="clean, noise rederived"),
    pytest.param(replace(FULL, sizing="needed"), id="clean, as far as needed"),
    pytest.param(replace(FULL, sizing="raw", scale=1.0), id="clean, raw"),
    pytest.param(replace(FULL, rule="noise"), id="noise"),
    pytest.param(replace(FULL, rule="noise", sizing="raw", scale=5.0), id="noise, raw"),
    pytest.param(replace(FULL, rule="step", scale=0.03), id="step"),
]


@pytest.mark.parametrize("guidance", RULES)
def test_scale_zero_is_the_plain_sampler_bit_for_bit(guidance: Guidance) -> None:
    assert torch.equal(run(replace(guidance, scale=0.0)), plain())


@pytest.mark.parametrize("guidance", RULES)
def test_every_rule_lowers_every_samples_energy_and_a_negative_scale_raises_it(guidance: Guidance) -> None:
    energy = towards(3.0)
    unguided = energy(plain())
    assert (energy(run(guidance)) < unguided).all()
    if guidance.sizing != "raw":
        assert (energy(run(replace(guidance, scale=-guidance.scale / 4))) > unguided).all()


@pytest.mark.parametrize("guidance", RULES)
def test_more_scale_means_less_energy(guidance: Guidance) -> None:
    energies = [towards(3.0)(run(replace(guidance, scale=s * guidance.scale))).mean() for s in (0.0, 0.25, 0.5)]
    assert energies[0] > energies[1] > energies[2]


@pytest.mark.parametrize("guidance", RULES)
def test_a_sample_does_not_depend_on_its_batch_mates(guidance: Guidance) -> None:
    alone = start()
    alone[1:] = 7.0
    assert torch.equal(run(guidance)[0], run(guidance, x=alone)[0])


def test_outside_its_window_guidance_is_inactive() -> None:
    guidance = replace(FULL, start=0.3, end=0.7, every=2)
    denoiser, steps = Denoiser(), Ddim()
    _, record = sample(start(), denoise=denoiser, steps=steps, cfg=Cfg(), guidance=guidance, energy=towards(3.0))
    assert list(guided_steps(STEPS, 0.3, 0.7, 2)) == [3, 5]
    assert record.guided.tolist() == [2] * SHAPE[0]
    assert torch.equal(run(replace(FULL, start=1.0)), plain())


def test_the_shortcut_builds_no_graph_through_the_network() -> None:
    denoiser = Denoiser()
    sample(start(), denoise=denoiser, steps=Ddim(), cfg=Cfg(2.0), guidance=FULL, energy=towards(3.0))
    assert not any(output.requires_grad for output in denoiser.outputs)


def test_the_other_rules_differentiate_through_the_network() -> None:
    denoiser = Denoiser()
    sample(
        start(), denoise=denoiser, steps=Ddim(), cfg=Cfg(), guidance=replace(FULL, rule="noise"), energy=towards(3.0)
    )
    assert all(output.requires_grad for output in denoiser.outputs)


def test_a_gradient_that_is_not_finite_is_skipped_and_counted_for_that_sample_alone() -> None:
    def broken(clean: Tensor) -> Tensor:
        energy = towards(3.0)(clean)
        return torch.cat([energy[:1] * torch.nan, energy[1:]])

    result, record = sample(start(), denoise=Denoiser(), steps=Ddim(), cfg=Cfg(), guidance=FULL, energy=broken)
    assert torch.equal(result[0], plain()[0])
    assert torch.equal(result[1:], run(FULL)[1:])
    assert record.skipped.tolist() == [STEPS, *[0] * (SHAPE[0] - 1)]


def test_below_the_margin_nothing_moves() -> None:
    result, record = sample(
        start(),
        denoise=Denoiser(),
        steps=Ddim(),
        cfg=Cfg(),
        guidance=FULL,
        energy=lambda clean: (towards(3.0)(clean) - 100.0).clamp(min=0),
    )
    torch.testing.assert_close(result, plain(), rtol=0, atol=0)
    assert record.satisfied.tolist() == [STEPS] * SHAPE[0]
    assert record.skipped.tolist() == [0] * SHAPE[0]


def test_as_far_as_needed_does_not_overshoot_a_linear_energy() -> None:
    gradient = torch.full((1, 1, 2, 2), 2.0)
    shift, _ = displacement(gradient, torch.tensor([0.4]), torch.ones(1, 1, 1, 1), scale=10.0, sizing="needed")
    assert (gradient * shift).sum().item() == pytest.approx(-0.4)
    short, _ = displacement(gradient, torch.tensor([0.4]), torch.ones(1, 1, 1, 1), scale=0.01, sizing="needed")
    assert short.square().mean().sqrt().item() == pytest.approx(0.01)


def test_the_reference_is_what_classifier_free_guidance_adds() -> None:
    """With the scale 1 the clean image moves by as much as classifier-free guidance moves it."""
    moved: list[Tensor] = []

    class Watched(Ddim):
        def advance(self, step: int, output: Tensor, x: Tensor, *, again: bool = False) -> Tensor:
            moved.append(self.level(step).clean(x, output))
            return super().advance(step, output, x, again=again)

    guidance = Guidance(scale=1.0, end=0.1)
    sample(start(), denoise=Denoiser(), steps=Watched(), cfg=Cfg(2.0), guidance=guidance, energy=towards(30.0))
    level, (conditional, unconditional) = Ddim().level(0), Denoiser()(0, start(), True)
    assert unconditional is not None
    combined = level.clean(start(), unconditional + 2.0 * (conditional - unconditional))
    added = 2.0 * (level.clean(start(), conditional) - level.clean(start(), unconditional))
    assert (moved[0] - combined).square().mean().item() == pytest.approx(added.square().mean().item())


def test_classifier_free_guidance_costs_a_second_pass_only_in_its_interval() -> None:
    denoiser = Denoiser()
    sample(start(), denoise=denoiser, steps=Ddim(), cfg=Cfg(3.0, 0.2, 0.5), guidance=Guidance())
    assert denoiser.calls == [step in (2, 3, 4) for step in range(STEPS)]


def test_a_pause_changes_nothing() -> None:
    steps = Ddim()
    half, _ = sample(start(), denoise=Denoiser(), steps=steps, cfg=Cfg(), guidance=FULL, energy=towards(3.0), until=5)
    whole, _ = sample(half, denoise=Denoiser(), steps=steps, cfg=Cfg(), guidance=FULL, energy=towards(3.0), first=5)
    assert torch.equal(whole, run(FULL))
    assert steps.taken == list(range(STEPS))


def test_time_travel_takes_the_steps_of_its_window_again() -> None:
    steps = Ddim()
    guidance = replace(FULL, rule="step", travel=3, travel_start=0.4, travel_end=0.6)
    sample(start(), denoise=Denoiser(), steps=steps, cfg=Cfg(), guidance=guidance, energy=towards(3.0))
    assert steps.taken == [0, 1, 2, 3, 4, 4, 4, 5, 5, 5, 6, 7, 8, 9]
    assert [step for step, again in zip(steps.taken, steps.again, strict=True) if again] == [4, 4, 5, 5]
    assert steps.back == [4, 4, 5, 5]


def test_gradients_of_zero_or_not_finite_are_not_usable() -> None:
    gradient = torch.zeros(4, 1, 2, 2)
    gradient[1, 0, 0, 0] = torch.inf
    gradient[2, 0, 0, 0] = torch.nan
    gradient[3, 0, 0, 0] = 1e-30
    assert usable(gradient).tolist() == [False, False, False, True]


@pytest.mark.parametrize(
    ("guidance", "named"),
    [
        (replace(FULL, rule="magic"), "magic"),
        (replace(FULL, sizing="magic"), "magic"),
        (replace(FULL, rule="noise", sizing="needed"), "needed"),
    ],
)
def test_what_does_not_exist_is_refused_by_name(guidance: Guidance, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        run(guidance)


def test_a_scale_without_an_energy_is_refused() -> None:
    with pytest.raises(ValueError, match="energy"):
        run(FULL, energy=None)
