"""Labels as students get them: computed by the label teachers, or read back from label shards."""

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from prism_ray.config import Config, LabelsConfig, label_teachers
from prism_ray.errors import PrismError, one_line
from prism_ray.ledger import Ledger, read_table
from prism_ray.methods.batch_statistics import batch_statistics
from prism_ray.methods.soft_labels import Codec, combine
from prism_ray.options import LabelRule
from prism_ray.plan import Unit
from prism_ray.schema import label_schema, text_metadata
from prism_ray.stages.device import busy_teacher_of, folded_teacher_of
from prism_ray.stages.views import views_hash
from prism_ray.work import RunSpec

CPU_PIXELS = 2**16
"""Of each channel in a forward pass on a CPU. Beyond, activations leave its caches and cost fresh pages every time."""


class LabelTeachers:
    """The label teachers of a run, on a device."""

    def __init__(self, spec: RunSpec, device: torch.device) -> None:
        self._labels, self._device = spec.config.labels, device
        load = busy_teacher_of if self._labels.batch_statistics else folded_teacher_of
        self._teachers = [load(spec, name, device) for name in label_teachers(spec.config)]

    def batch_size(self, image_size: int) -> int:
        """Views (of a side in pixels) per call, where labels do not couple them."""
        return min(self._labels.batch_size, self._pass_size(image_size))

    def _pass_size(self, image_size: int) -> int:
        """Views of a forward pass, where they do not depend on each other in it."""
        is_split = self._device.type == "cpu" and not self._labels.batch_statistics
        return max(16, CPU_PIXELS // image_size**2) if is_split else sys.maxsize

    @property
    def couples(self) -> bool:
        """Whether a label depends on the images it is computed with, so that a call takes a whole label group."""
        return self._labels.rule is not LabelRule.mean or self._labels.batch_statistics

    @torch.no_grad()
    def logits(self, shown: Tensor) -> Tensor:
        """Labels (B, K) float32, on the CPU, of views (B, C, H, W)."""
        shown = shown.to(self._device)
        # What couples labels is a rule, or batch statistics, and not the passes that they come from.
        parts = shown.chunk(max(1, round(len(shown) / self._pass_size(shown.shape[-1]))))
        with ExitStack() as stack:
            if self._labels.batch_statistics:
                for teacher in self._teachers:
                    stack.enter_context(batch_statistics(teacher))
            answers = [torch.cat([teacher(part) for part in parts]) for teacher in self._teachers]
        return combine(answers, rule=self._labels.rule.name, weights=self._labels.weights or None).cpu()


class StoredLabels:
    """Labels of a run's images by row and view, kept as they are stored and decoded when asked for."""

    def __init__(self, codec: Codec, blobs: np.ndarray) -> None:
        self._codec, self._blobs = codec, blobs

    @property
    def num_views(self) -> int:
        return self._codec.num_views

    def __len__(self) -> int:
        return len(self._blobs)

    def logits(self, indices: np.ndarray, views: np.ndarray) -> Tensor:
        """Labels (B, K) float32 of rows (B,) in views (B,)."""
        return self._codec.decode(self._blobs, indices, views)


def codec_of(labels: LabelsConfig, num_classes: int) -> Codec:
    """How these settings store labels."""
    return Codec(num_classes=num_classes, num_views=labels.views, top_k=labels.top_k, bits=labels.bits)


def label_table(codec: Codec, logits: Tensor, image_ids: Sequence[str], *, views_hash: str, group: str) -> pa.Table:
    """Labels (N, V, K) of images as a table that `read_labels` reads; see `schema.label_schema` for the rest."""
    schema = label_schema(
        codec=codec.name,
        blob_bytes=codec.blob_bytes,
        num_classes=codec.num_classes,
        num_views=codec.num_views,
        views_hash=views_hash,
        group=group,
    )
    blobs = [blob.tobytes() for blob in codec.encode(logits)]
    return pa.table({"image_id": list(image_ids), "logits": blobs}, schema=schema)


def read_labels(ledger: Ledger, config: Config, units: Sequence[Unit], num_classes: int) -> StoredLabels:
    """The labels of some units, in plan order.

    Raises:
        PrismError: a shard was drawn or stored by other settings, or belongs to other images.
    """
    codec = codec_of(config.labels, num_classes)
    blobs = []
    for unit in units:
        key = f"labels/{unit.name}.parquet"
        table = read_table(ledger.store, key)
        metadata = text_metadata(table.schema)
        _check_settings(key, metadata, codec, views_hash(config.labels, config.seed))
        ids = [image.image_id for image in unit.images]
        if table["image_id"].to_pylist() != ids or metadata.get("prism_ray.group") != unit.unit_id:
            raise PrismError(f"{key}: does not belong to its images; run verify, then run again")
        stored = b"".join(table["logits"].to_pylist())
        if len(stored) != len(ids) * codec.blob_bytes:
            raise PrismError(
                f"{key}: has {len(stored)} bytes of labels; expected {codec.blob_bytes} for each of {len(ids)} images; "
                "run verify, then run again"
            )
        blobs.append(np.frombuffer(stored, dtype=np.uint8).reshape(len(ids), codec.blob_bytes))
        try:
            codec.check(blobs[-1])
        except ValueError as error:
            raise PrismError(f"{key}: is no label table ({one_line(error)}); run verify, then run again") from error
    return StoredLabels(codec, np.concatenate(blobs))


def _check_settings(key: str, metadata: Mapping[str, str], codec: Codec, drawn_by: str) -> None:
    expected = {
        "views_hash": (drawn_by, "its views were drawn by other settings"),
        "num_views": (str(codec.num_views), "it has another number of views"),
        "codec": (codec.name, "its labels are stored by other settings"),
        "num_classes": (str(codec.num_classes), "it has another number of classes"),
    }
    for name, (value, problem) in expected.items():
        found = metadata.get(f"prism_ray.{name}")
        if found != value:
            raise PrismError(f"{key}: {problem} ({name} {found}, expected {value}); run relabel again")
