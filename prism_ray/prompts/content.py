"""What varies between prompts: balanced draws from axes, for photos and for the small world."""

import itertools
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

PHOTO_AXES: dict[str, tuple[str, ...]] = {
    "background": (
        "",
        "in a meadow",
        "on a beach",
        "in a forest",
        "on a city street",
        "in a living room",
        "in a kitchen",
        "on a plain white background",
        "by a river",
        "in the mountains",
        "in a garden",
        "in a workshop",
    ),
    "viewpoint": (
        "",
        "seen from the front",
        "seen from the side",
        "seen from behind",
        "seen from above",
        "seen from below",
        "at eye level",
    ),
    "distance": ("", "in close-up", "filling the frame", "at arm's length", "some steps away", "far away"),
    "count": ("", "alone", "a single one", "two of them", "three of them", "a whole group"),
    "lighting": (
        "",
        "in bright sunlight",
        "on an overcast day",
        "at dusk",
        "at night",
        "in artificial light",
        "in the shade",
        "lit from behind",
    ),
    "season": ("", "in spring", "in summer", "in autumn", "in winter with snow", "after rain"),
    # Two of six hide a part: what is asked for should be seen in most pictures.
    "occlusion": (
        "",
        "in full view",
        "whole in the picture",
        "with nothing in front",
        "partly hidden behind leaves",
        "cut off at the edge",
    ),
}
"""Axis → what it adds to a prompt; the empty entry leaves it open. What matters most comes first."""

STYLES = (
    "a pencil sketch",
    "a cartoon",
    "a painting",
    "a sculpture",
    "an origami figure",
    "an embroidery",
    "a video game rendering",
    "a tattoo",
    "a plush toy",
    "a graffiti",
)
"""The families of renditions that ImageNet-R collects, in this project's words."""

ATTEMPTS = 100

Row = tuple[int, ...]


def draw_axes(axes: Mapping[str, Sequence[str]], count: int, seed: int) -> list[dict[str, str]]:
    """So many combinations, one value of every axis each, in which the values of an axis occur equally often.

    Counts of the values of an axis differ by at most one (a Latin hypercube), those of all combinations as well.

    Raises:
        ValueError: an axis without values.
    """
    sizes = [len(values) for values in axes.values()]
    total = math.prod(sizes)
    if total == 0:
        raise ValueError(f"axes {dict(axes)}: one has no values")
    random = np.random.Generator(np.random.Philox(key=seed))
    rounds, rest = divmod(count, total)
    rows = [row for _ in range(rounds) for row in _shuffled(_all_rows(sizes), random)]
    if 2 * rest <= total:
        rows += _distinct_rows(sizes, rest, random)
    else:
        # What balanced rows leave out is balanced too, and the smaller of the two is easy to find.
        left_out = set(_distinct_rows(sizes, total - rest, random))
        rows += _shuffled([row for row in _all_rows(sizes) if row not in left_out], random)
    return [{axis: axes[axis][value] for axis, value in zip(axes, row, strict=True)} for row in rows]


def axes_without(axes: Mapping[str, Sequence[str]], names: re.Pattern[str]) -> dict[str, tuple[str, ...]]:
    """The axes without values that name a class, which would put it into the pictures of another."""
    kept = {axis: tuple(value for value in values if not names.search(value)) for axis, values in axes.items()}
    return {axis: values for axis, values in kept.items() if values}


def _all_rows(sizes: Sequence[int]) -> list[Row]:
    return list(itertools.product(*(range(size) for size in sizes)))


def _shuffled(rows: Sequence[Row], random: np.random.Generator) -> list[Row]:
    return [rows[n] for n in random.permutation(len(rows))]


def _distinct_rows(sizes: Sequence[int], count: int, random: np.random.Generator) -> list[Row]:
    """Balanced rows of which none repeats, at most half of all there are."""
    for _ in range(ATTEMPTS):  # the first has always been enough, for all grids of up to three axes of 1 to 5 values
        rows = _untangled(_balanced_rows(sizes, count, random), random)
        if rows is not None:
            return rows
    raise AssertionError(f"no {count} distinct rows of {list(sizes)} in {ATTEMPTS} attempts")


def _balanced_rows(sizes: Sequence[int], count: int, random: np.random.Generator) -> list[Row]:
    columns = []
    for size in sizes:
        # Whole turns first, so that only the last, cut one can miss a value.
        turns = [random.permutation(size) for _ in range(-(-count // size))]
        column = np.concatenate([np.zeros(0, dtype=np.int64), *turns])[:count]
        columns.append(random.permutation(column).tolist())
    return list(zip(*columns, strict=True))


def _untangled(rows: Sequence[Row], random: np.random.Generator) -> list[Row] | None:
    """The rows after swaps of single values that make all distinct, which leaves every axis balanced; None if stuck."""
    rows, copies = list(rows), Counter(rows)
    for n in range(len(rows)):
        if copies[rows[n]] == 1:
            continue
        for place in random.permutation(len(rows) * len(rows[n])).tolist():
            other, axis = divmod(place, len(rows[n]))
            mine, theirs = rows[n], rows[other]
            new = (*mine[:axis], theirs[axis], *mine[axis + 1 :]), (*theirs[:axis], mine[axis], *theirs[axis + 1 :])
            if new[0] != new[1] and not copies[new[0]] and not copies[new[1]]:
                copies.subtract((mine, theirs))
                copies.update(new)
                rows[n], rows[other] = new
                break
        else:
            return None
    return rows
