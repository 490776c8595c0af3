"""Teachers: what is found out about them when their artifact is made, and which are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from commands import SMOKE, Command
from torch import nn

from prism_ray import cli
from prism_ray.config import Row
from prism_ray.data.prepared import PreparedDataset, find_prepared
from prism_ray.models.classifier import Classifier, build_classifier, load_classifier, read_extra, save_classifier
from prism_ray.runs import locate
from prism_ray.stages.teach import BN_IMAGES, bn_distances, class_order

CPU = torch.device("cpu")
NO_BATCH_NORM = {"arch": "test_efficientnet_gn", "model_args": {"channel_multiplier": 0.5}}


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Storage with the smoke recipe's data set and teachers."""
    storage = tmp_path_factory.mktemp("taught")
    assert cli.main(["run", *SMOKE, "stages=[prepare,teach]", f"storage={storage}"]) == 0
    return storage


def folder_of(storage: Path, name: str = "vgg") -> Path:
    run = locate(Row("row", cli.compose([*SMOKE, f"storage={storage}"])))
    run.dataset = find_prepared(run.config.dataset, run.artifacts_dir)
    return Path(run.teacher_folder(name))


def dataset_of(storage: Path) -> PreparedDataset:
    dataset = find_prepared(cli.compose(SMOKE).dataset, storage / "artifacts")
    assert dataset is not None
    return dataset


def first_images(dataset: PreparedDataset, count: int) -> torch.Tensor:
    """The first image of each class, then the second of each, …"""
    by_class = dataset.rows_by_class("train")
    rows = [int(by_class[n % dataset.num_classes][n // dataset.num_classes]) for n in range(count)]
    return torch.from_numpy(dataset.images("train", rows)).float() / 255


def test_the_scale_of_a_teachers_statistics_is_that_of_real_images_of_every_class(taught: Path) -> None:
    folder = folder_of(taught)
    facts, teacher = read_extra(folder), load_classifier(folder).eval()
    inputs: list[torch.Tensor] = []
    layers = [module for module in teacher.modules() if isinstance(module, nn.BatchNorm2d)]
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].double()))
    with torch.no_grad():
        teacher(first_images(dataset_of(taught), BN_IMAGES))
    distances = []
    for layer, x in zip(layers, inputs, strict=True):
        assert layer.running_mean is not None
        assert layer.running_var is not None
        mean = (x.mean(dim=(0, 2, 3)) - layer.running_mean).norm()
        var = (x.var(dim=(0, 2, 3), unbiased=False) - layer.running_var).norm()
        distances.append((mean + var).item())
    assert facts["bn_distance_first"] == pytest.approx(distances[0], rel=1e-4)
    assert facts["bn_distance_rest"] == pytest.approx(sum(distances[1:]), rel=1e-4)


def test_a_network_without_batch_norm_has_no_scale(taught: Path) -> None:
    classifier = build_classifier(
        NO_BATCH_NORM["arch"],
        num_classes=10,
        in_chans=1,
        image_size=16,
        mean=[0.3],
        std=[0.4],
        model_args=NO_BATCH_NORM["model_args"],
        seed=0,
    ).eval()
    assert bn_distances(classifier, dataset_of(taught), CPU) == (None, None)


def test_the_accuracy_is_that_on_the_held_out_images(taught: Path) -> None:
    folder, dataset = folder_of(taught), dataset_of(taught)
    teacher = load_classifier(folder).eval()
    with torch.no_grad():
        predicted = teacher(torch.from_numpy(dataset.images("test")).float() / 255).argmax(dim=1)
    assert read_extra(folder)["accuracy"] == np.mean(predicted.numpy() == dataset.labels("test"))


def confusion(order: list[int], *, right: int = 9, wrong: int = 1) -> np.ndarray:
    """Images of each class, of which `right` go to the output that `order` gives it, and `wrong` to each other one."""
    counts = np.full((len(order), len(order)), wrong, dtype=np.int64)
    counts[np.arange(len(order)), order] = right
    return counts


def test_outputs_in_another_order_are_told_from_ignorance() -> None:
    found = class_order(confusion([0, 2, 1, 3]))
    assert found == {"matched_accuracy": 9 / 12, "class": 1, "output": 2}


def test_a_teacher_of_the_same_order_or_of_none_moves_no_class() -> None:
    assert class_order(confusion([0, 1, 2, 3])) is None
    assert class_order(np.full((4, 4), 3)) is None
    assert class_order(np.zeros((4, 4), dtype=np.int64)) is None


def reordered(order: list[int]) -> Callable[[Classifier], Classifier]:
    """The classifier with its outputs in another order, and nothing said about their names."""

    def change(classifier: Classifier) -> Classifier:
        layer = cast(Any, classifier.network).get_classifier()
        with torch.no_grad():
            layer.weight.copy_(layer.weight[order].clone())
            layer.bias.copy_(layer.bias[order].clone())
        return classifier

    return change


def adopted(taught: Path, folder: Path, change: Callable[[Classifier], Classifier]) -> str:
    """A copy of the smoke recipe's primary as if made elsewhere, without class names."""
    classifier = change(load_classifier(folder_of(taught)))
    save_classifier(classifier, folder, class_names=[str(n) for n in range(10)], extra={})
    config = json.loads((folder / "config.json").read_text())
    del config["pretrained_cfg"]["label_names"]
    (folder / "config.json").write_text(json.dumps(config))
    return f"teachers.models.vgg.source={folder}"


def test_a_teacher_with_its_classes_in_another_order_is_refused_with_a_pair(
    taught: Path, prism: Command, tmp_path: Path
) -> None:
    accuracy = read_extra(folder_of(taught))["accuracy"]
    source = adopted(taught, tmp_path / "teacher", reordered([*range(1, 10), 0]))  # digit 1 comes out as output 0
    result = prism("run", source, "stages=[prepare,teach]", "teachers.min_accuracy=0.3", f"storage={taught}")
    assert result.code == 2
    assert "teachers.models.vgg: has its classes in another order" in result.err
    pairs = [f"takes '{digit}' for '{(digit - 1) % 10}'" for digit in range(10)]
    assert sum(pair in result.err for pair in pairs) == 1, result.err
    assert f"{accuracy:.1%} if its outputs are reordered" in result.err


def test_a_teacher_that_knows_nothing_is_not_said_to_be_out_of_order(
    taught: Path, prism: Command, tmp_path: Path
) -> None:
    def blank(classifier: Classifier) -> Classifier:
        layer = cast(Any, classifier.network).get_classifier()
        nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(0))
        return classifier

    source = adopted(taught, tmp_path / "teacher", blank)
    result = prism("run", source, "stages=[prepare,teach]", "teachers.min_accuracy=0.6", f"storage={taught}")
    assert result.code == 2
    assert "below teachers.min_accuracy=60.0%" in result.err
    assert "another order" not in result.err


def test_a_teacher_in_the_right_order_is_adopted(taught: Path, prism: Command, tmp_path: Path) -> None:
    source = adopted(taught, tmp_path / "teacher", lambda classifier: classifier)
    result = prism("run", source, "stages=[prepare,teach]", f"storage={taught}")
    assert result.code == 0, result.err
    run = locate(Row("row", cli.compose([*SMOKE, source, f"storage={taught}"])))
    run.dataset = dataset_of(taught)
    own, theirs = read_extra(folder_of(taught)), read_extra(Path(run.teacher_folder("vgg")))
    same = {"accuracy", "bn_distance_first", "bn_distance_rest", "forward_flops", "order", "num_params"}
    assert {key: theirs[key] for key in same} == {key: own[key] for key in same}
