"""Students on shifted test images."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import spec_of_copy

from prism_ray import cli
from prism_ray.models.classifier import load_classifier
from prism_ray.stages.held_out import held_out_rows
from prism_ray.stages.set_measures import Compared, energy_measures, equal_rows, set_measures
from prism_ray.stages.shifts import shifted_accuracies
from prism_ray.work import DISTILL, RunSpec, open_dataset

CPU = torch.device("cpu")
SMOKE = [
    "recipe=digits_smoke",
    "compute=inline",
    "evaluate.shifts=[occluded,'rotation:left']",
    "evaluate.shift_images=5",
    "evaluate.shifted_sets={mnist: mnist}",
    "student.seeds=[0]",
    "student.labels=[hard]",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    storage = tmp_path_factory.mktemp("shifted")
    stages = "stages=[prepare,teach,synthesize,distill,evaluate,report]"
    assert cli.main(["run", *SMOKE, stages, f"storage={storage}"]) == 0
    return storage


@pytest.fixture
def spec(finished: Path, tmp_path: Path) -> RunSpec:
    found = spec_of_copy(finished, tmp_path / "outputs", SMOKE)
    (folder,) = (tmp_path / "outputs" / "artifacts" / "datasets").glob("digits-mnist-*")
    return replace(found, shifted_dirs={"mnist": str(folder)})


def test_every_student_is_measured_on_every_shifted_set(spec: RunSpec) -> None:
    (receipt,) = spec.ledger().receipts(DISTILL).values()
    shifts = receipt.details["shifts"]
    assert set(shifts) == {"occluded", "rotation:left", "mnist"}
    student = load_classifier(Path(spec.run_dir) / "student" / "hard-seed0").eval()
    assert shifted_accuracies(student, spec, CPU) == pytest.approx(shifts)


def test_accuracy_on_mnist_is_of_all_its_images(spec: RunSpec) -> None:
    student = load_classifier(Path(spec.run_dir) / "student" / "hard-seed0").eval()
    mnist = open_dataset(spec.shifted_dirs["mnist"])
    pixels = np.concatenate([mnist.images(split) for split in ("train", "test")])
    labels = np.concatenate([mnist.labels(split) for split in ("train", "test")])
    with torch.no_grad():
        answers = torch.cat([student(part.float() / 255) for part in torch.from_numpy(pixels).split(500)])
    wanted = (answers.argmax(dim=1).numpy() == labels).mean()
    assert shifted_accuracies(student, spec, CPU)["mnist"] == pytest.approx(wanted)


def test_the_report_shows_the_shifted_sets(finished: Path) -> None:
    (page,) = (finished / "runs").glob("*/report/report.html")
    text = page.read_text()
    assert "Shifted test sets" in text
    assert "rotation:left" in text


def test_image_sets_are_compared_in_equal_numbers_of_each_class() -> None:
    sets = {"fake": np.array([0, 0, 0, 1, 1, 1, 1]), "held_out": np.array([1, 0, 1, 0, 1, 0, 1])}
    rows = equal_rows(sets, most=10)
    assert rows is not None
    assert rows["fake"].tolist() == [0, 1, 2, 3, 4, 5]
    assert rows["held_out"].tolist() == [1, 3, 5, 0, 2, 4]
    assert equal_rows(sets, most=2) is None  # no fifth neighbor among four
    assert equal_rows({"fake": np.array([0, 1]), "held_out": np.array([0, 0])}, most=10) is None


def random_sets(num: int, *, far: bool) -> Compared:
    random = np.random.default_rng(0)
    real = random.integers(0, 100, (num, 1, 2, 2)).astype(np.uint8)
    fake = (real + 150).astype(np.uint8) if far else real
    return Compared(fake, real, real, np.repeat([0, 1], num // 2))


def test_identical_sets_are_recalled_and_far_ones_are_not() -> None:
    def pixels(images: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(images).flatten(1).float()

    same, far = (set_measures(random_sets(20, far=far), pixels) for far in (False, True))
    for name in ("precision", "recall", "coverage"):
        assert same[name] == {"mean": 1.0, "real_mean": 1.0}
        assert far[name] == {"mean": 0.0, "real_mean": 1.0}
    assert same["class_coverage"] == {"0": 1.0, "1": 1.0}
    assert far["class_coverage"] == {"0": 0.0, "1": 0.0}
    assert same["fid"]["mean"] == pytest.approx(0, abs=1e-3)
    assert far["fid"]["mean"] > 1


def test_energies_tell_images_that_a_teacher_knows_from_others() -> None:
    def logits(images: np.ndarray) -> torch.Tensor:
        sure = torch.from_numpy(images).flatten(1).float().mean(dim=1)
        return torch.stack([sure, torch.zeros_like(sure)], dim=1)

    found = energy_measures(random_sets(20, far=True), "t", logits, temperature=1.0)
    assert found["mean"] < found["real_mean"]
    assert (found["auroc"], found["overlap"], found["agreement"]) == (0.0, 0.0, 0.5)
    assert sum(found["shares"]) == sum(found["real_shares"]) == pytest.approx(1)
    same = energy_measures(random_sets(20, far=False), "t", logits, temperature=1.0)
    assert (same["auroc"], same["overlap"]) == (0.5, 1.0)


def test_held_out_rows_are_those_of_the_classes_with_images(spec: RunSpec) -> None:
    some = replace(spec, config=replace(spec.config, classes=["3", "7"]))
    split, rows = held_out_rows(some)
    assert split == "test"
    assert set(spec.dataset().labels("test")[rows]) == {3, 7}
