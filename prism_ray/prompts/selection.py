"""Which prompts are kept: those that differ most, by the letters they are made of or as a text encoder sees them."""

import hashlib
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

DIMENSIONS = 512
NEAR = 0.95
"""Cosine similarity above which the later of two texts says nothing new."""
DECIMALS = 9
"""Similarities are rounded, so that texts equally far from the others tie on every machine."""

Vectors = NDArray[np.floating]


def embedded(texts: Sequence[str]) -> Vectors:
    """Unit vectors (N, 512) of hashed counts of three letters in a row, whatever their case and spacing."""
    vectors = np.zeros((len(texts), DIMENSIONS))
    for n, text in enumerate(texts):
        plain = f"  {plainly(text)}  "
        places = [_place(plain[start : start + 3]) for start in range(len(plain) - 2)]
        vectors[n] = np.bincount(places, minlength=DIMENSIONS)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def most_different(
    texts: Sequence[str], count: int, *, embed: Callable[[Sequence[str]], Vectors] = embedded
) -> list[int]:
    """Places of `count` texts: the first, then always the one that is farthest from all taken (greedy k-centre).

    Near duplicates are therefore the last to be taken. Source: Gonzalez 1985. Ties go to the earlier text.

    Args:
        texts: to choose from.
        count: at most as many as there are.
        embed: texts → (N, D) vectors of length 1.
    """
    if not 0 <= count <= len(texts):
        raise ValueError(f"{count} of {len(texts)} texts; expected at most as many as there are")
    if count == 0:
        return []
    units = embed(texts)
    taken: list[int] = []
    nearest = np.full(len(texts), -np.inf)  # largest similarity to those taken
    for _ in range(count):
        best = int(np.argmin(nearest))
        taken.append(best)
        nearest = np.maximum(nearest, np.round(units @ units[best], DECIMALS))
        nearest[best] = np.inf
    return taken


def near_duplicates(texts: Sequence[str], *, embed: Callable[[Sequence[str]], Vectors] = embedded) -> list[int]:
    """Places of texts that say nearly what an earlier one that stays says."""
    if not texts:
        return []
    units = embed(texts)
    kept: list[int] = []
    left_out: list[int] = []
    for n in range(len(texts)):
        similar = bool((np.round(units[kept] @ units[n], DECIMALS) > NEAR).any())
        (left_out if similar else kept).append(n)
    return left_out


def plainly(text: str) -> str:
    """What of a text counts when texts are compared: not its case, not its spacing."""
    return " ".join(text.casefold().split())


@lru_cache(maxsize=2**16)
def _place(letters: str) -> int:
    digest = hashlib.blake2b(letters.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % DIMENSIONS
