"""ImageNet-1K without its images: the names of its 1000 classes in their usual order, from timm's own files.

Teachers made elsewhere and noise to start from are all that synthesis needs; what compares with real images is left
out.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from prism_ray.config import DatasetConfig
from prism_ray.data.records import RealImage, Split
from prism_ray.errors import InputError
from prism_ray.identity import content_hash
from prism_ray.weights import timm_folder

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
"""Of ImageNet's training pixels per channel, in [0, 1], as torchvision states them."""


class ImagenetNames:
    """Class names, and no image in either split."""

    def __init__(self, dataset: DatasetConfig) -> None:
        if dataset.path is not None:
            raise InputError(
                f"dataset.path={dataset.path!r}: class names come with timm and have no path; set it to null, or use "
                "dataset=image_folder for images"
            )
        if dataset.channels != 3:
            raise InputError(f"dataset.channels={dataset.channels}: ImageNet is in colour; set it to 3")
        self.class_names = class_names()

    def check(self) -> None:
        """Nothing to look at: the names are part of a dependency."""

    def fingerprint(self) -> str:
        """Changes when the names do."""
        return f"imagenet-names-{content_hash(self.class_names)}"

    def split_description(self) -> dict[str, Any]:
        return {"kind": "names_only"}

    def images(self, split: Split) -> Iterator[RealImage]:
        """None."""
        return iter(())


def synsets() -> list[str]:
    """WordNet ids of the 1000 classes (n01440764, …): the folder names of the original data set, in sorted order."""
    return _read("imagenet_synsets.txt").splitlines()


@cache
def _names() -> tuple[str, ...]:
    lemmas = dict(line.split("\t", 1) for line in _read("imagenet_synset_to_lemma.txt").splitlines())
    ids = synsets()
    names = [lemmas[synset].split(",")[0] for synset in ids]
    counts = Counter(names)
    return tuple(f"{name} ({s})" if counts[name] > 1 else name for name, s in zip(names, ids, strict=True))


def class_names() -> list[str]:
    """The first of each class's WordNet names ("golden retriever"); with the id behind it where two classes share it.

    Deviation from timm's descriptions, which hold all synonyms and repeat "crane".
    """
    return list(_names())


def class_names_like(names: Sequence[str]) -> list[str]:
    """Names of the 1000 classes as a data set calls them: WordNet ids if those are its own, else the readable ones."""
    return synsets() if list(names) == synsets() else class_names()


@cache
def _read(name: str) -> str:
    """A text file of timm, found without importing it."""
    return (timm_folder() / "data/_info" / name).read_text(encoding="utf-8")
