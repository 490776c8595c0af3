"""The real images that students and image sets are measured on, which no synthetic image was made from."""

import numpy as np

from prism_ray.data.records import Split
from prism_ray.options import EvaluationSplit
from prism_ray.plan import reserved_images
from prism_ray.work import RunSpec


def held_out_rows(spec: RunSpec) -> tuple[Split, np.ndarray]:
    """The split of `evaluate.split`, and its rows of the classes that the run has images of, in source order.

    `test`: the real test images. `validation`: the last `student.validation_images` real training images of each class,
    which no synthetic image starts from; the test images are not looked at.
    """
    dataset = spec.dataset()
    if spec.config.evaluate.split is EvaluationSplit.validation:
        return "train", reserved_rows(spec)
    return "test", np.flatnonzero(np.isin(dataset.labels("test"), spec.class_ids()))


def reserved_rows(spec: RunSpec) -> np.ndarray:
    """Real training images that `evaluate.split` keeps for measuring: those that the plan leaves out of each class."""
    by_class, reserved = spec.dataset().rows_by_class("train"), reserved_images(spec.config)
    return np.concatenate([by_class[c][max(0, len(by_class[c]) - reserved) :] for c in spec.class_ids()])
