"""A run's images for other programs: a data-set repository of the Hugging Face hub, and a folder for each class."""

import io
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq

from prism_ray.artifacts import write_durably
from prism_ray.documents import is_plain
from prism_ray.errors import InputError, PrismError
from prism_ray.export.parts import read_published, shards, summary_for_card
from prism_ray.ledger import Receipt
from prism_ray.report.card import LabelTable, render_card
from prism_ray.report.contents import Paths
from prism_ray.report.origins import licences_of
from prism_ray.runs import Run
from prism_ray.storage import to_json
from prism_ray.work import RELABEL, SYNTHESIZE, StudentItem

NAME_LENGTH = 40
"""Characters of a class's name that its folder keeps: more may not fit on a file system."""


def write_hf(run: Run, student: StudentItem | None, path: Path) -> None:
    """Image shards in data/, soft labels in labels/ where there are any, and the card that makes them loadable."""
    images, labels = shards(run, SYNTHESIZE), shards(run, RELABEL) if run.needs_labels() else []
    for name, receipts in (("data", images), ("labels", labels)):
        for receipt in receipts:
            file = path / name / receipt.key.rpartition("/")[2]
            file.parent.mkdir(parents=True, exist_ok=True)
            write_durably(file, read_published(run, receipt.key, receipt.sha256))
    summary = replace(summary_for_card(run), paths=Paths(images_glob="data/train-*.parquet"))
    card = render_card(
        summary,
        licences=licences_of(run.config),
        is_repository=True,
        label_table=_label_table(run, labels[0]) if labels else None,
    )
    write_durably(path / "README.md", card.encode())


def _label_table(run: Run, receipt: Receipt) -> LabelTable:
    """How the label shards are written, as they say themselves."""
    table = pq.read_schema(io.BytesIO(read_published(run, receipt.key, receipt.sha256)))
    metadata = {key.decode(): value.decode() for key, value in (table.metadata or {}).items()}
    shared = {key: value for key, value in sorted(metadata.items()) if key not in ("ARROW:schema", "prism_ray.group")}
    return LabelTable(columns={field.name: str(field.type) for field in table}, metadata=shared)


def write_imagefolder(run: Run, student: StudentItem | None, path: Path) -> None:
    """train/CLASS/IMAGE_ID.png, the stored bytes, and classes.json with the class of each folder.

    Raises:
        InputError: a class has no image, and torchvision would refuse its empty folder.
    """
    assert run.dataset is not None
    names = run.dataset.class_names
    folders = class_folders(names)
    for folder in folders:
        (path / "train" / folder).mkdir(parents=True)
    seen: set[int] = set()
    for receipt in shards(run, SYNTHESIZE):
        table = pq.read_table(
            io.BytesIO(read_published(run, receipt.key, receipt.sha256)), columns=["image", "label", "image_id"]
        )
        for row in table.to_pylist():
            if not is_plain(row["image_id"] or "") or not 0 <= (row["label"] or 0) < len(folders):
                raise PrismError(
                    f"{run.store.url_of(receipt.key)}: holds image {row['image_id']!r} of class {row['label']}, which "
                    "prism_ray never wrote; nothing of it is exported"
                )
            write_durably(path / "train" / folders[row["label"]] / f"{row['image_id']}.png", row["image"]["bytes"])
            seen.add(row["label"])
    empty = [names[class_id] for class_id in range(len(names)) if class_id not in seen]
    if empty:
        raise InputError(
            f"export.formats=imagefolder: class {empty[0]!r} has no image, and ImageFolder takes no empty folder; "
            "make its units again with prism-ray retry, or leave imagefolder out of export.formats"
        )
    classes = {folder: {"id": k, "name": name} for k, (folder, name) in enumerate(zip(folders, names, strict=True))}
    write_durably(path / "classes.json", to_json(classes))


def class_folders(names: Sequence[str]) -> list[str]:
    """A folder name for each class, safe on every file system; sorted, they are in the order of the class ids.

    The id in front keeps apart what the rest of a name cannot: `000_t-shirt_top`, `001`, `002_cafe`.
    """
    digits = max(3, len(str(len(names) - 1)))
    folders = []
    for class_id, name in enumerate(names):
        ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
        readable = re.sub(r"[^a-z0-9-]+", "_", ascii_name)[:NAME_LENGTH].strip("_-")
        folders.append(f"{class_id:0{digits}d}_{readable}".rstrip("_"))
    return folders
