"""Iteration budgets: later slices are optimized for fewer steps, so that images of a class differ in how far they went.

Source: PRISM (arXiv:2511.09905), released program: T_k = 4000 - 500 (k mod 8), a lock-step form of DELT's EarlyLate.
"""


def iterations_of_slice(iterations: int, slice_index: int, *, decay: float, period: int) -> int:
    """Optimization steps of a slice, at least 1: T - T * decay * (k mod period), rounded.

    Args:
        iterations: T, the steps of slice 0.
        slice_index: k, from 0.
        decay: share of T dropped per slice, 0 to 1; 0 is a constant budget, the released program's is 0.125.
        period: slices after which the budget starts again at T, at least 1.
    """
    return max(1, round(iterations - iterations * decay * (slice_index % period)))
