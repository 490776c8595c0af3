"""Verbs that look and do not make: plan, verify, retry, report, show."""

from collections.abc import Sequence
from dataclasses import dataclass

from prism_ray import summary
from prism_ray.artifacts import artifact_facts, damaged_files, local_folder
from prism_ray.config import Config, LabelsConfig, Row, label_teachers, student_steps
from prism_ray.data.prepared import PreparedDataset, find_prepared
from prism_ray.data.records import class_ids_of
from prism_ray.data.sources import open_source
from prism_ray.device_time import Work, time_lines
from prism_ray.errors import InputError, PrismError, within
from prism_ray.generation import TRAIN
from prism_ray.identity import run_id
from prism_ray.ledger import MANIFEST, Ledger
from prism_ray.lock import RunLock
from prism_ray.methods.label_layout import LabelLayout
from prism_ray.options import Engine, LabelKind
from prism_ray.plan import (
    Unit,
    asked,
    energy_teachers,
    guided,
    guiding_pool,
    plan_units,
    reserved_images,
    used_teachers,
)
from prism_ray.report.format import format_bytes
from prism_ray.runs import PINS, TEACHER_PIN, Run, locate, require
from prism_ray.staging import found_here
from prism_ray.storage import check_new_file, is_remote, open_store, read_json, write_new_file
from prism_ray.work import DISTILL, RELABEL, SYNTHESIZE, weights_sha256

CONTACT_SHEET = "report/images.png"


def describe(config: Config) -> str:
    """How a run is called in messages."""
    return f"run {run_id(config)}"


# plan


@dataclass(frozen=True)
class Estimate:
    """Operations of a run, those of inversion by unit."""

    unit_flops: list[float]
    label_flops: float

    @property
    def synthesis_flops(self) -> float:
        return sum(self.unit_flops)


def plan_text(config: Config) -> str:
    """Units, images, bytes, operations, time and cost of a run. Makes nothing and starts nothing."""
    dataset = find_prepared(config.dataset, open_store(config.storage).url_of("artifacts"))
    names, units = planned(config, dataset)
    num_images = sum(len(unit.images) for unit in units)
    sides = config.dataset.image_size
    pixel_bytes = num_images * config.dataset.channels * sides * sides
    student, labels = config.student, config.labels
    soft = LabelKind.soft in student.labels
    views = num_images * labels.views if soft and not labels.online else 0
    label_bytes = num_images * label_blob_bytes(labels, len(names)) if views else 0
    online = ", computed while students train" if soft and labels.online else ""
    students, searches = (len(tried) * len(student.labels) for tried in (student.seeds, student.lr_grid))
    search = f", and {searches} to try learning rates" if searches else ""
    steps = student_steps(student, num_images)
    run = locate(Row("", config))
    lines = [
        f"{describe(config)}: {'begun' if run.store.size('config.yaml') else 'not begun'}",
        f"  classes     {len(names)}",
        f"  units       {len(units)}, each one shard and one task",
        f"  images      {num_images} of {sides}x{sides}, at most {format_bytes(pixel_bytes)} of pixels",
        f"  labels      {views} views, at most {format_bytes(label_bytes)} of logits{online}",
        f"  students    {students}, {steps} steps of {student.batch_size} images each{search}",
    ]
    if config.method.engine is Engine.inversion:
        budget = sorted({unit.iterations for unit in units}, reverse=True)
        lines.append(f"  iterations  {sum(unit.iterations for unit in units)} in all, per unit {budget}")
        lines.append(
            f"  memory      at least {format_bytes(_step_memory(config, units, len(names)))} an actor, in a step"
        )
    work, label_flops = count_work(config, dataset, names, units)
    counted = [("synthesis", work.image_flops and sum(work.image_flops)), ("labels", label_flops if soft else 0.0)]
    if config.method.engine is Engine.diffusion:
        known = "a generator that is not here yet"
        if work.image_flops is not None:
            known = f"{sum(work.image_flops) / num_images:.3g} FLOP per image"
        lines.append(f"  sampling    {config.method.sampling.steps} steps, {known}")
    for name, flops in counted:
        if flops is not None:
            speed = config.compute.effective_tflops
            hours = flops / speed / 1e12 / 3600
            lines.append(f"  {name:10}  {flops:.3g} FLOP, {hours:.3g} device-hours at {speed:g} TFLOP/s")
    return "\n".join([*lines, *time_lines(config, run, work)])


def count_work(
    config: Config, dataset: PreparedDataset | None, names: Sequence[str], units: list[Unit]
) -> tuple[Work, float]:
    """Operations of every unit, and of all labels, also of those that are computed while students train."""
    forward = _teacher_flops(config, dataset, len(names))
    estimate = estimate_operations(config, units, forward)
    image_flops: list[float] | None = estimate.unit_flops
    if config.method.engine is Engine.diffusion:
        sampling = _sampling_flops(config, sum(forward[name] for name in energy_teachers(config)))
        image_flops = None if sampling is None else [len(unit.images) * sampling for unit in units]
    is_stored = LabelKind.soft in config.student.labels and not config.labels.online
    label_flops = estimate.label_flops / sum(len(unit.images) for unit in units) if is_stored else 0.0
    return Work(units, image_flops, [len(unit.images) * label_flops for unit in units]), estimate.label_flops


def label_blob_bytes(labels: LabelsConfig, num_classes: int) -> int:
    """Bytes of one image's stored labels before compression."""
    return LabelLayout(num_classes, labels.views, labels.top_k, labels.bits).blob_bytes


def planned(config: Config, dataset: PreparedDataset | None) -> tuple[list[str], list[Unit]]:
    """Class names and units; before the data is prepared, as if every class had enough real images."""
    if dataset is not None:
        names, rows_by_class = dataset.class_names, [rows.tolist() for rows in dataset.rows_by_class("train")]
        return names, plan_units(config, rows_by_class, class_ids_of(config.classes, names))
    if config.images_per_class is None:
        raise InputError("images_per_class=null: how many real images there are is known once stages=[prepare] has run")
    names = open_source(config.dataset).class_names
    rows_by_class = [range(config.images_per_class + reserved_images(config))] * len(names)
    return names, plan_units(config, rows_by_class, class_ids_of(config.classes, names))


def _teacher_flops(config: Config, dataset: PreparedDataset | None, num_classes: int) -> dict[str, float]:
    """Forward operations per image of every teacher: as found when its artifact was made, else of its architecture."""
    found = {}
    run = locate(Row(config.method.name, config))
    run.dataset = dataset
    for name in used_teachers(config):
        facts = dataset and artifact_facts(run.teacher_folder(name))
        if facts:
            found[name] = float(facts["forward_flops"])
            continue
        from prism_ray.models.flops import teacher_flops  # imports torch, which a plan of known teachers does without

        with within(f"teachers.models.{name}"):
            found[name] = teacher_flops(
                config.teachers.models[name],
                image_size=config.dataset.image_size,
                channels=config.dataset.channels,
                num_classes=num_classes,
            )
    return found


def _step_memory(config: Config, units: list[Unit], num_classes: int) -> int:
    """Bytes that the largest step of inversion keeps: all teachers' weights, and what those asked keep of a batch."""
    from prism_ray.models.flops import architecture_memory, describe_teacher  # imports torch
    from prism_ray.models.memory import step_bytes

    sizes = {"image_size": config.dataset.image_size, "channels": config.dataset.channels}
    weights, kept = {}, {}
    for name in guiding_pool(config):
        with within(f"teachers.models.{name}"):
            described = describe_teacher(config.teachers.models[name], num_classes=num_classes, **sizes)
            weights[name], kept[name] = architecture_memory(described)
    steps = {(len(u.images), frozenset(asked(config, guiding))) for u in units for _, guiding in guided(config, u)}
    return max((step_bytes(weights, kept, sorted(names), batch_size=n) for n, names in steps), default=0)


def _sampling_flops(config: Config, teachers: float) -> float | None:
    """Operations of one sampled image, from the generator's configs; None before they were fetched."""
    # imports diffusers, which only a plan of sampling needs
    from prism_ray.models.sampling_flops import pipeline_cost, sampling_flops, world_cost

    generator, dataset = config.generator, config.dataset
    assert generator.source is not None, "refused by validation"
    if generator.source == TRAIN:
        cost = world_cost(generator.world, image_size=dataset.image_size, channels=dataset.channels)
    else:
        folder = found_here(generator.source, open_store(config.storage).url_of("artifacts"))
        if folder is None:
            return None
        cost = pipeline_cost(local_folder(folder, only=["*.json"]), image_size=generator.image_size)
    return sampling_flops(config.method, cost, teachers)


def estimate_operations(config: Config, units: list[Unit], forward: dict[str, float]) -> Estimate:
    """Floating-point operations from the plan itself: which networks run at which iteration of which unit.

    A step is a forward pass and the gradient to the images, together twice the forward pass; an auxiliary teacher is
    counted whole, although it stops after its last batch norm. Labels that are not stored are computed for every image
    that a student sees.
    """
    num_images = sum(len(unit.images) for unit in units)
    views = num_images * config.labels.views
    if config.labels.online:
        students = len(config.student.seeds) + len(config.student.lr_grid)
        views = students * student_steps(config.student, num_images) * config.student.batch_size
    labels = views * sum(forward[name] for name in label_teachers(config))
    synthesis = [0.0] * len(units)
    for n, unit in enumerate(units if config.method.engine is Engine.inversion else []):
        for iterations, guiding in guided(config, unit):
            networks = sum(forward[name] for name in asked(config, guiding))
            synthesis[n] += 2 * len(unit.images) * len(iterations) * networks
    return Estimate(synthesis, labels)


# verify, retry, report


def open_existing(config: Config) -> Run:
    """An existing run with its data set and teachers found, as far as they are there."""
    run = require(config)
    run.dataset = find_prepared(config.dataset, run.artifacts_dir)
    if run.dataset is None:
        raise InputError(f"{describe(config)}: its data set is not prepared; start the run first")
    run.teacher_dirs = {name: run.teacher_folder(name) for name in used_teachers(config)}
    return run


def verify(config: Config) -> list[dict[str, str]]:
    """Compare everything a run published with its receipts, byte for byte, and write down what is wrong.

    Returns:
        One entry per problem, see `Ledger.verify`; the run's teachers and data set are looked at too.
    """
    run = open_existing(config)
    problems = run.ledger.verify() + _manifest_problems(run)
    damaged = [problem for problem in problems if problem["stage"]]
    run.ledger.record_damage(damaged)
    if damaged:
        run.ledger.event("damaged", keys=[problem["key"] for problem in damaged])
    assert run.dataset is not None
    for name in run.dataset.verify():
        problems.append(
            {"key": f"{run.dataset.url}/{name}", "problem": "differs from what was prepared; delete the folder"}
        )
    problems += _teacher_problems(run)
    for unit_id, images in _duplicate_images(run.ledger).items():
        problems.append({"key": unit_id, "problem": f"holds image ids of another shard: {images}"})
    return problems


def _manifest_problems(run: Run) -> list[dict[str, str]]:
    """Stages of which the manifest lists other objects than there are receipts of."""
    manifest = run.ledger.manifest()
    stages = (SYNTHESIZE, RELABEL, DISTILL) if manifest is not None else ()
    problem = "lists other objects than there are receipts of"
    return [
        {"key": MANIFEST, "stage": "manifest", "name": stage, "problem": f"{stage}: {problem}"}
        for stage in stages
        if (manifest or {}).get(stage) != run.listed(stage)
    ]


def _teacher_problems(run: Run) -> list[dict[str, str]]:
    """Teachers whose weights are not those the run began with."""
    problems = []
    for name, pinned in (read_json(run.store, PINS) or {}).items():
        folder = run.teacher_dirs.get(name.removeprefix(TEACHER_PIN))
        if folder is None:
            continue
        try:
            found = None if is_remote(folder) and damaged_files(folder) else weights_sha256(folder)
        except PrismError:
            found = None
        if found != pinned:
            problem = "its weights are missing" if found is None else "its weights differ from those the run began with"
            problems.append({"key": folder, "problem": f"{problem}; restore or delete the folder"})
    return problems


def _duplicate_images(ledger: Ledger) -> dict[str, str]:
    """Shards that repeat an image id, by key: an image is published once or not at all."""
    from prism_ray.ledger import read_table

    seen: set[str] = set()
    repeated = {}
    for _, receipt in sorted(ledger.receipts(SYNTHESIZE).items()):
        if ledger.store.size(receipt.key) != receipt.bytes:
            continue
        try:
            image_ids = read_table(ledger.store, receipt.key)["image_id"].to_pylist()
        except (PrismError, KeyError):
            continue  # damaged, and reported as such
        again = [image_id for image_id in image_ids if image_id in seen]
        if again:
            repeated[receipt.key] = ", ".join(again[:3])
        seen.update(image_ids)
    return repeated


def retry(config: Config) -> int:
    """Forget what was given up, so that the next run tries it again; returns the number of units."""
    run = require(config)
    with RunLock(run.store, name=run.name, lease_s=config.compute.lease_s):
        return run.ledger.retry()


def show(config: Config) -> str:
    """Draw a contact sheet of a run's images; returns where it is and what is on it.

    Raises:
        InputError: the run has no images yet, or the file to write is there already.
    """
    run = open_existing(config)
    receipts = run.ledger.receipts(SYNTHESIZE)
    if not receipts:
        raise InputError(f"{describe(config)}: has no images yet; start the run first")
    if config.out is not None:
        check_new_file(config.out, suffix=".png")
    from prism_ray.report.contact_sheet import draw_contact_sheet  # imports matplotlib and PIL

    assert run.dataset is not None
    shards = [run.store.url_of(receipt.key) for _, receipt in sorted(receipts.items())]
    sheet = draw_contact_sheet(shards, run.spec().class_ids(), run.dataset.class_names)
    if config.out is None:
        run.store.put(CONTACT_SHEET, sheet.png)
    else:
        write_new_file(config.out, sheet.png)
    where = config.out or run.store.url_of(CONTACT_SHEET)
    return f"{where}: {sheet.num_images} images of {sheet.num_classes} classes"


def rewrite_report(config: Config, *, command: str) -> str:
    """Make the report and the card again from what is on disk; returns where the report is."""
    run = _reportable(config)
    report = summary.write_reports([run], title=run.name, command=command, suite=None, always=True)
    return f"look at the report:  {report}"


def compare_runs(configs: Sequence[Config], *, storage: str, command: str) -> str:
    """One report over several finished runs, with differences to the first; returns its table and where it is.

    Raises:
        InputError: a run is named twice, lacks images or teachers, or runs have no common table.
    """
    runs = [_reportable(config) for config in configs]
    urls = [run.store.url for run in runs]
    for url in urls:
        if urls.count(url) > 1:
            raise InputError(f"report: {url} is named twice; name each run once")
    methods = [run.config.method.name for run in runs]
    for n, (run, method) in enumerate(zip(runs, methods, strict=True)):
        short = run.name.removeprefix(f"{run.config.recipe_name}-")
        run.label = method if methods.count(method) == 1 else short
        if run.label in [other.label for other in runs[:n]]:  # one run in two storages
            run.label = f"{short} ({n + 1})"
    references = {"baseline": runs[0].label}
    report = summary.write_comparison(runs, storage=storage, command=command, references=references)
    table = summary.results_table([summary.summarize(run) for run in runs], references)
    return "\n".join([*table, f"look at the report:  {report}"])


def _reportable(config: Config) -> Run:
    """An existing run that has what a report needs."""
    run = open_existing(config)
    if not run.ledger.receipts(SYNTHESIZE):
        raise InputError(f"{describe(config)}: has no images yet; start the run first")
    missing = [name for name in used_teachers(config) if not summary.teacher_facts(run, name)]
    if missing:
        raise InputError(
            f"{describe(config)}: the artifacts of its teachers {', '.join(missing)} are gone; make them again with "
            "prism-ray run and stages=[teach]"
        )
    return run
