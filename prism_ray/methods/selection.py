"""Which items of a class are taken: by a score of each, or together by their features.

Shapes: N items, D features. Items are named by their place; of equal ones the first is taken.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def lowest(scores: NDArray[np.floating], num: int) -> list[int]:
    """Places of the `num` smallest of (N,) scores, the smallest first."""
    _check_num(num, len(scores))
    return np.argsort(scores, kind="stable")[:num].tolist()


def medium(scores: NDArray[np.floating], num: int) -> list[int]:
    """Places of the `num` of (N,) scores that are nearest to their median, the nearest first.

    Source: Shen et al. 2025 (DELT, arXiv:2411.19946), which starts from images of medium difficulty.
    """
    _check_num(num, len(scores))
    return lowest(np.abs(scores - np.median(scores)), num)


def herding(features: Tensor, num: int) -> list[int]:
    """Places of `num` of N items in the order of greedy herding on features (N, D) scaled to length 1.

    The k-th item taken is the one that brings the mean of k items nearest to the mean of all.
    Source: Welling 2009, "Herding dynamical weights to learn": x = argmax <w, x>, then w <- w + mean - x, from
    w = mean; among vectors of length 1 that is the greedy choice. Deviation: none is taken twice, as in Rebuffi et al.
    2017 (iCaRL, arXiv:1611.07725), who also scale the mean itself to length 1, which we don't.
    """
    if features.ndim != 2:
        raise ValueError(f"features of shape {tuple(features.shape)}; expected (N, D)")
    _check_num(num, len(features))
    units = torch.nn.functional.normalize(features.detach().cpu().double(), dim=1, eps=1e-300)
    mean = units.mean(dim=0)
    weights, taken = mean.clone(), []
    is_taken = torch.zeros(len(units), dtype=torch.bool)
    for _ in range(num):
        # Row by row, so that equal rows get equal numbers, which a matrix product does not promise.
        gains = (units * weights).sum(dim=1).masked_fill(is_taken, -torch.inf)
        best = int(gains.argmax())
        taken.append(best)
        is_taken[best] = True
        weights += mean - units[best]
    return taken


def cosine_kernel(features: Tensor) -> Tensor:
    """Cosine similarities (N, N), in double precision, of features (N, D) after their mean is subtracted.

    The product itself is in the precision of the features, which takes half the time of a double one.
    """
    units = torch.nn.functional.normalize(features - features.mean(dim=0), dim=1)
    return (units @ units.T).double()


def regression(kernel: Tensor, targets: Tensor, class_ids: Tensor, num: int, *, ridge: float) -> dict[int, list[int]]:
    """Places of `num` items of each class from which kernel ridge regression best predicts the targets of all N items.

    Greedy: each item taken is the one that most lowers the squared error over all items, among the classes that are not
    full. Taking an item moves predictions as it does the mean of a Gaussian process; what the next step needs is
    updated with one product of kernel and vector.
    Source: this project. That kernels of networks tell which images teach: Nguyen et al. 2021 (KIP, arXiv:2011.00050),
    who optimize pixels against the real images; here real images are taken as they are.

    Args:
        kernel: (N, N), double precision, such as a mean of `cosine_kernel`.
        targets: (N, K), what a student is to learn.
        class_ids: (N,) int64.
        num: items of each class, at most as many as there are.
        ridge: above 0, in units of the kernel's diagonal of about 1.

    Returns:
        For each class, its places in the order they were taken.
    """
    classes, counts = torch.unique(class_ids, return_counts=True)
    _check_num(num, int(counts.min()))
    residuals = (targets - targets.mean(dim=0)).double()
    # Of the posterior covariance S = kernel - sum of columns x shares: S @ residuals, squared column norms, diagonal.
    agreement, norms, diagonal = kernel @ residuals, kernel.square().sum(dim=0), kernel.diagonal().clone()
    columns, shares = kernel.new_zeros(0, len(kernel)), kernel.new_zeros(0, len(kernel))
    taken: dict[int, list[int]] = {int(c): [] for c in classes}
    is_open = torch.ones(len(targets), dtype=torch.bool, device=kernel.device)
    for _ in range(num * len(classes)):
        scale = diagonal + ridge
        # Taking item x moves the predictions of all by S[:, x] / scale[x] * residuals[x].
        gains = 2 * (agreement * residuals).sum(dim=1) / scale - norms * residuals.square().sum(dim=1) / scale.square()
        best = int(gains.masked_fill(~is_open, -torch.inf).argmax())
        mine = taken[int(class_ids[best])]
        mine.append(best)
        is_open[best] = False
        if len(mine) == num:
            is_open &= class_ids != class_ids[best]
        column = kernel[best] - columns[:, best] @ shares
        share, residual = column / scale[best], residuals[best].clone()
        moved = kernel @ share - columns.T @ (shares @ share)
        length, towards = share.dot(share), share @ residuals
        agreement -= moved[:, None] * residual + column[:, None] * (towards - length * residual)
        norms = (norms - 2 * column * moved + column.square() * length).clamp(min=0)
        diagonal = (diagonal - share * column).clamp(min=0)
        residuals = residuals - share[:, None] * residual
        columns, shares = torch.cat([columns, column[None]]), torch.cat([shares, share[None]])
    return taken


def _check_num(num: int, available: int) -> None:
    if not 0 <= num <= available:
        raise ValueError(f"{num} of {available} items; expected at most as many as there are")
