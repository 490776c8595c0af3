"""Evaluate: how alike the images of a class are, how like real ones all of them are, and what teachers make of them."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from prism_ray.data.prepared import PreparedDataset
from prism_ray.data.records import Split
from prism_ray.ledger import read_table
from prism_ray.lock import check_epoch
from prism_ray.methods.metrics import effective_rank, intra_class_cosine, top_k_hits, vendi_score
from prism_ray.methods.set_metrics import nearer_share, nearest
from prism_ray.options import LabelKind
from prism_ray.plan import energy_teachers, needs_generator
from prism_ray.stages.device import deterministic, pick_device, teacher_of
from prism_ray.stages.held_out import held_out_rows
from prism_ray.stages.set_measures import Compared, energy_measures, equal_rows, points, set_measures
from prism_ray.stages.training import confusion_of, in_batches
from prism_ray.stages.views import decode_images
from prism_ray.storage import to_json
from prism_ray.work import DIVERSITY, DIVERSITY_VERSION, DiversityItem, RunSpec, student_inputs

NEIGHBORS_PER_CLASS, NEIGHBOR_CLASSES = 10, 100
"""Images of which the nearest real one is looked for: those that a report's gallery can show."""
MOST_TRAINING = 20_000
"""Real training images among which it is looked for, the first of each class."""
MEASURES = {"cosine": intra_class_cosine, "vendi": vendi_score, "effective_rank": effective_rank}


@torch.no_grad()
def measure_diversity(item: DiversityItem) -> None:
    """Publish how alike a run's images are in each feature space, beside as many first real training images of each of
    their classes; how they lie among held-out real images; and how many of them each judge names correctly.

    NaN, which one image per class gives, is stored as null, like all real values where the data set has no images.
    """
    spec = item.spec
    config, ledger, dataset = spec.config, spec.ledger(), spec.dataset()
    inputs = student_inputs(ledger, LabelKind.hard)
    if item.is_done:
        return
    device = pick_device(config.compute.gpus_per_train_worker)
    tables = [read_table(ledger.store, key) for key in sorted(inputs)]
    pixels = np.concatenate([decode_images(table) for table in tables])
    class_ids = np.concatenate([table["label"].to_numpy() for table in tables])
    rows = _real_rows(dataset, class_ids)
    real, real_ids = dataset.images("train", rows), dataset.labels("train")[rows]
    compared = _compared(spec, pixels, class_ids)
    spaces = []
    with deterministic(config.compute.threads):
        for space, name in _spaces(spec).items():
            features = _features(spec, name, device)
            own = _measured(features(pixels), class_ids)
            beside = _measured(features(real), real_ids) if len(rows) else dict.fromkeys(MEASURES)
            measures = {key: _named(own[key]) | _named(beside[key], "real_") for key in MEASURES}
            against = {} if compared is None else set_measures(compared, features)
            spaces.append({"space": space, "model": name, **measures, **against})
        first = _features(spec, next(iter(_spaces(spec).values())), device)
        plane = None if compared is None else points(compared, first)
        neighbors = _neighbors(spec, tables, pixels, class_ids, device)
        confusions = [found for name in _steering(spec)[:1] if (found := _confusion(spec, name, device))]
        energies = [] if compared is None else [_energies(spec, name, compared, device) for name in _steering(spec)]
        judges = [_judged(spec, name, pixels, class_ids, device) for name in config.evaluate.judges]
    content = {
        "version": DIVERSITY_VERSION,
        "inputs": inputs,
        "spaces": spaces,
        "energies": energies,
        "judges": judges,
        "points": plane,
        "neighbors": neighbors,
        "confusions": confusions,
    }
    check_epoch(ledger.store, spec.epoch)
    ledger.store.put(DIVERSITY, to_json(content))


def _neighbors(
    spec: RunSpec, tables: Sequence[pa.Table], pixels: np.ndarray, class_ids: np.ndarray, device: torch.device
) -> dict[str, Any] | None:
    """The nearest real training image of the first images of each class, in the features that tables show.

    Beside it how near held-out real images are to them: nearer ones are remembered. None without both kinds.
    """
    dataset, (split, held_out) = spec.dataset(), held_out_rows(spec)
    by_class = [rows for c, rows in enumerate(dataset.rows_by_class("train")) if c in class_ids]
    reserved = set(held_out.tolist()) if split == "train" else set()
    most = max(1, MOST_TRAINING // len(by_class))
    pool = np.array([row for rows in by_class for row in [r for r in rows.tolist() if r not in reserved][:most]])
    if not len(pool) or not len(held_out):
        return None
    order = np.lexsort((np.concatenate([table["index_in_class"].to_numpy() for table in tables]), class_ids))
    shown = [order[class_ids[order] == c][:NEIGHBORS_PER_CLASS] for c in np.unique(class_ids)[:NEIGHBOR_CLASSES]]
    chosen, beside_ids = np.concatenate(shown), dataset.labels(split)[held_out]
    beside = np.concatenate(
        [held_out[beside_ids == c][:NEIGHBORS_PER_CLASS] for c in np.unique(beside_ids)[:NEIGHBOR_CLASSES]]
    )
    name = next(iter(_spaces(spec).values()))
    assert name is not None, "pixels as they are come last"
    teacher = teacher_of(spec, name, device)

    def real(split: Split, rows: np.ndarray) -> Tensor:
        return in_batches(
            teacher.features, lambda places: torch.from_numpy(dataset.images(split, rows[places])), len(rows), device
        )

    training = real("train", pool)
    distances, places = nearest(_features(spec, name, device)(pixels[chosen]), training)
    usual, _ = nearest(real(split, beside), training)
    image_ids = np.concatenate([table["image_id"].to_numpy(zero_copy_only=False) for table in tables])
    rows = pool[places.numpy()]
    return {
        "model": name,
        "num_training": len(pool),
        "num_images": len(chosen),
        "nearer_share": nearer_share(distances, usual),
        "images": [
            [str(image_ids[n]), int(row), float(f"{distance:.4g}")]
            for n, row, distance in zip(chosen, rows, distances.tolist(), strict=True)
        ],
    }


def _confusion(spec: RunSpec, name: str, device: torch.device) -> dict[str, Any] | None:
    """What a teacher takes held-out real images for; None without any, and of more classes than can be looked at."""
    (split, rows), dataset = held_out_rows(spec), spec.dataset()
    if not len(rows):
        return None
    teacher = teacher_of(spec, name, device)
    matrix = confusion_of(
        teacher, lambda places: dataset.images(split, rows[places]), dataset.labels(split)[rows], device
    )
    return None if matrix is None else {"name": name, "matrix": matrix}


def _compared(spec: RunSpec, pixels: np.ndarray, class_ids: np.ndarray) -> Compared | None:
    """Equal numbers of a run's images and of real ones, None if they are too few to be compared."""
    dataset, (split, held_out) = spec.dataset(), held_out_rows(spec)
    sets = {"fake": class_ids, "held_out": dataset.labels(split)[held_out]}
    most = spec.config.evaluate.set_images
    chosen = equal_rows(sets, most=most)
    if chosen is None:
        return None
    # Not those held out of it: the sets are to be disjoint.
    training = np.setdiff1d(np.arange(dataset.num_images("train")), held_out if split == "train" else [])
    beside = equal_rows({**sets, "training": dataset.labels("train")[training]}, most=most)
    is_equal = beside is not None and len(beside["fake"]) == len(chosen["fake"])
    return Compared(
        pixels[chosen["fake"]],
        dataset.images(split, held_out[chosen["held_out"]]),
        dataset.images("train", training[beside["training"]]) if beside is not None and is_equal else None,
        class_ids[chosen["fake"]],
    )


def _steering(spec: RunSpec) -> list[str]:
    """Whose energies are measured: those that steer samples, else the primary's."""
    config = spec.config
    return (energy_teachers(config) if needs_generator(config) else []) or [config.teachers.primary]


def _energies(spec: RunSpec, name: str, compared: Compared, device: torch.device) -> dict[str, Any]:
    teacher = teacher_of(spec, name, device)
    return energy_measures(
        compared,
        name,
        lambda pixels: in_batches(teacher, _rows_of(pixels), len(pixels), device),
        temperature=spec.config.method.guidance.temperature,
    )


def _real_rows(dataset: PreparedDataset, class_ids: np.ndarray) -> np.ndarray:
    """Rows of the first real images of each class that there are images of, as many as of the largest; maybe none."""
    largest, by_class = int(np.bincount(class_ids).max()), dataset.rows_by_class("train")
    return np.concatenate([by_class[class_id][:largest] for class_id in np.unique(class_ids)])


def _spaces(spec: RunSpec) -> dict[str, str | None]:
    """The teacher whose features each space has, None for raw pixels; the one that tables show comes first."""
    config = spec.config
    primary, feature_model = config.teachers.primary, config.evaluate.feature_model
    held_out = {"held-out": feature_model} if feature_model not in (None, primary) else {}
    return {**held_out, "primary": primary, "raw": None}


def _features(spec: RunSpec, name: str | None, device: torch.device) -> Callable[[np.ndarray], Tensor]:
    """From pixels (B, C, H, W) uint8 to features (B, D) on the CPU: pooled ones of a teacher, or the pixels' values."""
    if name is None:
        return lambda pixels: torch.from_numpy(pixels).flatten(1)
    teacher = teacher_of(spec, name, device)
    return lambda pixels: in_batches(teacher.features, _rows_of(pixels), len(pixels), device)


def _measured(features: Tensor, class_ids: np.ndarray) -> dict[str, tuple[float, float]]:
    return {key: measure(features, torch.tensor(class_ids)) for key, measure in MEASURES.items()}


def _named(value: tuple[float, float] | None, prefix: str = "") -> dict[str, float | None]:
    mean, std = value or (None, None)
    return {f"{prefix}{name}": None if v is None or math.isnan(v) else v for name, v in (("mean", mean), ("std", std))}


def _judged(
    spec: RunSpec, name: str, pixels: np.ndarray, class_ids: np.ndarray, device: torch.device
) -> dict[str, Any]:
    """How many images have their class as a teacher's first answer, and among its first five."""
    logits = in_batches(teacher_of(spec, name, device), _rows_of(pixels), len(pixels), device)
    hits = {f"top{k}_hits": top_k_hits(logits, torch.tensor(class_ids), k=k) for k in (1, 5)}
    return {"judge": name, "num_images": len(class_ids), **hits}


def _rows_of(pixels: np.ndarray) -> Callable[[np.ndarray], Tensor]:
    return lambda rows: torch.from_numpy(pixels[rows])
