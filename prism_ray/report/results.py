"""The results of a suite as files to keep: a line per cell, in Markdown for people and in CSV for programs.

In CSV accuracies and shares are from 0 to 1, in Markdown in percent, differences in points; empty: not measured.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from prism_ray.report import format as text
from prism_ray.report.card import markdown_text
from prism_ray.report.contents import KINDS, MEASURES, SET_MEASURES, RunSummary
from prism_ray.report.ranking import RowScores, baseline_of, score_rows

SPACES = ("held-out", "primary", "raw")


def results_csv(summaries: Sequence[RunSummary], references: Mapping[str, str] = {}) -> str:
    """Every number of the table, a line per cell."""
    records = _records(summaries, references)
    sink = io.StringIO()
    writer = csv.DictWriter(sink, fieldnames=list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _csv_value(value) for key, value in record.items()} for record in records)
    return sink.getvalue()


def results_markdown(
    summaries: Sequence[RunSummary], *, title: str, command: str, references: Mapping[str, str] = {}
) -> str:
    """The same numbers to read, and what they mean."""
    first, records = summaries[0], _records(summaries, references)
    kinds, spaces, judges = _kinds(summaries), _spaces(summaries), _judges(summaries)
    has_sets = any(found.num_set for summary in summaries for found in summary.diversity)
    has_energies = any(summary.energies for summary in summaries)
    shifted = [kind for kind in kinds if any(record[f"shifted_{kind}"] is not None for record in records)]
    baseline = baseline_of(references)
    has_difference = any(record[f"difference_{kind}"] is not None for record in records for kind in kinds)
    header = ["row", "column", "per class", *(f"top-1 {kind}" for kind in kinds)]
    header += [f"{kind} vs {markdown_text(baseline)}" for kind in kinds if has_difference]
    header += [f"cosine {space} (real)" for space in spaces]
    header += [f"Vendi {spaces[0]} (real)", f"effective rank {spaces[0]} (real)"] if spaces else []
    header += [f"{name} {spaces[0]} (real)" for name in SET_MEASURES] if has_sets else []
    header += ["energy (real)", "energy overlap", "energy AUROC"] if has_energies else []
    header += [f"{kind}, mean of shifted sets" for kind in shifted]
    header += [f"{markdown_text(judge)} top-1" for judge in judges]
    header += ["labels", "synthesis, s", "synthesis CPU, s", "student, s"]
    if all(summary.column is None for summary in summaries):
        header.remove("column")
    lines = [_line(header), _line(["---", *["--:"] * (len(header) - 1)])]
    for summary, record in zip(summaries, records, strict=True):
        cells = [markdown_text(name or "") for name in (summary.label, summary.column)[: header.index("per class")]]
        cells.append("all" if summary.images_per_class is None else text.format_count(summary.images_per_class))
        cells += [_percent(record, f"top1_{kind}") for kind in kinds]
        cells += [_points(record, f"difference_{kind}") for kind in kinds if has_difference]
        cells += [_with_real(record, f"cosine_{_key(space)}") for space in spaces]
        if spaces:
            cells += [_with_real(record, f"{name}_{_key(spaces[0])}", 2) for name in ("vendi", "effective_rank")]
        if has_sets:
            cells += [_with_real(record, f"{name}_{_key(spaces[0])}") for name in SET_MEASURES]
        if has_energies:
            cells.append(f"{text.format_digits(record['energy'])} ({text.format_digits(record['energy_real'])})")
            cells += [text.format_number(record[name]) for name in ("energy_overlap", "energy_auroc")]
        cells += [_percent(record, f"shifted_{kind}") for kind in shifted]
        cells += [_interval(record, judge) for judge in judges]
        cells.append(text.format_bytes(summary.label_bytes) if summary.label_bytes else summary.label_codec or "")
        cells += [text.format_digits(record[key]) for key in ("synthesis_s", "synthesis_cpu_s", "student_s")]
        lines.append(_line(cells))
    notes = [
        f"Top-1 in percent on the real {_judged_on(first)}, ± the sample standard deviation over n students, one of "
        "each run's seed. Differences in points are paired by seed.",
        "Similarity of two images of a class, Vendi score and effective rank: means over classes, ± over runs where a "
        "cell has several, else over classes; in brackets those of as many real images.",
        *_set_notes(summaries, has_energies=has_energies),
        "Seconds are those of one run and of one student, on the device that made them.",
    ]
    if judges:
        notes.append("Teachers as judges: share of the images that they name correctly, with the Wilson 95 % interval.")
    return "\n".join(
        [f"# {markdown_text(title)}", "", f"    {command}", "", *lines, "", *(f"- {note}" for note in notes), ""]
    )


def _records(summaries: Sequence[RunSummary], references: Mapping[str, str]) -> list[dict[str, Any]]:
    """One flat record per cell, all with the same keys."""
    kinds, spaces, judges = _kinds(summaries), _spaces(summaries), _judges(summaries)
    scores = score_rows(summaries, references)
    return [
        {
            "row": summary.label,
            "column": summary.column,
            "method": summary.method,
            "images_per_class": summary.images_per_class,
            "num_images": summary.num_images,
            "runs": summary.num_runs,
            "student": summary.student.arch if summary.student else None,
            "split": summary.split,
            **_accuracies(summary, score, kinds),
            **_diversity(summary, spaces),
            **_energies(summary),
            **_shifted(summary, kinds),
            **_judgements(summary, judges),
            "image_bytes": summary.image_bytes,
            "label_bytes": summary.label_bytes,
            "synthesis_s": summary.synthesis_s,
            "synthesis_cpu_s": summary.synthesis_cpu_s,
            "label_s": summary.label_s,
            "student_s": summary.student_s / len(summary.students) if summary.students and summary.student_s else None,
            "quarantined": len(summary.quarantined),
        }
        for summary, score in zip(summaries, scores, strict=True)
    ]


def _accuracies(summary: RunSummary, score: RowScores, kinds: Sequence[str]) -> dict[str, Any]:
    found = {}
    for kind in kinds:
        top1, difference = text.spread(summary.accuracies(kind).values()), score.differences.get(kind)
        found |= {
            f"top1_{kind}": top1 and top1.mean,
            f"top1_{kind}_std": top1 and top1.std,
            f"top1_{kind}_n": top1.num if top1 else 0,
            f"difference_{kind}": difference and difference.mean,
            f"difference_{kind}_std": difference and difference.std,
            f"difference_{kind}_n": difference.num if difference else 0,
        }
    return found


def _diversity(summary: RunSummary, spaces: Sequence[str]) -> dict[str, Any]:
    by_space = {diversity.space: diversity for diversity in summary.diversity}
    found = {}
    for space in spaces:
        for name in (*MEASURES, *SET_MEASURES):
            measured = getattr(by_space[space], name) if space in by_space else None
            for suffix, value in (("", "mean"), ("_std", "std"), ("_real", "real_mean")):
                found[f"{name}_{_key(space)}{suffix}"] = getattr(measured, value, None)
    return found


def _energies(summary: RunSummary) -> dict[str, Any]:
    """Those of the first teacher whose energies were measured."""
    found = summary.energies[0] if summary.energies else None
    names = {"energy": "mean", "energy_real": "real_mean", "energy_overlap": "overlap", "energy_auroc": "auroc"}
    names |= {"energy_fpr95": "fpr95", "energy_agreement": "agreement", "effective_classes": "effective_classes"}
    return {key: getattr(found, name, None) for key, name in names.items()}


def _shifted(summary: RunSummary, kinds: Sequence[str]) -> dict[str, Any]:
    """Mean over shifted sets, and over each of them, of the students of a label kind."""
    found = {}
    for kind in kinds:
        students = [s for s in summary.students if s.labels == kind and s.shifts]
        mean = text.spread(fmean(s.shifts.values()) for s in students)
        found |= {f"shifted_{kind}": mean and mean.mean, f"shifted_{kind}_std": mean and mean.std}
        found[f"shifted_{kind}_n"] = mean.num if mean else 0
    return found


def _set_notes(summaries: Sequence[RunSummary], *, has_energies: bool) -> list[str]:
    compared = [found for summary in summaries for found in summary.diversity if found.num_set]
    notes = []
    if compared:
        first = compared[0]
        notes.append(
            f"Precision, recall (k = {first.k}), density, coverage (k = {first.k_coverage}), FID and KID: of "
            f"{first.num_set} images against as many held-out real ones; in brackets as many real training images."
        )
    if has_energies:
        teachers = sorted({found.teacher for summary in summaries for found in summary.energies})
        notes.append(
            f"Energies: means of the free energy in {', '.join(teachers)}; overlap of their histogram with that of "
            "real images, 1 alike; AUROC of telling both apart by them, 0.5 not at all."
        )
    return notes


def _judgements(summary: RunSummary, judges: Sequence[str]) -> dict[str, Any]:
    by_name = {judged.judge: judged for judged in summary.judges}
    found = {}
    for name in judges:
        judged = by_name.get(name)
        low, high = text.wilson_interval(judged.top1_hits, judged.num_images) if judged else (None, None)
        found |= {
            f"judge_{name}_top1": judged and judged.top1,
            f"judge_{name}_low": low,
            f"judge_{name}_high": high,
            f"judge_{name}_top5": judged and judged.top5,
            f"judge_{name}_n": judged.num_images if judged else 0,
        }
    return found


def _kinds(summaries: Sequence[RunSummary]) -> list[str]:
    return [kind for kind in KINDS if any(summary.accuracies(kind) for summary in summaries)]


def _spaces(summaries: Sequence[RunSummary]) -> list[str]:
    found = {diversity.space for summary in summaries for diversity in summary.diversity}
    return [space for space in SPACES if space in found]


def _judges(summaries: Sequence[RunSummary]) -> list[str]:
    return list(dict.fromkeys(judged.judge for summary in summaries for judged in summary.judges))


def _judged_on(summary: RunSummary) -> str:
    return "test images" if summary.split == "test" else "training images held back for validation"


def _percent(record: Mapping[str, Any], key: str) -> str:
    if record[key] is None:
        return text.MISSING
    return f"{text.format_percent(record[key])}{_deviation(record[f'{key}_std'], 100, 2)} (n = {record[f'{key}_n']})"


def _points(record: Mapping[str, Any], key: str) -> str:
    return f"{text.format_points(record[key])}{_deviation(record[f'{key}_std'], 100, 2)}"


def _with_real(record: Mapping[str, Any], key: str, digits: int = 3) -> str:
    if not text.is_measured(record[key]):
        return text.MISSING
    real = record[f"{key}_real"]
    own = f"{text.format_number(record[key], digits)}{_deviation(record[f'{key}_std'], 1, digits)}"
    return f"{own} ({text.format_number(real, digits)})" if text.is_measured(real) else own


def _interval(record: Mapping[str, Any], judge: str) -> str:
    if not record[f"judge_{judge}_n"]:
        return text.MISSING
    low, high = (text.format_percent(record[f"judge_{judge}_{end}"], 1) for end in ("low", "high"))
    return f"{text.format_percent(record[f'judge_{judge}_top1'], 1)} [{low}, {high}]"


def _deviation(std: float | None, scale: float, digits: int) -> str:
    return f" ± {scale * std:.{digits}f}" if text.is_measured(std) else ""


def _key(space: str) -> str:
    return space.replace("-", "_")


def _csv_value(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.6g}" if text.is_measured(value) else ""
    return "" if value is None else value


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
