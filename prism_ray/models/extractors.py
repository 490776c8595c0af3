"""Distances of two image sets by the moments of their features, as torchmetrics computes them.

Shapes: N real and M fake (synthetic) images, D features of any one extractor. Numbers of different extractors, and
those of Inception in papers, have different scales and don't compare.
"""

import warnings

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance


def fid(real_features: Tensor, fake_features: Tensor) -> float:
    """Frechet distance of the Gaussians with the means and covariances of features (N, D) and (M, D); 0 or more.

    N and M are to be many times D, 50,000 for Inception's 2,048 by custom: the distance is too large by an amount that
    falls as 1 / N. Two samples of one isotropic Gaussian, N = M, are apart by D / (2 N) of their total variance (D of
    64 and 128, N of D to 50 D; 2026-11-23), features of fewer directions by less. Compare only numbers of the same N
    and M. With N or M of at most D the covariances are singular and it measures the number of images: take `kid`.
    Rounding may leave -1e-6 of identical sets. ValueError for other shapes and features that are not finite.
    Source: Heusel et al. 2017 (arXiv:1706.08500); the bias: Chong and Forsyth 2020 (arXiv:1911.07023).
    """
    real, fake = _features(real_features, fake_features)
    # The two sets are whole here: under torch.distributed it would add those of other processes.
    metric = FrechetInceptionDistance(feature=_Given(real.shape[1]), sync_on_compute=False)
    # Moving both sets alike changes no distance, and keeps sums of squares from cancelling.
    center = real.mean(dim=0)
    metric.update(real - center, real=True)
    metric.update(fake - center, real=False)
    return metric.compute().item()


def kid(real_features: Tensor, fake_features: Tensor, *, subset_size: int, seed: int, num_subsets: int = 100) -> float:
    """Squared MMD of features (N, D) and (M, D) with the kernel (x.y / D + 1)^3, the mean over random subsets.

    The estimate has no bias at any N and M, few more than D or fewer, so that it falls below 0 where the sets are
    alike; its noise falls with N and M. It grows with the scale of the features.
    Source: Binkowski et al. 2018 (arXiv:1801.01401).

    Args:
        real_features, fake_features: any two sets, of a size each.
        subset_size: images of each set in a subset, drawn without replacement; 2 to min(N, M).
        seed: of the draws, which leave torch's own random numbers as they were.
        num_subsets: at least 1; more than 1 are of use only if `subset_size` is less than N or M.

    Raises:
        ValueError: other shapes, features that are not finite, a size out of its range.
    """
    real, fake = _features(real_features, fake_features)
    if not 2 <= subset_size <= min(len(real), len(fake)) or num_subsets < 1:
        values = f"subset_size={subset_size}, num_subsets={num_subsets} of {len(real)} real and {len(fake)} fake images"
        raise ValueError(f"{values}; expected 2 to {min(len(real), len(fake))} and at least 1")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Metric `Kernel Inception Distance` will save", category=UserWarning)
        metric = KernelInceptionDistance(
            feature=_Given(real.shape[1]), subsets=num_subsets, subset_size=subset_size, sync_on_compute=False
        )
    metric.update(real, real=True)
    metric.update(fake, real=False)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        mean, _ = metric.compute()
    return mean.item()


class _Given(nn.Module):
    """What torchmetrics takes for an extractor: features come in and go out."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def _features(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    if real.ndim != 2 or real.shape[1:] != fake.shape[1:] or not real.shape[1] or min(len(real), len(fake)) < 2:
        shapes = f"real {tuple(real.shape)}, fake {tuple(fake.shape)}"
        raise ValueError(f"{shapes}; expected (N, D) and (M, D) of at least two images each")
    if not (real.isfinite().all() and fake.isfinite().all()):
        raise ValueError("real or fake has features that are not finite; expected finite ones of all images")
    # Where torchmetrics keeps its sums; and one result on every device.
    return real.detach().cpu().double(), fake.detach().cpu().double()
