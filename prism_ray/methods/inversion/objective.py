"""The objective of inversion: cross-entropies and statistics of weighted sets of teachers, and priors on the images.

    L(X) = a * sum_phi u_phi CE(phi(X), y) + r * sum_phi v_phi R_phi(X) + priors(X)

with R as in `matching`. u = {primary: 1} and v = 1 / |B| over a set B is PRISM's objective; B = {primary} is SRe2L's.

Shapes: B images, C channels, H x W pixels, K classes. Teachers are frozen, in eval mode, pixels -> logits.
Source: released programs of SRe2L (arXiv:2306.13092) and PRISM (arXiv:2511.09905). Deviations: a network runs once
whatever its roles, one with nothing to match never runs for statistics, and a network whose logits nobody needs stops
after its last matched layer (the same loss for less work); of a layer that runs twice in a forward pass, the first
input counts.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prism_ray.methods.inversion.matching import (
    Network,
    layer_distance,
    observed_distances,
    skipped_layers,
    statistics_term,
)
from prism_ray.methods.inversion.regularizers import image_norm, spectrum_divergence, total_variation
from prism_ray.methods.inversion.statistics import BatchState, LayerTarget, matched_layers


@dataclass(frozen=True)
class Guides:
    """Names of networks with their weights, not negative: of their cross-entropies (u), of their statistics (v)."""

    logits: Mapping[str, float]
    statistics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Weights of the objective; the defaults are PRISM's and SRe2L's. A weight of 0 leaves its prior out."""

    ce_weight: float = 1.0  # a
    bn_weight: float = 0.01  # r
    first_bn_multiplier: float = 10.0  # w of a teacher's first matched layer
    conv_skip_probability: float = 0.0  # that a Conv2d layer is left out of an iteration
    class_share: float = 0.0  # of D_l, for the mean over classes of their own distances; the rest is the whole batch's
    statistics_ema: float = 0.0  # decay of the average that is matched instead of the batch's own statistic
    tv_weight: float = 0.0
    l2_weight: float = 0.0
    eig_weight: float = 0.0
    eig_temperature: float = 4.0
    bfloat16: bool = False  # passes of networks where autocast allows it; moments and losses are in single precision


class LossTerms(NamedTuple):
    """Scalars: `total` = a * `ce` + r * `bn` + `prior`. `ce` in nats per image; `prior` has its weights in it."""

    total: Tensor
    ce: Tensor
    bn: Tensor
    prior: Tensor


def num_bn_layers(model: nn.Module) -> int:
    """Number of BatchNorm2d layers in a network."""
    return len(matched_layers(model, conv=False))


def inversion_loss(
    images: Tensor,
    class_ids: Tensor,
    *,
    networks: Mapping[str, Network],
    guides: Guides,
    objective: Objective,
    state: BatchState | None = None,
    normalized: Tensor | None = None,
    iteration: int = 0,
    seed: int = 0,
) -> LossTerms:
    """The objective at a batch of (augmented) images, pixels (B, C, H, W), of classes `class_ids` (B,).

    Args:
        images: where gradients flow to.
        class_ids: int64, 0 to K - 1.
        networks: by name; the same module runs once, also if it is there under two names.
        guides: a network of weight 0 is left out, one with nothing to match adds 0 to the statistics.
        objective: weights.
        state: of the batch, where averages go on; None: a new one.
        normalized: the same images in units of the data set's standard deviation, as priors see them; None: `images`.
        iteration: with `seed`, decides which Conv2d layers are skipped.
        seed: at least 0.

    Raises:
        ValueError: a guide is unknown, statistics are wanted where no network has anything to match, or more is matched
            than a compiled pass holds.
    """
    state = state or BatchState(class_ids)
    logit_weights, statistics_weights = (
        {name: weight for name, weight in weights.items() if weight} for weights in (guides.logits, guides.statistics)
    )
    asked = {name: _network(name, networks) for name in [*logit_weights, *statistics_weights]}
    if statistics_weights and not any(network.targets for network in networks.values()):
        names = ", ".join(type(asked[name].module).__name__ for name in statistics_weights)
        raise ValueError(
            f"statistics teachers ({names}): no batch norm in any of them, so there are no statistics to match; "
            "add a teacher with batch norm"
        )
    gives_logits = {asked[name].module for name in logit_weights}
    matched = {asked[name].module: name for name in reversed(statistics_weights) if asked[name].targets}
    ces: dict[nn.Module, Tensor] = {}
    terms: dict[nn.Module, Tensor] = {}
    for module in dict.fromkeys(network.module for network in asked.values()):
        if module in matched:
            name = matched[module]
            skipped = skipped_layers(
                asked[name], probability=objective.conv_skip_probability, seed=seed, iteration=iteration, name=name
            )
            logits, terms[module] = _observed_run(
                images, name, asked[name], objective, state, skipped=skipped, needs_logits=module in gives_logits
            )
        elif module in gives_logits:
            with _arithmetic(images, is_half=objective.bfloat16):
                logits = module(images)
        else:
            continue
        if module in gives_logits:
            ces[module] = F.cross_entropy(logits.to(images.dtype), class_ids)
    ce = _weighted_sum([(weight, ces[asked[name].module]) for name, weight in logit_weights.items()], images)
    bn = _weighted_sum(
        [(weight, terms[asked[name].module]) for name, weight in statistics_weights.items() if asked[name].targets],
        images,
    )
    prior = _prior(images if normalized is None else normalized, objective, state)
    return LossTerms(objective.ce_weight * ce + objective.bn_weight * bn + prior, ce, bn, prior)


def _network(name: str, networks: Mapping[str, Network]) -> Network:
    if name not in networks:
        raise ValueError(f"teacher {name!r} is unknown; known: {', '.join(sorted(networks))}")
    return networks[name]


def _observed_run(
    images: Tensor,
    name: str,
    network: Network,
    objective: Objective,
    state: BatchState,
    *,
    skipped: frozenset[int],
    needs_logits: bool,
) -> tuple[Tensor, Tensor]:
    """Logits and R of one forward pass; without `needs_logits`, it stops early and they are not to be used."""

    def distance(index: int, x: Tensor, target: LayerTarget) -> Tensor:
        def averaged(kind: str, statistic: Tensor) -> Tensor:
            return state.averaged((name, index, kind), statistic, decay=objective.statistics_ema)

        with _arithmetic(images, is_half=False):
            x = x.to(images.dtype)
            return layer_distance(x, target, class_share=objective.class_share, state=state, averaged=averaged)

    logits, term = images.new_zeros(()), images.new_zeros(())
    if network.run is not None:
        if skipped or objective.class_share or objective.statistics_ema:
            raise ValueError("compiled passes hold plain moments; leave out compiling, or what else is matched")
        with _arithmetic(images, is_half=objective.bfloat16):
            answer, found = network.run(images, needs_logits)
        term = statistics_term(dict(enumerate(found)), first_bn_multiplier=objective.first_bn_multiplier)
        return logits if answer is None else answer, term
    all_skipped = len(skipped) == len(network.targets)
    with observed_distances(network, distance, skipped=skipped, stops_when_complete=not needs_logits) as distances:
        if needs_logits or not all_skipped:
            with _arithmetic(images, is_half=objective.bfloat16):
                logits = network.module(images)
    if not all_skipped:
        term = statistics_term(distances, first_bn_multiplier=objective.first_bn_multiplier)
    return logits, term


def _arithmetic(images: Tensor, *, is_half: bool) -> AbstractContextManager[object]:
    kind = images.device.type
    if is_half == torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=is_half)


def _weighted_sum(weighted: Sequence[tuple[float, Tensor]], like: Tensor) -> Tensor:
    if not weighted:
        return like.new_zeros(())
    weights, values = zip(*weighted, strict=True)
    if len(set(weights)) == 1:  # 1 / (1 / n) is n: the released mean, bit for bit
        return reduce(torch.add, values) / (1 / weights[0])
    return reduce(torch.add, [weight * value for weight, value in weighted])


def _prior(images: Tensor, objective: Objective, state: BatchState) -> Tensor:
    prior = images.new_zeros(())
    if objective.tv_weight:
        prior = prior + objective.tv_weight * total_variation(images)
    if objective.l2_weight:
        prior = prior + objective.l2_weight * image_norm(images)
    if objective.eig_weight:
        groups = [rows for _, rows in state.groups]
        divergence = spectrum_divergence(images, groups, temperature=objective.eig_temperature)
        prior = prior + objective.eig_weight * divergence
    return prior
