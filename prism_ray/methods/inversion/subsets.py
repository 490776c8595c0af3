"""Statistics teachers: whose batch-norm statistics are matched, and when they are drawn again.

Source: PRISM (arXiv:2511.09905), released program: the primary is always in the set, then three slots, each filled
with probability 0.5 by a network of the pool that is not yet in it. So the number of auxiliaries is Binomial(3, 0.5)
and each of four is present with probability 0.375. The program draws once per slice; `every_n` and `iteration` are
"intra-distillation selection", which the abstract names and the program lacks. Deviation: draws are seeded.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

Cadence = Literal["slice", "batch", "every_n", "iteration"]


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
    names = [primary, *auxiliaries]
    if len(set(names)) != len(names):
        raise ValueError(f"teachers {', '.join(names)}: a name is there twice; expected distinct names")
    if not 0 <= slots <= len(auxiliaries):
        raise ValueError(f"slots={slots}: not allowed; expected 0 to the number of auxiliaries, {len(auxiliaries)}")
    if not 0 <= probability <= 1:
        raise ValueError(f"probability={probability}: not allowed; expected a number from 0 to 1")
    uniform = np.random.Generator(np.random.Philox(key=seed)).random(slots + len(auxiliaries))
    num_drawn = int((uniform[:slots] < probability).sum())
    # Whether a slot is filled doesn't depend on who is in it, so count first, then draw a uniform subset of that size.
    drawn: list[int] = np.argsort(uniform[slots:], kind="stable")[:num_drawn].tolist()
    return (primary, *[auxiliaries[index] for index in sorted(drawn)])


def draw_index(cadence: Cadence, *, slice_index: int, chunk_index: int, iteration: int, every: int) -> tuple[int, ...]:
    """Key of the draw in force at an iteration of a batch; it changes exactly when a new draw is due.

    "slice": one draw for all batches of a slice. "batch": one per batch. "every_n": per batch, again each `every`
    iterations. "iteration": per batch, at each iteration.

    Raises:
        ValueError: the cadence is unknown, or `every` is below 1 where it is used.
    """
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
    raise ValueError(f"cadence={cadence!r}: unknown; known: batch, every_n, iteration, slice")
