import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise
from typing import Any

import pytest

from prism_ray.methods.inversion.subsets import (
    accuracy_weights,
    draw_auxiliaries,
    draw_index,
    draw_statistics_teachers,
    draw_subset,
    reduction_weights,
)
from prism_ray.seeds import seed_for

AUXILIARIES = ["mobilenet", "efficientnet", "shufflenet", "alexnet"]
NUM_DRAWS = 8000


@pytest.fixture(scope="module")
def draws() -> list[tuple[str, ...]]:
    return [
        draw_statistics_teachers(
            "resnet", AUXILIARIES, slots=3, probability=0.5, seed=seed_for(0, "statistics_teachers", k)
        )
        for k in range(NUM_DRAWS)
    ]


def chi_square(counts: list[int], expected: list[float]) -> float:
    return sum((count - e) ** 2 / e for count, e in zip(counts, expected, strict=True))


def test_the_primary_is_first_and_auxiliaries_follow_in_pool_order_without_repeats(draws):
    for draw in draws:
        assert draw[0] == "resnet"
        assert list(draw[1:]) == [name for name in AUXILIARIES if name in draw]


def test_the_number_of_auxiliaries_is_binomial(draws):
    counts = Counter(len(draw) - 1 for draw in draws)
    expected = [NUM_DRAWS * p for p in (1 / 8, 3 / 8, 3 / 8, 1 / 8)]
    assert chi_square([counts[k] for k in range(4)], expected) < 16.3  # 3 degrees of freedom, p = 0.001


def test_each_auxiliary_is_present_with_probability_three_eighths(draws):
    for name in AUXILIARIES:
        count = sum(name in draw for draw in draws)
        # Four standard deviations of a binomial count.
        assert abs(count - 0.375 * NUM_DRAWS) < 4 * (NUM_DRAWS * 0.375 * 0.625) ** 0.5


def test_subsets_of_one_size_are_equally_likely(draws):
    pairs = Counter(draw for draw in draws if len(draw) == 3)
    assert len(pairs) == 6
    total = sum(pairs.values())
    assert chi_square(list(pairs.values()), [total / 6] * 6) < 20.5  # 5 degrees of freedom, p = 0.001


def test_neighbouring_seeds_draw_independently():
    draws = [draw_statistics_teachers("p", AUXILIARIES, slots=3, probability=0.5, seed=seed) for seed in range(4000)]
    repeats = sum(a == b for a, b in pairwise(draws))
    same = sum((count / len(draws)) ** 2 for count in Counter(draws).values())
    assert abs(repeats / len(draws) - same) < 0.02


def test_a_draw_depends_on_its_seed_alone():
    first = [draw_statistics_teachers("p", AUXILIARIES, slots=3, probability=0.5, seed=seed) for seed in range(30)]
    again = [
        draw_statistics_teachers("p", AUXILIARIES, slots=3, probability=0.5, seed=seed) for seed in reversed(range(30))
    ]
    assert first == again[::-1]
    assert len(set(first)) > 5


@pytest.mark.parametrize(("probability", "expected"), [(0, ("p",)), (1, ("p", "a", "b"))])
def test_the_ends_of_the_probability_are_none_and_all(probability, expected):
    for seed in range(20):
        draw = draw_statistics_teachers("p", ["a", "b"], slots=2, probability=probability, seed=seed)
        assert draw == expected


def test_a_pool_of_the_primary_alone_draws_the_primary():
    assert draw_statistics_teachers("p", [], slots=0, probability=0.5, seed=1) == ("p",)


@pytest.mark.parametrize(
    ("auxiliaries", "slots", "probability", "message"),
    [
        (["a"], 2, 0.5, "slots=2"),
        (["a"], -1, 0.5, "slots=-1"),
        (["a", "a"], 1, 0.5, "twice"),
        (["p"], 1, 0.5, "twice"),
        (["a"], 1, 1.5, "probability=1.5"),
    ],
)
def test_impossible_draws_are_refused(auxiliaries, slots, probability, message):
    with pytest.raises(ValueError, match=message):
        draw_statistics_teachers("p", auxiliaries, slots=slots, probability=probability, seed=0)


# Auxiliaries alone


@pytest.fixture(scope="module")
def strict_draws() -> list[tuple[str, ...]]:
    return [
        draw_auxiliaries("resnet", AUXILIARIES, slots=3, probability=0.5, seed=seed_for(0, "statistics_teachers", k))
        for k in range(NUM_DRAWS)
    ]


def test_a_strict_draw_is_the_other_one_without_the_primary_and_never_empty(draws, strict_draws):
    for with_primary, strict in zip(draws, strict_draws, strict=True):
        assert "resnet" not in strict
        assert strict == with_primary[1:] or (with_primary == ("resnet",) and len(strict) == 1)


def test_one_auxiliary_stands_in_for_none(strict_draws):
    counts = Counter(len(draw) for draw in strict_draws)
    expected = [NUM_DRAWS * p for p in (4 / 8, 3 / 8, 1 / 8)]
    assert chi_square([counts[k] for k in (1, 2, 3)], expected) < 13.8  # 2 degrees of freedom, p = 0.001


def test_strict_subsets_of_one_size_are_equally_likely(strict_draws):
    for size, degrees_bound in ((1, 16.3), (2, 20.5), (3, 16.3)):  # 3, 5 and 3 degrees of freedom, p = 0.001
        found = Counter(draw for draw in strict_draws if len(draw) == size)
        wanted = list(combinations(AUXILIARIES, size))
        assert set(found) == set(wanted)
        total = found.total()
        assert chi_square([found[names] for names in wanted], [total / len(wanted)] * len(wanted)) < degrees_bound


def test_without_auxiliaries_a_strict_draw_is_refused():
    with pytest.raises(ValueError, match="no auxiliary"):
        draw_auxiliaries("p", [], slots=0, probability=0.5, seed=0)


# So many of the pool


@pytest.mark.parametrize(("count", "bound"), [(1, 18.5), (2, 27.9), (4, 18.5)])  # 4, 9, 4 degrees, p = 0.001
def test_every_subset_of_a_size_is_equally_likely_and_in_pool_order(count, bound):
    pool = ["resnet", *AUXILIARIES]
    found = Counter(draw_subset(pool, count=count, seed=seed_for(1, "draw", k)) for k in range(NUM_DRAWS))
    wanted = list(combinations(pool, count))
    assert set(found) == set(wanted)
    assert chi_square([found[names] for names in wanted], [NUM_DRAWS / len(wanted)] * len(wanted)) < bound


def test_a_subset_of_all_is_the_pool_whatever_the_seed():
    assert {draw_subset(AUXILIARIES, count=4, seed=seed) for seed in range(20)} == {tuple(AUXILIARIES)}


@pytest.mark.parametrize(
    ("pool", "count", "message"), [(["a"], 2, "count=2"), (["a"], 0, "count=0"), (["a", "a"], 1, "twice")]
)
def test_impossible_subsets_are_refused(pool, count, message):
    with pytest.raises(ValueError, match=message):
        draw_subset(pool, count=count, seed=0)


# Cadence


def keys(cadence, *, every=3):
    """The key of every iteration of two slices of two batches of seven iterations, in this order."""
    return [
        draw_index(cadence, slice_index=k, chunk_index=chunk, iteration=iteration, every=every)
        for k in range(2)
        for chunk in range(2)
        for iteration in range(7)
    ]


def test_run_cadence_draws_once_for_all():
    assert keys("run") == [()] * 28


def test_slice_cadence_draws_once_for_all_batches_of_a_slice():
    assert keys("slice") == [(0,)] * 14 + [(1,)] * 14


def test_batch_cadence_draws_once_per_batch():
    assert keys("batch") == [(0, 0)] * 7 + [(0, 1)] * 7 + [(1, 0)] * 7 + [(1, 1)] * 7


def test_every_n_cadence_draws_again_each_n_iterations_of_each_batch():
    assert keys("every_n")[:7] == [(0, 0, 0)] * 3 + [(0, 0, 1)] * 3 + [(0, 0, 2)]
    assert len(set(keys("every_n"))) == 4 * 3


def test_iteration_cadence_draws_at_each_iteration_of_each_batch():
    assert len(set(keys("iteration"))) == 28
    assert keys("iteration") == keys("every_n", every=1)


def test_unknown_cadence_and_period_below_one_are_refused():
    with pytest.raises(ValueError, match="'epoch'"):
        keys("epoch")
    with pytest.raises(ValueError, match="every=0"):
        keys("every_n", every=0)


# Weights


def weights(drawn: Sequence[str], reduction: Any, **changed: Any) -> Mapping[str, float]:
    """Of a, b with batch norm and c without."""
    given: dict[str, Any] = {
        "matched": {"a": True, "b": True, "c": False},
        "count_unmatched": True,
        "accuracies": {"a": 0.80, "b": 0.75, "c": 0.70},
        "scales": {"a": 200.0, "b": 800.0},
        "temperature": 5.0,
    }
    return reduction_weights(drawn, reduction=reduction, **(given | changed))


def term(weights: Mapping[str, float], terms: Mapping[str, float]) -> float:
    return sum(weights.get(name, 0.0) * terms[name] for name in terms)


@pytest.mark.parametrize(
    ("terms", "golden"),
    [
        ({"a": 200.0}, 2.0),
        ({"a": 200.0, "b": 900.0}, 5.5),
        ({"a": 200.0, "c": 0.0}, 1.0),
        ({"a": 200.0, "b": 900.0, "c": 0.0}, 3.667),
    ],
)
def test_the_released_mean_counts_teachers_without_batch_norm(terms, golden):
    assert 0.01 * term(weights(list(terms), "mean"), terms) == pytest.approx(golden, abs=5e-4)


def test_a_teacher_without_batch_norm_weakens_the_mean_exactly_where_it_is_counted():
    terms = {"a": 200.0, "b": 900.0, "c": 0.0}
    without = term(weights(["a", "b"], "mean"), terms)
    assert term(weights(["a", "b", "c"], "mean"), terms) == pytest.approx(without * 2 / 3)
    assert weights(["a", "b", "c"], "mean", count_unmatched=False) == weights(["a", "b"], "mean")


def test_a_mean_sums_to_one_and_a_sum_gives_each_one():
    assert weights(["a", "b", "c"], "mean") == dict.fromkeys("abc", 1 / 3)
    assert weights(["a", "b", "c"], "sum") == dict.fromkeys("abc", 1.0)


def test_accuracies_in_percent_are_weighted_as_in_the_released_committee():
    # exp(80/5), exp(75/5) and exp(70/5), normalized: 1, 1/e and 1/e^2 over their sum.
    golden = {"a": 0.665241, "b": 0.244728, "c": 0.090031}
    assert accuracy_weights({"a": 0.80, "b": 0.75, "c": 0.70}, temperature=5) == pytest.approx(golden, abs=1e-6)
    assert weights(["a", "b", "c"], "weighted") == pytest.approx(golden, abs=1e-6)
    assert weights(["a", "b", "c"], "weighted", count_unmatched=False) == pytest.approx(
        {"a": math.e / (math.e + 1), "b": 1 / (math.e + 1)}
    )


def test_accuracy_weights_sum_to_one_and_a_high_temperature_makes_them_equal():
    accuracies = {"a": 1.0, "b": 0.0, "c": 0.999}
    for temperature in (0.01, 1.0, 5.0, 100.0):
        assert math.fsum(accuracy_weights(accuracies, temperature=temperature).values()) == pytest.approx(1)
    assert accuracy_weights(accuracies, temperature=1e9) == pytest.approx(dict.fromkeys("abc", 1 / 3))
    assert accuracy_weights({"a": 0.3}, temperature=5) == {"a": 1.0}


def test_normalized_terms_are_as_large_as_the_first_ones_on_real_images():
    found = weights(["a", "b"], "normalized")
    assert found == {"a": 1 / 2, "b": 200 / 800 / 2}
    assert term(found, {"a": 200.0, "b": 800.0}) == pytest.approx(200)
    assert weights(["b"], "normalized") == {"b": 0.25}, "the reference need not be drawn"
    assert weights(["a", "b", "c"], "normalized") == pytest.approx({"a": 1 / 3, "b": 0.25 / 3, "c": 1 / 3})


@pytest.mark.parametrize("reduction", ["mean", "sum", "weighted", "normalized"])
def test_a_draw_with_nothing_to_match_has_no_weights_unless_it_counts(reduction):
    assert weights(["c"], reduction, count_unmatched=False) == {}
    assert weights(["c"], reduction) == {"c": 1.0}


def test_an_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match="'median'"):
        weights(["a"], "median")
