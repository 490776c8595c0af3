"""From run folders to summaries, tables and the files of a suite."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from report_samples import SummaryMaker, gray, students, write_images

from prism_ray.cli import compose
from prism_ray.config import Row
from prism_ray.data.prepared import PreparedDataset, prepare_dataset
from prism_ray.ledger import Receipt
from prism_ray.report.contents import StudentFacts
from prism_ray.report.ranking import score_rows
from prism_ray.runs import Run, locate
from prism_ray.storage import sha256_of_file, to_json
from prism_ray.summary import results_table, summarize, write_reports
from prism_ray.work import DISTILL, RELABEL, SYNTHESIZE, image_receipt, label_receipt, student_inputs

RunMaker = Callable[..., Run]
REFERENCES = {"random_real": "random", "full_data": "full"}


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("summaries")


@pytest.fixture(scope="module")
def dataset(storage: Path) -> PreparedDataset:
    return prepare_dataset(compose(["recipe=digits_smoke"]).dataset, storage / "artifacts")


def published(run: Run, receipt: Receipt, data: bytes | None = None, **changes: object) -> Receipt:
    """Commit a file of a run; `data` is left out where it is there already."""
    if data is not None:
        run.store.put(receipt.key, data)
    path = Path(run.store.url_of(receipt.key))
    found = {"bytes": path.stat().st_size, "sha256": sha256_of_file(path), **changes}
    # Fields of several types in one dict, which the type checker can't tell apart.
    receipt = replace(receipt, **found)  # pyright: ignore[reportArgumentType]
    run.ledger.write_receipt(receipt)
    return receipt


@pytest.fixture
def make_run(storage: Path, dataset: PreparedDataset, tmp_path: Path) -> RunMaker:
    """Makes runs of one image shard with labels and a student, by hand: their networks are of no interest here."""

    def make(label: str, *overrides: str, **details: object) -> Run:
        settings = ["recipe=digits_smoke", f"storage={storage}", f"run_id={tmp_path.name}-{label}", *overrides]
        run = locate(Row(label, compose(settings), "vgg"))
        run.dataset = dataset
        for name in ("vgg", "convnet"):
            folder = tmp_path / name
            folder.mkdir(exist_ok=True)
            facts = {"architecture": f"prism_{name}", "accuracy": 0.9, "num_params": 3, "num_bn_layers": 2}
            (folder / "prism_ray.json").write_bytes(to_json(facts))
            run.teacher_dirs[name] = str(folder)
        unit = run.units[0]
        rows = [(class_id, index, gray(20 * class_id)) for class_id in range(10) for index in range(2)]
        names = [str(digit) for digit in range(10)]
        write_images(Path(run.store.url_of(image_receipt(unit).key)), rows, method=label, class_names=names)
        images = published(run, image_receipt(unit), rows=20, seconds=2.0)
        published(run, label_receipt(unit, images), b"labels", rows=20, seconds=1.5, details={"codec": "top_3+fp16"})
        for item in run.students():
            receipt = Receipt(stage=DISTILL, name=item.name, unit_id=item.name, key=f"student/{item.name}/model")
            inputs = student_inputs(run.ledger, item.labels)
            found = {"top1": 0.5, "steps": 10, "num_params": 123, **details}
            published(run, receipt, b"weights", inputs=inputs, seconds=4.0, details=found)
        return run

    return make


def test_a_summary_holds_what_receipts_say(make_run: RunMaker) -> None:
    run = make_run("a", best_on_test=0.7, lr=0.02, images_per_s=300.0, data_wait_share=0.25)
    summary = summarize(run)
    assert (summary.label, summary.column, summary.num_images) == ("a", "vgg", 20)
    assert (summary.label_codec, summary.label_views, summary.label_s, summary.student_s) == ("top_3+fp16", 4, 1.5, 8.0)
    soft = next(student for student in summary.students if student.labels == "soft")
    assert (soft.top1, soft.best_on_test, soft.lr) == (0.5, 0.7, 0.02)
    assert (soft.images_per_s, soft.data_wait_share) == (300.0, 0.25)


def test_receipts_without_the_newer_details_are_summarized_too(make_run: RunMaker) -> None:
    run = make_run("a")
    for receipt in run.ledger.receipts(RELABEL).values():
        run.ledger.write_receipt(replace(receipt, details={}))
    summary = summarize(run)
    assert summary.label_codec == "fp16"
    student = summary.students[0]
    assert (student.best_on_test, student.images_per_s, student.data_wait_share) == (None, None, None)
    assert student.lr == run.config.student.lr


def test_labels_computed_while_training_are_said_to_be(make_run: RunMaker) -> None:
    run = make_run("a", "labels.online=true", "labels.top_k=null", "labels.bits=16")
    run.store.remove(f"receipts/{RELABEL}/{run.units[0].name}.json")
    summary = summarize(run)
    assert (summary.label_codec, summary.label_bytes, summary.label_views, summary.label_s) == ("online", 0, None, None)
    assert any("labels" in teacher.roles for teacher in summary.teachers)


@pytest.mark.parametrize(
    ("arch", "in_pool"), [("prism_convnet", ["convnet"]), ("prism_vgg", ["vgg"]), ("resnet18", [])]
)
def test_teachers_of_the_students_architecture_are_named(make_run: RunMaker, arch: str, in_pool: list[str]) -> None:
    run = make_run("a", f"student.arch={arch}", "method.statistics_role=bernoulli_slots")
    assert summarize(run).student == StudentFacts(arch=arch, recipe=run.config.student.recipe, in_pool=in_pool)


def test_a_teacher_that_only_measures_is_not_in_the_pool(make_run: RunMaker) -> None:
    settings = ["method=random_real", "evaluate.feature_model=convnet", "student.arch=prism_convnet"]
    student = summarize(make_run("a", *settings)).student
    assert student is not None
    assert student.in_pool == []


def test_a_search_counts_while_its_images_are_todays(make_run: RunMaker) -> None:
    run = make_run("a", "student.lr_grid=[0.01,0.1]", "student.labels=[hard]")
    tried = {0.01: 0.8, 0.1: 0.9}

    def write(lr: float, **changes: object) -> None:
        (item,) = (item for item in run.searches() if item.lr == lr)
        content = {"inputs": student_inputs(run.ledger, item.labels), "lr": lr, "top1": tried[lr]}
        run.store.put(item.key, to_json(content | {"validation": "training", "num_images": 30} | changes))

    write(0.01)
    assert [(r.lr, r.chosen) for r in summarize(run).search] == [(0.01, False)], "before all were tried, none is chosen"
    write(0.1)
    found = summarize(run).search
    assert [(r.labels, r.lr, r.top1, r.chosen) for r in found] == [("hard", 0.01, 0.8, False), ("hard", 0.1, 0.9, True)]
    assert (found[0].validation, found[0].num_images) == ("training", 30)
    write(0.1, inputs={"images/other.parquet": "00"})
    assert [r.lr for r in summarize(run).search] == [0.01]


def test_a_suite_keeps_its_scores_beside_its_report(make_run: RunMaker, storage: Path) -> None:
    runs = [make_run("random", top1=0.5), make_run("prism", top1=0.75)]
    path = Path(
        write_reports(runs, title="t", command="c", suite="mine", references=REFERENCES).removeprefix("file://")
    )
    content = json.loads((path.parent / "scores.json").read_text())
    assert content["references"] == REFERENCES
    assert content["rows"][1]["differences"]["soft"] == {"mean": 0.25, "std": None, "num": 1}
    assert content["rows"][1]["ranking"]["ior"] == 0.25
    before = path.stat().st_mtime_ns
    write_reports(runs, title="t", command="c", suite="mine", references=REFERENCES)
    assert path.stat().st_mtime_ns == before, "nothing changed"
    write_reports(runs, title="t", command="c", suite="mine", references={"random_real": "prism"})
    assert path.stat().st_mtime_ns != before
    (own,) = json.loads(Path(runs[0].store.url_of("report/summary.json")).read_text())
    assert (own["label"], own["column"]) == (runs[0].config.method.name, None)
    assert runs[0].ledger.receipts(SYNTHESIZE)


# The closing table


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_the_closing_table_shows_the_label_kinds_there_are_and_the_paired_difference(
    make_summary: SummaryMaker,
) -> None:
    rows = [
        make_summary("random", students=students("soft", 0.5)),
        make_summary("prism", students=[*students("soft", 0.6), *students("plain", 0.2)], label_bytes=0),
    ]
    header, random, prism, *_ = results_table([rows[0], replace(rows[1], label_codec="online")], REFERENCES)
    assert cells(header) == [
        *("row", "images", "top-1 soft", "top-1 plain", "soft vs random", "labels", "synthesis", "students")
    ]
    assert cells(random) == ["random", "6", "51.00 ± 1.00", "–", "–", "4.56 MB", "34.5 s", "19.5 s"]
    assert cells(prism) == ["prism", "6", "61.00 ± 1.00", "21.00 ± 1.00", "+10.00 ± 0.00", "online", "34.5 s", "19.5 s"]
    assert score_rows(rows, REFERENCES)[1].differences["soft"].mean == pytest.approx(0.1)


def test_the_closing_table_without_references_has_no_difference(make_summary: SummaryMaker) -> None:
    assert "vs" not in results_table([make_summary("a"), make_summary("b")])[0]


def test_the_closing_table_crosses_rows_with_architectures_and_marks_those_of_teachers(
    make_summary: SummaryMaker,
) -> None:
    vgg = StudentFacts(arch="prism_vgg", recipe="custom", in_pool=["vgg"])
    rows = [make_summary("prism", column="vgg", student=vgg), make_summary("prism", column="vit")]
    lines = results_table([*rows, make_summary("random", column="vit", students=students("soft", 0.5))])
    _, header, prism, random, note, last = lines[lines.index("") :]
    assert cells(header) == ["top-1", "vgg", "vit"]
    assert cells(prism) == ["prism", "* 91.00 ± 1.00", "91.00 ± 1.00"]
    assert cells(random) == ["random", "–", "51.00 ± 1.00"]
    assert (note, last) == ("* the row has a teacher of this architecture", "")
