"""Numbers as text."""

import math

import pytest

from prism_ray.report.format import (
    MISSING,
    Spread,
    format_bytes,
    format_count,
    format_digits,
    format_number,
    format_percent,
    format_points,
    spread,
    wilson_interval,
)


def test_the_deviation_is_the_sample_one() -> None:
    measured = spread([1.0, 2.0, 4.0])
    assert measured is not None
    assert measured.mean == pytest.approx(7 / 3)
    assert measured.std == pytest.approx(math.sqrt(7 / 3))  # sum of squares 14/3 over n - 1 = 2
    assert measured.num == 3


def test_a_single_value_has_no_deviation() -> None:
    assert spread([0.5]) == Spread(0.5, None, 1)


def test_what_was_not_measured_does_not_count() -> None:
    assert spread([None, 0.5, float("nan")]) == Spread(0.5, None, 1)
    assert spread([None, float("nan")]) is None


@pytest.mark.parametrize(
    ("hits", "num", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (16, 32, 0.3363, 0.6637)],
)
def test_the_interval_of_a_share_is_wilsons(hits: int, num: int, low: float, high: float) -> None:
    assert wilson_interval(hits, num) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("hits", "num"), [(-1, 3), (4, 3), (0, 0)])
def test_a_share_of_nothing_has_no_interval(hits: int, num: int) -> None:
    with pytest.raises(ValueError, match="expected 0 to num"):
        wilson_interval(hits, num)


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (12_345, "12.3 kB"),
        (99_950, "100 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (4_560_000, "4.56 MB"),
        (7 * 10**12, "7.00 TB"),
        (None, MISSING),
    ],
)
def test_sizes_have_three_digits(size_bytes: int | None, text: str) -> None:
    assert format_bytes(size_bytes) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.1739, "0.174"), (31.24, "31.2"), (2312.4, "2,312"), (0, "0"), (float("nan"), MISSING)]
)
def test_times_and_speeds_have_three_digits(value: float, text: str) -> None:
    assert format_digits(value) == text


def test_missing_values_are_dashes() -> None:
    assert {format_number(None), format_number(float("nan")), format_percent(None), format_count(None)} == {MISSING}


def test_a_share_of_one_is_a_hundred_percent() -> None:
    assert format_percent(1.0) == "100.00"


def test_a_difference_has_a_sign() -> None:
    assert [format_points(value) for value in (0.0321, -0.2, 0.0, None)] == ["+3.21", "-20.00", "+0.00", MISSING]
