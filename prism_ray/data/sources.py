"""Choose a source of real images by name, and refuse class names no classifier can be trained on."""

from collections import Counter
from collections.abc import Callable

from prism_ray.config import DatasetConfig
from prism_ray.data.digits import digits, mnist
from prism_ray.data.fashion_mnist import FashionMnist
from prism_ray.data.hf_parquet import HfParquet
from prism_ray.data.image_folder import ImageFolder
from prism_ray.data.imagenet_names import ImagenetNames
from prism_ray.data.records import RealSource
from prism_ray.errors import InputError
from prism_ray.options import Source

SOURCES: dict[Source, Callable[[DatasetConfig], RealSource]] = {
    Source.digits: digits,
    Source.fashion_mnist: FashionMnist,
    Source.image_folder: ImageFolder,
    Source.parquet: HfParquet,
    Source.mnist: mnist,
    Source.imagenet_names: ImagenetNames,
}


def open_source(dataset: DatasetConfig) -> RealSource:
    """The data set where it lies; names and headers are read, no image.

    Raises:
        InputError: one line that names what is missing or wrong and what to do.
    """
    source = SOURCES[dataset.source](dataset)
    _check_class_names(source.class_names, dataset)
    return source


def _check_class_names(class_names: list[str], dataset: DatasetConfig) -> None:
    if len(class_names) < 2:
        raise InputError(
            f"dataset.path={dataset.path!r}: has the classes {class_names}; expected at least 2; "
            "check that the path points at the whole data set"
        )
    repeated = sorted(name for name, count in Counter(class_names).items() if count > 1)
    if repeated:
        raise InputError(
            f"dataset.path={dataset.path!r}: class names {repeated} occur more than once; expected distinct names; "
            "rename them in the source"
        )
    if "" in class_names:
        raise InputError(f"dataset.path={dataset.path!r}: a class has an empty name; name it in the source")
