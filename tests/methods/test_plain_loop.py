"""The engine against loops that share no code with it: own hooks, losses, crops, learning rates and order of steps."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as tv

from prism_ray.methods.inversion.augment import Augmentations, draw_augmentations
from prism_ray.methods.inversion.engine import Descent, invert
from prism_ray.methods.inversion.objective import Guides, Objective
from tests.methods.nets import BnFreeNet, ConvBnNet, ResidualNet, images_and_classes, network_of, prepared

MEAN, STD, SIZE = (0.4914, 0.4822, 0.4465), (0.229, 0.225, 0.201), 8
LR, BETAS = 0.05, (0.5, 0.9)
Loss = Callable[[Tensor, Tensor, int], Tensor]


@pytest.fixture
def teachers() -> dict[str, nn.Module]:
    return {
        "primary": prepared(ConvBnNet(), 1).double(),
        "residual": prepared(ResidualNet(), 2).double(),
        "bn_free": prepared(BnFreeNet(), 3).double(),
    }


def draws_of(num_iterations: int, size: int = SIZE) -> Augmentations:
    return draw_augmentations(4, num_iterations, size=size, crop_area_min=0.08, flip_probability=0.5, roll_max=3)


def augmented(x: Tensor, draws: Augmentations, t: int) -> Tensor:
    box = [int(getattr(draws, side)[t]) for side in ("top", "left", "height", "width")]
    z = tv.resized_crop(x, *box, size=[draws.size, draws.size], antialias=False)
    z = tv.horizontal_flip(z) if draws.flip[t] else z
    return torch.roll(z, (int(draws.roll_y[t]), int(draws.roll_x[t])), dims=(2, 3))


def plain_loop(
    loss: Loss, steps: int, *, entries: Sequence[int] | None = None, every: int = 0, small: int = 0
) -> Tensor:
    """Every image is an optimizer's only parameter; `loss` is of augmented normalized images, classes, iteration.

    With `every`, parts of so many steps alternate between `small` and whole images, half initial ones in between.
    """
    pixels, class_ids = images_and_classes(0, size=SIZE)
    mean, std = (torch.tensor(v).double().view(1, 3, 1, 1) for v in (MEAN, STD))
    initial = (pixels.double() - mean) / std
    images, optimizers = list(initial.split(1)), {}
    entries = entries or [0] * len(images)
    for t in range(steps):
        size = small if every and t // every % 2 == 0 else SIZE
        for n, entry in enumerate(entries):
            starts = every and t % every == 0 and t > entry
            if starts or t == entry:
                x = F.interpolate(images[n].detach(), size=(SIZE, SIZE), mode="bilinear")
                x = (x + initial[n : n + 1]) / 2 if starts else x
                images[n] = F.interpolate(x, size=(size, size), mode="bilinear").requires_grad_()
                optimizers[n] = torch.optim.Adam([images[n]], betas=BETAS, eps=1e-8)
        inside = sorted(optimizers)
        batch = torch.cat([images[n] for n in inside])
        total = loss(augmented(batch, draws_of(steps, size), t), class_ids[inside], t)
        for n in inside:
            optimizers[n].zero_grad()
        total.backward()
        for n in inside:
            optimizers[n].param_groups[0]["lr"] = (
                LR * 0.5 * (1 + math.cos(math.pi * (t - entries[n]) / (steps - entries[n])))
            )
            optimizers[n].step()
            images[n].data = torch.maximum(torch.minimum(images[n].data, (1 - mean) / std), -mean / std)
    whole = [F.interpolate(x.detach(), size=(SIZE, SIZE), mode="bilinear") for x in images]
    return torch.cat(whole) * std + mean


def inputs_of(network: nn.Module, images: Tensor, kinds: Any) -> tuple[Tensor, list[tuple[nn.Module, Tensor]]]:
    """Logits, and the input of every layer of these kinds."""
    layers = [module for module in network.modules() if isinstance(module, kinds)]
    seen: dict[nn.Module, Tensor] = {}
    handles = [layer.register_forward_hook(lambda m, args, _: seen.__setitem__(m, args[0])) for layer in layers]
    logits = network(images)
    for handle in handles:
        handle.remove()
    return logits, [(layer, seen[layer]) for layer in layers]


def to_pixels(x: Tensor) -> Tensor:
    return x * torch.tensor(STD).double().view(1, 3, 1, 1) + torch.tensor(MEAN).double().view(1, 3, 1, 1)


def prism_loss(teachers: dict[str, nn.Module], names: Sequence[str]) -> Loss:
    def loss(x: Tensor, class_ids: Tensor, t: int) -> Tensor:
        total = F.cross_entropy(teachers["primary"](to_pixels(x)), class_ids)
        for name in names:
            for index, (layer, seen) in enumerate(inputs_of(teachers[name], to_pixels(x), nn.BatchNorm2d)[1]):
                assert isinstance(layer.running_mean, Tensor)
                assert isinstance(layer.running_var, Tensor)
                var = ((seen - seen.mean((0, 2, 3), keepdim=True)) ** 2).mean((0, 2, 3))
                distance = (var - layer.running_var).norm() + (seen.mean((0, 2, 3)) - layer.running_mean).norm()
                total = total + 0.01 / len(names) * (10 if index == 0 else 1) * distance
        return total

    return loss


def engine(teachers: dict[str, nn.Module], steps: int, guides: Callable[[int], Guides], **changes: Any) -> Tensor:
    images, class_ids = images_and_classes(0, size=SIZE)
    settings: dict[str, Any] = {
        "networks": {name: network_of(teacher) for name, teacher in teachers.items()},
        "objective": Objective(),
        "descent": Descent(num_iterations=steps, lr=LR, adam_betas=BETAS),
        "augmentations": lambda size: draws_of(steps, size),
    }
    return invert(
        images.double(), class_ids, guides=guides, mean=MEAN, std=STD, antialias=False, seed=0, **(settings | changes)
    ).images


def prism(names: Sequence[str]) -> Callable[[int], Guides]:
    return lambda t: Guides({"primary": 1.0}, dict.fromkeys(names, 1 / len(names)))


# Rounding differs: where a gradient is 0 but for it, Adam makes 1e-9 of a step of 1e-16, and that grows step by step.


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(("primary",), id="a single teacher, SRe2L"),
        pytest.param(("primary", "residual"), id="two teachers"),
        pytest.param(("primary", "residual", "bn_free"), id="a counted teacher without batch norm"),
    ],
)
def test_200_steps_give_the_images_of_a_plain_loop(teachers, names):
    expected = plain_loop(prism_loss(teachers, names), 200)
    found = engine(teachers, 200, prism(names))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert (found - images_and_classes(0, size=SIZE)[0]).abs().mean() > 0.05  # they moved far


def test_teachers_redrawn_during_optimization_give_the_images_of_a_plain_loop(teachers):
    sets = [("primary", "residual") if t // 4 % 2 else ("primary",) for t in range(24)]
    losses = {names: prism_loss(teachers, names) for names in sets}
    expected = plain_loop(lambda x, class_ids, t: losses[sets[t]](x, class_ids, t), 24)
    found = engine(teachers, 24, lambda t: prism(sets[t])(t))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_images_that_enter_in_rounds_are_those_of_a_plain_loop(teachers):
    entries = [0, 10, 0, 5, 10, 5]
    names = ("primary", "residual")
    expected = plain_loop(prism_loss(teachers, names), 30, entries=entries)
    torch.testing.assert_close(engine(teachers, 30, prism(names), rounds=entries), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", [30, 34])
@pytest.mark.parametrize("entries", [None, [0, 10, 0, 5, 10, 5]])
def test_a_data_residual_at_two_sizes_gives_the_images_of_a_plain_loop(teachers, entries, steps):
    names = ("primary", "residual")
    expected = plain_loop(prism_loss(teachers, names), steps, entries=entries, every=10, small=6)
    descent = Descent(num_iterations=steps, lr=LR, residual_every=10, residual_weight=0.5, residual_scale=0.75)
    found = engine(teachers, steps, prism(names), descent=descent, rounds=entries)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_every_statistic_average_and_regularizer_together_are_those_of_a_plain_loop(teachers):
    """G-VBSM's objective with class-wise shares: one teacher after another, batch norm, convolutions and patches."""
    networks = {name: network_of(teacher, conv=True, patch_size=4) for name, teacher in teachers.items()}
    pool, averages = list(teachers), {}

    def smooth(key: tuple[str, int, str], statistic: Tensor) -> Tensor:
        averages[key] = 0.4 * averages[key] + 0.6 * statistic.detach() if key in averages else statistic.detach()
        return averages[key] + statistic - statistic.detach()

    def moments(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        return x.mean(dims), ((x - x.mean(dims, keepdim=True)) ** 2).mean(dims)

    def distance(key: tuple[str, int, str], found: tuple[Tensor, Tensor], mean: Any, var: Any) -> Tensor:
        name, index, kind = key
        means, variances = smooth((name, index, kind + "mean"), found[0]), smooth((name, index, kind + "var"), found[1])
        return (means - mean).norm(dim=-1) + (variances - var).norm(dim=-1)

    def loss(x: Tensor, class_ids: Tensor, t: int) -> Tensor:
        name = pool[t % 3]
        logits, inputs = inputs_of(teachers[name], to_pixels(x), (nn.BatchNorm2d, nn.Conv2d))
        total = F.cross_entropy(logits, class_ids)
        classes = sorted(set(class_ids.tolist()))
        for index, (layer, seen) in enumerate(inputs):
            target = networks[name].targets[index]
            whole = distance((name, index, ""), moments(seen, (0, 2, 3)), target.mean, target.var)
            if isinstance(layer, nn.Conv2d):
                side = math.ceil(seen.shape[-1] / 4)
                maps = F.interpolate(seen, size=(4 * side, 4 * side), mode="bilinear").unfold(2, side, side)
                tiles = maps.unfold(3, side, side).permute(2, 3, 0, 1, 4, 5).reshape(16, -1)
                whole = whole + distance((name, index, "p"), moments(tiles, (1,)), target.patch_mean, target.patch_var)
            assert target.class_mean is not None
            assert target.class_var is not None
            by_class = [moments(seen[class_ids == c], (0, 2, 3)) for c in classes]
            stacked = torch.stack([m for m, _ in by_class]), torch.stack([v for _, v in by_class])
            own = distance((name, index, "c"), stacked, target.class_mean[classes], target.class_var[classes])
            total = total + 0.02 * (10 if index == 0 else 1) * (0.7 * whole + 0.3 * own.mean())
        for c in classes:
            units = x[class_ids == c].flatten(1)
            eigenvalues = torch.linalg.eigvals(units @ units.T).real
            total = total + 0.5 * F.kl_div(
                eigenvalues.log_softmax(0), (eigenvalues.detach() / 4).softmax(0), reduction="sum"
            )
        total = total + 1e-3 * torch.stack([image.norm() for image in x]).mean()
        shifts = ((1, 0), (0, 1), (1, 1))
        pairs = [(x[..., i:, j:], x[..., : SIZE - i, : SIZE - j]) for i, j in shifts]
        pairs.append((x[..., 1:, : SIZE - 1], x[..., : SIZE - 1, 1:]))
        return total + 1e-3 * sum((a - b).norm() for a, b in pairs)

    expected = plain_loop(loss, 12)
    found = engine(
        teachers,
        12,
        lambda t: Guides({pool[t % 3]: 1.0}, {pool[t % 3]: 1.0}),
        networks=networks,
        objective=Objective(
            bn_weight=0.02, class_share=0.3, statistics_ema=0.4, eig_weight=0.5, l2_weight=1e-3, tv_weight=1e-3
        ),
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
