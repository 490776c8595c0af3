import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from prism_ray.methods.inversion.augment import Augmentations, draw_augmentations
from prism_ray.methods.inversion.engine import Descent, Inversion, NotFinite, invert, to_uint8
from prism_ray.methods.inversion.objective import Guides, Objective, inversion_loss
from prism_ray.methods.inversion.subsets import draw_statistics_teachers, reduction_weights
from tests.methods.nets import (
    BnFreeNet,
    ConvBnNet,
    ResidualNet,
    counted_calls,
    images_and_classes,
    network_of,
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
    teachers: dict[str, nn.Module],
    num_iterations: int,
    *,
    initial: Tensor | None = None,
    primary: str = "primary",
    statistics_teachers: Callable[[int], Sequence[str]] = lambda iteration: ("primary", "residual"),
    lr: float = 0.05,
    adam_betas: tuple[float, float] = (0.5, 0.9),
    residual: dict[str, Any] | None = None,
    objective: Objective | None = None,
    **changes: Any,
) -> Inversion:
    """A run of the engine on the standard batch, PRISM's settings but for the changes."""
    images, class_ids = images_and_classes(0, size=SIZE)
    settings: dict[str, Any] = {
        "networks": {name: network_of(teacher) for name, teacher in teachers.items()},
        "guides": lambda t: mean_of(primary, statistics_teachers(t)),
        "objective": objective or Objective(),
        "descent": Descent(num_iterations=num_iterations, lr=lr, adam_betas=adam_betas, **(residual or {})),
        "mean": MEAN,
        "std": STD,
        "augmentations": augmentations_of(num_iterations),
        "antialias": False,
        "seed": 0,
    }
    return invert(images if initial is None else initial, class_ids, **(settings | changes))


def mean_of(primary: str, names: Sequence[str]) -> Guides:
    """The primary's logits, and the mean of the statistics of a set."""
    return Guides({primary: 1.0}, dict.fromkeys(names, 1 / len(names)))


def augmentations_of(
    num_iterations: int, *, seed: int = 4, is_identity: bool = False
) -> Callable[[int], Augmentations]:
    if is_identity:
        return lambda size: draw_augmentations(
            seed, num_iterations, size=size, crop_area_min=1, flip_probability=0, roll_max=0
        )
    return lambda size: draw_augmentations(
        seed, num_iterations, size=size, crop_area_min=0.08, flip_probability=0.5, roll_max=3
    )


def normalized(pixels: Tensor) -> Tensor:
    return (pixels - pixels.new_tensor(MEAN).view(3, 1, 1)) / pixels.new_tensor(STD).view(3, 1, 1)


def states(teachers: dict[str, nn.Module]) -> dict[str, Tensor]:
    return {f"{name}.{key}": v.clone() for name, t in teachers.items() for key, v in t.state_dict().items()}


# --- the optimization ---


def test_a_set_of_the_primary_alone_is_sre2l_bit_for_bit(teachers):
    def drawn(t: int) -> tuple[str, ...]:
        return draw_statistics_teachers("primary", ["residual", "bn_free"], slots=2, probability=0.0, seed=t)

    def prism(t: int) -> Guides:
        weights = reduction_weights(
            drawn(t),
            reduction="mean",
            matched={"primary": True, "residual": True, "bn_free": False},
            count_unmatched=True,
            accuracies={},
            scales={},
            temperature=1,
        )
        return Guides({"primary": 1.0}, weights)

    alone = {"primary": teachers["primary"]}
    sre2l = run(alone, 25, statistics_teachers=lambda t: ("primary",), log_every=1)
    subset = run(teachers, 25, guides=prism, log_every=1)
    assert torch.equal(sre2l.images, subset.images)
    assert sre2l.history == subset.history


def test_around_the_pool_only_the_active_teacher_runs(teachers):
    pool = ("primary", "residual", "bn_free")
    active = [pool[t % 3] for t in range(7)]
    with (
        counted_calls(teachers["primary"]) as first,
        counted_calls(teachers["residual"]) as second,
        counted_calls(teachers["bn_free"]) as third,
    ):
        result = run(teachers, 7, guides=lambda t: Guides({active[t]: 1.0}, {active[t]: 1.0}), log_every=1)
    assert (len(first), len(second), len(third)) == (3, 2, 2)
    assert [record.bn == 0 for record in result.history] == [name == "bn_free" for name in active]


def test_every_step_has_adams_betas_the_cosines_rate_and_a_state_begun_with_the_batch(teachers):
    steps = recorded_steps(lambda: (run(teachers, 8, lr=0.4), run(teachers, 8, lr=0.4)))
    for steps_of_run in (steps[:8], steps[8:]):
        assert [betas for betas, _, _ in steps_of_run] == [(0.5, 0.9)] * 8
        rates = [rate for _, rate, _ in steps_of_run]
        assert rates == pytest.approx([0.2 * (1 + math.cos(math.pi * t / 8)) for t in range(8)])
        assert rates[0] == 0.4
        assert rates[4] == pytest.approx(0.2)
        assert [taken for _, _, taken in steps_of_run] == list(range(8))


def recorded_steps(work: Callable[[], Any]) -> list[tuple[tuple[float, float], float, int]]:
    """Betas, learning rate and steps taken before of every optimizer step inside."""
    steps = []

    def record(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        (group,) = optimizer.param_groups
        state = optimizer.state[group["params"][0]]
        steps.append((group["betas"], group["lr"], int(state["step"]) if state else 0))

    handle = register_optimizer_step_pre_hook(record)
    try:
        work()
    finally:
        handle.remove()
    return steps


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
    images, _ = images_and_classes(0, size=SIZE, channels=1)
    teachers: dict[str, nn.Module] = {"primary": prepared(ConvBnNet(in_chans=1), 1)}
    result = run(teachers, 2, initial=images, statistics_teachers=lambda _: ("primary",), mean=[0.3], std=[0.2])
    assert result.images.shape == (6, 1, SIZE, SIZE)
    assert not torch.equal(result.images, images)


# --- images that enter later ---


def test_an_image_that_is_alone_from_the_start_is_optimized_as_in_a_batch_of_its_own(teachers):
    initial, class_ids = images_and_classes(0, size=SIZE)
    together = run(teachers, 9, rounds=[9, 0, 9, 9, 9, 9])
    settings: dict[str, Any] = {"networks": {name: network_of(t) for name, t in teachers.items()}}
    alone = invert(
        initial[1:2],
        class_ids[1:2],
        **settings,
        guides=lambda t: mean_of("primary", ("primary", "residual")),
        objective=Objective(),
        descent=Descent(num_iterations=9, lr=0.05),
        mean=MEAN,
        std=STD,
        augmentations=augmentations_of(9),
        antialias=False,
        seed=0,
    )
    assert torch.equal(together.images[1:2], alone.images)
    assert (together.loss_ce, together.loss_bn) == (alone.loss_ce, alone.loss_bn)


def test_images_that_never_enter_stay_as_they_started(teachers):
    noise = torch.randn(6, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    images = run(teachers, 5, initial=noise, rounds=[0, 5, 2, 7, 0, 5]).images
    for n, entered in enumerate((True, False, True, False, True, False)):
        assert torch.equal(images[n], noise[n]) != entered


def test_a_batch_grows_with_every_round(teachers):
    with counted_calls(teachers["primary"]) as seen:
        run(teachers, 7, rounds=[3, 0, 5, 3, 0, 9])
    assert [len(images) for images in seen] == [2, 2, 2, 4, 4, 5, 5]


def test_entering_all_at_once_is_a_plain_run_bit_for_bit(teachers):
    assert torch.equal(run(teachers, 6, rounds=[0] * 6).images, run(teachers, 6).images)


def test_a_group_has_a_state_of_its_own_and_a_cosine_over_the_iterations_left(teachers):
    steps = recorded_steps(lambda: run(teachers, 8, lr=0.4, rounds=[0, 4, 0, 4, 4, 0]))
    late = [step for n, step in enumerate(steps[4:]) if n % 2]  # from then on, both groups step in turn
    assert [rate for _, rate, _ in late] == pytest.approx([0.2 * (1 + math.cos(math.pi * t / 4)) for t in range(4)])
    assert [taken for _, _, taken in late] == [0, 1, 2, 3]
    early = [*steps[:4], *[step for n, step in enumerate(steps[4:]) if not n % 2]]
    assert [taken for _, _, taken in early] == list(range(8))
    assert early[4][1] == pytest.approx(0.2)


@pytest.mark.parametrize("changes", [{"rounds": [0, 3, 0, 0, 3, 0]}, {"residual": {"residual_every": 3}}])
def test_averages_of_statistics_start_anew_when_the_batch_changes(teachers, changes):
    alone = {"primary": teachers["primary"]}
    with counted_calls(teachers["primary"]) as seen:
        result = run(
            alone,
            6,
            statistics_teachers=lambda _: ("primary",),
            objective=Objective(statistics_ema=0.9),
            log_every=1,
            **changes,
        )
    plain = [
        inversion_loss(
            images,
            torch.zeros(len(images), dtype=torch.int64),
            networks={"primary": network_of(teachers["primary"])},
            guides=mean_of("primary", ("primary",)),
            objective=Objective(),
        ).bn.item()
        for images in seen
    ]
    is_plain = [record.bn == pytest.approx(bn, rel=1e-6) for record, bn in zip(result.history, plain, strict=True)]
    assert is_plain == [True, False, False, True, False, False]


# --- data residual ---


def test_parts_have_their_sizes_and_the_result_its_own(teachers):
    with counted_calls(teachers["primary"]) as seen:
        for num_iterations, sizes in ((7, [6, 6, 6, 8, 8, 8, 6]), (6, [6, 6, 6, 8, 8, 8]), (2, [6, 6])):
            seen.clear()
            result = run(teachers, num_iterations, residual={"residual_every": 3, "residual_scale": 0.75})
            assert [images.shape[-1] for images in seen] == sizes
            assert result.images.shape[-2:] == (SIZE, SIZE)
            assert result.images.min() >= 0
            assert result.images.max() <= 1


def test_augmentations_are_asked_for_once_for_each_size_that_occurs(teachers):
    asked = []

    def augmentations(size: int) -> Augmentations:
        asked.append(size)
        return augmentations_of(6)(size)

    run(teachers, 6, residual={"residual_every": 2, "residual_scale": 0.5}, augmentations=augmentations)
    run(teachers, 6, residual={"residual_every": 2}, augmentations=augmentations)
    run(teachers, 6, augmentations=augmentations)
    assert asked == [4, 8, 8, 8]


@pytest.mark.parametrize("weight", [0.25, 0.5, 1.0])
def test_between_parts_the_initial_images_are_mixed_in_by_their_weight(teachers, weight):
    initial, _ = images_and_classes(0, size=SIZE)

    def seen_after_a_part(weight: float) -> Tensor:
        with counted_calls(teachers["primary"]) as seen:
            residual = {"residual_every": 3, "residual_weight": weight}
            run(teachers, 6, residual=residual, augmentations=augmentations_of(6, is_identity=True))
        return seen[3]

    mixed = (1 - weight) * seen_after_a_part(0.0) + weight * initial
    torch.testing.assert_close(seen_after_a_part(weight), mixed, rtol=0, atol=1e-6)
    assert not torch.equal(seen_after_a_part(0.0), initial)


def test_the_last_part_is_not_mixed_however_long_it_is(teachers):
    initial, _ = images_and_classes(0, size=SIZE)
    for num_iterations in (3, 4, 6):
        images = run(teachers, num_iterations, residual={"residual_every": 3, "residual_weight": 1.0}).images
        assert not torch.isclose(images, initial, atol=1e-3).all()
    whole = run(teachers, 3, residual={"residual_every": 3}).images
    assert torch.equal(whole, run(teachers, 3).images)


def test_without_weight_and_scale_only_adams_state_is_fresh_in_each_part(teachers):
    residual = {"residual_every": 3, "residual_weight": 0.0, "residual_scale": 1.0}
    steps = recorded_steps(lambda: run(teachers, 8, residual=residual))
    plain = recorded_steps(lambda: run(teachers, 8))
    assert [step[:2] for step in steps] == [step[:2] for step in plain]
    assert [taken for _, _, taken in steps] == [0, 1, 2, 0, 1, 2, 0, 1]

    def seen(**changes: Any) -> list[Tensor]:
        with counted_calls(teachers["primary"]) as images:
            run(teachers, 8, **changes)
        return images

    parts, whole = seen(residual=residual), seen()
    assert all(
        torch.equal(x, y) for x, y in zip(parts[:4], whole[:4], strict=True)
    )  # the fourth is seen before its step
    assert not torch.equal(parts[4], whole[4])


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


def test_a_pool_without_batch_norm_is_refused(teachers):
    with pytest.raises(ValueError, match="no batch norm"):
        run({"bn_free": teachers["bn_free"]}, 1, primary="bn_free", statistics_teachers=lambda _: ("bn_free",))


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
        ({"initial": torch.zeros(6, 3, SIZE, SIZE + 1)}, "8 x 9 pixels; expected square"),
        ({"std": (0.2, 0.0, 0.2)}, "std="),
        ({"augmentations": augmentations_of(2)}, "num_iterations=3: expected 0 to the 2"),
        ({"augmentations": lambda size: augmentations_of(3)(16)}, "8 x 8 pixels: augmentations were drawn for 16 x 16"),
        ({"descent": Descent(num_iterations=-1, lr=0.1)}, "num_iterations=-1"),
        ({"rounds": [0] * 5}, "rounds: 5 from 0 on; expected one for each of 6 images"),
        ({"rounds": [1] * 6}, "rounds: 6 from 1 on"),
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


class Left(Exception):
    """Ends a descent from outside."""


def interrupted(at: int, run_it: Callable[..., Inversion]) -> Inversion:
    """A descent that ends after `at` iterations, and goes on from what it had kept then."""
    states: list[dict[str, Tensor]] = []

    def leave(state_of: Callable[[], dict[str, Tensor]]) -> None:
        state = state_of()
        if int(state["iteration"]) == at:
            states.append(load(save(state)))  # as a file holds it
            raise Left

    with pytest.raises(Left):
        run_it(after_iteration=leave)
    return run_it(resume=states[0])


RESUMED = {
    "plain": {},
    "rounds": {"rounds": [0, 0, 4, 4, 7, 7]},
    "residual parts": {"residual": {"residual_every": 4, "residual_weight": 0.3, "residual_scale": 0.5}},
    "rounds in residual parts": {"rounds": [0, 3, 3, 5, 5, 9], "residual": {"residual_every": 4}},
    "averaged statistics": {"objective": Objective(statistics_ema=0.9)},
    "priors": {"objective": Objective(tv_weight=0.1, l2_weight=0.1, eig_weight=0.1)},
    "skipped layers and history": {"objective": Objective(conv_skip_probability=0.5), "log_every": 2},
}


@pytest.mark.parametrize("at", [1, 3, 4, 6, 9])
@pytest.mark.parametrize("kind", RESUMED)
def test_a_descent_that_was_interrupted_ends_in_the_same_bits(
    kind: str, at: int, teachers: dict[str, nn.Module]
) -> None:
    settings = RESUMED[kind]
    whole = run(teachers, 10, **settings)
    resumed = interrupted(at, lambda **more: run(teachers, 10, **settings, **more))
    assert torch.equal(resumed.images, whole.images)
    assert (resumed.loss_ce, resumed.loss_bn, resumed.history) == (whole.loss_ce, whole.loss_bn, whole.history)


def test_looking_after_each_iteration_changes_nothing(teachers: dict[str, nn.Module]) -> None:
    seen: list[int] = []
    watched = run(teachers, 5, after_iteration=lambda state_of: seen.append(int(state_of()["iteration"])))
    assert seen == [1, 2, 3, 4]
    assert torch.equal(watched.images, run(teachers, 5).images)


def test_an_image_that_is_no_number_is_named(teachers: dict[str, nn.Module]) -> None:
    images, _ = images_and_classes(0, size=SIZE)
    images[2, 0, 0, 0] = torch.nan
    with pytest.raises(NotFinite, match="not finite after 3 iterations") as caught:
        run(teachers, 3, initial=images, guides=lambda t: Guides({"primary": 1.0}, {}))
    assert caught.value.images == [2]
    with pytest.raises(NotFinite) as caught:
        run(teachers, 3, initial=images)
    assert 2 in caught.value.images, "and, by the statistics of the batch, all others"
