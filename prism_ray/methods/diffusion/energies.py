"""Energies of images under a teacher: how far outside of what it was trained on they lie.

Shapes: B images, K classes. Logits f(x) are (B, K), in single precision or better: in bfloat16 the energy of logits of
20 standard deviations is off by 0.2. Low energy: inside.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def free_energy(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """E(x) = -T logsumexp(f(x) / T), (B,).

    Between -max f - T log K and -max f. Adding c to all logits subtracts c.
    Source: Liu et al. 2020 (Energy-based Out-of-distribution Detection, arXiv:2010.03759), equation 4.
    """
    _check(logits, temperature)
    return -temperature * torch.logsumexp(logits / temperature, dim=1)


def joint_energy(logits: Tensor, class_ids: Tensor) -> Tensor:
    """E(x, y) = -f_y(x), (B,). Source: Grathwohl et al. 2020 (JEM, arXiv:1912.03263)."""
    _check(logits, 1.0)
    return -logits.gather(1, class_ids[:, None])[:, 0]


def teacher_energy(logits: Tensor, class_ids: Tensor, *, temperature: float = 1.0, class_weight: float = 0.0) -> Tensor:
    """E(x) + w CE(f(x) / T, y) T, (B,): the free energy for w = 0, exactly the joint energy for w = 1 and T = 1.

    Source: this project. -T log p(y|x) at temperature T is -f_y - E(x), so that w = 1 gives -f_y at any T: one weight
    covers both readings of "energy of a teacher".
    """
    energy = free_energy(logits, temperature=temperature)
    if not class_weight:
        return energy
    # T CE(f / T, y) = E(x, y) - E(x), without its rounding error where p(y|x) is near 1.
    cross_entropy = torch.nn.functional.cross_entropy(logits / temperature, class_ids, reduction="none")
    return energy + class_weight * temperature * cross_entropy


def hinge(energies: Tensor, margin: float | None) -> Tensor:
    """max(E - m, 0): nothing is gained below the margin, where an energy is bought with texture; None: E itself.

    Source: the margins of Liu et al. 2020, section 3.3, there a training loss.
    """
    return energies if margin is None else (energies - margin).clamp(min=0)


@dataclass(frozen=True)
class Guide:
    """A teacher that guides: images (B, 3 or 1, H, W) in [0, 1], maybe a little beyond → logits, with its margin.

    `spread` is the size of its energies' differences; its term is divided by it, so that those of an ensemble weigh
    alike.
    """

    teacher: Callable[[Tensor], Tensor]
    margin: float | None = None
    spread: float = 1.0


def guidance_loss(
    images: Tensor,
    class_ids: Tensor,
    guides: Sequence[Guide],
    *,
    temperature: float = 1.0,
    class_weight: float = 0.0,
) -> Tensor:
    """What guidance lowers, (B,): the mean over teachers of their energies above their margins."""
    terms = [
        hinge(
            teacher_energy(
                in_single(guide.teacher(images)), class_ids, temperature=temperature, class_weight=class_weight
            ),
            guide.margin,
        )
        / guide.spread
        for guide in guides
    ]
    return torch.stack(terms).mean(dim=0)


def in_single(values: Tensor) -> Tensor:
    """Values in single precision, or better if they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def margin_of(energies: Tensor, predicted: Tensor, class_ids: Tensor, *, quantile: float = 0.5) -> tuple[float, float]:
    """Margin and spread of a teacher from unguided samples, without real data: (margin, spread).

    The margin is a quantile of the energies (N,) of samples that the teacher names as they were meant; of all, if there
    is none. The spread is the standard deviation of all energies, at least 1e-6.
    Source: this project.
    """
    if (
        energies.ndim != 1
        or predicted.shape != energies.shape
        or class_ids.shape != energies.shape
        or not len(energies)
    ):
        shapes = f"{tuple(energies.shape)}, {tuple(predicted.shape)} and {tuple(class_ids.shape)}"
        raise ValueError(f"shapes {shapes}; expected (N,) thrice, of at least one sample")
    kept = energies[predicted == class_ids]
    chosen = (kept if len(kept) else energies).double()
    spread = energies.double().std(correction=0).item()
    return chosen.quantile(quantile).item(), max(spread, 1e-6)


def _check(logits: Tensor, temperature: float) -> None:
    if logits.ndim != 2:
        raise ValueError(f"logits of shape {tuple(logits.shape)}; expected (B, K)")
    if not temperature > 0:
        raise ValueError(f"temperature {temperature}; expected a number above 0")
