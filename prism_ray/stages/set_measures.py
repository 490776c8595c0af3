"""A run's images as one set beside held-out real ones: in the features of a network, and in a teacher's energies.

Equal numbers of each class on both sides, for every one of these measures moves with them. What real training images
reach against the same held-out ones is measured in the same way, for a measure alone says little.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prism_ray.methods.diffusion.energies import free_energy
from prism_ray.methods.metrics import principal_axes, top1
from prism_ray.methods.set_metrics import (
    auroc,
    class_agreement,
    class_coverage,
    class_precision_recall,
    effective_classes,
    fpr_at_tpr,
    histogram_overlap,
    precision_recall,
)
from prism_ray.models.extractors import fid, kid
from prism_ray.seeds import seed_for

NEIGHBOR, NEIGHBOR_OF_COVERAGE = 3, 5
KID_SUBSET = 100
BINS = 40
MOST_POINTS = 500


@dataclass(frozen=True)
class Compared:
    """Images of the same classes, as many of each: (N, C, H, W) uint8 of every set, N class ids."""

    fake: np.ndarray
    held_out: np.ndarray
    training: np.ndarray | None  # None where there are too few real training images
    class_ids: np.ndarray


def set_measures(compared: Compared, features_of: Callable[[np.ndarray], Tensor]) -> dict[str, Any]:
    """Measures of the images in one feature space, each beside those of real training images.

    Args:
        features_of: pixels (N, C, H, W) uint8 to features (N, D).
    """
    real, fake = features_of(compared.held_out), features_of(compared.fake)
    own = _of_one(real, fake)
    beside = {} if compared.training is None else _of_one(real, features_of(compared.training))
    ids = torch.from_numpy(compared.class_ids)
    by_class = class_coverage(real, ids, fake, ids, k=NEIGHBOR_OF_COVERAGE)
    of_classes = class_precision_recall(real, ids, fake, ids, k=NEIGHBOR)
    return {
        **{name: {"mean": value, "real_mean": beside.get(name)} for name, value in own.items()},
        "num_set": len(ids),
        "k": NEIGHBOR,
        "k_coverage": NEIGHBOR_OF_COVERAGE,
        "class_coverage": {str(class_id): share for class_id, share in by_class.items()},
        "class_precision": {str(class_id): precision for class_id, (precision, _) in of_classes.items()},
        "class_recall": {str(class_id): recall for class_id, (_, recall) in of_classes.items()},
    }


def points(compared: Compared, features_of: Callable[[np.ndarray], Tensor]) -> dict[str, Any]:
    """Images of both sets in the plane in which the real ones vary most, evenly chosen, at most `MOST_POINTS` of each.

    Args:
        features_of: pixels (N, C, H, W) uint8 to features (N, D).
    """
    real, fake = features_of(compared.held_out), features_of(compared.fake)
    mean, axes, shares = principal_axes(real, num_axes=2)
    chosen = np.unique(np.linspace(0, len(real) - 1, min(len(real), MOST_POINTS)).round().astype(int))

    def placed(features: Tensor) -> list[list[float]]:
        return [[float(f"{v:.4g}") for v in row] for row in ((features[chosen].double() - mean) @ axes).tolist()]

    class_ids = compared.class_ids[chosen].tolist()
    return {"shares": shares.tolist(), "class_ids": class_ids, "points": placed(fake), "real_points": placed(real)}


def _of_one(real: Tensor, fake: Tensor) -> dict[str, float | None]:
    found = precision_recall(real, fake, k=NEIGHBOR, k_coverage=NEIGHBOR_OF_COVERAGE)
    subset = min(KID_SUBSET, len(real))
    return {
        **{name: getattr(found, name) for name in ("precision", "recall", "density", "coverage")},
        # Of no more images than features a Frechet distance measures their number.
        "fid": fid(real, fake) if len(real) > real.shape[1] else None,
        "kid": kid(real, fake, subset_size=subset, seed=seed_for(0, "kid")),
    }


def energy_measures(
    compared: Compared, name: str, logits_of: Callable[[np.ndarray], Tensor], *, temperature: float
) -> dict[str, Any]:
    """A teacher's free energies of the images beside those of held-out real ones.

    Args:
        name: of the teacher.
        logits_of: pixels (N, C, H, W) uint8 to its logits (N, K).
    """
    logits = logits_of(compared.fake)
    own = free_energy(logits, temperature=temperature)
    real = free_energy(logits_of(compared.held_out), temperature=temperature)
    class_ids = torch.from_numpy(compared.class_ids)
    edges = np.histogram_bin_edges(torch.cat([own, real]).numpy(), bins=BINS)
    return {
        "teacher": name,
        "temperature": temperature,
        "num_images": len(own),
        "mean": own.mean().item(),
        "real_mean": real.mean().item(),
        "overlap": histogram_overlap(own, real, bins=BINS),
        "auroc": auroc(own, real),
        "fpr95": fpr_at_tpr(-real, -own),
        "agreement": top1(logits, class_ids),
        "effective_classes": effective_classes(logits),
        "class_agreement": {str(class_id): share for class_id, share in class_agreement(logits, class_ids).items()},
        "edges": edges.tolist(),
        "shares": _shares(own, edges),
        "real_shares": _shares(real, edges),
    }


def _shares(energies: Tensor, edges: np.ndarray) -> list[float]:
    counts, _ = np.histogram(energies.numpy(), bins=edges)
    return (counts / len(energies)).tolist()


def equal_rows(class_ids: Mapping[str, np.ndarray], *, most: int) -> dict[str, np.ndarray] | None:
    """The first rows of each class, as many of every class and set; None if a set lacks a class or all are too few.

    Args:
        class_ids: by set, of all its images; the classes are those of the first set.
        most: of each class.
    """
    classes = np.unique(next(iter(class_ids.values())))
    fewest = min(int((ids == c).sum()) for ids in class_ids.values() for c in classes)
    number = min(most, fewest)
    if number * len(classes) <= max(NEIGHBOR, NEIGHBOR_OF_COVERAGE):
        return None
    return {
        name: np.concatenate([np.flatnonzero(ids == c)[:number] for c in classes]) for name, ids in class_ids.items()
    }
