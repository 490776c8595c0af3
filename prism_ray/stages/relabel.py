"""Relabel: the label teachers' logits on every view of a shard's images, one blob of views per image."""

import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pyarrow as pa
import torch

from prism_ray.ledger import Receipt, read_table
from prism_ray.plan import Unit
from prism_ray.stages.device import deterministic, fingerprint, peak_memory, pick_device
from prism_ray.stages.labels import LabelTeachers, codec_of, label_table
from prism_ray.stages.views import ImageSet, views_hash
from prism_ray.work import RunSpec


class Relabeler:
    """Labels the image shards of one run."""

    def __init__(self, spec: RunSpec) -> None:
        self.config = spec.config
        self.device = pick_device(spec.config.compute.gpus_per_actor)
        self.ledger = spec.ledger()
        self.codec = codec_of(spec.config.labels, spec.dataset().num_classes)
        self.teachers = LabelTeachers(spec, self.device)

    def compute(self, unit: Unit, empty: Receipt) -> tuple[pa.Table, Receipt]:
        """The unit's label shard and its receipt."""
        started = time.perf_counter()
        labels = self.config.labels
        (image_key,) = empty.inputs
        images = ImageSet.from_tables([unit], [read_table(self.ledger.store, image_key)], labels, self.config.seed)
        logits = torch.empty(len(images), labels.views, self.codec.num_classes)
        with deterministic(self.config.compute.threads):
            for indices, views in self._batches(len(images), images.image_size):
                shown = images.views(indices, views, mix=True)
                logits[torch.from_numpy(indices), torch.from_numpy(views)] = self.teachers.logits(shown)
        table = label_table(
            self.codec,
            logits,
            images.image_ids,
            views_hash=views_hash(labels, self.config.seed),
            group=unit.unit_id,
        )
        receipt = replace(
            empty,
            seconds=time.perf_counter() - started,
            fingerprint=fingerprint(self.device),
            worker=peak_memory(self.device),
            details={"codec": self.codec.name, "num_views": labels.views},
        )
        return table, receipt

    def _batches(self, num_images: int, image_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Rows and views of every forward pass: whole label groups where the rule couples images, else even chunks."""
        num_views = self.config.labels.views
        if self.teachers.couples:
            for view in range(num_views):
                yield np.arange(num_images), np.full(num_images, view)
            return
        indices, views = np.repeat(np.arange(num_images), num_views), np.tile(np.arange(num_views), num_images)
        size = self.teachers.batch_size(image_size)
        for start in range(0, len(indices), size):
            chosen = slice(start, start + size)
            yield indices[chosen], views[chosen]
