"""The data-set card: README.md of a run folder, in the form that the Hugging Face hub and `datasets` read."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from jinja2 import Environment, PackageLoader, StrictUndefined

from prism_ray import schema
from prism_ray.report import format as text
from prism_ray.report.contents import KINDS, RunSummary
from prism_ray.report.origins import licence_header, origins
from prism_ray.weights import OWN_ARCHITECTURES

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
    "energy_teachers": "teachers whose energies steered or selected the sample; empty where nothing was sampled",
    "energy": "their mean energy of the stored pixels; the lower, the more the image is like their training data",
    "iterations": "optimization steps, or steps of the sampler",
    "loss_ce": "cross-entropy of its batch at the last step, nats",
    "loss_bn": "statistics term of its batch at the last step, unweighted",
    "verifier_class": "what the primary teacher predicts on the stored pixels",
    "verifier_confidence": "probability that the primary teacher gives to `label`, 0 to 1",
    "config_hash": "settings that made the image",
}
"""Meaning of each column of `schema.IMAGE_COLUMNS`."""

LABEL_COLUMNS: dict[str, str] = {
    "image_id": "the image",
    "logits": "logits of the label teachers for its views 0, 1, …: one blob in the codec below",
}
"""Meaning of each column of `schema.LABEL_COLUMNS`."""


@dataclass(frozen=True)
class LabelTable:
    """The soft labels beside the images: types by column, and what the shards' metadata say of their form."""

    columns: dict[str, str]
    metadata: dict[str, str]


def render_card(
    summary: RunSummary,
    *,
    licences: Mapping[str, str | None] | None = None,
    is_repository: bool = False,
    label_table: LabelTable | None = None,
) -> str:
    """README.md of a run folder; paths in it are relative to that.

    Args:
        licences: see `origins.licences_of`; None: nothing is stated.
        is_repository: for a data-set repository of the hub instead of a run folder.
        label_table: of labels/ beside the images, where there is one.
    """
    licences = licences or {}
    kinds = [kind for kind in KINDS if kind != "plain" or any(s.labels == kind for s in summary.students)]
    arch = summary.config.get("student", {}).get("arch")
    return (
        markdown_environment()
        .get_template("card.md.j2")
        .render(
            summary=summary,
            dataset=summary.dataset,
            columns=[(name, _type_name(kind), COLUMNS[name]) for name, kind in schema.IMAGE_COLUMNS],
            features=[(name, _feature(kind)) for name, kind in schema.IMAGE_COLUMNS],
            size_category=size_category(summary.num_images),
            is_inverted=any(summary.budget),
            is_repository=is_repository,
            labels=label_table and _label_rows(label_table),
            header=licence_header(licences.get("dataset")),
            origins=origins(summary, licences),
            starts_from=starts_from(summary),
            student_needs_import=arch in OWN_ARCHITECTURES,
            accuracies=[(kind, text.spread(s.top1 for s in summary.students if s.labels == kind)) for kind in kinds],
        )
    )


def _label_rows(table: LabelTable) -> dict[str, Any]:
    columns = [(name, kind, LABEL_COLUMNS.get(name, "")) for name, kind in table.columns.items()]
    return {"columns": columns, "metadata": sorted(table.metadata.items())}


def starts_from(summary: RunSummary) -> str:
    """What an image was before: `real` where it is a real one, `sampled` from a generator, else see `options.Init`."""
    if summary.config.get("method", {}).get("engine") == "diffusion":
        return "sampled"
    if not summary.budget:
        return "real"
    init = summary.config.get("method", {}).get("init", "real")
    return "real" if init == "real" and not any(summary.budget) else f"init_{init}"


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


def markdown_environment() -> Environment:
    """Templates of the cards, with the filters for text of any origin."""
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
