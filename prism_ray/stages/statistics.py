"""Statistics: one pass of the real training images through a teacher, for targets that its batch norm doesn't carry.

<artifacts>/statistics/<teacher>-<hash>/
    statistics.safetensors      see `methods.inversion.statistics.Moments`
    prism_ray.json              settings, number of layers, seconds
"""

import time

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import nn

from prism_ray.artifacts import local_folder, publish_files
from prism_ray.identity import plain
from prism_ray.methods.inversion.statistics import LayerTarget, Moments, matched_layers, targets_of
from prism_ray.methods.views import crop_flip, render
from prism_ray.plan import has_statistics, needs_statistics_pass
from prism_ray.seeds import seed_for
from prism_ray.stages.device import deterministic, fingerprint, load_frozen, pick_device
from prism_ray.stages.real_images import real_batches
from prism_ray.work import STATISTICS_FILE, RunSpec, StatisticsItem, open_dataset

BATCH = 256
"""Images per forward pass, as in G-VBSM's released program; sums are exact enough not to depend on it."""


def make_statistics(item: StatisticsItem) -> None:
    """Measure one teacher; nothing to do if its folder is there.

    Every image is shown once, cropped and flipped by its own seed.
    """
    if item.is_done:
        return
    settings, dataset, device = item.settings, open_dataset(item.dataset_dir), pick_device(item.gpus)
    teacher = load_frozen(item.teacher_dir, str(device))
    class_ids = torch.tensor(dataset.labels("train"))
    keys = np.array([seed_for(0, "statistics", row) for row in range(len(class_ids))], dtype=np.int64)
    started = time.perf_counter()
    with deterministic(settings.threads):
        moments = Moments(
            teacher,
            conv=settings.conv,
            patch_size=settings.patch_size,
            num_classes=dataset.num_classes if settings.class_wise else None,
        )
        for rows, pixels in real_batches(dataset, np.arange(len(class_ids)), batch_size=BATCH):
            views = crop_flip(
                keys[rows],
                np.zeros(len(rows), dtype=np.int64),
                crop_area_min=settings.crop_area_min,
                flip_probability=settings.flip_probability,
            )
            moments.observe(render(pixels.to(device).float() / 255, views), class_ids[rows].to(device))
        tensors = {name: tensor.cpu().contiguous() for name, tensor in moments.tensors().items()}
    facts = {
        "settings": plain(settings),
        "num_layers": len(matched_layers(teacher, conv=settings.conv)),
        "num_images": len(class_ids),
        "fingerprint": fingerprint(device),
        "seconds": time.perf_counter() - started,
    }
    publish_files(item.folder, {STATISTICS_FILE: save(tensors)}, facts=facts)


def targets_for(spec: RunSpec, name: str, teacher: nn.Module, device: torch.device) -> tuple[LayerTarget, ...]:
    """What a run matches of one of its teachers: batch norm's own statistics, and those that were measured."""
    tensors = None
    if needs_statistics_pass(spec.config) and has_statistics(spec.config, name):
        tensors = load_file(local_folder(spec.statistics_dirs[name]) / STATISTICS_FILE, device=str(device))
    return targets_of(teacher, tensors, conv=spec.config.method.conv_statistics)
