"""What a classifier's forward pass costs, counted on shapes alone: no weights are drawn or loaded, nothing computed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch
from timm.models import get_pretrained_cfg
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from prism_ray.config import TeacherConfig
from prism_ray.errors import InputError, one_line, shortened
from prism_ray.models import families
from prism_ray.models.memory import kept_bytes, weight_bytes
from prism_ray.weights import (
    LITE,
    OWN_ARCHITECTURES,
    check_architecture,
    find_weights,
    is_folder,
    lite_architecture,
    read_model_config,
)

T = TypeVar("T")

assert set(OWN_ARCHITECTURES) == set(families.NAMES)


def forward_flops(network: nn.Module, *, image_size: int, in_chans: int) -> int:
    """Floating-point operations of one image's forward pass, as torch counts them (a multiply-add is two).

    On the network's own device; put it on "meta" to count without computing.
    """
    device = next(network.parameters()).device
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, in_chans, image_size, image_size, device=device))
    return counter.get_total_flops()


@dataclass(frozen=True)
class Architecture:
    """A network that has not been built: its name, arguments, input and outputs."""

    arch: str  # any timm architecture or one of `prism_ray.models.families`
    model_args: Mapping[str, Any]
    image_size: int  # side of the input, pixels; an `img_size` in `model_args` wins
    in_chans: int
    num_classes: int


def architecture_flops(
    arch: str, model_args: Mapping[str, Any], *, image_size: int, in_chans: int, num_classes: int
) -> int:
    """`forward_flops` of an architecture that has not been built; see `Architecture`.

    Raises:
        InputError: unknown architecture, or arguments or a size that it does not take.
    """
    described = Architecture(arch, model_args, image_size, in_chans, num_classes)
    return _counted(described, lambda network, size: forward_flops(network, image_size=size, in_chans=in_chans))


def architecture_memory(described: Architecture) -> tuple[int, int]:
    """Bytes of an architecture's weights, and those that its forward pass keeps of an image; see `models.memory`."""

    def count(network: nn.Module, size: int) -> tuple[int, int]:
        kept = kept_bytes(network.requires_grad_(False), image_size=size, in_chans=described.in_chans)
        return weight_bytes(network), kept

    return _counted(described, count)


def _counted(described: Architecture, count: Callable[[nn.Module, int], T]) -> T:
    """What is counted on a network of this kind, which is built without memory."""
    check_architecture(described.arch)
    architecture, arguments = described.arch.partition(".")[0], dict(described.model_args)
    default = get_pretrained_cfg(architecture)
    if default is not None and default.fixed_input_size:
        arguments.setdefault("img_size", described.image_size)
    try:
        with torch.device("meta"):
            network = timm.create_model(
                architecture,
                pretrained=False,
                num_classes=described.num_classes,
                in_chans=described.in_chans,
                **arguments,
            )
        return count(network.eval(), arguments.get("img_size", described.image_size))
    except Exception as error:  # each family checks its arguments in its own way
        raise InputError(
            f"model_args: {architecture} cannot be built with {arguments} ({shortened(error)}); correct them"
        ) from error


def teacher_flops(teacher: TeacherConfig, *, image_size: int, channels: int, num_classes: int) -> int:
    """`forward_flops` of a teacher before its artifact exists; see `describe_teacher`."""
    found = describe_teacher(teacher, image_size=image_size, channels=channels, num_classes=num_classes)
    sizes = {"image_size": found.image_size, "in_chans": found.in_chans, "num_classes": found.num_classes}
    return architecture_flops(found.arch, found.model_args, **sizes)


def describe_teacher(teacher: TeacherConfig, *, image_size: int, channels: int, num_classes: int) -> Architecture:
    """A teacher's architecture before its artifact exists; nothing is downloaded.

    Args:
        image_size: of the data set, which a teacher trained here and an ImageNet-Lite one take; others have their own.
        channels: of the data set.

    Raises:
        InputError: the architecture or the folder does not exist or can't be read.
    """
    if teacher.source == "train":
        assert teacher.arch is not None, "refused by validation"
        return Architecture(teacher.arch, teacher.model_args, image_size, channels, num_classes)
    if teacher.source.startswith(LITE):
        return Architecture(lite_architecture(teacher.source), {}, image_size, 3, num_classes)
    if is_folder(teacher.source):
        return _describe_folder(Path(teacher.source), num_classes=num_classes)
    name = teacher.source.removeprefix("timm:")
    check_architecture(name, key=teacher.source)
    try:
        cfg = get_pretrained_cfg(name)
    except RuntimeError as error:
        raise InputError(f"{teacher.source}: {one_line(error)}; `timm.list_pretrained()` prints all names") from error
    in_chans, side, _ = cfg.input_size if cfg is not None else (3, image_size, image_size)
    return Architecture(name, {}, side, in_chans, num_classes)


def _describe_folder(folder: Path, *, num_classes: int) -> Architecture:
    find_weights(folder)
    arch, model_args, config = read_model_config(folder)
    try:
        in_chans, side, _ = config["pretrained_cfg"]["input_size"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder}: its config.json can't be read ({one_line(error)}); save the model again"
        ) from error
    return Architecture(arch, model_args, side, in_chans, num_classes)
