"""CPU time of a student's batches: the product's feed against a torch DataLoader over the same PNG files.

    python benchmarks/feed.py [--cells digits fashion_mnist imagenet_lite] [--pairs 7] [--steps 10]

The same images in the same order, equal decoder, equal crops and flips, one thread. `loader` is a DataLoader (no worker
processes) over a data set like ImageFolder: it opens each file, crops, resizes and flips it as Pillow does on
floating-point images, and answers with the class; its draws are given to it. `memory` and `mapped` are the product's
batches with soft labels in the few bits of labels=recommended: images decoded once, or read from a local file and
decoded every time, as where they do not fit into memory. Before anything is timed, images must agree to 1e-4.

Prints a JSON line per cell: milliseconds of CPU time per step, the ratios loader / memory and loader / mapped (median,
least and largest over interleaved rounds), a training step of the recipe's student, and the shares of such a step that
go by waiting for a batch and, of that, for its labels. Without a background thread a step waits for all of its batch.
Ends with 1 if images differ.
"""

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read once, when torch is imported: what follows comes after it

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402

from benchmarks.measuring import circumstances, interleaved, normalization, print_cells, spread  # noqa: E402
from benchmarks.relabel import TOLERANCE, Scene, augmented, make_scene  # noqa: E402
from prism_ray.methods.distillation import batch_of_step, make_optimizer  # noqa: E402
from prism_ray.methods.views import crop_flip  # noqa: E402
from prism_ray.models.classifier import build_classifier  # noqa: E402
from prism_ray.options import LabelKind  # noqa: E402
from prism_ray.schema import table_bytes  # noqa: E402
from prism_ray.seeds import seed_for  # noqa: E402
from prism_ray.stages.data_parallel import ALONE  # noqa: E402
from prism_ray.stages.distill import student_loss  # noqa: E402
from prism_ray.stages.labels import StoredLabels, codec_of, label_table, read_labels  # noqa: E402
from prism_ray.stages.pixels import mapped_pixels  # noqa: E402
from prism_ray.stages.student_batches import StudentBatches, TrainingSet, read_training_set  # noqa: E402
from prism_ray.stages.views import views_hash  # noqa: E402
from prism_ray.work import label_receipt  # noqa: E402

CELLS = {"digits": 100, "fashion_mnist": 100, "imagenet_lite": 80}
"""Images of each cell; the recipe says the rest. labels=recommended: 24 views, 4 bits, of many classes 16."""
STUDENTS = {"imagenet_lite": ["student.model_args={}", "student.arch=resnet18"]}
ORDER_SEED = 7
CPU = torch.device("cpu")


def make_feed(folder: Path, recipe: str, num_images: int) -> Scene:
    """A run with images and labels drawn at random."""
    settings = ["labels=recommended", "labels.mix=none", "labels.views=24", *STUDENTS.get(recipe, [])]
    scene = make_scene(folder, recipe, num_images, settings, teachers=False)
    ledger, labels, generator = scene.ledger(), scene.config.labels, torch.Generator().manual_seed(0)
    for unit in scene.units():
        images = ledger.receipt("synthesize", unit.name)
        assert images is not None
        logits = torch.randn(len(unit.images), labels.views, scene.num_classes, generator=generator)
        ids, drawn_by = [image.image_id for image in unit.images], views_hash(labels, scene.config.seed)
        codec = codec_of(labels, scene.num_classes)
        table = label_table(codec, logits, ids, views_hash=drawn_by, group=unit.unit_id)
        ledger.store.put(label_receipt(unit, images).key, table_bytes(table))
    return scene


def batches(scene: Scene, *, is_mapped: bool) -> StudentBatches:
    """The product's batches of soft-label students."""
    receipts = scene.ledger().receipts("synthesize").values()
    shards = {receipt.key: receipt.sha256 for receipt in receipts}
    read = read_training_set(scene, shards)
    if is_mapped:
        pixels = mapped_pixels(scene.ledger().store, shards, folder=Path(scene.run_dir, "node"))
        read.images._pixels = pixels
        read = TrainingSet(read.units, pixels, read.images)
    read = replace(read, labels=read_labels(scene.ledger(), scene.config, read.units, scene.num_classes))
    return StudentBatches(
        scene,
        LabelKind.soft,
        read,
        rows=np.arange(len(read)),
        order_seed=ORDER_SEED,
        num_steps=1000,
        group=ALONE,
        is_pinned=False,
    )


class Folder(Dataset[tuple[Tensor, int]]):
    """PNG files with their classes by (row, box, flip)."""

    def __init__(self, scene: Scene) -> None:
        self.paths = scene.png_paths()
        self.classes = [image.class_id for unit in scene.units() for image in unit.images]

    def __getitem__(self, drawn: tuple[int, np.ndarray, bool]) -> tuple[Tensor, int]:
        row, box, is_flipped = drawn
        return augmented(self.paths[row], box, is_flipped), self.classes[row]


def loader(scene: Scene, steps: int) -> DataLoader[tuple[Tensor, int]]:
    """Batches of the steps from files, in the order and with the draws of the product's."""
    config, plan = scene.config, []
    images = [image for unit in scene.units() for image in unit.images]
    keys = np.array([seed_for(config.seed, "view", i.class_id, i.index_in_class) for i in images], dtype=np.int64)
    for step in range(steps):
        rows, epochs = batch_of_step(ORDER_SEED, step, num_images=len(images), batch_size=config.student.batch_size)
        drawn = crop_flip(
            keys[rows],
            epochs % config.labels.views,
            crop_area_min=config.labels.crop_area_min,
            flip_probability=config.labels.flip_probability,
        )
        plan.append([(int(row), *one) for row, *one in zip(rows, drawn.boxes, drawn.flips.tolist(), strict=True)])
    return DataLoader(Folder(scene), batch_sampler=plan)


def difference(scene: Scene, made: Sequence[StudentBatches], files: DataLoader[tuple[Tensor, int]]) -> float:
    """Largest difference of any pixel; classes must be equal."""
    worst = 0.0
    for step, (shown, classes) in enumerate(files):
        for one in made:
            batch = one(step)
            if not torch.equal(batch.classes, classes):
                raise SystemExit("the two show other classes")
            worst = max(worst, (batch.shown - shown).abs().max().item())
    return worst


def trainings(scene: Scene, made: StudentBatches, steps: int) -> Iterator[None]:
    """Training steps of the recipe's student on batches that are there, `steps` of them at each `next`."""
    config, (mean, std) = scene.config, normalization(scene.channels)
    network = build_classifier(
        config.student.arch,
        num_classes=scene.num_classes,
        in_chans=scene.channels,
        image_size=scene.image_size,
        mean=mean,
        std=std,
        model_args=config.student.model_args,
        seed=0,
    ).train()
    optimizer = make_optimizer(config.student.optimizer.name, network, lr=1e-3, weight_decay=0.01)
    batch = made(0)
    while True:
        for _ in range(steps):
            loss = student_loss(config, lambda images: network(images), batch, CPU)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        yield


def measure(name: str, *, pairs: int, steps: int, num_images: int | None = None) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(prefix="feed-"))
    try:
        scene = make_feed(folder, name, num_images or CELLS[name])
        memory, mapped = (batches(scene, is_mapped=is_mapped) for is_mapped in (False, True))
        files = loader(scene, steps)
        differing = difference(scene, [memory, mapped], files)
        labels, size = memory._set.labels, scene.config.student.batch_size
        assert isinstance(labels, StoredLabels)
        rows, views = np.arange(size) % len(memory._rows), np.arange(size) % scene.config.labels.views
        train_steps = max(1, steps // 10)
        training = trainings(scene, memory, train_steps)
        loops = {
            "loader": lambda: [None for _ in files],
            "memory": lambda: [memory(step) for step in range(steps)],
            "mapped": lambda: [mapped(step) for step in range(steps)],
            "labels": lambda: [labels.logits(rows, views) for _ in range(steps)],
            "training": lambda: next(training),
        }
        times = interleaved(loops, pairs=pairs)
        codec = codec_of(scene.config.labels, scene.num_classes)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    ms = {loop: 1e3 * median(own) / (train_steps if loop == "training" else steps) for loop, own in times.items()}
    return {
        "cell": name,
        "images_per_step": size,
        "pixels": scene.image_size,
        "student": scene.config.student.arch,
        "codec": codec.name,
        "times_smaller_than_300_views": round(300 * scene.num_classes * 2 / codec.blob_bytes, 1),
        "unit": "ms of CPU time per step",
        "ms": {loop: round(value, 3) for loop, value in ms.items()},
        **{
            f"loader_over_{own}": spread([a / b for a, b in zip(times["loader"], times[own], strict=True)])
            for own in ("memory", "mapped")
        },
        "wait_share": {own: round(ms[own] / (ms[own] + ms["training"]), 4) for own in ("memory", "mapped", "loader")},
        "label_share": round(ms["labels"] / (ms["memory"] + ms["training"]), 4),
        "pixel_difference": differing,
        **circumstances(pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", default=list(CELLS), choices=CELLS)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10, help="of each loop and round; a tenth of training")
    options = parser.parse_args()
    print_cells(
        options.cells,
        lambda name: measure(name, pairs=options.pairs, steps=options.steps),
        difference="pixel_difference",
        tolerance=TOLERANCE,
    )


if __name__ == "__main__":
    main()
