"""Soft labels: the mean of several teachers' logits, and the codec that stores them.

Shapes: B images, K classes.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_FP16 = np.dtype("<f2")  # little-endian wherever it is written


def mean_logits(logits: Sequence[Tensor]) -> Tensor:
    """Plain mean of each teacher's logits (B, K) in float32; one teacher's come back unchanged.

    Teachers of very different scale are not balanced: the one with the largest logits weighs most.
    """
    if not logits:
        raise ValueError("no logits to average; expected those of at least one teacher")
    shapes = {tuple(one.shape) for one in logits}
    if len(shapes) > 1:
        raise ValueError(f"teachers disagree in shape: {sorted(shapes)}; expected the same (B, K)")
    return torch.stack([one.float() for one in logits]).mean(dim=0)


def encode_fp16(logits: Tensor) -> list[bytes]:
    """Each row of (B, K) as 2 K bytes, little-endian half precision (relative error at most 2**-11).

    Raises:
        ValueError: a logit is not finite, or beyond half precision's 65504.
    """
    if logits.ndim != 2:
        raise ValueError(f"logits of shape {tuple(logits.shape)}; expected (B, K)")
    half = logits.detach().to("cpu", torch.float16)
    if not torch.isfinite(half).all():
        largest = logits.detach().abs().max().item()
        raise ValueError(f"logits of magnitude {largest:g} do not fit fp16; expected finite ones up to 65504")
    return [row.tobytes() for row in half.numpy().astype(_FP16, copy=False)]


def decode_fp16(rows: Sequence[bytes], num_classes: int) -> Tensor:
    """Logits (B, K) float32 of what `encode_fp16` wrote.

    Raises:
        ValueError: a row is not `num_classes` numbers long.
    """
    expected_bytes = num_classes * _FP16.itemsize
    for index, row in enumerate(rows):
        if len(row) != expected_bytes:
            raise ValueError(f"label {index} has {len(row)} bytes; expected {expected_bytes} for {num_classes} classes")
    half = np.frombuffer(b"".join(rows), dtype=_FP16).reshape(len(rows), num_classes)
    return torch.from_numpy(half.astype(np.float32))
