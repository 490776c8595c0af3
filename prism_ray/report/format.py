"""Numbers as text, as they are: nothing is rounded up, and what was not measured is a dash."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TypeGuard

MISSING = "\u2013"
"""An en dash, as tables have it."""


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of `num` values; no deviation for fewer than two."""

    mean: float
    std: float | None
    num: int


def spread(values: Iterable[float | None]) -> Spread | None:
    """The spread of the values that were measured; None if there is none."""
    measured = [value for value in values if is_measured(value)]
    if not measured:
        return None
    return Spread(fmean(measured), stdev(measured) if len(measured) > 1 else None, len(measured))


def wilson_interval(hits: int, num: int, *, z: float = 1.959964) -> tuple[float, float]:
    """Interval of a share of which `hits` of `num` were seen, 0 to 1; the default is that of 95 % confidence.

    Source: Wilson 1927, the score interval without continuity correction.
    """
    if not 0 <= hits <= num or num == 0:
        raise ValueError(f"{hits} hits of {num}; expected 0 to num, num at least 1")
    share, weight = hits / num, z * z / num
    center = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(share * (1 - share) / num + weight / (4 * num))
    return max(0.0, center - half), min(1.0, center + half)


def is_measured(value: float | None) -> TypeGuard[float]:
    """Whether a value is neither None nor NaN."""
    return value is not None and math.isfinite(value)


def format_number(value: float | None, digits: int = 3) -> str:
    """Fixed number of decimals, with thousands separators."""
    return f"{value:,.{digits}f}" if is_measured(value) else MISSING


def format_percent(share: float | None, digits: int = 2) -> str:
    """A share from 0 to 1 as a percentage without its sign."""
    return format_number(None if share is None else 100 * share, digits)


def format_points(difference: float | None) -> str:
    """A difference of shares in percentage points, with its sign."""
    return f"{100 * difference:+.2f}" if is_measured(difference) else MISSING


def format_count(value: int | None) -> str:
    """An integer with thousands separators."""
    return MISSING if value is None else f"{value:,}"


def format_digits(value: float | None) -> str:
    """Three significant digits, all digits before the point from 100 on; for times and speeds."""
    if not is_measured(value):
        return MISSING
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def format_bytes(size_bytes: int | None) -> str:
    """Three significant digits in decimal units: `512 B`, `12.3 kB`, `4.56 MB`."""
    if size_bytes is None:
        return MISSING
    size = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        # 999.5 would be rounded to 1000 of this unit.
        if size < 999.5:
            return f"{size_bytes} B" if unit == "B" else f"{_three_digits(size)} {unit}"
        size /= 1000
    return f"{_three_digits(size)} TB"


def _three_digits(value: float) -> str:
    decimals = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:,.{decimals}f}"
