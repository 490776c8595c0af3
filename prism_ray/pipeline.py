"""The main path, top to bottom: prepare → teach → synthesize → relabel → distill → evaluate → report.

A command drives one run or the rows of a suite; each stage does what is left of all of them at once, so that start-up is
paid once and no worker idles between runs. Every stage leaves its result in the run folder: the same command, run
again, continues.
"""

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from prism_ray import summary
from prism_ray.config import STAGES, Config, Executor, TeacherConfig
from prism_ray.data.prepared import check_dataset, prepare_dataset
from prism_ray.errors import Drained, ExitCode, PrismError
from prism_ray.ledger import MANIFEST, Outcome
from prism_ray.models.weights import check_architecture, check_weights_file, find_weights
from prism_ray.plan import used_teachers
from prism_ray.progress import Progress
from prism_ray.runs import Run, open_run
from prism_ray.runtime.cluster import RayRuntime
from prism_ray.runtime.inline import InlineRuntime
from prism_ray.runtime.session import preflight
from prism_ray.storage import read_json, to_json
from prism_ray.work import RELABEL, SYNTHESIZE, TeacherItem, TrainingItem, UnitRef, student_inputs, teacher_folder

POLL_S = 1.0
EVALUATION = "metrics/evaluation.json"


def run(rows: Mapping[str, Config], *, title: str, command: str, suite: str | None = None) -> ExitCode:
    """Drive runs from wherever they are to their report.

    Args:
        rows: settings of each run by its label; compute settings are those of the first.
        title: headline of the report.
        command: what the user typed, for the report.
        suite: name of the suite, which gets a report of its own.

    Raises:
        PrismError: with the exit code and one line of what to do.
    """
    configs = list(rows.values())
    check(configs)
    with ExitStack() as stack:
        stack.enter_context(drained_by_sigterm())
        runs = [open_run(label, config, stack) for label, config in rows.items()]
        progress = stack.enter_context(Progress(sys.stdout, teachers=used_teachers(configs[-1])))
        progress.message("\n".join(f"run {r.name} in {r.store.url}" for r in runs))
        runtime = stack.enter_context(make_runtime(configs[0]))
        wanted = configs[0].stages or list(STAGES)
        for name, stage in STAGE_FUNCTIONS.items():
            # Later stages need what these two find out, and it costs nothing where it is done.
            if name in wanted or name in ("prepare", "teach"):
                stage(runs, runtime, progress)
        report = None
        if "report" in wanted:
            report = summary.write_reports(runs, title=title, command=command, suite=suite)
        for each in runs:
            write_manifest(each)
    quarantined = [entry for each in runs for entry in each.ledger.quarantined()]
    print(summary.closing_text(runs, report, quarantined))
    return ExitCode.quarantined if quarantined else ExitCode.done


def check(configs: Sequence[Config]) -> None:
    """Refuse in the first seconds what can't work: cluster, data, teachers. No Ray, no model."""
    preflight(configs[0].compute)
    for config in configs:
        for name in used_teachers(config):
            check_teacher(name, config.teachers.models[name])
        check_architecture(config.student.arch, key="student.arch")
    for dataset in {str(config.dataset): config.dataset for config in configs}.values():
        check_dataset(dataset)


def check_teacher(name: str, teacher: TeacherConfig) -> None:
    """Look at a teacher's architecture name or weights file without loading it."""
    key = f"teachers.models.{name}"
    if teacher.source == "train":
        assert teacher.arch is not None
        check_architecture(teacher.arch, key=f"{key}.arch")
    elif teacher.source.startswith("timm:"):
        check_architecture(teacher.source.removeprefix("timm:"), key=f"{key}.source")
    else:
        check_weights_file(find_weights(Path(teacher.source)), allow_pickle=teacher.allow_pickle)


def make_runtime(config: Config) -> Any:
    """The executor by name; neither imports torch or Ray before there is work."""
    if config.compute.executor is Executor.inline:
        return InlineRuntime()
    return RayRuntime(config.compute, started=install_sigterm)


# Stages


def prepare(runs: Sequence[Run], runtime: Any, progress: Progress) -> None:
    """Real data as one parquet contract; made once for all runs that share it."""
    progress.stage("prepare", len(runs), "runs")
    for n, each in enumerate(runs, 1):
        each.dataset = prepare_dataset(each.config.dataset, each.artifacts_dir)
        each.pin("data set", each.dataset.content_hash)
        for key in each.ledger.set_damaged_aside():
            progress.message(f"{each.name}: {key} was damaged and is made again")
        progress.update(n)


def teach(runs: Sequence[Run], runtime: Any, progress: Progress) -> None:
    """Teachers as content-addressed artifacts: trained once for all runs with the same settings, then checked."""
    items: dict[str, TeacherItem] = {}
    for each in runs:
        assert each.dataset is not None
        for name in used_teachers(each.config):
            item = teacher_item(each, name)
            items[item.folder] = item
            each.teacher_dirs[name] = item.folder
    train_items(list(items.values()), "teach", runtime, progress)
    for each in runs:
        summary.check_teachers(each)
        each.pin_teachers()


def teacher_item(each: Run, name: str) -> TeacherItem:
    """One teacher of a run as work."""
    config, dataset = each.config, each.dataset
    assert dataset is not None
    teacher = config.teachers.models[name]
    folder = teacher_folder(name, teacher, config.teach, dataset, each.artifacts_dir, config.compute.threads)
    gpus = config.compute.gpus_per_train_worker
    folder.parent.mkdir(parents=True, exist_ok=True)
    return TeacherItem(name, teacher, config.teach, str(dataset.folder), str(folder), config.compute.threads, gpus)


def synthesize(runs: Sequence[Run], runtime: Any, progress: Progress) -> None:
    """Images, unit by unit."""
    make_units(runs, SYNTHESIZE, runtime, progress)


def relabel(runs: Sequence[Run], runtime: Any, progress: Progress) -> None:
    """Soft labels of the images that exist."""
    make_units([each for each in runs if each.needs_labels()], RELABEL, runtime, progress)


def make_units(runs: Sequence[Run], stage: str, runtime: Any, progress: Progress) -> None:
    """What is left of a stage, of all runs together."""
    todo = [UnitRef(n, stage, unit.index) for n, each in enumerate(runs) for unit in each.open_units(stage)]
    finished = [unit for each in runs for unit in each.done_units(stage)]
    done, images = len(finished), sum(len(unit.images) for unit in finished)
    quarantined = sum(entry["stage"] == stage for each in runs for entry in each.ledger.quarantined())
    total = sum(len(each.units) for each in runs)
    progress.stage(stage, total, done=done, images=images)
    progress.update(done, quarantined=quarantined)
    if not todo:
        return
    for each in {ref.run: runs[ref.run] for ref in todo}.values():
        each.store.remove(MANIFEST)  # the run is in progress again
        each.ledger.event("stage", stage=stage, epoch=each.epoch)
    for ref, outcome in runtime.units([each.spec() for each in runs], todo):
        if outcome.status == "aborted":
            raise aborted(outcome)
        if outcome.status == "done":
            done += 1
            images += len(runs[ref.run].units[ref.unit].images)
        else:
            quarantined += 1
            runs[ref.run].ledger.event("quarantined", stage=stage, unit=outcome.name, reason=outcome.reason)
            progress.message(f"{runs[ref.run].name}: unit {outcome.name} quarantined: {outcome.reason}")
        progress.update(done, images=images, quarantined=quarantined)


def aborted(outcome: Outcome) -> PrismError:
    """The error of a unit that stopped for no fault of its own."""
    error = PrismError(outcome.reason)
    error.exit_code = ExitCode(outcome.exit_code)
    return error


def distill(runs: Sequence[Run], runtime: Any, progress: Progress) -> None:
    """Students of every seed and label kind."""
    items = [item for each in runs for item in each.students()]
    for each in runs:
        if not all(item.is_done for item in items if item.spec.run_dir == each.store.url):
            each.store.remove(MANIFEST)
    train_items(items, "distill", runtime, progress)


def train_items(items: Sequence[TrainingItem], stage: str, runtime: Any, progress: Progress) -> None:
    """Train what is left of a list, reporting from what is on disk."""
    todo = [item for item in items if not item.is_done]
    before = len(items) - len(todo)
    progress.stage(stage, len(items), "networks", done=before)
    if not todo:
        return
    finished = threading.Event()

    def watch() -> None:
        while not finished.wait(POLL_S):
            progress.update(before + sum(item.is_done for item in todo))

    watcher = threading.Thread(target=watch, name="progress", daemon=True)
    watcher.start()
    try:
        runtime.train(todo)
    finally:
        finished.set()
        watcher.join()
    left = [item.name for item in todo if not item.is_done]
    if left:
        raise PrismError(f"{stage}: {', '.join(left)} did not finish; run the same command to continue")
    progress.update(len(items))


def evaluate(runs: Sequence[Run], runtime: Any, progress: Progress) -> None:
    """How alike the images of a class are, beside as many real ones."""
    progress.stage("evaluate", len(runs), "runs")
    for n, each in enumerate(runs, 1):
        inputs = {receipt.key: receipt.sha256 for receipt in each.ledger.receipts(SYNTHESIZE).values()}
        if inputs and (read_json(each.store, EVALUATION) or {}).get("inputs") != inputs:
            from prism_ray.stages.evaluate import measure_diversity

            cosine = runtime.call(measure_diversity, each.spec())
            each.store.put(EVALUATION, to_json({"inputs": inputs, "cosine": cosine}))
        progress.update(n)


STAGE_FUNCTIONS: dict[str, Callable[[Sequence[Run], Any, Progress], None]] = {
    "prepare": prepare,
    "teach": teach,
    "synthesize": synthesize,
    "relabel": relabel,
    "distill": distill,
    "evaluate": evaluate,
}


# The commit of a run


def write_manifest(each: Run) -> None:
    """Everything the run holds, once nothing of it is left to do. Written last; without it the run is in progress."""
    given_up = each.ledger.quarantined()
    stages = [SYNTHESIZE, RELABEL] if each.needs_labels() else [SYNTHESIZE]
    is_complete = not any(each.open_units(stage) for stage in stages) and all(
        receipt.inputs == student_inputs(each.ledger, item.labels)
        for item in each.students()
        if (receipt := each.ledger.receipt("distill", item.name)) is not None
    )
    if not is_complete:
        return
    shards = {
        stage: [
            {"key": r.key, "unit_id": r.unit_id, "rows": r.rows, "bytes": r.bytes, "sha256": r.sha256}
            for _, r in sorted(each.ledger.receipts(stage).items())
        ]
        for stage in (SYNTHESIZE, RELABEL, "distill")
    }
    content = {"version": 1, "run_id": each.name, "quarantined": given_up, **shards}
    if each.ledger.manifest() != content:
        each.ledger.write_manifest(content)


# Signals


def install_sigterm() -> None:
    """Make SIGTERM end the command between two units' results; a second one ends the process at once."""

    def drain(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, force)
        raise Drained("stopped by SIGTERM; what was in flight is made again: run the same command to continue")

    def force(number: int, frame: object) -> None:
        sys.exit(int(ExitCode.terminated))

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, drain)


@contextmanager
def drained_by_sigterm() -> Iterator[None]:
    """SIGTERM as an orderly end inside; the former handler afterwards."""
    before = signal.getsignal(signal.SIGTERM)
    install_sigterm()
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread() and callable(before):
            signal.signal(signal.SIGTERM, before)
