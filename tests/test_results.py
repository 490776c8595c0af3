"""A run's results as its users meet them: loaded with the public libraries, and consistent with each other."""

import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from commands import spec_of_copy
from PIL import Image

from prism_ray import cli, drain
from prism_ray.config import Row
from prism_ray.data.prepared import PreparedDataset
from prism_ray.inspection import open_existing
from prism_ray.ledger import read_table
from prism_ray.models.classifier import load_classifier
from prism_ray.options import LabelKind
from prism_ray.runs import locate
from prism_ray.stages.device import deterministic, teacher_of
from prism_ray.stages.training import test_accuracy as held_out_accuracy
from prism_ray.stages.worker import Worker
from prism_ray.work import RELABEL, SYNTHESIZE, RunSpec, UnitRef, open_dataset, student_inputs, teacher_folder


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return ["recipe=digits_smoke", "compute=inline", f"storage={tmp_path_factory.mktemp('results')}"]


@pytest.fixture(scope="module")
def spec(overrides: list[str]) -> RunSpec:
    """A finished run, as its workers see it."""
    assert cli.main(["run", *overrides]) == 0
    return open_existing(cli.compose(overrides)).spec()


def test_load_dataset_shows_pictures_and_class_names(spec: RunSpec) -> None:
    loaded: Any = datasets.load_dataset("parquet", data_files=f"{spec.run_dir}/images/*.parquet", split="train")
    assert len(loaded) == 20
    assert isinstance(loaded[0]["image"], Image.Image)
    assert loaded[0]["image"].size == (16, 16)
    assert loaded.features["label"].names == [str(digit) for digit in range(10)]
    assert sorted(loaded["image_id"]) == [f"{c:06d}-{k:06d}" for c in range(10) for k in range(2)]
    assert all(loaded.features["label"].names[row["label"]] == row["class_name"] for row in loaded)


def test_timm_loads_the_student_and_gives_the_logits_that_were_evaluated(spec: RunSpec, tmp_path: Path) -> None:
    folder = Path(spec.run_dir, "student/soft-seed0")
    dataset = open_dataset(spec.dataset_dir)
    pixels = dataset.images("test", np.arange(40))
    for n, image in enumerate(pixels):
        Image.fromarray(image[0], "L").save(tmp_path / f"{n:02d}.png")
    script = (
        "import sys, torch, timm, prism_ray.models\n"
        "from pathlib import Path\n"
        "from PIL import Image\n"
        "model = timm.create_model('local-dir:' + sys.argv[1], pretrained=True).eval()\n"
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))\n"
        "images = torch.stack([transform(Image.open(p)) for p in sorted(Path(sys.argv[2]).glob('*.png'))])\n"
        "torch.save(model(images).detach(), sys.argv[3])\n"
    )
    command = [sys.executable, "-c", script, str(folder), str(tmp_path), str(tmp_path / "logits.pt")]
    subprocess.run(command, check=True, timeout=120)
    expected = load_classifier(folder).eval()(torch.from_numpy(pixels).float() / 255)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)


def test_the_reported_accuracy_is_the_published_students(spec: RunSpec) -> None:
    receipt = spec.ledger().receipt("distill", "soft-seed0")
    assert receipt is not None
    classifier = load_classifier(Path(spec.run_dir, "student/soft-seed0")).eval()
    with deterministic(1):
        accuracy = held_out_accuracy(classifier, spec.dataset(), torch.device("cpu"))
    assert accuracy == receipt.details["top1"]


def test_stored_pixels_are_what_the_verifier_saw(spec: RunSpec) -> None:
    ledger, config = spec.ledger(), spec.config
    teacher = teacher_of(spec, config.teachers.primary, torch.device("cpu"))
    for receipt in ledger.receipts(SYNTHESIZE).values():
        table = read_table(ledger.store, receipt.key).to_pylist()
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))[None] for row in table])
        with torch.no_grad(), deterministic(1):
            probabilities = teacher(torch.from_numpy(pixels).float() / 255).softmax(dim=1)
        assert [row["verifier_class"] for row in table] == probabilities.argmax(dim=1).tolist()
        confidences = torch.tensor([row["verifier_confidence"] for row in table])
        answered = probabilities[torch.arange(len(table)), [row["label"] for row in table]]
        torch.testing.assert_close(answered, confidences)


def test_every_row_says_how_it_was_made(spec: RunSpec) -> None:
    ledger, config = spec.ledger(), spec.config
    for unit in spec.units():
        rows = read_table(ledger.store, f"images/{unit.name}.parquet").to_pylist()
        assert [row["seed"] for row in rows] == [image.seed for image in unit.images]
        assert {row["unit_id"] for row in rows} == {unit.unit_id}
        assert {row["iterations"] for row in rows} == {[8, 7][unit.slice_index]}
        assert {row["primary_teacher"] for row in rows} == {config.teachers.primary}
        assert all(row["statistics_teachers"][0] == config.teachers.primary for row in rows)
        assert all(row["loss_ce"] > 0 and row["loss_bn"] > 0 and row["source_image_id"] for row in rows)


def test_the_manifest_names_every_object_and_is_written_last(spec: RunSpec) -> None:
    manifest = spec.ledger().manifest()
    assert manifest is not None
    assert {stage: len(manifest[stage]) for stage in (SYNTHESIZE, RELABEL, "distill")} == {
        SYNTHESIZE: 4,
        RELABEL: 4,
        "distill": 2,
    }
    newest = max(path.stat().st_mtime_ns for path in Path(spec.run_dir, "receipts").rglob("*.json"))
    assert Path(spec.run_dir, "manifest.json").stat().st_mtime_ns >= newest


def test_random_real_images_are_stored_untouched(overrides: list[str]) -> None:
    settings = [*overrides, "method=random_real", "stages=[prepare,teach,synthesize]"]
    assert cli.main(["run", *settings]) == 0
    run = locate(Row("random_real", cli.compose(settings)))
    (folder,) = Path(overrides[-1].removeprefix("storage="), "artifacts/datasets").iterdir()
    dataset = PreparedDataset.open(folder)
    ids = dataset.image_ids("train")
    for receipt in run.ledger.receipts(SYNTHESIZE).values():
        for row in read_table(run.store, receipt.key).to_pylist():
            pixels = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))
            source = ids.index(row["source_image_id"])
            assert np.array_equal(pixels, dataset.images("train", [source])[0, 0])
            assert dataset.labels("train")[source] == row["label"]
            assert row["statistics_teachers"] == []


def test_an_untrained_teacher_is_refused_before_synthesis(
    overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [*overrides, "teach.lr=1e-9", "teachers.min_accuracy=0.5"]
    assert cli.main(["run", *settings]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "teachers.min_accuracy" in error
    run = locate(Row("prism", cli.compose(settings)))
    assert not run.ledger.receipts(SYNTHESIZE)


def test_a_teacher_with_another_class_order_is_refused(
    overrides: list[str], spec: RunSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "reordered"
    shutil.copytree(spec.teacher_dirs["vgg"], folder)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"3"', '"x"').replace('"4"', '"3"').replace('"x"', '"4"'))
    assert cli.main(["run", *overrides, f"teachers.models.vgg.source={folder}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "class 3 is '4'" in error


def test_a_teacher_from_a_folder_is_adopted_with_its_own_bytes(overrides: list[str], spec: RunSpec) -> None:
    folder = spec.teacher_dirs["vgg"]
    settings = [*overrides, f"teachers.models.vgg.source={folder}", "stages=[prepare,teach]"]
    assert cli.main(["run", *settings]) == 0
    adopted = [
        path
        for path in Path(folder).parent.glob("vgg-*")
        if read_json_at(path)["source"] == folder and str(path) != folder
    ]
    assert len(adopted) == 1
    assert (adopted[0] / "model.safetensors").read_bytes() == Path(folder, "model.safetensors").read_bytes()


def test_verify_finds_a_damaged_part_of_a_student_and_run_mends_it(
    overrides: list[str], spec: RunSpec, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Path(spec.run_dir, "student/hard-seed0/config.json")
    before = config.read_bytes()
    config.write_bytes(before.replace(b"prism_convnet", b"prism_convnot"))
    assert cli.main(["verify", *overrides]) == 1
    assert "hard-seed0/model.safetensors: its config.json is missing or differs" in capsys.readouterr().out
    assert cli.main(["run", *overrides]) == 0
    assert cli.main(["verify", *overrides]) == 0
    assert config.read_bytes() == before


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("teachers.models.vgg.model_args={chan:3}", "teachers.models.vgg.model_args: "),
        ("student.model_args={channels:[8,8,8,8,8]}", "student.model_args: "),
        ("teachers.primary=gn", "teachers.primary='gn': has no batch norm"),
    ],
)
def test_networks_that_cannot_work_are_refused_by_the_setting_that_asks_for_them(
    override: str, expected: str, overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    group_norm = ["teachers.models.gn={arch:test_efficientnet_gn,batch_norm:false}", "teachers.pool=[gn,vgg,convnet]"]
    settings = [*overrides, *group_norm, override, "method.cadence=iteration", "student.seeds=[5]"]
    assert cli.main(["run", *settings]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert expected in error


def read_json_at(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "prism_ray.json").read_text())


def test_no_result_outlives_the_images_it_was_made_from(
    overrides: list[str], spec: RunSpec, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(spec.run_dir, "images/train-00002-of-00004.parquet").unlink()
    assert cli.main(["run", *overrides, "stages=[prepare]"]) == 0
    capsys.readouterr()
    assert cli.main(["status", *overrides]) == 0
    status = capsys.readouterr().out
    assert ": partial, in" in status
    assert "synthesize  3/4" in status
    assert "distill     0/2" in status
    assert cli.main(["report", *overrides]) == 0
    (summary,) = json.loads(Path(spec.run_dir, "report/summary.json").read_text())
    assert summary["num_images"] == 15
    assert summary["students"] == []
    assert summary["cosine"]["mean"] is None
    assert cli.main(["run", *overrides]) == 0
    (summary,) = json.loads(Path(spec.run_dir, "report/summary.json").read_text())
    assert (summary["num_images"], len(summary["students"])) == (20, 2)


def test_labels_of_other_bytes_teach_no_student(spec: RunSpec) -> None:
    ledger = spec.ledger()
    before = ledger.receipt(RELABEL, "train-00000-of-00004")
    assert before is not None
    (key,) = before.inputs
    ledger.write_receipt(replace(before, inputs={key: "0" * 64}))
    try:
        assert before.key not in student_inputs(ledger, LabelKind.soft)
        assert key not in student_inputs(ledger, LabelKind.soft)
        assert key in student_inputs(ledger, LabelKind.hard)
    finally:
        ledger.write_receipt(before)


def test_a_unit_that_is_done_is_not_made_again(spec: RunSpec) -> None:
    worker = Worker([spec], node="here", live_nodes=lambda: {"here"})
    before = {path: path.stat().st_mtime_ns for path in Path(spec.run_dir, "receipts").rglob("*.json")}
    chain = [UnitRef(0, SYNTHESIZE, 1), UnitRef(0, RELABEL, 1)]
    assert [outcome.status for _, outcome in worker.process(chain)] == ["done", "done"]
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_worker_whose_node_is_about_to_leave_starts_no_unit(spec: RunSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drain, "_is_leaving", lambda: True)
    worker = Worker([spec], node="here", live_nodes=set)
    ((ref, outcome),) = worker.process([UnitRef(0, SYNTHESIZE, 1), UnitRef(0, RELABEL, 1)])
    assert (ref.stage, outcome.status, outcome.exit_code) == (SYNTHESIZE, "aborted", 75)
    assert spec.ledger().store.keys("attempts") == []


def test_a_receipt_says_where_its_unit_was_made(spec: RunSpec, tmp_path: Path) -> None:
    copy = spec_of_copy(Path(spec.run_dir).parents[1], tmp_path / "copy", ["recipe=digits_smoke", "compute=inline"])
    copy.ledger().store.remove("receipts/relabel")
    place = {"pool": "spot", "labels": {"ray.io/market-type": "spot"}}
    worker = Worker([copy], node="n1", live_nodes=lambda: {"n1"}, place=place)
    ((_, outcome),) = worker.process([UnitRef(0, RELABEL, 1)])
    assert outcome.status == "done", outcome.reason
    (receipt,) = copy.ledger().receipts(RELABEL).values()
    assert {key: receipt.worker[key] for key in ("node", *place)} == {"node": "n1", **place}
    assert receipt.worker["peak_memory_bytes"] > 0


def test_stages_without_images_are_refused(overrides: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for stage in ("distill", "evaluate", "report"):
        assert cli.main(["run", *overrides, "seed=77", f"stages=[{stage}]"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert f"{stage} needs images" in error


def test_correcting_a_teachers_configuration_makes_another_artifact(spec: RunSpec, tmp_path: Path) -> None:
    folder = tmp_path / "teacher"
    shutil.copytree(spec.teacher_dirs["vgg"], folder)
    config = spec.config
    teacher = replace(config.teachers.models["vgg"], source=str(folder))

    def artifact() -> str:
        return teacher_folder("vgg", teacher, config.teach, spec.dataset(), tmp_path, 1)

    before = artifact()
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"bilinear"', '"bicubic"'))
    assert artifact() != before
