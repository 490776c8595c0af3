"""The data-set card: README.md of a run folder, in the form that the Hugging Face hub and `datasets` read."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
from jinja2 import Environment, PackageLoader, StrictUndefined

from prism_ray import schema
from prism_ray.report import format as text
from prism_ray.report.contents import RunSummary
from prism_ray.report.files import write_document

SIZE_CATEGORIES = (
    (1_000, "n<1K"),
    (10_000, "1K<n<10K"),
    (100_000, "10K<n<100K"),
    (1_000_000, "100K<n<1M"),
    (10_000_000, "1M<n<10M"),
)
"""Upper bounds of the hub's categories."""

COLUMNS: dict[str, str] = {
    "image": "PNG, lossless",
    "label": "class id, with its class names",
    "image_id": "`<class id>-<index in class>`",
    "unit_id": "unit of work that made the image; one shard each",
    "class_name": "name of the class",
    "index_in_class": "k, from 0",
    "seed": "seed of the image",
    "method": "name of the method",
    "prompt": "what was prompted; null if nothing was",
    "source_image_id": "real image that this one is or started from; null if it started from noise",
    "primary_teacher": "teacher whose logits guided the image; null for real images",
    "statistics_teachers": "teachers whose batch-norm statistics were matched, drawn at some iteration",
    "iterations": "optimization steps",
    "loss_ce": "cross-entropy of its batch at the last step, nats",
    "loss_bn": "statistics term of its batch at the last step, unweighted",
    "verifier_class": "what the primary teacher predicts on the stored pixels",
    "verifier_confidence": "probability that the primary teacher gives to `label`, 0 to 1",
    "config_hash": "settings that made the image",
}
"""Meaning of each column of `schema.IMAGE_COLUMNS`."""


def write_card(summary: RunSummary, path: Path) -> None:
    """Write the card to `path` (README.md of the run folder), replacing what is there as a whole.

    Raises:
        StorageError, InputError: the folder cannot be written.
    """
    write_document(path, render_card(summary))


def render_card(summary: RunSummary) -> str:
    """The card of `write_card`; paths in it are relative to the run folder."""
    arch = summary.config.get("student", {}).get("arch")
    return (
        _environment()
        .get_template("card.md.j2")
        .render(
            summary=summary,
            dataset=summary.dataset,
            columns=[(name, _type_name(kind), COLUMNS[name]) for name, kind in schema.IMAGE_COLUMNS],
            features=[(name, _feature(kind)) for name, kind in schema.IMAGE_COLUMNS],
            size_category=size_category(summary.num_images),
            is_inverted=bool(summary.budget),
            student_needs_import=isinstance(arch, str) and arch.startswith("prism_"),
            accuracies=[
                (kind, text.spread(s.top1 for s in summary.students if s.labels == kind)) for kind in ("soft", "hard")
            ],
        )
    )


def size_category(num_images: int) -> str:
    """The hub's size category."""
    return next((name for bound, name in SIZE_CATEGORIES if num_images < bound), "n>10M")


def yaml_string(value: object) -> str:
    """A double-quoted YAML scalar of any text."""
    return '"' + "".join(_yaml_character(character) for character in str(value)) + '"'


def _yaml_character(character: str) -> str:
    if character in '"\\':
        return f"\\{character}"
    # YAML allows printable characters only; JSON's escapes would split those beyond 16 bits in two.
    return character if character.isprintable() else f"\\U{ord(character):08x}"


def markdown_text(value: object) -> str:
    """Text that Markdown and HTML show as it is, on one line, also within a table."""
    line = " ".join(str(value).split())
    # An underscore inside a word is no emphasis, and names are full of them.
    return re.sub(r"([\\`*{}\[\]<>()#+!|~&$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))", r"\\\1", line)


def _type_name(kind: pa.DataType) -> str:
    if kind == schema.IMAGE:
        return "image"
    return f"list of {kind.value_type}" if pa.types.is_list(kind) else _feature(kind)["dtype"]


def _feature(kind: pa.DataType) -> dict[str, Any]:
    """A column's type in the hub's `dataset_info`."""
    if kind == schema.IMAGE:
        return {"dtype": "image"}
    if pa.types.is_list(kind):
        return {"list": str(kind.value_type)}
    return {"dtype": str(kind).replace("double", "float64")}


def _environment() -> Environment:
    # Markdown is no HTML, so texts are escaped one by one by the two filters below.
    environment = Environment(
        loader=PackageLoader("prism_ray.report", ""),
        autoescape=False,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "count": text.format_count,
        "json": lambda value: json.dumps(value, ensure_ascii=False),
        "percent": text.format_percent,
        "size": text.format_bytes,
        "text": markdown_text,
        "yaml": yaml_string,
    }
    return environment
