"""Learning-rate schedules as pure functions of progress. A factor is 1 at step 0.

`step` counts from 0, `total` is the length of the schedule in the same unit (iterations or epochs).
"""

import math


def cosine_factor(step: int, total: int) -> float:
    """Cosine from 1 at step 0 to 0 at step `total` (one past the last step): 0.5 (1 + cos(pi t / T))."""
    return 0.5 * (1 + math.cos(math.pi * _progress(step, total)))


def half_cosine_factor(step: int, total: int) -> float:
    """First half of a cosine, from 1 to 0.5: 0.5 (1 + cos(pi e / (2 E))). The student schedule of EDC and CV-DD."""
    return 0.5 * (1 + math.cos(math.pi * _progress(step, total) / 2))


def cos2_factor(step: int, total: int) -> float:
    """0.5 (1 + cos(pi e / (2.5 E))) while e <= 5 E / 6, then 0.75 (1 - e / E).

    The student schedule of PRISM's and EDC's released programs (EDC's "cos2" with zeta 2.5). It jumps where the pieces
    meet, as released: for E = 300 from 0.75 at epoch 250 to 0.1225 at epoch 251.
    """
    progress = _progress(step, total)
    if 6 * step <= 5 * total:  # in integers: exact at the joint
        return 0.5 * (1 + math.cos(math.pi * progress / 2.5))
    return 0.75 * (1 - progress)


def cosine_lr(lr: float, *, step: int, total: int) -> float:
    """Learning rate at a step of a cosine from `lr` to 0, without warm-up."""
    return lr * cosine_factor(step, total)


def _progress(step: int, total: int) -> float:
    """Share of the schedule that is done, 0 to 1. Outside of it a cosine would rise again, so that is refused."""
    if not 0 <= step <= total or total < 1:
        raise ValueError(f"step={step}: outside the schedule; expected 0 to total={total}, and a total of at least 1")
    return step / total
