"""Tiny real networks for the tests of methods: frozen, in eval mode, pixels (B, 3, H, W) -> logits (B, 5)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from prism_ray.methods.inversion.matching import Network
from prism_ray.methods.inversion.statistics import Moments, targets_of

NUM_CLASSES = 5


class ConvBnNet(nn.Module):
    """Two conv-BN-SiLU blocks, then a classifier. Smooth, so that finite differences are meaningful."""

    def __init__(self, *, width: int = 6, in_chans: int = 3):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(in_chans, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.SiLU(),
            nn.Conv2d(width, width + 2, 3, stride=2, padding=1),
            nn.BatchNorm2d(width + 2),
            nn.SiLU(),
        )
        self.head = nn.Linear(width + 2, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images).mean(dim=(2, 3)))


class ResidualNet(nn.Module):
    """A residual block whose batch norms run in another order than they are declared in."""

    def __init__(self, *, width: int = 7):
        super().__init__()
        self.shortcut_norm = nn.BatchNorm2d(width)  # first in traversal order, last to run
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.branch_norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        y = self.branch_norm(self.conv(nn.functional.silu(self.norm(x))))
        return self.head((y + self.shortcut_norm(x)).mean(dim=(2, 3)))


class RepeatedNormNet(nn.Module):
    """One batch norm that runs twice in a forward pass, the second time on another scale."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Linear(3, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(10 * self.norm(images)).mean(dim=(2, 3)))


class BnFreeNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(images)).mean(dim=(2, 3)))


def prepared(network: nn.Module, seed: int) -> nn.Module:
    """The network frozen, in eval mode, with seeded weights and running statistics of no special value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in network.modules():
            if (
                isinstance(module, nn.BatchNorm2d)
                and module.running_mean is not None
                and module.running_var is not None
            ):
                module.running_mean.normal_(generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
        for parameter in network.parameters():
            parameter.normal_(std=0.4, generator=generator)
    return network.eval().requires_grad_(False)


def network_of(module: nn.Module, *, conv: bool = False, patch_size: int | None = None, seed: int = 9) -> Network:
    """The network with its batch norms' targets; with `conv`, also targets of other, seeded images, class-wise too."""
    if not conv:
        return Network(module, targets_of(module, None, conv=False))
    moments = Moments(module, conv=True, patch_size=patch_size, num_classes=NUM_CLASSES)
    images, class_ids = images_and_classes(seed, num_images=20)
    moments.observe(images.to(next(module.parameters())), class_ids)
    return Network(module, targets_of(module, moments.tensors(), conv=True))


def images_and_classes(seed: int, *, num_images: int = 6, size: int = 8, channels: int = 3) -> tuple[Tensor, Tensor]:
    """Random pixels in [0.1, 0.9] and class ids."""
    generator = torch.Generator().manual_seed(seed)
    images = 0.1 + 0.8 * torch.rand(num_images, channels, size, size, generator=generator)
    return images, torch.arange(num_images) % NUM_CLASSES


@contextmanager
def counted_calls(module: nn.Module) -> Iterator[list[Tensor]]:
    """The inputs of each call of a module inside."""
    inputs: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach().clone()))
    try:
        yield inputs
    finally:
        handle.remove()


def num_hooks(network: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in network.modules())
