"""What an export takes from a run: published objects only, each compared with its receipt while it is read."""

from dataclasses import replace

from prism_ray import summary
from prism_ray.errors import InputError, PrismError
from prism_ray.inspection import describe
from prism_ray.ledger import Receipt
from prism_ray.plan import used_teachers
from prism_ray.report.contents import RunSummary
from prism_ray.runs import Run
from prism_ray.storage import sha256_of
from prism_ray.work import DISTILL, RELABEL, SYNTHESIZE, StudentItem

AGAIN = "`prism-ray run` with the same settings makes them"


def read_published(run: Run, key: str, sha256: str) -> bytes:
    """A published object.

    Raises:
        PrismError: it is missing or differs from its receipt.
    """
    try:
        data = run.store.read(key)
    except FileNotFoundError:
        data = None
    if data is None or sha256_of(data) != sha256:
        raise PrismError(
            f"{run.store.url_of(key)}: is missing or differs from its receipt; "
            "`prism-ray verify` with repair=true makes it again"
        )
    return data


def check_images(run: Run) -> None:
    """Refuse a run that is not through with its images and their labels; units it gave up don't count.

    Raises:
        InputError: what is missing, and the command that makes it.
    """
    for stage, what in ((SYNTHESIZE, "images"), (RELABEL, "soft labels")):
        if stage == RELABEL and not run.needs_labels():
            continue
        missing = run.open_units(stage)
        if missing:
            raise InputError(
                f"{describe(run.config)}: {len(missing)} of {len(run.units)} units have no {what}; {AGAIN}"
            )
    if not run.done_units(SYNTHESIZE):
        raise InputError(f"{describe(run.config)}: has no images, all its units were given up; see prism-ray status")


def shards(run: Run, stage: str) -> list[Receipt]:
    """Receipts of the published shards of a stage, in plan order."""
    receipts = run.ledger.receipts(stage)
    return [receipts[unit.name] for unit in run.done_units(stage)]


def missing_images(run: Run) -> str | None:
    """A line on the images of units that were given up, None where nothing is missing."""
    done = {unit.name for unit in run.done_units(SYNTHESIZE)}
    given_up = [unit for unit in run.units if unit.name not in done]
    if not given_up:
        return None
    count = sum(len(unit.images) for unit in given_up)
    return f"{len(given_up)} of {len(run.units)} units are quarantined, {count} images are missing; see prism-ray retry"


def find_student(run: Run, name: str | None) -> StudentItem:
    """A trained student by name; without one the first, soft labels before others.

    Raises:
        InputError: no such student, or not trained yet.
    """
    students = run.students_to_show()
    item = students[0] if name is None else next((each for each in students if each.name == name), None)
    if item is None:
        known = ", ".join(each.name for each in run.students())
        raise InputError(f"export.student={name}: {describe(run.config)} has no such student; known: {known}")
    if not item.is_done:
        raise InputError(f"{describe(run.config)}: student {item.name} is not trained; {AGAIN.replace('them', 'it')}")
    return item


def student_files(run: Run, student: str) -> dict[str, bytes]:
    """Files of a trained student by name."""
    receipt = run.ledger.receipt(DISTILL, student)
    assert receipt is not None
    folder = receipt.key.rpartition("/")[0]
    return {
        name: read_published(run, f"{folder}/{name}", sha) for name, sha in sorted(receipt.details["files"].items())
    }


def summary_for_card(run: Run) -> RunSummary:
    """What a card says about the run, as a run of its own.

    Raises:
        InputError: artifacts of its teachers are gone.
    """
    missing = [name for name in used_teachers(run.config) if not summary.teacher_facts(run, name)]
    if missing:
        raise InputError(
            f"{describe(run.config)}: the artifacts of its teachers {', '.join(missing)} are gone; make them again "
            "with prism-ray run and stages=[teach]"
        )
    return replace(summary.summarize(run), label=run.config.method.name)
