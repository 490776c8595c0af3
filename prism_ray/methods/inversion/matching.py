"""How far the statistics of a batch are from what a network's layers are to see: the term R of one network.

    R(X) = sum_l w_l D_l(X),  D_l = ||mean_l(X) - M_l||_2 + ||var_l(X) - V_l||_2

over the inputs of the matched layers l, with targets M, V; w is `first_bn_multiplier` for the first of them in
module-traversal order and 1 for all others.

Shapes: B images, C channels, H x W feature map, K classes.
Source: released programs of DeepInversion (arXiv:1912.08795) and SRe2L (arXiv:2306.13092); Conv2d layers, patches,
averages and skipped layers: G-VBSM (arXiv:2311.17950); mix of global and class-wise moments: EDC (arXiv:2404.13733).
Deviation: skipped layers come from a counter-based stream, not from a global random state.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, reduce

import numpy as np
import torch
from torch import Tensor, nn

from prism_ray.methods.inversion.statistics import (
    BatchState,
    LayerTarget,
    moments,
    network_layers,
    observed_inputs,
    patches,
)


@dataclass(frozen=True)
class Network:
    """A teacher with what its statistics are to match, see `targets_of`; no targets: it gives logits only."""

    module: nn.Module
    targets: tuple[LayerTarget, ...] = ()
    run: Callable[[Tensor, bool], tuple[Tensor | None, list[Tensor]]] | None = None
    """Its pass with the distances of all targets, see `compiled`; None: the module runs, and is observed."""

    @cached_property
    def layers(self) -> list[nn.Module]:
        """The layers that the targets belong to, found once: walking all modules costs a percent of a small step."""
        return network_layers(self.module, self.targets)


def moments_distance(mean: Tensor, var: Tensor, target_mean: Tensor, target_var: Tensor) -> Tensor:
    """`||mean - target_mean||_2 + ||var - target_var||_2` along the last dimension.

    Raises:
        ValueError: the widths differ (a width of 1 would broadcast in silence).
    """
    if not target_mean.shape[-1:] == target_var.shape[-1:] == mean.shape[-1:]:
        raise ValueError(
            f"target moments of {target_mean.shape[-1]} and {target_var.shape[-1]} values: expected {mean.shape[-1]}, "
            "as many as the input has; use the layer's own"
        )
    return torch.linalg.vector_norm(mean - target_mean, dim=-1) + torch.linalg.vector_norm(var - target_var, dim=-1)


def layer_distance(
    x: Tensor,
    target: LayerTarget,
    *,
    class_share: float = 0.0,
    state: BatchState | None = None,
    averaged: Callable[[str, Tensor], Tensor] = lambda kind, statistic: statistic,
) -> Tensor:
    """D_l of one layer: (1 - class_share) * distance of the batch + class_share * mean distance of the classes in it.

    The distance of the batch also has the distance of its patch moments, where the target has any.

    Args:
        x: (B, C, H, W), the layer's input.
        target: its moments.
        class_share: 0 to 1.
        state: of the batch, for class-wise distances.
        averaged: from the name and value of a statistic to what is matched.

    Raises:
        ValueError: the target is of another width, or lacks class-wise moments that are wanted.
    """
    parts = []
    if class_share < 1:
        mean, var = moments(x, (0, 2, 3))
        distance = moments_distance(averaged("mean", mean), averaged("var", var), target.mean, target.var)
        if target.patch_mean is not None and target.patch_var is not None:
            side = round(target.patch_mean.numel() ** 0.5)
            mean, var = (m.flatten() for m in moments(patches(x, side), (0, 1, 3, 5)))
            mean, var = averaged("patch_mean", mean), averaged("patch_var", var)
            distance = distance + moments_distance(mean, var, target.patch_mean, target.patch_var)
        parts.append((1 - class_share) * distance if class_share else distance)
    if class_share:
        if target.class_mean is None or target.class_var is None:
            raise ValueError(f"class_share={class_share:g}: a layer has no class-wise moments; measure them, or set 0")
        assert state is not None, "class-wise distances need the batch's classes"
        mean, var = state.class_moments(x)
        mean, var = averaged("class_mean", mean), averaged("class_var", var)
        of_present = target.class_mean[state.classes], target.class_var[state.classes]
        parts.append(class_share * moments_distance(mean, var, *of_present).mean())
    return reduce(torch.add, parts)


@contextmanager
def observed_distances(
    network: Network,
    distance: Callable[[int, Tensor, LayerTarget], Tensor] = lambda index, x, target: layer_distance(x, target),
    *,
    skipped: frozenset[int] = frozenset(),
    stops_when_complete: bool = False,
) -> Iterator[dict[int, Tensor]]:
    """The distance of each matched layer that is not skipped, by its index, filled by a forward pass inside.

    See `observed_inputs`; `distance` is called with a layer's index, input and target.
    """
    layers = dict(enumerate(network.layers))
    distances: dict[int, Tensor] = {}

    def observe(index: int, x: Tensor) -> None:
        distances[index] = distance(index, x, network.targets[index])

    wanted = {index: layer for index, layer in layers.items() if index not in skipped}
    with observed_inputs(wanted, observe, stops_when_complete=stops_when_complete):
        yield distances


def statistics_term(distances: Mapping[int, Tensor], *, first_bn_multiplier: float) -> Tensor:
    """R of one teacher from its observed distances, summed in module-traversal order.

    Raises:
        ValueError: there are none, because no matched layer of the network took part in its forward pass.
    """
    if not distances:
        raise ValueError("no matched layer ran in the forward pass; use a teacher whose forward pass has batch norm")
    weighted = [first_bn_multiplier * d if index == 0 else d for index, d in sorted(distances.items())]
    return reduce(torch.add, weighted)


def skipped_layers(network: Network, *, probability: float, seed: int, iteration: int, name: str) -> frozenset[int]:
    """Indices of the Conv2d layers that an iteration leaves out, each with this probability.

    They depend on the seed, the iteration, the network's name and the layer's index alone.
    """
    if not probability:
        return frozenset()
    layers = network.layers
    stream = np.random.Philox(key=seed, counter=[0, iteration, zlib.crc32(name.encode()), 0])
    uniform = np.random.Generator(stream).random(len(layers))
    return frozenset(
        index for index, layer in enumerate(layers) if isinstance(layer, nn.Conv2d) and uniform[index] < probability
    )
