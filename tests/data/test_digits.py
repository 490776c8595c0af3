"""The digits, end to end."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from prism_ray.config import DatasetConfig
from prism_ray.data.prepared import PreparedDataset, check_dataset, prepare_dataset
from prism_ray.errors import InputError
from prism_ray.options import Source


def digits(**settings: Any) -> DatasetConfig:
    defaults: dict[str, Any] = {"name": "digits", "source": Source.digits, "image_size": 8, "channels": 1}
    return DatasetConfig(**(defaults | settings))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    return prepare_dataset(digits(), tmp_path_factory.mktemp("artifacts"))


def test_every_digit_is_in_exactly_one_split_with_its_label_and_pixels(prepared: PreparedDataset) -> None:
    bunch: Any = load_digits()
    seen = []
    for split in ("train", "test"):
        indices = [int(image_id) for image_id in prepared.image_ids(split)]
        np.testing.assert_array_equal(prepared.labels(split), bunch.target[indices])
        expected = np.round(bunch.images[indices] * 255 / 16).astype(np.uint8)
        np.testing.assert_array_equal(prepared.images(split)[:, 0], expected)
        seen += indices
    assert sorted(seen) == list(range(1797))


def test_the_split_is_stratified_and_written_down(prepared: PreparedDataset) -> None:
    bunch: Any = load_digits()
    totals = np.bincount(bunch.target)
    assert prepared.counts["test"] == [round(0.2 * total) for total in totals]
    assert prepared.split["test_indices"] == [int(image_id) for image_id in prepared.image_ids("test")]
    assert (prepared.split["test_fraction"], prepared.split["split_seed"]) == (0.2, 0)


def test_another_split_seed_holds_out_other_digits(prepared: PreparedDataset, tmp_path: Path) -> None:
    other = prepare_dataset(digits(split_seed=1), tmp_path)
    assert other.counts == prepared.counts
    assert other.split["test_indices"] != prepared.split["test_indices"]


def test_digits_are_resized_by_pil_bilinear(prepared: PreparedDataset, tmp_path: Path) -> None:
    large = prepare_dataset(digits(image_size=16, channels=3), tmp_path).images("train", [5])[0]
    small = Image.fromarray(prepared.images("train", [5])[0, 0])
    expected = np.asarray(small.convert("RGB").resize((16, 16), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(large, expected.transpose(2, 0, 1))


def test_a_path_is_refused() -> None:
    with pytest.raises(InputError, match=r"dataset\.path='/data': .*set it to null"):
        check_dataset(digits(path="/data"))


def test_looking_up_a_prepared_data_set_imports_neither_torch_nor_sklearn(prepared: PreparedDataset) -> None:
    artifacts_dir = prepared.folder.parent.parent
    code = f"""
import sys
from pathlib import Path
from prism_ray.config import DatasetConfig, Source
from prism_ray.data.prepared import prepare_dataset
config = DatasetConfig(name="digits", source=Source.digits, image_size=8, channels=1)
prepare_dataset(config, Path({str(artifacts_dir)!r}))
print([name for name in ("torch", "sklearn") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
