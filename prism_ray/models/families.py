"""Two plain convolutional families, registered with timm as `prism_vgg` and `prism_convnet`.

timm's own VGG has fixed widths and five poolings, so it can be neither thinned nor fed 16-pixel images, and the
ConvNet of the distillation literature is not in it. After `import prism_ray.models` both are ordinary timm
models: `timm.create_model("local-dir:PATH", pretrained=True)` loads them back.

Shapes: B images, C channels, H x W pixels, D pooled features, K classes.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from timm.layers.classifier import ClassifierHead
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

NAMES = ("prism_vgg", "prism_convnet")


class PlainConvNet(nn.Module):
    """A stack of 3x3 convolution, batch norm, ReLU, with 2x2 pooling in between, global pooling and a linear layer.

    `pool_after` holds the 0-based convolutions followed by a pooling, so the smallest side of an input is
    2 ** len(pool_after) pixels.
    """

    def __init__(
        self,
        *,
        channels: Sequence[int],
        pool_after: frozenset[int],
        pool: type[nn.MaxPool2d] | type[nn.AvgPool2d],
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if not channels or any(width < 1 for width in channels):
            raise ValueError(f"channels={list(channels)}: expected at least one width, each of at least 1")
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = channels[-1]
        widths = zip((in_chans, *channels[:-1]), channels, strict=True)
        self.stages = nn.Sequential(
            *(_stage(before, after, pool if i in pool_after else None) for i, (before, after) in enumerate(widths))
        )
        self.head = ClassifierHead(channels[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        self.head.reset(num_classes, pool_type=global_pool)

    def forward_features(self, x: Tensor) -> Tensor:
        """Feature map before global pooling: (B, C, H, W) to (B, D, H', W')."""
        return self.stages(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, K) of a feature map, or its pooled features (B, D)."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _stage(before: int, after: int, pool: type[nn.MaxPool2d] | type[nn.AvgPool2d] | None) -> nn.Sequential:
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv=nn.Conv2d(before, after, 3, padding=1, bias=False), bn=nn.BatchNorm2d(after), act=nn.ReLU(inplace=True)
    )
    if pool is not None:
        layers["pool"] = pool(2)
    return nn.Sequential(layers)


# timm's registry reads this name when the functions below register.
default_cfgs = generate_default_cfgs(
    {
        name: {
            "input_size": (3, 32, 32),
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "mean": (0.5, 0.5, 0.5),
            "std": (0.25, 0.25, 0.25),
            "first_conv": "stages.0.conv",
            "classifier": "head.fc",
        }
        for name in NAMES
    }
)


@register_model
def prism_vgg(pretrained: bool = False, *, channels: Sequence[int] = (16, 32, 32, 64), **kwargs: Any) -> PlainConvNet:
    """VGG (Simonyan and Zisserman 2014, arXiv:1409.1556) with batch norm, thin and short.

    Max-pooling after every second convolution but the last. Deviation: global average pooling and one linear layer
    instead of three.
    """
    pool_after = frozenset(range(1, len(channels) - 1, 2))
    arguments = {"channels": tuple(channels), "pool_after": pool_after, "pool": nn.MaxPool2d, **kwargs}
    return build_model_with_cfg(PlainConvNet, "prism_vgg", pretrained, **arguments)


@register_model
def prism_convnet(pretrained: bool = False, *, channels: Sequence[int] = (24, 48, 64), **kwargs: Any) -> PlainConvNet:
    """The ConvNet of the distillation literature (Zhao et al. 2021, arXiv:2006.05929), thinner.

    Average pooling after every convolution. Deviations: batch norm, theirs has instance norm; global average pooling
    before the linear layer, theirs flattens.
    """
    pool_after = frozenset(range(len(channels)))
    arguments = {"channels": tuple(channels), "pool_after": pool_after, "pool": nn.AvgPool2d, **kwargs}
    return build_model_with_cfg(PlainConvNet, "prism_convnet", pretrained, **arguments)
