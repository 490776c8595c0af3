"""The published images of a run in memory, and any view of them, as relabel shows teachers and distill students.

A view's crop and flip follow from the image's own seed and the view's number, its CutMix partner and box from the seed
of its label group (one shard, one view). Nothing of it is stored, and the student's batches have no part in it.
"""

import io
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

from prism_ray.config import LabelsConfig, content_hash, plain
from prism_ray.methods.views import Cutmix, crop_flip, cutmix, paste, render
from prism_ray.plan import Unit
from prism_ray.seeds import seed_for


class ImageSet:
    """Images of some units with the views that labels are keyed by.

    Args:
        units: the units, in plan order.
        tables: their image shards, in the same order.
        labels: how views are drawn.
        run_seed: seed of the run.
    """

    def __init__(self, units: Sequence[Unit], tables: Sequence[pa.Table], labels: LabelsConfig, run_seed: int) -> None:
        self.pixels = torch.from_numpy(np.concatenate([decode_images(table) for table in tables]))
        self.class_ids = torch.tensor([label for table in tables for label in table["label"].to_pylist()])
        self.image_ids = [image_id for table in tables for image_id in table["image_id"].to_pylist()]
        self._labels, self._run_seed = labels, run_seed
        images = [image for unit in units for image in unit.images]
        self._keys = np.array(
            [seed_for(run_seed, "view", i.class_id, i.index_in_class) for i in images], dtype=np.int64
        )
        sizes = [len(unit.images) for unit in units]
        self._group_seeds = [seed_for(run_seed, "cutmix", unit.slice_index, unit.chunk_index) for unit in units]
        self._group_of = np.repeat(np.arange(len(units)), sizes)
        self._group_start = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        self._group_size = np.array(sizes)
        self._cutmix = lru_cache(maxsize=4096)(self._draw_cutmix)

    def __len__(self) -> int:
        return len(self.image_ids)

    def views(self, indices: np.ndarray, views: np.ndarray, *, mix: bool) -> Tensor:
        """Views of images as the teachers saw them: float32 (B, C, H, W) in [0, 1].

        Args:
            indices: (B,) rows of this set.
            views: (B,) view numbers.
            mix: with the CutMix partner pasted in, as labelled; without, crop and flip alone.
        """
        shown = self._rendered(indices, views)
        if not (mix and self._labels.cutmix):
            return shown
        drawn = [self._cutmix(int(self._group_of[i]), int(v)) for i, v in zip(indices, views, strict=True)]
        local = indices - self._group_start[self._group_of[indices]]
        partners = np.array([cut.permutation[n] for cut, n in zip(drawn, local, strict=True)])
        partners = partners + self._group_start[self._group_of[indices]]
        return paste(shown, self._rendered(partners, views), np.array([cut.box for cut in drawn]))

    def _rendered(self, indices: np.ndarray, views: np.ndarray) -> Tensor:
        drawn = crop_flip(
            self._keys[indices],
            views,
            crop_area_min=self._labels.crop_area_min,
            flip_probability=self._labels.flip_probability,
        )
        return render(self.pixels[torch.from_numpy(indices)].float() / 255, drawn)

    def _draw_cutmix(self, group: int, view: int) -> Cutmix:
        size = self.pixels.shape[-1]
        return cutmix(seed_for(self._group_seeds[group], "view", view), int(self._group_size[group]), image_size=size)


def views_hash(labels: LabelsConfig, run_seed: int) -> str:
    """Pins how views are drawn; stored with the labels and compared before they are used."""
    settings = {k: v for k, v in plain(labels).items() if k not in ("teachers", "views", "batch_size")}
    return content_hash([settings, run_seed, "views-1"])


def decode_images(table: pa.Table) -> np.ndarray:
    """Pixels of an image shard: uint8 (N, C, H, W)."""
    decoded = []
    for value in table["image"].combine_chunks().field("bytes"):
        image = np.asarray(Image.open(io.BytesIO(value.as_py()), formats=["PNG"]))
        decoded.append(image[None] if image.ndim == 2 else np.moveaxis(image, -1, 0))
    return np.stack(decoded)
