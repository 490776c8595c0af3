"""Classes one by one: whose precision and recall, who is confused with whom."""

from dataclasses import replace

from report_samples import SummaryMaker, students

from prism_ray.report.classes import MOST_CLASSES, class_table, confusion_tables
from prism_ray.report.contents import Confusion, Diversity

MATRIX = [[8, 1, 1], [0, 10, 0], [5, 0, 5]]


def measured(precision: dict[str, float], recall: dict[str, float]) -> list[Diversity]:
    return [Diversity(space="primary", model="vgg", class_precision=precision, class_recall=recall)]


def test_every_class_has_precision_and_recall_of_every_run(make_summary: SummaryMaker) -> None:
    first = make_summary("a", diversity=measured({"0": 0.5, "2": 1.0}, {"0": 0.25, "2": 0.75}))
    table = class_table([first, make_summary("b"), make_summary("c", diversity=measured({"1": 0.0}, {"1": 0.0}))])
    assert table is not None
    assert (table.model, table.runs, table.num_classes) == ("vgg", ["a", "c"], 3)
    assert table.rows == [
        ("circle", [(0.5, 0.25), (None, None)]),
        ("square", [(None, None), (0.0, 0.0)]),
        ("triangle", [(1.0, 0.75), (None, None)]),
    ]
    assert class_table([make_summary("b")]) is None


def test_of_many_classes_those_are_shown_of_which_least_is_recalled(make_summary: SummaryMaker) -> None:
    names = [f"class {n}" for n in range(250)]
    shares = {str(n): n / 250 for n in range(250)}
    table = class_table([make_summary("a", class_names=names, diversity=measured(shares, shares))])
    assert table is not None
    assert [name for name, _ in table.rows] == names[:MOST_CLASSES]
    assert table.num_classes == 250


def test_confusions_of_students_are_summed_over_seeds_and_come_after_the_teachers(make_summary: SummaryMaker) -> None:
    confused = [replace(s, confusion=MATRIX) for s in students("soft", 0.9)]
    summary = make_summary("a", students=confused, confusions=[Confusion(name="vgg", matrix=MATRIX)])
    teacher, student = confusion_tables([summary, make_summary("b")])
    assert (teacher.title, teacher.counts, teacher.share(2, 0)) == ("teacher vgg", MATRIX, 0.5)
    assert student.title == "a: 3 students, soft labels"
    assert student.counts == [[3 * count for count in row] for row in MATRIX]


def test_of_many_classes_the_commonest_confusions_are_listed(make_summary: SummaryMaker) -> None:
    names = [f"class {n}" for n in range(30)]
    matrix = [[20 if row == column else 0 for column in range(30)] for row in range(30)]
    matrix[4][7], matrix[9][2] = 5, 20
    (table,) = confusion_tables([make_summary("a", class_names=names, confusions=[Confusion(name="t", matrix=matrix)])])
    assert table.counts == []
    assert table.pairs == [("class 9", "class 2", 20, 0.5), ("class 4", "class 7", 5, 0.2)]


def test_only_the_classes_of_a_run_are_in_its_confusions(make_summary: SummaryMaker) -> None:
    summary = make_summary("a", confusions=[Confusion(name="t", matrix=MATRIX)])
    some = replace(summary, dataset=replace(summary.dataset, class_ids=[0, 2]))
    (table,) = confusion_tables([some])
    assert (table.names, table.counts) == (["circle", "triangle"], [[8, 1], [5, 5]])
