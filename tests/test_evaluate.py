"""What is measured of a run: likeness in every feature space, judges, and students on the split that is asked for."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import spec_of_copy

from prism_ray import cli
from prism_ray.ledger import read_table
from prism_ray.methods.metrics import effective_rank, intra_class_cosine, top1, vendi_score
from prism_ray.models.classifier import load_classifier
from prism_ray.options import EvaluationSplit, LabelKind
from prism_ray.stages.device import deterministic, teacher_of
from prism_ray.stages.distill import Distiller, measured_accuracy, validation_split
from prism_ray.stages.evaluate import measure_diversity
from prism_ray.stages.held_out import reserved_rows
from prism_ray.stages.student_batches import read_training_set
from prism_ray.stages.views import decode_images
from prism_ray.work import DISTILL, DIVERSITY, DiversityItem, RunSpec, StudentItem, student_inputs

CPU = torch.device("cpu")
SMOKE = [
    "recipe=digits_smoke",
    "compute=inline",
    "evaluate.feature_model=convnet",
    "evaluate.judges=[convnet,vgg]",
    "evaluate.split=validation",
    "student.validation_images=3",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Storage with the images and labels of a run that is measured on validation images."""
    storage = tmp_path_factory.mktemp("measured")
    stages = "stages=[prepare,teach,synthesize,relabel,evaluate]"
    assert cli.main(["run", *SMOKE, stages, f"storage={storage}"]) == 0
    return storage


@pytest.fixture
def spec(finished: Path, tmp_path: Path) -> RunSpec:
    """That run in a copy of its own, as its workers see it."""
    return spec_of_copy(finished, tmp_path / "outputs", SMOKE)


def stored_images(spec: RunSpec) -> tuple[np.ndarray, torch.Tensor]:
    """Pixels and class ids of a run's images."""
    store = spec.ledger().store
    tables = [read_table(store, key) for key in sorted(student_inputs(spec.ledger(), LabelKind.hard))]
    class_ids = np.concatenate([table["label"].to_numpy() for table in tables])
    return np.concatenate([decode_images(table) for table in tables]), torch.tensor(class_ids)


def measured(spec: RunSpec) -> dict:
    return json.loads(Path(spec.run_dir, DIVERSITY).read_text())


def test_diversity_is_measured_in_every_feature_space_beside_as_many_real_images(spec: RunSpec) -> None:
    pixels, class_ids = stored_images(spec)
    dataset = spec.dataset()
    rows = np.concatenate([rows[:2] for rows in dataset.rows_by_class("train")])
    real, real_ids = dataset.images("train", rows), torch.tensor(dataset.labels("train")[rows])
    found = {space["space"]: space for space in measured(spec)["spaces"]}
    assert {space: entry["model"] for space, entry in found.items()} == {
        "held-out": "convnet",
        "primary": "vgg",
        "raw": None,
    }
    for entry in found.values():
        for name, measure in (
            ("cosine", intra_class_cosine),
            ("vendi", vendi_score),
            ("effective_rank", effective_rank),
        ):
            for prefix, images, ids in (("", pixels, class_ids), ("real_", real, real_ids)):
                values = torch.from_numpy(images)
                if entry["model"] is not None:
                    with deterministic(1), torch.no_grad():
                        values = teacher_of(spec, entry["model"], CPU).features(values.float() / 255)
                mean, std = measure(values.flatten(1), ids)
                assert entry[name][f"{prefix}mean"] == pytest.approx(mean, abs=1e-6), (entry["space"], name)
                assert entry[name][f"{prefix}std"] == pytest.approx(std, abs=1e-6)


def test_judges_are_asked_about_every_stored_image(spec: RunSpec) -> None:
    pixels, class_ids = stored_images(spec)
    for judged in measured(spec)["judges"]:
        with deterministic(1), torch.no_grad():
            logits = teacher_of(spec, judged["judge"], CPU)(torch.from_numpy(pixels).float() / 255)
        assert judged["num_images"] == 20
        assert judged["top1_hits"] == round(20 * top1(logits, class_ids))
        assert judged["top5_hits"] == int((logits.topk(5).indices == class_ids[:, None]).any(dim=1).sum())
    assert [judged["judge"] for judged in measured(spec)["judges"]] == ["convnet", "vgg"]


def test_measures_of_an_older_version_are_made_again(spec: RunSpec) -> None:
    before, item = measured(spec), DiversityItem(spec)
    assert item.is_done
    Path(spec.run_dir, DIVERSITY).write_text(json.dumps({"inputs": before["inputs"], "cosine": {"mean": 0.5}}))
    assert not item.is_done
    measure_diversity(item)
    assert measured(spec) == before


def test_no_image_starts_from_one_that_students_are_measured_on(spec: RunSpec) -> None:
    reserved = reserved_rows(spec)
    assert reserved.tolist() == np.concatenate([rows[-3:] for rows in spec.dataset().rows_by_class("train")]).tolist()
    assert not {image.source_row for unit in spec.units() for image in unit.images} & set(reserved.tolist())


def test_a_validation_split_is_measured_without_the_test_images(spec: RunSpec) -> None:
    for path in map(Path, spec.dataset().addresses("test")):
        path.write_bytes(b"nobody reads this")
    looks = replace(spec.config, student=replace(spec.config.student, evaluate_every=5))
    item = StudentItem(replace(spec, config=looks), 0, LabelKind.soft)
    Distiller().train(item)
    receipt = spec.ledger().receipt(DISTILL, item.name)
    assert receipt is not None
    rows = reserved_rows(spec)
    student = load_classifier(Path(spec.run_dir, "student", item.name)).eval()
    with deterministic(1), torch.no_grad():
        logits = student(torch.from_numpy(spec.dataset().images("train", rows)).float() / 255)
    assert receipt.details["top1"] == top1(logits, torch.tensor(spec.dataset().labels("train")[rows]))


def test_learning_rates_are_judged_on_other_images_than_students(spec: RunSpec) -> None:
    keys = student_inputs(spec.ledger(), LabelKind.hard)
    split = validation_split(spec, read_training_set(spec, keys))
    rows = np.concatenate([rows[-6:-3] for rows in spec.dataset().rows_by_class("train")])
    assert np.array_equal(split.pixels(np.arange(30)).numpy(), spec.dataset().images("train", rows))


def test_a_run_of_some_classes_is_measured_on_those(spec: RunSpec) -> None:
    config = replace(
        spec.config, classes=["3", "5"], evaluate=replace(spec.config.evaluate, split=EvaluationSplit.test)
    )
    dataset, teacher = spec.dataset(), teacher_of(spec, "vgg", CPU)
    own = np.flatnonzero(np.isin(dataset.labels("test"), [3, 5]))
    with deterministic(1), torch.no_grad():
        logits = teacher(torch.from_numpy(dataset.images("test", own)).float() / 255)
        accuracy = measured_accuracy(teacher, replace(spec, config=config), CPU)
    assert accuracy == top1(logits, torch.tensor(dataset.labels("test")[own]))


def test_the_nearest_training_images_are_those_of_all_and_none_that_is_held_out(spec: RunSpec) -> None:
    found, (pixels, _), dataset = measured(spec)["neighbors"], stored_images(spec), spec.dataset()
    pool = np.setdiff1d(np.arange(dataset.num_images("train")), reserved_rows(spec))
    assert (found["model"], found["num_training"], found["num_images"]) == ("convnet", len(pool), 20)
    store = spec.ledger().store
    tables = [read_table(store, key) for key in sorted(student_inputs(spec.ledger(), LabelKind.hard))]
    image_ids = [image_id for table in tables for image_id in table["image_id"].to_pylist()]
    with deterministic(1), torch.no_grad():
        features = teacher_of(spec, "convnet", CPU).features
        own = features(torch.from_numpy(pixels).float() / 255).double()
        real = features(torch.from_numpy(dataset.images("train", pool)).float() / 255).double()
    distances = (own[:, None] - real[None]).norm(dim=2)
    expected = {image_id: row.min().item() for image_id, row in zip(image_ids, distances, strict=True)}
    assert {image_id for image_id, _, _ in found["images"]} == set(image_ids)
    for image_id, row, distance in found["images"]:
        assert row in pool
        assert distance == pytest.approx(expected[image_id], rel=1e-3)


def test_a_run_of_real_images_is_told_from_new_ones(finished: Path, tmp_path: Path) -> None:
    settings = [*SMOKE, "method=random_real"]
    storage = f"storage={shutil.copytree(finished, tmp_path / 'real')}"
    assert cli.main(["run", *settings, storage, "stages=[prepare,teach,synthesize,evaluate]"]) == 0
    (run_dir,) = (tmp_path / "real/runs").glob("*random_real*")
    found = json.loads((run_dir / DIVERSITY).read_text())["neighbors"]
    assert found["nearer_share"] == 1
    assert {distance for _, _, distance in found["images"]} == {0}


def test_images_and_real_ones_are_placed_in_one_plane(spec: RunSpec) -> None:
    plane = measured(spec)["points"]
    assert len(plane["points"]) == len(plane["real_points"]) == len(plane["class_ids"])
    assert 0 < plane["shares"][1] <= plane["shares"][0] <= 1
    assert np.allclose(np.mean(plane["real_points"], axis=0), 0, atol=1e-2), "the real ones are around the origin"


def test_confusions_add_up_to_the_accuracies(spec: RunSpec) -> None:
    (found,) = measured(spec)["confusions"]
    matrix = np.array(found["matrix"])
    assert (found["name"], matrix.shape, matrix.sum(axis=1).tolist()) == ("vgg", (10, 10), [3] * 10)
    item = StudentItem(spec, 0, LabelKind.hard)
    Distiller().train(item)
    receipt = spec.ledger().receipt(DISTILL, item.name)
    assert receipt is not None
    own = np.array(receipt.details["confusion"])
    assert own.trace() / own.sum() == pytest.approx(receipt.details["top1"])
