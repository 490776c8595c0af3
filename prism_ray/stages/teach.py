"""Teach: a teacher trained on real data, or one from elsewhere checked against it, as a content-addressed artifact.

An artifact is a folder in timm's local-dir form, named by everything that decides its content, so every run with the
same settings uses the same one. It appears whole or not at all.
"""

import math
import time
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from prism_ray.artifacts import StoredFile, join, local_folder, publish_built, split
from prism_ray.data.imagenet_names import class_names_like
from prism_ray.data.prepared import PreparedDataset
from prism_ray.errors import InputError, within
from prism_ray.methods.distillation import batch_of_step, hard_loss
from prism_ray.methods.inversion.matching import Network, observed_distances
from prism_ray.methods.inversion.objective import num_bn_layers
from prism_ray.methods.inversion.statistics import targets_of
from prism_ray.methods.views import ViewParameters, crop_flip, render
from prism_ray.models.classifier import Classifier, load_classifier, load_timm, save_classifier
from prism_ray.models.flops import forward_flops
from prism_ray.models.imagenet_lite import load_imagenet_lite
from prism_ray.seeds import seed_for
from prism_ray.stages.device import deterministic, fingerprint, pick_device, untrained
from prism_ray.stages.training import (
    Checkpoints,
    Course,
    Forward,
    fit,
    in_batches,
    num_parameters,
    one_cycle_lr,
)
from prism_ray.weights import LITE
from prism_ray.work import TeacherItem

BN_IMAGES = 100
"""Real images at most that a teacher's batch-norm statistics are compared with."""


def make_teacher(item: TeacherItem) -> None:
    """Train or adopt one teacher; nothing to do if its folder is there."""
    if item.is_done:
        return
    dataset = PreparedDataset.open(item.dataset_dir)
    device = pick_device(item.gpus)
    started = time.perf_counter()
    with deterministic(item.threads):
        classifier = (
            _trained(item, dataset, device) if item.teacher.source == "train" else _adopted(item, dataset, device)
        )
        classifier.eval()
        named = _named_as(classifier, dataset, device)
        first, rest = bn_distances(classifier, dataset, device)
        flops = forward_flops(classifier, image_size=dataset.image_size, in_chans=dataset.channels)
    facts = {
        "accuracy": _accuracy(named),
        "order": class_order(named),
        "architecture": classifier.architecture,
        "num_params": num_parameters(classifier),
        "forward_flops": flops,
        "num_bn_layers": num_bn_layers(classifier),
        "bn_distance_first": first,
        "bn_distance_rest": rest,
        "class_names_hash": dataset.class_names_hash,
        "dataset": dataset.content_hash,
        "source": item.teacher.source,
        "fingerprint": fingerprint(device),
        "seconds": time.perf_counter() - started,
    }
    publish_built(
        item.folder,
        lambda built: save_classifier(classifier, built, class_names=dataset.class_names, extra=facts),
    )
    checkpoint_of(item).remove()


@torch.no_grad()
def bn_distances(
    classifier: Classifier, dataset: PreparedDataset, device: torch.device
) -> tuple[float | None, float | None]:
    """How far real images are from a teacher's batch-norm statistics: D of its first layer, and the sum of the others.

    The scale of the statistics term, see `methods.inversion.matching`. Of the first images of the training split, one
    of each class before the second of any, without augmentation; None without batch norm or without images.
    """
    rows = [int(row) for rank in zip_longest(*dataset.rows_by_class("train")) for row in rank if row is not None]
    if not rows or not num_bn_layers(classifier):
        return None, None
    images = torch.from_numpy(dataset.images("train", rows[:BN_IMAGES])).to(device).float() / 255
    network = Network(classifier, targets_of(classifier, None, conv=False))
    with observed_distances(network, stops_when_complete=True) as distances:
        classifier(images)
    first = distances.pop(0)
    return first.item(), sum(d.item() for d in distances.values())


def _named_as(classifier: Classifier, dataset: PreparedDataset, device: torch.device) -> np.ndarray:
    """How many held-out images of each class (rows) a classifier takes for each class (columns): int64 (K, K)."""
    labels, num_classes = dataset.labels("test"), dataset.num_classes
    counts = np.zeros((num_classes, num_classes), dtype=np.int64)
    if len(labels):
        logits = in_batches(
            classifier, lambda rows: torch.from_numpy(dataset.images("test", rows)), len(labels), device
        )
        np.add.at(counts, (labels, logits.argmax(dim=1).numpy()), 1)
    return counts


def _accuracy(named: np.ndarray) -> float | None:
    """Held-out top-1, 0 to 1; None without images."""
    return float(np.trace(named) / named.sum()) if named.any() else None


def class_order(named: np.ndarray) -> dict[str, Any] | None:
    """How well a classifier would do if its outputs meant other classes: tells another class order from ignorance.

    Args:
        named: images of each class (rows) by the class they are taken for (columns), (K, K).

    Returns:
        The best accuracy over all one-to-one assignments of outputs to classes, and a class with the output that the
        assignment gives it: of those that differ, the one with most images. None without images, or where no other
        assignment is better.
    """
    classes, outputs = linear_sum_assignment(named, maximize=True)
    moved = classes != outputs
    if not moved.any() or named[classes, outputs].sum() <= np.trace(named):
        return None
    hits = np.where(moved, named[classes, outputs], -1)
    pair = int(hits.argmax())
    matched = float(named[classes, outputs].sum() / named.sum())
    return {"matched_accuracy": matched, "class": int(classes[pair]), "output": int(outputs[pair])}


def checkpoint_of(item: TeacherItem) -> StoredFile:
    """File of an unfinished training."""
    parent, name = split(item.folder)
    return StoredFile.at(join(parent, f".{name}.checkpoint.safetensors"))


def _trained(item: TeacherItem, dataset: PreparedDataset, device: torch.device) -> Classifier:
    teach = item.teach
    assert item.teacher.arch is not None
    with within(f"teachers.models.{item.name}"):
        seed = seed_for(teach.seed, "teacher", item.name)
        classifier = untrained(dataset, item.teacher.arch, item.teacher.model_args, seed=seed).to(device)
    pixels = torch.from_numpy(dataset.images("train"))
    class_ids = torch.tensor(dataset.labels("train"))
    keys = np.array([seed_for(teach.seed, "view", n) for n in range(len(pixels))], dtype=np.int64)
    order_seed = seed_for(teach.seed, "order", item.name)
    num_steps = teach.epochs * math.ceil(len(pixels) / teach.batch_size)

    def prepare(step: int) -> _Batch:
        indices, epochs = batch_of_step(order_seed, step, num_images=len(pixels), batch_size=teach.batch_size)
        views = crop_flip(
            keys[indices], epochs, crop_area_min=teach.crop_area_min, flip_probability=teach.flip_probability
        )
        chosen = torch.from_numpy(indices)
        return _Batch(pixels[chosen], views, class_ids[chosen])

    def loss_of(forward: Forward, batch: _Batch) -> Tensor:
        shown = render(batch.pixels.to(device).float() / 255, batch.views)
        return hard_loss(forward(shown), batch.class_ids.to(device))

    course = Course(
        name=f"teacher {item.name} (teach.lr={teach.lr:g})",
        num_steps=num_steps,
        num_images=len(pixels),
        batch_size=teach.batch_size,
        lr_of_step=lambda step: one_cycle_lr(teach.lr, step=step, total=num_steps),
        weight_decay=teach.weight_decay,
        seed=order_seed,
    )
    checkpoints = Checkpoints(file=checkpoint_of(item), every=teach.checkpoint_every, identity=split(item.folder)[1])
    trained, _ = fit(classifier, course, prepare=prepare, loss_of=loss_of, checkpoints=checkpoints)
    return trained


@dataclass(frozen=True)
class _Batch:
    """Images of a step as stored, the views to show of them, and their classes."""

    pixels: Tensor  # (B, C, H, W) uint8
    views: ViewParameters
    class_ids: Tensor  # (B,)
    order_hash: int = 0

    @property
    def num_images(self) -> int:
        return len(self.pixels)


def _adopted(item: TeacherItem, dataset: PreparedDataset, device: torch.device) -> Classifier:
    teacher = item.teacher
    if teacher.source.startswith("timm:"):
        classifier = load_timm(teacher.source, allow_pickle=teacher.allow_pickle)
    elif teacher.source.startswith(LITE):
        names = class_names_like(dataset.class_names)
        classifier = load_imagenet_lite(teacher.source, input_size=dataset.image_size, class_names=names)
    else:
        classifier = load_classifier(local_folder(teacher.source), allow_pickle=teacher.allow_pickle)
    if classifier.num_classes != dataset.num_classes:
        raise InputError(
            f"teachers.models.{item.name}: {teacher.source} tells {classifier.num_classes} classes apart, the data set "
            f"{dataset.name} has {dataset.num_classes}; choose a teacher of this data set"
        )
    if classifier.class_names is not None and list(classifier.class_names) != dataset.class_names:
        differing = next(i for i, n in enumerate(classifier.class_names) if n != dataset.class_names[i])
        raise InputError(
            f"teachers.models.{item.name}: class {differing} is {classifier.class_names[differing]!r} for "
            f"{teacher.source} and {dataset.class_names[differing]!r} in the data set {dataset.name}; bring the "
            "classes into the same order"
        )
    return classifier.to(device)
