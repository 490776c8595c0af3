"""How a synthetic image set relates to real images, and what its logits alone say without any.

Shapes: N real and M fake (synthetic) images, D features, B images, K classes.
Source: Kynkäänniemi et al. 2019 (arXiv:1904.06991) for precision and recall, Naeem et al. 2020 (arXiv:2002.09797) for
density and coverage. All four are from balls: that of an image reaches to its k-th nearest neighbor in its own set, not
counting itself. Balls are closed here, so that a set covers itself; in the package `prdc` of Naeem et al. they are
open, which gives the same numbers where no distance equals a radius.

Distances are exact, in double precision, on the device of the features: by way of a matrix product an image would not
be at distance 0 from itself.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prism_ray.methods.metrics import top1

CHUNK = 256
"""Rows of distances held at a time: 100 MB of 50,000 columns."""


@dataclass(frozen=True)
class PrecisionRecall:
    """How much of either set lies in the balls of the other.

    Attributes:
        precision: share of fakes in a ball of a real image, 0 to 1; falls with fakes unlike any real image.
        recall: share of real images in a ball of a fake, 0 to 1; falls with real images unlike any fake.
        density: mean number of real balls a fake is in, by `k_coverage`; 0 to N / `k_coverage`. Expected are 1 of
            samples of one distribution, 1 + 1 / `k_coverage` of identical sets.
        coverage: share of real balls with a fake in them, 0 to 1; unlike recall not raised by a few fakes far out.
        n_real, n_fake: N and M.
        k, k_coverage: neighbor that gives a ball its radius, for precision and recall; for density and coverage.
        per_sample: by the name of each of the four, what it is the mean of: (M,) for precision and density, (N,) for
            recall and coverage. For `bootstrap_interval`.
    """

    precision: float
    recall: float
    density: float
    coverage: float
    n_real: int
    n_fake: int
    k: int
    k_coverage: int
    per_sample: Mapping[str, NDArray[np.float64]] = field(repr=False, compare=False)


def precision_recall(
    real: Tensor, fake: Tensor, *, k: int = 3, k_coverage: int = 5, chunk: int = CHUNK
) -> PrecisionRecall:
    """Precision, recall, density and coverage of features (M, D) of fakes against (N, D) of real images.

    All of them move with N and M: compare only numbers from the same N and the same M, and best take N = M. ValueError
    if a set has no k-th neighbors, or features that are not finite. `chunk` changes memory, not the result. Costs
    N^2 + M^2 + N M distances, of 0.25 us each with D = 512 on one core of a CPU.
    """
    _check_sizes(k=k, k_coverage=k_coverage, chunk=chunk)
    real, fake = _features("real", real), _features("fake", fake)
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"real {tuple(real.shape)}, fake {tuple(fake.shape)}; expected (N, D) and (M, D)")
    small_radii, large_radii = _radii("real", real, (k, k_coverage), chunk)
    (fake_radii,) = _radii("fake", fake, (k,), chunk)
    is_precise = torch.zeros(len(fake), dtype=torch.bool, device=fake.device)
    num_balls = torch.zeros(len(fake), dtype=torch.int64, device=fake.device)
    is_recalled, is_covered = [], []
    for start in range(0, len(real), chunk):
        rows = slice(start, start + chunk)
        distances = _distances(real[rows], fake)
        is_precise |= (distances <= small_radii[rows, None]).any(dim=0)
        is_recalled.append((distances <= fake_radii).any(dim=1))
        in_ball = distances <= large_radii[rows, None]
        num_balls += in_ball.sum(dim=0)
        is_covered.append(in_ball.any(dim=1))
    per_sample = {
        "precision": is_precise.double(),
        "recall": torch.cat(is_recalled).double(),
        "density": num_balls.double() / k_coverage,
        "coverage": torch.cat(is_covered).double(),
    }
    return PrecisionRecall(
        **{name: values.mean().item() for name, values in per_sample.items()},
        n_real=len(real),
        n_fake=len(fake),
        k=k,
        k_coverage=k_coverage,
        per_sample={name: values.cpu().numpy() for name, values in per_sample.items()},
    )


def class_coverage(
    real: Tensor, real_ids: Tensor, fake: Tensor, fake_ids: Tensor, *, k: int = 5, chunk: int = CHUNK
) -> dict[int, float]:
    """Coverage of the real images of each class by its fakes, 0 to 1, with balls among that class alone.

    0 for a class without a fake; a class of fewer than `k` + 1 real images has no ball and is left out. Classes of
    other numbers of images do not compare. ValueError for other shapes and features that are not finite.
    Source: this project, from Naeem et al. 2020.
    """
    _check_sizes(k=k, chunk=chunk)
    real, fake = _features("real", real), _features("fake", fake)
    if real_ids.shape != real.shape[:1] or fake_ids.shape != fake.shape[:1] or real.shape[1] != fake.shape[1]:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (real, real_ids, fake, fake_ids))
        raise ValueError(f"real, real_ids, fake, fake_ids: {shapes}; expected (N, D), (N,), (M, D), (M,)")
    coverages = {}
    for class_id in real_ids.unique().tolist():
        own, others = real[real_ids == class_id], fake[fake_ids == class_id]
        if len(own) <= k:
            continue
        (radii,) = _radii("real", own, (k,), chunk)
        is_covered = [
            (_distances(rows, others) <= row_radii[:, None]).any(dim=1)
            for rows, row_radii in zip(own.split(chunk), radii.split(chunk), strict=True)
        ]
        coverages[class_id] = torch.cat(is_covered).double().mean().item()
    return coverages


def class_precision_recall(
    real: Tensor, real_ids: Tensor, fake: Tensor, fake_ids: Tensor, *, k: int = 3, chunk: int = CHUNK
) -> dict[int, tuple[float, float]]:
    """`precision_recall` of each class alone: (precision, recall) with balls among its own images.

    A class of fewer than `k` + 1 images on either side has no ball and is left out. Classes of other numbers of images
    do not compare. ValueError for other shapes and features that are not finite.
    """
    _check_sizes(k=k, chunk=chunk)
    if real_ids.shape != real.shape[:1] or fake_ids.shape != fake.shape[:1]:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (real, real_ids, fake, fake_ids))
        raise ValueError(f"real, real_ids, fake, fake_ids: {shapes}; expected (N, D), (N,), (M, D), (M,)")
    found = {}
    for class_id in real_ids.unique().tolist():
        own, others = real[real_ids == class_id], fake[fake_ids == class_id]
        if min(len(own), len(others)) > k:
            measured = precision_recall(own, others, k=k, k_coverage=k, chunk=chunk)
            found[class_id] = (measured.precision, measured.recall)
    return found


def nearest(points: Tensor, pool: Tensor, *, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """Distance from each of (M, D) points to its nearest of (N, D) others, and which that is: (M,), (M,).

    Of equally near ones the first. ValueError for other shapes, an empty pool and features that are not finite.
    """
    _check_sizes(chunk=chunk, pool=len(pool))
    points, pool = _features("points", points), _features("pool", pool)
    if points.shape[1] != pool.shape[1]:
        raise ValueError(f"points {tuple(points.shape)}, pool {tuple(pool.shape)}; expected (M, D) and (N, D)")
    found = [_distances(rows, pool).min(dim=1) for rows in points.split(chunk)]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def nearer_share(distances: Tensor, usual: Tensor, *, quantile: float = 0.05) -> float:
    """Share of distances (M,) below a quantile of the usual ones (N,), 0 to 1: about `quantile` where they are alike.

    Of distances to the nearest training image it tells copies: new images have those of held-out real ones.
    """
    if not 0 < quantile < 1:
        raise ValueError(f"quantile={quantile}; expected above 0, below 1")
    distances, usual = _scores("distances", distances), _scores("usual", usual)
    return (distances < torch.quantile(usual, quantile)).double().mean().item()


def bootstrap_interval(
    indicators: NDArray[np.floating], *, seed: int, level: float = 0.95, draws: int = 1000
) -> tuple[float, float]:
    """Percentile bootstrap interval (low, high) of the mean of (N,) values, such as `PrecisionRecall.per_sample` has.

    The balls stay as they are: how they vary with the images that span them is not in the interval. ValueError for
    no values, values that are not finite, a level outside (0, 1) and no draws.
    Source: Efron 1979.
    """
    _check_sizes(draws=draws)
    if indicators.ndim != 1 or not len(indicators) or not 0 < level < 1:
        raise ValueError(f"indicators {indicators.shape}, level {level}; expected (N,) of at least one, 0 < level < 1")
    if not np.isfinite(indicators).all():
        raise ValueError("indicators has values that are not finite; expected none")
    rng = np.random.default_rng(seed)
    num = len(indicators)
    # One draw at a time: all of them at once would be draws x N indices.
    means = [indicators[rng.integers(num, size=num)].mean() for _ in range(draws)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def histogram_overlap(a: Tensor, b: Tensor, *, bins: int = 50) -> float:
    """Sum over bins of the smaller of two histograms' shares, (N,) and (M,) values: 1 identical, 0 disjoint.

    The bins are equal and reach from the smallest to the largest of all values, so that one value far out hides
    differences; sets that are less than a bin apart may share one. If all values are equal, 1.
    """
    _check_sizes(bins=bins)
    a, b = _scores("a", a), _scores("b", b)
    both = torch.cat([a, b])
    low, width = both.min(), both.max() - both.min()
    if width == 0:
        return 1.0
    num_a, num_b = (
        ((values - low) / width * bins).long().clamp(max=bins - 1).bincount(minlength=bins) for values in (a, b)
    )
    # In whole numbers, of which identical sets give exactly 1.
    return torch.minimum(num_a * len(b), num_b * len(a)).sum().item() / (len(a) * len(b))


def auroc(positives: Tensor, negatives: Tensor) -> float:
    """Share of the pairs of a positive's and a negative's score, (N,) and (M,), in which the positive's is larger.

    0 to 1, 0.5 where they cannot be told apart; equal scores count half. Of energies, which are low for what a network
    knows, give the negative. O((N + M) log M). ValueError for no scores and scores that are not finite.
    """
    positives, ordered = _scores("positives", positives), _scores("negatives", negatives).sort().values
    smaller, smaller_or_equal = (torch.searchsorted(ordered, positives, right=right).sum() for right in (False, True))
    return (smaller + smaller_or_equal).item() / (2 * len(positives) * len(ordered))


def fpr_at_tpr(positives: Tensor, negatives: Tensor, *, tpr: float = 0.95) -> float:
    """Share of negatives' scores (M,) at or above the largest threshold that a share `tpr` of positives' (N,) reach.

    0 to 1: 0 where the two are apart, about `tpr` where they are alike. Of energies give the negative. ValueError for
    a `tpr` outside (0, 1], no scores and scores that are not finite.
    """
    if not 0 < tpr <= 1:
        raise ValueError(f"tpr={tpr}; expected above 0, at most 1")
    positives, negatives = _scores("positives", positives), _scores("negatives", negatives)
    # Rounded, for 0.55 * 100 is a little more than 55, which would take a 56th.
    num_accepted = max(1, math.ceil(round(tpr * len(positives), 6)))
    threshold = positives.sort(descending=True).values[num_accepted - 1]
    return (negatives >= threshold).double().mean().item()


def class_agreement(logits: Tensor, class_ids: Tensor) -> dict[int, float]:
    """`top1` of the images of each class, for each class among `class_ids` (B,)."""
    _check_logits("logits", logits)
    top1(logits, class_ids)  # refuses other shapes
    is_hit = (logits.argmax(dim=1) == class_ids).double()
    return {class_id: is_hit[class_ids == class_id].mean().item() for class_id in class_ids.unique().tolist()}


def effective_classes(logits: Tensor) -> float:
    """exp of the entropy of the mean of the distributions that logits (B, K) predict, 1 to K.

    The number of classes that would be as mixed if all were predicted equally often. Images of which no class is sure
    raise it as those of many classes do. ValueError for no image and logits that are not finite.
    """
    _check_logits("logits", logits)
    mean = logits.double().softmax(dim=1).mean(dim=0)
    return torch.special.entr(mean).sum().clamp(min=0).exp().item()


def disagreement(logits_a: Tensor, logits_b: Tensor) -> float:
    """Share of images, 0 to 1, whose largest logits are of different classes; of equal logits the first counts."""
    _check_logits("logits_a", logits_a)
    _check_logits("logits_b", logits_b)
    if logits_a.shape != logits_b.shape:
        raise ValueError(f"logits_a {tuple(logits_a.shape)}, logits_b {tuple(logits_b.shape)}; expected (B, K) of both")
    return (logits_a.argmax(dim=1) != logits_b.argmax(dim=1)).double().mean().item()


def _distances(rows: Tensor, points: Tensor) -> Tensor:
    """Euclidean distances (n, M); those of equal points are exactly 0, and no pair depends on its company."""
    return torch.cdist(rows, points, compute_mode="donot_use_mm_for_euclid_dist")


def _radii(name: str, points: Tensor, ks: Sequence[int], chunk: int) -> Tensor:
    """For each of `ks`, the distance of each point to its k-th nearest neighbor, (len(ks), N)."""
    if len(points) <= max(ks):
        raise ValueError(f"{name}: {len(points)} images; a {max(ks)}-th neighbor needs at least {max(ks) + 1}")
    nearest = []
    for rows in points.split(chunk):
        # Place 0 is the point itself, at distance 0, or a duplicate of it; so the k-th neighbor is at place k.
        smallest = _distances(rows, points).topk(max(ks) + 1, dim=1, largest=False).values
        nearest.append(smallest[:, list(ks)])
    return torch.cat(nearest).T


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size}; expected at least 1")


def _features(name: str, features: Tensor) -> Tensor:
    if features.ndim != 2 or not features.shape[1]:
        raise ValueError(f"{name}: features of shape {tuple(features.shape)}; expected (images, D), D at least 1")
    _check_finite(name, features)
    return features.detach().double()


def _scores(name: str, scores: Tensor) -> Tensor:
    if scores.ndim != 1 or not len(scores):
        raise ValueError(f"{name}: scores of shape {tuple(scores.shape)}; expected (images,) of at least one")
    _check_finite(name, scores)
    return scores.detach().double()


def _check_logits(name: str, logits: Tensor) -> None:
    if logits.ndim != 2 or not logits.numel():
        raise ValueError(f"{name} of shape {tuple(logits.shape)}; expected (B, K) of at least one image and class")
    _check_finite(name, logits)


def _check_finite(name: str, values: Tensor) -> None:
    places = (~values.isfinite()).nonzero()
    if len(places):
        first = f"the first of image {int(places[0, 0])}"
        raise ValueError(f"{name}: {len(places)} of {values.numel()} numbers are not finite, {first}; expected none")
