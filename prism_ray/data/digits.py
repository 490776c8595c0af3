"""scikit-learn's digits: 1,797 handwritten digits of 8 x 8 pixels, inside the scikit-learn package.

Source: UCI "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, 1998), its test part.
"""

from collections.abc import Iterator
from functools import cached_property, partial
from typing import Any

import numpy as np
from PIL import Image

from prism_ray.config import DatasetConfig
from prism_ray.data.records import RealImage, Split, held_out_description, held_out_rows
from prism_ray.errors import InputError

MAX_VALUE = 16  # pixels count the dark dots of a 4 x 4 block


class Digits:
    """The digits, split by class into training and test images; source order is scikit-learn's."""

    def __init__(self, dataset: DatasetConfig) -> None:
        if dataset.path is not None:
            raise InputError(
                f"dataset.path={dataset.path!r}: digits come with scikit-learn and have no path; set it to null"
            )
        self.class_names = [str(digit) for digit in range(10)]
        self._split = {"fraction": dataset.test_fraction, "seed": dataset.split_seed}

    def check(self) -> None:
        """Nothing to look at: the data are part of a dependency."""

    def fingerprint(self) -> str:
        """The data never change; what is read from them here could."""
        return "sklearn-digits"

    def split_description(self) -> dict[str, Any]:
        return held_out_description(**self._split) | {"test_indices": np.flatnonzero(self._is_test).tolist()}

    def images(self, split: Split) -> Iterator[RealImage]:
        values, class_ids = self._data
        pixels = np.round(values * (255 / MAX_VALUE)).astype(np.uint8)
        for index in np.flatnonzero(self._is_test == (split == "test")).tolist():
            yield RealImage(int(class_ids[index]), f"{index:04d}", partial(Image.fromarray, pixels[index]))

    @cached_property
    def _data(self) -> tuple[np.ndarray, np.ndarray]:
        """Values 0 ... 16 (1797, 8, 8) and class ids (1797,)."""
        # scikit-learn takes a second to import, and looking up a data set that is prepared already must not.
        from sklearn.datasets import load_digits

        bunch: Any = load_digits()
        return bunch.images, bunch.target

    @cached_property
    def _is_test(self) -> np.ndarray:
        return held_out_rows(self._data[1], **self._split)
