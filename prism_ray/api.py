"""The Python API, for notebooks and programs: five names, imported from `prism_ray` when they are first used.

A run from its settings to its images, in this process; `storage=memory://NAME` keeps all of it in memory, and without
`stages` there would be labels, students and a report as well:

>>> import prism_ray
>>> settings = ["recipe=digits_smoke", "compute=inline", "storage=memory://doctest"]
>>> config = prism_ray.load_config(*settings, "stages=[prepare,teach,synthesize]")
>>> config.method.iterations, config.teachers.pool
(8, ['vgg', 'convnet'])
>>> folder = prism_ray.run(config)  # doctest: +ELLIPSIS
run digits_smoke-prism-... in memory://doctest/runs/digits_smoke-prism-...
...
>>> images = prism_ray.load_images(folder)
>>> images.pixels.shape, images.pixels.dtype, images.class_names[images.class_ids[-1]]
((20, 1, 16, 16), dtype('uint8'), '9')

Any trained classifiers can guide a batch of images, without settings, without files and without Ray. Here two teachers
with random weights stand in for `prism_ray.load_teacher("FOLDER")`:

>>> import torch
>>> from prism_ray.models.classifier import build_classifier, frozen
>>> def teacher(arch, seed):
...     size = dict(num_classes=10, in_chans=1, image_size=16, mean=[0.5], std=[0.25])
...     return frozen(build_classifier(arch, model_args={}, seed=seed, **size))
>>> teachers = [teacher("prism_vgg", 0), teacher("prism_convnet", 1)]
>>> class_ids = torch.tensor([3, 1, 4])
>>> made = prism_ray.synthesize_batch(teachers, class_ids, iterations=5, seed=0)
>>> made.shape, bool(made.min() >= 0), bool(made.max() <= 1)
(torch.Size([3, 1, 16, 16]), True, True)
>>> bool((made == prism_ray.synthesize_batch(teachers, class_ids, iterations=5, seed=0)).all())
True
"""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from prism_ray import cli, pipeline
from prism_ray.artifacts import local_folder
from prism_ray.config import Config, Row
from prism_ray.data.pixels import decode
from prism_ray.errors import ExitCode, InputError
from prism_ray.identity import run_id
from prism_ray.ledger import Ledger, read_columns
from prism_ray.methods.inversion.augment import draw_augmentations
from prism_ray.methods.inversion.engine import Descent, invert
from prism_ray.methods.inversion.matching import Network
from prism_ray.methods.inversion.objective import Guides, Objective
from prism_ray.methods.inversion.statistics import targets_of
from prism_ray.models.classifier import Classifier, frozen, load_classifier, load_timm
from prism_ray.schema import class_names_of
from prism_ray.seeds import seed_for
from prism_ray.storage import open_store
from prism_ray.weights import is_folder
from prism_ray.work import SYNTHESIZE


def load_config(*overrides: str) -> Config:
    """The settings of a run from the same `key=value` strings as on the command line.

    Raises:
        InputError: one line for anything unknown, malformed, of a wrong type or out of range.
    """
    return cli.compose(overrides)


def run(config: Config) -> str:
    """Make a run from wherever it is to its report, as `prism-ray run` does; prints the same lines.

    Returns:
        The address of the run's folder.

    Raises:
        InputError: what the settings name is missing or wrong; nothing was begun.
        PrismError: the run failed; the same call continues it.

    Warns:
        UserWarning: units failed three times and were left out; `prism-ray retry` tries them again.
    """
    code = pipeline.run(
        [Row(config.method.name, config)], title=f"{config.recipe_name}: {config.method.name}", command="prism_ray.run"
    )
    folder = open_store(config.storage).url_of(f"runs/{run_id(config)}")
    if code is ExitCode.quarantined:
        warnings.warn(f"{folder}: units were left out, see prism-ray status", UserWarning, stacklevel=2)
    return folder


def load_teacher(source: str, *, allow_pickle: bool = False) -> Classifier:
    """A trained classifier, frozen: images (B, C, H, W) in [0, 1] to logits (B, K), its preprocessing inside.

    Args:
        source: a folder in timm's local-dir form (students and teachers of a run are), its address in an object store,
            or `timm:NAME` from the local cache or the hub.
        allow_pickle: accept pickled weights; they are still loaded with `weights_only=True`.

    Raises:
        InputError: it is missing, damaged or pickled, or cannot be fetched.
    """
    if source.startswith("timm:"):
        return frozen(load_timm(source, allow_pickle=allow_pickle))
    if not is_folder(source):
        raise InputError(
            f"load_teacher({source!r}): expected a folder in timm's local-dir form, or timm:NAME; give one"
        )
    return frozen(load_classifier(local_folder(source), allow_pickle=allow_pickle))


def synthesize_batch(
    teachers: Sequence[Classifier],
    class_ids: Tensor,
    *,
    initial: Tensor | None = None,
    iterations: int = 1000,
    lr: float = 0.1,
    bn_weight: float = 0.01,
    crop_area_min: float = 0.5,
    flip_probability: float = 0.5,
    roll_max: int = 4,
    seed: int = 0,
) -> Tensor:
    """Images that teachers take for given classes, and whose batch-norm statistics are those that the teachers know.

    Every teacher guides by its logits and its statistics at every iteration, with equal weights; what else there is to
    choose, a run's settings have. Computed on the device of the first teacher, without touching global random states.

    Args:
        teachers: frozen, at least one, all of the same classes; size and channels of the images are the first one's.
        class_ids: (B,), int64, 0 to K - 1.
        initial: (B, C, S, S), pixels in [0, 1], where the images start from, such as real ones; None: from noise.
        iterations: steps of Adam, at least 1.
        lr: above 0, in units of the first teacher's pixel standard deviation; 0.01 from real images, 0.1 from noise.
        bn_weight: of the statistics term, at least 0; 0 leaves it out.
        crop_area_min: smallest share of the area in a random crop, 0 to 1; 1 is no crop.
        flip_probability: of a horizontal flip, 0 to 1; 0 where a mirrored image is of another class.
        roll_max: largest cyclic shift per axis, pixels, at least 0.
        seed: at least 0; the same one gives the same images on the same kind of device and build of torch.

    Returns:
        (B, C, S, S), float, pixels in [0, 1].

    Raises:
        ValueError: no teacher, shapes disagree, or there are no statistics to match.
        NotFinite: an image or loss is no number at the end.
    """
    if not teachers:
        raise ValueError("teachers: there is none; expected at least one")
    first = teachers[0]
    device, size = first.mean.device, first.input_size
    if initial is None:
        draws = [torch.Generator().manual_seed(seed_for(seed, "noise", n)) for n in range(len(class_ids))]
        noise = torch.stack([torch.randn((first.in_chans, size, size), generator=draw) for draw in draws])
        initial = noise.to(device) * first.std + first.mean
    side = initial.shape[-1]
    networks = {
        str(number): Network(teacher, targets_of(teacher, None, conv=False)) for number, teacher in enumerate(teachers)
    }
    equal = dict.fromkeys(networks, 1 / len(networks))
    result = invert(
        initial.to(device),
        class_ids.to(device),
        networks=networks,
        guides=lambda iteration: Guides(equal, equal if bn_weight else {}),
        objective=Objective(bn_weight=bn_weight),
        descent=Descent(num_iterations=iterations, lr=lr),
        mean=first.mean.flatten().tolist(),
        std=first.std.flatten().tolist(),
        augmentations=lambda size: draw_augmentations(
            seed_for(seed, "augmentations"),
            iterations,
            size=size,
            crop_area_min=crop_area_min,
            flip_probability=flip_probability,
            roll_max=round(roll_max * size / side),
        ),
        antialias=False,
        seed=seed,
    )
    return result.images


class Images(NamedTuple):
    """Images of a run, class by class."""

    pixels: np.ndarray  # (N, C, S, S), uint8
    class_ids: np.ndarray  # (N,), int64
    class_names: list[str]  # of every class id; empty where the tables say none


def load_images(run_folder: str) -> Images:
    """The synthetic images of a run, as far as they are made: by class, then by number.

    Args:
        run_folder: path or address, as `run` returns it.

    Raises:
        InputError: there is no run, or it has no images yet.
        PrismError: a shard is missing or damaged.
    """
    store = open_store(run_folder)
    receipts = Ledger(store).receipts(SYNTHESIZE)
    if not receipts:
        raise InputError(
            f"load_images({run_folder!r}): no run with images there; expected a folder that run() returned"
        )
    columns = ["image", "label", "index_in_class", "image_id"]
    tables = [read_columns(store, receipt.key, columns) for _, receipt in sorted(receipts.items())]
    rows = [row for table in tables for row in table.to_pylist()]
    rows.sort(key=lambda row: (row["label"], row["index_in_class"]))
    decoded = [np.asarray(decode(row["image"]["bytes"], row["image_id"])) for row in rows]
    pixels = [np.atleast_3d(image).transpose(2, 0, 1) for image in decoded]
    class_ids = np.array([row["label"] for row in rows], dtype=np.int64)
    return Images(np.stack(pixels), class_ids, class_names_of(tables[0].schema) or [])
