"""One seed per random decision, derived from the run's seed and the decision's own name, never drawn.

A seed depends on what is decided (an image, a batch, a view), not on which worker decides it, in which order or when.
"""

import hashlib


def seed_for(run_seed: int, purpose: str, *keys: int | str) -> int:
    """63-bit seed (fits a parquet int64) of the decision named by `purpose` and `keys`.

    >>> seed_for(0, "image", 3, 7) == seed_for(0, "image", 3, 7) != seed_for(0, "image", 7, 3)
    True
    """
    # `repr` of a tuple of ints and strings is unambiguous: ("a", 1) and ("a1",) differ.
    digest = hashlib.blake2b(repr((run_seed, purpose, *keys)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
