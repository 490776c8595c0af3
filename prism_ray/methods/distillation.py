"""What a student minimizes, which of its parameters decay, and in which order it sees the images.

Shapes: B images, K classes.
"""

import functools
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn import functional


def kl_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)), mean over the batch, nats.

    Source: Hinton et al. 2015 (arXiv:1503.02531), section 2: the factor T^2 keeps the gradient's size the same at every
    temperature. Deviation from SRe2L's program, which has no such factor (T = 20 there, so 400 times smaller).
    """
    _check_shapes(student_logits, teacher_logits)
    student = functional.log_softmax(student_logits / temperature, dim=1)
    teacher = functional.log_softmax(teacher_logits / temperature, dim=1)
    return functional.kl_div(student, teacher, log_target=True, reduction="batchmean") * temperature**2


def mse_ce_loss(student_logits: Tensor, teacher_logits: Tensor, class_ids: Tensor, *, ce_weight: float) -> Tensor:
    """Mean squared error of all B * K logits, plus `ce_weight` times the cross-entropy with the base image's class.

    Source: the released programs of G-VBSM and PRISM. Like them, it ignores the class of a box pasted by CutMix.
    """
    _check_shapes(student_logits, teacher_logits)
    return functional.mse_loss(student_logits, teacher_logits) + ce_weight * hard_loss(student_logits, class_ids)


def hard_loss(student_logits: Tensor, class_ids: Tensor) -> Tensor:
    """Cross-entropy with the class alone, mean over the batch, nats."""
    return functional.cross_entropy(student_logits, class_ids)


def _check_shapes(student_logits: Tensor, teacher_logits: Tensor) -> None:
    if student_logits.shape != teacher_logits.shape:  # would broadcast in silence
        shapes = f"student {tuple(student_logits.shape)}, teacher {tuple(teacher_logits.shape)}"
        raise ValueError(f"logits differ in shape: {shapes}; expected the same (B, K)")


def parameter_groups(module: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups over the trainable parameters: biases and one-dimensional ones (norms) do not decay."""
    decayed, kept = [], []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            is_kept = parameter.ndim <= 1 or name.split(".")[-1] == "bias"
            (kept if is_kept else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


@functools.lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, num_images: int) -> np.ndarray:
    """Order of the images in an epoch, (num_images,) int64: a permutation that depends on the arguments alone.

    The array is shared between calls and therefore read-only.
    """
    # Raw words of a bit generator keep their values across numpy versions; `Generator.permutation` does not promise to.
    key = np.array([seed, epoch], dtype=np.uint64)
    order = np.argsort(np.random.Philox(key=key).random_raw(num_images), kind="stable")
    order.setflags(write=False)
    return order


def batch_of_step(seed: int, step: int, *, num_images: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Images of one optimization step and the epoch each belongs to, both (batch_size,) int64.

    The epochs' orders follow one another without a gap, and step s takes places s * batch_size and following: no image
    is dropped at an epoch's end, a batch may span epochs, and any step is found without the ones before it.
    """
    if num_images < 1 or batch_size < 1 or step < 0:
        raise ValueError(f"step {step} of {batch_size} from {num_images} images; expected 0 or more, 1 and 1 or more")
    epochs, places = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64), num_images)
    image_indices = np.empty(batch_size, dtype=np.int64)
    for epoch in np.unique(epochs).tolist():
        members = epochs == epoch
        image_indices[members] = epoch_order(seed, epoch, num_images)[places[members]]
    return image_indices, epochs
