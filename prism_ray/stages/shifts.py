"""Students on shifted test images: held-out ones under corruptions and attributes, and sets of other domains."""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from prism_ray.data.prepared import PreparedDataset
from prism_ray.data.records import SPLITS, Split
from prism_ray.data.shifted import class_ids_in
from prism_ray.methods.attributes import apply_shift
from prism_ray.models.classifier import Classifier
from prism_ray.seeds import seed_for
from prism_ray.stages.held_out import held_out_rows
from prism_ray.stages.training import accuracy
from prism_ray.work import RunSpec, open_dataset

CHUNK = 256


def shifted_accuracies(classifier: Classifier, spec: RunSpec, device: torch.device) -> dict[str, float]:
    """Top-1, 0 to 1, of a student on every shifted set of `evaluate`, by its name.

    Corruptions and attributes change the first `evaluate.shift_images` held-out images of each class, always in the
    same way. Of a set with fewer classes only these are answered, as is the custom for ImageNet-A and ImageNet-R.
    """
    evaluate, found = spec.config.evaluate, {}
    if evaluate.shifts:
        split, rows = held_out_rows(spec)
        rows = _first_rows(spec.dataset(), split, rows, evaluate.shift_images)
        labels = spec.dataset().labels(split)[rows]
        for shift in evaluate.shifts:
            pixels = _shifted(spec.dataset_dir, split, tuple(rows.tolist()), shift)
            found[shift] = accuracy(classifier, lambda places, shown=pixels: shown[places], labels, device)
    for name, folder in spec.shifted_dirs.items():
        found[name] = _accuracy_on(classifier, open_dataset(folder), spec.dataset().class_names, name, device)
    return found


def _first_rows(dataset: PreparedDataset, split: Split, rows: np.ndarray, number: int) -> np.ndarray:
    """The first rows of each class, in source order."""
    class_ids = dataset.labels(split)[rows]
    return np.sort(np.concatenate([rows[class_ids == c][:number] for c in np.unique(class_ids)]))


@lru_cache(maxsize=32)
def _shifted(dataset_dir: str, split: Split, rows: tuple[int, ...], shift: str) -> Tensor:
    """Shifted images (N, C, H, W) uint8, the same for every student."""
    images, parts = open_dataset(dataset_dir).images(split, list(rows)), []
    for start in range(0, len(rows), CHUNK):
        seeds = [seed_for(0, "shift", shift, row) for row in rows[start : start + CHUNK]]
        clean = torch.from_numpy(images[start : start + CHUNK]).float() / 255
        parts.append((apply_shift(clean, shift, seeds) * 255).round().to(torch.uint8))
    return torch.cat(parts)


def _accuracy_on(
    classifier: Classifier, shifted: PreparedDataset, class_names: list[str], name: str, device: torch.device
) -> float:
    columns = torch.tensor(class_ids_in(class_names, shifted.class_names, name=name), device=device)
    splits: list[Split] = [split for split in SPLITS if shifted.num_images(split)]
    hits = [
        shifted.num_images(split)
        * accuracy(
            lambda images: classifier(images)[:, columns],
            lambda rows, split=split: torch.from_numpy(shifted.images(split, rows)),
            shifted.labels(split),
            device,
        )
        for split in splits
    ]
    return sum(hits) / sum(shifted.num_images(split) for split in splits)
