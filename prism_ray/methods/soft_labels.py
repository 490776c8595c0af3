"""Soft labels: how several teachers' logits become one label, and the codecs that store it.

Shapes: B images of a label group, N images, V views, K classes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prism_ray.methods.label_layout import LabelLayout

_FP16 = np.dtype("<f2")  # little-endian wherever it is written
_LARGEST = 65504.0


def combine(logits: Sequence[Tensor], *, rule: str, weights: Sequence[float] | None = None) -> Tensor:
    """One label per image from the logits (B, K) of each teacher, float32.

    Args:
        logits: one tensor (B, K) per teacher; with `frobenius` and `sample_norm` of a whole label group, because these
            couple its images.
        rule: `mean`: weighted mean; teachers of very different scale are not balanced. `frobenius`: each teacher's
            logits rescaled to the teachers' mean Frobenius norm over the group, then the weighted mean. `sample_norm`:
            the weighted mean, then every label rescaled to the group's mean Euclidean norm.
        weights: one per teacher, scaled to sum 1; None: equal.

    Source: the released programs of G-VBSM and PRISM (`frobenius`: its ResNet-18 labels; `sample_norm`: its ResNet-50
    and -101 labels). Deviations: weights in `frobenius`; a norm of 0 leaves its logits as they are instead of NaN.
    """
    if not logits:
        raise ValueError("no logits to combine; expected those of at least one teacher")
    shapes = {tuple(one.shape) for one in logits}
    if len(shapes) > 1:
        raise ValueError(f"teachers disagree in shape: {sorted(shapes)}; expected the same (B, K)")
    if rule not in RULES:
        raise ValueError(f"rule {rule!r}: unknown; known: {', '.join(RULES)}")
    shares = torch.tensor([1.0] * len(logits) if weights is None else list(weights), dtype=torch.float64)
    if len(shares) != len(logits) or not (shares > 0).all():
        raise ValueError(f"weights {weights} for {len(logits)} teachers; expected one positive number each")
    stacked = torch.stack([one.float() for one in logits])
    return RULES[rule](stacked, (shares / shares.sum()).to(stacked)[:, None, None])


def _mean(logits: Tensor, shares: Tensor) -> Tensor:
    return logits[0] if len(logits) == 1 else (logits * shares).sum(dim=0)


def _frobenius(logits: Tensor, shares: Tensor) -> Tensor:
    if len(logits) == 1:
        return logits[0]
    norms = torch.linalg.matrix_norm(logits)[:, None, None]
    return _mean(logits * (norms.mean() / norms.where(norms > 0, 1)), shares)


def _sample_norm(logits: Tensor, shares: Tensor) -> Tensor:
    mean = _mean(logits, shares)
    norms = torch.linalg.vector_norm(mean, dim=1, keepdim=True)
    return mean * (norms.mean() / norms.where(norms > 0, 1))


RULES = {"mean": _mean, "frobenius": _frobenius, "sample_norm": _sample_norm}


@dataclass(frozen=True)
class Codec(LabelLayout):
    """How the labels of an image's views are stored: one blob of fixed length per image, any view of it found at once.

    Attributes:
        num_classes, num_views: K and V.
        top_k: classes kept of each label; the others share what is left of its mass: one value r with
            (K - k) exp(r) = the sum of their exp(logit), so that kept mass and remainder are 1 at temperature 1 and the
            level of the logits stays. None keeps all, and so does K - 1, where the remainder costs more than it saves.
        bits: 16, half precision (relative error at most 2**-11); or 1 to 8, equal steps between the smallest and the
            largest stored value of the image, both rounded outwards to half precision (error at most half a step).

    A blob holds the range (two half-precision numbers, not at 16 bits), the kept classes of view after view in
    ascending order, then the values: at 16 bits view after view; else their codes value after value, each over all
    views, as many whole codes in a byte as fit. Of the layouts tried this one is smallest in a parquet file: zstd
    cannot see through codes that cross bytes, and gains less on one code per byte. Bytes per view (100 images in 48
    views, K = 10, mean of four Fashion-MNIST teachers): fp16 17.9, quantized_8 9.8, quantized_4 4.5 (one code per byte
    4.8), quantized_3 3.2 (3.3; crossing bytes 3.5), quantized_2 1.7 (1.9), top_3+quantized_4 2.9 (3.0).
    """

    @property
    def _class_type(self) -> np.dtype:
        return np.dtype(f"<u{self.class_bytes}")

    def encode(self, logits: Tensor) -> np.ndarray:
        """Blobs of labels (N, V, K): uint8 (N, blob_bytes). An image's blob is the same among any others.

        Raises:
            ValueError: another shape, or a logit that is not finite or beyond half precision's 65504.
        """
        if logits.ndim != 3 or logits.shape[1:] != (self.num_views, self.num_classes):
            raise ValueError(
                f"logits of shape {tuple(logits.shape)}; expected (N, {self.num_views}, {self.num_classes})"
            )
        logits = logits.detach().to("cpu", torch.float32)
        if not torch.isfinite(logits.half()).all():
            raise ValueError(
                f"logits of magnitude {logits.abs().max().item():g} do not fit fp16; expected finite ones up to 65504"
            )
        classes, values = self._kept(logits)
        parts = [classes.numpy().astype(self._class_type)]
        if self.bits == 16:
            parts.append(values.numpy().astype(_FP16))
        else:
            limits = _limits(values.numpy())
            parts = [limits, *parts, self._packed(values.numpy(), limits)]
        return np.concatenate([part.reshape(len(logits), -1).view(np.uint8) for part in parts], axis=1)

    def _kept(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Classes (N, V, k) in ascending order and values (N, V, k + 1), or none and all logits."""
        if not self.num_kept:
            return logits.new_zeros(*logits.shape[:2], 0), logits
        classes = logits.topk(self.num_kept, dim=2).indices.sort(dim=2).values
        others = logits.scatter(2, classes, -torch.inf).logsumexp(dim=2, keepdim=True)
        rest = others - math.log(self.num_classes - self.num_kept)
        return classes, torch.cat([logits.gather(2, classes), rest], dim=2)

    def _packed(self, values: np.ndarray, limits: np.ndarray) -> np.ndarray:
        """Codes of values (N, V, n), several in a byte, the first in its lowest bits."""
        low, step = (part[:, :, None] for part in self._scale(limits))
        codes = np.rint((values - low) / np.where(step > 0, step, 1)).clip(0, 2**self.bits - 1).astype(np.uint8)
        codes = codes.transpose(0, 2, 1).reshape(len(codes), -1)
        codes = np.pad(codes, ((0, 0), (0, -codes.shape[1] % self.codes_per_byte)))
        shifts = np.arange(self.codes_per_byte, dtype=np.uint8) * self.bits
        lanes = codes.reshape(len(codes), -1, self.codes_per_byte) << shifts.astype(np.uint8)
        return np.bitwise_or.reduce(lanes, axis=2)

    def _scale(self, limits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Smallest value and step (n, 1) float64 of ranges (n, 2); the step is 0 where all values are equal."""
        low, high = limits[:, :1].astype(np.float64), limits[:, 1:].astype(np.float64)
        return low, (high - low) / (2**self.bits - 1)

    def check(self, blobs: np.ndarray) -> None:
        """Refuse blobs that no `encode` wrote.

        Raises:
            ValueError: another length, a value that is no finite number, or a class that does not exist.
        """
        if blobs.ndim != 2 or blobs.shape[1] != self.blob_bytes:
            raise ValueError(f"labels of shape {blobs.shape}; expected {self.blob_bytes} bytes each for {self.name}")
        classes_start, values_start, end = self.starts
        numbers = blobs[:, values_start:end] if self.bits == 16 else blobs[:, :classes_start]
        if not np.isfinite(np.ascontiguousarray(numbers).view(_FP16)).all():
            raise ValueError("a logit is no finite number")
        classes = np.ascontiguousarray(blobs[:, classes_start:values_start]).view(self._class_type)
        if classes.size and classes.max() >= self.num_classes:
            raise ValueError(f"class {classes.max()}; there are {self.num_classes}")

    def decode(self, blobs: np.ndarray, rows: np.ndarray, views: np.ndarray) -> Tensor:
        """Labels (n, K) float32 of some views.

        Args:
            blobs: uint8 (N, blob_bytes), which `check` accepts.
            rows, views: (n,) row of the image in `blobs`, and number of the view; repeats allowed.

        Raises:
            ValueError: blobs of another length, or a view that is not stored.
        """
        if blobs.ndim != 2 or blobs.shape[1] != self.blob_bytes:
            raise ValueError(f"labels of shape {blobs.shape}; expected {self.blob_bytes} bytes each for {self.name}")
        rows, views = np.asarray(rows, np.int64), np.asarray(views, np.int64)
        if views.size and not 0 <= views.min() <= views.max() < self.num_views:
            raise ValueError(f"views {views.min()} to {views.max()}; stored are 0 to {self.num_views - 1}")
        classes_start, values_start, _ = self.starts
        values = torch.from_numpy(self._values(blobs, rows, views, start=values_start).astype(np.float32))
        if not self.num_kept:
            return values
        places = views[:, None] * self.num_kept + np.arange(self.num_kept)
        classes = _numbers(blobs, rows, places, start=classes_start, kind=self._class_type)
        rest = values[:, -1:].repeat(1, self.num_classes)
        return rest.scatter_(1, torch.from_numpy(classes.astype(np.int64)), values[:, :-1])

    def _values(self, blobs: np.ndarray, rows: np.ndarray, views: np.ndarray, *, start: int) -> np.ndarray:
        """Stored values (n, k + 1) or (n, K) of some views."""
        if self.bits == 16:
            places = views[:, None] * self.num_values + np.arange(self.num_values)
            return _numbers(blobs, rows, places, start=start, kind=_FP16)
        places = np.arange(self.num_values) * self.num_views + views[:, None]
        lanes = _numbers(blobs, rows, places // self.codes_per_byte, start=start, kind=np.dtype("u1"))
        codes = (lanes >> (places % self.codes_per_byte * self.bits)) & (2**self.bits - 1)
        low, step = self._scale(_numbers(blobs, rows, np.arange(2)[None], start=0, kind=_FP16))
        return low + step * codes


def _numbers(blobs: np.ndarray, rows: np.ndarray, places: np.ndarray, *, start: int, kind: np.dtype) -> np.ndarray:
    """Numbers (n, m) of some rows of `blobs`, of those that begin at byte `start` the ones at `places` (n or 1, m)."""
    octets = (start + places * kind.itemsize)[:, :, None] + np.arange(kind.itemsize)
    return blobs[rows[:, None, None], octets].reshape(len(rows), places.shape[1] * kind.itemsize).view(kind)


def _limits(values: np.ndarray) -> np.ndarray:
    """Smallest and largest of each image's values (N, V, n), rounded outwards: (N, 2) half precision."""
    exact = np.stack([values.min(axis=(1, 2)), values.max(axis=(1, 2))], axis=1)
    limits = exact.astype(_FP16)
    outwards = np.array([-_LARGEST, _LARGEST], _FP16)
    is_inside = np.stack([limits[:, 0] > exact[:, 0], limits[:, 1] < exact[:, 1]], axis=1)
    return np.where(is_inside, np.nextafter(limits, outwards), limits).astype(_FP16)
