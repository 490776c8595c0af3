"""Iteration budgets, so that images of a class differ in how far they were optimized."""

from collections.abc import Sequence


def iterations_of_slice(iterations: int, slice_index: int, *, decay: float, period: int) -> int:
    """Optimization steps of a slice: T - T * decay * (k mod period), rounded, at least 1.

    Source: PRISM (arXiv:2511.09905), released program: T_k = 4000 - 500 (k mod 8), DELT's EarlyLate in lock-step.

    Args:
        iterations: T, the steps of slice 0.
        slice_index: k, from 0.
        decay: share of T dropped per slice, 0 to 1; 0 is a constant budget, the released program's is 0.125.
        period: slices after which the budget starts again at T, at least 1.
    """
    return max(1, round(iterations - iterations * decay * (slice_index % period)))


def entry_iterations(indices: Sequence[int], *, images_per_class: int, iterations: int, rounds: int) -> list[int]:
    """Iteration at which each image enters a class-major batch; all leave it together, at its end.

    The images of a class enter in `rounds` equal groups, each an equal part of the iterations after the one before.
    Source: DELT (arXiv:2411.19946), EarlyLate: the first group is optimized for all rounds, the last for one.

    Args:
        indices: 0-based index in its class of each image.
        images_per_class: above every index.
        iterations: T, of the whole batch.
        rounds: number of groups, at least 1.
    """
    return [(k * rounds // images_per_class) * iterations // rounds for k in indices]
