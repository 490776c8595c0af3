"""The published images of a run and any view of them, as relabel shows teachers and distill students.

A view's crop and flip follow from the image's own seed and the view's number, its partner and how it is mixed from the
seed of its label group (one shard, one view). Nothing of it is stored, and the student's batches have no part in it.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Self

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from prism_ray.config import LabelsConfig
from prism_ray.identity import content_hash, plain
from prism_ray.methods.views import Cutmix, Mixup, ViewParameters, blend, crop_flip, cutmix, mixup, paste, render
from prism_ray.options import Mix
from prism_ray.plan import Unit
from prism_ray.seeds import seed_for
from prism_ray.stages.pixels import DecodedPixels, Pixels, decode_image

DRAWN_AHEAD, MOST_IN_A_TABLE = 1024, 100_000
"""Draws in a table, or one of each image where there are more images; and the most, which take 0.1 s and 4 MB."""


class ImageSet:
    """Images of some units with the views that labels are keyed by.

    Args:
        units: the units, in plan order.
        pixels: their images, in the same order.
        class_ids: (N,) int64.
        image_ids: of the same images.
        labels: how views are drawn.
        run_seed: seed of the run.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        pixels: Pixels,
        class_ids: Tensor,
        image_ids: Sequence[str],
        labels: LabelsConfig,
        run_seed: int,
    ) -> None:
        self.class_ids, self.image_ids = class_ids, list(image_ids)
        self._pixels, self._labels = pixels, labels
        images = [image for unit in units for image in unit.images]
        if not len(images) == len(pixels) == len(class_ids) == len(self.image_ids):
            raise ValueError(f"{len(pixels)} images for {len(images)} planned ones; expected the units' images")
        self._keys = np.array(
            [seed_for(run_seed, "view", i.class_id, i.index_in_class) for i in images], dtype=np.int64
        )
        sizes = [len(unit.images) for unit in units]
        self._group_seeds = [seed_for(run_seed, "cutmix", unit.slice_index, unit.chunk_index) for unit in units]
        self._group_of = np.repeat(np.arange(len(units)), sizes)
        self._group_start = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        self._group_size = np.array(sizes)
        self._mix = lru_cache(maxsize=4096)(self._draw_mix)
        self._table = lru_cache(maxsize=4)(self._draw_table)
        self._views_per_table = 0

    @classmethod
    def from_tables(
        cls, units: Sequence[Unit], tables: Sequence[pa.Table], labels: LabelsConfig, run_seed: int
    ) -> Self:
        """The images of shards that are in memory."""
        class_ids = torch.tensor([label for table in tables for label in table["label"].to_pylist()])
        image_ids = [image_id for table in tables for image_id in table["image_id"].to_pylist()]
        pixels = DecodedPixels(np.concatenate([decode_images(table) for table in tables]))
        return cls(units, pixels, class_ids, image_ids, labels, run_seed)

    def __len__(self) -> int:
        return len(self.image_ids)

    def draw_ahead(self) -> None:
        """Draw crops and flips of all images at once, for batches that show each image before the next view of any.

        In a small batch the calls take most of the time and not the numbers. The views are the same.
        """
        if len(self) <= MOST_IN_A_TABLE:
            self._views_per_table = max(1, DRAWN_AHEAD // len(self))

    @property
    def image_size(self) -> int:
        """Side of the square images, pixels."""
        return self._pixels.image_size

    def clean(self, indices: np.ndarray) -> Tensor:
        """Images as they are stored: float32 (B, C, H, W) in [0, 1]."""
        return self._pixels.rows(indices).float() / 255

    def views(self, indices: np.ndarray, views: np.ndarray, *, mix: bool) -> Tensor:
        """Views of images as the teachers saw them: float32 (B, C, H, W) in [0, 1].

        Args:
            indices: (B,) rows of this set.
            views: (B,) view numbers.
            mix: mixed with the partner, as labelled; without, crop and flip alone.
        """
        if not mix or self._labels.mix is Mix.none:
            return self._rendered(indices, views)
        groups = self._group_of[indices]
        drawn = [self._mix(int(group), int(view)) for group, view in zip(groups, views, strict=True)]
        local = indices - self._group_start[groups]
        partners = np.array([mixed.permutation[n] for mixed, n in zip(drawn, local, strict=True)])
        both = np.concatenate([indices, partners + self._group_start[groups]]), np.concatenate([views, views])
        shown, partner_views = self._rendered(*both).chunk(2)
        if self._labels.mix is Mix.mixup:
            return blend(shown, partner_views, np.array([mixed.lam for mixed in drawn]))
        return paste(shown, partner_views, np.array([mixed.box for mixed in drawn if isinstance(mixed, Cutmix)]))

    def _rendered(self, indices: np.ndarray, views: np.ndarray) -> Tensor:
        draw = self._from_tables if self._views_per_table else self._drawn
        return render(self.clean(indices), draw(indices, views))

    def _drawn(self, indices: np.ndarray, views: np.ndarray) -> ViewParameters:
        labels = self._labels
        return crop_flip(
            self._keys[indices], views, crop_area_min=labels.crop_area_min, flip_probability=labels.flip_probability
        )

    def _from_tables(self, indices: np.ndarray, views: np.ndarray) -> ViewParameters:
        boxes, flips = np.empty((len(indices), 4)), np.empty(len(indices), dtype=bool)
        numbers, rows = np.divmod(views, self._views_per_table)
        places = rows * len(self) + indices
        for number in np.unique(numbers).tolist():
            table, members = self._table(number), numbers == number
            boxes[members], flips[members] = table.boxes[places[members]], table.flips[places[members]]
        return ViewParameters(boxes, flips)

    def _draw_table(self, number: int) -> ViewParameters:
        """Some views of all images, view by view."""
        views = np.arange(number * self._views_per_table, (number + 1) * self._views_per_table)
        return self._drawn(np.tile(np.arange(len(self)), len(views)), np.repeat(views, len(self)))

    def _draw_mix(self, group: int, view: int) -> Cutmix | Mixup:
        seed, size = seed_for(self._group_seeds[group], "view", view), int(self._group_size[group])
        if self._labels.mix is Mix.mixup:
            return mixup(seed, size)
        return cutmix(seed, size, image_size=self._pixels.image_size)


def views_hash(labels: LabelsConfig, run_seed: int) -> str:
    """Pins how views are drawn; stored with the labels and compared before they are used."""
    drawn_by = ("crop_area_min", "flip_probability", "mix")
    settings = {key: plain(getattr(labels, key)) for key in drawn_by}
    return content_hash([settings, run_seed, "views-2"])


def decode_images(table: pa.Table) -> np.ndarray:
    """Pixels of an image shard: uint8 (N, C, H, W)."""
    return np.stack([decode_image(png.as_buffer()) for png in table["image"].combine_chunks().field("bytes")])
