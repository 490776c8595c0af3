"""Three convolutional families for small images, registered with timm as `prism_vgg`, `prism_convnet`, `prism_resnet`.

timm's own VGG has fixed widths and five poolings, so it can be neither thinned nor fed 16-pixel images; its ResNet
always begins with a stride and a pooling, which leave nothing of a 28-pixel image; and the ConvNet of the distillation
literature is not in it. After `import prism_ray.models` all are ordinary timm models:
`timm.create_model("local-dir:PATH", pretrained=True)` loads them back.

Shapes: B images, C channels, H x W pixels, D pooled features, K classes.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal

from timm.layers.classifier import ClassifierHead
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

NAMES = ("prism_vgg", "prism_convnet", "prism_resnet")

Norm = Literal["batch", "instance"]


class PlainConvNet(nn.Module):
    """A stack of 3x3 convolution, normalization, ReLU, with 2x2 pooling in between, and a linear layer.

    `pool_after` holds the 0-based convolutions followed by a pooling, so the smallest side of an input is
    2 ** len(pool_after) pixels. With `img_size` the linear layer sees every position of the last feature map of such
    images, D = channels * positions; without, their mean, and images may be of any size.
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
        norm: Norm = "batch",
        img_size: int | None = None,
    ) -> None:
        super().__init__()
        if norm not in ("batch", "instance"):
            raise ValueError(f"norm={norm!r}: expected batch or instance")
        if not channels or any(width < 1 for width in channels):
            raise ValueError(f"channels={list(channels)}: expected at least one width, each of at least 1")
        self.num_classes = num_classes
        self.in_chans = in_chans
        positions = 1 if img_size is None else (img_size // 2 ** len(pool_after)) ** 2
        if positions == 0:
            raise ValueError(f"img_size={img_size}: expected at least {2 ** len(pool_after)} pixels")
        self.flattens = img_size is not None
        self.num_features = self.head_hidden_size = channels[-1] * positions
        widths = zip((in_chans, *channels[:-1]), channels, strict=True)
        self.stages = nn.Sequential(
            *(
                _stage(before, after, pool if i in pool_after else None, norm)
                for i, (before, after) in enumerate(widths)
            )
        )
        self.head = ClassifierHead(self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        self.head.reset(num_classes, pool_type=global_pool)

    def forward_features(self, x: Tensor) -> Tensor:
        """Feature map before global pooling: (B, C, H, W) to (B, D, H', W'); one that flattens, to (B, D, 1, 1)."""
        x = self.stages(x)
        return x.flatten(1)[:, :, None, None] if self.flattens else x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, K) of a feature map, or its pooled features (B, D)."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class SmallImageResNet(ResNet):
    """timm's ResNet with the stem of the small-image literature: one 3x3 convolution of stride 1, no pooling."""

    def __init__(self, *args: Any, in_chans: int = 3, stem_width: int, **kwargs: Any) -> None:
        # The deep stem is the one whose width can be chosen; its convolutions are replaced below.
        super().__init__(*args, in_chans=in_chans, stem_type="deep", stem_width=stem_width, **kwargs)
        self.conv1 = nn.Conv2d(in_chans, 2 * stem_width, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.maxpool = nn.Identity()
        for stage in self.feature_info:
            stage["reduction"] = max(1, int(stage["reduction"]) // 4)


def _stage(before: int, after: int, pool: type[nn.MaxPool2d] | type[nn.AvgPool2d] | None, norm: Norm) -> nn.Sequential:
    normalize = nn.BatchNorm2d(after) if norm == "batch" else nn.GroupNorm(after, after)
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv=nn.Conv2d(before, after, 3, padding=1, bias=False), bn=normalize, act=nn.ReLU(inplace=True)
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
            "first_conv": "conv1" if name == "prism_resnet" else "stages.0.conv",
            "classifier": "fc" if name == "prism_resnet" else "head.fc",
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

    Average pooling after every convolution. With channels (128, 128, 128), norm "instance" and `img_size` it is theirs,
    "ConvNet-3". Deviations: by default batch norm and a global average; convolutions without bias; on gray 28-pixel
    images their first convolution pads to 32 pixels, this one doesn't.
    """
    pool_after = frozenset(range(len(channels)))
    arguments = {"channels": tuple(channels), "pool_after": pool_after, "pool": nn.AvgPool2d, **kwargs}
    return build_model_with_cfg(PlainConvNet, "prism_convnet", pretrained, **arguments)


@register_model
def prism_resnet(
    pretrained: bool = False,
    *,
    channels: Sequence[int] = (16, 32, 64),
    depths: Sequence[int] = (1, 1, 1),
    **kwargs: Any,
) -> SmallImageResNet:
    """ResNet (He et al. 2015, arXiv:1512.03385) of basic blocks for small images; (64, 128, 256, 512) and (2, 2, 2, 2)
    give the ResNet-18 that the distillation literature trains on CIFAR.
    """
    if not 1 <= len(channels) == len(depths) <= 4 or min(channels) < 2 or min(depths) < 1:
        raise ValueError(
            f"channels={list(channels)}, depths={list(depths)}: expected one of each for 1 to 4 stages, widths of at "
            "least 2 and depths of at least 1"
        )
    missing = 4 - len(channels)  # timm's forward pass names four stages; one of depth 0 passes its input on
    layers, widths = (*depths, *[0] * missing), (*channels, *[channels[-1]] * missing)
    arguments = {"block": BasicBlock, "layers": layers, "channels": widths, **kwargs}
    return build_model_with_cfg(SmallImageResNet, "prism_resnet", pretrained, stem_width=channels[0] // 2, **arguments)
