"""Evaluate: how alike the images of a class are, beside as many real ones."""

import math

import numpy as np
import torch

from prism_ray.config import LabelKind
from prism_ray.ledger import read_table
from prism_ray.lock import check_epoch
from prism_ray.methods.metrics import intra_class_cosine
from prism_ray.stages.device import deterministic, pick_device, teacher_of
from prism_ray.stages.views import decode_images
from prism_ray.storage import to_json
from prism_ray.work import DIVERSITY, DiversityItem, student_inputs

BATCH = 512


@torch.no_grad()
def measure_diversity(item: DiversityItem) -> None:
    """Publish the intra-class cosine similarity of a run's images and of as many first real training images.

    Features are the pooled ones of a network outside the pool where the recipe names one. NaN, which one image per
    class gives, is stored as null.
    """
    spec = item.spec
    config, ledger, dataset = spec.config, spec.ledger(), spec.dataset()
    inputs = student_inputs(ledger, LabelKind.hard)
    if item.is_done:
        return
    device = pick_device(config.compute.gpus_per_train_worker)
    name = config.evaluate.feature_model or config.teachers.primary
    tables = [read_table(ledger.store, key) for key in sorted(inputs)]
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
    cosine = {"feature_model": name, **{key: None if math.isnan(v) else v for key, v in values.items()}}
    check_epoch(ledger.store, spec.epoch)
    ledger.store.put(DIVERSITY, to_json({"inputs": inputs, "cosine": cosine}))
