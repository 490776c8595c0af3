"""Starts: the real images, or crops of them, that teachers choose for synthetic ones to start from.

    <artifacts>/starts/<kind>-<hash>/
        starts.parquet      `COLUMNS`, by class, index in the class and tile
        prism_ray.json      settings, seconds

A judge's score is the cross-entropy of the true class; of several judges, that of their mean logits.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from torch.nn import functional

from prism_ray.artifacts import local_folder, publish_files
from prism_ray.data.prepared import PreparedDataset
from prism_ray.identity import plain
from prism_ray.methods.mosaics import compose, cut, draw_crops, padded
from prism_ray.methods.selection import cosine_kernel, herding, lowest, medium, regression
from prism_ray.models.classifier import Classifier, frozen
from prism_ray.options import Selection
from prism_ray.plan import PlannedImage, permuted
from prism_ray.schema import table_bytes
from prism_ray.seeds import seed_for
from prism_ray.stages.device import deterministic, fingerprint, load_frozen, pick_device, untrained
from prism_ray.stages.real_images import real_batches
from prism_ray.work import STARTS_FILE, Drawing, StartsItem, StartsSettings, open_dataset

BATCH = 256
"""Images per forward pass of a judge."""

NUM_CONVNETS, WIDTH = 4, 48
"""Untrained ConvNets of selection regression, and their channels."""
TEMPERATURE, RIDGE = 4.0, 0.1
"""Of the soft labels that they are to predict, and of their regression; chosen on Fashion-MNIST (benchmarks/LOG.md)."""
MOST_ITEMS = 10_000
"""Images of a regression at most: its kernel then takes 800 MB."""

COLUMNS: list[tuple[str, pa.DataType]] = [
    ("class_id", pa.int64()),
    ("index_in_class", pa.int64()),
    ("tile", pa.int64()),  # row by row; 0 of a whole image
    ("row", pa.int64()),  # of the training split
    ("top", pa.int64()),  # box in that image, pixels
    ("left", pa.int64()),
    ("height", pa.int64()),
    ("width", pa.int64()),
    ("score", pa.float64()),  # cross-entropy, nats; null where features decide
]


class Start(NamedTuple):
    """A box of a real training image, pixels."""

    row: int
    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class Chosen:
    """A box that was chosen, and its score."""

    start: Start
    score: float | None


@dataclass(frozen=True)
class Starts:
    """What synthetic images start from, tile by tile, by class and index in the class."""

    tiles: dict[tuple[int, int], list[Start]]

    @classmethod
    def open(cls, folder: str | Path) -> "Starts":
        tiles: dict[tuple[int, int], list[Start]] = {}
        with pq.ParquetFile(local_folder(folder) / STARTS_FILE) as file:
            table = file.read()
        keys = zip(table["class_id"].to_pylist(), table["index_in_class"].to_pylist(), strict=True)
        boxes = zip(*(table[name].to_pylist() for name in Start._fields), strict=True)
        for key, box in zip(keys, boxes, strict=True):
            tiles.setdefault(key, []).append(Start(*box))
        return cls(tiles)

    def sources(self, class_id: int, k: int) -> list[Start]:
        """What image k of a class starts from: one whole image, or its tiles row by row."""
        return self.tiles[class_id, k]


def initial_pixels(starts: Starts, dataset: PreparedDataset, images: Sequence[PlannedImage]) -> Tensor:
    """What planned images start from: (B, C, S, S) float32 in [0, 1]."""
    sources = [starts.sources(image.class_id, image.index_in_class) for image in images]
    rows = np.array([start.row for tiles in sources for start in tiles], dtype=np.int64)
    pixels = iter(torch.from_numpy(dataset.images("train", rows)).float() / 255)
    return torch.stack([compose([next(pixels) for _ in tiles], [start[1:] for start in tiles]) for tiles in sources])


def make_starts(item: StartsItem) -> None:
    """Choose what one run's images start from; nothing to do if the folder is there."""
    if item.is_done:
        return
    settings, dataset, device = item.settings, open_dataset(item.dataset_dir), pick_device(item.gpus)
    judges = [load_frozen(folder, str(device)) for folder in item.judge_dirs]
    rows_by_class = dataset.rows_by_class("train")
    real = {c: rows_by_class[c][: max(0, len(rows_by_class[c]) - settings.reserved)] for c in settings.class_ids}
    started = time.perf_counter()
    with deterministic(settings.threads), torch.no_grad():
        if settings.mosaic is not None:
            chosen = _crops(settings, settings.mosaic, dataset, real, judges, device)
        elif settings.regression is not None:
            chosen = _regressed(settings, settings.regression, dataset, real, judges, device)
        else:
            chosen = _whole_images(settings, dataset, real, judges, device)
    facts = {
        "settings": plain(settings),
        "fingerprint": fingerprint(device),
        "seconds": time.perf_counter() - started,
    }
    table = table_bytes(_table(settings, chosen))
    publish_files(item.folder, {STARTS_FILE: table}, facts=facts)


def _whole_images(
    settings: StartsSettings,
    dataset: PreparedDataset,
    real: dict[int, np.ndarray],
    judges: Sequence[Classifier],
    device: torch.device,
) -> dict[int, list[Chosen]]:
    """The whole real images of each class by score or by features, in the order they are taken."""
    choose = {Selection.confident.name: lowest, Selection.medium.name: medium}.get(settings.kind)
    rows, class_ids = _ascending(real)
    judged = []
    for n, (_, pixels) in enumerate(real_batches(dataset, rows, batch_size=BATCH)):
        images = pixels.to(device).float() / 255
        wanted = class_ids[n * BATCH : (n + 1) * BATCH].to(device)
        judged.append((_features(judges, images) if choose is None else _scores(judges, images, wanted)).cpu())
    values = torch.cat(judged)
    chosen = {}
    for class_id, own in real.items():
        mine = values[np.searchsorted(rows, own)]
        if choose is None:  # herding, which goes by features
            chosen[class_id] = [_whole(dataset, own[n]) for n in herding(mine, settings.images_per_class)]
        else:
            scores = mine.double().numpy()
            places = choose(scores, settings.images_per_class)
            chosen[class_id] = [_whole(dataset, own[n], float(scores[n])) for n in places]
    return chosen


def _whole(dataset: PreparedDataset, row: int, score: float | None = None) -> Chosen:
    """A whole real image."""
    return Chosen(Start(int(row), 0, 0, dataset.image_size, dataset.image_size), score)


def _regressed(
    settings: StartsSettings,
    drawing: Drawing,
    dataset: PreparedDataset,
    real: dict[int, np.ndarray],
    judges: Sequence[Classifier],
    device: torch.device,
) -> dict[int, list[Chosen]]:
    """The whole real images of each class from which untrained networks best predict the judges' soft labels.

    The networks stand for students that are not known yet: ConvNets with instance norm, and the judges' own
    architectures. So that the kernel fits into memory, classes are taken in groups, each judged on its own images.
    """
    per_group = max(2, MOST_ITEMS // drawing.candidates)
    class_ids = list(real)
    chosen: dict[int, list[Chosen]] = {}
    for first in range(0, len(class_ids), per_group):
        group = class_ids[first : first + per_group]
        rows, ids = _ascending({c: _drawn(real[c], drawing.candidates, drawing.seed, class_id=c) for c in group})
        batches = [pixels for _, pixels in real_batches(dataset, rows, batch_size=BATCH)]
        shown = [batch.to(device).float() / 255 for batch in batches]
        labels = torch.cat([functional.softmax(_logits(judges, images) / TEMPERATURE, dim=1) for images in shown])
        kernel = labels.new_zeros(len(rows), len(rows), dtype=torch.float64)
        for network in _untrained(dataset, judges, drawing.seed, shown):
            kernel += cosine_kernel(torch.cat([_feature_map(network, images) for images in shown]))
        kernel /= len(judges) + NUM_CONVNETS
        places = regression(kernel, labels, ids.to(device), settings.images_per_class, ridge=RIDGE)
        for c in group:
            chosen[c] = [_whole(dataset, rows[place]) for place in places[c]]
    return chosen


def _untrained(
    dataset: PreparedDataset, judges: Sequence[Classifier], seed: int, shown: Sequence[Tensor]
) -> Iterator[Classifier]:
    """ConvNets that halve their input until fewer than 6 pixels of a side are left, and the judges' networks.

    Their weights are drawn; batch norm has the statistics of the images shown.
    """
    depth = max(1, math.ceil(math.log2(dataset.image_size / 5.5)))
    convnet = {"channels": [WIDTH] * depth, "norm": "instance", "img_size": dataset.image_size}
    kinds = [("prism_convnet", convnet)] * NUM_CONVNETS + [(j.architecture, j.model_args) for j in judges]
    for n, (architecture, model_args) in enumerate(kinds):
        network = untrained(dataset, architecture, model_args, seed=seed_for(seed, "regression", n)).to(shown[0].device)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None  # the mean over all batches
        network.train()
        for images in shown:
            network(images)
        yield frozen(network)


def _feature_map(network: Classifier, images: Tensor) -> Tensor:
    """The last feature map before pooling (B, D): where in the image something is belongs to what students see."""
    return cast(Any, network.network).forward_features(network.prepare(images)).flatten(1)


def _crops(
    settings: StartsSettings,
    mosaic: Drawing,
    dataset: PreparedDataset,
    real: dict[int, np.ndarray],
    judges: Sequence[Classifier],
    device: torch.device,
) -> dict[int, list[Chosen]]:
    """The surest crops of each class, one of each real image looked at, the surest first.

    Source: Sun et al. 2024 (RDED, arXiv:2312.03526). Deviation: image k is made of ranks k t^2 to (k + 1) t^2 - 1,
    where the released program gives it k, k + IPC, ...; so it stays the same when more are made of its class.
    """
    size = dataset.image_size
    looked_at = {c: _drawn(rows, mosaic.candidates, mosaic.seed, class_id=c) for c, rows in real.items()}
    rows, class_ids = _ascending(looked_at)
    keys = np.array([seed_for(mosaic.seed, "mosaic_crops", int(row)) for row in rows], dtype=np.int64)
    boxes = draw_crops(keys, mosaic.crops, size=size)
    side, mean = size // mosaic.tiles, torch.tensor(dataset.mean)
    per_batch = max(1, BATCH // mosaic.crops)
    judged = []
    for n, (_, pixels) in enumerate(real_batches(dataset, rows, batch_size=per_batch)):
        mine = slice(n * per_batch, (n + 1) * per_batch)
        images = pixels.float() / 255
        crops = [
            cut(image, box, height=side, width=side)
            for image, own in zip(images, boxes[mine].tolist(), strict=True)
            for box in own
        ]
        shown = padded(torch.stack(crops), size=size, fill=mean).to(device)
        wanted = class_ids[mine].repeat_interleave(mosaic.crops).to(device)
        judged.append(_scores(judges, shown, wanted).cpu().reshape(-1, mosaic.crops))
    scores = torch.cat(judged).double().numpy()
    best = scores.argmin(axis=1)
    chosen = {}
    for class_id, own in looked_at.items():
        places = np.searchsorted(rows, own)
        ranked = lowest(scores[places, best[places]], mosaic.tiles**2 * settings.images_per_class)
        chosen[class_id] = [
            Chosen(Start(int(rows[p]), *boxes[p, best[p]].tolist()), float(scores[p, best[p]])) for p in places[ranked]
        ]
    return chosen


def _drawn(rows: np.ndarray, num: int, seed: int, *, class_id: int) -> np.ndarray:
    """At most so many of a class's rows, drawn without repeats, ascending."""
    drawn = permuted(rows.tolist(), seed_for(seed, "candidates", class_id))[:num]
    return np.array(sorted(drawn), dtype=np.int64)


def _ascending(rows_by_class: dict[int, np.ndarray]) -> tuple[np.ndarray, Tensor]:
    """All rows in the order they are stored, and their classes."""
    rows = np.concatenate(list(rows_by_class.values()))
    class_ids = np.repeat(list(rows_by_class), [len(own) for own in rows_by_class.values()])
    order = np.argsort(rows)
    return rows[order], torch.from_numpy(class_ids[order])


def _scores(judges: Sequence[Classifier], images: Tensor, class_ids: Tensor) -> Tensor:
    """Cross-entropy (B,) of the true class under the judges' mean logits."""
    return functional.cross_entropy(_logits(judges, images), class_ids, reduction="none")


def _logits(judges: Sequence[Classifier], images: Tensor) -> Tensor:
    """The judges' mean logits (B, K)."""
    return torch.stack([judge(images) for judge in judges]).mean(dim=0)


def _features(judges: Sequence[Classifier], images: Tensor) -> Tensor:
    """The judges' features (B, D), each scaled to length 1, side by side."""
    return torch.cat([functional.normalize(judge.features(images), dim=1) for judge in judges], dim=1)


def _table(settings: StartsSettings, chosen: dict[int, list[Chosen]]) -> pa.Table:
    num_tiles = settings.mosaic.tiles**2 if settings.mosaic else 1
    rows = [
        {
            "class_id": class_id,
            "index_in_class": n // num_tiles,
            "tile": n % num_tiles,
            **each.start._asdict(),
            "score": each.score,
        }
        for class_id, found in chosen.items()
        for n, each in enumerate(found)
    ]
    return pa.Table.from_pylist(rows, schema=pa.schema(COLUMNS))
