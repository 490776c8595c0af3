"""The verb `init`: a recipe for a folder of images of one's own, chosen by what is in it, for two CPU cores."""

import json
import os
import re
import time
from collections.abc import Collection
from dataclasses import dataclass
from itertools import groupby, zip_longest
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image

from prism_ray.config import Config, DatasetConfig
from prism_ray.data.image_folder import ImageFolder
from prism_ray.data.records import RealImage, Split
from prism_ray.data.sources import open_source
from prism_ray.documents import is_plain
from prism_ray.errors import InputError
from prism_ray.options import Source

LOOK_S = 3.0
MOST_LOOKED_AT = 300
"""Images that are decoded, and the time after which fewer are enough; every file is counted."""

MOST_SIDE = 32
"""Pixels: at 64 all that follows takes four times as long."""
MOST_IMAGES = 500
"""Synthetic images that are aimed at; never fewer than one of each class."""
MOST_OF_CLASS = 10
TEACHER_STEPS = 1500
"""Steps of a teacher's training that are aimed at."""
LEAST_EPOCHS, MOST_EPOCHS = 3, 100
STUDENT_STEPS = 400
KEYS = (
    *("dataset.path", "dataset.name", "dataset.image_size", "dataset.channels", "dataset.test_fraction"),
    *("dataset.split_seed", "dataset.licence", "images_per_class", "out", "storage"),
)
"""Settings that `init` takes; the first is needed."""


@dataclass(frozen=True)
class Looked:
    """What is in a folder of images."""

    class_names: list[str]
    num_train: list[int]  # images of each class
    num_test: list[int]
    is_held_out: bool  # the test images are a part of the folder's only ones
    side: int  # median of the shorter sides, pixels
    is_gray: bool  # every image that was looked at

    @property
    def smallest(self) -> int:
        """Class with the fewest training images."""
        return int(np.argmin(self.num_train))


@dataclass(frozen=True)
class FirstRecipe:
    """A recipe, where it belongs and what to say about it."""

    path: str
    text: str
    summary: str


def first_recipe(config: Config, *, given: Collection[str]) -> FirstRecipe:
    """Look at the folder of `dataset.path` and choose the settings that are not `given`.

    Raises:
        InputError: no folder, no class folders, files that are no images, or a class too small to learn from.
    """
    path = _absolute(config.dataset.path)
    looked = look(config.dataset)
    name = config.dataset.name if "dataset.name" in given else _name_of(path)
    if not is_plain(name):
        raise InputError(f"dataset.name={name!r}: not allowed; expected letters, digits, '.', '_' or '-'")
    side = config.dataset.image_size if "dataset.image_size" in given else min(MOST_SIDE, looked.side)
    channels = config.dataset.channels if "dataset.channels" in given else (1 if looked.is_gray else 3)
    wanted = config.images_per_class if "images_per_class" in given else None
    per_class = _images_per_class(looked, wanted)
    dataset = {
        "name": name,
        "path": path,
        "image_size": side,
        "channels": channels,
        "test_fraction": config.dataset.test_fraction,
        "split_seed": config.dataset.split_seed,
    }
    if config.dataset.licence is not None:
        dataset["licence"] = config.dataset.licence
    out = config.out or f"{name}.yaml"
    text = _text(looked, dataset=dataset, per_class=per_class)
    return FirstRecipe(out, text, _summary(looked, out, side=side, channels=channels, per_class=per_class))


def look(dataset: DatasetConfig) -> Looked:
    """Count every image of a folder and decode some of them, for a few seconds at most.

    Raises:
        InputError: as the reader of folders says it, or a class has too few images to learn from and be measured on.
    """
    assert dataset.source is Source.image_folder
    source = open_source(dataset)
    assert isinstance(source, ImageFolder)
    source.check()
    is_held_out = source.split_description()["kind"] == "held_out"
    classes = {split: _by_class(source, split) for split in ("train", "test")}
    sizes, is_gray = _looked_at(classes["train"])
    looked = Looked(
        class_names=source.class_names,
        num_train=[len(images) for images in classes["train"]],
        num_test=[len(images) for images in classes["test"]],
        is_held_out=is_held_out,
        side=max(1, int(median(sizes))),
        is_gray=is_gray,
    )
    if is_held_out and min(looked.num_test) == 0:
        alone = looked.class_names[looked.num_test.index(0)]
        raise InputError(
            f"dataset.path={dataset.path!r}: class {alone!r} has one image; expected at least 2, because one is "
            "held out to measure on; add images or remove the class"
        )
    return looked


def _by_class(source: ImageFolder, split: Split) -> list[list[RealImage]]:
    found: list[list[RealImage]] = [[] for _ in source.class_names]
    for class_id, images in groupby(source.images(split), key=lambda image: image.class_id):
        found[class_id].extend(images)
    return found


def _looked_at(classes: list[list[RealImage]]) -> tuple[list[int], bool]:
    """Shorter sides of some images, the same number of each class, and whether all of them are gray."""
    deadline = time.monotonic() + LOOK_S
    sizes, is_gray = [], True
    for image in (image for rank in zip_longest(*classes) for image in rank if image is not None):
        pixels = image.load()
        sizes.append(min(pixels.size))
        is_gray = is_gray and _has_no_color(pixels)
        if len(sizes) == MOST_LOOKED_AT or time.monotonic() > deadline:
            break
    return sizes, is_gray


def _has_no_color(image: Image.Image) -> bool:
    if image.mode in ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L"):
        return True
    pixels = np.asarray(image.convert("RGB"))
    return bool((pixels == pixels[..., :1]).all())


def _images_per_class(looked: Looked, wanted: int | None) -> int:
    """As wanted, or at most half of the smallest class, so that images are fewer than those they stand for."""
    smallest = looked.num_train[looked.smallest]
    if wanted is None:
        share = MOST_IMAGES // len(looked.class_names)
        return max(1, min(MOST_OF_CLASS, smallest // 2, share))
    if wanted > smallest:
        raise InputError(
            f"images_per_class={wanted}: class {looked.class_names[looked.smallest]!r} has {smallest} images to "
            "train on, and each synthetic image starts from another one; lower it"
        )
    return wanted


def _absolute(path: str | None) -> str:
    assert path, "the reader of folders refused it"
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def _name_of(path: str) -> str:
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(path).name).strip("_-")
    return name[:64] or "images"


def _summary(looked: Looked, out: str, *, side: int, channels: int, per_class: int) -> str:
    train, test = sum(looked.num_train), sum(looked.num_test)
    split = "held out, because there is no test or val folder" if looked.is_held_out else "in the folder of test images"
    color = "gray" if channels == 1 else "color"
    return "\n".join(
        [
            f"{out}: {len(looked.class_names)} classes, {train} images to train on, {test} {split}",
            f"  images      {color}, about {looked.side} pixels, used at {side}",
            f"  to make     {per_class} per class, {per_class * len(looked.class_names)} in all",
            "next:",
            f"  prism-ray run recipe={out}",
            f"  prism-ray show recipe={out}",
        ]
    )


def _yaml(value: object) -> str:
    """A value as YAML takes it on one line: JSON, which is YAML too."""
    return json.dumps(value, ensure_ascii=False)


def _text(looked: Looked, *, dataset: dict[str, object], per_class: int) -> str:
    num_train, num_classes = sum(looked.num_train), len(looked.class_names)
    side = int(str(dataset["image_size"]))
    batch = 32 if num_train <= 2000 else 128
    epochs = min(MOST_EPOCHS, max(LEAST_EPOCHS, round(TEACHER_STEPS * batch / num_train)))
    widths = [16, 32, 64] if side >= 16 else [16, 32]
    convolutions = [width for width in widths for _ in range(2)]
    split = (
        "there is no test or val folder: this share of each class is held out, the same every time"
        if looked.is_held_out
        else "unused, the folder has test images of its own"
    )
    keys = "\n".join(
        f"  {key}: {_yaml(value)}" + (f"  # {split}" if key == "test_fraction" else "")
        for key, value in dataset.items()
    )
    least = round(min(0.5, 1.25 / num_classes), 3)
    return f"""\
# Written by `prism-ray init`: {num_classes} classes, {num_train} training images, {min(looked.num_train)} to \
{max(looked.num_train)} of each class.
# For two CPU cores. On a GPU: larger images, teachers from timm (source: timm:NAME), 2000 iterations and more.
defaults:
  - override /dataset: image_folder
  - override /method: prism

recipe_name: {_yaml(dataset["name"])}
images_per_class: {per_class}

dataset:
{keys}

# Three families that differ in kind, trained here. The primary labels; with max-pooling it learns most from few images.
teachers:
  primary: vgg
  pool: [vgg, resnet, convnet]
  min_accuracy: {least}  # little more than chance: what is below would teach nothing
  models:
    vgg: {{arch: prism_vgg, model_args: {{channels: {convolutions}}}}}
    resnet: {{arch: prism_resnet, model_args: {{channels: {widths}, depths: {[1] * len(widths)}}}}}
    convnet: {{arch: prism_convnet, model_args: {{channels: {widths}}}}}

# flip_probability: 0 here, in method and in labels where a mirrored image is of another class, as with letters.
teach:
  epochs: {epochs}
  batch_size: {batch}
  lr: 0.01
  crop_area_min: 0.5
  flip_probability: 0.5

method:
  iterations: 200
  statistics_slots: 2
  flip_probability: 0.5
  roll_max: {max(1, side // 8)}
  patch_size: 4

labels:
  flip_probability: 0.5

student:
  arch: prism_vgg
  model_args: {{channels: {convolutions}}}
  seeds: [0, 1]
  steps: {STUDENT_STEPS}
  epochs: null
  batch_size: 50
  ema_decay: 0.95  # 0.99 would still hold something of the untrained student after so few steps
"""
