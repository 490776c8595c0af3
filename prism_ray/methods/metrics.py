"""Measurements on logits and features.

Shapes: B images, K classes, D features.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def top1(logits: Tensor, class_ids: Tensor) -> float:
    """Share of images, 0 to 1, whose largest logit is their class; of equal logits the first counts."""
    if logits.ndim != 2 or class_ids.shape != logits.shape[:1] or len(logits) == 0:
        shapes = f"logits {tuple(logits.shape)}, class_ids {tuple(class_ids.shape)}"
        raise ValueError(f"{shapes}; expected (B, K) and (B,) of at least one image")
    return (logits.argmax(dim=1) == class_ids).double().mean().item()


def top_k_hits(logits: Tensor, class_ids: Tensor, *, k: int) -> int:
    """Number of images whose class is among the `k` largest logits; of equal logits those of smaller ids count."""
    top1(logits, class_ids)  # refuses other shapes
    own = logits.gather(1, class_ids[:, None])
    smaller_ids = torch.arange(logits.shape[1]) < class_ids[:, None]
    rank = ((logits > own) | ((logits == own) & smaller_ids)).sum(dim=1)
    return int((rank < k).sum())


def confusion(logits: Tensor, class_ids: Tensor) -> Tensor:
    """How many images of a class (row) are taken for each class (column): (K, K) int64; of equal logits the first."""
    top1(logits, class_ids)  # refuses other shapes
    num_classes = logits.shape[1]
    counts = torch.bincount(class_ids * num_classes + logits.argmax(dim=1), minlength=num_classes**2)
    return counts.view(num_classes, num_classes)


def principal_axes(features: Tensor, *, num_axes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where features (N, D) vary most: their mean (D,), axes (D, A) of length 1, shares of the variance (A,).

    A is `num_axes`, or D if that is less. The largest entry of an axis is positive, so that it has one direction. In
    double precision; without any variance the shares are 0. ValueError for other shapes and no features.
    """
    if features.ndim != 2 or not features.numel() or num_axes < 1:
        raise ValueError(f"features {tuple(features.shape)}, num_axes={num_axes}; expected (N, D), at least 1")
    features = features.double()
    mean = features.mean(dim=0)
    centered = features - mean
    variances, axes = torch.linalg.eigh(centered.T @ centered)
    axes = axes.flip(1)[:, :num_axes]
    signs = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()
    total = variances.clamp(min=0).sum()
    shares = variances.clamp(min=0).flip(0)[:num_axes] / total.clamp(min=torch.finfo(torch.float64).tiny)
    return mean, axes * signs, shares


def intra_class_cosine(features: Tensor, class_ids: Tensor) -> tuple[float, float]:
    """Mean pairwise cosine similarity of the images of a class: (mean, population std) over classes, each -1 to 1.

    With unit features u and n images of a class, s = (|sum u|^2 - sum |u|^2) / (n (n - 1)), which is the mean of the
    Gram matrix off its diagonal. Classes of one image have no pair and are left out; if no class is left, (NaN, NaN).
    A feature of length 0 has similarity 0 to all.
    """
    return _over_classes(_pairwise_cosine, features, class_ids)


def vendi_score(features: Tensor, class_ids: Tensor) -> tuple[float, float]:
    """Vendi score of the images of a class: (mean, population std) over classes, each 1 to the class's images.

    exp of the Shannon entropy of the eigenvalues of K / n, with K the cosine similarities of the n images: the number
    of images that would be as diverse if none resembled another.
    Source: Friedman and Dieng 2023 (arXiv:2210.02410), order 1.
    """
    return _over_classes(lambda units: _exp_entropy(_eigenvalues(units)), features, class_ids)


def effective_rank(features: Tensor, class_ids: Tensor) -> tuple[float, float]:
    """Effective rank of the features of a class: (mean, population std) over classes, each 1 to the class's images.

    exp of the Shannon entropy of the singular values of the class's matrix of unit features, divided by their sum; the
    features are not centered.
    Source: Roy and Vetterli 2007, definition 1.
    """
    return _over_classes(lambda units: _exp_entropy(_eigenvalues(units).sqrt()), features, class_ids)


def _over_classes(measure: Callable[[Tensor], float], features: Tensor, class_ids: Tensor) -> tuple[float, float]:
    """Mean and population std over classes of a measure of their unit features (n, D); of no value (NaN, NaN).

    One class at a time in double precision: features may be pixels, which are many.
    """
    if features.ndim != 2 or class_ids.shape != features.shape[:1]:
        raise ValueError(f"features {tuple(features.shape)}, class_ids {tuple(class_ids.shape)}; expected (B, D), (B,)")
    features, class_ids = features.detach().cpu(), class_ids.cpu()
    found = []
    for class_id in torch.unique(class_ids):
        own = features[class_ids == class_id].double()
        found.append(measure(torch.nn.functional.normalize(own, dim=1, eps=1e-300)))
    values = torch.tensor([value for value in found if not math.isnan(value)], dtype=torch.float64)
    if not len(values):
        return math.nan, math.nan
    return values.mean().item(), values.std(correction=0).item()


def _pairwise_cosine(units: Tensor) -> float:
    n = len(units)
    if n < 2:
        return math.nan
    return ((units.sum(dim=0).square().sum() - units.square().sum()) / (n * (n - 1))).item()


def _eigenvalues(units: Tensor) -> Tensor:
    """Eigenvalues above 0 of the cosine similarities of unit features (n, D); length 0 resembles nothing but itself."""
    is_zero = units.square().sum(dim=1) == 0
    gram = units.T @ units if units.shape[1] < len(units) else units @ units.T
    values = torch.linalg.eigvalsh(gram).clamp(min=0)
    values = values[values > len(units) * torch.finfo(values.dtype).eps]
    return torch.cat([values, values.new_ones(int(is_zero.sum()))])


def _exp_entropy(weights: Tensor) -> float:
    """exp of the Shannon entropy of weights above 0, divided by their sum."""
    shares = weights / weights.sum()
    return torch.exp(-(shares * shares.log()).sum()).item()
