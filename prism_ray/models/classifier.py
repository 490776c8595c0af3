"""One contract for every trained network: pixels in, logits out, with its preprocessing inside.

Shapes: B images, C channels (1 gray, 3 RGB), H x W pixels, D pooled features, K classes. Images are float32 in [0, 1].
On disk a classifier is a folder in timm's local-dir form, so that other programs load it with timm alone:
`timm.create_model("local-dir:PATH", pretrained=True)`.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import timm
import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from safetensors.torch import save
from timm.models import get_pretrained_cfg
from torch import Tensor, nn
from torch.nn import functional

from prism_ray.documents import parse_json
from prism_ray.errors import InputError, one_line, shortened
from prism_ray.models import families
from prism_ray.weights import (
    OWN_ARCHITECTURES,
    check_architecture,
    check_weights_file,
    find_weights,
    read_model_config,
)

assert set(OWN_ARCHITECTURES) == set(families.NAMES)

LUMA = (0.299, 0.587, 0.114)
"""ITU-R 601 weights of red, green and blue, the ones PIL converts to gray with."""

MAX_SIDE = 8192
"""Of the images a network takes: images are resized to it, and a file may say anything."""

INTERPOLATIONS = ("bilinear", "bicubic")

_STRUCTURE = ("fixed_input_size", "first_conv", "classifier")
"""What timm must know to load weights of an architecture; the rest of its entry describes weights we did not save."""


class Classifier(nn.Module):
    """A timm network that takes pixels.

    Attributes:
        network: the plain timm module.
        input_size: side of the square images the network sees, pixels; others are resized to it, antialiased. The
            whole image is used: a `crop_pct` below 1 in a folder made elsewhere is not applied.
        in_chans: the network's channels, 1 or 3. Gray images are repeated, RGB ones become ITU-R 601 luma.
        mean, std: buffers (1, in_chans, 1, 1), not part of the state dict.
        class_names: names of the K classes, None where nobody recorded them.
        architecture, model_args: what `timm.create_model` builds the network from.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        *,
        architecture: str,
        model_args: Mapping[str, Any],
        input_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        interpolation: str = "bilinear",
        class_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.architecture = architecture
        self.model_args = dict(model_args)
        self.input_size = input_size
        self.in_chans = int(cast(int, network.in_chans))
        self.num_classes = int(cast(int, network.num_classes))
        self.interpolation = interpolation
        self.class_names = None if class_names is None else tuple(class_names)
        _check_preprocessing(self, mean=mean, std=std)
        shape = (1, self.in_chans, 1, 1)
        for name, values in (("mean", mean), ("std", std)):
            buffer = torch.tensor(values, dtype=torch.float32).expand(self.in_chans).reshape(shape).clone()
            self.register_buffer(name, buffer, persistent=False)

    def prepare(self, images: Tensor) -> Tensor:
        """What the network sees: (B, C, H, W) pixels to (B, in_chans, input_size, input_size), normalized."""
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images of shape {tuple(images.shape)}; expected (B, 1, H, W) or (B, 3, H, W)")
        if images.shape[1] == 3 and self.in_chans == 1:
            images = to_gray(images)
        size = (self.input_size, self.input_size)
        if images.shape[2:] != size:
            images = functional.interpolate(images, size, mode=self.interpolation, align_corners=False, antialias=True)
            if self.interpolation == "bicubic":
                images = images.clamp(0, 1)  # bicubic overshoots, and PIL clips where timm resizes
        # Subtract and divide as torchvision does: a fused multiply would differ from timm's transform in the last bit.
        return (images.expand(-1, self.in_chans, -1, -1) - self.mean) / self.std

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K)."""
        return self.network(self.prepare(images))

    def features(self, images: Tensor) -> Tensor:
        """Pooled features (B, D) that the last linear layer sees."""
        network = cast(Any, self.network)  # timm promises these two methods of every model, nn.Module does not
        return network.forward_head(network.forward_features(self.prepare(images)), pre_logits=True).flatten(1)


def to_gray(images: Tensor) -> Tensor:
    """ITU-R 601 luma (B, 1, H, W) of RGB images (B, 3, H, W)."""
    weights = images.new_tensor(LUMA).reshape(1, 3, 1, 1)
    return (images * weights).sum(dim=1, keepdim=True)


def _check_preprocessing(classifier: Classifier, *, mean: Sequence[float], std: Sequence[float]) -> None:
    name, in_chans, class_names = classifier.architecture, classifier.in_chans, classifier.class_names
    if in_chans not in (1, 3):
        raise InputError(f"{name}: takes {in_chans} channels; expected 1 (gray) or 3 (RGB); choose another network")
    if classifier.num_classes < 1:
        raise InputError(f"{name}: has no classification layer; expected at least one class; choose another network")
    if not 1 <= classifier.input_size <= MAX_SIDE:
        raise InputError(
            f"{name}: takes images of {classifier.input_size} pixels; expected 1 to {MAX_SIDE}; choose another network"
        )
    for key, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, in_chans):
            raise InputError(
                f"{name}: {key} has {len(values)} entries; expected one per channel ({in_chans}); correct it"
            )
    if any(value <= 0 for value in std):
        raise InputError(f"{name}: std={list(std)} is not positive; expected numbers above 0; correct it")
    if classifier.interpolation not in INTERPOLATIONS:
        known = " or ".join(INTERPOLATIONS)
        raise InputError(f"{name}: interpolation {classifier.interpolation!r} is unknown; expected {known}; correct it")
    if class_names is not None and len(class_names) != classifier.num_classes:
        raise InputError(
            f"{name}: has {len(class_names)} class names; expected {classifier.num_classes}, one each; correct them"
        )


def build_classifier(
    arch: str,
    *,
    num_classes: int,
    in_chans: int,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    model_args: Mapping[str, Any],
    seed: int,
) -> Classifier:
    """An untrained classifier; its weights depend on `seed` alone, and the global random state is left as it was.

    Args:
        arch: any timm architecture or one of `prism_ray.models.families`.
        image_size: side of the network's input, pixels; an `img_size` in `model_args` wins.
        model_args: JSON-ready arguments of the architecture.

    Raises:
        InputError: unknown architecture (with the nearest names) or arguments it does not take.
    """
    check_architecture(arch)
    architecture = arch.partition(".")[0]
    arguments = _json_ready(architecture, model_args)
    default = get_pretrained_cfg(architecture)
    if default is not None and default.fixed_input_size:
        arguments.setdefault("img_size", image_size)  # such a network must be told the size it is built for
    # The CPU generator alone is seeded: weights are drawn there, and torch.manual_seed would reseed every GPU too.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            network = timm.create_model(
                architecture, pretrained=False, num_classes=num_classes, in_chans=in_chans, **arguments
            )
        except Exception as error:  # each family checks its arguments in its own way
            raise InputError(
                f"model_args: {architecture} cannot be built with {arguments} ({shortened(error)}); correct them"
            ) from error
    input_size = arguments.get("img_size", image_size)
    classifier = Classifier(
        network, architecture=architecture, model_args=arguments, input_size=input_size, mean=mean, std=std
    )
    _try_one_image(classifier)
    return classifier


def _try_one_image(classifier: Classifier) -> None:
    """Refuse a network that shrinks its input to nothing now, and not at the first step of its training."""
    size = classifier.input_size
    was_training = classifier.training
    try:
        with torch.no_grad():
            classifier.eval()(torch.zeros(1, classifier.in_chans, size, size))
    except RuntimeError as error:
        raise InputError(
            f"model_args: {classifier.architecture} cannot take images of {size} pixels with {classifier.model_args} "
            f"({shortened(error)}); give it fewer poolings or strides, or choose another architecture"
        ) from error
    classifier.train(was_training)


def _json_ready(architecture: str, model_args: Mapping[str, Any]) -> dict[str, Any]:
    """A copy as it will be read back from config.json, so that training and loading see the same arguments."""
    try:
        return json.loads(json.dumps(dict(model_args)))
    except TypeError as error:
        raise InputError(
            f"model_args: those of {architecture} are not JSON-ready ({one_line(error)}); use plain values"
        ) from error


def save_classifier(
    classifier: Classifier, folder_path: Path, *, class_names: Sequence[str], extra: Mapping[str, Any]
) -> None:
    """Write config.json, model.safetensors and prism_ray.json (`extra`); the same weights give the same bytes.

    Nothing is synced and nothing is atomic here: the caller publishes the folder.
    """
    if len(class_names) != classifier.num_classes:
        raise ValueError(f"{len(class_names)} class names for {classifier.num_classes} classes")
    network = cast(Any, classifier.network)
    structure = {key: network.pretrained_cfg[key] for key in _STRUCTURE if key in network.pretrained_cfg}
    config = {
        "architecture": classifier.architecture,
        "num_classes": classifier.num_classes,
        "num_features": network.num_features,
        "pretrained_cfg": {
            **structure,
            "input_size": [classifier.in_chans, classifier.input_size, classifier.input_size],
            "interpolation": classifier.interpolation,
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": classifier.mean.flatten().tolist(),
            "std": classifier.std.flatten().tolist(),
            "num_classes": classifier.num_classes,
            "label_names": list(class_names),
        },
        "model_args": classifier.model_args,
    }
    folder_path.mkdir(parents=True, exist_ok=True)
    # Copies, because safetensors refuses tensors that share memory. One metadata entry: several come in any order.
    tensors = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in network.state_dict().items()}
    (folder_path / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    _write_json(folder_path / "config.json", config)
    _write_json(folder_path / "prism_ray.json", dict(extra))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def read_extra(folder: Path) -> dict[str, Any]:
    """What `save_classifier` was given as `extra`; empty for a folder made elsewhere."""
    path = folder / "prism_ray.json"
    return parse_json(path.read_bytes()) if path.is_file() else {}


def load_classifier(folder: Path, *, allow_pickle: bool = False) -> Classifier:
    """A trained classifier from a folder in timm's local-dir form, made here or elsewhere.

    Mean, std, input size, interpolation and class names are those of its `pretrained_cfg`.

    Args:
        allow_pickle: accept pickled weights; they are still loaded with `weights_only=True`.

    Raises:
        InputError: the folder or its weights are missing, damaged, pickled, or do not fit each other.
    """
    weights_path = find_weights(folder)
    check_weights_file(weights_path, allow_pickle=allow_pickle)
    architecture, model_args, _ = read_model_config(folder)
    _check_described_size(folder, weights_path)
    try:
        network = timm.create_model(f"local-dir:{folder}", pretrained=True)
    except Exception as error:  # whatever timm, torch or safetensors make of a file from elsewhere
        raise InputError(
            f"{folder}: {weights_path.name} and config.json do not load as {architecture} ({shortened(error)}); "
            "save the model again"
        ) from error
    return _from_timm(network, source=str(folder), architecture=architecture, model_args=model_args)


def _check_described_size(folder: Path, weights_path: Path) -> None:
    """Refuse a config.json that describes more numbers than its weights have bytes, before they are allocated."""
    try:
        with torch.device("meta"):
            network = timm.create_model(f"local-dir:{folder}", pretrained=False)
        described = sum(part.numel() for part in network.state_dict().values())
    except Exception as error:
        if "overflow" not in str(error):
            return  # some networks compute with their weights while they are built; what is wrong is found by loading
        described = 2**63
    size_bytes = weights_path.stat().st_size
    if described > size_bytes:
        raise InputError(
            f"{folder}: config.json describes a network of {described} numbers or more, {weights_path.name} has "
            f"{size_bytes} bytes; save the model again"
        )


def load_timm(name: str, *, allow_pickle: bool = False) -> Classifier:
    """A pretrained model of timm by name, with or without the prefix 'timm:', from the local cache or the hub.

    Raises:
        InputError: no such model, no weights for it, only pickled weights (without `allow_pickle`), or the weights
            are not cached and cannot be fetched.
    """
    name = name.removeprefix("timm:")
    check_architecture(name, key=f"timm:{name}")
    try:
        cfg = get_pretrained_cfg(name)
    except RuntimeError as error:
        raise InputError(f"timm:{name}: {one_line(error)}; `timm.list_pretrained()` prints all names") from error
    if cfg is None or not cfg.has_weights:
        raise InputError(f"timm:{name}: has no pretrained weights; `timm.list_pretrained()` prints the names that do")
    overlay: dict[str, Any] = {}
    if not allow_pickle:
        overlay["hf_hub_filename"] = _safetensors_name(name, cfg.hf_hub_id, cfg.hf_hub_filename)
    try:
        if not allow_pickle:
            _reach(cast(str, cfg.hf_hub_id), overlay["hf_hub_filename"])
        network = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
    except Exception as error:  # the hub client, its HTTP library and the file system each raise their own
        raise InputError(
            f"timm:{name}: its weights cannot be fetched ({shortened(error)}); connect once, set HF_HOME to a cache "
            "that holds them, or use a folder in timm's local-dir form"
        ) from error
    return _from_timm(network, source=f"timm:{name}", architecture=name.partition(".")[0], model_args={})


def _safetensors_name(name: str, hub_id: str | None, filename: str | None) -> str:
    """File of the hub repository that holds safetensors; asked for by name, timm does not fall back to a pickle."""
    filename = (filename or "model.safetensors").replace("open_clip_pytorch_model.bin", "open_clip_model.safetensors")
    if hub_id is None or not filename.endswith(".safetensors"):
        raise InputError(
            f"timm:{name}: its weights are published as a pickle only, which can run code when it is loaded; "
            "choose another, or set allow_pickle=true if you trust them"
        )
    return filename


def _reach(hub_id: str, filename: str) -> None:
    """Ask the hub once for a file that is not cached: the download itself retries for half a minute when offline."""
    if not isinstance(try_to_load_from_cache(hub_id, filename), str):
        get_hf_file_metadata(hf_hub_url(hub_id, filename), timeout=10)


def _from_timm(network: nn.Module, *, source: str, architecture: str, model_args: Mapping[str, Any]) -> Classifier:
    try:
        return _classifier_of(network, source=source, architecture=architecture, model_args=model_args)
    except (LookupError, TypeError, ValueError) as error:
        raise InputError(
            f"{source}: its configuration does not say what images it takes ({shortened(error)}); save the model again"
        ) from error


def _classifier_of(network: nn.Module, *, source: str, architecture: str, model_args: Mapping[str, Any]) -> Classifier:
    cfg = cast(dict[str, Any], network.pretrained_cfg)
    if network.num_classes != cfg["num_classes"]:  # timm has then left the last layer random, without an error
        raise InputError(
            f"{source}: num_classes is {network.num_classes} in model_args and {cfg['num_classes']} elsewhere; "
            "expected one number; correct config.json"
        )
    _, height, width = cfg["input_size"]
    if height != width:
        raise InputError(f"{source}: takes images of {height} x {width} pixels; expected square ones; choose another")
    return Classifier(
        network,
        architecture=architecture,
        model_args=model_args,
        input_size=width,
        mean=cfg["mean"],
        std=cfg["std"],
        interpolation=cfg["interpolation"],
        class_names=cfg.get("label_names"),
    )


def frozen(classifier: Classifier) -> Classifier:
    """The same classifier in eval mode, without gradients for its weights: a teacher."""
    return classifier.eval().requires_grad_(False)
