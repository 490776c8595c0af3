"""The sampling loop: a diffusion sampler whose clean-image estimate is steered by an energy.

With scale 0 it computes what a plain sampler computes, bit for bit. Shapes: B samples, latents (B, C, H, W).
Sources: Bansal et al. 2023 (arXiv:2302.07121), Yu et al. 2023 (FreeDoM, arXiv:2303.09833), He et al. 2024 (MPGD,
arXiv:2311.16424), Kynkäänniemi et al. 2024 (guidance in an interval, arXiv:2404.07724).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from prism_ray.methods.diffusion.clean_images import FORMS, Level
from prism_ray.methods.diffusion.guidance import RULES, Guidance, displacement, guided_steps, rms


class Steps(Protocol):
    """A sampler's steps, from noise to a clean sample; see `models.samplers`."""

    @property
    def num_steps(self) -> int: ...
    def level(self, step: int) -> Level: ...
    def model_input(self, step: int, x: Tensor) -> Tensor: ...
    def advance(self, step: int, output: Tensor, x: Tensor, *, again: bool = False) -> Tensor: ...
    def go_back(self, step: int, x: Tensor) -> Tensor: ...


Denoise = Callable[[int, Tensor, bool], tuple[Tensor, Tensor | None]]
"""(step, scaled sample, with the unconditional one too) → network output for the condition, and without it or None."""

Energy = Callable[[Tensor], Tensor]
"""x0 (B, C, H, W) → what is lowered, (B,), differentiable and for each sample on its own."""


@dataclass(frozen=True)
class Cfg:
    """Classifier-free guidance: scale (1: none), in steps from `start` to before `end`, as shares of all steps."""

    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def is_on(self, step: int, num_steps: int) -> bool:
        return self.scale > 1 and step in guided_steps(num_steps, self.start, self.end)


@dataclass
class Record:
    """What happened to each sample."""

    guided: Tensor  # (B,) times its energy was looked at
    satisfied: Tensor  # (B,) of those, times its loss was 0 already
    skipped: Tensor  # (B,) times its gradient was 0 or not finite
    loss: Tensor  # (B,) at the last guided step, NaN if none
    clean: Tensor  # (B, C, H, W) x0 as the last step estimated it, before guidance


def sample(
    x: Tensor,
    *,
    denoise: Denoise,
    steps: Steps,
    cfg: Cfg,
    guidance: Guidance,
    energy: Energy | None = None,
    strengths: Tensor | None = None,
    first: int = 0,
    until: int | None = None,
) -> tuple[Tensor, Record]:
    """Take a sample from step `first` to before step `until` (None: to the end).

    Args:
        x: noise of the sampler's initial scale, or what an earlier call returned.
        denoise: the network.
        steps: the sampler.
        cfg: classifier-free guidance.
        guidance: energy guidance; needs `energy` unless its scale is 0.
        energy: what is lowered.
        strengths: (B,) factors of the guidance scale of each sample; None: 1.
        first, until: steps.

    Returns:
        The sample, and what guidance did.
    """
    if guidance.rule not in RULES:
        raise ValueError(f"rule {guidance.rule!r}; known: {', '.join(RULES)}")
    if guidance.scale and energy is None:
        raise ValueError("guidance with a scale needs an energy")
    if guidance.sizing == "needed" and guidance.rule != "clean":
        raise ValueError("sizing 'needed' is measured in x0, so it is of rule 'clean' only")
    count = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    record = Record(count, count.clone(), count.clone(), torch.full((len(x),), torch.nan, device=x.device), x)
    num = steps.num_steps
    for step in range(first, num if until is None else until):
        repeats = guidance.repeats(step, num)
        for repeat in range(repeats):
            if energy is not None and guidance.is_guided(step, num):
                following = _guided_step(
                    step, x, denoise, steps, cfg, guidance, energy, record, strengths, again=repeat > 0
                )
            else:
                with torch.no_grad():
                    output, _, _ = _predict(step, x, denoise, steps, cfg)
                    record.clean = steps.level(step).clean(x, output)
                    following = steps.advance(step, output, x, again=repeat > 0)
            x = steps.go_back(step, following) if repeat < repeats - 1 else following
    return x, record


def _predict(step: int, x: Tensor, denoise: Denoise, steps: Steps, cfg: Cfg) -> tuple[Tensor, Tensor, Tensor | None]:
    """The network's output with classifier-free guidance, and both parts of it."""
    both = cfg.is_on(step, steps.num_steps)
    conditional, unconditional = denoise(step, steps.model_input(step, x), both)
    if unconditional is None:
        return conditional, conditional, None
    return unconditional + cfg.scale * (conditional - unconditional), conditional, unconditional


def _guided_step(
    step: int,
    x: Tensor,
    denoise: Denoise,
    steps: Steps,
    cfg: Cfg,
    guidance: Guidance,
    energy: Energy,
    record: Record,
    strengths: Tensor | None,
    *,
    again: bool,
) -> Tensor:
    """One step with energy guidance."""
    level = steps.level(step)
    through_network = guidance.rule != "clean"
    with torch.set_grad_enabled(through_network):
        moving = x.detach().requires_grad_(through_network)
        output, conditional, unconditional = _predict(step, moving, denoise, steps, cfg)
    clean = level.clean(moving, output)
    if not through_network:
        moving = clean = clean.detach().requires_grad_()
    with torch.enable_grad():
        loss = energy(clean)
    gradient = torch.autograd.grad(loss.sum(), moving)[0]
    loss, clean, output = loss.detach(), clean.detach(), output.detach()
    parts = (conditional.detach(), None if unconditional is None else unconditional.detach())
    reference = _reference(level, parts, cfg, guidance, state=clean if not through_network else x)
    scale = guidance.scale if strengths is None else guidance.scale * strengths[:, None, None, None]
    shift, moved = displacement(gradient.detach(), loss, reference, scale=scale, sizing=guidance.sizing)
    record.clean = clean
    record.guided += 1
    record.satisfied += loss == 0
    record.skipped += ~moved & (loss != 0)
    record.loss.copy_(loss)
    with torch.no_grad():
        if guidance.rule == "step":
            return steps.advance(step, output, x, again=again) + shift
        if guidance.rule == "noise":
            # The output changes by -shift (raw: also times the noise, as published), which is this much in x0.
            shift = shift * abs(level.coefficients[1]) * (level.noise if guidance.sizing == "raw" else 1.0)
        form = FORMS["rederive_noise" if guidance.rule == "noise" else guidance.form]
        x, output = form(level, x, output, shift)
        return steps.advance(step, output, x, again=again)


def _reference(
    level: Level, parts: tuple[Tensor, Tensor | None], cfg: Cfg, guidance: Guidance, *, state: Tensor
) -> Tensor:
    """The length (B, 1, 1, 1) that the scale is a share of: in x0 for rule "clean", in the output for the others."""
    conditional, unconditional = parts
    if guidance.reference == "state" or unconditional is None:
        return rms(state)
    added = cfg.scale * rms(conditional - unconditional)
    return added * abs(level.coefficients[1]) if guidance.rule == "clean" else added
