"""What a report says class by class: precision and recall of the images, and what networks take classes for."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from prism_ray.report.comparison import one_per_image_set
from prism_ray.report.contents import KINDS, DatasetFacts, RunSummary

MOST_CLASSES = 100
"""Rows of the table of classes: those of which the least is recalled."""
MOST_IN_MATRIX = 20
"""Classes of a confusion that is shown as a matrix; of more, the commonest confusions are listed."""
MOST_PAIRS = 15


@dataclass(frozen=True)
class ClassTable:
    """Precision and recall of every class: columns of runs, rows of classes with a pair of shares for each run."""

    model: str
    runs: list[str]
    rows: list[tuple[str, list[tuple[float | None, float | None]]]]
    num_classes: int  # shown or not


def class_table(summaries: Sequence[RunSummary]) -> ClassTable | None:
    """In the features that tables show; None where no run has enough images of a class."""
    found = [(s.label, s.diversity[0]) for s in one_per_image_set(summaries) if s.diversity]
    found = [(label, space) for label, space in found if space.class_precision]
    if not found:
        return None
    dataset = summaries[0].dataset
    rows = []
    for class_id in map(str, _class_ids(dataset)):
        shares = [(space.class_precision.get(class_id), space.class_recall.get(class_id)) for _, space in found]
        rows.append((dataset.class_names[int(class_id)], shares))
    num_classes = len(rows)
    if num_classes > MOST_CLASSES:
        rows = sorted(rows, key=lambda row: fmean([recall or 0.0 for _, recall in row[1]]))[:MOST_CLASSES]
    return ClassTable(found[0][1].model or "pixels", [label for label, _ in found], rows, num_classes)


@dataclass(frozen=True)
class ConfusionTable:
    """What a network takes the held-out real images of each class for."""

    title: str
    names: list[str]
    counts: list[list[int]]  # by class and by what its images were taken for; empty where there are too many classes
    pairs: list[tuple[str, str, int, float]]  # then the commonest: class, taken for, images, share of the class's

    def share(self, row: int, column: int) -> float:
        """Of the images of a class, 0 to 1."""
        return self.counts[row][column] / max(1, sum(self.counts[row]))


def confusion_tables(summaries: Sequence[RunSummary]) -> list[ConfusionTable]:
    """Teachers first, each once; then the students of each run, all seeds together, soft labels before hard."""
    dataset = summaries[0].dataset
    teachers = {found.name: found.matrix for summary in reversed(summaries) for found in summary.confusions}
    tables = [_table(f"teacher {name}", matrix, dataset) for name, matrix in teachers.items()]
    for summary in summaries:
        for kind in KINDS:
            found = [s.confusion for s in summary.students if s.labels == kind and s.confusion]
            if found:
                summed = [[sum(cell) for cell in zip(*rows, strict=True)] for rows in zip(*found, strict=True)]
                students = "student" if len(found) == 1 else f"{len(found)} students"
                tables.append(_table(f"{summary.name}: {students}, {kind} labels", summed, dataset))
                break
    return tables


def _table(title: str, matrix: Sequence[Sequence[int]], dataset: DatasetFacts) -> ConfusionTable:
    chosen = _class_ids(dataset)
    names = [dataset.class_names[c] for c in chosen]
    if len(chosen) <= MOST_IN_MATRIX:
        return ConfusionTable(title, names, [[matrix[row][column] for column in chosen] for row in chosen], [])
    pairs = [
        (dataset.class_names[row], dataset.class_names[column], count, count / max(1, sum(matrix[row])))
        for row in chosen
        for column, count in enumerate(matrix[row])
        if row != column and count
    ]
    return ConfusionTable(title, names, [], sorted(pairs, key=lambda pair: -pair[2])[:MOST_PAIRS])


def _class_ids(dataset: DatasetFacts) -> list[int]:
    return dataset.class_ids or list(range(len(dataset.class_names)))
