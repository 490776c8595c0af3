import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms.v2 import functional as tv

from prism_ray.methods.inversion.augment import draw_augmentations
from prism_ray.methods.inversion.engine import Inversion, invert, to_uint8
from tests.methods.nets import (
    BnFreeNet,
    ConvBnNet,
    ResidualNet,
    counted_calls,
    images_and_classes,
    num_hooks,
    prepared,
)

# For these, (0 - mean) / std * std + mean is below 0 in float32: the result must be clamped once more.
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.229, 0.225, 0.201)
SIZE = 8


@pytest.fixture
def teachers() -> dict[str, nn.Module]:
    return {
        "primary": prepared(ConvBnNet(), 1),
        "residual": prepared(ResidualNet(), 2),
        "bn_free": prepared(BnFreeNet(), 3),
    }


def run(
    teachers: dict[str, nn.Module], num_iterations: int, *, initial: Tensor | None = None, **changes: Any
) -> Inversion:
    """A run of the engine on the standard batch, PRISM's settings but for the changes."""
    images, class_ids = images_and_classes(0, size=SIZE)
    settings: dict[str, Any] = {
        "primary": "primary",
        "teachers": teachers,
        "statistics_teachers": lambda iteration: ("primary", "residual"),
        "num_iterations": num_iterations,
        "lr": 0.05,
        "adam_betas": (0.5, 0.9),
        "mean": MEAN,
        "std": STD,
        "augmentations": augmentations_of(num_iterations),
        "antialias": False,
        "bn_weight": 0.01,
        "first_bn_multiplier": 10.0,
        "count_bn_free_teachers": True,
    }
    return invert(images if initial is None else initial, class_ids, **(settings | changes))


def augmentations_of(num_iterations: int, *, seed: int = 4, is_identity: bool = False):
    if is_identity:
        return draw_augmentations(seed, num_iterations, size=SIZE, crop_area_min=1, flip_probability=0, roll_max=0)
    return draw_augmentations(seed, num_iterations, size=SIZE, crop_area_min=0.08, flip_probability=0.5, roll_max=3)


def normalized(pixels: Tensor) -> Tensor:
    return (pixels - pixels.new_tensor(MEAN).view(3, 1, 1)) / pixels.new_tensor(STD).view(3, 1, 1)


def states(teachers: dict[str, nn.Module]) -> dict[str, Tensor]:
    return {f"{name}.{key}": v.clone() for name, t in teachers.items() for key, v in t.state_dict().items()}


def plain_inversion(teachers, sets, augmentations, *, lr: float, beta1: float, beta2: float) -> Tensor:
    """The same optimization written down plainly in float64: own Adam, own schedule, own hooks, torchvision's crops."""
    pixels, class_ids = images_and_classes(0, size=SIZE)
    mean = torch.tensor(MEAN, dtype=torch.float64).view(1, 3, 1, 1)
    std = torch.tensor(STD, dtype=torch.float64).view(1, 3, 1, 1)
    x = (pixels.double() - mean) / std
    m, v = torch.zeros_like(x), torch.zeros_like(x)
    for t, names in enumerate(sets):
        x.requires_grad_(True)
        box = [int(getattr(augmentations, side)[t]) for side in ("top", "left", "height", "width")]
        z = tv.resized_crop(x, *box, size=[SIZE, SIZE], antialias=False)
        z = tv.horizontal_flip(z) if augmentations.flip[t] else z
        z = torch.roll(z, (int(augmentations.roll_y[t]), int(augmentations.roll_x[t])), dims=(2, 3))
        loss = F.cross_entropy(teachers["primary"](z * std + mean), class_ids)
        for name in names:
            for index, (layer, seen) in enumerate(bn_inputs(teachers[name], z * std + mean)):
                assert layer.running_mean is not None
                assert layer.running_var is not None
                var = ((seen - seen.mean((0, 2, 3), keepdim=True)) ** 2).mean((0, 2, 3))
                distance = (var - layer.running_var).norm() + (seen.mean((0, 2, 3)) - layer.running_mean).norm()
                loss = loss + 0.01 / len(names) * (10 if index == 0 else 1) * distance
        (g,) = torch.autograd.grad(loss, x)
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        step = m / (1 - beta1 ** (t + 1)) / ((v / (1 - beta2 ** (t + 1))).sqrt() + 1e-8)
        rate = lr * (1 + math.cos(math.pi * t / len(sets))) / 2
        x = (x.detach() - rate * step).minimum((1 - mean) / std).maximum(-mean / std)
    return x * std + mean


def bn_inputs(network: nn.Module, images: Tensor) -> list[tuple[nn.BatchNorm2d, Tensor]]:
    layers = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    seen: dict[nn.Module, Tensor] = {}
    handles = [layer.register_forward_hook(lambda m, args, _: seen.__setitem__(m, args[0])) for layer in layers]
    network(images)
    for handle in handles:
        handle.remove()
    return [(layer, seen[layer]) for layer in layers]


# --- the optimization ---


@pytest.mark.parametrize(
    "draw",
    [
        pytest.param(lambda t: ("primary",), id="single teacher, SRe2L"),
        pytest.param(lambda t: ("primary", "residual"), id="two teachers"),
        pytest.param(lambda t: ("primary", "residual", "bn_free"), id="a counted teacher without batch norm"),
        pytest.param(
            lambda t: ("primary", "residual") if t // 4 % 2 else ("primary",), id="redrawn every 4 iterations"
        ),
    ],
)
def test_the_result_is_that_of_a_plain_independent_loop(teachers, draw):
    num_iterations = 12
    teachers = {name: network.double() for name, network in teachers.items()}
    images = run(
        teachers,
        num_iterations,
        initial=images_and_classes(0, size=SIZE)[0].double(),
        statistics_teachers=draw,
        adam_betas=(0.6, 0.8),
    ).images
    sets = [draw(t) for t in range(num_iterations)]
    expected = plain_inversion(teachers, sets, augmentations_of(num_iterations), lr=0.05, beta1=0.6, beta2=0.8)
    # Float64; Adam divides by gradients near 0, which amplifies rounding, hence not closer.
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-9)


def test_the_first_step_moves_every_pixel_by_the_learning_rate_in_units_of_std(teachers):
    start, _ = images_and_classes(0, size=SIZE)
    end = run(teachers, 1, lr=0.01, augmentations=augmentations_of(1, is_identity=True)).images
    moved = (normalized(end) - normalized(start)).abs()
    # Adam's first step is the learning rate in the direction of the sign; eps matters where the gradient is tiny.
    assert moved.median().item() == pytest.approx(0.01, rel=1e-3)
    assert moved.max().item() <= 0.01 * (1 + 1e-4)


def test_set_is_asked_for_once_per_iteration_in_order(teachers):
    asked = []

    def draw(iteration: int) -> tuple[str, ...]:
        asked.append(iteration)
        return ("primary",)

    run(teachers, 5, statistics_teachers=draw)
    assert asked == [0, 1, 2, 3, 4]


def test_zero_iterations_return_the_initial_images_bit_for_bit(teachers):
    initial, _ = images_and_classes(0, size=SIZE)
    result = run(teachers, 0, log_every=1)
    assert torch.equal(result.images, initial)
    assert math.isnan(result.loss_ce)
    assert math.isnan(result.loss_bn)
    assert result.history == ()


def trained_teacher() -> nn.Module:
    """A classifier of five striped patterns in noise, trained for a moment, with running statistics of that data."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.rand(5, 3, SIZE, 1, generator=generator).expand(-1, -1, -1, SIZE)
    network = prepared(ConvBnNet(width=12), 0).requires_grad_(True).train()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    for _ in range(120):
        class_ids = torch.randint(5, (64,), generator=generator)
        noise = 0.1 * torch.randn(64, 3, SIZE, SIZE, generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(network((patterns[class_ids] + noise).clamp(0, 1)), class_ids).backward()
        optimizer.step()
    return network.eval().requires_grad_(False)


def test_noise_becomes_images_that_the_teacher_recognizes_and_whose_statistics_fit():
    teacher = trained_teacher()
    noise = torch.randn(6, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    noise = noise * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    result = run(
        {"primary": teacher},
        150,
        initial=noise,
        statistics_teachers=lambda _: ("primary",),
        augmentations=augmentations_of(150, is_identity=True),
        log_every=149,
    )
    first, last = result.history
    assert last.ce < 0.1 * first.ce
    assert last.bn < 0.5 * first.bn
    assert torch.equal(teacher(result.images).argmax(dim=1), images_and_classes(0)[1])


def test_reported_losses_are_those_of_the_last_iterate_before_its_step(teachers):
    result = run(teachers, 4, log_every=2, augmentations=augmentations_of(4, is_identity=True))
    with counted_calls(teachers["primary"]) as seen:
        run(teachers, 4, augmentations=augmentations_of(4, is_identity=True))
    _, class_ids = images_and_classes(0, size=SIZE)
    assert result.loss_ce == pytest.approx(F.cross_entropy(teachers["primary"](seen[-1]), class_ids).item(), rel=1e-6)


def test_history_has_every_logged_iteration_and_the_last(teachers):
    result = run(teachers, 8, log_every=3)
    assert [record.iteration for record in result.history] == [0, 3, 6, 7]
    assert (result.history[-1].ce, result.history[-1].bn) == (result.loss_ce, result.loss_bn)
    assert run(teachers, 8).history == ()


def test_logging_changes_nothing(teachers):
    plain, logged = run(teachers, 6), run(teachers, 6, log_every=1)
    assert torch.equal(plain.images, logged.images)
    assert (plain.loss_ce, plain.loss_bn) == (logged.loss_ce, logged.loss_bn)


# --- the valid box ---


def test_teachers_see_valid_pixels_after_every_step(teachers):
    with counted_calls(teachers["primary"]) as seen:
        images = run(teachers, 15, lr=2.0, augmentations=augmentations_of(15, is_identity=True)).images
    assert len(seen) == 15
    for pixels in seen:
        # Rounding of (p - mean) / std * std + mean.
        assert pixels.min() >= -1e-6
        assert pixels.max() <= 1 + 1e-6
    assert images.min() == 0  # the box is reached in every channel, and the result is exactly inside
    assert images.max() == 1
    assert images.amin(dim=(0, 2, 3)).max() < 1e-6
    assert images.amax(dim=(0, 2, 3)).min() > 1 - 1e-6


def test_noise_outside_the_box_is_a_valid_start_and_enters_it_at_the_first_step(teachers):
    noise = 3 * torch.randn(6, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    with counted_calls(teachers["primary"]) as seen:
        images = run(teachers, 2, initial=noise, augmentations=augmentations_of(2, is_identity=True)).images
    torch.testing.assert_close(seen[0], noise, rtol=0, atol=1e-5)
    assert seen[1].min() >= -1e-6
    assert seen[1].max() <= 1 + 1e-6
    assert images.min() >= 0
    assert images.max() <= 1


def test_gray_images_are_optimized_with_one_channel():
    images, class_ids = images_and_classes(0, size=SIZE, channels=1)
    teachers = {"primary": prepared(ConvBnNet(in_chans=1), 1)}
    result = invert(
        images,
        class_ids,
        primary="primary",
        teachers=teachers,
        statistics_teachers=lambda _: ["primary"],
        num_iterations=2,
        lr=0.05,
        adam_betas=(0.5, 0.9),
        mean=[0.3],
        std=[0.2],
        augmentations=augmentations_of(2),
        antialias=False,
        bn_weight=0.01,
        first_bn_multiplier=10,
        count_bn_free_teachers=True,
    )
    assert result.images.shape == (6, 1, SIZE, SIZE)
    assert not torch.equal(result.images, images)


# --- purity ---


def test_the_same_call_gives_the_same_bytes_whatever_ran_before(teachers):
    first = run(teachers, 6)
    run(teachers, 3, initial=torch.zeros(6, 3, SIZE, SIZE), lr=0.5)
    torch.manual_seed(99)
    again = run(teachers, 6)
    assert torch.equal(first.images, again.images)
    assert (first.loss_ce, first.loss_bn) == (again.loss_ce, again.loss_bn)
    assert not torch.equal(first.images, run(teachers, 6, augmentations=augmentations_of(6, seed=5)).images)


def test_the_global_random_state_is_neither_used_nor_changed(teachers):
    before = torch.random.get_rng_state()
    run(teachers, 3)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_teachers_stay_as_they_are(teachers):
    before = states(teachers)
    run(teachers, 5, statistics_teachers=lambda _: ("primary", "residual", "bn_free"))
    after = states(teachers)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    for teacher in teachers.values():
        assert not any(module.training for module in teacher.modules())
        assert all(parameter.grad is None for parameter in teacher.parameters())
        assert num_hooks(teacher) == 0


def test_the_initial_images_are_left_alone(teachers):
    initial, _ = images_and_classes(0, size=SIZE)
    before = initial.clone()
    result = run(teachers, 3, initial=initial)
    assert torch.equal(initial, before)
    untouched = run(teachers, 0, initial=initial)
    untouched.images.zero_()
    assert torch.equal(initial, before)
    assert not result.images.requires_grad
    assert not initial.requires_grad


def test_iterations_read_no_number_back_from_the_device(teachers):
    class Reads(TorchDispatchMode):
        """Counts reads of a number out of a tensor, which wait for the device."""

        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # pyright: ignore[reportIncompatibleMethodOverride]
            self.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    def reads_of(steps: int) -> int:
        with Reads() as reads:
            run(teachers, steps)
        return reads.count

    def reads_of_adam(steps: int) -> int:
        """Adam's own step counter, which is on the CPU whatever the device of the images."""
        x = torch.zeros(1, requires_grad=True)
        x.grad = torch.ones(1)
        optimizer = torch.optim.Adam([x])
        with Reads() as reads:
            for _ in range(steps):
                optimizer.step()
        return reads.count

    assert reads_of(9) - reads_of(2) == reads_of_adam(9) - reads_of_adam(2)


# --- refusals ---


def test_undefined_results_are_an_error_that_names_budget_and_loss(teachers):
    teachers["primary"].head.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match=r"3 iterations.*cross-entropy nan"):
        run(teachers, 3)


def test_an_infinite_statistics_term_is_an_error(teachers):
    teachers["residual"].norm.running_var.fill_(torch.inf)
    with pytest.raises(FloatingPointError, match=r"2 iterations.*statistics nan"):
        run(teachers, 2)


def test_unknown_teachers_are_refused_with_the_known_names(teachers):
    with pytest.raises(ValueError, match="'resnet81' is unknown; known: bn_free, primary, residual"):
        run(teachers, 1, primary="resnet81")
    with pytest.raises(ValueError, match="'other' is unknown"):
        run(teachers, 1, statistics_teachers=lambda _: ("primary", "other"))


def test_a_set_without_batch_norm_is_refused(teachers):
    with pytest.raises(ValueError, match="no batch norm"):
        run(teachers, 1, statistics_teachers=lambda _: ("bn_free",))


def test_teachers_in_training_mode_or_with_trainable_weights_are_an_assertion(teachers):
    teachers["residual"].norm.train()
    with pytest.raises(AssertionError, match="'residual' is in training mode"):
        run(teachers, 1)
    teachers["residual"].eval()
    teachers["bn_free"].head.requires_grad_(True)
    with pytest.raises(AssertionError, match="'bn_free' has trainable"):
        run(teachers, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"initial": torch.zeros(5, 3, SIZE, SIZE)}, "class_ids"),
        ({"initial": torch.zeros(6, 1, SIZE, SIZE)}, "mean, std: 3 and 3 channels; expected 1"),
        ({"initial": torch.zeros(6, 3, SIZE, SIZE, dtype=torch.uint8)}, "initial: torch.uint8"),
        ({"initial": torch.zeros(6, 3, SIZE, SIZE + 1)}, "8 x 9 pixels"),
        ({"std": (0.2, 0.0, 0.2)}, "std="),
        ({"augmentations": augmentations_of(2)}, "num_iterations=3: expected 0 to the 2"),
    ],
)
def test_inputs_that_disagree_are_refused(teachers, changes, message):
    with pytest.raises(ValueError, match=message):
        run(teachers, 3, **changes)


# --- storage ---


def test_bytes_are_the_nearest_to_the_pixels():
    pixels = torch.tensor([0.0, 0.4 / 255, 0.6 / 255, 127.49 / 255, 254.6 / 255, 1.0, -0.1, 1.1])
    assert to_uint8(pixels).tolist() == [0, 0, 1, 127, 255, 255, 0, 255]
    assert to_uint8(pixels).dtype == torch.uint8


def test_every_byte_survives_a_round_trip():
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(every.float() / 255), every)
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert (to_uint8(images).float() / 255 - images).abs().max() <= 0.5 / 255 + 1e-7
