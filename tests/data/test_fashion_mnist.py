"""Fashion-MNIST from small IDX files, end to end."""

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prism_ray.config import DatasetConfig
from prism_ray.data import fashion_mnist
from prism_ray.data.prepared import check_dataset, prepare_dataset
from prism_ray.errors import InputError
from prism_ray.options import Source

TRAIN_LABELS = [9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
TEST_LABELS = [3, 1, 4]


def gzipped(data: bytes) -> bytes:
    """The same bytes at any second, so that every process collects the same tests."""
    return gzip.compress(data, mtime=0)


def idx_images(images: np.ndarray) -> bytes:
    return struct.pack(">4I", 0x803, *images.shape) + images.tobytes()


def idx_labels(labels: list[int]) -> bytes:
    return struct.pack(">2I", 0x801, len(labels)) + bytes(labels)


def pixels_of(labels: list[int], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (len(labels), 28, 28), dtype=np.uint8)


def write(folder: Path, name: str, data: bytes) -> None:
    (folder / name).write_bytes(gzip.compress(data, mtime=0))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "idx"
    folder.mkdir()
    for prefix, labels, seed in (("train", TRAIN_LABELS, 0), ("t10k", TEST_LABELS, 1)):
        write(folder, f"{prefix}-images-idx3-ubyte.gz", idx_images(pixels_of(labels, seed)))
        write(folder, f"{prefix}-labels-idx1-ubyte.gz", idx_labels(labels))
    return folder


def config(folder: Path | str | None, **settings: Any) -> DatasetConfig:
    defaults: dict[str, Any] = {"name": "fashion", "source": Source.fashion_mnist, "image_size": 28, "channels": 1}
    return DatasetConfig(**(defaults | settings), path=None if folder is None else str(folder))


def test_the_canonical_split_order_and_names_are_kept(folder: Path, tmp_path: Path) -> None:
    check_dataset(config(folder))
    prepared = prepare_dataset(config(folder), tmp_path)
    assert prepared.class_names[0] == "T-shirt/top"
    assert prepared.class_names[9] == "Ankle boot"
    assert prepared.labels("train").tolist() == TRAIN_LABELS
    assert prepared.labels("test").tolist() == TEST_LABELS
    assert prepared.image_ids("test") == ["00000", "00001", "00002"]
    np.testing.assert_array_equal(prepared.images("train")[:, 0], pixels_of(TRAIN_LABELS, 0))
    np.testing.assert_array_equal(prepared.images("test")[:, 0], pixels_of(TEST_LABELS, 1))


def test_padding_puts_zeros_around(folder: Path, tmp_path: Path) -> None:
    prepared = prepare_dataset(config(folder, image_size=32, pad=2, channels=3), tmp_path)
    expected = np.pad(pixels_of(TEST_LABELS, 1), ((0, 0), (2, 2), (2, 2)))
    np.testing.assert_array_equal(prepared.images("test"), np.repeat(expected[:, None], 3, axis=1))


def test_the_same_files_elsewhere_are_the_same_data_set(folder: Path, tmp_path: Path) -> None:
    first = prepare_dataset(config(folder), tmp_path)
    moved = folder.rename(tmp_path / "moved")
    assert prepare_dataset(config(moved), tmp_path).folder == first.folder


def test_other_pixels_in_files_of_equal_size_are_another_data_set(folder: Path, tmp_path: Path) -> None:
    name = "train-images-idx3-ubyte.gz"
    stored = [gzip.compress(idx_images(pixels_of(TRAIN_LABELS, seed)), compresslevel=0, mtime=0) for seed in (0, 2)]
    assert len(stored[0]) == len(stored[1])
    folders = []
    for data in stored:
        (folder / name).write_bytes(data)
        folders.append(prepare_dataset(config(folder), tmp_path).folder)
    assert folders[0] != folders[1]


def test_missing_files_are_named_with_the_package_and_the_url(folder: Path) -> None:
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(InputError, match=r"lacks t10k-labels-idx1-ubyte\.gz; .*dataset-fashion-mnist.*http://"):
        check_dataset(config(folder))


def test_without_a_path_and_without_the_package_the_way_out_is_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", str(tmp_path / "absent"))
    with pytest.raises(InputError, match=r"install the Debian package dataset-fashion-mnist"):
        check_dataset(config(None))


def test_without_a_path_the_package_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", str(folder))
    assert prepare_dataset(config(None), tmp_path).folder == prepare_dataset(config(folder), tmp_path).folder


IMAGES, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (IMAGES, b"<html>not found</html>", "is no complete gzip file"),
        (IMAGES, gzipped(b"\0" * 100), "starts with 0x00000000; expected the IDX magic 0x00000803"),
        (IMAGES, gzipped(idx_labels(TRAIN_LABELS) + bytes(20)), "starts with 0x00000801"),
        (IMAGES, gzipped(b"\0\0"), "ends before the last"),
        (IMAGES, gzipped(struct.pack(">4I", 0x803, 12, 0, 28)), "says images have 0 x 28 pixels"),
        (IMAGES, gzipped(struct.pack(">4I", 0x803, 12, 2**31, 2)), "says images have"),
        (LABELS, gzipped(struct.pack(">2I", 0x803, 12) + bytes(12)), "starts with 0x00000803"),
        (LABELS, gzipped(idx_labels(TRAIN_LABELS[:-1])), "says 11 labels for 12 images"),
    ],
)
def test_a_damaged_header_is_refused_before_anything_starts(folder: Path, name: str, data: bytes, message: str) -> None:
    (folder / name).write_bytes(data)
    with pytest.raises(InputError) as caught:
        check_dataset(config(folder))
    assert name in str(caught.value)
    assert message in str(caught.value)


COMPLETE = idx_images(pixels_of(TRAIN_LABELS, 0))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (IMAGES, gzipped(COMPLETE)[:-2000], "is no complete gzip file"),
        (IMAGES, gzipped(COMPLETE)[:-8] + b"\1" * 8, "is no complete gzip file"),  # wrong checksum
        (IMAGES, gzipped(COMPLETE[:-1]), "ends before the last"),
        (IMAGES, gzipped(COMPLETE + b"\0"), "goes on after the last"),
        (LABELS, gzipped(idx_labels([10, *TRAIN_LABELS[1:]])), "holds the label 10; expected 0 to 9"),
    ],
)
def test_damage_further_in_is_refused_by_preparing_and_nothing_is_published(
    folder: Path, tmp_path: Path, name: str, data: bytes, message: str
) -> None:
    (folder / name).write_bytes(data)
    with pytest.raises(InputError) as caught:
        prepare_dataset(config(folder), tmp_path / "artifacts")
    assert name in str(caught.value)
    assert message in str(caught.value)
    assert list((tmp_path / "artifacts" / "datasets").iterdir()) == []


def test_a_class_without_a_training_image_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    labels = [1 if label == 8 else label for label in TRAIN_LABELS]
    write(folder, LABELS, idx_labels(labels))
    with pytest.raises(InputError, match=r"1 of 10 classes have no training image: Bag;"):
        prepare_dataset(config(folder), tmp_path)
