"""A network's forward pass with the distances of its statistics as one graph, compiled by torch.

Moments, batch norms and activations are walked in a few passes then, where each was one of its own. The same numbers up
to rounding. Only what PRISM and SRe2L match is in the graph: moments of the whole batch at the inputs of BatchNorm2d.
Passes of one shape are compiled once; on one node processes share torch's cache of compiled graphs.
"""

import copy
import itertools
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from prism_ray.methods.inversion.matching import Network, moments_distance
from prism_ray.methods.inversion.statistics import network_layers

Pass = Callable[[Tensor, bool], tuple[Tensor | None, list[Tensor]]]
"""Pixels (B, C, H, W), whether logits are needed -> logits (B, K) or None, and D_l of every target in their order."""


class _ObservedPass(nn.Module):
    """The pass that is compiled: a network whose hooks are its own and whose weights are another's."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        tensors = itertools.chain(network.module.parameters(), network.module.buffers())
        self.network = copy.deepcopy(network.module, {id(tensor): tensor for tensor in tensors})
        self.targets = network.targets
        self._distances: dict[int, Tensor] = {}
        for index, layer in enumerate(network_layers(self.network, network.targets)):
            layer.register_forward_pre_hook(partial(self._observe, index))

    def _observe(self, index: int, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        if index in self._distances:  # of a layer that runs twice, the first input counts
            return
        x, target = args[0].to(self.targets[index].mean.dtype), self.targets[index]
        mean = x.mean((0, 2, 3))
        var = (x - mean.view(1, -1, 1, 1)).square().mean((0, 2, 3))
        self._distances[index] = moments_distance(mean, var, target.mean, target.var)

    def forward(self, images: Tensor, needs_logits: bool) -> tuple[Tensor | None, list[Tensor]]:
        self._distances = {}
        logits = self.network(images)
        return (logits if needs_logits else None), [self._distances[n] for n in range(len(self.targets))]


def compiled_pass(network: Network) -> Pass:
    """The pass of a network, compiled when it first runs, for each shape of images and each use of its logits.

    Raises:
        ValueError: a target has patch moments, which are not in the graph.
    """
    if any(target.patch_mean is not None for target in network.targets):
        raise ValueError("targets with patch moments: not in a compiled pass; leave compiling out")
    return torch.compile(_ObservedPass(network), dynamic=False)
