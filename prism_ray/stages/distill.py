"""Distill: a student trained on the synthetic images of a run with one kind of labels, tested on real ones.

A learning rate is tried in the same way, with a validation split in the place of the test images.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prism_ray.artifacts import StoredFile, join, split
from prism_ray.config import Config, student_steps
from prism_ray.errors import InputError, PrismError, within
from prism_ray.identity import config_hash, content_hash
from prism_ray.ledger import Receipt
from prism_ray.lock import check_epoch
from prism_ray.methods.distillation import cosine_loss, hard_loss, kl_loss, mse_ce_loss
from prism_ray.methods.schedules import SCHEDULES, with_warmup
from prism_ray.models.classifier import Classifier, save_classifier
from prism_ray.options import LabelKind, Precision, SoftLoss, Validation
from prism_ray.plan import needs_starts
from prism_ray.seeds import seed_for
from prism_ray.stages.data_parallel import ALONE, Group
from prism_ray.stages.device import deterministic, fingerprint, pick_device, untrained
from prism_ray.stages.held_out import held_out_rows, reserved_rows
from prism_ray.stages.labels import LabelTeachers, StoredLabels
from prism_ray.stages.shifts import shifted_accuracies
from prism_ray.stages.starts import Starts
from prism_ray.stages.student_batches import StudentBatch, StudentBatches, TrainingSet, labels_of, read_training_set
from prism_ray.stages.training import (
    Checkpoints,
    Course,
    Diverged,
    Forward,
    Record,
    accuracy,
    confusion_of,
    fit,
    num_parameters,
)
from prism_ray.storage import sha256_of_file, to_json
from prism_ray.work import DISTILL, RunSpec, SearchItem, StudentItem, chosen_lr, learned_from, starts_item

HELD_OUT = 0.2
"""Share of the synthetic images that judges a learning rate where `student.validation` is synthetic."""


class Distiller:
    """Trains students one after another; keeps images and labels of the last ones, which the next usually shares."""

    def __init__(self) -> None:
        self._images: tuple[tuple[str, dict[str, str]], TrainingSet] | None = None
        self._labels: tuple[tuple[str, dict[str, str]], StoredLabels | LabelTeachers] | None = None

    def train(self, item: StudentItem, group: Group = ALONE) -> None:
        """Train, test and publish one student; nothing to do if its receipt fits today's inputs.

        All workers of a group call it alike; the first one tests and publishes.
        """
        spec, config = item.spec, item.spec.config
        device = pick_device(config.compute.gpus_per_train_worker)
        if group.agreed(item.is_done, device):
            return
        inputs = learned_from(spec, item.labels)
        lr = chosen_lr(spec, item.labels)
        key = f"metrics/students/{item.name}.jsonl"
        store = spec.ledger().store

        def keep(history: list[dict[str, Any]]) -> None:
            check_epoch(store, spec.epoch)
            store.put(key, b"".join(json.dumps(entry).encode() + b"\n" for entry in history))

        checkpoints = Checkpoints(
            file=StoredFile(store, f"checkpoints/student/{item.name}.safetensors"),
            every=config.student.checkpoint_every,
            identity=content_hash([config_hash(config), item.name, inputs, lr]),
            after=keep,
        )
        with deterministic(config.compute.threads):
            training_set = self._training_set(item, inputs, device)
            rows = np.arange(len(training_set))
            classifier, record = _fitted(item, training_set, rows, lr, checkpoints, device, group=group, looks=True)
            if group.is_first:
                top1 = measured_accuracy(classifier, spec, device)
                keep(record.history)
                facts = _facts(item, classifier, len(training_set), lr=lr, top1=top1, record=record)
                measured = {
                    # What looks at the test images found on the way: beside the accuracy, never part of the student.
                    "best_on_test": None if record.best_top1 is None else max(record.best_top1, top1),
                    "images_per_s": round(record.images_per_s, 1),
                    "data_wait_share": round(record.data_wait_share, 4),
                    "confusion": measured_confusion(classifier, spec, device),
                    "shifts": shifted_accuracies(classifier, spec, device),
                    "workers": group.size,
                }
                _publish(
                    item, classifier, facts, measured, inputs=inputs, seconds=record.seconds * group.size, device=device
                )
                checkpoints.file.remove()
        group.wait()

    def search(self, item: SearchItem) -> None:
        """Try one learning rate: train as the first seed's student would, judge on the validation split.

        Never looks at the test images. A training that diverges has accuracy 0.

        Raises:
            InputError: there are too few images for the split.
        """
        spec, config = item.spec, item.spec.config
        if item.is_done:
            return
        inputs, store = learned_from(spec, item.labels), spec.ledger().store
        device = pick_device(config.compute.gpus_per_train_worker)
        checkpoints = Checkpoints(
            file=StoredFile(store, f"checkpoints/search/{item.name}.safetensors"),
            every=config.student.checkpoint_every,
            identity=content_hash([config_hash(config), "search", item.name, inputs]),
            after=lambda history: check_epoch(store, spec.epoch),
        )
        with deterministic(config.compute.threads):
            training_set = self._training_set(item, inputs, device)
            split = validation_split(spec, training_set)
            try:
                classifier, _ = _fitted(item, training_set, split.rows, item.lr, checkpoints, device)
                top1 = accuracy(classifier, split.pixels, split.class_ids, device)
            except Diverged:
                top1 = None
        result = {
            "inputs": inputs,
            "lr": item.lr,
            "top1": top1 or 0.0,
            "diverged": top1 is None,
            "validation": config.student.validation.name,
            "num_images": len(split.class_ids),
        }
        check_epoch(store, spec.epoch)
        store.put(item.key, to_json(result))
        checkpoints.file.remove()

    def _training_set(
        self, item: StudentItem | SearchItem, inputs: dict[str, str], device: torch.device
    ) -> TrainingSet:
        shards = {key: sha256 for key, sha256 in inputs.items() if key.startswith("images/")}
        images_key, labels_key = (item.spec.run_dir, shards), (item.spec.run_dir, inputs)
        if self._images is None or self._images[0] != images_key:
            self._images = self._labels = None  # before the next ones are read: there may be room for one alone
            self._images = (images_key, read_training_set(item.spec, shards))
        training_set = self._images[1]
        if item.labels is not LabelKind.soft:
            return training_set
        if self._labels is None or self._labels[0] != labels_key:
            self._labels = (labels_key, labels_of(item.spec, training_set, device))
        return replace(training_set, labels=self._labels[1])


def _fitted(
    item: StudentItem | SearchItem,
    training_set: TrainingSet,
    rows: np.ndarray,
    lr: float,
    checkpoints: Checkpoints,
    device: torch.device,
    *,
    group: Group = ALONE,
    looks: bool = False,
) -> tuple[Classifier, Record]:
    """A student trained on some rows of a training set; `looks`: at the images it is measured on, if so set."""
    spec, config, student, dataset = item.spec, item.spec.config, item.spec.config.student, item.spec.dataset()
    with within("student"):
        # Not of the method or the label kind: students of one seed start alike in every row of a table.
        seed = seed_for(config.seed, "student", item.seed)
        classifier = untrained(dataset, student.arch, student.model_args, seed=seed).to(device)
    num_steps = student_steps(student, len(training_set))
    order_seed = seed_for(config.seed, "student order", item.seed)
    is_cuda = device.type == "cuda"
    course = Course(
        name=f"student {item.name} (student.lr={lr:g})",
        num_steps=num_steps,
        num_images=len(rows),
        batch_size=student.batch_size,
        lr_of_step=lambda step: student_lr(config, lr, step=step, total=num_steps),
        optimizer=student.optimizer.name,
        weight_decay=student.weight_decay,
        seed=order_seed,
        ema_decay=student.ema_decay,
        bfloat16=student.precision is Precision.bf16,
        compiled=student.compile,
    )
    batches = StudentBatches(
        spec,
        item.labels,
        training_set,
        rows=rows,
        order_seed=order_seed,
        num_steps=num_steps,
        group=group,
        is_pinned=is_cuda,
    )
    return fit(
        classifier,
        course,
        prepare=batches,
        loss_of=lambda forward, batch: student_loss(config, forward, batch, device),
        checkpoints=checkpoints,
        evaluate=(lambda network: measured_accuracy(network, spec, device)) if looks else None,
        evaluate_every=student.evaluate_every,
        in_background=is_cuda or training_set.is_mapped,
        group=group,
    )


def student_lr(config: Config, lr: float, *, step: int, total: int) -> float:
    """Learning rate of a step under the student's schedule, `lr` at its peak."""
    student = config.student
    return lr * with_warmup(SCHEDULES[student.schedule.name], step, total, student.warmup)


def student_loss(config: Config, forward: Forward, batch: StudentBatch, device: torch.device) -> Tensor:
    """Mean loss over a batch, by what it is to be answered with."""
    student = config.student
    if batch.unmixed is not None:
        with torch.no_grad():  # for the statistics of batch norm alone
            forward(batch.unmixed.to(device, non_blocking=True))
    answer = forward(batch.shown.to(device, non_blocking=True))
    classes = batch.classes.to(device, non_blocking=True)
    if batch.soft is None:
        return hard_loss(answer, classes, label_smoothing=student.label_smoothing)
    soft = batch.soft.to(device, non_blocking=True)
    if student.soft_loss is SoftLoss.kl:
        return kl_loss(answer, soft, temperature=student.temperature, temperature_squared=student.temperature_squared)
    if student.soft_loss is SoftLoss.mse_ce:
        return mse_ce_loss(answer, soft, classes, ce_weight=student.ce_weight, label_smoothing=student.label_smoothing)
    return cosine_loss(
        answer,
        soft,
        classes,
        hard_share=student.hard_share,
        label_smoothing=student.label_smoothing,
    )


def measured_accuracy(classifier: Classifier, spec: RunSpec, device: torch.device) -> float:
    """Top-1, 0 to 1, of a student on the real images that are held out for it."""
    dataset, (split, rows) = spec.dataset(), held_out_rows(spec)
    labels = dataset.labels(split)[rows]
    return accuracy(classifier, lambda places: torch.from_numpy(dataset.images(split, rows[places])), labels, device)


def measured_confusion(classifier: Classifier, spec: RunSpec, device: torch.device) -> list[list[int]] | None:
    """What the same images are taken for, see `confusion_of`."""
    dataset, (split, rows) = spec.dataset(), held_out_rows(spec)
    labels = dataset.labels(split)[rows]
    return confusion_of(classifier, lambda places: dataset.images(split, rows[places]), labels, device)


@dataclass(frozen=True)
class ValidationSplit:
    """Images that judge a learning rate, and the rows of the training set that a student may see meanwhile."""

    rows: np.ndarray  # (N,)
    pixels: Callable[[np.ndarray], Tensor]  # some of the M images, by their places: (B, C, H, W) uint8
    class_ids: np.ndarray  # (M,)


def validation_split(spec: RunSpec, training_set: TrainingSet) -> ValidationSplit:
    """The validation images of a run, at most `student.validation_images` of each class.

    `training`: the last real training images of each class, in source order, that no synthetic image started from and
    that students are not measured on.
    Teachers trained here have seen them, so what is judged is how well a student does on their training data.
    `synthetic`: the last fifth of each class's synthetic images, which the student then does not see; where views are
    mixed, a box of one may still show in a view of another image, as it was labelled.

    Raises:
        InputError: a class has no image for it.
    """
    if spec.config.student.validation is Validation.training:
        return _real_split(spec, training_set)
    return _synthetic_split(spec, training_set)


def _real_split(spec: RunSpec, training_set: TrainingSet) -> ValidationSplit:
    dataset, most = spec.dataset(), spec.config.student.validation_images
    used = {image.source_row for unit in training_set.units for image in unit.images}
    used |= {*_started_from(spec), *reserved_rows(spec).tolist()}
    chosen, by_class = [], dataset.rows_by_class("train")
    for class_id in spec.class_ids():
        free = [row for row in by_class[class_id].tolist() if row not in used]
        if not free:
            raise InputError(
                f"student.validation=training: class {dataset.class_names[class_id]!r} has no real training image that "
                "no synthetic one started from; use student.validation=synthetic, or set student.lr without lr_grid"
            )
        chosen += free[-most:]
    rows = np.array(chosen)
    return ValidationSplit(
        np.arange(len(training_set)),
        lambda places: torch.from_numpy(dataset.images("train", rows[places])),
        dataset.labels("train")[rows],
    )


def _started_from(spec: RunSpec) -> set[int]:
    """Real training images that teachers chose for a run's images to start from."""
    if not needs_starts(spec.config):
        return set()
    item = starts_item(spec, join(split(split(spec.run_dir)[0])[0], "artifacts"))
    if not item.is_done:
        raise PrismError(f"{item.folder}: missing, which real images were chosen; run synthesize again")
    return {start.row for tiles in Starts.open(item.folder).tiles.values() for start in tiles}


def _synthetic_split(spec: RunSpec, training_set: TrainingSet) -> ValidationSplit:
    dataset, most = spec.dataset(), spec.config.student.validation_images
    planned = [image for unit in training_set.units for image in unit.images]
    members: dict[int, list[tuple[int, int]]] = {class_id: [] for class_id in spec.class_ids()}
    for row, image in enumerate(planned):
        members[image.class_id].append((image.index_in_class, row))
    held_out: list[int] = []
    for class_id, found in members.items():
        if len(found) < 2:
            raise InputError(
                f"student.validation=synthetic: class {dataset.class_names[class_id]!r} has {len(found)} synthetic "
                "images; expected at least 2, one to learn from and one to judge; use student.validation=training or "
                "more images_per_class"
            )
        count = min(math.ceil(HELD_OUT * len(found)), most)
        held_out += [row for _, row in sorted(found)[-count:]]
    rows = np.array(held_out)
    kept = np.setdiff1d(np.arange(len(training_set)), rows)
    class_ids = np.array([planned[row].class_id for row in held_out])
    return ValidationSplit(kept, lambda places: training_set.pixels.rows(rows[places]), class_ids)


def _facts(
    item: StudentItem, classifier: Classifier, num_images: int, *, lr: float, top1: float, record: Record
) -> dict[str, Any]:
    """What there is to know of a student, the same however often its training was killed."""
    student = item.spec.config.student
    steps = student_steps(student, num_images)
    return {
        "top1": top1,
        "steps": steps,
        "epochs": round(steps * student.batch_size / num_images, 2),
        "seed": item.seed,
        "labels": item.labels.name,
        "lr": lr,
        "recipe": student.recipe,
        "num_params": num_parameters(classifier),
        "architecture": classifier.architecture,
        "order_hash": f"{record.order_hash:016x}",
    }


def _publish(
    item: StudentItem,
    classifier: Classifier,
    facts: dict[str, Any],
    measured: dict[str, Any],
    *,
    inputs: dict[str, str],
    seconds: float,
    device: torch.device,
) -> None:
    """The student's folder in timm's local-dir form, then its receipt, which alone says how fast it was made."""
    ledger = item.spec.ledger()
    key = f"student/{item.name}"
    with ledger.store.built_folder() as built:
        save_classifier(classifier, built, class_names=item.spec.dataset().class_names, extra=facts)
        weights = built / "model.safetensors"
        files = {path.name: sha256_of_file(path) for path in sorted(built.iterdir())}
        receipt = Receipt(
            stage=DISTILL,
            name=item.name,
            unit_id=content_hash([config_hash(item.spec.config), item.name]),
            key=f"{key}/model.safetensors",
            rows=1,
            bytes=weights.stat().st_size,
            sha256=files[weights.name],
            seconds=seconds,
            inputs=inputs,
            fingerprint=fingerprint(device),
            details={**facts, **measured, "files": files},
        )
        check_epoch(ledger.store, item.spec.epoch)
        # What is there was trained from other inputs, or left without a receipt.
        ledger.store.publish_folder(built, key)
        ledger.write_receipt(receipt)
