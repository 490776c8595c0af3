"""The optimizer of inversion: a batch of images descends the objective from its start to its last iterate.

Shapes: B images, C channels, S x S pixels. Spaces: images enter and leave as pixels in [0, 1] and teachers see pixels;
Adam moves X = (pixels - mean) / std with the data set's mean and std, so `lr` is in units of that std.
Source: PRISM (arXiv:2511.09905) and SRe2L (arXiv:2306.13092), released programs: Adam with fresh state per batch,
cosine learning rate without warm-up, X clamped to the valid box after each step, the last iterate is the result.
Images that enter later: DELT (arXiv:2411.19946); data residual at two sizes: FADRM (arXiv:2506.24125).
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prism_ray.methods.inversion.augment import Augmentations, augment
from prism_ray.methods.inversion.objective import Guides, LossTerms, Network, Objective, inversion_loss
from prism_ray.methods.inversion.statistics import BatchState
from prism_ray.methods.schedules import cosine_lr

ADAM_EPS = 1e-8

State = Mapping[str, Tensor]
"""A batch between two iterations, whole: with it and the same arguments, `invert` goes on to the same bits.

"iteration" (how many are done); of each group of images that has entered, in order, "group.<n>.x" and its Adam state
"group.<n>.step", ".exp_avg", ".exp_avg_sq"; "average.<name of a statistic>"; "logged.iterations" (L,), "logged.terms"
(L, 4).
"""


@dataclass(frozen=True, kw_only=True)
class Descent:
    """How a batch descends.

    With `residual_every`, the iterations are cut into parts of that length, the last one may be shorter. Each part but
    the last ends in X <- (1 - residual_weight) X + residual_weight * initial; each starts with fresh Adam state.
    """

    num_iterations: int  # 0: the images stay as they are
    lr: float  # of an image's first step; cosine over all its iterations
    adam_betas: tuple[float, float] = (0.5, 0.9)
    residual_every: int | None = None  # iterations, at least 1; None: one part
    residual_weight: float = 0.5  # 0 to 1
    residual_scale: float = 1.0  # share of the side, of images in parts 0, 2, 4, …; above 0, at most 1

    def is_part_start(self, iteration: int) -> bool:
        return self.residual_every is not None and iteration % self.residual_every == 0

    def size_at(self, iteration: int, size: int) -> int:
        """Pixels along a side of the images of an iteration; `size` is that of the result."""
        is_small = self.residual_every is not None and iteration // self.residual_every % 2 == 0
        return max(1, round(self.residual_scale * size)) if is_small else size


class LossRecord(NamedTuple):
    """Loss terms at an iteration, before its step and on its augmented images; see `LossTerms`."""

    iteration: int
    ce: float
    bn: float


@dataclass(frozen=True)
class Inversion:
    """A finished batch. The losses are those of the last iteration, NaN where there was none."""

    images: Tensor  # (B, C, S, S), pixels in [0, 1]; one that never entered is its initial image, bit for bit
    loss_ce: float  # nats per image
    loss_bn: float  # the statistics term, not weighted
    history: tuple[LossRecord, ...]  # every `log_every` iterations and the last one; empty without logging


class NotFinite(FloatingPointError):
    """A batch ended in images or losses that are no numbers. `images`: positions of those images, maybe none.

    The others are no good either: through the statistics of the batch, and losses over all of it, each depends on all.
    """

    def __init__(self, message: str, images: Sequence[int]) -> None:
        super().__init__(message)
        self.images = list(images)


class _Group:
    """Images of a batch that enter together: their iterate, their Adam state and their learning rates."""

    def __init__(self, rows: Tensor, entry: int, initial: Tensor, descent: Descent):
        self.rows = rows  # positions in the batch
        self.entry = entry
        self._initial = initial  # (b, C, S, S) in units of std
        self._descent = descent
        self.x = initial

    def start_part(self, size: int, *, antialias: bool) -> None:
        """Mix the initial images in (images that only enter are those), go to `size` and forget Adam's state."""
        x = resized(self.x.detach(), self._initial.shape[-1], antialias=antialias)
        x = torch.lerp(x, self._initial, self._descent.residual_weight)
        self.x = resized(x, size, antialias=antialias).clone().requires_grad_()
        self._start_adam()

    def _start_adam(self) -> None:
        self._optimizer = torch.optim.Adam([self.x], lr=self._descent.lr, betas=self._descent.adam_betas, eps=ADAM_EPS)

    def state(self) -> dict[str, Tensor]:
        return {"x": self.x.detach(), **self._optimizer.state[self.x]}

    def restore(self, state: State) -> None:
        self.x = state["x"].to(self._initial.device).clone().requires_grad_()
        self._start_adam()
        moments = {key: state[key].to(self.x.device).clone() for key in ("exp_avg", "exp_avg_sq")}
        self._optimizer.state[self.x] = {"step": state["step"].cpu().clone(), **moments}

    def step(self, gradient: Tensor, iteration: int, lowest: Tensor, highest: Tensor) -> None:
        self.x.grad = gradient
        total = self._descent.num_iterations - self.entry
        rate = cosine_lr(self._descent.lr, step=iteration - self.entry, total=total)
        self._optimizer.param_groups[0]["lr"] = rate
        self._optimizer.step()
        with torch.no_grad():
            self.x.clamp_(lowest, highest)


def invert(
    initial: Tensor,
    class_ids: Tensor,
    *,
    networks: Mapping[str, Network],
    guides: Callable[[int], Guides],
    objective: Objective,
    descent: Descent,
    mean: Sequence[float],
    std: Sequence[float],
    augmentations: Callable[[int], Augmentations],
    antialias: bool,
    seed: int,
    rounds: Sequence[int] | None = None,
    log_every: int = 0,
    resume: State | None = None,
    after_iteration: Callable[[Callable[[], dict[str, Tensor]]], None] | None = None,
) -> Inversion:
    """Optimize a batch of images. A pure function: no global random state, and the networks stay as they are.

    The device is synchronized once, at the end; class-wise statistics and the divergence of spectra wait for it too.

    Args:
        initial: (B, C, S, S), pixels; noise may leave [0, 1] until the first step clamps it.
        class_ids: (B,), int64.
        networks: frozen, in eval mode, pixels -> logits, by name.
        guides: iteration -> who guides it.
        objective: weights of the loss.
        descent: iterations, learning rate and data residual.
        mean: of the data set, one number per channel, pixels in [0, 1].
        std: likewise, above 0.
        augmentations: side in pixels -> draws for images of that size, at least one per iteration; asked once for
            each size that occurs, see `Descent.size_at`.
        antialias: of the resizing of crops, see `augment`, and of images between parts.
        seed: at least 0, decides which layers are skipped.
        rounds: (B,), iteration at which each image enters. Until then it is in no batch; images that enter together
            have fresh Adam state and a cosine over the iterations that are left. None: all enter at 0.
        log_every: iterations between records of `history`; 0 keeps none.
        resume: what `after_iteration` was given in an earlier call with the same arguments; None: from the start.
        after_iteration: called after every iteration but the last one with a function that returns the state, on the
            CPU; calling that waits for the device. What it raises ends the descent.

    Raises:
        ValueError: shapes or counts disagree, a network is unknown, or there are no statistics to match.
        NotFinite: an image or loss is no number at the end.
    """
    size, num_iterations = initial.shape[-1], descent.num_iterations
    _check(initial, class_ids, mean, std, descent, rounds)
    for name, network in networks.items():
        _assert_frozen(name, network.module)
    if num_iterations == 0:
        return Inversion(initial.detach().clone(), math.nan, math.nan, ())

    shift, scale = (initial.new_tensor(list(values)).view(-1, 1, 1) for values in (mean, std))
    lowest, highest = (0 - shift) / scale, (1 - shift) / scale
    groups = _groups((initial.detach() - shift) / scale, rounds, descent)
    draws = {
        side: _drawn(augmentations, side, num_iterations)
        for side in dict.fromkeys(descent.size_at(t, size) for t in range(num_iterations))
    }
    entered: list[_Group] = []
    state = BatchState(class_ids)
    logged: dict[int, LossTerms] = {}
    first = 0
    if resume is not None:
        first = int(resume["iteration"])
        entered = [group for group in groups if group.entry < first]
        for number, group in enumerate(entered):
            group.restore(_part(resume, f"group.{number}."))
        state = BatchState(class_ids[torch.cat([group.rows for group in entered])])
        state.averages = {_statistic(key): value.to(initial.device) for key, value in _part(resume, "average.").items()}
        logged = _logged(resume, initial.device)
    for iteration in range(first, num_iterations):
        side = descent.size_at(iteration, size)
        starting = [g for g in groups if g.entry == iteration or (g in entered and descent.is_part_start(iteration))]
        if starting:
            for group in starting:
                group.start_part(side, antialias=antialias)
            entered = [group for group in groups if group.entry <= iteration]
            state = BatchState(class_ids[torch.cat([group.rows for group in entered])])
        iterate = [group.x for group in entered]
        augmented = augment(_joined(iterate), draws[side], iteration, antialias=antialias)
        terms = inversion_loss(
            augmented * scale + shift,
            state.class_ids,
            networks=networks,
            guides=guides(iteration),
            objective=objective,
            state=state,
            normalized=augmented,
            iteration=iteration,
            seed=seed,
        )
        for group, gradient in zip(entered, torch.autograd.grad(terms.total, iterate), strict=True):
            group.step(gradient, iteration, lowest, highest)
        if iteration == num_iterations - 1 or (log_every and iteration % log_every == 0):
            logged[iteration] = LossTerms(*(term.detach() for term in terms))
        if after_iteration is not None and iteration < num_iterations - 1:
            after_iteration(partial(_state, iteration + 1, entered, state, logged))

    images = initial.detach().clone()
    for group in entered:
        x = resized(group.x.detach(), size, antialias=antialias)
        images[group.rows] = (x * scale + shift).clamp(0, 1)
    history = _records(logged)
    _check_finite(images, history[-1], num_iterations)
    return Inversion(images, history[-1].ce, history[-1].bn, history if log_every else ())


def _state(
    done: int, entered: Sequence[_Group], batch: BatchState, logged: Mapping[int, LossTerms]
) -> dict[str, Tensor]:
    found = {"iteration": torch.tensor(done)}
    for number, group in enumerate(entered):
        found |= {f"group.{number}.{key}": value for key, value in group.state().items()}
    found |= {f"average.{json.dumps(key)}": value for key, value in batch.averages.items()}
    if logged:
        found["logged.iterations"] = torch.tensor(list(logged))
        found["logged.terms"] = torch.stack([torch.stack(list(terms)) for terms in logged.values()])
    return {key: value.detach().to("cpu", copy=True).contiguous() for key, value in found.items()}


def _part(state: State, prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _statistic(key: str) -> tuple[str, int, str]:
    name, index, kind = json.loads(key)
    return name, index, kind


def _logged(state: State, device: torch.device) -> dict[int, LossTerms]:
    if "logged.iterations" not in state:
        return {}
    terms = state["logged.terms"].to(device)
    return {n: LossTerms(*row) for n, row in zip(state["logged.iterations"].tolist(), terms, strict=True)}


def to_uint8(pixels: Tensor) -> Tensor:
    """Pixels in [0, 1] as bytes, to the nearest. Deviation: the released program truncates."""
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8)


def resized(images: Tensor, size: int, *, antialias: bool) -> Tensor:
    """Images at size x size pixels, bilinear; of that size, themselves."""
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False, antialias=antialias)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _groups(x: Tensor, rounds: Sequence[int] | None, descent: Descent) -> list[_Group]:
    """The images that enter at each iteration, those of the first one first."""
    entries = [0] * len(x) if rounds is None else list(rounds)
    groups = []
    for entry in sorted(set(entries)):
        rows = torch.tensor([n for n, other in enumerate(entries) if other == entry], device=x.device)
        groups.append(_Group(rows, entry, x[rows], descent))
    return groups


def _drawn(augmentations: Callable[[int], Augmentations], size: int, num_iterations: int) -> Augmentations:
    drawn = augmentations(size)
    if len(drawn) < num_iterations:
        raise ValueError(f"num_iterations={num_iterations}: expected 0 to the {len(drawn)} augmentations drawn")
    return drawn


def _records(logged: Mapping[int, LossTerms]) -> tuple[LossRecord, ...]:
    """The logged terms as numbers, in one transfer from the device."""
    values = torch.stack([torch.stack((terms.ce, terms.bn)) for terms in logged.values()]).tolist()
    return tuple(LossRecord(iteration, ce, bn) for iteration, (ce, bn) in zip(logged, values, strict=True))


def _check(
    initial: Tensor,
    class_ids: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    descent: Descent,
    rounds: Sequence[int] | None,
) -> None:
    if initial.ndim != 4 or not initial.is_floating_point():
        raise ValueError(
            f"initial: {initial.dtype} of shape {tuple(initial.shape)}; expected float images (B, C, S, S)"
        )
    if initial.shape[-1] != initial.shape[-2]:
        raise ValueError(f"initial: images of {initial.shape[-2]} x {initial.shape[-1]} pixels; expected square ones")
    if class_ids.shape != initial.shape[:1] or class_ids.dtype != torch.int64:
        raise ValueError(
            f"class_ids: {class_ids.dtype} of shape {tuple(class_ids.shape)}; expected int64 ({initial.shape[0]},)"
        )
    if not len(mean) == len(std) == initial.shape[1]:
        raise ValueError(f"mean, std: {len(mean)} and {len(std)} channels; expected {initial.shape[1]}")
    if min(std) <= 0:
        raise ValueError(f"std={list(std)}: not allowed; expected numbers above 0")
    if descent.num_iterations < 0:
        raise ValueError(f"num_iterations={descent.num_iterations}: not allowed; expected an integer of at least 0")
    if rounds is not None and (len(rounds) != len(initial) or min(rounds) != 0):
        raise ValueError(
            f"rounds: {len(rounds)} from {min(rounds, default=0)} on; expected one for each of {len(initial)} images, "
            "the first of them 0"
        )


def _assert_frozen(name: str, teacher: nn.Module) -> None:
    assert not any(module.training for module in teacher.modules()), f"teacher {name!r} is in training mode"
    assert not any(p.requires_grad for p in teacher.parameters()), f"teacher {name!r} has trainable parameters"


def _check_finite(images: Tensor, last: LossRecord, num_iterations: int) -> None:
    # An undefined gradient leaves NaN in X for good, so looking once, at the end, finds it without syncs in between.
    finite = images.isfinite().flatten(1).all(dim=1)
    if math.isfinite(last.ce) and math.isfinite(last.bn) and bool(finite.all()):
        return
    raise NotFinite(
        f"images are not finite after {num_iterations} iterations (last cross-entropy {last.ce:g}, statistics "
        f"{last.bn:g}); lower the learning rate or the statistics weight, or check the teachers' weights",
        (~finite).nonzero()[:, 0].tolist(),
    )
