"""The objective of inversion: the primary teacher's cross-entropy plus batch-norm statistics of a set of teachers.

    L(X) = CE(phi_0(X), y) + r * mean_{phi in B} R_phi(X)
    R_phi(X) = sum_l w_l (||mean_l(X) - RM_l||_2 + ||var_l(X) - RV_l||_2)

over the inputs of phi's BatchNorm2d layers l, with running statistics RM, RV; w is `first_bn_multiplier` for the first
layer in module-traversal order and 1 for all others. With B = {phi_0} this is SRe2L's objective.

Shapes: B images, C channels, H x W feature map, K classes. Teachers are frozen, in eval mode, pixels -> logits.
Source: released programs of DeepInversion (arXiv:1912.08795), SRe2L (arXiv:2306.13092), PRISM (arXiv:2511.09905).
Deviations: a network runs once whatever its roles, one without batch norm never runs for statistics, and a network
whose logits nobody needs stops after its last batch norm (the same loss for less work); of a layer that runs twice in
a forward pass, the first input counts.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LossTerms(NamedTuple):
    """Scalars: `total` = `ce` + r * `bn`. `ce` in nats per image; `bn` is the mean over the set, not weighted by r."""

    total: Tensor
    ce: Tensor
    bn: Tensor


class _AllObserved(Exception):
    """Ends the forward pass of a network once every batch-norm layer was observed."""


def num_bn_layers(model: nn.Module) -> int:
    """Number of BatchNorm2d layers in a network; one without any can't serve statistics."""
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def bn_distance(x: Tensor, running_mean: Tensor, running_var: Tensor) -> Tensor:
    """`||mean(x) - running_mean||_2 + ||var(x) - running_var||_2` of one layer, with the biased variance.

    Args:
        x: (B, C, H, W), the layer's input.
        running_mean: (C,).
        running_var: (C,).

    Raises:
        ValueError: the statistics have another width than the input (a width of 1 would broadcast in silence).
    """
    if not running_mean.shape == running_var.shape == x.shape[1:2]:
        raise ValueError(
            f"running statistics of {running_mean.numel()} and {running_var.numel()} channels: expected {x.shape[1]}, "
            "as many as the input has; use the layer's own"
        )
    var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
    return torch.linalg.vector_norm(mean - running_mean) + torch.linalg.vector_norm(var - running_var)


@contextmanager
def observed_bn_distances(model: nn.Module, *, stops_when_complete: bool = False) -> Iterator[dict[int, Tensor]]:
    """`bn_distance` of each BatchNorm2d by its index in module-traversal order, filled by a forward pass inside.

    Distances are taken as soon as an input arrives, so a later in-place operation on it is an autograd error and not a
    wrong statistic. The hooks are removed on exit and after an error.

    Args:
        model: network in eval mode.
        stops_when_complete: leave the block once every layer was observed, before the last of them runs.

    Raises:
        ValueError: a layer tracks no running statistics.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    distances: dict[int, Tensor] = {}

    def observe(index: int, mean: Tensor, var: Tensor, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        if index not in distances:
            distances[index] = bn_distance(args[0], mean, var)
        if stops_when_complete and len(distances) == len(layers):
            raise _AllObserved

    hooks = []
    try:
        for index, layer in enumerate(layers):
            if layer.running_mean is None or layer.running_var is None:
                raise ValueError(
                    f"BatchNorm2d layer {index} of {type(model).__name__} tracks no running statistics, so there is "
                    "nothing to match; use a network with track_running_stats=True"
                )
            hooks.append(
                layer.register_forward_pre_hook(partial(observe, index, layer.running_mean, layer.running_var))
            )
        yield distances
    except _AllObserved:
        pass
    finally:
        for hook in hooks:
            hook.remove()


def bn_loss(distances: Mapping[int, Tensor], *, first_bn_multiplier: float) -> Tensor:
    """R_phi of one teacher from its observed distances, summed in module-traversal order.

    Raises:
        ValueError: there are none, because no batch-norm layer of the network took part in its forward pass.
    """
    if not distances:
        raise ValueError("no batch-norm layer ran in the forward pass; use a teacher whose forward pass has batch norm")
    weighted = [first_bn_multiplier * d if index == 0 else d for index, d in sorted(distances.items())]
    return reduce(torch.add, weighted)


def statistics_loss(
    images: Tensor,
    teachers: Sequence[nn.Module],
    *,
    first_bn_multiplier: float,
    count_bn_free_teachers: bool,
    known: Mapping[nn.Module, Tensor] | None = None,
) -> Tensor:
    """Mean of R_phi over a set of teachers.

    Args:
        images: (B, C, H, W), pixels.
        teachers: the set; networks without batch norm are never run.
        first_bn_multiplier: weight of each teacher's first batch-norm layer.
        count_bn_free_teachers: divide also by those without batch norm, whose term is 0 (as released).
        known: R_phi of teachers that ran already.

    Raises:
        ValueError: no teacher of the set has batch norm.
    """
    losses = dict(known or {})
    matched = [teacher for teacher in teachers if teacher in losses or num_bn_layers(teacher) > 0]
    if not matched:
        names = ", ".join(type(teacher).__name__ for teacher in teachers) or "none"
        raise ValueError(
            f"statistics teachers ({names}): no batch norm in any of them, so there are no statistics to match; "
            "add a teacher with batch norm"
        )
    for teacher in matched:
        if teacher not in losses:
            with observed_bn_distances(teacher, stops_when_complete=True) as distances:
                teacher(images)
            losses[teacher] = bn_loss(distances, first_bn_multiplier=first_bn_multiplier)
    num_counted = len(teachers) if count_bn_free_teachers else len(matched)
    return reduce(torch.add, [losses[teacher] for teacher in matched]) / num_counted


def inversion_loss(
    images: Tensor,
    class_ids: Tensor,
    *,
    primary: nn.Module,
    statistics_teachers: Sequence[nn.Module],
    bn_weight: float,
    first_bn_multiplier: float,
    count_bn_free_teachers: bool,
) -> LossTerms:
    """The objective at a batch of (augmented) images, pixels (B, C, H, W), of classes `class_ids` (B,).

    Args:
        images: where gradients flow to.
        class_ids: int64, 0 to K - 1.
        primary: the logit teacher; its statistics count only if it is also among `statistics_teachers`.
        statistics_teachers: the set B; the same network object runs once, also if it is there under two names.
        bn_weight: r.
        first_bn_multiplier: weight of each teacher's first batch-norm layer.
        count_bn_free_teachers: divide the statistics term also by teachers without batch norm.

    Raises:
        ValueError: no statistics teacher has batch norm, or a batch-norm layer tracks no running statistics.
    """
    known: dict[nn.Module, Tensor] = {}
    if any(teacher is primary for teacher in statistics_teachers) and num_bn_layers(primary) > 0:
        with observed_bn_distances(primary) as distances:
            logits = primary(images)
        known[primary] = bn_loss(distances, first_bn_multiplier=first_bn_multiplier)
    else:
        logits = primary(images)
    ce = F.cross_entropy(logits, class_ids)
    bn = statistics_loss(
        images,
        statistics_teachers,
        first_bn_multiplier=first_bn_multiplier,
        count_bn_free_teachers=count_bn_free_teachers,
        known=known,
    )
    return LossTerms(ce + bn_weight * bn, ce, bn)
