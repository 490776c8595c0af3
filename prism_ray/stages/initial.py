"""What optimized images start from: real ones, noise, tiles of real crops, or the images of another run."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prism_ray.data.prepared import PreparedDataset
from prism_ray.errors import InputError
from prism_ray.ledger import read_table
from prism_ray.options import Init
from prism_ray.plan import Unit, needs_starts
from prism_ray.stages.starts import Starts, initial_pixels
from prism_ray.stages.views import decode_images
from prism_ray.storage import sha256_of
from prism_ray.work import SYNTHESIZE, RunSpec, started_from


@dataclass(frozen=True)
class Started:
    """Initial images of a unit, and the names of the images they come from, None from noise."""

    pixels: Tensor  # (B, C, H, W) float32; outside [0, 1] where noise leaves it
    sources: list[str | None]


def open_starts(spec: RunSpec) -> Callable[[Unit], Started]:
    """The function from a unit to its initial images."""
    method, dataset = spec.config.method, spec.dataset()
    if needs_starts(spec.config):
        assert spec.starts_dir is not None, "measure comes first"
        starts = Starts.open(spec.starts_dir)
        return lambda unit: _selected(starts, dataset, unit)
    if method.init is Init.generated:
        generated = _Generated(spec)
        return generated.of_unit
    if method.init is Init.noise:
        return lambda unit: _noise(dataset, unit)
    return lambda unit: _real(dataset, unit)


def _real(dataset: PreparedDataset, unit: Unit) -> Started:
    rows = np.array([image.source_row for image in unit.images], dtype=np.int64)
    names = dataset.image_ids("train")
    pixels = torch.from_numpy(dataset.images("train", rows)).float() / 255
    return Started(pixels, [names[row] for row in rows])


def _selected(starts: Starts, dataset: PreparedDataset, unit: Unit) -> Started:
    names = dataset.image_ids("train")
    sources = [starts.sources(image.class_id, image.index_in_class) for image in unit.images]
    return Started(
        initial_pixels(starts, dataset, unit.images), [" ".join(names[s[0]] for s in found) for found in sources]
    )


def _noise(dataset: PreparedDataset, unit: Unit) -> Started:
    """Normal noise of the data set's mean and standard deviation."""
    shape = (dataset.channels, dataset.image_size, dataset.image_size)
    # One generator per image, so that an image's noise does not depend on its batch.
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(image.seed)) for image in unit.images]
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (dataset.mean, dataset.std))
    return Started(torch.stack(noise) * std + mean, [None] * len(unit.images))


class _Generated:
    """Images of another run of the same storage by class and index in the class."""

    def __init__(self, spec: RunSpec) -> None:
        method = spec.config.method
        self._name, size, own_names = method.init_run, spec.dataset().image_size, spec.dataset().class_names
        ledger = started_from(spec)
        self._pixels: dict[tuple[int, int], np.ndarray] = {}
        for _, receipt in sorted(ledger.receipts(SYNTHESIZE).items()):
            if ledger.store.size(receipt.key) is None or sha256_of(ledger.store.read(receipt.key)) != receipt.sha256:
                raise InputError(
                    f"method.init_run={self._name}: {receipt.key} is missing or damaged; run the command of that run "
                    "again, which makes it anew"
                )
            table = read_table(ledger.store, receipt.key)
            keys = zip(table["label"].to_pylist(), table["index_in_class"].to_pylist(), strict=True)
            images = decode_images(table)
            if images.shape[1:] != (spec.dataset().channels, size, size):
                raise InputError(
                    f"method.init_run={self._name}: its images are of shape {images.shape[1:]}, those of this run of "
                    f"{(spec.dataset().channels, size, size)}; name a run on the same data set"
                )
            for class_id, name in zip(table["label"].to_pylist(), table["class_name"].to_pylist(), strict=True):
                if class_id >= len(own_names) or own_names[class_id] != name:
                    raise InputError(
                        f"method.init_run={self._name}: its class {class_id} is {name!r}, which this run's data set "
                        "calls otherwise; name a run on the same data set"
                    )
            self._pixels |= dict(zip(keys, images, strict=True))

    def of_unit(self, unit: Unit) -> Started:
        """Raises `InputError` where that run lacks an image."""
        keys = [(image.class_id, image.index_in_class) for image in unit.images]
        for class_id, k in keys:
            if (class_id, k) not in self._pixels:
                raise InputError(
                    f"method.init_run={self._name}: has no image {k} of class {class_id}; lower images_per_class, or "
                    "name a run with as many"
                )
        pixels = torch.from_numpy(np.stack([self._pixels[key] for key in keys])).float() / 255
        return Started(pixels, [f"{self._name}/{class_id:06d}-{k:06d}" for class_id, k in keys])
