"""Refuses a wrong generator folder within milliseconds: nothing here imports torch or diffusers."""

from pathlib import Path
from typing import Any

from prism_ray.documents import is_plain, parse_json
from prism_ray.errors import InputError
from prism_ray.weights import check_weights_file

TINY_DECODER = "tiny_decoder"
"""Folder beside a pipeline's parts that holds a small decoder of its latents; diffusers itself passes it over."""

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "DiTPipeline")
"""Pipelines that `models.generators` can sample from."""

_NETWORKS = ("diffusers", "transformers")
_WITHOUT_WEIGHTS = ("Tokenizer", "Scheduler", "FeatureExtractor", "ImageProcessor")
_UNUSED = ("safety_checker", "feature_extractor", "image_encoder")


def check_generator(folder: Path, tiny_decoder: Path | None = None) -> None:
    """Refuse a folder that is no diffusers pipeline of a known kind with whole safetensors weights.

    Args:
        tiny_decoder: folder of a small decoder that is used instead of the one in the folder, if it is.

    Raises:
        InputError: names what is missing, wrong or damaged.
    """
    shown = f"generator {folder}"
    if not folder.is_dir():
        raise InputError(f"{shown}: is no folder; expected a diffusers pipeline; check generator.source")
    index = _read_index(folder, shown)
    kind = index.get("_class_name")
    if kind not in PIPELINES:
        raise InputError(f"{shown}: is a {kind}; supported are {', '.join(PIPELINES)}; choose another generator")
    for name, entry in index.items():
        _check_entry(name, entry, kind=kind, shown=shown)
    for name, entry in index.items():
        if name.startswith("_") or name in _UNUSED or not _has_weights(entry):
            continue
        _check_part(folder / name, shown=f"{shown}: part {name}")
    if tiny_decoder is not None:
        _check_part(tiny_decoder, shown=f"generator.tiny_decoder {tiny_decoder}")
    elif (folder / TINY_DECODER).is_dir():
        _check_part(folder / TINY_DECODER, shown=f"{shown}: part {TINY_DECODER}")


def _check_entry(name: str, entry: Any, *, kind: str, shown: str) -> None:
    """Refuse a part that lies elsewhere, or whose class diffusers would import from any module of that name."""
    if name.startswith("_") or not isinstance(entry, list):
        return
    if not is_plain(name):
        raise InputError(f"{shown}: part {name!r} is no folder in it; download or copy it again")
    is_unused = name == "safety_checker" and kind == "StableDiffusionPipeline"
    if None in entry or is_unused:
        return
    if len(entry) != 2 or entry[0] not in _NETWORKS or not isinstance(entry[1], str):
        raise InputError(
            f"{shown}: part {name} is {entry}; expected a class of {' or '.join(_NETWORKS)}; choose another generator"
        )


def _read_index(folder: Path, shown: str) -> dict[str, Any]:
    path = folder / "model_index.json"
    if not path.is_file():
        raise InputError(f"{shown}: has no model_index.json; expected a diffusers pipeline folder; check the path")
    try:
        index = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: is no JSON; download or copy the folder again") from error
    if not isinstance(index, dict):
        raise InputError(f"{path}: holds no mapping of parts; download or copy the folder again")
    return index


def _has_weights(entry: Any) -> bool:
    """Whether an entry of the index, [library, class], is a network that is there."""
    if not (isinstance(entry, list) and len(entry) == 2) or None in entry:
        return False
    library, name = map(str, entry)
    return library in _NETWORKS and not any(part in name for part in _WITHOUT_WEIGHTS)


def _check_part(folder: Path, *, shown: str) -> None:
    """Weights as one safetensors file, or as several with an index of them."""
    if not (folder / "config.json").is_file():
        raise InputError(f"{shown}: has no config.json; download or copy the folder again")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern))
        held = f"holds only pickles ({pickles[0]}), which can run code when loaded" if pickles else "holds no weights"
        raise InputError(f"{shown}: {held}; expected *.safetensors; convert the model with save_pretrained")
    for index in folder.glob("*.safetensors.index.json"):
        try:
            named = {str(name) for name in parse_json(index.read_bytes())["weight_map"].values()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{index}: is unreadable; download or copy the folder again") from error
        outside = sorted(name for name in named if not is_plain(name))
        if outside:
            raise InputError(f"{index}: names {outside[0]!r}, which is no file beside it; copy the folder again")
        missing = sorted(name for name in named if not (folder / name).is_file())
        if missing:
            raise InputError(f"{shown}: {missing[0]} of its index is missing; download or copy the folder again")
    for path in files:
        check_weights_file(path, allow_pickle=False)


def takes_class_ids(folder: Path) -> bool:
    """Whether a pipeline is asked by class id instead of by text."""
    return _read_index(folder, f"generator {folder}").get("_class_name") == "DiTPipeline"
