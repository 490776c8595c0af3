"""The prepared folder: what it holds, how it is read, how it comes to be."""

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from prism_ray import schema
from prism_ray.config import DatasetConfig
from prism_ray.data import prepared as prepared_module
from prism_ray.data import shards
from prism_ray.data.prepared import PreparedDataset, class_names_hash, prepare_dataset
from prism_ray.data.records import RealImage, Split
from prism_ray.errors import InputError, PrismError, StorageError
from prism_ray.options import Source

NUM_IMAGES = {"train": 30, "test": 6}


def pixel_values(split: str, class_id: int, k: int) -> np.ndarray:
    seed = [len(split), class_id, k]
    return np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of random images that need no crop and no resize."""
    root = tmp_path_factory.mktemp("source")
    for split, count in NUM_IMAGES.items():
        for class_id, name in enumerate(("ant", "bee", "cow")):
            (root / split / name).mkdir(parents=True)
            for k in range(count):
                Image.fromarray(pixel_values(split, class_id, k)).save(root / split / name / f"{k:02d}.png")
    return root


@pytest.fixture
def config(source: Path) -> DatasetConfig:
    return DatasetConfig(name="animals", source=Source.image_folder, path=str(source), image_size=5, channels=3)


@pytest.fixture
def prepared(config: DatasetConfig, tmp_path: Path) -> PreparedDataset:
    return prepare_dataset(config, tmp_path)


@pytest.fixture
def many_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MAX_ROWS", 7)


def sha256s(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_preparing_twice_gives_the_same_bytes(config: DatasetConfig, tmp_path: Path) -> None:
    first, second = (prepare_dataset(config, tmp_path / name) for name in "ab")
    assert first.folder.name == second.folder.name
    assert sha256s(first.folder) == sha256s(second.folder)
    assert first.content_hash == second.content_hash


@pytest.mark.usefixtures("many_files")
def test_the_number_of_threads_and_their_speed_change_nothing(
    config: DatasetConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "BATCH", 2)
    monkeypatch.setattr(shards, "MAX_THREADS", 1)
    alone = prepare_dataset(config, tmp_path / "alone")
    monkeypatch.setattr(shards, "MAX_THREADS", 4)
    encode_png = shards.encode_png

    def encode_slowly(pixels: np.ndarray) -> bytes:
        time.sleep(int(pixels[0, 0, 0]) % 4 / 1000)
        return encode_png(pixels)

    monkeypatch.setattr(shards, "encode_png", encode_slowly)
    together = prepare_dataset(config, tmp_path / "together")
    assert sha256s(alone.folder) == sha256s(together.folder)


def test_dataset_json_describes_the_files(prepared: PreparedDataset) -> None:
    summary = json.loads((prepared.folder / "dataset.json").read_text())
    assert summary["version"] == schema.VERSION
    assert summary["name"] == "animals"
    assert summary["class_names"] == ["ant", "bee", "cow"]
    assert summary["counts"] == {split: [count] * 3 for split, count in NUM_IMAGES.items()}
    files = sha256s(prepared.folder)
    files.pop("dataset.json")
    assert {file["name"]: file["sha256"] for file in summary["files"]} == files
    assert [file["rows"] for file in summary["files"]] == [90, 18]
    assert str(prepared.folder.parent.parent) not in json.dumps(summary)


def test_mean_and_std_are_those_of_the_training_pixels(prepared: PreparedDataset) -> None:
    pixels = prepared.images("train").astype(np.float64) / 255
    np.testing.assert_allclose(prepared.mean, pixels.mean(axis=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(prepared.std, pixels.std(axis=(0, 2, 3)), rtol=1e-12)


def test_a_constant_channel_has_the_std_of_one_gray_level(tmp_path: Path) -> None:
    for name, value in (("a", 10), ("b", 20)):
        (tmp_path / "s" / name).mkdir(parents=True)
        for k in range(2):
            Image.new("RGB", (5, 5), (value, 0, 255)).save(tmp_path / "s" / name / f"{k}.png")
    config = DatasetConfig(name="c", source=Source.image_folder, path=str(tmp_path / "s"), image_size=5, channels=3)
    prepared = prepare_dataset(config, tmp_path)
    np.testing.assert_allclose(prepared.mean, [15 / 255, 0, 1])
    np.testing.assert_allclose(prepared.std, [5 / 255, 1 / 255, 1 / 255])


@pytest.mark.usefixtures("many_files")
def test_datasets_shows_pictures_and_class_names_without_code(prepared: PreparedDataset, tmp_path: Path) -> None:
    data_files = {split: prepared.addresses(split) for split in ("train", "test")}
    loaded = datasets.load_dataset("parquet", data_files=data_files, cache_dir=str(tmp_path / "cache"))
    for split, count in NUM_IMAGES.items():
        rows = loaded[split]
        assert len(rows) == 3 * count
        assert rows.features["label"].names == ["ant", "bee", "cow"]
        row = rows[count + 1]
        assert isinstance(row["image"], Image.Image)
        assert rows.features["label"].int2str(row["label"]) == "bee"
        assert row["image_id"] == "bee/01.png"
        np.testing.assert_array_equal(np.asarray(row["image"]), pixel_values(split, 1, 1))


def test_tables_have_the_columns_of_the_schema_and_png_bytes(prepared: PreparedDataset) -> None:
    for split in ("train", "test"):
        for path in prepared.addresses(split):
            table = pq.read_table(path)
            assert table.schema.equals(
                schema.image_schema(schema.REAL_COLUMNS, prepared.class_names), check_metadata=True
            )
            assert all(cell["bytes"].startswith(b"\x89PNG") for cell in table.column("image").to_pylist())


@pytest.mark.usefixtures("many_files")
def test_files_are_cut_by_rows(prepared: PreparedDataset) -> None:
    assert [pq.read_metadata(path).num_rows for path in prepared.addresses("test")] == [7, 7, 4]
    assert [Path(path).name for path in prepared.addresses("test")] == [f"test-{k:05d}.parquet" for k in range(3)]
    assert len(prepared.addresses("train")) == 13


def test_files_are_cut_by_bytes(config: DatasetConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MAX_BYTES", 1000)
    prepared = prepare_dataset(config, tmp_path)
    assert len(prepared.addresses("train")) > 3
    assert prepared.labels("train").tolist() == [0] * 30 + [1] * 30 + [2] * 30


@pytest.mark.usefixtures("many_files")
def test_rows_by_class_lists_each_class_in_source_order(prepared: PreparedDataset) -> None:
    rows = prepared.rows_by_class("train")
    ids = prepared.image_ids("train")
    for name, class_rows in zip(prepared.class_names, rows, strict=True):
        assert class_rows.dtype == np.int64
        assert [ids[row] for row in class_rows] == [f"{name}/{k:02d}.png" for k in range(30)]


def test_rows_by_class_has_an_entry_for_a_class_without_test_images(tmp_path: Path) -> None:
    for split, names in (("train", "abc"), ("test", "a")):
        for name in names:
            (tmp_path / "s" / split / name).mkdir(parents=True)
            Image.new("L", (5, 5), ord(name)).save(tmp_path / "s" / split / name / "0.png")
    config = DatasetConfig(name="x", source=Source.image_folder, path=str(tmp_path / "s"), image_size=5, channels=1)
    assert [rows.tolist() for rows in prepare_dataset(config, tmp_path).rows_by_class("test")] == [[0], [], []]


@pytest.mark.usefixtures("many_files")
def test_images_come_in_the_order_asked_for_with_repeats(prepared: PreparedDataset) -> None:
    everything = prepared.images("train")
    assert everything.shape == (90, 3, 5, 5)
    assert everything.dtype == np.uint8
    np.testing.assert_array_equal(everything[31], pixel_values("train", 1, 1).transpose(2, 0, 1))
    for indices in ([], [89], [31, 0, 89, 31, 7, 6], np.array([50, 2])):
        np.testing.assert_array_equal(prepared.images("train", indices), everything[np.asarray(indices, dtype=int)])


def test_only_the_row_groups_that_hold_a_wanted_image_are_read(
    prepared: PreparedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(prepared.addresses("train")[0])
    small_groups = io.BytesIO()
    pq.write_table(pq.read_table(path), small_groups, row_group_size=10)
    path.write_bytes(small_groups.getvalue())
    read = []
    read_row_group = pq.ParquetFile.read_row_group

    def recorded(file: pq.ParquetFile, group: int, **options: Any) -> object:
        read.append((group, options["columns"]))
        return read_row_group(file, group, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", recorded)
    images = prepared.images("train", [79, 31, 39])
    np.testing.assert_array_equal(images[1], pixel_values("train", 1, 1).transpose(2, 0, 1))
    assert read == [(3, ["image.bytes"]), (7, ["image.bytes"])]


@pytest.mark.parametrize("index", [-1, 90])
def test_an_index_outside_the_split_is_refused(prepared: PreparedDataset, index: int) -> None:
    with pytest.raises(IndexError, match=r"expected 0 \.\.\. 89"):
        prepared.images("train", [0, index])


def test_a_prepared_data_set_is_found_again_at_once(config: DatasetConfig, prepared: PreparedDataset) -> None:
    before = {path: path.stat().st_mtime_ns for path in prepared.folder.iterdir()}
    start = time.perf_counter()
    again = prepare_dataset(config, prepared.folder.parent.parent)
    wall_s = time.perf_counter() - start
    assert again == prepared
    assert {path: path.stat().st_mtime_ns for path in again.folder.iterdir()} == before
    assert wall_s < 0.05


def test_settings_that_change_the_pixels_change_the_folder_and_others_do_not(
    config: DatasetConfig, prepared: PreparedDataset, source: Path, tmp_path: Path
) -> None:
    artifacts_dir = prepared.folder.parent.parent
    same = replace(config, path=f"file://{source}/")
    assert prepare_dataset(same, artifacts_dir).folder == prepared.folder
    folders = {prepared.folder}
    changes: list[dict[str, Any]] = [{"image_size": 6}, {"channels": 1}, {"pad": 1}, {"name": "beasts"}]
    for change in changes:
        other = prepare_dataset(replace(config, **change), artifacts_dir)
        folders.add(other.folder)
        assert (other.content_hash == prepared.content_hash) == (change == {"name": "beasts"})
    assert len(folders) == 5


def test_the_content_hash_covers_class_names_and_their_order(prepared: PreparedDataset) -> None:
    renamed = replace(prepared, class_names=["bee", "ant", "cow"])
    assert renamed.content_hash != prepared.content_hash
    assert renamed.class_names_hash != prepared.class_names_hash
    assert prepared.class_names_hash == class_names_hash(("ant", "bee", "cow"))


def test_verify_names_the_damaged_files(prepared: PreparedDataset) -> None:
    assert prepared.verify() == []
    path = Path(prepared.addresses("test")[0])
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert PreparedDataset.open(prepared.folder).verify() == ["test-00000.parquet"]
    path.unlink()
    assert prepared.verify() == ["test-00000.parquet"]


def test_opening_refuses_what_is_incomplete_or_newer(prepared: PreparedDataset) -> None:
    summary_path = prepared.folder / "dataset.json"
    text = summary_path.read_text()
    summary_path.write_text(json.dumps(json.loads(text) | {"version": schema.VERSION + 1}))
    with pytest.raises(PrismError, match="is newer than"):
        PreparedDataset.open(prepared.folder)
    summary_path.write_text(text[: len(text) // 2])
    with pytest.raises(PrismError, match=r"not a prepared data set .*; delete the folder and prepare again"):
        PreparedDataset.open(prepared.folder)
    summary_path.write_text(text)
    Path(prepared.addresses("train")[0]).write_bytes(b"short")
    with pytest.raises(PrismError, match=r"train-00000\.parquet is missing or has the wrong size"):
        PreparedDataset.open(prepared.folder)
    with pytest.raises(PrismError, match="not a prepared data set"):
        PreparedDataset.open(prepared.folder / "absent")


def test_two_preparers_at_once_do_no_harm(
    config: DatasetConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have built everything before either publishes."""
    barrier = threading.Barrier(2, timeout=20)
    write_split = prepared_module.write_split

    def write_and_wait(*args: Any, split: Split, **options: Any) -> object:
        summary = write_split(*args, split=split, **options)
        if split == "test":
            barrier.wait()
        return summary

    monkeypatch.setattr(prepared_module, "write_split", write_and_wait)
    results: list[PreparedDataset] = []
    threads = [threading.Thread(target=lambda: results.append(prepare_dataset(config, tmp_path))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    assert results[0] == results[1]
    assert list((tmp_path / "datasets").iterdir()) == [results[0].folder]
    assert results[0].verify() == []


def test_a_failed_preparation_leaves_nothing_and_the_next_one_works(
    config: DatasetConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(prepared_module, "write_durably", full_disk)
        with pytest.raises(StorageError, match="no space left"):
            prepare_dataset(config, tmp_path)
    assert list((tmp_path / "datasets").iterdir()) == []
    assert prepare_dataset(config, tmp_path).verify() == []


def test_a_folder_without_dataset_json_is_replaced(config: DatasetConfig, prepared: PreparedDataset) -> None:
    (prepared.folder / "dataset.json").unlink()
    (prepared.folder / "stray").write_text("x")
    again = prepare_dataset(config, prepared.folder.parent.parent)
    assert again.verify() == []
    assert not (again.folder / "stray").exists()
    assert list(again.folder.parent.iterdir()) == [again.folder]


def test_a_killed_preparer_publishes_nothing_and_is_cleaned_up_after(
    config: DatasetConfig, source: Path, tmp_path: Path
) -> None:
    code = f"""
import os, signal
from pathlib import Path
from prism_ray.config import DatasetConfig, Source
from prism_ray.data import prepared
prepared._json_lines = lambda summary: os.kill(os.getpid(), signal.SIGKILL)
config = DatasetConfig(name="animals", source=Source.image_folder, path={str(source)!r}, image_size=5, channels=3)
prepared.prepare_dataset(config, Path({str(tmp_path)!r}))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    (left_behind,) = (tmp_path / "datasets").iterdir()
    assert left_behind.name.startswith(".animals-")
    finished = prepare_dataset(config, tmp_path)
    assert set((tmp_path / "datasets").iterdir()) == {finished.folder, left_behind}  # it might still be alive
    hours_ago = time.time() - 7200
    os.utime(left_behind, (hours_ago, hours_ago))
    (finished.folder / "dataset.json").unlink()
    assert list(prepare_dataset(config, tmp_path).folder.parent.iterdir()) == [finished.folder]


def test_the_first_error_in_source_order_is_the_one_reported(
    config: DatasetConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damaged image late in the set is found first by a fast thread, and must not hide the earlier one."""
    monkeypatch.setattr(shards, "BATCH", 1)
    fit = prepared_module.fit
    first, late = pixel_values("train", 0, 4), pixel_values("train", 0, 6)

    def fit_and_fail(image: Image.Image, **options: int) -> np.ndarray:
        pixels = fit(image, **options)
        if np.array_equal(pixels, first):
            time.sleep(0.1)
            raise InputError("the first")
        if np.array_equal(pixels, late):
            raise InputError("the late")
        return pixels

    monkeypatch.setattr(prepared_module, "fit", fit_and_fail)
    with pytest.raises(InputError, match="the first"):
        prepare_dataset(config, tmp_path)


def test_images_are_not_read_far_ahead_of_the_files_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What bounds the memory: at most a window of images beyond the file being filled."""
    monkeypatch.setattr(shards, "MAX_ROWS", 100)
    taken = 0
    taken_at_write: list[int] = []

    def images() -> Iterator[RealImage]:
        nonlocal taken
        for taken in range(1, 2001):
            yield RealImage(0, str(taken), lambda: Image.new("L", (2, 2)))

    def record(path: Path, data: bytes) -> None:
        taken_at_write.append(taken)

    monkeypatch.setattr(shards, "write_durably", record)
    summary = shards.write_split(
        images(),
        tmp_path,
        split="train",
        class_names=["a"],
        channels=1,
        to_pixels=lambda image: np.asarray(image.load()),
    )
    window = 2 * shards.MAX_THREADS * shards.BATCH
    assert summary.counts.tolist() == [2000]
    assert len(taken_at_write) == 20
    assert all(ahead <= 100 * (k + 1) + window for k, ahead in enumerate(taken_at_write))
