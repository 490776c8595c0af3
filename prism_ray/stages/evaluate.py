"""Evaluate: how alike the images of a class are, beside as many real ones."""

import math
from typing import Any

import numpy as np
import torch

from prism_ray.ledger import read_table
from prism_ray.methods.metrics import intra_class_cosine
from prism_ray.stages.device import deterministic, pick_device, teacher_of
from prism_ray.stages.views import decode_images
from prism_ray.work import RunSpec

BATCH = 512


@torch.no_grad()
def measure_diversity(spec: RunSpec) -> dict[str, Any]:
    """Intra-class cosine similarity of the run's images and of the first real training images of each class.

    Features are the pooled ones of a network outside the pool where the recipe names one. JSON-ready; NaN, which one
    image per class gives, is null.
    """
    config, ledger, dataset = spec.config, spec.ledger(), spec.dataset()
    device = pick_device(config.compute.gpus_per_actor)
    name = config.evaluate.feature_model or config.teachers.primary
    tables = [read_table(ledger.store, receipt.key) for _, receipt in sorted(ledger.receipts("synthesize").items())]
    pixels = np.concatenate([decode_images(table) for table in tables])
    class_ids = np.concatenate([table["label"].to_numpy() for table in tables])
    largest = int(np.bincount(class_ids).max())
    rows = np.concatenate([rows[:largest] for rows in dataset.rows_by_class("train")])
    real_ids = dataset.labels("train")[rows]
    teacher = teacher_of(spec, name, device)

    def features(pixels: np.ndarray) -> torch.Tensor:
        parts = [torch.from_numpy(pixels[n : n + BATCH]).to(device).float() / 255 for n in range(0, len(pixels), BATCH)]
        return torch.cat([teacher.features(part).cpu() for part in parts])

    with deterministic(config.compute.threads):
        mean, std = intra_class_cosine(features(pixels), torch.tensor(class_ids))
        real_mean, real_std = intra_class_cosine(features(dataset.images("train", rows)), torch.tensor(real_ids))
    values = {"mean": mean, "std": std, "real_mean": real_mean, "real_std": real_std}
    return {"feature_model": name, **{key: None if math.isnan(v) else v for key, v in values.items()}}
