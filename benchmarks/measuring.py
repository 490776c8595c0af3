"""What programs that measure CPU time share: interleaved loops, what is said beside a figure, cells and their exit."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NoReturn, TypeVar

import pyarrow as pa
import torch
import torch.nn.functional as F

from prism_ray.config import TeacherConfig
from prism_ray.data.imagenet_names import class_names
from prism_ray.data.pixels import encode_png
from prism_ray.models.classifier import Classifier, build_classifier
from prism_ray.models.imagenet_lite import load_imagenet_lite
from prism_ray.schema import IMAGE_COLUMNS, image_schema, table_bytes

K = TypeVar("K")
ROOT = Path(__file__).resolve().parents[1]
SIZES = {"digits": (16, 1, 10), "fashion_mnist": (28, 1, 10), "imagenet_lite": (128, 3, 1000)}
"""By recipe: side of an image in pixels, channels, classes."""


def normalization(channels: int) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of a channel, for images of one channel or three."""
    return ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]) if channels == 3 else ([0.286], [0.353])


def drawn_pngs(num_images: int, *, side: int, channels: int, generator: torch.Generator) -> list[bytes]:
    """Smooth random images with some noise, as PNG files."""
    coarse = torch.rand(num_images, channels, 6, 6, generator=generator)
    noise = 0.05 * torch.randn(num_images, channels, side, side, generator=generator)
    pixels = F.interpolate(coarse, size=side, mode="bicubic") + noise
    images = (pixels.clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).numpy()
    return [encode_png(image[..., 0] if channels == 1 else image) for image in images]


def image_shard(pngs: Sequence[bytes], class_ids: Sequence[int], image_ids: Sequence[str], names: list[str]) -> bytes:
    """A shard of images that says no more of them than their classes and ids."""
    columns: dict[str, list[Any]] = {name: [None] * len(pngs) for name, _ in IMAGE_COLUMNS}
    columns["image"] = [{"bytes": png, "path": None} for png in pngs]
    columns["label"], columns["image_id"] = list(class_ids), list(image_ids)
    return table_bytes(pa.table(columns, schema=image_schema(IMAGE_COLUMNS, names)))


def stand_in(model: TeacherConfig, recipe: str, *, seed: int, generator: torch.Generator, batches: int) -> Classifier:
    """A recipe's teacher, in eval mode: one that it trains has random weights and statistics of random images."""
    side, channels, num_classes = SIZES[recipe]
    if model.source.startswith("imagenet_lite:"):
        return load_imagenet_lite(model.source, input_size=side, class_names=class_names()).eval()
    mean, std = normalization(channels)
    built = build_classifier(
        str(model.arch),
        num_classes=num_classes,
        in_chans=channels,
        image_size=side,
        mean=mean,
        std=std,
        model_args=model.model_args,
        seed=seed,
    )
    with torch.no_grad():
        for _ in range(batches):
            built.train()(torch.rand(64, channels, side, side, generator=generator))
    return built.eval()


def interleaved(loops: Mapping[K, Callable[[], object]], *, pairs: int) -> dict[K, list[float]]:
    """Seconds of CPU time of each loop: one after another in every round, in an order that turns around."""
    times: dict[K, list[float]] = {name: [] for name in loops}
    for number in range(pairs + 1):  # the first round warms up
        for name in list(loops)[:: 1 if number % 2 else -1]:
            began = time.process_time()
            loops[name]()
            if number:
                times[name].append(time.process_time() - began)
    return times


def spread(values: Sequence[float]) -> list[float]:
    """Median, least and largest."""
    return [round(value, 3) for value in (median(values), min(values), max(values))]


def circumstances(pairs: int) -> dict[str, Any]:
    """What a figure depends on beside the code."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True, cwd=ROOT)
    where = {"torch": torch.__version__, "machine": platform.machine(), "threads": 1, "pairs": pairs}
    return {**where, "load": round(os.getloadavg()[0], 1), "commit": commit.stdout.strip()}


def print_cells(
    cells: Iterable[str], measure: Callable[[str], dict[str, Any]], *, difference: str, tolerance: float
) -> NoReturn:
    """Print a JSON line per cell; end with 1 if in any of them the sides differ by more than the tolerance."""
    torch.set_num_threads(1)
    failed = False
    for name in cells:
        result = measure(name)
        failed |= result[difference] > tolerance
        print(json.dumps(result), flush=True)
    sys.exit(failed)
