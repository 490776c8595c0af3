"""How far an energy's gradient moves each sample, and when.

Shapes: B samples, latents (B, C, H, W). Every size is per sample, so that a sample does not depend on its batch mates.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

RULES = ("clean", "noise", "step")
SIZINGS = ("normalized", "needed", "raw")


@dataclass(frozen=True)
class Guidance:
    """When and how an energy steers a sampler.

    Attributes:
        scale: 0: not at all. In units of the reference for sizing "normalized" and "needed", else a plain factor.
        rule: what is differentiated and moved. "clean": x0 by the gradient in x0, the network held constant (MPGD).
            "noise": the network's output, published for noise, by the gradient in x through the network (Universal
            Guidance). "step": the next x by that gradient (FreeDoM).
        form: how a displacement of x0 is handed on, see `clean_images.FORMS`; of rule "clean".
        sizing: "normalized": every sample moves by scale x reference. "needed": at most that far, and no further than
            takes the energy to its margin if it falls linearly. "raw": scale x gradient.
        reference: "cfg": rms of what classifier-free guidance adds, where both predictions are known, else as "state".
            "state": rms of what is moved.
        start, end: guided steps, as shares of all steps: from `start` to before `end`.
        every: of those, every n-th.
        travel: times each step of the travel window is taken, noised back in between; 1: once. Window as above.
    """

    scale: float = 0.0
    rule: str = "clean"
    form: str = "keep_noise"
    sizing: str = "normalized"
    reference: str = "cfg"
    start: float = 0.0
    end: float = 1.0
    every: int = 1
    travel: int = 1
    travel_start: float = 0.0
    travel_end: float = 1.0

    def is_guided(self, step: int, num_steps: int) -> bool:
        """Whether a step is guided."""
        return self.scale != 0 and step in guided_steps(num_steps, self.start, self.end, self.every)

    def repeats(self, step: int, num_steps: int) -> int:
        """How often a step is taken."""
        if not self.scale or self.travel == 1:
            return 1
        return self.travel if step in guided_steps(num_steps, self.travel_start, self.travel_end) else 1


def guided_steps(num_steps: int, start: float, end: float, every: int = 1) -> range:
    """Steps of a window given as shares of all steps; their number does not depend on a sampler's time steps."""
    return range(round(start * num_steps), round(end * num_steps), every)


def rms(x: Tensor) -> Tensor:
    """Root of the mean square of each sample, (B, 1, 1, 1)."""
    return x.square().mean(dim=tuple(range(1, x.ndim)), keepdim=True).sqrt()


def usable(gradient: Tensor) -> Tensor:
    """Which samples' gradients (B, …) can be followed, (B,) bool: all entries finite, and not all 0."""
    flat = gradient.flatten(1)
    return flat.isfinite().all(dim=1) & (flat != 0).any(dim=1)


def displacement(
    gradient: Tensor, loss: Tensor, reference: Tensor, *, scale: float | Tensor, sizing: str
) -> tuple[Tensor, Tensor]:
    """Where each sample moves to lower its loss: (displacement (B, C, H, W), moved (B,) bool).

    Args:
        gradient: (B, C, H, W) of the loss.
        loss: (B,), above its margin if it has one.
        reference: (B, 1, 1, 1), the length that `scale` is a share of; unused for sizing "raw".
        scale: one for all or (B, 1, 1, 1); a negative one raises the loss.
        sizing: see `Guidance`.

    A sample whose gradient is 0 or not finite stays where it is.
    Source: normalizing by the displacement of classifier-free guidance follows Yu et al. 2023 (FreeDoM,
    arXiv:2303.09833). Deviations: per sample instead of over the batch, in x0, and "needed", which is the step of
    Polyak 1969 within that radius.
    """
    if sizing not in SIZINGS:
        raise ValueError(f"sizing {sizing!r}; known: {', '.join(SIZINGS)}")
    moved = usable(gradient) & loss.isfinite()
    expanded = moved[:, None, None, None]
    gradient = torch.where(expanded, gradient, torch.zeros_like(gradient))
    if sizing == "raw":
        return -scale * gradient, moved
    length = torch.where(expanded, rms(gradient), torch.ones_like(reference))
    size = scale * reference
    if sizing == "needed":
        # Along -g / rms(g) the loss falls by N rms(g) per unit of rms, N the entries of a sample.
        needed = torch.where(moved, loss, torch.zeros_like(loss))[:, None, None, None] / (gradient[0].numel() * length)
        size = torch.minimum(size.abs(), needed) * size.sign()
    return -size * gradient / length, moved
