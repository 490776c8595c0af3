"""Test sets of other domains: MNIST for digits, and folders that hold some of a data set's classes."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prism_ray.config import DatasetConfig
from prism_ray.data.imagenet_names import class_names, synsets
from prism_ray.data.shifted import check_shifted, class_ids_in, prepare_shifted
from prism_ray.errors import InputError
from prism_ray.options import Source

DIGITS = DatasetConfig(name="digits", source=Source.digits, image_size=16, channels=1)
NAMES = [str(digit) for digit in range(10)]


def test_mnist_is_a_shifted_set_of_digits_in_their_pixels(tmp_path: Path) -> None:
    shifted = prepare_shifted(DIGITS, "mnist", "mnist", tmp_path)
    assert shifted.class_names == NAMES
    assert shifted.num_images("train") + shifted.num_images("test") == 5000
    assert shifted.images("test", [0]).shape == (1, 1, 16, 16)
    assert np.all(np.array(shifted.counts["train"]) + np.array(shifted.counts["test"]) == 500)


def test_a_folder_may_hold_some_of_the_classes(tmp_path: Path) -> None:
    for name in ("3", "7"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for n in range(3):
            Image.new("L", (20, 20), n).save(tmp_path / "set" / name / f"{n}.png")
    shifted = prepare_shifted(DIGITS, "mine", str(tmp_path / "set"), tmp_path / "artifacts")
    assert class_ids_in(NAMES, shifted.class_names, name="mine") == [3, 7]


def test_a_class_of_another_data_set_is_refused_by_name(tmp_path: Path) -> None:
    for name in ("3", "dog"):
        (tmp_path / name).mkdir()
        Image.new("L", (20, 20)).save(tmp_path / name / "0.png")
        Image.new("L", (20, 20)).save(tmp_path / name / "1.png")
    with pytest.raises(InputError, match=r"evaluate\.shifted_sets\.mine: its class 'dog' is none"):
        check_shifted(DIGITS, NAMES, "mine", str(tmp_path))


def test_imagenets_subsets_are_found_by_wordnet_id() -> None:
    assert class_ids_in(class_names(), synsets()[5:8], name="r") == [5, 6, 7]
