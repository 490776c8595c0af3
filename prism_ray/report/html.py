"""The report: one HTML file over one or several runs that needs nothing but itself.

The same summaries and shards give the same bytes: there is no clock, no host name and no path of a machine in it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from prism_ray.report import format as text
from prism_ray.report.classes import class_table, confusion_tables
from prism_ray.report.comparison import (
    COMPARED,
    check_comparable,
    crossed,
    differences,
    flat_config,
    one_per_image_set,
    protocol_groups,
    renamed_weights,
    teacher_rows,
)
from prism_ray.report.contents import KINDS, SET_MEASURES, Diversity, RunSummary, SearchResult
from prism_ray.report.gallery import MAX_SIDE, build_gallery
from prism_ray.report.plots import (
    accuracy_plot,
    cosine_plot,
    cost_plot,
    difference_plot,
    energy_plot,
    is_sampled,
    loss_plot,
    storage_plot,
)
from prism_ray.report.ranking import baseline_of, missing_notes, ranked_rows, score_rows
from prism_ray.report.set_plots import curve_plot, plane_plot

MOST_FILES = 100
"""Files of a run that are listed with their hashes; its manifest has them all."""


def render_report(
    summaries: Sequence[RunSummary], *, title: str, command: str, references: Mapping[str, str] = {}
) -> str:
    """The report over `summaries`, in their order.

    Args:
        command: the one that makes this report again.
        references: rows that scores compare with, see `score_rows`.

    Raises:
        InputError: no run, runs that have no common table, or a missing shard.
    """
    check_comparable(summaries)
    settings = differences(summaries)
    groups, renamed = protocol_groups(settings), renamed_weights(summaries)
    scores = score_rows(summaries, references)
    columns, crossed_rows = crossed(summaries)
    gallery = build_gallery(summaries)
    is_pooled = any(summary.num_runs > 1 for summary in summaries)
    figures = [
        (
            "Student accuracy",
            accuracy_plot(summaries),
            "Bars are means over seeds, whiskers one standard deviation, dots single students.",
        ),
        (
            "Differences",
            difference_plot(scores, baseline_of(references)),
            "Paired by seed; bars are one standard deviation over the pairs.",
        ),
        (
            "Accuracy and cost",
            cost_plot(summaries),
            "Device-seconds summed over units, whatever ran side by side; bars are one standard deviation over seeds.",
        ),
        (
            "Accuracy and label storage",
            storage_plot(summaries),
            "Soft labels; bars are one standard deviation over seeds. Runs that store no labels are left out.",
        ),
        (
            "Diversity",
            cosine_plot(summaries),
            f"Lower is more diverse. Bars are one standard deviation over {'runs' if is_pooled else 'classes'}.",
        ),
        (
            "Energies",
            energy_plot(summaries),
            "Free energies of each run's images; gray are as many held-out real ones.",
        ),
        (
            "Images among real ones",
            plane_plot(summaries),
            "Features in the plane in which those of held-out real images vary most, and its shares of their variance.",
        ),
        (
            "Losses over iterations",
            curve_plot(summaries),
            f"Some units{' of the first seed' if is_pooled else ''}, a line each; cross-entropy in nats.",
        ),
        (
            "Loss terms",
            loss_plot(summaries),
            f"As each unit{' of the first seed' if is_pooled else ''} ended; cross-entropy in nats.",
        ),
    ]
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            title=title,
            command=command,
            summaries=summaries,
            dataset=summaries[0].dataset,
            figures=[(name, Markup(svg), caption) for name, svg, caption in figures if svg],
            teachers=teacher_rows(summaries),
            renamed_weights=renamed,
            protocol_groups=groups,
            is_compared=not renamed and set(groups) <= set(COMPARED),
            protocol_differences=[d for d in settings if d.is_protocol],
            method_differences=[d for d in settings if not d.is_protocol],
            kinds=_kinds_with(summaries, "top1") or ["soft", "hard"],
            best_kinds=_kinds_with(summaries, "best_on_test"),
            has_codec=any(summary.label_codec for summary in summaries),
            baseline=baseline_of(references),
            scores=scores,
            difference_kinds=[kind for kind in KINDS if any(kind in row.differences for row in scores)],
            ranked=ranked_rows(scores),
            missing_notes=missing_notes(scores),
            columns=columns,
            crossed_rows=crossed_rows,
            searches=search_rows(summaries),
            gallery=gallery,
            has_energies=any(s.energies and is_sampled(s) for s in summaries),
            class_table=class_table(summaries),
            confusions=confusion_tables(summaries),
            neighbors=[(s.label, s.neighbors) for s in one_per_image_set(summaries) if s.neighbors],
            most_files=MOST_FILES,
            max_side=MAX_SIDE,
            is_pooled=is_pooled,
            measured_on="test images" if summaries[0].split == "test" else "training images kept for validation",
            diversity=diversity_tables(summaries),
            set_tables=set_tables(summaries),
            set_measures=SET_MEASURES,
            energies=[(s.label, found) for s in one_per_image_set(summaries) for found in s.energies],
            shift_names=shift_names(summaries),
            shift_rows=shift_rows(summaries),
            judged=[(s.label, judged) for s in one_per_image_set(summaries) for judged in s.judges],
            has_bn_distance=any(t.bn_distance_first is not None for s in summaries for t in s.teachers),
            feature_models=sorted({s.cosine.feature_model for s in summaries if s.cosine.feature_model}),
        )
    )


@dataclass(frozen=True)
class SearchRow:
    """The learning rates that a run tried for one label kind."""

    name: str
    labels: str
    tried: dict[float, SearchResult]


def search_rows(summaries: Sequence[RunSummary]) -> list[SearchRow]:
    """Every search of learning rates, run by run."""
    found = [(s, kind, {r.lr: r for r in s.search if r.labels == kind}) for s in summaries for kind in KINDS]
    return [SearchRow(summary.name, kind, tried) for summary, kind, tried in found if tried]


def diversity_tables(summaries: Sequence[RunSummary]) -> list[tuple[str, list[tuple[str, Diversity]]]]:
    """For each feature space, in words, what was measured of each set of images."""
    tables: dict[str, list[tuple[str, Diversity]]] = {}
    for summary in one_per_image_set(summaries):
        for found in summary.diversity:
            space = "pixels as they are" if found.model is None else f"features of {found.model} ({found.space})"
            tables.setdefault(space, []).append((summary.label, found))
    return list(tables.items())


def set_tables(summaries: Sequence[RunSummary]) -> list[tuple[str, list[tuple[str, Diversity]]]]:
    """The tables of `diversity_tables` with the runs that were compared with real images; without them none."""
    compared = [(space, [(name, d) for name, d in rows if d.num_set]) for space, rows in diversity_tables(summaries)]
    return [(space, rows) for space, rows in compared if rows]


@dataclass(frozen=True)
class ShiftRow:
    """Students of a run with one kind of labels on every shifted test set."""

    name: str
    labels: str
    clean: text.Spread | None
    mean: text.Spread | None
    shifted: dict[str, text.Spread | None]


def shift_names(summaries: Sequence[RunSummary]) -> list[str]:
    """Every shifted set that some student was measured on, in the order of the first that was."""
    return list(dict.fromkeys(name for summary in summaries for s in summary.students for name in s.shifts))


def shift_rows(summaries: Sequence[RunSummary]) -> list[ShiftRow]:
    """The runs whose students were measured on shifted sets."""
    rows = []
    for summary in summaries:
        for kind in KINDS:
            students = [s for s in summary.students if s.labels == kind and s.shifts]
            if students:
                shifted = {name: text.spread(s.shifts.get(name) for s in students) for name in shift_names(summaries)}
                means = text.spread(fmean(s.shifts.values()) for s in students)
                clean = text.spread(s.top1 for s in students)
                rows.append(ShiftRow(summary.name, kind, clean, means, shifted))
    return rows


def interval_text(hits: int, num: int) -> str:
    """A share's Wilson interval in percent."""
    low, high = text.wilson_interval(hits, num)
    return f"{text.format_percent(low, 1)} to {text.format_percent(high, 1)}"


def _kinds_with(summaries: Sequence[RunSummary], value: str) -> list[str]:
    """Label kinds of which some student has a value."""
    found = {s.labels for summary in summaries for s in summary.students if text.is_measured(getattr(s, value))}
    return [kind for kind in KINDS if kind in found]


def spread_of(summary: RunSummary, labels: str, value: str) -> text.Spread | None:
    """A value of the students of one label kind, over their seeds."""
    return text.spread(getattr(student, value) for student in summary.students if student.labels == labels)


def config_lines(config: dict[str, Any]) -> str:
    """A config as `key=value` lines, each of them usable as an override."""
    return "\n".join(f"{key}={value}" for key, value in flat_config(config).items())


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("prism_ray.report", ""),
        autoescape=True,  # by name, ".j2" would leave it off
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": text.format_count,
        "number": text.format_number,
        "percent": text.format_percent,
        "size": text.format_bytes,
        "digits": text.format_digits,
        "points": text.format_points,
    }
    environment.globals |= {
        "MISSING": text.MISSING,
        "config_lines": config_lines,
        "interval": interval_text,
        "spread_of": spread_of,
    }
    return environment
