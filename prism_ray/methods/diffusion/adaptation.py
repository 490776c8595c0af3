"""The closed loop: what a pilot round of unguided samples says about each class decides how it is sampled.

No real image is looked at. Source: this project; the papers guide and prompt all classes alike.
"""

from collections.abc import Mapping, Sequence
from typing import TypeVar

Prompt = TypeVar("Prompt")


def strengths(agreement: Mapping[int, float], *, gain: float) -> dict[int, float]:
    """Precision: by class, the factor of the guidance scale, at least 1.

    1 + gain x (a_best - a_c) of the shares a (0 to 1) of pilot samples that teachers name as they were meant: the class
    that the generator does best keeps the scale, one of which it misses another half gets half the gain more.
    """
    best = max(agreement.values(), default=0.0)
    return {class_id: 1 + gain * (best - share) for class_id, share in agreement.items()}


def wide_shares(diversity: Mapping[int, float], *, most: float) -> dict[int, float]:
    """Recall: by class, the share of its images that get wide prompts, 0 to `most`.

    most x (1 - d_c / d_best) of how far apart the pilot samples of a class are, which is 1 minus their mean cosine in a
    teacher's features: the most diverse class gets none, one whose samples are all alike gets `most`.
    """
    best = max(diversity.values(), default=0.0)
    return {class_id: most * (1 - max(d, 0.0) / best) if best > 0 else most for class_id, d in diversity.items()}


def dealt(plain: Sequence[Prompt], wide: Sequence[Prompt], index: int, *, share: float) -> Prompt:
    """The prompt of a class's image number `index`, wide for an even share of all; each list is used in turn.

    Where one list is empty, the other serves.
    """
    before, after = int(index * share), int((index + 1) * share)
    if wide and (after > before or not plain):
        return wide[(before if plain else index) % len(wide)]
    return plain[(index - before if wide else index) % len(plain)]
