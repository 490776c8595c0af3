import pytest

from prism_ray.methods.inversion.budgets import entry_iterations, iterations_of_slice


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


def test_images_enter_in_equal_groups_each_a_round_after_the_one_before():
    found = entry_iterations(range(8), images_per_class=8, iterations=400, rounds=4)
    assert found == [0, 0, 100, 100, 200, 200, 300, 300]


def test_the_first_group_is_optimized_for_all_rounds_and_the_last_for_one():
    entries = entry_iterations(range(50), images_per_class=50, iterations=4000, rounds=8)
    assert [4000 - entry for entry in sorted(set(entries))] == [4000, 3500, 3000, 2500, 2000, 1500, 1000, 500]
    assert entries == sorted(entries)
    sizes = [entries.count(entry) for entry in sorted(set(entries))]
    assert max(sizes) - min(sizes) <= 1


def test_an_image_enters_when_its_index_says_whoever_else_is_in_its_batch():
    whole = entry_iterations(range(10), images_per_class=10, iterations=37, rounds=3)
    for k in range(10):
        assert entry_iterations([3, k, 7], images_per_class=10, iterations=37, rounds=3)[1] == whole[k]


def test_one_round_lets_all_images_enter_at_once():
    assert entry_iterations([4, 0, 9], images_per_class=10, iterations=99, rounds=1) == [0, 0, 0]


@pytest.mark.parametrize(("images", "iterations", "rounds"), [(10, 10, 10), (7, 8, 5), (3, 1000, 3), (5, 5, 2)])
def test_every_image_gets_at_least_one_iteration(images, iterations, rounds):
    entries = entry_iterations(range(images), images_per_class=images, iterations=iterations, rounds=rounds)
    assert all(0 <= entry < iterations for entry in entries)
    assert len(set(entries)) == rounds
