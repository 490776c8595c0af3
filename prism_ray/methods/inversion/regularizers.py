"""Priors on images alone, added to the objective of inversion.

Shapes: B images, C channels, S x S pixels, in units of the data set's standard deviation.
Source: total variation and norm: DeepInversion's and SRe2L's released programs (arXiv:1912.08795, arXiv:2306.13092);
divergence of spectra: G-VBSM's data densification (arXiv:2311.17950). Deviations: images of at most 32 pixels are not
pooled (as released, smaller ones are enlarged by repetition); eigenvalues are those of a symmetric matrix.
"""

from collections.abc import Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

POOLED_SIZE = 32


def total_variation(images: Tensor) -> Tensor:
    """Sum of the Frobenius norms, over the batch, of differences to the right, below and along both diagonals."""
    differences = (
        images[..., :, :-1] - images[..., :, 1:],
        images[..., :-1, :] - images[..., 1:, :],
        images[..., 1:, :-1] - images[..., :-1, 1:],
        images[..., :-1, :-1] - images[..., 1:, 1:],
    )
    return reduce(torch.add, [torch.linalg.vector_norm(difference) for difference in differences])


def image_norm(images: Tensor) -> Tensor:
    """Mean over images of their Euclidean norm."""
    return torch.linalg.vector_norm(images.flatten(1), dim=1).mean()


def spectrum_divergence(images: Tensor, groups: Sequence[Tensor], *, temperature: float) -> Tensor:
    """Sum over groups of KL(softmax(e / temperature) || softmax(e)), e the eigenvalues of a group's Gram matrix.

    Its gradient draws a group's eigenvalues together and so its images apart; a single image, or orthogonal ones of one
    norm, give 0. The softened side has no gradient. On CUDA, eigenvalues wait for the device.

    Args:
        images: pooled to at most 32 x 32 pixels before.
        groups: positions in the batch of the images of each class.
        temperature: above 1 for the softened side to be the flatter one.
    """
    height, width = (min(length, POOLED_SIZE) for length in images.shape[-2:])
    features = F.adaptive_avg_pool2d(images, (height, width)).flatten(1)
    total = images.new_zeros(())
    for rows in groups:
        if len(rows) > 1:
            eigenvalues = torch.linalg.eigvalsh(features[rows] @ features[rows].T)
            softened = (eigenvalues.detach() / temperature).softmax(dim=0)
            total = total + F.kl_div(eigenvalues.log_softmax(dim=0), softened, reduction="sum")
    return total
