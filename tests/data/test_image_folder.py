"""Folders of images on a local disk and in memory, end to end."""

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.registry import known_implementations
from PIL import Image

from prism_ray.config import DatasetConfig
from prism_ray.data.prepared import check_dataset, prepare_dataset
from prism_ray.errors import InputError
from prism_ray.options import Source

COLORS = {"cat": (200, 10, 0), "dog": (0, 20, 220)}


def config(path: Path | str | None, **settings: Any) -> DatasetConfig:
    defaults: dict[str, Any] = {"name": "pets", "source": Source.image_folder, "image_size": 4, "channels": 3}
    return DatasetConfig(**(defaults | settings), path=None if path is None else str(path))


def image_bytes(color: tuple[int, int, int], image_format: str = "PNG", size: tuple[int, int] = (6, 4)) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", size, color).save(sink, format=image_format)
    return sink.getvalue()


def files_of(splits: tuple[str, ...], images_per_class: int = 3) -> dict[str, bytes]:
    return {
        f"{split}{'/' if split else ''}{name}/{k}.png": image_bytes((red, green + k, blue))
        for split in splits
        for name, (red, green, blue) in COLORS.items()
        for k in range(images_per_class)
    }


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "source"


@pytest.fixture
def bucket() -> Iterator[str]:
    fs = fsspec.filesystem("memory")
    for name, data in files_of(("train", "val")).items():
        fs.pipe(f"/bucket/pets/{name}", data)
    yield "memory://bucket/pets"
    fs.rm("/bucket", recursive=True)


def test_train_and_test_folders_are_read_in_name_order(root: Path, tmp_path: Path) -> None:
    write(root, files_of(("train", "test")))
    check_dataset(config(root))
    prepared = prepare_dataset(config(root), tmp_path)
    assert prepared.class_names == ["cat", "dog"]
    assert prepared.counts == {"train": [3, 3], "test": [3, 3]}
    assert prepared.image_ids("train") == ["cat/0.png", "cat/1.png", "cat/2.png", "dog/0.png", "dog/1.png", "dog/2.png"]
    assert prepared.labels("train").tolist() == [0, 0, 0, 1, 1, 1]
    assert prepared.images("train")[:, :, 2, 2].tolist() == [
        [red, green + k, blue] for red, green, blue in COLORS.values() for k in range(3)
    ]
    assert prepared.split == {"kind": "folders", "train": "train", "test": "test"}


def test_any_url_gives_the_same_data_set_as_a_local_folder(bucket: str, root: Path, tmp_path: Path) -> None:
    write(root, files_of(("train", "val")))
    check_dataset(config(bucket))
    local, remote = prepare_dataset(config(root), tmp_path / "a"), prepare_dataset(config(bucket), tmp_path / "b")
    assert remote.content_hash == local.content_hash
    assert remote.folder.name == local.folder.name


def test_without_a_test_folder_a_share_of_every_class_is_held_out(root: Path, tmp_path: Path) -> None:
    write(root, files_of(("",), images_per_class=10))
    prepared = prepare_dataset(config(root, test_fraction=0.3), tmp_path)
    assert prepared.counts == {"train": [7, 7], "test": [3, 3]}
    ids = prepared.image_ids("train") + prepared.image_ids("test")
    assert sorted(ids) == sorted(files_of(("",), images_per_class=10))
    assert prepared.image_ids("train") == sorted(prepared.image_ids("train"))
    assert prepared.split == {"kind": "held_out", "test_fraction": 0.3, "split_seed": 0}


def test_a_train_folder_alone_is_split_too(root: Path, tmp_path: Path) -> None:
    write(root, files_of(("train",)))
    assert prepare_dataset(config(root), tmp_path).counts == {"train": [2, 2], "test": [1, 1]}


def test_an_unlabelled_test_folder_gives_way_to_val(root: Path, tmp_path: Path) -> None:
    write(root, files_of(("train", "val")) | {"test/000.png": image_bytes((0, 0, 0))})
    assert prepare_dataset(config(root), tmp_path).split["test"] == "val"


def test_a_class_may_be_called_train(root: Path, tmp_path: Path) -> None:
    files = {f"{name}/{k}.png": image_bytes((k, k, k)) for name in ("train", "plane") for k in range(2)}
    prepared = prepare_dataset(config(write(root, files)), tmp_path)
    assert prepared.class_names == ["plane", "train"]


def test_suffixes_in_capitals_other_formats_and_hidden_files_are_fine(root: Path, tmp_path: Path) -> None:
    files = files_of(("train", "test"))
    files |= {"train/cat/x.JPEG": image_bytes((9, 9, 9), "JPEG"), "train/cat/y.webp": image_bytes((9, 9, 9), "WEBP")}
    files |= {"train/cat/.DS_Store": b"junk", "train/.cache/z": b"junk", "README.md": b"about"}
    prepared = prepare_dataset(config(write(root, files)), tmp_path)
    assert prepared.counts["train"] == [5, 3]


def test_symbolic_links_to_class_folders_are_followed(root: Path, tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", files_of(("",)))
    root.mkdir()
    for name in COLORS:
        os.symlink(tmp_path / "elsewhere" / name, root / name)
    assert prepare_dataset(config(root), tmp_path).class_names == ["cat", "dog"]


def test_the_centre_of_a_wide_image_is_kept(root: Path, tmp_path: Path) -> None:
    wide = np.random.default_rng(0).integers(0, 256, (4, 10, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(wide).save(sink, format="PNG")
    write(root, files_of(("train", "test")) | {"test/cat/0.png": sink.getvalue()})
    prepared = prepare_dataset(config(root), tmp_path)
    np.testing.assert_array_equal(prepared.images("test", [0])[0], wide[:, 3:7].transpose(2, 0, 1))


def test_changed_files_are_another_data_set(root: Path, tmp_path: Path) -> None:
    write(root, files_of(("train", "test")))
    first = prepare_dataset(config(root), tmp_path)
    write(root, {"train/cat/9.png": image_bytes((1, 2, 3))})
    second = prepare_dataset(config(root), tmp_path)
    assert second.folder != first.folder
    assert second.counts["train"] == [4, 3]


def refused(dataset: DatasetConfig, tmp_path: Path, *, by_check: bool = True) -> str:
    """The message with which checking and preparing both refuse; nothing may be left behind."""
    messages = []
    for action in (check_dataset, lambda d: prepare_dataset(d, tmp_path / "artifacts")):
        if action is check_dataset and not by_check:
            action(dataset)
            continue
        with pytest.raises(InputError) as caught:
            action(dataset)
        messages.append(str(caught.value))
    assert len(set(messages)) == 1
    assert "\n" not in messages[0]
    datasets_dir = tmp_path / "artifacts" / "datasets"
    assert not datasets_dir.exists() or not list(datasets_dir.iterdir())
    return messages[0]


def test_a_missing_folder_is_refused(root: Path, tmp_path: Path) -> None:
    assert f"{str(root)!r} does not exist; check dataset.path" in refused(config(root), tmp_path)


def test_a_missing_path_is_refused(tmp_path: Path) -> None:
    assert "dataset.path=None: empty; source 'image_folder' needs one" in refused(config(None), tmp_path)


def test_a_file_in_place_of_a_folder_is_refused(root: Path, tmp_path: Path) -> None:
    root.write_bytes(b"")
    assert "is a file; expected a folder" in refused(config(root), tmp_path)


@pytest.mark.parametrize("names", [(), ("train",), ("test", "val")])
def test_a_folder_without_class_folders_is_refused(root: Path, tmp_path: Path, names: tuple[str, ...]) -> None:
    root.mkdir()
    for name in names:
        (root / name).mkdir()
    assert "no class folders; expected train/<class>/ or <class>/" in refused(config(root), tmp_path)


def test_a_class_folder_without_images_is_refused_by_name(root: Path, tmp_path: Path) -> None:
    write(root, files_of(("train", "test")))
    (root / "train" / "eel").mkdir()
    assert "class folder train/eel has no images" in refused(config(root), tmp_path)


def test_a_file_that_is_no_image_is_refused_by_name(root: Path, tmp_path: Path) -> None:
    write(root, files_of(("train", "test")) | {"train/dog/notes.txt": b"hello"})
    assert "train/dog/notes.txt is no image file; expected only .png" in refused(config(root), tmp_path)


def test_a_folder_inside_a_class_folder_is_refused_by_name(root: Path, tmp_path: Path) -> None:
    write(root, files_of(("train", "test")) | {"train/dog/puppies/1.png": image_bytes((0, 0, 0))})
    assert "train/dog/puppies is a folder" in refused(config(root), tmp_path)


def test_a_false_image_among_the_first_is_refused_by_name_before_anything_starts(root: Path, tmp_path: Path) -> None:
    write(root, files_of(("train", "test")) | {"test/dog/1.png": b"<html>"})
    assert "image 'test/dog/1.png' cannot be decoded" in refused(config(root), tmp_path)


def test_a_damaged_image_further_in_is_refused_by_preparing_never_skipped(root: Path, tmp_path: Path) -> None:
    write(root, files_of(("train", "test"), images_per_class=40) | {"train/dog/7.png": image_bytes((1, 1, 1))[:40]})
    message = refused(config(root), tmp_path, by_check=False)
    assert "image 'train/dog/7.png' cannot be decoded" in message


def test_a_link_to_nowhere_is_refused_by_name(root: Path, tmp_path: Path) -> None:
    write(root, files_of(("train", "test")))
    os.symlink(tmp_path / "nowhere.png", root / "train" / "cat" / "00.png")
    assert "train/cat/00.png is a broken link" in refused(config(root), tmp_path)


def test_one_class_is_refused(root: Path, tmp_path: Path) -> None:
    write(root, {"train/cat/0.png": image_bytes((0, 0, 0))})
    assert "has the classes ['cat']; expected at least 2" in refused(config(root), tmp_path)


def test_a_test_class_without_training_images_is_refused_by_name(root: Path, tmp_path: Path) -> None:
    write(root, files_of(("train", "test")) | {"test/eel/0.png": image_bytes((0, 0, 0))})
    assert "test/eel is a class without a folder in train/" in refused(config(root), tmp_path)


def test_an_unknown_url_scheme_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    message = refused(config("s4://bucket/pets"), tmp_path)
    assert "Protocol not known: s4" in message
    assert "file, " in message
    assert "s3, " in message


def test_a_url_scheme_without_its_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"class": "package_that_is_not_installed.FileSystem", "err": "Install somefs to access it"}
    monkeypatch.setitem(known_implementations, "somefs", known)
    assert "not installed (Install somefs to access it); install it" in refused(config("somefs://b/pets"), tmp_path)


def test_a_check_looks_at_a_bounded_sample(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first three images of a class are opened, and none once the time is over."""
    write(root, files_of(("train",), images_per_class=10) | {"train/cat/3.png": b"damaged"})
    check_dataset(config(root))
    write(root, {"train/cat/2.png": b"damaged"})
    with pytest.raises(InputError, match=r"train/cat/2\.png"):
        check_dataset(config(root))
    monkeypatch.setattr("prism_ray.data.image_folder.CHECK_S", 0.0)
    check_dataset(config(root))
