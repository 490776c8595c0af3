"""Suites: which runs a file stands for, and what becomes of the runs of one cell."""

import csv
import json
from pathlib import Path

import pytest
from commands import Command

from prism_ray.cli import compose_suite
from prism_ray.cli.compose import load_suite
from prism_ray.errors import InputError

SUITE = """
recipe: digits_smoke
seeds: [3, 5]
rows:
  random: [method=random_real, method.selection=random]
  prism: ["student.labels=[soft,hard]"]
columns:
  two: []
  one: {rows: [prism], settings: [images_per_class=1]}
references: {random_real: random}
"""


def written(tmp_path: Path, text: str) -> str:
    (tmp_path / "mine.yaml").write_text(text)
    return f"{tmp_path}/mine.yaml"


def test_every_cell_is_a_run_per_seed_which_is_that_of_images_and_students(tmp_path: Path) -> None:
    suite, rows = compose_suite([f"suite={written(tmp_path, SUITE)}"])
    assert suite.seeds == [3, 5]
    cells = [("random", "two"), ("prism", "two"), ("prism", "one")]
    assert [(row.label, row.column) for row in rows] == [*cells, *cells], "the first seed of all comes first"
    assert [(row.config.seed, row.config.student.seeds) for row in rows] == [(3, [3])] * 3 + [(5, [5])] * 3
    assert [row.config.images_per_class for row in rows[:3]] == [2, 2, 1]


def test_a_suite_without_seeds_keeps_those_of_its_recipe(tmp_path: Path) -> None:
    _, rows = compose_suite([f"suite={written(tmp_path, SUITE.replace('seeds: [3, 5]', ''))}", "seed=7"])
    assert [(row.config.seed, row.config.student.seeds) for row in rows] == [(7, [0])] * 3


@pytest.mark.parametrize("setting", ["seed=1", "student.seeds=[1,2]"])
def test_seeds_are_the_suites_to_choose(tmp_path: Path, setting: str) -> None:
    with pytest.raises(InputError, match="leave it out, or change the suite's seeds"):
        compose_suite([f"suite={written(tmp_path, SUITE)}", setting])
    in_a_column = SUITE.replace("two: []", f"two: ['{setting}']")
    with pytest.raises(InputError, match="leave it out, or change the suite's seeds"):
        compose_suite([f"suite={written(tmp_path, in_a_column)}"])


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("seeds: [3, 5]", "seeds: [3, 3]", r"seeds=\[3, 3\]: expected a list of integers, none of them twice"),
        ("seeds: [3, 5]", "seeds: 3", "seeds=3: expected a list"),
        ("seeds: [3, 5]", "seeds: [true]", r"seeds=\[True\]: expected a list of integers"),
        ("rows: [prism]", "rows: [prsm]", "columns.one.rows: no row 'prsm'; known: random, prism"),
        ("rows: [prism], ", "", "columns.one: expected a list of overrides, or"),
        ("rows: [prism], ", "rows: prism, ", "columns.one: expected a list of overrides, or"),
        ("two: []", "two: {rows: [prism], settings: []}", "row 'random' is in no column"),
    ],
)
def test_what_a_suite_gets_wrong_is_named(tmp_path: Path, old: str, new: str, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        load_suite(written(tmp_path, SUITE.replace(old, new)))


def test_runs_of_a_cell_are_pooled_in_tables_and_files(prism: Command, tmp_path: Path) -> None:
    arguments = ["bench", f"suite={written(tmp_path, SUITE)}", "compute=inline", f"storage={tmp_path}/out"]
    result = prism.bare(*arguments, "evaluate.judges=[convnet]")
    assert result.code == 0, result
    assert len(list((tmp_path / "out/runs").iterdir())) == 6
    (folder,) = (tmp_path / "out/benches").iterdir()
    random, prism_two, prism_one = csv.DictReader((folder / "results.csv").read_text().splitlines())
    assert [(cell["row"], cell["column"]) for cell in (random, prism_two, prism_one)] == [
        ("random", "two"),
        ("prism", "two"),
        ("prism", "one"),
    ]
    assert (prism_two["runs"], prism_two["num_images"], prism_two["top1_soft_n"]) == ("2", "20", "2")
    assert (prism_two["difference_soft_n"], random["difference_soft_n"]) == ("2", "0")
    assert prism_two["judge_convnet_n"] == "40", "the images of both runs"
    assert float(prism_two["cosine_raw_real"]) == pytest.approx(float(random["cosine_raw_real"]))
    assert prism_one["cosine_raw"] == "", "one image has no pair"
    summaries = json.loads((folder / "summary.json").read_text())
    both = [s["students"][0]["top1"] for s in summaries if (s["label"], s["column"]) == ("prism", "two")]
    assert float(prism_two["top1_soft"]) == pytest.approx(sum(both) / 2, abs=1e-5)
    table = (folder / "results.md").read_text()
    assert "| prism | two | 2 |" in table
    assert "(n = 2)" in table
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert prism.bare(*arguments, "evaluate.judges=[convnet]").code == 0
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
