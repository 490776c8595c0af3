"""Test sets of another domain with a data set's classes, or some of them: each a prepared data set of its own."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from prism_ray.config import DatasetConfig
from prism_ray.data.imagenet_names import class_names_like, synsets
from prism_ray.data.prepared import PreparedDataset, check_dataset, prepare_dataset
from prism_ray.errors import InputError
from prism_ray.options import Source

MNIST = "mnist"


def shifted_source(dataset: DatasetConfig, name: str, where: str) -> DatasetConfig:
    """How a shifted set is read: from a folder of class folders, or 'mnist'; pixels as the data set has them."""
    is_mnist = where == MNIST
    return replace(
        dataset,
        name=f"{dataset.name}-{name}",
        source=Source.mnist if is_mnist else Source.image_folder,
        path=None if is_mnist else where,
        pad=0,
        test_fraction=0.5,
    )


def check_shifted(dataset: DatasetConfig, class_names: Sequence[str], name: str, where: str) -> None:
    """Refuse what `prepare_shifted` would refuse, from a sample."""
    class_ids_in(class_names, check_dataset(shifted_source(dataset, name, where)), name=name)


def prepare_shifted(dataset: DatasetConfig, name: str, where: str, artifacts_dir: str | Path) -> PreparedDataset:
    """The prepared set; both of its splits are for testing."""
    return prepare_dataset(shifted_source(dataset, name, where), artifacts_dir)


def class_ids_in(class_names: Sequence[str], own: Sequence[str], *, name: str) -> list[int]:
    """For each class of a shifted set its id in the data set, by name; ImageNet's also by WordNet id.

    Args:
        class_names: of the data set.
        own: of the shifted set.
        name: of the shifted set, for messages.

    Raises:
        InputError: a class that the data set does not have.
    """
    known = {class_name: n for n, class_name in enumerate(class_names)}
    if len(class_names) == len(synsets()) and list(class_names) == class_names_like(class_names):
        known |= {synset: n for n, synset in enumerate(synsets())}
    unknown = [class_name for class_name in own if class_name not in known]
    if unknown:
        raise InputError(
            f"evaluate.shifted_sets.{name}: its class {unknown[0]!r} is none of the data set's; expected folders named "
            f"as its classes, such as {class_names[0]!r}; rename or remove it"
        )
    return [known[class_name] for class_name in own]
