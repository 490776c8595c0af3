import pytest

from prism_ray.methods.inversion.budgets import iterations_of_slice


def released(slice_index: int) -> int:
    return iterations_of_slice(4000, slice_index, decay=0.125, period=8)


def test_the_released_budget_falls_by_500_and_starts_again_at_slice_8():
    assert [released(k) for k in range(10)] == [4000, 3500, 3000, 2500, 2000, 1500, 1000, 500, 4000, 3500]


@pytest.mark.parametrize(("images_per_class", "total"), [(10, 25_500), (50, 115_500)])
def test_the_released_budget_has_its_golden_sums(images_per_class, total):
    assert sum(released(k) for k in range(images_per_class)) == total


def test_no_decay_is_a_constant_budget():
    assert {iterations_of_slice(1000, k, decay=0, period=8) for k in range(20)} == {1000}


def test_a_slice_gets_at_least_one_iteration():
    assert iterations_of_slice(10, 7, decay=0.5, period=8) == 1
    assert iterations_of_slice(10, 1, decay=1, period=8) == 1


def test_budgets_are_rounded_to_the_nearest_iteration():
    assert [iterations_of_slice(10, k, decay=0.13, period=4) for k in range(4)] == [10, 9, 7, 6]  # 10, 8.7, 7.4, 6.1
