"""From a run folder to the reports on it; all is read back from disk, so a report can be made again at any time."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from prism_ray import garbage
from prism_ray.artifacts import artifact_facts
from prism_ray.config import label_teachers
from prism_ray.errors import InputError
from prism_ray.identity import config_hash, content_hash, output_tree
from prism_ray.options import Engine, EvaluationSplit, LabelKind
from prism_ray.plan import energy_teachers, needs_generator, statistics_pool, used_teachers
from prism_ray.report.contents import (
    KINDS,
    MEASURES,
    SET_MEASURES,
    Confusion,
    Cosine,
    DatasetFacts,
    Diversity,
    Energies,
    FileFacts,
    Judged,
    Measured,
    Neighbors,
    Paths,
    Plane,
    Quarantined,
    RunSummary,
    SearchResult,
    StudentFacts,
    StudentResult,
    TeacherFacts,
    UnitLosses,
)
from prism_ray.runs import PINS, TEACHER_PIN, Run, versions
from prism_ray.storage import Store, is_remote, open_store, read_json, to_json
from prism_ray.work import DISTILL, DIVERSITY, LOSS_HISTORY, RELABEL, SYNTHESIZE, DiversityItem, chosen_lr, lost_images


def teacher_facts(run: Run, name: str) -> dict[str, Any]:
    """What was found out about a teacher when its artifact was made."""
    return artifact_facts(run.teacher_dirs[name])


def check_teachers(run: Run) -> None:
    """Refuse teachers that do not know this data set: the usual cause of synthesis results far below the paper's.

    Raises:
        InputError: a teacher's held-out accuracy is below `teachers.min_accuracy`, with a pair of classes where it has
            them in another order; or it has (or lacks) batch norm against its declaration. Without held-out images
            nothing is known of its accuracy.
    """
    for name in used_teachers(run.config):
        facts, declared = teacher_facts(run, name), run.config.teachers.models[name]
        accuracy, least = facts["accuracy"], run.config.teachers.min_accuracy
        if accuracy is not None and accuracy < least:
            order = facts.get("order")
            if order is not None and order["matched_accuracy"] >= max(least, 2 * accuracy):
                assert run.dataset is not None, "prepare comes first"
                names = run.dataset.class_names
                raise InputError(
                    f"teachers.models.{name}: has its classes in another order: it takes {names[order['class']]!r} for "
                    f"{names[order['output']]!r}, and gets {accuracy:.1%} of the held-out images of "
                    f"{run.config.dataset.name} right, {order['matched_accuracy']:.1%} if its outputs are reordered; "
                    "bring the classes into the same order"
                )
            raise InputError(
                f"teachers.models.{name}: {accuracy:.1%} of the held-out images of {run.config.dataset.name} "
                f"right, below teachers.min_accuracy={least:.1%}; check its class order and input size, train it "
                "longer, or lower min_accuracy if you mean it"
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
    published = [
        receipt for stage in (SYNTHESIZE, RELABEL, DISTILL) for _, receipt in sorted(run.ledger.receipts(stage).items())
    ]
    num_images, seconds = sum(r.rows for r in images.values()), sum(r.seconds for r in images.values())
    optimized = config.method.engine is Engine.inversion
    made = config.method.engine in (Engine.inversion, Engine.diffusion)
    measures = (read_json(run.store, DIVERSITY) or {}) if DiversityItem(run.spec()).is_done else {}
    diversity = [_diversity(space) for space in measures.get("spaces", [])]
    teachers, students = _teachers(run), _students(run)
    per_slice = {unit.slice_index: unit.iterations for unit in run.units}
    return RunSummary(
        run_id=run.name,
        label=run.label,
        column=run.column,
        method=config.method.name,
        recipe=config.recipe_name,
        dataset=DatasetFacts(
            name=dataset.name,
            class_names=dataset.class_names,
            image_size=dataset.image_size,
            channels=dataset.channels,
            num_train=dataset.num_images("train"),
            num_test=dataset.num_images("test"),
            class_ids=run.spec().class_ids() if config.classes else [],
        ),
        images_per_class=config.images_per_class,
        num_images=num_images,
        num_units=len(run.units),
        image_bytes=sum(r.bytes for r in images.values()),
        label_bytes=sum(r.bytes for r in labels.values()),
        label_codec=_label_codec(run),
        label_views=config.labels.views if labels else None,
        label_s=_total(r.seconds for r in labels.values()),
        config=output_tree(config),
        config_hash=config_hash(config),
        quarantined=[
            Quarantined(unit_id=f"{e['stage']} {e['name']} ({e['unit_id']})", reason=e["reason"])
            for e in run.ledger.quarantined()
        ],
        lost_images=[Quarantined(unit_id=e["image_id"], reason=e["reason"]) for e in lost_images(images)],
        synthesis_s=seconds,
        images_per_s=num_images / seconds if made and seconds else None,
        teachers=teachers,
        student=_student_facts(run, teachers),
        students=students,
        student_s=_total(student.seconds for student in students),
        search=_search(run),
        synthesis_cpu_s=_all(r.details.get("cpu_s") for r in images.values()),
        cosine=Cosine(feature_model=diversity[0].model, **vars(diversity[0].cosine)) if diversity else Cosine(),
        diversity=diversity,
        energies=[Energies(**found) for found in measures.get("energies", [])],
        judges=[Judged(**judged) for judged in measures.get("judges", [])],
        plane=Plane(**measures["points"]) if measures.get("points") else None,
        neighbors=Neighbors(**measures["neighbors"]) if measures.get("neighbors") else None,
        confusions=[Confusion(**found) for found in measures.get("confusions", [])],
        split=config.evaluate.split.name,
        num_measured=_num_measured(run),
        budget=[per_slice[k] for k in sorted(per_slice)] if optimized else [],
        versions=versions(),
        environment={key: str(value) for key, value in (read_json(run.store, "environment.json") or {}).items()},
        devices=sorted({receipt.fingerprint.partition("|")[0] for receipt in published if receipt.fingerprint}),
        files=[FileFacts(key=r.key, bytes=r.bytes, sha256=r.sha256) for r in published],
        shards=[run.store.url_of(receipt.key) for _, receipt in sorted(images.items())],
        real_images=dataset.addresses("train") if dataset.num_images("train") else [],
        loss_curve=[
            UnitLosses(
                unit_id=r.name,
                ce=r.details.get("loss_ce"),
                bn=r.details.get("loss_bn"),
                history=r.details.get(LOSS_HISTORY, []),
            )
            for _, r in sorted(images.items())
        ]
        if optimized
        else [],
        paths=Paths(student=_student_folder(run)),
    )


def _num_measured(run: Run) -> int:
    """Real images that students are measured on, see `stages.distill.measured_accuracy`."""
    assert run.dataset is not None
    class_ids, counts = run.spec().class_ids(), run.dataset.counts
    if run.config.evaluate.split is EvaluationSplit.validation:
        return sum(min(counts["train"][c], run.config.student.validation_images) for c in class_ids)
    return sum(counts["test"][c] for c in class_ids)


def _diversity(space: Mapping[str, Any]) -> Diversity:
    measures: dict[str, Any] = {name: Measured(**space.get(name, {})) for name in (*MEASURES, *SET_MEASURES)}
    return Diversity(**{**space, **measures})


def _teachers(run: Run) -> list[TeacherFacts]:
    config = run.config
    pins = read_json(run.store, PINS) or {}
    roles = {
        "primary": [config.teachers.primary] if config.method.engine is Engine.inversion else [],
        "statistics": statistics_pool(config),
        "energy": energy_teachers(config) if needs_generator(config) else [],
        "labels": label_teachers(config) if LabelKind.soft in config.student.labels else [],
        "features": [config.evaluate.feature_model or config.teachers.primary],
        "judge": config.evaluate.judges,
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
                bn_distance_first=facts.get("bn_distance_first"),
                bn_distance_rest=facts.get("bn_distance_rest"),
            )
        )
    return found


def _student_facts(run: Run, teachers: Sequence[TeacherFacts]) -> StudentFacts:
    """The student, and the teachers that guided the images or the labels and have its architecture.

    Architectures are compared by name, without the tag of pretrained weights: one name may come in several sizes.
    """
    student = run.config.student
    own = student.arch.partition(".")[0]
    in_pool = [t.name for t in teachers if t.arch.partition(".")[0] == own and set(t.roles) - {"features", "judge"}]
    return StudentFacts(arch=student.arch, recipe=student.recipe, in_pool=in_pool)


def _students(run: Run) -> list[StudentResult]:
    """The students that are done. Details that receipts of an older version lack are None, or as set."""
    receipts = run.ledger.receipts(DISTILL)
    results = []
    for item in run.students():
        if item.is_done:
            receipt = receipts[item.name]
            details = receipt.details
            results.append(
                StudentResult(
                    seed=item.seed,
                    labels=item.labels.value,
                    top1=details["top1"],
                    seconds=receipt.seconds,
                    steps=details["steps"],
                    num_params=details["num_params"],
                    best_on_test=details.get("best_on_test"),
                    lr=details.get("lr", run.config.student.lr),
                    images_per_s=details.get("images_per_s"),
                    data_wait_share=details.get("data_wait_share"),
                    shifts=details.get("shifts", {}),
                    confusion=details.get("confusion"),
                )
            )
    return results


def _search(run: Run) -> list[SearchResult]:
    """The learning rates that were tried on today's images and labels; none is chosen before all of them were."""
    items = [item for item in run.searches() if item.is_done]
    spec, grid = run.spec(), run.config.student.lr_grid
    kinds = [kind for kind in run.config.student.labels if sum(item.labels is kind for item in items) == len(grid) > 0]
    chosen = {kind: chosen_lr(spec, kind) for kind in kinds}
    results = []
    for item in items:
        content = read_json(run.store, item.key)
        assert content is not None, "it is done"
        results.append(
            SearchResult(
                labels=item.labels.value,
                lr=item.lr,
                top1=content["top1"],
                chosen=item.lr == chosen.get(item.labels),
                validation=content["validation"],
                num_images=content["num_images"],
            )
        )
    return results


def _label_codec(run: Run) -> str | None:
    """Of the label shards that exist; of an older version's, half precision was the only one."""
    if LabelKind.soft in run.config.student.labels and run.config.labels.online:
        return "online"
    codecs = {receipt.details.get("codec", "fp16") for receipt in run.ledger.receipts(RELABEL).values()}
    return ", ".join(sorted(codecs)) or None


def _total(values: Iterable[float | None]) -> float | None:
    """Sum of what was measured; None if nothing was."""
    measured = [value for value in values if value is not None]
    return sum(measured) if measured else None


def _all(values: Iterable[float | None]) -> float | None:
    """Sum of values that are all known; None if one is not, or there is none."""
    known = list(values)
    return sum(v for v in known if v is not None) if known and None not in known else None


def _student_folder(run: Run) -> str | None:
    """The first student, soft labels before hard."""
    trained = next((item for item in run.students_to_show() if item.is_done), None)
    return f"student/{trained.name}" if trained else None


def write_reports(
    runs: Sequence[Run],
    *,
    title: str,
    command: str,
    suite: str | None,
    references: Mapping[str, str] = {},
    always: bool = False,
) -> str:
    """Report and card of every run, and of the suite one report of all, with its results as Markdown and CSV.

    Runs of a suite that differ in their seeds alone are pooled there, see `prism_ray.report.pooling`. What has not
    changed is written again only if `always`.

    Args:
        references: rows of the suite that scores compare with, see `prism_ray.report.ranking.score_rows`.

    Returns:
        The address of the report to look at.
    """
    garbage.as_usual()
    from prism_ray.report.card import render_card
    from prism_ray.report.html import render_report
    from prism_ray.report.origins import licences_of

    summaries = [summarize(run) for run in runs]
    for run, summary in zip(runs, summaries, strict=True):
        own = replace(summary, label=run.config.method.name, column=None)
        contents = [own.to_dict()]
        known = read_json(run.store, "report/summary.json", Any)
        if always or known != contents or run.store.size("report/report.html") is None:
            page = render_report([own], title=run.name, command=command)
            run.store.put("report/report.html", page.encode())
            run.store.put("README.md", render_card(own, licences=licences_of(run.config)).encode())
            run.store.put("report/summary.json", to_json(contents))
    if suite is None:
        return _link(runs[0].store, "report/report.html")
    folder = f"benches/{suite}-{content_hash([run.name for run in runs])[:12]}"
    root = open_store(runs[0].config.storage)
    return _write_comparison(summaries, root, folder, title=title, command=command, references=references)


def write_comparison(runs: Sequence[Run], *, storage: str, command: str, references: Mapping[str, str]) -> str:
    """One report over finished runs of any storages, with its results as Markdown and CSV; their own stay as they are.

    Returns:
        The address of the report.

    Raises:
        InputError: the runs have no common table.
    """
    root, summaries = open_store(storage), [summarize(run) for run in runs]
    folder = f"benches/runs-{content_hash([run.store.url for run in runs])[:12]}"
    title = f"{len(runs)} runs on {summaries[0].dataset.name}"
    return _write_comparison(summaries, root, folder, title=title, command=command, references=references)


def _write_comparison(
    summaries: Sequence[RunSummary],
    root: Store,
    folder: str,
    *,
    title: str,
    command: str,
    references: Mapping[str, str],
) -> str:
    """What is written of several runs, if anything of it has changed; returns the report's address."""
    from prism_ray.report.html import render_report
    from prism_ray.report.pooling import pooled
    from prism_ray.report.ranking import score_rows
    from prism_ray.report.results import results_csv, results_markdown

    cells = pooled(summaries)
    tables = {
        "summary": [summary.to_dict() for summary in summaries],
        "scores": {
            "references": dict(references),
            "rows": [asdict(row) for row in score_rows(cells, references)],
        },
    }
    known = {name: read_json(root, f"{folder}/{name}.json", Any) for name in tables}
    documents = ("report.html", "results.md", "results.csv")
    if known != tables or any(root.size(f"{folder}/{name}") is None for name in documents):
        written = {
            "report.html": render_report(cells, title=title, command=command, references=references),
            "results.md": results_markdown(cells, title=title, command=command, references=references),
            "results.csv": results_csv(cells, references),
        }
        for name, text in written.items():
            root.put(f"{folder}/{name}", text.encode())
        for name, content in tables.items():
            root.put(f"{folder}/{name}.json", to_json(content))
    return _link(root, f"{folder}/report.html")


def _link(store: Store, key: str) -> str:
    """An object's address as a browser or a program of the object store takes it."""
    address = store.url_of(key)
    return address if is_remote(address) else Path(address).as_uri()


def closing_text(
    runs: Sequence[Run],
    report: str | None,
    quarantined: Sequence[dict[str, Any]],
    *,
    references: Mapping[str, str] = {},
) -> str:
    """The table and the lines to copy at the end of a command."""
    from prism_ray.report.pooling import pooled

    lines = [""]
    if report is not None:
        lines += results_table(pooled([summarize(run) for run in runs]), references)
    if quarantined:
        lines += [
            f"{len(quarantined)} units quarantined; `prism-ray retry` with the same settings tries them again",
            "",
        ]
    lost = [entry for run in runs for entry in lost_images(run.ledger.receipts(SYNTHESIZE))]
    if lost:
        lines += [f"{len(lost)} images could not be made ({lost[0]['image_id']}: {lost[0]['reason']}, …)", ""]
    optimized = [run for run in runs if run.config.method.engine is Engine.inversion]
    shown = (optimized or list(runs))[-1]
    if report is not None:
        lines.append(f"look at the report:  {report}")
    if shown.ledger.receipts(SYNTHESIZE):
        files = f"{shown.store.url_of('images')}/*.parquet"
        lines.append(f"load the images:     datasets.load_dataset('parquet', data_files='{files}')")
    student = _student_folder(shown)
    if student and is_remote(shown.store.url):
        lines.append(f"copy the student:    {shown.store.url_of(student)}, or prism-ray export with export.folder=DIR")
    elif student:
        lines.append(
            f"load the student:    import prism_ray.models, timm; "
            f"timm.create_model('local-dir:{shown.store.url_of(student)}', pretrained=True)"
        )
    return "\n".join(lines)


def results_table(summaries: Sequence[RunSummary], references: Mapping[str, str] = {}) -> list[str]:
    """Top-1 of each row in percent, its difference to the baseline in points, and a run's costs, as fixed-width lines.

    Where rows are crossed with columns, a second table holds the soft-label students of each row in each column, marked
    with * where the row has a teacher of that architecture.
    """
    from prism_ray.report.comparison import crossed
    from prism_ray.report.format import MISSING, format_bytes, format_percent, format_points, spread
    from prism_ray.report.ranking import baseline_of, score_rows

    def top1(summary: RunSummary, kind: str) -> str:
        found = spread(summary.accuracies(kind).values())
        if found is None:
            return MISSING
        return f"{100 * found.mean:.2f}" + (f" ± {100 * found.std:.2f}" if found.std is not None else "")

    def judged(summary: RunSummary, judge: str) -> str:
        found = next((judged for judged in summary.judges if judged.judge == judge), None)
        return format_percent(found.top1 if found else None)

    def seconds(value: float | None) -> str:
        return f"{value:.1f} s" if value is not None else MISSING

    kinds = [kind for kind in KINDS if any(summary.accuracies(kind) for summary in summaries)]
    differences = []
    for row in score_rows(summaries, references):
        found = row.differences.get("soft")
        std = f" ± {100 * found.std:.2f}" if found and found.std is not None else ""
        differences.append(f"{format_points(found.mean)}{std}" if found else MISSING)
    compared = any(difference != MISSING for difference in differences)
    split = "" if summaries[0].split == "test" else f" ({summaries[0].split})"
    header = ["row", "images", *(f"top-1 {kind}{split}" for kind in kinds)]
    header += [f"soft vs {baseline_of(references)}"] if compared else []
    judges = list(dict.fromkeys(judged.judge for summary in summaries for judged in summary.judges))
    header += [f"{judge} says so" for judge in judges]
    rows = [
        [
            summary.name,
            str(summary.num_images),
            *(top1(summary, kind) for kind in kinds),
            *([difference] if compared else []),
            *(judged(summary, judge) for judge in judges),
            format_bytes(summary.label_bytes) if summary.label_bytes else summary.label_codec or MISSING,
            seconds(summary.synthesis_s),
            seconds(None if summary.student_s is None else summary.student_s / summary.num_runs),
        ]
        for summary, difference in zip(summaries, differences, strict=True)
    ]
    lines = _fixed_width([[*header, "labels", "synthesis", "students"], *rows])

    def cell_of(summary: RunSummary) -> str:
        return _marked(summary, top1(summary, "soft" if summary.accuracies("soft") else "hard"))

    columns, by_row = crossed(summaries)
    if columns:
        cells = [
            [label, *(cell_of(found[c]) if c in found else MISSING for c in columns)] for label, found in by_row.items()
        ]
        lines += _fixed_width([["top-1", *columns], *cells])
        if any(cell.startswith("* ") for _, *row in cells for cell in row):
            lines[-1:] = ["* the row has a teacher of this architecture", ""]
    return lines


def _marked(summary: RunSummary, text: str) -> str:
    return f"* {text}" if summary.student and summary.student.in_pool else text


def _fixed_width(rows: Sequence[Sequence[str]]) -> list[str]:
    """Cells in aligned columns, the first to the left, and an empty line."""
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    return [
        "  ".join(v.ljust(w) if n == 0 else v.rjust(w) for n, (v, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ] + [""]
