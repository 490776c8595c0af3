"""Draws from axes: balanced, distinct as long as they can be, the same with the same seed."""

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence

import pytest

from prism_ray.data.imagenet_names import class_names
from prism_ray.prompts.content import PHOTO_AXES, STYLES, axes_without, draw_axes
from prism_ray.prompts.names import class_phrases
from prism_ray.prompts.write import names_pattern

AXES = {"a": ("1", "2", "3"), "b": ("x", "y"), "c": ("p", "q", "r", "s")}
SHAPES = [*itertools.product((1, 2, 3, 4), repeat=3), (6, 6), (5, 7), (2,) * 6, (9,)]


def assert_balanced(drawn: list[dict[str, str]], axes: Mapping[str, Sequence[str]]) -> None:
    """Values occur equally often, up to one, and so do combinations as a whole."""
    for axis, values in axes.items():
        counts = Counter(row[axis] for row in drawn)
        assert max(counts[value] for value in values) - min(counts[value] for value in values) <= 1
    combinations = Counter(tuple(row[axis] for axis in axes) for row in drawn)
    assert max(combinations.values(), default=0) <= -(-len(drawn) // math.prod(len(values) for values in axes.values()))


@pytest.mark.parametrize("count", [0, 1, 5, 7, 12, 20, 23, 24, 25, 50])
def test_values_occur_equally_often_and_combinations_repeat_only_when_all_were_used(count: int) -> None:
    drawn = draw_axes(AXES, count, 3)
    assert len(drawn) == count
    assert_balanced(drawn, AXES)


@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_that_holds_for_every_count_of_axes_of_every_size(sizes: tuple[int, ...]) -> None:
    axes = {f"axis {n}": [str(value) for value in range(size)] for n, size in enumerate(sizes)}
    for count in range(2 * math.prod(sizes) + 2):
        assert_balanced(draw_axes(axes, count, count), axes)


def test_a_thousand_prompts_of_photos_are_balanced_and_distinct() -> None:
    assert_balanced(draw_axes(PHOTO_AXES, 1000, 0), PHOTO_AXES)


def test_axes_do_not_follow_each_other() -> None:
    """Two axes of six values: each pair of 36 about 100 times in 3600, chi-square of 25 degrees below its 99.9 %."""
    drawn = draw_axes(PHOTO_AXES, 3600, 5)
    pairs = Counter((row["season"], row["count"]) for row in drawn)
    assert (
        sum((pairs[pair] - 100) ** 2 / 100 for pair in itertools.product(PHOTO_AXES["season"], PHOTO_AXES["count"]))
        < 53
    )


def test_a_draw_repeats_with_its_seed_alone() -> None:
    assert draw_axes(PHOTO_AXES, 30, 1) == draw_axes(PHOTO_AXES, 30, 1) != draw_axes(PHOTO_AXES, 30, 2)


def test_without_axes_there_is_one_empty_combination() -> None:
    assert draw_axes({}, 2, 0) == [{}, {}]


def test_an_axis_without_values_is_refused() -> None:
    with pytest.raises(ValueError, match="one has no values"):
        draw_axes({"a": ("1",), "b": ()}, 1, 0)


def test_vocabularies_are_rich_enough_and_have_no_entry_twice() -> None:
    for values in (*PHOTO_AXES.values(), STYLES):
        assert 6 <= len(set(values)) == len(values) <= 12
        assert all(len(value.split()) <= 7 for value in values)


def test_vocabularies_name_no_class_of_imagenet() -> None:
    assert axes_without(PHOTO_AXES, names_pattern([found[0] for found in class_phrases(class_names())])) == PHOTO_AXES


def test_values_that_name_a_class_are_left_out() -> None:
    axes = {"place": ("", "in a forest", "in a garden"), "light": ("at night",)}
    assert axes_without(axes, names_pattern(["forest", "night"])) == {"place": ("", "in a garden")}
