"""Folders of image files, one per class, on any fsspec URL.

<path>/train/<class>/*  and  <path>/test|val|validation/<class>/*      a test split of its own, or
<path>/<class>/*                                                       one held out by `test_fraction`
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import zip_longest
from typing import Any

from prism_ray.config import DatasetConfig
from prism_ray.data.files import Entry, files_fingerprint, list_folder, open_location, read_file
from prism_ray.data.pixels import MAX_BYTES, decode, too_many_bytes
from prism_ray.data.records import RealImage, Split, held_out, held_out_description
from prism_ray.errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
TEST_FOLDERS = ("test", "val", "validation")
SAMPLE = 3  # images of each class that a check decodes
CHECK_S = 1.0  # after which a check of a large or slow folder is content with what it has seen


class ImageFolder:
    """Classes sorted by name, the images of a class by file name; hidden files and folders do not count."""

    def __init__(self, dataset: DatasetConfig) -> None:
        self._fs, self._root = open_location(dataset.path, source="image_folder")
        self._path = str(dataset.path)
        self._split = {"fraction": dataset.test_fraction, "seed": dataset.split_seed}
        self._test_classes: set[str] = set()
        self._folders, self.class_names = self._find_classes()
        self._listed: dict[str, list[Entry]] = {}

    def check(self) -> None:
        deadline = time.monotonic() + CHECK_S
        classes: list[list[tuple[str, Entry]]] = []
        for folder, class_name in self._class_folders():
            files = self._files(folder, class_name)
            classes.append([(self._shown(folder, class_name, file), file) for file in files[:SAMPLE]])
            if time.monotonic() > deadline:
                break
        # The first image of every class, then the second of every class: time runs out evenly.
        for rank in zip_longest(*classes):
            for shown, file in filter(None, rank):
                self._load(shown, file)()
                if time.monotonic() > deadline:
                    return

    def fingerprint(self) -> str:
        return files_fingerprint(
            (self._shown(folder, class_name, file), file)
            for folder, class_name in self._class_folders()
            for file in self._files(folder, class_name)
        )

    def split_description(self) -> dict[str, Any]:
        if "test" not in self._folders:
            return held_out_description(**self._split)
        return {"kind": "folders"} | {split: folder.rsplit("/", 1)[-1] for split, folder in self._folders.items()}

    def images(self, split: Split) -> Iterator[RealImage]:
        folder = self._folders.get(split, self._folders["train"])
        for class_id, class_name in enumerate(self.class_names):
            files = self._files(folder, class_name)
            if "test" not in self._folders:
                is_test = held_out(len(files), class_id=class_id, **self._split)
                files = [file for file, test in zip(files, is_test, strict=True) if test == (split == "test")]
            for file in files:
                load = self._load(self._shown(folder, class_name, file), file)
                yield RealImage(class_id, f"{class_name}/{file.name}", load)

    def _find_classes(self) -> tuple[dict[Split, str], list[str]]:
        """Folder of each split (none for a test split to be held out) and the class names."""
        top = {entry.name: entry.path for entry in self._subfolders(self._root, self._path)}
        # A class may be called "train": then it holds images, not class folders.
        train = [entry.name for entry in self._subfolders(top["train"], "train")] if "train" in top else []
        if not train:
            if not top or set(top) <= {"train", *TEST_FOLDERS}:
                raise InputError(
                    f"dataset.path={self._path!r}: no class folders; expected train/<class>/ or <class>/ with "
                    "images inside; check the path"
                )
            return {"train": self._root}, list(top)
        folders: dict[Split, str] = {"train": top["train"]}
        for name in TEST_FOLDERS:
            classes = {entry.name for entry in self._subfolders(top[name], name)} if name in top else set()
            # ImageNet's test/ has no class folders, because its labels are not public; its val/ has.
            if not classes:
                continue
            unknown = sorted(classes - set(train))
            if unknown:
                raise InputError(
                    f"dataset.path={self._path!r}: {name}/{unknown[0]} is a class without a folder in train/; add "
                    f"train/{unknown[0]} or remove it"
                )
            self._test_classes = classes
            folders["test"] = top[name]
            break
        return folders, train

    def _class_folders(self) -> Iterator[tuple[str, str]]:
        """(split folder, class name) of every class folder there is."""
        for folder in self._folders.values():
            yield from ((folder, class_name) for class_name in self.class_names)

    def _subfolders(self, folder: str, shown: str) -> list[Entry]:
        return [entry for entry in list_folder(self._fs, folder, shown=shown) if entry.is_dir]

    def _files(self, folder: str, class_name: str) -> list[Entry]:
        """The image files of a class folder, listed once; empty for a class the test split lacks."""
        key = f"{folder}/{class_name}"
        if key not in self._listed:
            self._listed[key] = self._list_images(folder, class_name)
        return self._listed[key]

    def _list_images(self, folder: str, class_name: str) -> list[Entry]:
        is_test = folder == self._folders.get("test")
        if is_test and class_name not in self._test_classes:
            return []
        shown = self._shown(folder, class_name)
        files = list_folder(self._fs, f"{folder}/{class_name}", shown=shown)
        for file in files:
            is_image = file.name.lower().endswith(SUFFIXES)
            if not file.is_file or not is_image:
                kind = (
                    "a folder" if file.is_dir else "a broken link, a pipe or a device" if is_image else "no image file"
                )
                raise InputError(
                    f"dataset.path={self._path!r}: {shown}/{file.name} is {kind}; expected only {', '.join(SUFFIXES)} "
                    "files in a class folder; remove or convert it"
                )
        if not files and not is_test:
            raise InputError(
                f"dataset.path={self._path!r}: class folder {shown} has no images; expected at least one "
                f"{', '.join(SUFFIXES)} file; add images or remove the folder"
            )
        return files

    def _shown(self, folder: str, class_name: str, file: Entry | None = None) -> str:
        """Name relative to the data set, for messages and the fingerprint: the same wherever it lies."""
        parts = [class_name] if folder == self._root else [folder.rsplit("/", 1)[-1], class_name]
        return "/".join([*parts, file.name] if file else parts)

    def _load(self, shown: str, file: Entry) -> Callable[[], Any]:
        return partial(_read_image, self._fs, file, shown)


def _read_image(fs: Any, file: Entry, shown: str) -> Any:
    if file.size_bytes > MAX_BYTES:
        raise too_many_bytes(shown, file.size_bytes)
    return decode(read_file(fs, file.path, shown=shown), shown)
