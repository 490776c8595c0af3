"""Selection by scores and by features, against slow and closed-form versions."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from prism_ray.methods.selection import cosine_kernel, herding, lowest, medium, regression


def features(seed: int, num: int = 40, dim: int = 6) -> Tensor:
    return torch.randn(num, dim, generator=torch.Generator().manual_seed(seed))


def distances_to_mean(units: Tensor, taken: list[int]) -> list[float]:
    """Distance of the mean of the first 1, 2, ... taken items from the mean of all."""
    mean = units.mean(dim=0)
    return [float((units[taken[: n + 1]].mean(dim=0) - mean).norm()) for n in range(len(taken))]


def test_the_lowest_scores_come_first_and_of_equal_ones_the_first() -> None:
    assert lowest(np.array([3.0, 1.0, 2.0, 1.0, 0.5]), 4) == [4, 1, 3, 2]


def test_medium_takes_those_nearest_to_the_median_outwards() -> None:
    scores = np.array([9.0, 0.0, 5.0, 4.0, 7.0])  # median 5
    assert medium(scores, 5) == [2, 3, 4, 0, 1]


def test_medium_of_an_even_number_takes_the_first_of_the_two_middle_ones() -> None:
    assert medium(np.array([4.0, 1.0, 2.0, 3.0]), 2) == [2, 3]


def test_medium_does_not_see_how_extreme_the_extremes_are() -> None:
    assert medium(np.array([1.0, 2.0, 3.0, 4.0, 5.0]), 1) == medium(np.array([-99.0, 2.0, 3.0, 4.0, 1e9]), 1) == [2]


def test_herding_takes_at_each_step_the_item_that_brings_the_mean_nearest() -> None:
    rows = features(0)
    units = torch.nn.functional.normalize(rows.double(), dim=1)
    taken: list[int] = []
    for _ in range(12):
        free = [n for n in range(len(rows)) if n not in taken]
        taken.append(min(free, key=lambda n: distances_to_mean(units, [*taken, n])[-1]))
    assert herding(rows, 12) == taken


def test_herding_stays_nearer_to_the_mean_than_random_choices() -> None:
    rows = features(1, num=200)
    units = torch.nn.functional.normalize(rows.double(), dim=1)
    ours = distances_to_mean(units, herding(rows, 10))[-1]
    generator = torch.Generator().manual_seed(2)
    others = [distances_to_mean(units, torch.randperm(200, generator=generator)[:10].tolist())[-1] for _ in range(100)]
    assert ours < min(others)


def test_herding_takes_none_twice_and_the_first_of_equal_ones() -> None:
    rows = torch.cat([features(3, num=5), features(3, num=5)])
    taken = herding(rows, 10)
    assert sorted(taken) == list(range(10))
    assert all(taken.index(n) < taken.index(n + 5) for n in range(5))


def test_herding_ignores_the_length_of_features_and_asking_for_more_changes_nothing_before() -> None:
    rows = features(4)
    scaled = rows * torch.rand(len(rows), 1, generator=torch.Generator().manual_seed(5)).add(0.1)
    assert herding(rows, 20)[:7] == herding(scaled, 7)


@pytest.mark.parametrize("choose", [lambda n: lowest(np.zeros(3), n), lambda n: herding(torch.ones(3, 2), n)])
def test_more_items_than_there_are_are_refused(choose: Callable[[int], list[int]]) -> None:
    with pytest.raises(ValueError, match="4 of 3 items"):
        choose(4)


def test_regression_takes_the_items_that_an_exhaustive_search_takes_one_by_one() -> None:
    generator = torch.Generator().manual_seed(0)
    num_items, num_classes, per_class, ridge = 60, 3, 4, 0.1
    features = [torch.randn(num_items, width, generator=generator) for width in (20, 7)]
    targets = torch.randn(num_items, num_classes, generator=generator).mul(2).softmax(dim=1)
    class_ids = torch.arange(num_items) % num_classes
    kernel = torch.stack([cosine_kernel(f) for f in features]).mean(dim=0)
    wanted = (targets - targets.mean(dim=0)).double()

    def error(taken: list[int]) -> float:
        regularized = kernel[taken][:, taken] + ridge * torch.eye(len(taken), dtype=torch.float64)
        return (wanted - kernel[:, taken] @ torch.linalg.solve(regularized, wanted[taken])).square().sum().item()

    taken: list[int] = []
    for _ in range(num_classes * per_class):
        full = {c for c in range(num_classes) if sum(n % num_classes == c for n in taken) == per_class}
        allowed = [n for n in range(num_items) if n not in taken and n % num_classes not in full]
        taken.append(min(allowed, key=lambda n: error([*taken, n])))
    expected = {c: [n for n in taken if n % num_classes == c] for c in range(num_classes)}
    assert regression(kernel, targets, class_ids, per_class, ridge=ridge) == expected


def test_regression_predicts_better_from_what_it_takes_than_from_a_random_choice() -> None:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(200, 10, generator=generator)
    targets = (features @ torch.randn(10, 4, generator=generator)).softmax(dim=1)
    class_ids = targets.argmax(dim=1)
    per_class = int(class_ids.bincount().min()) // 4
    kernel = cosine_kernel(features)

    def error(places: list[int]) -> float:
        wanted = (targets - targets.mean(dim=0)).double()
        regularized = kernel[places][:, places] + 0.1 * torch.eye(len(places), dtype=torch.float64)
        return (wanted - kernel[:, places] @ torch.linalg.solve(regularized, wanted[places])).square().mean().item()

    taken = regression(kernel, targets, class_ids, per_class, ridge=0.1)
    by_class = [torch.nonzero(class_ids == c).flatten() for c in range(4)]
    drawn = [
        [int(n) for mine in by_class for n in mine[torch.randperm(len(mine), generator=generator)[:per_class]]]
        for _ in range(20)
    ]
    assert error([n for places in taken.values() for n in places]) < min(error(places) for places in drawn)
