"""Measurements on logits and features.

Shapes: B images, K classes, D features.
"""

import math

import torch
from torch import Tensor


def top1(logits: Tensor, class_ids: Tensor) -> float:
    """Share of images, 0 to 1, whose largest logit is their class; of equal logits the first counts."""
    if logits.ndim != 2 or class_ids.shape != logits.shape[:1] or len(logits) == 0:
        shapes = f"logits {tuple(logits.shape)}, class_ids {tuple(class_ids.shape)}"
        raise ValueError(f"{shapes}; expected (B, K) and (B,) of at least one image")
    return (logits.argmax(dim=1) == class_ids).double().mean().item()


def intra_class_cosine(features: Tensor, class_ids: Tensor) -> tuple[float, float]:
    """Mean pairwise cosine similarity of the images of a class: (mean, population std) over classes, each -1 to 1.

    With unit features u and n images of a class, s = (|sum u|^2 - sum |u|^2) / (n (n - 1)), which is the mean of the
    Gram matrix off its diagonal. Classes of one image have no pair and are left out; if no class is left, (NaN, NaN).
    A feature of length 0 has similarity 0 to all.
    """
    if features.ndim != 2 or class_ids.shape != features.shape[:1]:
        raise ValueError(f"features {tuple(features.shape)}, class_ids {tuple(class_ids.shape)}; expected (B, D), (B,)")
    units = torch.nn.functional.normalize(features.detach().cpu().double(), dim=1, eps=1e-300)
    _, members, counts = torch.unique(class_ids.cpu(), return_inverse=True, return_counts=True)
    sums = units.new_zeros(len(counts), units.shape[1]).index_add_(0, members, units)
    squares = units.new_zeros(len(counts)).index_add_(0, members, units.square().sum(dim=1))
    paired = counts > 1
    if not paired.any():
        return math.nan, math.nan
    n = counts[paired].double()
    similarities = (sums.square().sum(dim=1) - squares)[paired] / (n * (n - 1))
    return similarities.mean().item(), similarities.std(correction=0).item()
