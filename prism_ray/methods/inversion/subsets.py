"""Whose logits and statistics guide a step: sets of teachers, their weights, and when they are drawn again.

Source: PRISM (arXiv:2511.09905), released program: the primary is always in the set, then three slots, each filled
with probability 0.5 by a network of the pool that is not yet in it. So the number of auxiliaries is Binomial(3, 0.5)
and each of four is present with probability 0.375. The program draws once per slice; `every_n` and `iteration` are
"intra-distillation selection", which the abstract names and the program lacks. CV-DD draws k of the pool, G-VBSM takes
one after another. Deviation: draws are seeded.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Cadence = Literal["run", "slice", "batch", "every_n", "iteration"]
ReductionName = Literal["mean", "sum", "weighted", "normalized"]


def draw_statistics_teachers(
    primary: str, auxiliaries: Sequence[str], *, slots: int, probability: float, seed: int
) -> tuple[str, ...]:
    """One draw: the primary first, then the drawn auxiliaries in the order of the pool.

    Args:
        primary: name of the logit teacher, always in the set.
        auxiliaries: names of the other teachers of the pool.
        slots: optional places, 0 to the number of auxiliaries.
        probability: that a slot is filled; its teacher is uniform among the auxiliaries not yet in the set.
        seed: at least 0; the draw depends on it and the arguments alone.

    Raises:
        ValueError: a name is there twice, there are more slots than auxiliaries, or the probability is not in 0 to 1.
    """
    uniform = _uniform_of_slots([primary, *auxiliaries], slots=slots, probability=probability, seed=seed)
    return (primary, *_filled(auxiliaries, uniform, num_drawn=int((uniform[:slots] < probability).sum())))


def draw_auxiliaries(
    primary: str, auxiliaries: Sequence[str], *, slots: int, probability: float, seed: int
) -> tuple[str, ...]:
    """The auxiliaries of `draw_statistics_teachers` alone; where it has none, its first choice for a single slot.

    This is strict decoupling: the logit teacher's statistics are never matched. With 3 slots at 0.5, one auxiliary in
    every eighth draw stands in for none.

    Raises:
        ValueError: likewise, or there is no auxiliary.
    """
    if not auxiliaries:
        raise ValueError(f"teachers {primary}: no auxiliary to draw; expected at least one")
    uniform = _uniform_of_slots([primary, *auxiliaries], slots=slots, probability=probability, seed=seed)
    return _filled(auxiliaries, uniform, num_drawn=max(1, int((uniform[:slots] < probability).sum())))


def draw_subset(pool: Sequence[str], *, count: int, seed: int) -> tuple[str, ...]:
    """`count` teachers of the pool in its order, every subset of that size equally likely.

    Raises:
        ValueError: a name is there twice, or the count is not 1 to the size of the pool.
    """
    if len(set(pool)) != len(pool):
        raise ValueError(f"teachers {', '.join(pool)}: a name is there twice; expected distinct names")
    if not 1 <= count <= len(pool):
        raise ValueError(f"count={count}: not allowed; expected 1 to the size of the pool, {len(pool)}")
    keys = np.random.Generator(np.random.Philox(key=seed)).random(len(pool))
    drawn: list[int] = sorted(np.argsort(keys, kind="stable")[:count].tolist())
    return tuple(pool[index] for index in drawn)


def _uniform_of_slots(names: Sequence[str], *, slots: int, probability: float, seed: int) -> NDArray[np.float64]:
    """One number for each slot, then one for each auxiliary."""
    if len(set(names)) != len(names):
        raise ValueError(f"teachers {', '.join(names)}: a name is there twice; expected distinct names")
    if not 0 <= slots <= len(names) - 1:
        raise ValueError(f"slots={slots}: not allowed; expected 0 to the number of auxiliaries, {len(names) - 1}")
    if not 0 <= probability <= 1:
        raise ValueError(f"probability={probability}: not allowed; expected a number from 0 to 1")
    return np.random.Generator(np.random.Philox(key=seed)).random(slots + len(names) - 1)


def _filled(auxiliaries: Sequence[str], uniform: NDArray[np.float64], *, num_drawn: int) -> tuple[str, ...]:
    # Whether a slot is filled doesn't depend on who is in it, so count first, then draw a uniform subset of that size.
    order: list[int] = np.argsort(uniform[len(uniform) - len(auxiliaries) :], kind="stable").tolist()
    return tuple(auxiliaries[index] for index in sorted(order[:num_drawn]))


def draw_index(cadence: Cadence, *, slice_index: int, chunk_index: int, iteration: int, every: int) -> tuple[int, ...]:
    """Key of the draw in force at an iteration of a batch; it changes exactly when a new draw is due.

    "run": one draw for all. "slice": one for all batches of a slice. "batch": one per batch. "every_n": per batch,
    again each `every` iterations. "iteration": per batch, at each iteration.

    Raises:
        ValueError: the cadence is unknown, or `every` is below 1 where it is used.
    """
    if cadence == "run":
        return ()
    if cadence == "slice":
        return (slice_index,)
    if cadence == "batch":
        return (slice_index, chunk_index)
    if cadence == "every_n":
        if every < 1:
            raise ValueError(f"every={every}: not allowed; expected an integer of at least 1")
        return (slice_index, chunk_index, iteration // every)
    if cadence == "iteration":
        return (slice_index, chunk_index, iteration)
    raise ValueError(f"cadence={cadence!r}: unknown; known: batch, every_n, iteration, run, slice")


def accuracy_weights(accuracies: Mapping[str, float], *, temperature: float) -> dict[str, float]:
    """Softmax of accuracies in percent over a temperature, summing to 1.

    Source: CV-DD's released program, exp(accuracy / 5) normalized over the teachers of a batch.

    Args:
        accuracies: held-out top-1 by name, 0 to 1.
        temperature: percentage points, above 0.
    """
    best = max(accuracies.values())
    powers = {name: math.exp(100 * (accuracy - best) / temperature) for name, accuracy in accuracies.items()}
    total = sum(powers.values())
    return {name: power / total for name, power in powers.items()}


def reduction_weights(
    drawn: Sequence[str],
    *,
    reduction: ReductionName,
    matched: Mapping[str, bool],
    count_unmatched: bool,
    accuracies: Mapping[str, float],
    scales: Mapping[str, float],
    temperature: float,
) -> dict[str, float]:
    """Weight of each drawn teacher's statistics term R in their sum.

    Args:
        drawn: the set B.
        reduction: "mean": 1 / |B|, as released. "sum": 1. "weighted": see `accuracy_weights`. "normalized": 1 / |B|
            times the ratio of the first scale to the teacher's own, so that each term is as large on real images.
        matched: whether a teacher has anything to match.
        count_unmatched: |B| counts those without, as released; their weight is as large, their term 0.
        accuracies: of the drawn teachers, for "weighted".
        scales: R on real images of every teacher that has statistics, the reference first, for "normalized".
        temperature: see `accuracy_weights`.

    Returns:
        Weight by name, empty where a draw has nothing to match and nothing that counts.
    """
    counted = [name for name in drawn if count_unmatched or matched[name]]
    if not counted:
        return {}
    if reduction == "sum":
        return dict.fromkeys(counted, 1.0)
    if reduction == "weighted":
        return accuracy_weights({name: accuracies[name] for name in counted}, temperature=temperature)
    if reduction == "mean":
        return dict.fromkeys(counted, 1 / len(counted))
    if reduction == "normalized":
        reference = next(iter(scales.values()))
        return {name: reference / scales.get(name, reference) / len(counted) for name in counted}
    raise ValueError(f"reduction={reduction!r}: unknown; known: mean, normalized, sum, weighted")
