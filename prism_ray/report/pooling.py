"""Runs that differ in nothing but their seed as one: the cells of a suite with seeds."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import fmean

from prism_ray.report.contents import (
    MEASURES,
    SET_MEASURES,
    Cosine,
    Diversity,
    Energies,
    Judged,
    Measured,
    RunSummary,
    SearchResult,
)
from prism_ray.report.format import is_measured, spread

COUNTS = ("num_images", "top1_hits", "top5_hits")
ENERGIES = ("mean", "real_mean", "overlap", "auroc", "fpr95", "agreement", "effective_classes")


def pooled(summaries: Sequence[RunSummary]) -> list[RunSummary]:
    """One summary for each cell, which is a row in a column, in the order of their first runs; single runs unchanged.

    Runs of one name are pooled if their settings differ in the seeds alone and no student's seed occurs twice.
    Students, judged images and what was quarantined are those of all runs; numbers of images, bytes and seconds are
    means, so those of one run, except the students' seconds, which are summed. Measures of diversity are means and
    deviations over runs. What can't be pooled is the first run's: its pictures, losses and settings.
    """
    cells: dict[str, list[RunSummary]] = {}
    for summary in summaries:
        key = json.dumps([summary.label, summary.column, _without_seeds(summary)], sort_keys=True)
        cells.setdefault(key, []).append(summary)
    return [summary for runs in cells.values() for summary in _pooled(runs)]


def _pooled(runs: list[RunSummary]) -> list[RunSummary]:
    """The runs of a cell as one, or as they are where a seed occurs twice."""
    students = [student for run in runs for student in run.students]
    first = runs[0]
    if len(runs) == 1 or len({(s.labels, s.seed) for s in students}) < len(students):
        return runs
    return [
        replace(
            first,
            run_ids=[run.run_id for run in runs],
            num_images=_rounded(run.num_images for run in runs),
            num_units=sum(run.num_units for run in runs),
            image_bytes=_rounded(run.image_bytes for run in runs),
            label_bytes=_rounded(run.label_bytes for run in runs),
            label_s=_mean(run.label_s for run in runs),
            synthesis_s=_mean(run.synthesis_s for run in runs),
            images_per_s=_mean(run.images_per_s for run in runs),
            students=students,
            student_s=_sum(run.student_s for run in runs),
            search=_search(runs),
            quarantined=[unit for run in runs for unit in run.quarantined],
            lost_images=[image for run in runs for image in run.lost_images],
            cosine=_cosine(runs),
            diversity=_diversity(runs),
            energies=_energies(runs),
            judges=_judges(runs),
            synthesis_cpu_s=_mean(run.synthesis_cpu_s for run in runs),
        )
    ]


def _without_seeds(summary: RunSummary) -> dict[str, object]:
    config = {key: value for key, value in summary.config.items() if key != "seed"}
    if isinstance(student := config.get("student"), dict):
        config["student"] = {key: value for key, value in student.items() if key != "seeds"}
    return config


def _diversity(runs: Sequence[RunSummary]) -> list[Diversity]:
    """The feature spaces that the first run has, each measure over the runs."""
    found = []
    for first in runs[0].diversity:
        same = [d for run in runs for d in run.diversity if (d.space, d.model) == (first.space, first.model)]
        measures = {name: _measured([getattr(d, name) for d in same]) for name in (*MEASURES, *SET_MEASURES)}
        found.append(replace(first, **measures))
    return found


def _energies(runs: Sequence[RunSummary]) -> list[Energies]:
    """Means over runs by teacher; histograms and classes are the first run's."""
    found = []
    for first in runs[0].energies:
        same = [entry for run in runs for entry in run.energies if entry.teacher == first.teacher]
        found.append(replace(first, **{name: fmean(getattr(entry, name) for entry in same) for name in ENERGIES}))
    return found


def _cosine(runs: Sequence[RunSummary]) -> Cosine:
    return Cosine(feature_model=runs[0].cosine.feature_model, **vars(_measured([run.cosine for run in runs])))


def _measured(values: Sequence[Measured]) -> Measured:
    """Over the runs. The real images beside them are the same ones, so that theirs have no deviation."""
    own, real = spread(v.mean for v in values), spread(v.real_mean for v in values)
    return Measured(mean=own and own.mean, std=own and own.std, real_mean=real and real.mean)


def _judges(runs: Sequence[RunSummary]) -> list[Judged]:
    """Each judge's answers on the images of all runs."""
    found = []
    for first in runs[0].judges:
        same = [judged for run in runs for judged in run.judges if judged.judge == first.judge]
        counts = {name: sum(getattr(judged, name) for judged in same) for name in COUNTS}
        found.append(Judged(judge=first.judge, **counts))
    return found


def _search(runs: Sequence[RunSummary]) -> list[SearchResult]:
    """Each learning rate once: its mean accuracy, and whether some run chose it."""
    tried: dict[tuple[str, float], list[SearchResult]] = {}
    for run in runs:
        for result in run.search:
            tried.setdefault((result.labels, result.lr), []).append(result)
    return [
        replace(found[0], top1=fmean(r.top1 for r in found), chosen=any(r.chosen for r in found))
        for found in tried.values()
    ]


def _mean(values: Iterable[float | None]) -> float | None:
    measured = [value for value in values if is_measured(value)]
    return fmean(measured) if measured else None


def _sum(values: Iterable[float | None]) -> float | None:
    measured = [value for value in values if is_measured(value)]
    return sum(measured) if measured else None


def _rounded(values: Iterable[int]) -> int:
    return round(fmean(values))
