"""What a student is shown in a step, and what it should answer: functions of the step's number alone.

Any number of workers may share a step: each makes its places of the one planned batch.

Shapes: B images of a worker's share, C channels, H x W pixels, K classes.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from prism_ray.errors import PrismError
from prism_ray.ledger import read_columns
from prism_ray.methods.distillation import batch_of_step, block_of_step, mixed_classes, mixed_logits
from prism_ray.methods.views import Cutmix, cutmix, paste
from prism_ray.options import LabelKind
from prism_ray.plan import Unit
from prism_ray.seeds import seed_for
from prism_ray.stages.data_parallel import Group
from prism_ray.stages.labels import LabelTeachers, StoredLabels, read_labels
from prism_ray.stages.pixels import MappedPixels, Pixels, open_pixels
from prism_ray.stages.views import ImageSet
from prism_ray.work import SYNTHESIZE, RunSpec, without_lost

T = TypeVar("T", Tensor, Tensor | None)


@dataclass(frozen=True)
class TrainingSet:
    """A run's images with what gives their soft labels, if a student wants them."""

    units: list[Unit]  # those whose images exist, in the order of the images
    pixels: Pixels
    images: ImageSet
    labels: StoredLabels | LabelTeachers | None = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def is_mapped(self) -> bool:
        return isinstance(self.pixels, MappedPixels)


def read_training_set(spec: RunSpec, shards: dict[str, str]) -> TrainingSet:
    """The images of some shards, sha256 by key, without labels.

    Raises:
        PrismError: there is none, or one holds other images than planned.
    """
    ledger, config, dataset = spec.ledger(), spec.config, spec.dataset()
    made = ledger.receipts(SYNTHESIZE)
    units = [unit for unit in spec.units() if f"images/{unit.name}.parquet" in shards]
    units = [without_lost(unit, made[unit.name].details) for unit in units if unit.name in made]
    if not units:
        raise PrismError(
            f"{spec.run_dir}: no image shard to learn from; run the stages before, or see prism-ray status for what "
            "was quarantined"
        )
    planned = [image for unit in units for image in unit.images]
    keys = [f"images/{unit.name}.parquet" for unit in units]
    columns = [read_columns(ledger.store, key, ["label", "image_id"]) for key in keys]
    class_ids = [class_id for table in columns for class_id in table["label"].to_pylist()]
    image_ids = [image_id for table in columns for image_id in table["image_id"].to_pylist()]
    if image_ids != [image.image_id for image in planned]:
        raise PrismError(f"{spec.run_dir}/images: holds other images than planned; run verify, then run again")
    pixels = open_pixels(
        ledger.store,
        {key: shards[key] for key in keys},
        num_images=len(image_ids),
        image_bytes=dataset.channels * dataset.image_size**2,
        in_memory_gb=config.compute.in_memory_gb,
    )
    images = ImageSet(units, pixels, torch.tensor(class_ids), image_ids, config.labels, config.seed)
    images.draw_ahead()
    return TrainingSet(units, pixels, images)


def labels_of(spec: RunSpec, training_set: TrainingSet, device: torch.device) -> StoredLabels | LabelTeachers:
    """The stored labels of a training set, or the teachers that make them in the step.

    Raises:
        PrismError: stored labels belong to other images or settings.
    """
    if spec.config.labels.online:
        return LabelTeachers(spec, device)
    return read_labels(spec.ledger(), spec.config, training_set.units, spec.dataset().num_classes)


@dataclass(frozen=True)
class StudentBatch:
    """One worker's share of a step."""

    shown: Tensor  # (B, C, H, W) float32 in [0, 1]
    unmixed: Tensor | None  # the same images before they were mixed, where batch norm is to see them too
    soft: Tensor | None  # (B, K) logits to answer; None where the class alone is learned
    classes: Tensor  # (B,) class ids, or (B, K) their shares where a box was pasted
    order_hash: int

    @property
    def num_images(self) -> int:
        return len(self.shown)


class StudentBatches:
    """Makes the batches of one student.

    Args:
        kind: what the student learns from.
        rows: (N,) rows of the training set that it may see.
        order_seed: of the order of the images.
        is_pinned: in memory that an accelerator reads while the program goes on.
    """

    def __init__(
        self,
        spec: RunSpec,
        kind: LabelKind,
        training_set: TrainingSet,
        *,
        rows: np.ndarray,
        order_seed: int,
        num_steps: int,
        group: Group,
        is_pinned: bool,
    ) -> None:
        self._labels_config, self._student = spec.config.labels, spec.config.student
        self._num_classes, self._image_size = spec.dataset().num_classes, spec.dataset().image_size
        self._kind, self._set, self._rows = kind, training_set, rows
        self._order_seed, self._num_steps, self._group, self._is_pinned = order_seed, num_steps, group, is_pinned
        self._id_hashes = hashed_ids(training_set.images.image_ids)

    @torch.no_grad()
    def __call__(self, step: int) -> StudentBatch:
        """This worker's share of a step."""
        order, epochs = batch_of_step(
            self._order_seed, step, num_images=len(self._rows), batch_size=self._student.batch_size
        )
        indices = self._rows[order]
        kind, cut = self._kind_of(step), self._cutmix(step)
        # Only labels that are stored come to an end: all else has a new view in every epoch.
        is_stored = kind is LabelKind.soft and not self._labels_config.online
        views = epochs % self._labels_config.views if is_stored else epochs
        mine = np.arange(len(indices))[self._group.share]
        # A box comes from any image of the whole batch, so a share may need images of others.
        needed = mine if cut is None else np.unique(np.concatenate([mine, cut.permutation[mine]]))
        shown = self._shown(kind, indices[needed], views[needed])
        soft = self._soft(shown, indices[needed], views[needed]) if kind is LabelKind.soft else None
        classes = self._set.images.class_ids[torch.from_numpy(indices[needed])]
        if cut is not None:
            own, partner = np.searchsorted(needed, mine), np.searchsorted(needed, cut.permutation[mine])
            shown = paste(shown[own], shown[partner], cut.box)
            soft = None if soft is None else mixed_logits(soft[own], soft[partner], cut.lam)
            classes = mixed_classes(classes[own], classes[partner], cut.lam, num_classes=self._num_classes)
        return StudentBatch(
            shown=self._pinned(shown),
            unmixed=self._pinned(self._unmixed(kind, indices[mine], views[mine])),
            soft=self._pinned(soft),
            classes=self._pinned(classes),
            order_hash=order_hash(step, mine, self._id_hashes[indices[mine]], views[mine]),
        )

    def _kind_of(self, step: int) -> LabelKind:
        blocks = self._student.blocks
        if self._kind is not LabelKind.soft or len(blocks) == 1:  # which is soft, validation says
            return self._kind
        return blocks[block_of_step(step, self._num_steps, len(blocks))]

    def _cutmix(self, step: int) -> Cutmix | None:
        """The box pasted in this step, if any; never of unaugmented images."""
        if self._kind is LabelKind.plain or self._student.remix == 0:
            return None
        if seed_for(self._order_seed, "remix", step) >= self._student.remix * 2**63:
            return None
        seed = seed_for(self._order_seed, "remix box", step)
        return cutmix(seed, self._student.batch_size, image_size=self._image_size)

    def _shown(self, kind: LabelKind, indices: np.ndarray, views: np.ndarray) -> Tensor:
        if kind is LabelKind.plain:
            return self._set.images.clean(indices)
        return self._set.images.views(indices, views, mix=kind is LabelKind.soft)

    def _unmixed(self, kind: LabelKind, indices: np.ndarray, views: np.ndarray) -> Tensor | None:
        if not self._student.clean_forward:
            return None
        # Cropped and flipped, as in RDED's program, which mixes after that.
        return self._shown(LabelKind.hard if kind is LabelKind.soft else kind, indices, views)

    def _soft(self, shown: Tensor, indices: np.ndarray, views: np.ndarray) -> Tensor:
        labels = self._set.labels
        assert labels is not None
        return labels.logits(shown) if isinstance(labels, LabelTeachers) else labels.logits(indices, views)

    def _pinned(self, tensor: T) -> T:
        return tensor.pin_memory() if self._is_pinned and tensor is not None else tensor


def hashed_ids(image_ids: Sequence[str]) -> np.ndarray:
    """(N,) uint64, one hash of each image's id."""
    digests = b"".join(hashlib.blake2b(image_id.encode(), digest_size=8).digest() for image_id in image_ids)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def order_hash(step: int, places: np.ndarray, id_hashes: np.ndarray, views: np.ndarray) -> int:
    """Sum modulo 2^64 over images of a hash of (step, place in the batch, image, view).

    Equal sums over a training mean that the same views of the same images took the same places, whoever showed them.
    """
    mixed = _splitmix64(np.full(len(places), step, dtype=np.uint64))
    for part in (places, id_hashes, views):
        mixed = _splitmix64(mixed ^ part.astype(np.uint64))
    return int(mixed.sum(dtype=np.uint64))


def _splitmix64(x: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit integers that scatters them. Source: Steele et al. 2014, "Fast splittable ...", mix64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
