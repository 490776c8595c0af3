"""What statistics matching compares: moments of the inputs of a network's layers, on real data and on a batch.

Shapes: B images, C channels, H x W feature map, K classes, p x p patches.
Source: BatchNorm2d inputs per channel: DeepInversion (arXiv:1912.08795). Conv2d inputs per channel and per patch, and
moving averages: G-VBSM's released program (arXiv:2311.17950). Class-wise moments: WMDD (arXiv:2311.18531), LPLD
(arXiv:2410.15919), EDC (arXiv:2404.13733). Deviations: moments of real data are exact over all images, not means of
batch moments; a feature map of any size is cut into p x p patches, where G-VBSM cuts patches of p x p pixels; an
average starts from its first statistic and anew for every batch, where G-VBSM's starts from 0 once and runs on.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class LayerTarget:
    """Moments to match at the input of one layer; None where there are none. Variances are biased."""

    mean: Tensor  # (C,)
    var: Tensor  # (C,)
    class_mean: Tensor | None = None  # (K, C), NaN for a class without images
    class_var: Tensor | None = None  # (K, C)
    patch_mean: Tensor | None = None  # (p * p,), row by row
    patch_var: Tensor | None = None  # (p * p,)


class _AllObserved(Exception):
    """Ends the forward pass of a network once every wanted input was observed."""


def matched_layers(model: nn.Module, *, conv: bool) -> list[nn.Module]:
    """The BatchNorm2d layers of a network in module-traversal order, with `conv` its Conv2d layers among them."""
    kinds = (nn.BatchNorm2d, nn.Conv2d) if conv else nn.BatchNorm2d
    return [module for module in model.modules() if isinstance(module, kinds)]


@contextmanager
def observed_inputs(
    layers: Mapping[int, nn.Module], observe: Callable[[int, Tensor], None], *, stops_when_complete: bool = False
) -> Iterator[None]:
    """Call `observe(index, input)` for each layer as soon as its input arrives in a forward pass inside.

    Of a layer that runs twice, the first input counts. The hooks are removed on exit and after an error.

    Args:
        layers: by index.
        observe: differentiable; a later in-place operation on the input is then an autograd error.
        stops_when_complete: leave the block once every layer was observed, before the last of them runs.
    """
    seen: set[int] = set()

    def hook(index: int, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        if index not in seen:
            seen.add(index)
            observe(index, args[0])
        if stops_when_complete and len(seen) == len(layers):
            raise _AllObserved

    handles = [layer.register_forward_pre_hook(partial(hook, index)) for index, layer in layers.items()]
    try:
        yield
    except _AllObserved:
        pass
    finally:
        for handle in handles:
            handle.remove()


class _Moments(torch.autograd.Function):
    """Mean and biased variance as two plain reductions, with a backward pass that walks the input once.

    `torch.var_mean` runs Welford's recurrence number by number on a CPU, and autograd derives five passes from it: a
    synthesis step spent a third to two thirds of its time there (see benchmarks/synthesis_step.py). Without a
    `setup_context` of its own, for which torch looks at the signature in every call.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        mean = x.mean(dims, keepdim=True)
        ctx.save_for_backward(x, mean)
        return mean, (x - mean).square_().mean(dims, keepdim=True)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        x, mean = ctx.saved_tensors
        mean_gradient, var_gradient = grad_outputs
        count = x.numel() / mean.numel()
        slope = var_gradient * (2 / count)
        return torch.addcmul(mean_gradient / count - slope * mean, x, slope), None


def moments(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over some dimensions, which are gone in the result; differentiable."""
    mean, var = _Moments.apply(x, dims)
    return mean.squeeze(dims), var.squeeze(dims)


def patches(x: Tensor, side: int) -> Tensor:
    """The feature map (B, C, H, W) as (B, C, side, h, side, w): so many patches of h x w pixels along each side.

    A map whose sides are no multiple of `side` is first enlarged, bilinearly, to the next one.
    """
    height, width = (math.ceil(length / side) for length in x.shape[-2:])
    if x.shape[-2:] != (height * side, width * side):
        x = F.interpolate(x, size=(height * side, width * side), mode="bilinear", align_corners=False)
    return x.reshape(*x.shape[:2], side, height, side, width)


class BatchState:
    """What a batch of images carries from iteration to iteration: its classes, and averages of its statistics."""

    def __init__(self, class_ids: Tensor):
        self.class_ids = class_ids  # (B,)
        self.averages: dict[tuple[str, int, str], Tensor] = {}  # by the name of the statistic

    @cached_property
    def groups(self) -> list[tuple[int, Tensor]]:
        """Class id and positions in the batch of each class present; waits for the device, once."""
        ids = self.class_ids.tolist()
        members = {c: [n for n, other in enumerate(ids) if other == c] for c in sorted(set(ids))}
        return [(c, torch.tensor(rows, device=self.class_ids.device)) for c, rows in members.items()]

    @cached_property
    def classes(self) -> Tensor:
        """Ids of the classes present, ascending, (P,)."""
        return self.class_ids.new_tensor([c for c, _ in self.groups])

    def class_moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance, each (P, C), over the images and pixels of each class present."""
        is_member = (self.classes[:, None] == self.class_ids).to(x.dtype)  # (P, B)
        averaging = is_member / is_member.sum(dim=1, keepdim=True)
        mean, var = moments(x, (2, 3))  # of each image; classes weigh their images alike
        class_mean = averaging @ mean
        return class_mean, averaging @ (var + (mean - is_member.T @ class_mean).square())

    def averaged(self, key: tuple[str, int, str], statistic: Tensor, *, decay: float) -> Tensor:
        """The moving average e <- decay * e + (1 - decay) * s in value, with the gradient of the statistic s itself.

        `key` names the statistic; the first one of a name is its own average. A decay of 0 returns it as it is.
        """
        if not decay:
            return statistic
        current = statistic.detach()
        previous = self.averages.get(key, current)
        self.averages[key] = decay * previous + (1 - decay) * current
        return self.averages[key] + (statistic - current)


class Moments:
    """Moments of the inputs of a network's layers over a data set, in one pass, whatever its batches are.

    Each image's own moments are taken in the network's precision and combined in double precision.
    """

    def __init__(self, model: nn.Module, *, conv: bool, patch_size: int | None, num_classes: int | None):
        """
        Args:
            model: in eval mode.
            conv: with Conv2d layers.
            patch_size: p, patches along a side of those layers' inputs; None: no patch moments.
            num_classes: K; None: no class-wise moments.
        """
        self._model = model
        self._layers = dict(enumerate(matched_layers(model, conv=conv)))
        self._patch_size = patch_size
        self._num_classes = num_classes
        # By "<i>.<kind>": number of images (groups,), sums of their means and of their second moments (groups, width).
        self._sums: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    @torch.no_grad()
    def observe(self, images: Tensor, class_ids: Tensor) -> None:
        """Take in a batch: pixels (B, C, S, S) and class ids (B,)."""
        assert not self._model.training, "statistics are those of a network in eval mode"
        if not self._layers:
            return
        add = partial(self._add_layer, class_ids=class_ids.cpu())
        with observed_inputs(self._layers, add, stops_when_complete=True):
            self._model(images)

    def tensors(self) -> dict[str, Tensor]:
        """The moments of all images so far by name, float32 on the CPU; see the module's `targets_of`.

        "<i>.mean" and "<i>.var" (C,), "<i>.class_mean" and "<i>.class_var" (K, C), "<i>.patch_mean" and
        "<i>.patch_var" (p * p,), where i is the layer's index in `matched_layers`; nothing for a layer that never ran.
        """
        found = {}
        for name, (count, first, second) in self._sums.items():
            index, kind = name.split(".")
            mean, square = first / count[:, None], second / count[:, None]  # NaN for a class without images
            var = (square - mean.square()).clamp(min=0)
            mean, var = (mean, var) if kind == "class" else (mean[0], var[0])
            prefix = f"{index}." if kind == "all" else f"{index}.{kind}_"
            found[f"{prefix}mean"], found[f"{prefix}var"] = mean.float(), var.float()
        return found

    def _add_layer(self, index: int, x: Tensor, *, class_ids: Tensor) -> None:
        var, mean = torch.var_mean(x, dim=(2, 3), correction=0)
        together = torch.zeros_like(class_ids)
        self._add(f"{index}.all", mean, var, together, 1)
        if self._num_classes is not None:
            self._add(f"{index}.class", mean, var, class_ids, self._num_classes)
        if self._patch_size is not None and isinstance(self._layers[index], nn.Conv2d):
            var, mean = torch.var_mean(patches(x, self._patch_size), dim=(1, 3, 5), correction=0)
            self._add(f"{index}.patch", mean.flatten(1), var.flatten(1), together, 1)

    def _add(self, name: str, mean: Tensor, var: Tensor, groups: Tensor, num_groups: int) -> None:
        """Add images' means and variances (B, width) to the sums of their groups (B,)."""
        mean, var = mean.double().cpu(), var.double().cpu()
        if name not in self._sums:
            zeros = mean.new_zeros(num_groups, mean.shape[1])
            self._sums[name] = (mean.new_zeros(num_groups), zeros, zeros.clone())
        count, first, second = self._sums[name]
        count.index_add_(0, groups, torch.ones_like(groups, dtype=count.dtype))
        first.index_add_(0, groups, mean)
        second.index_add_(0, groups, var + mean.square())


def targets_of(model: nn.Module, tensors: Mapping[str, Tensor] | None, *, conv: bool) -> tuple[LayerTarget, ...]:
    """The target of each matched layer, on the device and in the precision of the network.

    Means and variances of a BatchNorm2d layer are always its running statistics; `tensors`, those of `Moments`, add
    class-wise ones and are all there is for Conv2d layers.

    Raises:
        ValueError: a BatchNorm2d layer tracks no running statistics, or a Conv2d layer has no tensors of its width.
    """
    like = next(model.parameters(), torch.empty(0))
    found = {name: value.to(like) for name, value in (tensors or {}).items()}
    targets = []
    for index, layer in enumerate(matched_layers(model, conv=conv)):
        if isinstance(layer, nn.BatchNorm2d):
            mean, var = layer.running_mean, layer.running_var
            if mean is None or var is None:
                raise ValueError(
                    f"BatchNorm2d layer {index} of {type(model).__name__} tracks no running statistics, so there is "
                    "nothing to match; use a network with track_running_stats=True"
                )
        else:
            mean, var = found.get(f"{index}.mean"), found.get(f"{index}.var")
            if mean is None or var is None:
                raise ValueError(
                    f"Conv2d layer {index} of {type(model).__name__} has no moments of real data to match; measure "
                    "them with conv=True"
                )
        others = {kind: found.get(f"{index}.{kind}") for kind in ("class_mean", "class_var", "patch_mean", "patch_var")}
        targets.append(LayerTarget(mean, var, **others))
    return tuple(targets)


def network_layers(model: nn.Module, targets: Sequence[LayerTarget]) -> list[nn.Module]:
    """The layers that targets belong to: none, the batch norms, or those and the convolutions.

    Raises:
        ValueError: the network has another number of them.
    """
    if not targets:
        return []
    for conv in (False, True):
        layers = matched_layers(model, conv=conv)
        if len(layers) == len(targets):
            return layers
    raise ValueError(
        f"{len(targets)} targets for {type(model).__name__}: expected one per BatchNorm2d, or one per BatchNorm2d and "
        "Conv2d layer; use `targets_of` the same network"
    )
