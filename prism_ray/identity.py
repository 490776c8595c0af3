"""What names a run and its parts: hashes over the settings that affect the output."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

from prism_ray.config import Config
from prism_ray.options import EvaluationSplit


def plain(value: Any) -> Any:
    """A setting's value as JSON-ready data: dataclasses become dicts, enum members their names."""
    if is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


def walk(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every leaf setting as (dotted key, value, field metadata), depth first in declaration order."""
    for f in fields(config):
        key, value = f"{prefix}{f.name}", getattr(config, f.name)
        if is_dataclass(value):
            yield from walk(value, f"{key}.")
        elif isinstance(value, dict) and any(is_dataclass(v) for v in value.values()):
            yield key, value, f.metadata
            for name, entry in value.items():
                yield from walk(entry, f"{key}.{name}.")
        else:
            yield key, value, f.metadata


def output_settings(config: Config) -> dict[str, Any]:
    """The settings that affect the output, by dotted key, JSON-ready."""
    return {
        key: plain(value)
        for key, value, metadata in walk(config)
        if metadata["output"] and not (isinstance(value, dict) and any(is_dataclass(v) for v in value.values()))
    }


def output_tree(config: Any) -> dict[str, Any]:
    """The same settings nested, JSON-ready: without paths, addresses and whatever else is this machine's alone."""
    found = {}
    for f in fields(config):
        value = getattr(config, f.name)
        if not f.metadata["output"]:
            continue
        if is_dataclass(value):
            found[f.name] = output_tree(value)
        elif isinstance(value, dict) and any(is_dataclass(v) for v in value.values()):
            found[f.name] = {name: output_tree(entry) for name, entry in value.items()}
        else:
            found[f.name] = plain(value)
    return found


MODELS = ("dataset", "teachers", "teach", "generator", "prompts")
IMAGE_SETTINGS = (*MODELS, "method", "seed", "images_per_class", "classes", "compute")
"""Groups of settings that decide the images; labels and students don't."""


def images_hash(config: Config) -> str:
    """16 hex digits over the settings that affect the images: runs that share it make the same ones."""
    decides = {k: v for k, v in output_tree(config).items() if k in IMAGE_SETTINGS}
    if config.evaluate.split is EvaluationSplit.validation:
        decides["reserved"] = config.student.validation_images  # real images that no synthetic one may start from
    return content_hash(decides)


def config_hash(config: Config) -> str:
    """16 hex digits over the settings that affect the output; the same for every machine, storage and worker count."""
    return content_hash(output_settings(config))


_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
"""Made once: `json.dumps` makes one in every call, and a plan hashes each of its units twice."""


def content_hash(content: Any) -> str:
    """16 hex digits over JSON-ready content in canonical form."""
    return hashlib.blake2b(_CANONICAL.encode(content).encode(), digest_size=8).hexdigest()


def run_id(config: Config) -> str:
    """The run's name: as set, or recipe, method and config hash, so that the same command finds the same run."""
    return config.run_id or f"{config.recipe_name}-{config.method.name}-{config_hash(config)[:12]}"
