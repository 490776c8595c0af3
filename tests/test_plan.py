"""The plan: exactly the images that were asked for, the same wherever and however often it is made."""

from collections import Counter
from collections.abc import Sequence
from itertools import combinations

import pytest

from prism_ray.cli import compose
from prism_ray.config import Config
from prism_ray.errors import InputError
from prism_ray.identity import images_hash
from prism_ray.plan import (
    REAL_IMAGES_PER_UNIT,
    Unit,
    check_size,
    check_statistics,
    guided,
    guiding_pool,
    guiding_teachers,
    label_teachers,
    needs_starts,
    needs_statistics_pass,
    plan_units,
    selecting,
    statistics_pool,
    takes_rows,
    used_teachers,
)

ORDERS = ["sorted", "permuted", "strided"]


def config(*overrides: str) -> Config:
    """PRISM as released, unless a method is named."""
    method = [] if any(override.startswith("method=") for override in overrides) else ["method=prism_released"]
    return compose(["recipe=digits_smoke", "compute=inline", *method, *overrides])


def rows(num_classes: int, images: int) -> list[list[int]]:
    """Source rows of each class, interleaved as in a shuffled source."""
    return [list(range(class_id, num_classes * images, num_classes)) for class_id in range(num_classes)]


def pairs(units: Sequence[Unit]) -> list[tuple[int, int]]:
    return [(image.class_id, image.index_in_class) for unit in units for image in unit.images]


# Cross-class batches


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("num_classes", "per_class", "batch_size"), [(10, 2, 5), (10, 3, 4), (7, 4, 100), (3, 2, 1)])
def test_a_unit_holds_one_image_of_each_of_its_classes_all_of_one_slice_and_all_units_hold_all(
    order: str, num_classes: int, per_class: int, batch_size: int
) -> None:
    units = plan_units(
        config(f"images_per_class={per_class}", f"method.batch_size={batch_size}", f"method.class_order={order}"),
        rows(num_classes, 6),
    )
    for unit in units:
        classes = [image.class_id for image in unit.images]
        assert 1 <= len(classes) <= batch_size
        assert len(set(classes)) == len(classes)
        assert {image.index_in_class for image in unit.images} == {unit.slice_index}
    every = [(class_id, k) for class_id in range(num_classes) for k in range(per_class)]
    assert sorted(pairs(units)) == every


def test_units_are_numbered_and_named_in_order_and_images_by_class_and_index() -> None:
    units = plan_units(config("method.class_order=permuted"), rows(10, 6))
    assert [unit.index for unit in units] == list(range(4))
    assert [unit.name for unit in units] == [f"train-{n:05d}-of-00004" for n in range(4)]
    assert len({unit.unit_id for unit in units}) == len({unit.seed for unit in units}) == 4
    images = [image for unit in units for image in unit.images]
    assert {image.image_id for image in images} == {f"{c:06d}-{k:06d}" for c in range(10) for k in range(2)}
    assert len({image.seed for image in images}) == 20


def test_a_plan_made_again_is_the_same() -> None:
    for overrides in ([], ["method=sre2l"], ["method=random_real"], ["method.class_order=permuted"]):
        assert plan_units(config(*overrides), rows(10, 6)) == plan_units(config(*overrides), rows(10, 6))


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_the_plan_is_the_same_for_any_number_of_workers(workers: int) -> None:
    overrides = ["compute=ray", f"compute.actors={workers}", f"compute.train_workers={workers}"]
    assert plan_units(config(*overrides), rows(10, 6)) == plan_units(config(), rows(10, 6))


def image_seeds(*overrides: str) -> dict[str, tuple[int, int | None]]:
    units = plan_units(config(*overrides), rows(10, 6))
    return {image.image_id: (image.seed, image.source_row) for unit in units for image in unit.images}


@pytest.mark.parametrize(
    "overrides", [["method.batch_size=3"], ["method.class_order=strided"], ["method.iterations=99"]], ids=str
)
def test_an_image_keeps_its_seed_and_its_source_however_it_is_batched(overrides: list[str]) -> None:
    assert image_seeds(*overrides) == image_seeds()


def test_more_images_of_a_class_leave_the_first_ones_as_they_are() -> None:
    few, many = image_seeds("images_per_class=2"), image_seeds("images_per_class=5")
    assert {image_id: many[image_id] for image_id in few} == few
    assert len(many) == 50


def test_another_run_seed_changes_every_seed() -> None:
    first, second = image_seeds("seed=0"), image_seeds("seed=1")
    assert not {seed for seed, _ in first.values()} & {seed for seed, _ in second.values()}


def test_a_unit_of_other_settings_is_another_unit() -> None:
    first, second = (plan_units(config(f"method.lr={lr}"), rows(10, 6)) for lr in (0.1, 0.2))
    assert not {unit.unit_id for unit in first} & {unit.unit_id for unit in second}
    assert [unit.name for unit in first] == [unit.name for unit in second]


# Sources


def test_the_first_images_of_a_class_are_taken_in_source_order() -> None:
    source = rows(10, 6)
    for unit in plan_units(config("method.selection=first"), source):
        for image in unit.images:
            assert image.source_row == source[image.class_id][image.index_in_class]


def test_a_random_selection_takes_each_image_at_most_once_from_its_own_class() -> None:
    source = rows(10, 30)
    units = plan_units(config("method=random_real", "images_per_class=20"), source)
    taken: dict[int, list[int]] = {class_id: [] for class_id in range(10)}
    for unit in units:
        for image in unit.images:
            assert image.source_row is not None
            taken[image.class_id].append(image.source_row)
    for class_id, chosen in taken.items():
        assert len(set(chosen)) == 20
        assert set(chosen) <= set(source[class_id])
        assert chosen != source[class_id][:20]
    places = [[source[c].index(row) for row in taken[c]] for c in taken]
    assert len({tuple(place) for place in places}) == 10, "classes are drawn apart from each other"


def test_images_from_noise_have_no_source_and_need_no_real_images() -> None:
    units = plan_units(config("method=sre2l", "images_per_class=9"), rows(10, 1))
    assert {image.source_row for unit in units for image in unit.images} == {None}


@pytest.mark.parametrize("method", ["prism_released", "random_real"])
def test_a_class_with_too_few_real_images_is_refused_with_the_numbers(method: str) -> None:
    source = rows(10, 6)
    source[7] = source[7][:4]
    with pytest.raises(InputError, match=r"images_per_class=5: class 7 has only 4 real training images"):
        plan_units(config(f"method={method}", "images_per_class=5"), source)


def test_full_data_takes_each_real_image_exactly_once() -> None:
    source = [list(range(0, 700)), list(range(700, 703)), list(range(703, 1403))]
    units = plan_units(config("method=random_real", "images_per_class=null"), source)
    taken = Counter(image.source_row for unit in units for image in unit.images)
    assert taken == dict.fromkeys(range(1403), 1)
    assert len(set(pairs(units))) == 1403
    assert [len(unit.images) for unit in units] == [REAL_IMAGES_PER_UNIT, REAL_IMAGES_PER_UNIT, 403]
    assert len({unit.unit_id for unit in units}) == 3
    for unit in units:
        for image in unit.images:
            assert image.source_row == source[image.class_id][image.index_in_class]


def test_a_plan_beyond_the_limit_is_refused_before_it_is_made() -> None:
    huge = config("method=sre2l", "images_per_class=1000000")
    with pytest.raises(InputError, match=r"images_per_class=1000000: makes 10000000 images, more than max_images"):
        plan_units(huge, rows(10, 1))
    with pytest.raises(InputError, match=r"images_per_class=null: makes 12 images"):
        plan_units(config("method=random_real", "images_per_class=null", "max_images=11"), rows(4, 3))
    check_size(config("images_per_class=2", "max_images=20"), [2] * 10)


# Statistics teachers: Bernoulli slots

POOL = [
    "teachers.models.a.arch=prism_vgg",
    "teachers.models.b.arch=prism_vgg",
    "teachers.models.c.arch=prism_vgg",
    "teachers.pool=[vgg,a,b,c,convnet]",
    "method.statistics_slots=3",
]
AUXILIARIES = ["a", "b", "c", "convnet"]


def draws(num_slices: int, *overrides: str) -> list[tuple[str, ...]]:
    wanted = config(*POOL, "method.init=noise", "method.batch_size=10", f"images_per_class={num_slices}", *overrides)
    return [guiding_teachers(wanted, unit, 0).statistics for unit in plan_units(wanted, rows(10, 1))]


def test_the_primary_is_always_there_and_nobody_twice() -> None:
    for drawn in draws(300):
        assert drawn[0] == "vgg"
        assert len(set(drawn)) == len(drawn) <= 4
        assert list(drawn[1:]) == [name for name in AUXILIARIES if name in drawn]


def test_the_number_of_auxiliaries_is_binomial_and_each_is_as_likely() -> None:
    drawn = [names for seed in range(4) for names in draws(1000, f"seed={seed}")]
    assert len(set(drawn)) == 15, "every subset of up to three of four occurs"
    sizes = Counter(len(names) - 1 for names in drawn)
    for size, share in enumerate([1 / 8, 3 / 8, 3 / 8, 1 / 8]):
        assert sizes[size] / 4000 == pytest.approx(share, abs=0.035)  # 4.5 standard deviations
    for name in AUXILIARIES:
        assert sum(name in names for names in drawn) / 4000 == pytest.approx(0.375, abs=0.035)
    couples = Counter(couple for names in drawn for couple in combinations(names[1:], 2))
    for couple in combinations(AUXILIARIES, 2):
        # P(both) = P(2 of them) / 6 + P(3 of them) / 2
        assert couples[couple] / 4000 == pytest.approx(3 / 8 / 6 + 1 / 8 / 2, abs=0.025)


def test_a_probability_of_0_or_1_fills_no_slot_or_all() -> None:
    assert {len(names) for names in draws(50, "method.statistics_probability=0")} == {1}
    assert {len(names) for names in draws(50, "method.statistics_probability=1")} == {4}


def changes_over(cadence: str) -> tuple[int, int]:
    """How many distinct draws one slice of ten batches has, and how many one batch has in 100 iterations."""
    wanted = config(
        *POOL,
        "method.init=noise",
        "method.batch_size=1",
        "images_per_class=1",
        f"method.cadence={cadence}",
        "method.cadence_every=10",
    )
    units = plan_units(wanted, rows(10, 1))
    across = {guiding_teachers(wanted, unit, 0).statistics for unit in units}
    within = {guiding_teachers(wanted, units[0], iteration).statistics for iteration in range(100)}
    steady = all(
        guiding_teachers(wanted, units[0], 10 * n).statistics
        == guiding_teachers(wanted, units[0], 10 * n + i).statistics
        for n in range(10)
        for i in range(10)
    )
    assert steady == (cadence != "iteration")
    return len(across), len(within)


def test_teachers_are_drawn_again_exactly_when_the_cadence_says() -> None:
    assert changes_over("run") == changes_over("slice") == (1, 1)
    across, within = changes_over("batch")
    assert (across > 1, within) == (True, 1)
    assert changes_over("every_n")[1] > 1
    assert changes_over("iteration")[1] > changes_over("every_n")[1]


def test_the_primary_alone_serves_statistics_where_the_method_says_so() -> None:
    wanted = config("method=sre2l")
    assert {guiding_teachers(wanted, unit, 0).statistics for unit in plan_units(wanted, rows(10, 2))} == {("vgg",)}


# Budgets and roles


def test_budgets_fall_by_an_eighth_per_slice_and_start_again() -> None:
    wanted = config("method.init=noise", "method.iterations=4000", "method.batch_size=10", "images_per_class=18")
    found = [unit.iterations for unit in plan_units(wanted, rows(10, 1))]
    one_period = [4000, 3500, 3000, 2500, 2000, 1500, 1000, 500]
    assert found == [*one_period, *one_period, 4000, 3500]


def test_real_images_have_no_budget_and_constant_budgets_stay() -> None:
    assert {u.iterations for u in plan_units(config("method=random_real"), rows(10, 6))} == {0}
    wanted = config("method=sre2l", "method.iterations=30", "images_per_class=9")
    assert {u.iterations for u in plan_units(wanted, rows(10, 1))} == {30}


def test_a_run_needs_the_teachers_of_its_roles_and_no_others() -> None:
    assert used_teachers(config()) == ["vgg", "convnet"]
    assert used_teachers(config("method=random_real")) == ["vgg"]
    assert used_teachers(config("method=random_real", "labels.teachers=[convnet,vgg]")) == ["vgg", "convnet"]
    extra = "teachers.models.a.arch=prism_vgg"
    assert used_teachers(config(extra, "evaluate.feature_model=a")) == ["vgg", "convnet", "a"]
    assert label_teachers(config()) == ["vgg"]
    assert label_teachers(config("labels.teachers=[convnet]")) == ["convnet"]


# Other roles, batch plans and sets of images


@pytest.mark.parametrize("plan", ["class_major", "single_class"])
@pytest.mark.parametrize(("per_class", "batch_size"), [(3, 7), (3, 100), (5, 2), (1, 4)])
def test_class_major_units_hold_whole_classes_and_all_units_hold_all(
    plan: str, per_class: int, batch_size: int
) -> None:
    wanted = config(f"method.batch_plan={plan}", f"images_per_class={per_class}", f"method.batch_size={batch_size}")
    units = plan_units(wanted, rows(10, 6))
    assert sorted(pairs(units)) == [(class_id, k) for class_id in range(10) for k in range(per_class)]
    for unit in units:
        counts = Counter(image.class_id for image in unit.images)
        assert len(unit.images) <= max(batch_size, per_class if batch_size >= per_class else batch_size)
        assert set(counts.values()) == {per_class} or len(counts) == 1
        assert plan == "class_major" or len(counts) == 1
    assert len({unit.unit_id for unit in units}) == len({unit.seed for unit in units}) == len(units)


def test_the_active_teacher_goes_around_the_pool_as_one_process_would_count_its_steps() -> None:
    wanted = config(
        *POOL,
        "method.init=noise",
        "method.logit_role=active",
        "method.statistics_role=active",
        "method.iterations=7",
        "images_per_class=4",
    )
    pool, step = wanted.teachers.pool, 0
    for unit in plan_units(wanted, rows(10, 1)):
        assert unit.first_step == step
        for iteration in range(unit.iterations):
            guiding = guiding_teachers(wanted, unit, iteration)
            assert guiding.logits == guiding.statistics == (pool[step % len(pool)],)
            step += 1
    assert used_teachers(wanted) == pool


def test_auxiliary_slots_never_hold_the_primary_and_are_never_empty() -> None:
    drawn = draws(400, "method.statistics_role=auxiliary_slots")
    assert all(names and "vgg" not in names for names in drawn)
    sizes = Counter(len(names) for names in drawn)
    assert sizes[1] / 400 == pytest.approx(1 / 8 + 3 / 8, abs=0.11)  # none counts as one


def test_a_subset_of_the_pool_is_uniform_and_may_lack_the_primary() -> None:
    drawn = draws(1000, "method.statistics_role=k_subset", "method.statistics_count=2")
    assert {len(names) for names in drawn} == {2}
    for name in ["vgg", *AUXILIARIES]:
        assert sum(name in names for names in drawn) / 1000 == pytest.approx(0.4, abs=0.07)


def test_drawn_teachers_guide_with_their_logits_where_the_method_couples_them() -> None:
    wanted = config(*POOL, "method.logit_role=drawn", "images_per_class=3")
    for unit in plan_units(wanted, rows(10, 6)):
        guiding = guiding_teachers(wanted, unit, 0)
        assert guiding.logits == guiding.statistics


def test_without_their_weight_statistics_have_no_teacher() -> None:
    wanted = config("method.bn_weight=0")
    assert guiding_teachers(wanted, plan_units(wanted, rows(10, 6))[0], 0).statistics == ()
    assert used_teachers(wanted) == ["vgg"]


NO_BN = "teachers.models.convnet.batch_norm=false"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["method=prism_strict"], ["teachers.pool=['vgg', 'convnet']", "draws convnet at iteration 0"]),
        (["method.statistics_role=active"], ["unit train-00000-of-00004", "draws convnet at iteration 1"]),
        (["teachers.primary=convnet", "method.statistics_probability=0"], ["teachers.primary='convnet'"]),
    ],
)
def test_a_plan_in_which_some_draw_has_nothing_to_match_is_refused(overrides: list[str], words: list[str]) -> None:
    wanted = config(*overrides, NO_BN)
    with pytest.raises(InputError) as refused:
        check_statistics(wanted, plan_units(wanted, rows(10, 6)))
    for word in words:
        assert word in str(refused.value)


@pytest.mark.parametrize("overrides", [[], ["method=prism_strict", "method.conv_statistics=true"], ["method=sre2l"]])
def test_a_plan_in_which_every_draw_has_something_to_match_is_accepted(overrides: list[str]) -> None:
    wanted = config(*overrides, NO_BN)
    check_statistics(wanted, plan_units(wanted, rows(10, 6)))


ROLES = ["fixed", "bernoulli_slots", "auxiliary_slots", "k_subset", "active", "all"]


def drawn_over(*overrides: str, per_class: int = 30, batch_size: int = 10) -> list[tuple[Unit, list[tuple[str, ...]]]]:
    """Every unit of images from noise with the statistics teachers of its first six iterations."""
    sizes = [f"images_per_class={per_class}", f"method.batch_size={batch_size}"]
    wanted = config(*POOL, "method.init=noise", *sizes, *overrides)
    units = plan_units(wanted, rows(10, 1))
    return [(unit, [guiding_teachers(wanted, unit, t).statistics for t in range(6)]) for unit in units]


@pytest.mark.parametrize("role", ["bernoulli_slots", "auxiliary_slots", "k_subset"])
def test_who_is_drawn_is_constant_within_a_slice_or_changes_within_it_as_the_cadence_says(role: str) -> None:
    def most_within_a_slice(cadence: str) -> int:
        found: dict[int, set[tuple[str, ...]]] = {}
        settings = [f"method.statistics_role={role}", f"method.cadence={cadence}", "method.cadence_every=3"]
        for unit, drawn in drawn_over(*settings, batch_size=2):
            found.setdefault(unit.slice_index, set()).update(drawn)
        assert (len(set.union(*found.values())) > 1) == (cadence != "run")
        return max(len(drawn) for drawn in found.values())

    assert most_within_a_slice("run") == most_within_a_slice("slice") == 1
    for cadence in ("batch", "every_n", "iteration"):
        assert most_within_a_slice(cadence) > 1


@pytest.mark.parametrize("role", [role for role in ROLES if role != "active"])
def test_who_guides_a_slice_does_not_depend_on_how_it_is_cut_into_batches(role: str) -> None:
    whole, cut = (
        {(unit.slice_index, drawn[0]) for unit, drawn in drawn_over(f"method.statistics_role={role}", batch_size=size)}
        for size in (10, 3)
    )
    assert whole == cut


def test_strict_draws_are_those_with_the_primary_without_it() -> None:
    for (_, both), (_, alone) in zip(drawn_over(), drawn_over("method.statistics_role=auxiliary_slots"), strict=True):
        assert alone[0] == both[0][1:] or (both[0] == ("vgg",) and len(alone[0]) == 1)


@pytest.mark.parametrize("logits", ["primary", "active", "drawn"])
@pytest.mark.parametrize("role", ROLES)
def test_exactly_the_teachers_that_may_guide_are_needed(role: str, logits: str) -> None:
    wanted = config(
        *POOL,
        "method.init=noise",
        f"method.statistics_role={role}",
        f"method.logit_role={logits}",
        "method.cadence=iteration",
        "images_per_class=30",
    )
    units = plan_units(wanted, rows(10, 1))
    guides = [guiding_teachers(wanted, unit, t) for unit in units for t in range(unit.iterations)]
    matched = {name for guiding in guides for name in guiding.statistics}
    assert matched == set(statistics_pool(wanted))
    assert matched | {name for guiding in guides for name in guiding.logits} | {"vgg"} == set(guiding_pool(wanted))
    assert set(guiding_pool(wanted)) <= set(used_teachers(wanted))


@pytest.mark.parametrize(
    ("method", "rows_in_plan", "starts", "measured", "judges"),
    [
        ("prism_released", True, False, False, []),
        ("sre2l", False, False, False, []),
        ("random_real", True, False, False, []),
        ("rded", False, True, False, ["vgg"]),
        ("delt", False, True, False, ["vgg"]),
        ("edc", False, True, True, ["vgg", "convnet"]),
        ("gvbsm", False, False, True, []),
        ("lpld", False, False, True, []),
    ],
)
def test_a_method_asks_for_exactly_the_passes_over_real_images_that_it_uses(
    method: str, rows_in_plan: bool, starts: bool, measured: bool, judges: list[str]
) -> None:
    wanted = config(f"method={method}")
    found = (takes_rows(wanted), needs_starts(wanted), needs_statistics_pass(wanted), selecting(wanted))
    assert found == (rows_in_plan, starts, measured, judges)
    assert {i.source_row is not None for u in plan_units(wanted, rows(10, 6)) for i in u.images} == {rows_in_plan}


@pytest.mark.parametrize("plan", ["cross_class", "class_major", "single_class"])
def test_chosen_classes_keep_the_seeds_and_sources_they_have_among_all(plan: str) -> None:
    every = {image.image_id: image for unit in plan_units(config(), rows(10, 6)) for image in unit.images}
    chosen = [i for u in plan_units(config(f"method.batch_plan={plan}"), rows(10, 6), [7, 2, 4]) for i in u.images]
    assert {image.class_id for image in chosen} == {2, 4, 7}
    assert all(every[image.image_id] == image for image in chosen)


def test_a_class_that_is_not_chosen_may_lack_real_images() -> None:
    source = [[0, 1], [2, 3, 4], []]
    assert len(pairs(plan_units(config(), source, [0, 1]))) == 4
    everything = plan_units(config("method=real_kth", "images_per_class=null"), source, [1])
    assert [image.source_row for unit in everything for image in unit.images] == [2, 3, 4]
    with pytest.raises(InputError, match="class 2 has only 0 real"):
        plan_units(config(), source, [1, 2])


def test_images_are_made_of_the_chosen_classes_alone() -> None:
    units = plan_units(config("images_per_class=2"), rows(10, 6), class_ids=[2, 5, 9])
    assert sorted(pairs(units)) == [(class_id, k) for class_id in (2, 5, 9) for k in range(2)]
    assert {i.source_row for u in units for i in u.images} <= {row for c in (2, 5, 9) for row in rows(10, 6)[c]}


@pytest.mark.parametrize("method", ["random_real", "real_kth", "prism_released"])
def test_images_to_be_measured_on_are_never_started_from(method: str) -> None:
    overrides = [f"method={method}", "images_per_class=4"]
    reserving = [*overrides, "evaluate.split=validation", "student.validation_images=6"]
    source = rows(10, 10)
    taken = {i.source_row for u in plan_units(config(*reserving), source) for i in u.images}
    assert not taken & {row for own in source for row in own[-6:]}
    with pytest.raises(InputError, match="images_per_class=5: class 0 has only 4 real training images"):
        plan_units(config(*reserving[:1], "images_per_class=5", *reserving[2:]), source)
    assert images_hash(config(*overrides)) != images_hash(config(*reserving))


@pytest.mark.parametrize("selection", ["confident", "medium", "herding", "regression"])
def test_a_selection_by_teachers_is_not_the_plans_and_needs_its_judges(selection: str) -> None:
    wanted = config(
        f"method.selection={selection}", "method.judges=pool", "method.bn_weight=0", "labels.teachers=[vgg]"
    )
    assert {i.source_row for u in plan_units(wanted, rows(10, 6)) for i in u.images} == {None}
    assert used_teachers(wanted) == ["vgg", "convnet"]


@pytest.mark.parametrize("logits", ["primary", "active", "drawn"])
@pytest.mark.parametrize("cadence", ["run", "slice", "batch", "every_n", "iteration"])
def test_stretches_of_equal_guides_are_all_iterations_with_their_guides(cadence: str, logits: str) -> None:
    settings = [
        "method.init=noise",
        f"method.cadence={cadence}",
        "method.cadence_every=3",
        f"method.logit_role={logits}",
    ]
    wanted = config(*POOL, *settings, "images_per_class=5")
    for unit in plan_units(wanted, rows(10, 1)):
        stretches = guided(wanted, unit)
        assert [t for iterations, _ in stretches for t in iterations] == list(range(unit.iterations))
        assert all(
            guiding_teachers(wanted, unit, t) == guiding for iterations, guiding in stretches for t in iterations
        )
