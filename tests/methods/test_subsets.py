from collections import Counter
from itertools import pairwise

import pytest

from prism_ray.methods.inversion.subsets import draw_index, draw_statistics_teachers
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


def keys(cadence, *, every=3):
    """The key of every iteration of two slices of two batches of seven iterations, in this order."""
    return [
        draw_index(cadence, slice_index=k, chunk_index=chunk, iteration=iteration, every=every)
        for k in range(2)
        for chunk in range(2)
        for iteration in range(7)
    ]


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
