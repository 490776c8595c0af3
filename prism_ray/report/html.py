"""The report: one HTML file over one or several runs that needs nothing but itself.

The same summaries and shards give the same bytes: there is no clock, no host name and no path of a machine in it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from prism_ray.report import format as text
from prism_ray.report.comparison import (
    check_comparable,
    differences,
    flat_config,
    renamed_weights,
    teacher_rows,
)
from prism_ray.report.contents import RunSummary
from prism_ray.report.files import write_document
from prism_ray.report.gallery import MAX_SIDE, build_gallery
from prism_ray.report.plots import accuracy_plot, cosine_plot, loss_plot


def write_report(summaries: Sequence[RunSummary], path: Path, *, title: str, command: str) -> None:
    """Write the report over `summaries`, in their order, to `path`, replacing what is there as a whole.

    `command` is the one that makes this report again.

    Raises:
        InputError: no run, runs that have no common table, or a missing shard.
        StorageError: no space left.
    """
    check_comparable(summaries)
    write_document(path, render_report(summaries, title=title, command=command))


def render_report(summaries: Sequence[RunSummary], *, title: str, command: str) -> str:
    """The page of `write_report`."""
    settings = differences(summaries)
    figures = [
        ("Student accuracy", accuracy_plot(summaries), "Bars are means over seeds, dots are single students."),
        ("Diversity", cosine_plot(summaries), "Lower is more diverse. Bars are one standard deviation over classes."),
        ("Loss terms", loss_plot(summaries), "As each unit ended."),
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
            renamed_weights=renamed_weights(summaries),
            protocol_differences=[d for d in settings if d.is_protocol],
            method_differences=[d for d in settings if not d.is_protocol],
            gallery=build_gallery(summaries),
            max_side=MAX_SIDE,
            feature_models=sorted({s.cosine.feature_model for s in summaries if s.cosine.feature_model}),
        )
    )


def top1_of(summary: RunSummary, labels: str) -> text.Spread | None:
    """Top-1 over the seeds of one label kind."""
    return text.spread(student.top1 for student in summary.students if student.labels == labels)


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
    }
    environment.globals |= {"MISSING": text.MISSING, "config_lines": config_lines, "top1_of": top1_of}
    return environment
