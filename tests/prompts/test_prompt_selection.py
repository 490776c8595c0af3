"""Which prompts are kept: the most different ones."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pytest

from prism_ray.prompts.content import PHOTO_AXES, draw_axes
from prism_ray.prompts.selection import Vectors, embedded, most_different, near_duplicates

TEXTS = ["a red bag", "a red bag!", "a blue coat in the rain", "A  RED bag", "two sneakers", "a blue coat in the sun"]
PHOTOS = [", ".join(value for value in row.values() if value) for row in draw_axes(PHOTO_AXES, 40, 0)]


def test_spacing_and_case_do_not_make_a_difference() -> None:
    units = embedded(TEXTS)
    np.testing.assert_array_equal(units[0], units[3])
    np.testing.assert_allclose(np.linalg.norm(units, axis=1), 1)


def test_texts_of_any_length_and_script_have_vectors() -> None:
    units = embedded(["", "a", "日本", "x" * 5000])
    assert units.shape == (4, 512)
    np.testing.assert_allclose(np.linalg.norm(units, axis=1), 1)


def test_vectors_are_the_same_in_every_process() -> None:
    (unit,) = embedded(["ab"])
    # "  a", " ab", "ab ", "b  ": blake2b of each, modulo 512.
    assert np.flatnonzero(unit).tolist() == [72, 122, 124, 184]


def test_near_duplicates_are_found_after_their_first() -> None:
    assert near_duplicates([]) == []
    assert 3 in near_duplicates(TEXTS)
    assert not {0, 2, 4} & set(near_duplicates(TEXTS))


def test_a_text_is_compared_with_those_that_stay() -> None:
    """Of a chain in which each resembles only the one before, every second stays."""
    angles = np.deg2rad([0.0, 15.0, 30.0, 45.0])  # cos 15° = 0.966, cos 30° = 0.866

    def embed(texts: Sequence[str]) -> Vectors:
        return np.stack([np.cos(angles), np.sin(angles)], axis=1)

    assert near_duplicates(["a", "b", "c", "d"], embed=embed) == [1, 3]


def test_different_texts_are_taken_before_similar_ones() -> None:
    assert most_different(TEXTS, 3)[0] == 0
    assert sum(t in (0, 1, 3) for t in most_different(TEXTS, 3)) == 1


@pytest.mark.parametrize("count", [0, 1, 2, 7, 40])
def test_each_text_taken_is_the_one_an_exhaustive_search_takes(count: int) -> None:
    distance = 1 - np.round(embedded(PHOTOS) @ embedded(PHOTOS).T, 9)
    expected: list[int] = []
    for _ in range(count):
        free = [n for n in range(len(PHOTOS)) if n not in expected]
        expected.append(max(free, key=lambda n: min((distance[n, m] for m in expected), default=0.0)))
    assert most_different(PHOTOS, count) == expected


def test_greedy_is_within_twice_the_best_radius() -> None:
    """Gonzalez' bound, on the angle's chord, which is a metric; the best of all choices of three is found by trying."""
    units = embedded(TEXTS)
    distance = np.sqrt(np.maximum(0, 2 - 2 * units @ units.T))

    def radius(chosen: tuple[int, ...] | list[int]) -> float:
        return distance[:, list(chosen)].min(axis=1).max()

    best = min(radius(chosen) for chosen in combinations(range(len(TEXTS)), 3))
    assert radius(most_different(TEXTS, 3)) <= 2 * best + 1e-9


def test_of_texts_that_tie_the_earlier_is_taken() -> None:
    def embed(texts: Sequence[str]) -> Vectors:
        return np.eye(len(texts))

    assert most_different(["d", "c", "b", "a"], 4, embed=embed) == [0, 1, 2, 3]


def test_a_text_encoder_decides_if_there_is_one() -> None:
    vectors = {"sofa": (1.0, 0.0), "couch": (0.999, 0.0447), "boat": (0.0, 1.0)}
    assert most_different(list(vectors), 2, embed=lambda texts: np.array([vectors[t] for t in texts])) == [0, 2]
    assert near_duplicates(list(vectors), embed=lambda texts: np.array([vectors[t] for t in texts])) == [1]


def test_all_are_kept_if_all_are_wanted() -> None:
    assert sorted(most_different(TEXTS, len(TEXTS))) == list(range(len(TEXTS)))


def test_more_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="7 of 6"):
        most_different(TEXTS, 7)
