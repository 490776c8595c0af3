"""What a step of synthesis keeps in memory, counted on shapes: tensors that autograd holds, and weights."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

GB = 1e9


def weight_bytes(network: nn.Module) -> int:
    """Parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*network.parameters(), *network.buffers()))


def kept_bytes(network: nn.Module, *, image_size: int, in_chans: int) -> int:
    """Bytes that the forward pass of one image keeps for the gradient to the image; its weights don't count.

    Counted on the network's own device; put it on "meta" to count without computing.
    """
    owned = {t.untyped_storage()._cdata for t in (*network.parameters(), *network.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in owned:
            kept[storage] = tensor  # held, so that no other takes its place in memory
        return tensor

    device = next(network.parameters()).device
    with torch.enable_grad(), saved_tensors_hooks(keep, lambda tensor: tensor):
        network(torch.zeros(1, in_chans, image_size, image_size, device=device, requires_grad=True))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def step_bytes(weights: Mapping[str, int], kept: Mapping[str, int], asked: Sequence[str], *, batch_size: int) -> int:
    """Memory of one step: the weights of all networks, and what those that are asked keep of a batch, all at once.

    A lower bound: the framework, work space of kernels and the images' own optimizer come on top.
    """
    return sum(weights.values()) + batch_size * sum(kept[name] for name in asked)


def shortage(needed: int, present: int, *, where: str, batch_size: int) -> str | None:
    """One line if a step can't fit, None if it may."""
    if needed <= present:
        return None
    return (
        f"method.batch_size={batch_size}: a step keeps at least {needed / GB:.1f} GB of teachers and what they "
        f"compute, and {where} has {present / GB:.1f} GB; choose smaller batches (which makes other images), fewer or "
        "smaller teachers, or a larger device (compute.pools)"
    )
