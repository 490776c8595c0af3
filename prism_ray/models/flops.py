"""What a classifier's forward pass costs, counted on shapes alone: no weights are drawn or loaded, nothing computed."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from prism_ray.config import TeacherConfig
from prism_ray.errors import InputError, one_line, shortened
from prism_ray.models import families
from prism_ray.weights import LITE, OWN_ARCHITECTURES, check_architecture, find_weights, is_folder, lite_architecture

assert set(OWN_ARCHITECTURES) == set(families.NAMES)


def forward_flops(network: nn.Module, *, image_size: int, in_chans: int) -> int:
    """Floating-point operations of one image's forward pass, as torch counts them (a multiply-add is two).

    On the network's own device; put it on "meta" to count without computing.
    """
    device = next(network.parameters()).device
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, in_chans, image_size, image_size, device=device))
    return counter.get_total_flops()


def architecture_flops(
    arch: str, model_args: Mapping[str, Any], *, image_size: int, in_chans: int, num_classes: int
) -> int:
    """`forward_flops` of an architecture that has not been built.

    Args:
        arch: any timm architecture or one of `prism_ray.models.families`.
        image_size: side of the network's input, pixels; an `img_size` in `model_args` wins.

    Raises:
        InputError: unknown architecture, or arguments or a size that it does not take.
    """
    check_architecture(arch)
    architecture, arguments = arch.partition(".")[0], dict(model_args)
    default = get_pretrained_cfg(architecture)
    if default is not None and default.fixed_input_size:
        arguments.setdefault("img_size", image_size)
    try:
        with torch.device("meta"):
            network = timm.create_model(
                architecture, pretrained=False, num_classes=num_classes, in_chans=in_chans, **arguments
            )
        return forward_flops(network.eval(), image_size=arguments.get("img_size", image_size), in_chans=in_chans)
    except Exception as error:  # each family checks its arguments in its own way
        raise InputError(
            f"model_args: {architecture} cannot be built with {arguments} ({shortened(error)}); correct them"
        ) from error


def teacher_flops(teacher: TeacherConfig, *, image_size: int, channels: int, num_classes: int) -> int:
    """`forward_flops` of a teacher before its artifact exists; nothing is downloaded.

    Args:
        image_size: of the data set, which a teacher trained here and an ImageNet-Lite one take; others have their own.
        channels: of the data set.

    Raises:
        InputError: the architecture or the folder does not exist or can't be read.
    """
    if teacher.source == "train":
        assert teacher.arch is not None, "refused by validation"
        return architecture_flops(
            teacher.arch, teacher.model_args, image_size=image_size, in_chans=channels, num_classes=num_classes
        )
    if teacher.source.startswith(LITE):
        arch = lite_architecture(teacher.source)
        return architecture_flops(arch, {}, image_size=image_size, in_chans=3, num_classes=num_classes)
    if is_folder(teacher.source):
        return _folder_flops(Path(teacher.source), num_classes=num_classes)
    name = teacher.source.removeprefix("timm:")
    check_architecture(name, key=teacher.source)
    try:
        cfg = get_pretrained_cfg(name)
    except RuntimeError as error:
        raise InputError(f"{teacher.source}: {one_line(error)}; `timm.list_pretrained()` prints all names") from error
    in_chans, side, _ = cfg.input_size if cfg is not None else (3, image_size, image_size)
    return architecture_flops(name, {}, image_size=side, in_chans=in_chans, num_classes=num_classes)


def _folder_flops(folder: Path, *, num_classes: int) -> int:
    find_weights(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        in_chans, side, _ = config["pretrained_cfg"]["input_size"]
        arch, model_args = config["architecture"], config.get("model_args") or {}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder}: its config.json can't be read ({one_line(error)}); save the model again"
        ) from error
    return architecture_flops(arch, model_args, image_size=side, in_chans=in_chans, num_classes=num_classes)
