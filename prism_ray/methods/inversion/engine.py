"""The optimizer of inversion: a batch of images descends the objective from its start to its last iterate.

Shapes: B images, C channels, S x S pixels. Spaces: images enter and leave as pixels in [0, 1] and teachers see pixels;
Adam moves X = (pixels - mean) / std with the data set's mean and std, so `lr` is in units of that std.
Source: PRISM (arXiv:2511.09905) and SRe2L (arXiv:2306.13092), released programs: Adam with fresh state per batch,
cosine learning rate without warm-up, X clamped to the valid box after each step, the last iterate is the result.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from prism_ray.methods.inversion.augment import Augmentations, augment
from prism_ray.methods.inversion.objective import LossTerms, inversion_loss
from prism_ray.methods.schedules import cosine_lr

ADAM_EPS = 1e-8


class LossRecord(NamedTuple):
    """Loss terms at an iteration, before its step and on its augmented images; see `LossTerms`."""

    iteration: int
    ce: float
    bn: float


@dataclass(frozen=True)
class Inversion:
    """A finished batch. The losses are those of the last iteration, NaN where there was none."""

    images: Tensor  # (B, C, S, S), pixels in [0, 1]
    loss_ce: float  # nats per image
    loss_bn: float  # mean over the statistics teachers, not weighted
    history: tuple[LossRecord, ...]  # every `log_every` iterations and the last one; empty without logging


def invert(
    initial: Tensor,
    class_ids: Tensor,
    *,
    primary: str,
    teachers: Mapping[str, nn.Module],
    statistics_teachers: Callable[[int], Sequence[str]],
    num_iterations: int,
    lr: float,
    adam_betas: tuple[float, float],
    mean: Sequence[float],
    std: Sequence[float],
    augmentations: Augmentations,
    antialias: bool,
    bn_weight: float,
    first_bn_multiplier: float,
    count_bn_free_teachers: bool,
    log_every: int = 0,
) -> Inversion:
    """Optimize a batch of images. A pure function: no random numbers, and the teachers stay as they are.

    The device is synchronized once, at the end.

    Args:
        initial: (B, C, S, S), pixels; noise may leave [0, 1] until the first step clamps it.
        class_ids: (B,), int64.
        primary: name in `teachers` of the logit teacher.
        teachers: frozen networks in eval mode, pixels -> logits.
        statistics_teachers: iteration -> names of the set whose statistics are matched.
        num_iterations: steps; 0 returns `initial` bit for bit.
        lr: learning rate of step 0.
        adam_betas: Adam's.
        mean: of the data set, one number per channel, pixels in [0, 1].
        std: likewise, above 0.
        augmentations: at least `num_iterations` of them.
        antialias: see `augment`.
        bn_weight: r, see `inversion_loss`; likewise the next two.
        first_bn_multiplier: weight of each teacher's first batch-norm layer.
        count_bn_free_teachers: divide the statistics term also by teachers without batch norm.
        log_every: iterations between records of `history`; 0 keeps none.

    Raises:
        ValueError: shapes or counts disagree, a teacher is unknown, or a set has no batch norm.
        FloatingPointError: an image or loss is not finite at the end.
    """
    _check(initial, class_ids, mean, std, augmentations, num_iterations)
    for name, teacher in teachers.items():
        _assert_frozen(name, teacher)
    if num_iterations == 0:
        return Inversion(initial.detach().clone(), math.nan, math.nan, ())

    shift, scale = (initial.new_tensor(list(values)).view(-1, 1, 1) for values in (mean, std))
    lowest, highest = (0 - shift) / scale, (1 - shift) / scale
    x = ((initial.detach() - shift) / scale).requires_grad_()
    optimizer = torch.optim.Adam([x], lr=lr, betas=adam_betas, eps=ADAM_EPS)
    logged: dict[int, LossTerms] = {}
    for iteration in range(num_iterations):
        terms = inversion_loss(
            augment(x, augmentations, iteration, antialias=antialias) * scale + shift,
            class_ids,
            primary=_teacher(primary, teachers),
            statistics_teachers=[_teacher(name, teachers) for name in statistics_teachers(iteration)],
            bn_weight=bn_weight,
            first_bn_multiplier=first_bn_multiplier,
            count_bn_free_teachers=count_bn_free_teachers,
        )
        (x.grad,) = torch.autograd.grad(terms.total, x)
        optimizer.param_groups[0]["lr"] = cosine_lr(lr, step=iteration, total=num_iterations)
        optimizer.step()
        with torch.no_grad():
            x.clamp_(lowest, highest)
        if iteration == num_iterations - 1 or (log_every and iteration % log_every == 0):
            logged[iteration] = LossTerms(*(term.detach() for term in terms))

    images = (x.detach() * scale + shift).clamp(0, 1)
    history = _records(logged)
    _check_finite(images, history[-1], num_iterations)
    return Inversion(images, history[-1].ce, history[-1].bn, history if log_every else ())


def to_uint8(pixels: Tensor) -> Tensor:
    """Pixels in [0, 1] as bytes, to the nearest. Deviation: the released program truncates."""
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8)


def _teacher(name: str, teachers: Mapping[str, nn.Module]) -> nn.Module:
    if name not in teachers:
        raise ValueError(f"teacher {name!r} is unknown; known: {', '.join(sorted(teachers))}")
    return teachers[name]


def _records(logged: Mapping[int, LossTerms]) -> tuple[LossRecord, ...]:
    """The logged terms as numbers, in one transfer from the device."""
    values = torch.stack([torch.stack((terms.ce, terms.bn)) for terms in logged.values()]).tolist()
    return tuple(LossRecord(iteration, ce, bn) for iteration, (ce, bn) in zip(logged, values, strict=True))


def _check(
    initial: Tensor,
    class_ids: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    augmentations: Augmentations,
    num_iterations: int,
) -> None:
    if initial.ndim != 4 or not initial.is_floating_point():
        raise ValueError(
            f"initial: {initial.dtype} of shape {tuple(initial.shape)}; expected float images (B, C, S, S)"
        )
    if class_ids.shape != initial.shape[:1] or class_ids.dtype != torch.int64:
        raise ValueError(
            f"class_ids: {class_ids.dtype} of shape {tuple(class_ids.shape)}; expected int64 ({initial.shape[0]},)"
        )
    if not len(mean) == len(std) == initial.shape[1]:
        raise ValueError(f"mean, std: {len(mean)} and {len(std)} channels; expected {initial.shape[1]}")
    if min(std) <= 0:
        raise ValueError(f"std={list(std)}: not allowed; expected numbers above 0")
    if not 0 <= num_iterations <= len(augmentations):
        raise ValueError(f"num_iterations={num_iterations}: expected 0 to the {len(augmentations)} augmentations drawn")


def _assert_frozen(name: str, teacher: nn.Module) -> None:
    assert not any(module.training for module in teacher.modules()), f"teacher {name!r} is in training mode"
    assert not any(p.requires_grad for p in teacher.parameters()), f"teacher {name!r} has trainable parameters"


def _check_finite(images: Tensor, last: LossRecord, num_iterations: int) -> None:
    # An undefined gradient leaves NaN in X for good, so looking once, at the end, finds it without syncs in between.
    if not (math.isfinite(last.ce) and math.isfinite(last.bn) and bool(images.isfinite().all())):
        raise FloatingPointError(
            f"images are not finite after {num_iterations} iterations (last cross-entropy {last.ce:g}, statistics "
            f"{last.bn:g}); lower the learning rate or the statistics weight, or check the teachers' weights"
        )
