"""CPU time of a synthesis step: the engine against a loop structured as the released programs are, and a bare loop.

    python benchmarks/synthesis_step.py [--cells fashion_mnist imagenet_lite] [--pairs 7] [--steps 6] [--batch-size B]
        [--fast]

The same pool, batch, images, draws, precision (fp32) and thread for all three. `released` is written from the
description of PRISM's and SRe2L's programs: the primary is there twice and runs twice, every network of the set runs to
its logits, moments take two passes over a copy of the activations, and the best cost is looked at in every step. `bare`
does the engine's own arithmetic, on networks laid out as the engine's, with nothing around it. Before anything is
timed, the loss terms of a first step must agree to 1e-5.

Prints a JSON line per cell: for each set of statistics teachers the milliseconds of CPU time per step and the median
ratios over interleaved rounds, and the ratios weighted by how often the method draws each set; the engine's operations
per second, as a share of the most that a convolution or a matrix product reaches here; and the operators where a step
of the largest set spends its time. With `--fast` also the engine over itself with `method.compile`, `method.precision`
of bfloat16, and both; their losses differ by rounding and are not compared. Ends with 1 if losses differ.
"""

import argparse
import copy
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read once, when torch is imported: what follows comes after it

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from benchmarks.measuring import SIZES, circumstances, interleaved, normalization, print_cells, spread, stand_in  # noqa: E402
from prism_ray.cli.compose import compose  # noqa: E402
from prism_ray.methods.inversion.augment import Augmentations, draw_augmentations  # noqa: E402
from prism_ray.methods.inversion.compiled import compiled_pass  # noqa: E402
from prism_ray.methods.inversion.engine import Descent, Inversion, invert  # noqa: E402
from prism_ray.methods.inversion.objective import Guides, Network, Objective  # noqa: E402
from prism_ray.methods.inversion.statistics import moments, targets_of  # noqa: E402
from prism_ray.models.classifier import Classifier, frozen  # noqa: E402

LR, BETAS, EPS = 0.05, (0.5, 0.9), 1e-8
BN_WEIGHT, FIRST = 0.01, 10.0
TOLERANCE = 1e-5


@dataclass
class Cell:
    """A pool of teachers with a batch for them, as a recipe has it."""

    name: str
    primary: str
    teachers: Mapping[str, Classifier]
    initial: Tensor  # (B, C, S, S), pixels
    class_ids: Tensor  # (B,)
    mean: Sequence[float]
    std: Sequence[float]
    draws: Augmentations
    sets: Mapping[tuple[str, ...], float]  # statistics teachers, primary first -> how often they are drawn

    @cached_property
    def quick(self) -> dict[str, Classifier]:
        """The teachers as the product's workers lay them out."""
        return {
            name: frozen(copy.deepcopy(net)).to(memory_format=torch.channels_last)
            for name, net in self.teachers.items()
        }

    @cached_property
    def networks(self) -> dict[str, Network]:
        """The same with what is matched of them; a worker holds them for all of its units."""
        return {name: Network(net, targets_of(net, None, conv=False)) for name, net in self.quick.items()}

    @cached_property
    def compiled(self) -> dict[str, Network]:
        return {name: replace(network, run=compiled_pass(network)) for name, network in self.networks.items()}

    def limits(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        shift, scale = (torch.tensor(list(values)).view(-1, 1, 1) for values in (self.mean, self.std))
        return shift, scale, (0 - shift) / scale, (1 - shift) / scale


Loop = Callable[[Cell, tuple[str, ...], int], tuple[float, float]]
"""Runs so many steps with a set of statistics teachers; returns the last cross-entropy and statistics term."""


def guides_of(cell: Cell, chosen: tuple[str, ...]) -> Guides:
    """The primary's logits and the statistics of the chosen, all alike."""
    return Guides({cell.primary: 1.0}, dict.fromkeys(chosen, 1 / len(chosen)))


def descend(
    cell: Cell, networks: Mapping[str, Network], guides: Callable[[int], Guides], steps: int, *, bfloat16: bool = False
) -> Inversion:
    """Steps of the engine on a cell's batch."""
    return invert(
        cell.initial,
        cell.class_ids,
        networks=networks,
        guides=guides,
        objective=Objective(bn_weight=BN_WEIGHT, first_bn_multiplier=FIRST, bfloat16=bfloat16),
        descent=Descent(num_iterations=steps, lr=LR, adam_betas=BETAS),
        mean=cell.mean,
        std=cell.std,
        augmentations=lambda side: cell.draws,
        antialias=False,
        seed=0,
    )


def engine(
    cell: Cell, chosen: tuple[str, ...], steps: int, *, compiled: bool = False, bfloat16: bool = False
) -> tuple[float, float]:
    guides, networks = guides_of(cell, chosen), cell.compiled if compiled else cell.networks
    result = descend(cell, networks, lambda iteration: guides, steps, bfloat16=bfloat16)
    return result.loss_ce, result.loss_bn


class ReleasedHook:
    """Distance of one batch norm's input, as the SRe2L family computes it: after the layer, in two passes."""

    def __init__(self, layer: nn.BatchNorm2d) -> None:
        self.distance = torch.zeros(())
        self.handle = layer.register_forward_hook(self._observe)

    def _observe(self, layer: nn.BatchNorm2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0]
        mean = x.mean([0, 2, 3])
        var = x.permute(1, 0, 2, 3).contiguous().view(x.shape[1], -1).var(1, unbiased=False)
        means, variances = running(layer)
        self.distance = torch.norm(variances - var, 2) + torch.norm(means - mean, 2)


def released(cell: Cell, chosen: tuple[str, ...], steps: int) -> tuple[float, float]:
    # A second copy of the primary, as the programs load it.
    matched = [copy.deepcopy(cell.teachers[name]) if name == cell.primary else cell.teachers[name] for name in chosen]
    hooks = [[ReleasedHook(m) for m in net.modules() if isinstance(m, nn.BatchNorm2d)] for net in matched]
    shift, scale, lowest, highest = cell.limits()
    x = ((cell.initial - shift) / scale).requires_grad_()
    optimizer = torch.optim.Adam([x], lr=LR, betas=BETAS, eps=EPS)
    primary, best, best_x = cell.teachers[cell.primary], math.inf, x
    ce = bn = torch.zeros(())
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate(step, steps)
        pixels = augmented(x, cell.draws, step) * scale + shift
        optimizer.zero_grad()
        ce = F.cross_entropy(primary(pixels), cell.class_ids)
        terms = []
        for network, own in zip(matched, hooks, strict=True):
            network(pixels)
            terms.append(sum(hook.distance * (FIRST if n == 0 else 1.0) for n, hook in enumerate(own)))
        bn = torch.stack([torch.as_tensor(term) for term in terms]).mean()
        loss = ce + BN_WEIGHT * bn
        loss.backward()
        optimizer.step()
        for channel in range(x.shape[1]):
            low, high = float(lowest[min(channel, len(lowest) - 1)]), float(highest[min(channel, len(highest) - 1)])
            x.data[:, channel] = torch.clamp(x.data[:, channel], low, high)
        if loss.item() < best:
            best, best_x = loss.item(), x.data.clone()
    for hook in itertools.chain(*hooks):
        hook.handle.remove()
    del best_x
    return ce.item(), bn.item()


class Complete(Exception):
    """The last batch norm of a network was seen."""


def bare(cell: Cell, chosen: tuple[str, ...], steps: int) -> tuple[float, float]:
    distances: dict[str, list[Tensor]] = {name: [] for name in chosen}

    def observe(name: str, count: int, layer: nn.BatchNorm2d, inputs: tuple[Tensor, ...]) -> None:
        mean, var = moments(inputs[0], (0, 2, 3))
        own = distances[name]
        means, variances = running(layer)
        norms = torch.linalg.vector_norm(mean - means) + torch.linalg.vector_norm(var - variances)
        own.append(norms if own else FIRST * norms)
        if name != cell.primary and len(own) == count:
            raise Complete

    handles = []
    for name in chosen:
        layers = [m for m in cell.quick[name].modules() if isinstance(m, nn.BatchNorm2d)]
        handles += [m.register_forward_pre_hook(partial(observe, name, len(layers))) for m in layers]
    shift, scale, lowest, highest = cell.limits()
    x = ((cell.initial - shift) / scale).requires_grad_()
    optimizer = torch.optim.Adam([x], lr=LR, betas=BETAS, eps=EPS)
    ce = bn = torch.zeros(())
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate(step, steps)
        pixels = augmented(x, cell.draws, step) * scale + shift
        for own in distances.values():
            own.clear()
        ce = F.cross_entropy(cell.quick[cell.primary](pixels), cell.class_ids)
        for name in chosen:
            if name != cell.primary:
                with suppress(Complete):
                    cell.quick[name](pixels)
        bn = sum((torch.stack(own).sum() for own in distances.values()), torch.zeros(())) / len(chosen)
        (x.grad,) = torch.autograd.grad(ce + BN_WEIGHT * bn, [x])
        optimizer.step()
        with torch.no_grad():
            x.clamp_(lowest, highest)
    for handle in handles:
        handle.remove()
    return ce.item(), bn.item()


LOOPS: dict[str, Loop] = {"engine": engine, "released": released, "bare": bare}
FAST: dict[str, Loop] = {
    "compiled": partial(engine, compiled=True),
    "bfloat16": partial(engine, bfloat16=True),
    "compiled bfloat16": partial(engine, compiled=True, bfloat16=True),
}


def running(layer: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    mean, var = layer.running_mean, layer.running_var
    if mean is None or var is None:
        raise ValueError("a batch norm without running statistics")
    return mean, var


def rate(step: int, steps: int) -> float:
    return LR / 2 * (1 + math.cos(math.pi * step / steps))


def augmented(x: Tensor, draws: Augmentations, step: int) -> Tensor:
    """Crop, flip and roll as torchvision's functions do them on tensors, at the engine's draws."""
    top, left, height, width = (int(a[step]) for a in (draws.top, draws.left, draws.height, draws.width))
    crop = x[..., top : top + height, left : left + width]
    crop = F.interpolate(crop, size=x.shape[-2:], mode="bilinear", align_corners=False)
    if draws.flip[step]:
        crop = crop.flip(-1)
    return torch.roll(crop, (int(draws.roll_y[step]), int(draws.roll_x[step])), dims=(-2, -1))


def load(name: str, batch_size: int | None) -> Cell:
    """A recipe's pool; networks that a recipe trains have random weights and the statistics of random images."""
    config = compose([f"recipe={name}", "method=prism_released"])
    slots = compose([f"recipe={name}"]).method.statistics_slots
    side, channels, num_classes = SIZES[name]
    mean, std = normalization(channels)
    generator = torch.Generator().manual_seed(0)
    teachers = {
        key: frozen(stand_in(config.teachers.models[key], name, seed=number, generator=generator, batches=20))
        for number, key in enumerate(config.teachers.pool)
    }
    count = batch_size or {"digits": 10, "fashion_mnist": 50, "imagenet_lite": 8}[name]
    draws = draw_augmentations(0, 1000, size=side, crop_area_min=0.08, flip_probability=0.5, roll_max=side // 7)
    primary = str(config.teachers.primary)
    return Cell(
        name=name,
        primary=primary,
        teachers=teachers,
        initial=torch.rand(count, channels, side, side, generator=generator),
        class_ids=torch.arange(count) % num_classes,
        mean=mean,
        std=std,
        draws=draws,
        sets=law(primary, [key for key in teachers if key != primary], slots),
    )


def law(primary: str, others: Sequence[str], slots: int) -> dict[tuple[str, ...], float]:
    """How often each set is drawn: Binomial(slots, 1/2) of the others, all sets of a size equally."""
    found = {}
    for size in range(slots + 1):
        sets = list(itertools.combinations(others, size))
        for chosen in sets:
            found[(primary, *chosen)] = math.comb(slots, size) / 2**slots / len(sets)
    return found


def agree(cell: Cell) -> float:
    """Largest relative difference of a first step's loss terms over all sets."""
    worst = 0.0
    for chosen in cell.sets:
        terms = {name: loop(cell, chosen, 1) for name, loop in LOOPS.items()}
        for name in ("released", "bare"):
            pairs = zip(terms["engine"], terms[name], strict=True)
            worst = max(worst, *(abs(a - b) / max(abs(b), 1e-12) for a, b in pairs))
    return worst


def measure(cell: Cell, *, pairs: int, steps: int, fast: bool = False) -> dict[str, Any]:
    """The three loops of every set, and the fast ones if wanted, interleaved."""
    timed = LOOPS | (FAST if fast else {})
    loops = {(chosen, name): partial(loop, cell, chosen, steps) for chosen in cell.sets for name, loop in timed.items()}
    seconds = interleaved(loops, pairs=pairs)
    sets = []
    peak = peak_gflops()
    totals = dict.fromkeys(timed, 0.0)  # of a step: the engine's median, and the median ratios to it
    for chosen, share in cell.sets.items():
        own = {name: [total / steps for total in seconds[chosen, name]] for name in timed}
        ratios = {
            other: [b / a for a, b in zip(own["engine"], own[other], strict=True)]
            for other in timed
            if other != "engine"
        }
        step_s = share * median(own["engine"])
        totals["engine"] += step_s
        for name, values in ratios.items():
            totals[name] += step_s * median(values)
        sets.append(
            {
                "set": list(chosen),
                "share": round(share, 4),
                "ms": {name: round(1e3 * median(values), 2) for name, values in own.items()},
                "released_over_engine": spread(ratios["released"]),
                "engine_over_bare": spread([1 / ratio for ratio in ratios["bare"]]),
                **{f"engine_over_{name}": spread([1 / ratio for ratio in ratios[name]]) for name in FAST if fast},
                "gflops": round(operations(cell, chosen) / median(own["engine"]) / 1e9, 1),
            }
        )
    return {
        "cell": cell.name,
        "images": len(cell.initial),
        "pixels": cell.initial.shape[-1],
        "released_over_engine": round(totals["released"] / totals["engine"], 3),
        "engine_over_bare": round(totals["engine"] / totals["bare"], 3),
        **{f"engine_over_{name}": round(totals["engine"] / totals[name], 3) for name in FAST if fast},
        "peak_gflops": round(peak, 1),
        "share_of_peak": spread([found["gflops"] / peak for found in sets]),
        "operators_percent": operators(cell, list(cell.sets)[-1], steps=steps),
        "sets": sets,
    }


def operations(cell: Cell, chosen: tuple[str, ...]) -> int:
    """Floating-point operations of one step of the engine, convolutions and products alone; a multiply-add is two."""
    with FlopCounterMode(display=False) as counter:
        engine(cell, chosen, 1)
    return counter.get_total_flops()


def peak_gflops() -> float:
    """The most that this machine reaches in one thread, over a few shapes that suit it."""
    left = torch.randn(768, 768)
    images, weights = torch.randn(8, 64, 56, 56), torch.randn(64, 64, 3, 3)
    runs: list[tuple[Callable[[], Tensor], float]] = [
        (lambda: left @ left, 2 * 768**3),
        (lambda: F.conv2d(images, weights, padding=1), 2 * images.numel() * 64 * 9),
    ]
    best = 0.0
    for run, count in runs:
        for _ in range(20):
            began = time.process_time()
            run()
            best = max(best, count / (time.process_time() - began) / 1e9)
    return best


def operators(cell: Cell, chosen: tuple[str, ...], *, steps: int) -> dict[str, float]:
    """Percent of a step's CPU time in each operator itself, the ten largest."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        engine(cell, chosen, steps)
    found = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    total = sum(found.values())
    largest = sorted(found, key=lambda key: -found[key])[:10]
    return {key: round(100 * found[key] / total, 1) for key in largest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", default=["fashion_mnist", "imagenet_lite"])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=6, help="of each loop and round")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--fast", action="store_true", help="also compiled and in half precision")
    options = parser.parse_args()

    def measured(name: str) -> dict[str, Any]:
        cell = load(name, options.batch_size)
        difference = agree(cell)  # before anything is timed
        result = measure(cell, pairs=options.pairs, steps=options.steps, fast=options.fast)
        return {**result, "loss_difference": difference, "steps": options.steps, **circumstances(options.pairs)}

    print_cells(options.cells, measured, difference="loss_difference", tolerance=TOLERANCE)


if __name__ == "__main__":
    main()
