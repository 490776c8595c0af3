"""CPU time of labelling images in many views: the product's stage against a naive loop over views.

    python benchmarks/relabel.py [--cells digits fashion_mnist fashion_mnist_frobenius imagenet_lite] [--pairs 7]

The same teachers, images, views, crops, precision (fp32) and thread for both. `naive` is written from the description
of FKD's program: in every view it opens every image again, crops, resizes and flips one after another, mixes, runs each
teacher on the view's batch, and writes a file per batch. Its draws are given to it. Crop and resize are Pillow's on
floating-point images, the quickest exact way. `stage` reads the shard, labels it and writes the label shard. Before
anything is timed, the labels that both wrote must agree to 1e-4 and what half precision rounds.

Prints a JSON line per cell: microseconds of CPU time per image and view, and the ratio naive / stage as median, least
and largest over interleaved pairs. Ends with 1 if labels differ.
"""

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read once, when torch is imported: what follows comes after it

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.measuring import (  # noqa: E402
    SIZES,
    circumstances,
    drawn_pngs,
    image_shard,
    interleaved,
    normalization,
    print_cells,
    spread,
    stand_in,
)
from prism_ray.cli.compose import compose  # noqa: E402
from prism_ray.config import label_teachers  # noqa: E402
from prism_ray.data.imagenet_names import class_names  # noqa: E402
from prism_ray.data.prepared import PreparedDataset  # noqa: E402
from prism_ray.methods.soft_labels import combine  # noqa: E402
from prism_ray.methods.views import Cutmix, crop_flip, cutmix  # noqa: E402
from prism_ray.models.classifier import load_classifier, save_classifier  # noqa: E402
from prism_ray.options import Mix  # noqa: E402
from prism_ray.plan import Unit, plan_units  # noqa: E402
from prism_ray.schema import table_bytes  # noqa: E402
from prism_ray.seeds import seed_for  # noqa: E402
from prism_ray.stages.labels import read_labels  # noqa: E402
from prism_ray.stages.relabel import Relabeler  # noqa: E402
from prism_ray.storage import sha256_of  # noqa: E402
from prism_ray.work import RunSpec, image_receipt, label_receipt  # noqa: E402

TOLERANCE = 1e-4
CELLS = {
    # Name: recipe, images, views, settings.
    "digits": ("digits", 100, 12, ()),
    "fashion_mnist": ("fashion_mnist", 100, 12, ("labels=recommended",)),
    "fashion_mnist_frobenius": ("fashion_mnist", 100, 12, ("labels=prism_released",)),
    "imagenet_lite": ("imagenet_lite", 16, 3, ("labels=sre2l", "labels.teachers=[lite0,lite1]")),
}


@dataclass(frozen=True)
class Scene(RunSpec):
    """A run whose plan needs no real images, because its shards are written by `make_scene`."""

    image_size: int = 0
    channels: int = 0
    num_classes: int = 0

    def dataset(self) -> PreparedDataset:
        names = class_names() if self.num_classes == 1000 else [str(n) for n in range(self.num_classes)]
        mean, std = normalization(self.channels)
        shape = {"image_size": self.image_size, "channels": self.channels}
        counts = {"train": [0] * len(names), "test": [0] * len(names)}
        facts: dict[str, Any] = {"counts": counts, "mean": mean, "std": std, "split": {}, "files": []}
        return PreparedDataset(self.dataset_dir, "made", names, **shape, **facts)

    def units(self) -> list[Unit]:
        return plan_units(self.config, [[]] * self.num_classes, self.class_ids())

    def png_paths(self) -> list[Path]:
        """The same images as files, in the order of the plan: a folder per class."""
        images = [image for unit in self.units() for image in unit.images]
        return [Path(self.run_dir, f"png/{image.class_id:04d}/{image.image_id}.png") for image in images]


def make_scene(folder: Path, recipe: str, num_images: int, settings: Sequence[str], *, teachers: bool = True) -> Scene:
    """A run with images and no labels: smooth random images of a recipe's size in one shard, and as PNG files.

    Networks that the recipe trains have random weights and the statistics of random images.
    """
    side, channels, num_classes = SIZES[recipe]
    chosen = 8 if num_classes == 1000 else num_classes
    own = [f"images_per_class={num_images // chosen}", f"method.batch_size={num_images}", f"storage={folder}"]
    config = compose([f"recipe={recipe}", "method=prism_released", *own, "method.init=noise", *settings])
    dirs = {name: str(folder / name) for name in label_teachers(config)} if teachers else {}
    run_dir = folder / "run"
    scene = Scene(config, str(run_dir), 0, "", dirs, image_size=side, channels=channels, num_classes=num_classes)
    for number, (name, path) in enumerate(dirs.items()):
        Path(path).mkdir(parents=True)
        drawn = torch.Generator().manual_seed(number)
        built = stand_in(config.teachers.models[name], recipe, seed=number, generator=drawn, batches=5)
        save_classifier(built, Path(path), class_names=scene.dataset().class_names, extra={})
    generator = torch.Generator().manual_seed(0)
    store, names, paths = scene.ledger().store, scene.dataset().class_names, iter(scene.png_paths())
    for unit in scene.units():
        rows = len(unit.images)
        pngs = drawn_pngs(rows, side=side, channels=channels, generator=generator)
        for png in pngs:
            path = next(paths)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png)
        class_ids, ids = [image.class_id for image in unit.images], [image.image_id for image in unit.images]
        data = image_shard(pngs, class_ids, ids, names)
        receipt = replace(image_receipt(unit), rows=rows, bytes=len(data), sha256=sha256_of(data))
        store.put(receipt.key, data)
        scene.ledger().write_receipt(receipt)
    return scene


def stage(scene: Scene, relabeler: Relabeler) -> None:
    """Every unit as the product labels it, its shard written."""
    ledger = scene.ledger()
    for unit in scene.units():
        images = ledger.receipt("synthesize", unit.name)
        assert images is not None
        table, receipt = relabeler.compute(unit, label_receipt(unit, images))
        ledger.store.put(receipt.key, table_bytes(table))


class Naive:
    """The loop that one writes first; teachers are loaded once, as by the stage."""

    def __init__(self, scene: Scene) -> None:
        self.scene, self.labels = scene, scene.config.labels
        self.teachers = [load_classifier(Path(path)).eval() for path in scene.teacher_dirs.values()]
        self.paths, self.units = scene.png_paths(), scene.units()
        self.folder = Path(scene.run_dir, "naive")
        self.draws = [self._draws(view) for view in range(self.labels.views)]

    def _draws(self, view: int) -> tuple[np.ndarray, np.ndarray, list[Cutmix | None]]:
        images = [image for unit in self.units for image in unit.images]
        seed, side, labels = self.scene.config.seed, self.scene.image_size, self.labels
        keys = np.array([seed_for(seed, "view", i.class_id, i.index_in_class) for i in images], dtype=np.int64)
        drawn = crop_flip(
            keys, np.array(view), crop_area_min=labels.crop_area_min, flip_probability=labels.flip_probability
        )
        mixed: list[Cutmix | None] = []
        for unit in self.units:
            group = seed_for(seed, "cutmix", unit.slice_index, unit.chunk_index)
            is_mixed = labels.mix is Mix.cutmix
            mixed.append(cutmix(seed_for(group, "view", view), len(unit.images), image_size=side) if is_mixed else None)
        return drawn.boxes, drawn.flips, mixed

    @torch.no_grad()
    def __call__(self) -> None:
        self.folder.mkdir(exist_ok=True)
        for view, (boxes, flips, mixed) in enumerate(self.draws):
            start = 0
            for number, (unit, mix) in enumerate(zip(self.units, mixed, strict=True)):
                rows = range(start, start + len(unit.images))
                start += len(unit.images)
                shown = torch.stack([augmented(self.paths[row], boxes[row], bool(flips[row])) for row in rows])
                if mix is not None:
                    top, left, height, width = mix.box
                    inside = (..., slice(top, top + height), slice(left, left + width))
                    shown[inside] = shown[torch.from_numpy(mix.permutation)][inside]
                answers = [teacher(shown) for teacher in self.teachers]
                logits = combine(answers, rule=self.labels.rule.name, weights=self.labels.weights or None)
                kept = {
                    "coordinates": boxes[rows.start : rows.stop],
                    "flips": flips[rows.start : rows.stop],
                    "mix": mix,
                }
                torch.save({**kept, "logits": logits.half()}, self.folder / f"{view}-{number}.pt")


def augmented(path: Path, box: np.ndarray, is_flipped: bool) -> Tensor:
    """An image file, cropped, resized to its size and flipped: float32 (C, H, W) in [0, 1].

    Pillow's bilinear filter takes boxes between pixels, and rounds nothing in floating-point images.
    """
    with Image.open(path) as image:
        width, height = image.size
        top, left, box_height, box_width = box * [height, width, height, width]
        corners = (left, top, min(left + box_width, width), min(top + box_height, height))
        bands = [
            band.convert("F").resize((width, height), Image.Resampling.BILINEAR, box=corners) for band in image.split()
        ]
    pixels = torch.from_numpy(np.stack([np.asarray(band) for band in bands])) / 255
    return pixels.flip(-1) if is_flipped else pixels


def difference(scene: Scene, naive: Naive) -> float:
    """Largest difference of the labels that both write, in excess of what half precision rounds."""
    exact = replace(scene, config=replace(scene.config, labels=replace(naive.labels, bits=16, top_k=None)))
    stage(exact, Relabeler(exact))
    naive()
    stored = read_labels(exact.ledger(), exact.config, exact.units(), exact.num_classes)
    worst, start = 0.0, 0
    for number, unit in enumerate(naive.units):
        rows = np.arange(start, start + len(unit.images))
        start += len(unit.images)
        for view in range(naive.labels.views):
            loaded = torch.load(naive.folder / f"{view}-{number}.pt", weights_only=False)["logits"].float()
            own = stored.logits(rows, np.full(len(rows), view))
            worst = max(worst, ((own - loaded).abs() - 2**-10 * loaded.abs()).max().item())
    return max(worst, 0.0)


def measure(name: str, *, pairs: int, views: int | None, num_images: int | None = None) -> dict[str, Any]:
    recipe, images, own_views, settings = CELLS[name]
    images, views = num_images or images, views or own_views
    folder = Path(tempfile.mkdtemp(prefix="relabel-"))
    try:
        scene = make_scene(folder, recipe, images, [*settings, f"labels.views={views}"])
        naive = Naive(scene)
        differing = difference(scene, naive)
        relabeler = Relabeler(scene)
        times = interleaved({"naive": naive, "stage": lambda: stage(scene, relabeler)}, pairs=pairs)
        labels = views * len(naive.paths)
    finally:
        shutil.rmtree(folder)
    return {
        "cell": name,
        "images": len(naive.paths),
        "views": views,
        "teachers": len(naive.teachers),
        "unit": "us of CPU time per image and view",
        "us": {name: round(1e6 * median(values) / labels, 1) for name, values in times.items()},
        "naive_over_stage": spread([a / b for a, b in zip(times["naive"], times["stage"], strict=True)]),
        "label_difference": differing,
        **circumstances(pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", default=list(CELLS), choices=CELLS)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--views", type=int, help="of each image; a cell's own number if left out")
    options = parser.parse_args()
    print_cells(
        options.cells,
        lambda name: measure(name, pairs=options.pairs, views=options.views),
        difference="label_difference",
        tolerance=TOLERANCE,
    )


if __name__ == "__main__":
    main()
