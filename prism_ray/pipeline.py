"""The main path, top to bottom: prepare, teach, generator, prompts, synthesize, relabel, distill, evaluate, report.

A command drives one run or the rows of a suite; each stage does what is left of all of them at once, so start-up is
paid once and no worker idles between runs. Every stage leaves its result in the run folder: the same command, run
again, continues.
"""

import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from prism_ray import garbage, summary
from prism_ray.artifacts import artifact_facts
from prism_ray.board import has_board, write_board
from prism_ray.checks import check_before_start
from prism_ray.config import STAGES, Config, Row
from prism_ray.data.prepared import prepare_dataset
from prism_ray.data.shifted import class_ids_in, prepare_shifted
from prism_ray.errors import Drained, ExitCode, InputError, PrismError, one_line, printable
from prism_ray.generation import calibration_item, generator_of, phrases_item, prompts_item
from prism_ray.ledger import MANIFEST, Outcome
from prism_ray.options import Executor
from prism_ray.plan import check_statistics, needs_generator, used_teachers
from prism_ray.progress import Progress
from prism_ray.runs import Run, open_run
from prism_ray.runtime.cluster import RayRuntime
from prism_ray.runtime.inline import InlineRuntime
from prism_ray.runtime.submission import submission_id
from prism_ray.signals import handlers_replaced, interruptible, interruptible_items
from prism_ray.staging import staged_classifier
from prism_ray.storage import is_remote, storage_errors
from prism_ray.weights import is_folder
from prism_ray.work import (
    RELABEL,
    SYNTHESIZE,
    Chain,
    DiversityItem,
    Item,
    RunSpec,
    TeacherItem,
    UnitRef,
    check_starts,
)

POLL_S = 1.0
POLL_S_PER_ITEM = 0.05


class Runtime(Protocol):
    """Where work runs; both executors make the same bytes."""

    def start(self) -> None: ...
    def units(self, specs: Sequence[RunSpec], chains: Sequence[Chain]) -> Iterator[tuple[UnitRef, Outcome]]: ...
    def train(self, items: Sequence[Item]) -> None: ...


@dataclass(frozen=True)
class Command:
    """What a command drives, with what, and which stages of it are wanted."""

    runs: list[Run]
    runtime: Runtime
    progress: Progress
    wanted: list[str]


def run(
    rows: Sequence[Row],
    *,
    title: str,
    command: str,
    suite: str | None = None,
    references: Mapping[str, str] | None = None,
) -> ExitCode:
    """Drive runs from wherever they are to their report.

    Args:
        rows: the runs; stages and compute settings are those of the first.
        title: headline of the report.
        command: what the user typed, for the report.
        suite: name of the suite, which gets a report of its own.
        references: rows that scores compare with, see `cli.compose.Suite`.

    Raises:
        PrismError: with the exit code and one line of what to do.
    """
    configs = [row.config for row in rows]
    check_before_start(configs)
    wanted = configs[0].stages or list(STAGES)
    with ExitStack() as stack:
        runs = [open_run(row, stack) for row in rows]
        stack.enter_context(noted_end(runs))
        if (job := submission_id()) is not None:
            for each in runs:
                each.ledger.event("job", submission_id=job, epoch=each.epoch)
        progress = stack.enter_context(Progress(sys.stdout, teachers=used_teachers(configs[-1])))
        progress.message("\n".join(f"run {r.name} in {r.store.url}" for r in runs))
        runtime = stack.enter_context(make_runtime(configs[0]))
        driven = Command(runs, runtime, progress, wanted)
        prepare(driven)
        if wanted != ["prepare"]:
            teach(driven)
            generate(driven)
            prompt(driven)
        for name, stage in (
            ("synthesize", measure),
            ("synthesize", synthesize),
            ("relabel", relabel),
            ("distill", distill),
            ("evaluate", evaluate),
        ):
            if name not in wanted:
                continue
            stage(driven)
            if stage in (synthesize, distill):
                for each in runs:
                    if not has_board(each, name):
                        write_board(each, [name])
        report = None
        if "report" in wanted:
            with storage_errors(runs[0].store.url):
                with_images(driven, "report")
                report = summary.write_reports(
                    runs, title=title, command=command, suite=suite, references=references or {}
                )
        for each in runs:
            each.write_manifest()
    quarantined = [entry for each in runs for entry in each.ledger.quarantined()]
    print(printable(summary.closing_text(runs, report, quarantined, references=references or {})))
    return ExitCode.quarantined if quarantined else ExitCode.done


@contextmanager
def noted_end(runs: Sequence[Run]) -> Iterator[None]:
    """Note in every run's events how its command ended, unless it ended well."""
    try:
        yield
    except (PrismError, KeyboardInterrupt) as error:
        kind = "drained" if isinstance(error, Drained) else "failed"
        kind = "interrupted" if isinstance(error, KeyboardInterrupt) else kind
        with suppress(OSError, PrismError):  # a full disk must not hide why the command ended
            for each in runs:
                each.ledger.event(kind, epoch=each.epoch, reason=one_line(error))
        raise


def make_runtime(config: Config) -> InlineRuntime | RayRuntime:
    """The executor by name; neither imports torch or Ray before there is work."""
    if config.compute.executor is Executor.inline:
        return InlineRuntime()
    return RayRuntime(config.compute)


def start(command: Command) -> None:
    """Start the executor, once there is work for it.

    In the main thread: a local cluster's processes die with the thread that started them, and Ray's core installs
    handlers.
    """
    garbage.as_usual()
    with handlers_replaced():
        command.runtime.start()


def prepare(command: Command) -> None:
    """Real data as one parquet contract; made once for all runs that share it."""
    command.progress.stage("prepare", len(command.runs), "runs")
    for n, each in enumerate(command.runs, 1):
        with storage_errors(each.artifacts_dir):
            each.dataset = prepare_dataset(each.config.dataset, each.artifacts_dir)
            for name, where in each.config.evaluate.shifted_sets.items():
                shifted = prepare_shifted(each.config.dataset, name, where, each.artifacts_dir)
                each.shifted_dirs[name] = shifted.url
                class_ids_in(each.dataset.class_names, shifted.class_names, name=name)
        each.pin("data set", each.dataset.content_hash)
        check_statistics(each.config, each.units)  # refused, like a plan that can't be made, before teachers train
        check_starts(each.spec())
        each.set_aside = each.ledger.set_damaged_aside()
        for key in each.set_aside:
            command.progress.message(f"{each.name}: {key} was damaged and is made again")
        command.progress.update(n)


def teach(command: Command) -> None:
    """Teachers as content-addressed artifacts: trained once for all runs with the same settings, then checked."""
    items: dict[str, TeacherItem] = {}
    for each in command.runs:
        for name in used_teachers(each.config):
            item = teacher_item(each, name)
            items[item.folder] = item
            each.teacher_dirs[name] = item.folder
    do_items(command, "teach", list(items.values()), "networks")
    for each in command.runs:
        summary.check_teachers(each)
        each.pin_teachers()


def teacher_item(each: Run, name: str) -> TeacherItem:
    """One teacher of a run as work."""
    config, dataset = each.config, each.dataset
    assert dataset is not None, "prepare comes first"
    teacher, compute = config.teachers.models[name], config.compute
    if is_folder(teacher.source):
        teacher = replace(teacher, source=staged_classifier(teacher.source, each.artifacts_dir))
    folder = each.teacher_folder(name)
    make_parent(folder)
    gpus = compute.gpus_per_train_worker
    return TeacherItem(name, teacher, config.teach, dataset.url, folder, compute.threads, gpus)


def make_parent(folder: str) -> None:
    """The folder that an artifact belongs in; an object store needs none."""
    if not is_remote(folder):
        with storage_errors(Path(folder).parent):
            Path(folder).parent.mkdir(parents=True, exist_ok=True)


def generate(command: Command) -> None:
    """Generators as content-addressed artifacts: trained once for all runs with the same settings."""
    items: dict[str, Item] = {}
    runs = [each for each in command.runs if needs_generator(each.config)]
    for each in runs:
        assert each.dataset is not None, "prepare comes first"
        each.generator_dir, item = generator_of(each.config, each.dataset, each.artifacts_dir)
        if item is not None:
            items[item.folder] = item
    do_artifacts(command, "generator", items, "generators")
    for each in runs:
        each.pin_generator()


def prompt(command: Command) -> None:
    """Tables of prompts, written once and then frozen."""
    items: dict[str, Item] = {}
    runs = [each for each in command.runs if needs_generator(each.config)]
    chosen = {each.name: phrases_item(each.spec(), each.artifacts_dir) for each in runs}
    do_artifacts(command, "phrases", {item.folder: item for item in chosen.values() if item}, "choices")
    for each in runs:
        assert each.dataset is not None, "prepare comes first"
        assert each.generator_dir is not None, "the generator comes first"
        judged = chosen[each.name]
        phrases = artifact_facts(judged.folder)["phrases"] if judged else ()
        item = prompts_item(each.config, each.dataset, each.generator_dir, each.artifacts_dir, phrases=phrases)
        each.prompts_dir, items[item.folder] = item.folder, item
    do_artifacts(command, "prompts", items, "tables")
    for each in runs:
        each.pin_prompts()


def do_artifacts(command: Command, stage: str, items: Mapping[str, Item], unit: str) -> None:
    """Have artifact folders made, if there are any to be."""
    for folder in items:
        make_parent(folder)
    if items:
        do_items(command, stage, list(items.values()), unit)


def measure(command: Command) -> None:
    """What synthesis needs to know before: statistics to match, images to start from, energies of unguided samples."""
    runs = [each for each in command.runs if each.open_units(SYNTHESIZE)]
    items: dict[str, Item] = {}
    for each in runs:
        statistics, starts = each.statistics_items(), each.starts_item()
        each.statistics_dirs = {item.name: item.folder for item in statistics}
        each.starts_dir = starts.folder if starts else None
        calibration = calibration_item(each.spec(), each.artifacts_dir)
        each.calibration_dir = calibration.folder if calibration else None
        items |= {item.folder: item for item in (*statistics, starts, calibration) if item is not None}
    do_artifacts(command, "measure", items, "passes")
    for each in runs:
        each.pin_measured()


def synthesize(command: Command) -> None:
    """Images, unit by unit. A worker that made a unit's images labels them at once, with its models still warm."""
    make_units(command, SYNTHESIZE)


def relabel(command: Command) -> None:
    """Soft labels of the images that have none yet."""
    make_units(command, RELABEL)


def make_units(command: Command, stage: str) -> None:
    """What is left of a stage, of all runs together. A unit that several runs share is made by the first of them."""
    runs = {n: each for n, each in enumerate(command.runs) if stage == SYNTHESIZE or each.needs_labels()}
    left: int | None = None
    while left != 0:
        chains = left_chains(command, runs, stage)
        adopted = sum(each.adopt_units(stage) for each in runs.values()) if chains else 0
        if adopted:
            command.progress.message(f"{stage}: {adopted} units taken over from runs that made the same ones")
            chains = left_chains(command, runs, stage)
        if left is not None and len(chains) in (0, left):  # all is made, or nothing more can be
            return
        left = len(chains)
        make_chains(command, runs, stage, distinct(runs, chains))


def left_chains(command: Command, runs: Mapping[int, Run], stage: str) -> list[Chain]:
    """The open chains of all runs."""
    return [chain for n, each in runs.items() for chain in open_chains(command, n, each, stage)]


def distinct(runs: Mapping[int, Run], chains: Sequence[Chain]) -> list[Chain]:
    """The chains that begin with different units; the others can be taken over from them afterwards."""
    found: dict[str, Chain] = {}
    for chain in chains:
        unit = runs[chain[0].run].units[chain[0].unit]
        found.setdefault(unit.unit_id if chain[0].stage == SYNTHESIZE else unit.labels_id, chain)
    return list(found.values())


def make_chains(command: Command, runs: Mapping[int, Run], stage: str, chains: Sequence[Chain]) -> None:
    """Have units made, and report how each ended."""
    finished = [unit for each in runs.values() for unit in each.done_units(stage)]
    done, images = len(finished), sum(len(unit.images) for unit in finished)
    quarantined = sum(entry["stage"] == stage for each in runs.values() for entry in each.ledger.quarantined())
    command.progress.stage(stage, sum(len(each.units) for each in runs.values()), done=done, images=images)
    command.progress.update(done, quarantined=quarantined)
    if not chains:
        return
    chosen = list({chain[0].run: runs[chain[0].run] for chain in chains}.values())
    for each in chosen:
        each.store.remove(MANIFEST)  # the run is in progress again
    note(chosen, "stage", stage=stage)
    start(command)
    specs = [each.spec() for each in command.runs]
    ordered = longest_first(runs, chains)
    command.progress.working(work=sum(cost(runs, chain) for chain in chains))
    for ref, outcome in interruptible_items(lambda: command.runtime.units(specs, ordered)):
        each = runs[ref.run]
        if outcome.status == "aborted":
            raise aborted(outcome)
        if outcome.status == "quarantined":
            each.ledger.event("quarantined", stage=ref.stage, unit=outcome.name, reason=outcome.reason)
            command.progress.message(f"{each.name}: {ref.stage} {outcome.name} quarantined: {outcome.reason}")
        command.progress.observe(
            work=cost(runs, [ref]) if ref.stage == stage else 0.0,
            is_done=outcome.status == "done",
            device=outcome.device,
            memory_bytes=outcome.memory_bytes,
            device_memory_bytes=outcome.device_memory_bytes,
            values={f"{each.name} {key}" if len(runs) > 1 else key: v for key, v in outcome.values.items()},
        )
        if ref.stage == stage:
            done += outcome.status == "done"
            quarantined += outcome.status == "quarantined"
            images += len(each.units[ref.unit].images) if outcome.status == "done" else 0
            command.progress.update(done, images=images, quarantined=quarantined)
    note(chosen, "stage_ended", stage=stage)


def note(runs: Sequence[Run], kind: str, **content: Any) -> None:
    """One line in the events of several runs."""
    for each in runs:
        each.ledger.event(kind, epoch=each.epoch, **content)


def longest_first(runs: Mapping[int, Run], chains: Sequence[Chain]) -> list[Chain]:
    """The order in which workers take units: short ones at the end, when a lost node or a late worker costs most."""
    return sorted(chains, key=lambda chain: cost(runs, chain), reverse=True)


def cost(runs: Mapping[int, Run], chain: Chain) -> int:
    """What a chain costs to make, in images times iterations; units of other settings don't compare."""
    unit = runs[chain[0].run].units[chain[0].unit]
    return len(unit.images) * max(unit.iterations, 1)


def open_chains(command: Command, n: int, each: Run, stage: str) -> list[Chain]:
    """The units of a stage to make now, images together with their labels if both are wanted."""
    stages = [stage]
    if stage == SYNTHESIZE and RELABEL in command.wanted and each.needs_labels():
        stages.append(RELABEL)
    return [[UnitRef(n, name, unit.index) for name in stages] for unit in each.open_units(stage)]


def aborted(outcome: Outcome) -> PrismError:
    """The error of a unit that stopped for no fault of its own."""
    error = PrismError(outcome.reason)
    error.exit_code = ExitCode(outcome.exit_code)
    return error


def distill(command: Command) -> None:
    """Students of every seed and label kind; runs are measured by the same workers if that is wanted."""
    items: list[Item] = []
    runs = with_images(command, "distill")
    searches = [item for each in runs for item in each.searches()]
    if searches:
        do_items(command, "search", searches, "learning rates")
    for each in runs:
        students = each.students()
        if not all(item.is_done for item in students):
            each.store.remove(MANIFEST)
        items += students
    if "evaluate" in command.wanted:
        items += [DiversityItem(each.spec()) for each in runs]
    do_items(command, "distill", items, "networks and measurements")


def evaluate(command: Command) -> None:
    """How alike the images of a class are, beside as many real ones."""
    items = [DiversityItem(each.spec()) for each in with_images(command, "evaluate")]
    do_items(command, "evaluate", items, "measurements")


def with_images(command: Command, stage: str) -> list[Run]:
    """The runs that a later stage can work on: not those of which every unit was quarantined.

    Raises:
        InputError: a run has no images because no stage has made them.
    """
    found = [each for each in command.runs if each.ledger.receipts(SYNTHESIZE)]
    for each in command.runs:
        if each not in found and not each.ledger.quarantined():
            raise InputError(f"stages: {stage} needs images, and run {each.name} has none; add the stages before it")
    return found


def do_items(command: Command, stage: str, items: Sequence[Item], unit: str) -> None:
    """What is left of a list of networks and measurements, reporting from what is on disk."""
    todo = [item for item in items if not item.is_done]
    before = len(items) - len(todo)
    command.progress.stage(stage, len(items), unit, done=before)
    if not todo:
        return
    note(command.runs, "stage", stage=stage)
    start(command)
    command.progress.working()

    def look() -> None:
        command.progress.update(before + sum(item.is_done for item in todo))

    # To look costs a few small files per item, which many items must not take from the work.
    with watched(look, every_s=max(POLL_S, POLL_S_PER_ITEM * len(todo))):
        interruptible(lambda: command.runtime.train(todo))
    left = [item.name for item in todo if not item.is_done]
    if left:
        raise PrismError(f"{stage}: {', '.join(left)} did not finish; run the same command to continue")
    command.progress.update(len(items))
    note(command.runs, "stage_ended", stage=stage)


@contextmanager
def watched(look: Callable[[], None], *, every_s: float) -> Iterator[None]:
    """Call `look` again and again beside a call that blocks."""
    finished = threading.Event()

    def watch() -> None:
        while not finished.wait(every_s):
            look()

    watcher = threading.Thread(target=watch, name="progress", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        finished.set()
        watcher.join()
