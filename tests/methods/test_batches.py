import subprocess
import sys
from collections import Counter
from itertools import groupby

import pytest

from prism_ray.methods.batches import Batch, class_major_batches, cross_class_batches

ORDERS = ["sorted", "permuted", "strided"]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("num_classes", "batch_size"), [(10, 4), (10, 10), (10, 100), (7, 1), (1000, 100), (1, 3)])
def test_every_image_of_the_data_set_is_in_exactly_one_batch(order, num_classes, batch_size):
    batches = cross_class_batches(num_classes, 3, batch_size=batch_size, order=order, seed=5)
    made = Counter(image for batch in batches for image in batch.images)
    assert made == Counter((class_id, k) for class_id in range(num_classes) for k in range(3))
    assert all(1 <= len(batch.class_ids) <= batch_size for batch in batches)
    assert len(batches) == 3 * -(-num_classes // batch_size)


@pytest.mark.parametrize("order", ORDERS)
def test_a_batch_has_each_class_at_most_once_in_ascending_order_all_of_its_slice(order):
    for batch in cross_class_batches(23, 2, batch_size=5, order=order, seed=1):
        assert list(batch.class_ids) == sorted(set(batch.class_ids))
        assert {k for _, k in batch.images} == {batch.slice_index}


@pytest.mark.parametrize("order", ORDERS)
def test_batches_are_slice_major_and_every_slice_has_the_same_chunks(order):
    batches = cross_class_batches(11, 3, batch_size=4, order=order, seed=2)
    keys = [(batch.slice_index, batch.chunk_index) for batch in batches]
    assert keys == [(k, chunk) for k in range(3) for chunk in range(3)]
    slices = [[b.class_ids for b in group] for _, group in groupby(batches, key=lambda b: b.slice_index)]
    assert slices[0] == slices[1] == slices[2]


def test_sorted_chunks_are_consecutive_classes():
    assert cross_class_batches(5, 1, batch_size=2, order="sorted", seed=0) == [
        Batch(0, 0, ((0, 0), (1, 0))),
        Batch(0, 1, ((2, 0), (3, 0))),
        Batch(0, 2, ((4, 0),)),
    ]


def test_strided_chunks_take_every_nth_class_and_are_balanced():
    chunks = [batch.class_ids for batch in cross_class_batches(10, 1, batch_size=4, order="strided", seed=0)]
    assert chunks == [(0, 3, 6, 9), (1, 4, 7), (2, 5, 8)]


def test_the_permutation_depends_on_the_seed_alone():
    def chunks(seed: int, images_per_class: int = 1) -> list[tuple[int, ...]]:
        batches = cross_class_batches(50, images_per_class, batch_size=10, order="permuted", seed=seed)
        return [batch.class_ids for batch in batches][:5]

    assert chunks(3) == chunks(3, images_per_class=4)
    assert len({tuple(chunks(seed)) for seed in range(20)}) == 20


def test_the_permutation_is_uniform_in_which_classes_meet():
    num_seeds = 600
    together = 0
    for seed in range(num_seeds):
        first = cross_class_batches(6, 1, batch_size=3, order="permuted", seed=seed)[0]
        together += (0 in first.class_ids) == (1 in first.class_ids)
    # Probability 2/5; four standard deviations of the count are 48.
    assert abs(together - 0.4 * num_seeds) < 48


# Class-major batches


SHAPES = [(10, 3, 7), (10, 10, 4), (10, 10, 100), (7, 1, 1), (3, 50, 16), (1, 5, 2), (8, 10, 80), (5, 7, 7)]


@pytest.mark.parametrize("max_classes", [None, 1, 2])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("num_classes", "per_class", "batch_size"), SHAPES)
def test_every_image_is_in_exactly_one_class_major_batch(order, num_classes, per_class, batch_size, max_classes):
    batches = class_major_batches(
        num_classes, per_class, batch_size=batch_size, order=order, seed=5, max_classes=max_classes
    )
    made = Counter(image for batch in batches for image in batch.images)
    assert made == Counter((class_id, k) for class_id in range(num_classes) for k in range(per_class))
    assert len({(batch.slice_index, batch.chunk_index) for batch in batches}) == len(batches)
    for batch in batches:
        assert 1 <= len(batch.images) <= batch_size
        assert list(batch.images) == sorted(batch.images), "class by class"
        assert len(set(batch.class_ids)) <= (max_classes or num_classes)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("num_classes", "per_class", "batch_size"), SHAPES)
def test_a_class_that_fits_is_whole_and_one_larger_than_a_batch_is_cut_into_balanced_parts(
    order, num_classes, per_class, batch_size
):
    sizes: dict[int, list[int]] = {}
    for batch in class_major_batches(num_classes, per_class, batch_size=batch_size, order=order, seed=1):
        for class_id, count in Counter(batch.class_ids).items():
            sizes.setdefault(class_id, []).append(count)
    for parts in sizes.values():
        assert len(parts) == -(-per_class // batch_size), "the fewest parts"
        assert max(parts) - min(parts) <= 1


def test_the_parts_of_a_class_are_counted_by_the_slice_and_follow_each_other():
    batches = class_major_batches(2, 5, batch_size=2, order="sorted", seed=0)
    assert batches[:3] == [
        Batch(0, 0, ((0, 0),)),
        Batch(1, 0, ((0, 1), (0, 2))),
        Batch(2, 0, ((0, 3), (0, 4))),
    ]
    assert [(batch.chunk_index, batch.slice_index) for batch in batches] == [(c, p) for c in range(2) for p in range(3)]


def test_as_many_whole_classes_share_a_batch_as_fit_and_one_where_it_is_asked_for():
    def chunks(max_classes: int | None) -> list[tuple[int, ...]]:
        batches = class_major_batches(10, 10, batch_size=35, order="sorted", seed=0, max_classes=max_classes)
        return [tuple(sorted(set(batch.class_ids))) for batch in batches]

    assert chunks(None) == [(0, 1, 2), (3, 4, 5), (6, 7, 8), (9,)]
    assert chunks(2) == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
    assert chunks(1) == [(class_id,) for class_id in range(10)]


def test_a_class_with_more_images_than_a_batch_shares_it_with_no_other():
    for batch in class_major_batches(6, 9, batch_size=8, order="permuted", seed=4):
        assert len(set(batch.class_ids)) == 1


# What is refused


@pytest.mark.parametrize(
    ("counts", "name"), [((0, 1, 1), "num_classes=0"), ((1, 0, 1), "images_per_class=0"), ((1, 1, 0), "batch_size=0")]
)
def test_counts_below_one_are_refused_by_name(counts, name):
    for form in (cross_class_batches, class_major_batches):
        with pytest.raises(ValueError, match=name):
            form(counts[0], counts[1], batch_size=counts[2], order="sorted", seed=0)


def test_an_unknown_order_is_refused():
    for form in (cross_class_batches, class_major_batches):
        with pytest.raises(ValueError, match="'random'"):
            form(4, 1, batch_size=2, order="random", seed=0)  # pyright: ignore[reportArgumentType] - on purpose


def test_planning_does_not_load_torch():
    code = (
        "import sys, prism_ray.methods.batches, prism_ray.methods.inversion.subsets, "
        "prism_ray.methods.inversion.budgets, prism_ray.methods.schedules; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
