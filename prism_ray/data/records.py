"""What every source of real images offers: class names, and labelled images of two splits in a fixed order."""

import difflib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from PIL import Image

from prism_ray.errors import InputError
from prism_ray.seeds import seed_for

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")


class RealImage(NamedTuple):
    """One labelled image of a source; nothing is read or decoded before `load` is called, from any thread."""

    class_id: int
    image_id: str  # unique within a split
    load: Callable[[], Image.Image]


class RealSource(Protocol):
    """A data set where it lies. Building one reads at most names and headers."""

    class_names: list[str]

    def check(self) -> None:
        """Refuse, from a bounded sample and within two seconds, what preparing would refuse."""
        ...

    def fingerprint(self) -> str:
        """Changes when the source's files do: names, sizes and where known entity tags, never times."""
        ...

    def split_description(self) -> dict[str, Any]:
        """How the test split came about, JSON-ready."""
        ...

    def images(self, split: Split) -> Iterator[RealImage]:
        """The images of a split, lazily, always in the same order."""
        ...


def class_ids_of(classes: Sequence[str], class_names: Sequence[str]) -> list[int]:
    """Ids of classes given by name, ascending; all ids if none is given.

    Raises:
        InputError: a name is unknown, with the nearest ones, or given twice.
    """
    if not classes:
        return list(range(len(class_names)))
    ids = {name: class_id for class_id, name in enumerate(class_names)}
    for name in classes:
        if name not in ids:
            lowered = {known.lower(): known for known in class_names}
            same_word = [known for low, known in lowered.items() if name.lower() in low.split()]
            alike = [lowered[low] for low in difflib.get_close_matches(name.lower(), lowered, n=4)]
            near = list(dict.fromkeys([*same_word[:4], *alike]))
            known = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(class_names[:5])}, …"
            raise InputError(f"classes: {name!r} is no class of the data set; {known}")
        if classes.count(name) > 1:
            raise InputError(f"classes: {name!r} is given twice; expected each class once; leave one out")
    return sorted(ids[name] for name in classes)


def held_out(count: int, *, class_id: int, fraction: float, seed: int) -> np.ndarray:
    """Which of a class's `count` images, in source order, form its test split: bool (count,).

    A share of `fraction`, but at least one image and never the last one left for training. It depends on nothing but
    the arguments, so one class's split does not move when another class grows.
    """
    num_test = max(min(max(round(count * fraction), 1), count - 1), 0)
    order = np.random.default_rng(seed_for(seed, "split", class_id)).permutation(count)
    mask = np.zeros(count, dtype=bool)
    mask[order[:num_test]] = True
    return mask


def held_out_rows(class_ids: np.ndarray, *, fraction: float, seed: int) -> np.ndarray:
    """`held_out` for every class of a sequence of class ids (N,) at once: bool (N,)."""
    mask = np.zeros(len(class_ids), dtype=bool)
    for class_id in np.unique(class_ids).tolist():
        rows = np.flatnonzero(class_ids == class_id)
        mask[rows] = held_out(len(rows), class_id=class_id, fraction=fraction, seed=seed)
    return mask


def held_out_description(*, fraction: float, seed: int) -> dict[str, Any]:
    """Split description of a source without a test split."""
    return {"kind": "held_out", "test_fraction": fraction, "split_seed": seed}
