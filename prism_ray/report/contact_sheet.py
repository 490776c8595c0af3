"""A run's images at a glance: one PNG, a row for each class with its name."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from prism_ray.report.gallery import IMAGES_PER_ROW, MAX_CLASSES, first_images

LEAST_SIDE, MOST_SIDE = 48, 128
"""Pixels of a shown image: smaller ones are enlarged by a whole factor, larger ones reduced."""
GAP = 4  # pixels
FONT_SIZE = 14
FONT = Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")
MOST_NAME = 24  # characters of a class's name


@dataclass(frozen=True)
class ContactSheet:
    png: bytes
    num_images: int
    num_classes: int  # shown, of those that have images


def draw_contact_sheet(shards: Sequence[str], class_ids: Sequence[int], class_names: Sequence[str]) -> ContactSheet:
    """The first images of each class, at most 10 of each of the first 100 classes.

    Args:
        shards: addresses of image tables, at least one.
        class_ids: classes to show, in this order.
        class_names: of every class id.

    Raises:
        InputError: a shard is missing or damaged.
    """
    shown = list(class_ids)[:MAX_CLASSES]
    stored = first_images(shards, shown, per_class=IMAGES_PER_ROW)
    rows = {class_id: [image for image in stored if image.class_id == class_id] for class_id in shown}
    pictures = {class_id: [_cell(image.png) for image in images] for class_id, images in rows.items()}
    side = max(picture.width for row in pictures.values() for picture in row) + GAP
    font = ImageFont.truetype(str(FONT), FONT_SIZE)
    names = {class_id: _short(class_names[class_id]) for class_id in shown}
    left = GAP + max(round(font.getlength(name)) for name in names.values()) + 2 * GAP
    columns = max(len(row) for row in pictures.values())
    sheet = Image.new("RGB", (left + columns * side, GAP + len(shown) * side), "white")
    drawing = ImageDraw.Draw(sheet)
    for place, class_id in enumerate(shown):
        top = GAP + place * side
        drawing.text((GAP, top + (side - GAP) // 2), names[class_id], fill="black", font=font, anchor="lm")
        for column, picture in enumerate(pictures[class_id]):
            sheet.paste(picture, (left + column * side, top))
    sink = io.BytesIO()
    sheet.save(sink, "PNG", optimize=True)
    return ContactSheet(sink.getvalue(), len(stored), len(shown))


def _cell(png: bytes) -> Image.Image:
    with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
        picture = image.convert("RGB")
    if picture.width > MOST_SIDE:
        return picture.resize((MOST_SIDE, MOST_SIDE), Image.Resampling.LANCZOS)
    factor = -(-LEAST_SIDE // picture.width)
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def _short(name: str) -> str:
    return name if len(name) <= MOST_NAME else f"{name[: MOST_NAME - 1]}…"
