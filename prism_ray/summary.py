"""From a run folder to the reports on it; all is read back from disk, so a report can be made again at any time."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from prism_ray.config import Engine, LabelKind, config_hash, content_hash, output_tree
from prism_ray.errors import InputError
from prism_ray.plan import label_teachers, statistics_pool, used_teachers
from prism_ray.report.contents import (
    Cosine,
    DatasetFacts,
    Paths,
    Quarantined,
    RunSummary,
    StudentResult,
    TeacherFacts,
    UnitLosses,
)
from prism_ray.runs import PINS, TEACHER_PIN, Run, versions
from prism_ray.storage import open_store, read_json, to_json
from prism_ray.work import DISTILL, DIVERSITY, RELABEL, SYNTHESIZE, DiversityItem


def teacher_facts(run: Run, name: str) -> dict[str, Any]:
    """What was found out about a teacher when its artifact was made."""
    return read_json(open_store(run.teacher_dirs[name]), "prism_ray.json") or {}


def check_teachers(run: Run) -> None:
    """Refuse teachers that do not know this data set: the usual cause of synthesis results far below the paper's.

    Raises:
        InputError: a teacher's held-out accuracy is below `teachers.min_accuracy`, or it has (or lacks) batch norm
            against its declaration.
    """
    for name in used_teachers(run.config):
        facts, declared = teacher_facts(run, name), run.config.teachers.models[name]
        if facts["accuracy"] < run.config.teachers.min_accuracy:
            raise InputError(
                f"teachers.models.{name}: {facts['accuracy']:.1%} of the held-out images of {run.config.dataset.name} "
                f"right, below teachers.min_accuracy={run.config.teachers.min_accuracy:.1%}; check its class order and "
                "input size, train it longer, or lower min_accuracy if you mean it"
            )
        if declared.batch_norm != (facts["num_bn_layers"] > 0):
            raise InputError(
                f"teachers.models.{name}.batch_norm={str(declared.batch_norm).lower()}: {facts['architecture']} has "
                f"{facts['num_bn_layers']} batch-norm layers; correct the declaration"
            )


def summarize(run: Run) -> RunSummary:
    """All a report says about one run."""
    config, dataset = run.config, run.dataset
    assert dataset is not None
    images, labels = run.ledger.receipts(SYNTHESIZE), run.ledger.receipts(RELABEL)
    num_images, seconds = sum(r.rows for r in images.values()), sum(r.seconds for r in images.values())
    optimized = config.method.engine is Engine.inversion
    is_measured = DiversityItem(run.spec()).is_done
    cosine = (read_json(run.store, DIVERSITY) or {})["cosine"] if is_measured else {}
    per_slice = {unit.slice_index: unit.iterations for unit in run.units}
    return RunSummary(
        run_id=run.name,
        label=run.label,
        method=config.method.name,
        recipe=config.recipe_name,
        dataset=DatasetFacts(
            name=dataset.name,
            class_names=dataset.class_names,
            image_size=dataset.image_size,
            channels=dataset.channels,
            num_train=dataset.num_images("train"),
            num_test=dataset.num_images("test"),
        ),
        images_per_class=config.images_per_class,
        num_images=num_images,
        num_units=len(run.units),
        image_bytes=sum(r.bytes for r in images.values()),
        label_bytes=sum(r.bytes for r in labels.values()),
        config=output_tree(config),
        config_hash=config_hash(config),
        quarantined=[
            Quarantined(unit_id=f"{e['stage']} {e['name']} ({e['unit_id']})", reason=e["reason"])
            for e in run.ledger.quarantined()
        ],
        synthesis_s=seconds,
        images_per_s=num_images / seconds if optimized and seconds else None,
        teachers=_teachers(run),
        students=_students(run),
        cosine=Cosine(**cosine),
        budget=[per_slice[k] for k in sorted(per_slice)] if optimized else [],
        versions=versions(),
        shards=[str(run.store.path(receipt.key)) for _, receipt in sorted(images.items())],
        real_images=[str(path) for path in dataset.paths("train")],
        loss_curve=[
            UnitLosses(unit_id=r.name, ce=r.details.get("loss_ce"), bn=r.details.get("loss_bn"))
            for _, r in sorted(images.items())
        ]
        if optimized
        else [],
        paths=Paths(student=_student_folder(run)),
    )


def _teachers(run: Run) -> list[TeacherFacts]:
    config = run.config
    pins = read_json(run.store, PINS) or {}
    roles = {
        "primary": [config.teachers.primary] if config.method.engine is Engine.inversion else [],
        "statistics": statistics_pool(config),
        "labels": label_teachers(config) if run.needs_labels() else [],
        "features": [config.evaluate.feature_model or config.teachers.primary],
    }
    found = []
    for name in used_teachers(config):
        facts = teacher_facts(run, name)
        found.append(
            TeacherFacts(
                name=name,
                arch=facts["architecture"],
                accuracy=facts["accuracy"],
                num_params=facts["num_params"],
                num_bn_layers=facts["num_bn_layers"],
                roles=[role for role, names in roles.items() if name in names],
                sha256=pins.get(f"{TEACHER_PIN}{name}", ""),
            )
        )
    return found


def _students(run: Run) -> list[StudentResult]:
    receipts = run.ledger.receipts(DISTILL)
    return [
        StudentResult(
            seed=item.seed,
            labels=item.labels.value,
            top1=receipts[item.name].details["top1"],
            seconds=receipts[item.name].seconds,
            steps=receipts[item.name].details["steps"],
            num_params=receipts[item.name].details["num_params"],
        )
        for item in run.students()
        if item.is_done
    ]


def _student_folder(run: Run) -> str | None:
    """The first student, soft labels before hard."""
    names = [item.name for item in run.students() if item.is_done]
    soft_first = sorted(names, key=lambda name: not name.startswith(LabelKind.soft.name))
    return f"student/{soft_first[0]}" if soft_first else None


def write_reports(runs: Sequence[Run], *, title: str, command: str, suite: str | None, always: bool = False) -> Path:
    """Report and card of every run, and of the suite one report of all.

    What has not changed is written again only if `always`.

    Returns:
        The report to look at.
    """
    from prism_ray.report.card import write_card
    from prism_ray.report.html import write_report

    summaries = [summarize(run) for run in runs]
    for run, summary in zip(runs, summaries, strict=True):
        known = read_json(run.store, "report/summary.json")
        if always or known != [summary.to_dict()] or run.store.size("report/report.html") is None:
            own = replace(summary, label=run.config.method.name)
            write_report([own], run.store.path("report/report.html"), title=run.name, command=command)
            write_card(own, run.store.path("README.md"))
            run.store.put("report/summary.json", to_json([summary.to_dict()]))
    if suite is None:
        return runs[0].store.path("report/report.html")
    folder = f"benches/{suite}-{content_hash([run.name for run in runs])[:12]}"
    root = open_store(runs[0].config.storage)
    contents = [summary.to_dict() for summary in summaries]
    if root.size(f"{folder}/report.html") is None or read_json(root, f"{folder}/summary.json") != contents:
        write_report(summaries, root.path(f"{folder}/report.html"), title=title, command=command)
        root.put(f"{folder}/summary.json", to_json(contents))
    return root.path(f"{folder}/report.html")


def closing_text(runs: Sequence[Run], report: Path | None, quarantined: Sequence[dict[str, Any]]) -> str:
    """The table and the lines to copy at the end of a command."""
    lines = [""]
    if report is not None:
        lines += results_table([summarize(run) for run in runs])
    if quarantined:
        lines += [
            f"{len(quarantined)} units quarantined; `prism-ray retry` with the same settings tries them again",
            "",
        ]
    optimized = [run for run in runs if run.config.method.engine is Engine.inversion]
    shown = (optimized or list(runs))[-1]
    if report is not None:
        lines.append(f"look at the report:  {report.as_uri()}")
    if shown.ledger.receipts(SYNTHESIZE):
        files = shown.store.path("images") / "*.parquet"
        lines.append(f"load the images:     datasets.load_dataset('parquet', data_files='{files}')")
    student = _student_folder(shown)
    if student:
        lines.append(
            f"load the student:    import prism_ray.models, timm; "
            f"timm.create_model('local-dir:{shown.store.path(student)}', pretrained=True)"
        )
    return "\n".join(lines)


def results_table(summaries: Sequence[RunSummary]) -> list[str]:
    """Top-1 of soft- and hard-label students per row, in percent, as fixed-width lines."""
    from prism_ray.report.format import format_bytes, spread

    def cell(summary: RunSummary, kind: str) -> str:
        found = spread(s.top1 for s in summary.students if s.labels == kind)
        if found is None:
            return "–"
        return f"{100 * found.mean:.2f}" + (f" ± {100 * found.std:.2f}" if found.std is not None else "")

    header = ("row", "images", "top-1 soft", "top-1 hard", "labels", "synthesis")
    rows = [
        (
            summary.label,
            str(summary.num_images),
            cell(summary, "soft"),
            cell(summary, "hard"),
            format_bytes(summary.label_bytes) if summary.label_bytes else "–",
            f"{summary.synthesis_s:.1f} s" if summary.synthesis_s is not None else "–",
        )
        for summary in summaries
    ]
    widths = [max(len(row[n]) for row in (header, *rows)) for n in range(len(header))]
    return [
        "  ".join(v.ljust(w) if n == 0 else v.rjust(w) for n, (v, w) in enumerate(zip(row, widths, strict=True)))
        for row in (header, *rows)
    ] + [""]
