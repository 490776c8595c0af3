"""The held-out split."""

import numpy as np
import pytest

from prism_ray.data.records import held_out, held_out_rows


@pytest.mark.parametrize(
    ("count", "fraction", "expected"),
    [(10, 0.2, 2), (10, 0.01, 1), (10, 0.99, 9), (2, 0.5, 1), (2, 0.99, 1), (1, 0.9, 0), (0, 0.5, 0)],
)
def test_a_class_keeps_a_training_image_and_gives_a_test_image_where_it_can(
    count: int, fraction: float, expected: int
) -> None:
    mask = held_out(count, class_id=0, fraction=fraction, seed=0)
    assert mask.shape == (count,)
    assert mask.sum() == expected


def test_the_held_out_images_of_a_class_do_not_depend_on_other_classes() -> None:
    few = np.array([0, 1, 0, 1, 0, 0, 0])
    many = np.array([1, 0, 1, 0, 2, 1, 0, 0, 1, 0, 2])
    few_mask, many_mask = (held_out_rows(rows, fraction=0.4, seed=3) for rows in (few, many))
    np.testing.assert_array_equal(few_mask[few == 0], many_mask[many == 0])


def test_the_seed_decides_and_classes_differ() -> None:
    def mask(class_id: int, seed: int) -> list[bool]:
        return held_out(100, class_id=class_id, fraction=0.5, seed=seed).tolist()

    assert mask(0, 0) == mask(0, 0)
    assert mask(0, 0) != mask(0, 1)
    assert mask(0, 0) != mask(1, 0)


def test_the_split_of_seed_0_stays_what_it_is() -> None:
    """Data sets prepared before must be found, and mean the same, after an upgrade."""
    assert np.flatnonzero(held_out(20, class_id=3, fraction=0.2, seed=0)).tolist() == [1, 4, 5, 9]
