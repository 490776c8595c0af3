"""A run as its driver sees it: its folder, its lock, its pins, and what of its plan is still to do."""

import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import yaml

from prism_ray import __version__
from prism_ray.artifacts import artifact_facts, sha256_in
from prism_ray.config import Config, Row
from prism_ray.data.prepared import PreparedDataset
from prism_ray.documents import parse_yaml
from prism_ray.errors import Fenced, InputError, PrismError, StorageError, one_line
from prism_ray.generation import generator_digest
from prism_ray.identity import config_hash, content_hash, images_hash, output_settings, plain, run_id
from prism_ray.ledger import FOLDERS, MANIFEST, UNFINISHED, Ledger, Receipt, open_ledger
from prism_ray.lock import RunLock
from prism_ray.options import Init, LabelKind
from prism_ray.plan import Unit, has_statistics, needs_starts, needs_statistics_pass, statistics_pool
from prism_ray.storage import (
    TEMPORARY,
    Store,
    open_store,
    read_json,
    to_json,
)
from prism_ray.work import (
    DISTILL,
    LOST,
    PROMPTS_FILE,
    RELABEL,
    STARTS_FILE,
    STATISTICS_FILE,
    SYNTHESIZE,
    TROUBLES,
    RunSpec,
    SearchItem,
    StartsItem,
    StatisticsItem,
    StudentItem,
    image_receipt,
    label_receipt,
    lost_images,
    started_from,
    starts_item,
    statistics_item,
    teacher_folder,
    weights_sha256,
)

PINS = "pins.json"
TEACHER_PIN = "sha256 of teacher "
LISTED = ("key", "unit_id", "rows", "bytes", "sha256")
PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "diffusers",
    "transformers",
    "ray",
    "pyarrow",
    "numpy",
    "pillow",
    "scikit-learn",
    "safetensors",
)


@dataclass
class Run:
    """One run of a command. `label` names its row in tables, `column` its column where rows are crossed with others."""

    label: str
    config: Config
    store: Store
    column: str | None = None
    epoch: int = 0
    dataset: PreparedDataset | None = None
    teacher_dirs: dict[str, str] = field(default_factory=dict)
    statistics_dirs: dict[str, str] = field(default_factory=dict)
    starts_dir: str | None = None
    generator_dir: str | None = None
    prompts_dir: str | None = None
    calibration_dir: str | None = None
    shifted_dirs: dict[str, str] = field(default_factory=dict)
    set_aside: list[str] = field(default_factory=list)
    """Damaged objects that this command put aside."""
    _done: dict[str, tuple[list[Mapping[str, Any]], Sequence[Unit]]] = field(default_factory=dict)
    """By stage, which units were done by what receipts and sizes."""

    @property
    def name(self) -> str:
        return run_id(self.config)

    @cached_property
    def ledger(self) -> Ledger:
        return open_ledger(self.store.url)

    @property
    def artifacts_dir(self) -> str:
        """Address of the artifacts of its storage."""
        return open_store(self.config.storage).url_of("artifacts")

    def spec(self) -> RunSpec:
        assert self.dataset is not None, "prepare comes first"
        return RunSpec(
            self.config,
            self.store.url,
            self.epoch,
            self.dataset.url,
            self.teacher_dirs,
            self.statistics_dirs,
            self.starts_dir,
            self.generator_dir,
            self.prompts_dir,
            self.calibration_dir,
            self.shifted_dirs,
        )

    @cached_property
    def units(self) -> list[Unit]:
        return self.spec().units()

    # What is done

    def done_units(self, stage: str) -> Sequence[Unit]:
        """Units of a stage that are published, whole, and made from today's inputs."""
        receipts, images = self.ledger.receipts(stage), self.ledger.receipts(SYNTHESIZE)
        sizes, done = self.store.sizes(FOLDERS[stage]), []
        seen = [receipts, images, sizes]
        if stage in self._done and all(a is b for a, b in zip(self._done[stage][0], seen, strict=True)):
            return self._done[stage][1]
        for unit in self.units:
            if stage == RELABEL and unit.name not in images:
                continue
            wanted = _wanted(stage, unit, images)
            found = receipts.get(unit.name)
            if found is not None and _same_unit(found, wanted) and self.ledger.is_done(found, wanted.inputs, sizes):
                done.append(unit)
        self._done[stage] = (seen, done)
        return done

    def open_units(self, stage: str) -> list[Unit]:
        """Units of a stage to make now: neither done nor quarantined, and with the images they need."""
        skipped = {unit.name for unit in self.done_units(stage)}
        skipped |= {entry["name"] for entry in self.ledger.quarantined() if entry["stage"] == stage}
        if stage == RELABEL:
            skipped |= {unit.name for unit in self.units} - {unit.name for unit in self.done_units(SYNTHESIZE)}
        return [unit for unit in self.units if unit.name not in skipped]

    def adopt_units(self, stage: str) -> int:
        """Take over what other runs of this storage have published of the same units; returns how many.

        Runs that differ in their students alone, or in their labels, so share the work of everything before that.
        """
        units = self.open_units(stage)
        if not units:
            return 0
        index = open_store(self.config.storage)
        folder = f"artifacts/same_images/{images_hash(self.config)}"
        names = [key.rpartition("/")[2] for key in index.keys(folder)]
        others = [open_ledger(index.url_of(f"runs/{name}")) for name in names if name != self.name]
        index.put(f"{folder}/{self.name}", b"")
        pins = read_json(self.store, PINS) or {}
        others = [other for other in others if _agree(pins, other.store)]
        images = self.ledger.receipts(SYNTHESIZE)
        return sum(any(self._adopt(_wanted(stage, unit, images), other) for other in others) for unit in units)

    def _adopt(self, wanted: Receipt, other: Ledger) -> bool:
        """Take one unit over, if the other run has it; whatever is wrong there, this run can make the unit itself."""
        try:
            receipt = other.receipt(wanted.stage, wanted.name)
            if receipt is None or not _same_unit(receipt, wanted) or not other.is_done(receipt, wanted.inputs):
                return False
            return self.ledger.adopt(receipt, other.store, epoch=self.epoch)
        except (Fenced, StorageError):
            raise
        except (OSError, TypeError, PrismError) as error:
            reason = one_line(error)
            self.ledger.event(
                "not_adopted", stage=wanted.stage, unit=wanted.name, source=other.store.url, reason=reason
            )
            return False

    def needs_labels(self) -> bool:
        """Whether any student learns from stored soft labels."""
        return LabelKind.soft in self.config.student.labels and not self.config.labels.online

    def searches(self) -> list[SearchItem]:
        """Every learning rate to try, for each label kind."""
        student, spec = self.config.student, self.spec()
        return [SearchItem(spec, kind, lr) for kind in student.labels for lr in student.lr_grid]

    def students(self) -> list[StudentItem]:
        """Every student of the run, seed by seed."""
        spec = self.spec()
        return [
            StudentItem(spec, seed, kind) for seed in self.config.student.seeds for kind in self.config.student.labels
        ]

    def students_to_show(self) -> list[StudentItem]:
        """The same, those with soft labels first."""
        return sorted(self.students(), key=lambda item: item.labels is not LabelKind.soft)

    def listed(self, stage: str) -> list[dict[str, Any]]:
        """What the manifest says of a stage's objects."""
        receipts = [receipt for _, receipt in sorted(self.ledger.receipts(stage).items())]
        return [{key: getattr(receipt, key) for key in LISTED} for receipt in receipts]

    def write_manifest(self) -> None:
        """The commit of the run: everything it holds, once nothing of it is left to do.

        Written last; a run folder without it is in progress.
        """
        students = [item for item in self.students() if not item.is_done]
        if students or self.open_units(SYNTHESIZE) or (self.needs_labels() and self.open_units(RELABEL)):
            self.store.remove(MANIFEST)
            return
        content = {"version": 1, "run_id": self.name, "quarantined": self.ledger.quarantined()}
        for stage in (SYNTHESIZE, RELABEL, DISTILL):
            content[stage] = self.listed(stage)
        lost = lost_images(self.ledger.receipts(SYNTHESIZE))
        if lost:
            content[LOST] = lost
        if self.ledger.manifest() != content:
            for leftover in (UNFINISHED, TEMPORARY):  # of processes that were killed; whatever they did is done again
                self.store.remove(leftover)
            self.ledger.write_manifest(content)
            repaired = [key for key in self.set_aside if self.store.size(key) is not None]
            if repaired:
                self.ledger.event("repaired", keys=repaired)
            self.ledger.event("finished", quarantined=len(content["quarantined"]))

    # Teachers and pins

    def teacher_folder(self, name: str) -> str:
        """Where the artifact of one of the run's teachers belongs."""
        assert self.dataset is not None, "prepare comes first"
        config = self.config
        teacher, threads = config.teachers.models[name], config.compute.threads
        return teacher_folder(name, teacher, config.teach, self.dataset, self.artifacts_dir, threads)

    def statistics_items(self) -> list[StatisticsItem]:
        """A pass over the real images for each teacher of which more is matched than its batch norm carries."""
        if not needs_statistics_pass(self.config):
            return []
        names = [name for name in statistics_pool(self.config) if has_statistics(self.config, name)]
        return [statistics_item(self.spec(), name, self.artifacts_dir) for name in names]

    def starts_item(self) -> StartsItem | None:
        """A pass over the real images in which teachers choose what images start from, if they do."""
        return starts_item(self.spec(), self.artifacts_dir) if needs_starts(self.config) else None

    def pin(self, key: str, value: Any) -> None:
        """Remember what the run is made from when it first uses it; refuse anything else later.

        Raises:
            InputError: the run was begun with another value.
        """
        pins = read_json(self.store, PINS) or {}
        if key not in pins:
            self.store.put(PINS, to_json({**pins, key: value}))
        elif pins[key] != value:
            raise InputError(
                f"run {self.name}: began with {key} {pins[key]} and would go on with {value}; restore it, or start a "
                "new run with another run_id"
            )

    def pin_teachers(self) -> None:
        """Pin the weights of every teacher."""
        for name, folder in self.teacher_dirs.items():
            self.pin(f"{TEACHER_PIN}{name}", weights_sha256(folder))

    def pin_generator(self) -> None:
        """Pin what is sampled from."""
        if self.generator_dir is not None:
            self.pin("digest of generator", generator_digest(self.generator_dir))

    def pin_prompts(self) -> None:
        """Pin the table of prompts."""
        if self.prompts_dir is not None:
            self.pin("sha256 of prompts", sha256_in(self.prompts_dir, PROMPTS_FILE))

    def pin_measured(self) -> None:
        """Pin what was measured of the real images for synthesis."""
        for name, folder in self.statistics_dirs.items():
            self.pin(f"sha256 of statistics of {name}", sha256_in(folder, STATISTICS_FILE))
        if self.starts_dir is not None:
            self.pin("sha256 of starts", sha256_in(self.starts_dir, STARTS_FILE))
        if self.calibration_dir is not None:
            self.pin("digest of calibration", content_hash(artifact_facts(self.calibration_dir)["teachers"]))
        if self.config.method.init is Init.generated:
            receipts = started_from(self.spec()).receipts(SYNTHESIZE)
            content = content_hash({name: receipt.sha256 for name, receipt in receipts.items()})
            self.pin(f"images of run {self.config.method.init_run}", content)


def _wanted(stage: str, unit: Unit, images: Mapping[str, Receipt]) -> Receipt:
    """The receipt of a unit before it is made; labels are those of today's `images`."""
    return image_receipt(unit) if stage == SYNTHESIZE else label_receipt(unit, images[unit.name])


def _same_unit(receipt: Receipt, wanted: Receipt) -> bool:
    return receipt.unit_id == wanted.unit_id and receipt.key == wanted.key


def _agree(pins: dict[str, Any], other: Store) -> bool:
    """Whether another run is made from the same data and teachers, as far as both use them."""
    try:
        theirs = read_json(other, PINS) or {}
    except (OSError, PrismError):
        return False
    return all(theirs[key] == value for key, value in pins.items() if key in theirs)


def locate(row: Row) -> Run:
    """The run of these settings, whether it exists or not."""
    root = open_store(row.config.storage)
    return Run(row.label, row.config, open_store(root.url_of(f"runs/{run_id(row.config)}")), column=row.column)


def require(config: Config) -> Run:
    """The run of these settings, which must exist.

    Raises:
        InputError: it does not, or was made with other settings.
    """
    run = locate(Row(config.method.name, config))
    if run.store.size("config.yaml") is None:
        raise InputError(
            f"run {run.name}: not found in {config.storage}/runs; start it with the same settings, or correct them"
        )
    _check_same(run)
    return run


def open_run(row: Row, locks: ExitStack) -> Run:
    """Make this process the driver of a run: folder, settings, lock.

    Raises:
        InputError: storage is not writable, the run exists with other settings, or another driver is alive.
    """
    run, config = locate(row), row.config
    run.store.check_writable()
    _check_same(run)
    lock = locks.enter_context(RunLock(run.store, name=run.name, lease_s=config.compute.lease_s))
    run.epoch = lock.epoch
    _check_same(run)  # again: another driver may have begun it while we waited for the lock
    for leftover in (TEMPORARY, TROUBLES):
        run.store.remove(leftover)  # of drivers that are gone; ours is the only one now
    is_new = run.store.size("config.yaml") is None
    content = {"config_hash": config_hash(config), "settings": plain(config)}
    run.store.put("config.yaml", yaml.safe_dump(content, sort_keys=False, allow_unicode=True).encode())
    run.store.put("environment.json", to_json(environment()))
    if is_new:
        run.ledger.event("begun", epoch=run.epoch, config_hash=content["config_hash"])
    if lock.replaced is not None:
        run.ledger.event("taken_over", epoch=run.epoch, replaced=lock.replaced)
    return run


def _check_same(run: Run) -> None:
    """Compare a run's settings with those it was begun with."""
    if run.store.size("config.yaml") is None:
        return
    try:
        begun = parse_yaml(run.store.read("config.yaml").decode())
        begun_hash, before = begun["config_hash"], _flat(begun["settings"])
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise PrismError(
            f"{run.store.url_of('config.yaml')}: damaged; delete it if you know the run's settings, and run the same "
            "command again"
        ) from error
    if begun_hash == config_hash(run.config):
        return
    now = output_settings(run.config)
    differing = [f"{key}: {before.get(key)} → {now.get(key)}" for key in now if before.get(key, now[key]) != now[key]]
    raise InputError(
        f"run {run.name}: exists with other settings ({'; '.join(differing[:5]) or 'of another version'}); "
        "use those, or choose another run_id"
    )


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key; a dict that is itself a setting stays whole beside its parts."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found[prefix + key] = value
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
    return found


def environment() -> dict[str, Any]:
    """Versions and kind of machine; no names of hosts or people."""
    return {"prism_ray": __version__, "python": platform.python_version(), "machine": platform.machine(), **versions()}


def versions() -> dict[str, str]:
    """Installed versions of the packages that decide the output."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
