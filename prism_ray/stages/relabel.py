"""Relabel: the label teachers' logits on every view of a shard's images, keyed by image and view."""

import time
from dataclasses import replace

import numpy as np
import pyarrow as pa
import torch

from prism_ray.ledger import Receipt, read_table
from prism_ray.methods.soft_labels import encode_fp16, mean_logits
from prism_ray.plan import Unit, label_teachers
from prism_ray.schema import label_schema
from prism_ray.stages.device import deterministic, fingerprint, peak_memory_bytes, pick_device, teacher_of
from prism_ray.stages.views import ImageSet, views_hash
from prism_ray.work import RunSpec


class Relabeler:
    """Labels the image shards of one run."""

    def __init__(self, spec: RunSpec) -> None:
        self.spec, self.config = spec, spec.config
        self.device = pick_device(spec.config.compute.gpus_per_actor)
        self.ledger = spec.ledger()
        self.num_classes = spec.dataset().num_classes
        self.teachers = [teacher_of(spec, name, self.device) for name in label_teachers(spec.config)]

    def compute(self, unit: Unit, empty: Receipt) -> tuple[pa.Table, Receipt]:
        """The unit's label shard, image by image and view by view, and its receipt."""
        started = time.perf_counter()
        labels = self.config.labels
        (image_key,) = empty.inputs
        images = ImageSet([unit], [read_table(self.ledger.store, image_key)], labels, self.config.seed)
        indices = np.repeat(np.arange(len(images)), labels.views)
        views = np.tile(np.arange(labels.views), len(images))
        encoded: list[bytes] = []
        with deterministic(self.config.compute.threads):
            for start in range(0, len(indices), labels.batch_size):
                chosen = slice(start, start + labels.batch_size)
                encoded += encode_fp16(self._logits(images.views(indices[chosen], views[chosen], mix=True)))
        schema = label_schema(
            codec="fp16", num_classes=self.num_classes, views_hash=views_hash(labels, self.config.seed)
        )
        columns = {
            "image_id": [images.image_ids[i] for i in indices],
            "view": views.astype(np.int32),
            "logits": encoded,
        }
        receipt = replace(
            empty,
            seconds=time.perf_counter() - started,
            fingerprint=fingerprint(self.device),
            worker={"peak_memory_bytes": peak_memory_bytes()},
        )
        return pa.table(columns, schema=schema), receipt

    @torch.no_grad()
    def _logits(self, shown: torch.Tensor) -> torch.Tensor:
        shown = shown.to(self.device)
        return mean_logits([teacher(shown) for teacher in self.teachers]).cpu()
