"""Runs that make the same images or labels make them once; a learning rate is chosen before students are trained."""

import json
import shutil
from pathlib import Path

import pytest
from commands import Command, products

from prism_ray.cli import compose_suite
from prism_ray.options import LabelKind
from prism_ray.storage import open_store
from prism_ray.work import RunSpec, SearchItem, chosen_lr


@pytest.fixture
def storage(pristine_storage: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, which others may take units from."""
    return shutil.copytree(pristine_storage, tmp_path / "outputs")


def runs(storage: Path) -> list[Path]:
    return sorted((storage / "runs").iterdir())


def events(run: Path, kind: str) -> list[str]:
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [line["key"] for line in lines if line["event"] == kind]


def other_run(storage: Path, known: Path) -> Path:
    (other,) = [run for run in runs(storage) if run != known]
    return other


def test_a_run_with_other_students_takes_over_images_and_labels(prism: Command, storage: Path, run_dir: Path) -> None:
    result = prism("run", "student.steps=3", "student.batch_size=7")
    assert result.code == 0, result
    assert "synthesize: 4 units taken over" in result.out
    assert "relabel: 4 units taken over" in result.out
    new = other_run(storage, run_dir)
    assert len(events(new, "adopted")) == 8
    before, after = products(run_dir), products(new)
    made_alike = [key for key in before if key.endswith(".parquet")]
    assert {key: after[key] for key in made_alike} == {key: before[key] for key in made_alike}
    assert prism("verify", "student.steps=3", "student.batch_size=7").code == 0


def test_a_run_with_other_labels_takes_over_the_images_alone(prism: Command, storage: Path, run_dir: Path) -> None:
    result = prism("run", "labels.bits=3", "stages=[synthesize,relabel]")
    assert result.code == 0, result
    new = other_run(storage, run_dir)
    assert sorted(events(new, "adopted")) == sorted(f"images/{path.name}" for path in (new / "images").iterdir())


def test_other_images_are_not_taken_over(prism: Command, storage: Path, run_dir: Path) -> None:
    result = prism("run", "seed=1", "stages=[synthesize]")
    assert result.code == 0, result
    assert "taken over" not in result.out


def test_images_of_other_teachers_are_not_taken_over(prism: Command, storage: Path, run_dir: Path) -> None:
    pins = json.loads((run_dir / "pins.json").read_text())
    pins["sha256 of teacher vgg"] = "0" * 64
    (run_dir / "pins.json").write_text(json.dumps(pins))
    result = prism("run", "student.steps=3", "stages=[synthesize]")
    assert result.code == 0, result
    assert "taken over" not in result.out


def test_a_damaged_shard_is_not_taken_over_but_made_here(prism: Command, storage: Path, run_dir: Path) -> None:
    shard = next((run_dir / "images").iterdir())
    original = shard.read_bytes()
    shard.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    result = prism("run", "student.steps=3", "stages=[synthesize]")
    assert result.code == 0, result
    assert "3 units taken over" in result.out
    assert (other_run(storage, run_dir) / "images" / shard.name).read_bytes() == original


SUITE = """
recipe: digits_smoke
rows:
  short: [student.steps=2]
  long: [student.steps=3]
columns:
  coarse: [labels.bits=2]
  fine: [labels.bits=16]
references: {baseline: short}
"""


def test_a_suite_crosses_its_rows_with_its_columns_and_makes_shared_units_once(
    prism: Command, storage: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text(SUITE)
    _, rows = compose_suite([f"suite={tmp_path}/mine.yaml"])
    assert [(row.label, row.column) for row in rows] == [
        ("short", "coarse"),
        ("short", "fine"),
        ("long", "coarse"),
        ("long", "fine"),
    ]
    arguments = ["bench", f"suite={tmp_path}/mine.yaml", "compute=inline", f"storage={tmp_path}/new", "seed=3"]
    result = prism.bare(*arguments)
    assert result.code == 0, result
    made = runs(tmp_path / "new")
    assert len(made) == 4
    adopted = [key for run in made for key in events(run, "adopted")]
    assert sum(key.startswith("images/") for key in adopted) == 3 * 4, "made by one run, taken over by three"
    assert sum(key.startswith("labels/") for key in adopted) == 2 * 4, "made by one run of each column"
    assert prism.bare(*arguments).code == 0, "nothing left to do"
    assert adopted == [key for run in made for key in events(run, "adopted")]


def test_the_learning_rate_of_the_best_validation_accuracy_is_used(prism: Command, storage: Path) -> None:
    grid = "student.lr_grid=[0.0001,0.02]"
    result = prism("run", grid, "student.steps=40", "student.ema_decay=0", "student.labels=[hard]")
    assert result.code == 0, result
    assert "[search] 2/2 learning rates" in result.out
    (new,) = [run for run in runs(storage) if (run / "metrics/search").exists()]
    tried = [json.loads(path.read_text()) for path in (new / "metrics/search").iterdir()]
    assert {entry["validation"] for entry in tried} == {"training"}
    best = max(tried, key=lambda entry: (entry["top1"], -entry["lr"]))
    (receipt,) = [json.loads(path.read_text()) for path in (new / "receipts/distill").iterdir()]
    assert receipt["details"]["lr"] == best["lr"] == 0.02
    before = {path: path.stat().st_mtime_ns for path in (new / "metrics/search").iterdir()}
    again = prism("run", grid, "student.steps=40", "student.ema_decay=0", "student.labels=[hard]")
    assert again.code == 0, again
    assert before == {path: path.stat().st_mtime_ns for path in (new / "metrics/search").iterdir()}


@pytest.mark.parametrize(
    ("accuracies", "expected"), [({0.1: 0.5, 0.2: 0.6}, 0.2), ({0.1: 0.6, 0.2: 0.6}, 0.1), ({0.1: 0.0, 0.2: 0.0}, 0.1)]
)
def test_of_equal_accuracies_the_smaller_learning_rate_is_chosen(
    run_dir: Path, tmp_path: Path, accuracies: dict[float, float], expected: float
) -> None:
    from prism_ray.cli import compose

    config = compose(["recipe=digits_smoke", f"student.lr_grid={list(accuracies)}"])
    spec = RunSpec(config, str(tmp_path / "run"), 0, "", {})
    store = open_store(spec.run_dir)
    for lr, top1 in accuracies.items():
        store.put(SearchItem(spec, LabelKind.soft, lr).key, json.dumps({"inputs": {}, "top1": top1}).encode())
    assert chosen_lr(spec, LabelKind.soft) == expected
