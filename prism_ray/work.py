"""Descriptions of work that driver and workers exchange: small, picklable, paths and settings only, never weights.

Everything here is light: the driver plans and counts with it without importing torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from prism_ray.artifacts import is_complete, join, sha256_in, split
from prism_ray.config import Config, PromptsConfig, TeachConfig, TeacherConfig, WorldConfig
from prism_ray.data.prepared import PreparedDataset
from prism_ray.data.records import class_ids_of
from prism_ray.errors import InputError, PrismError
from prism_ray.identity import content_hash, plain
from prism_ray.ledger import Ledger, Receipt, open_ledger
from prism_ray.options import Init, LabelKind, Selection
from prism_ray.plan import Unit, needs_starts, plan_units, reserved_images, selecting
from prism_ray.storage import is_remote, read_json
from prism_ray.weights import find_weights, is_folder

SYNTHESIZE, RELABEL, DISTILL = "synthesize", "relabel", "distill"
DIVERSITY = "metrics/diversity.json"
DIVERSITY_VERSION = 4
"""Raised when it holds other measures, so that old ones are made again."""
LOST = "lost_images"
"""In the details of a receipt of images: those that could not be made, with their reasons."""
LOSS_HISTORY = "loss_history"
"""In the same details: [iteration, cross-entropy, statistics term] of some iterations and the last."""
STATISTICS_FILE, STARTS_FILE = "statistics.safetensors", "starts.parquet"
PROMPTS_FILE = "prompts.jsonl"
TROUBLES = ".train"
"""Folder beside the results of a list of items in which its workers say what trying again can't mend."""
WEIGHTS = "model.safetensors"
"""File of every classifier that is made here."""


@dataclass(frozen=True)
class RunSpec:
    """One run as its workers see it. `epoch` is the driver's, see `prism_ray.lock`."""

    config: Config
    run_dir: str
    epoch: int
    dataset_dir: str
    teacher_dirs: dict[str, str]
    statistics_dirs: dict[str, str] = field(default_factory=dict)
    """By teacher, where its statistics were measured; empty where batch norm carries all that are matched."""
    starts_dir: str | None = None
    """Where teachers' choice of real images and crops is, if images start from one."""
    generator_dir: str | None = None
    """The pipeline folder that images are sampled from, if they are."""
    prompts_dir: str | None = None
    """Where the table of its prompts is."""
    calibration_dir: str | None = None
    """Where the energies of unguided samples are, if guidance needs them."""
    shifted_dirs: dict[str, str] = field(default_factory=dict)
    """By name, where the test sets of other domains are."""

    def ledger(self) -> Ledger:
        return open_ledger(self.run_dir)

    def dataset(self) -> PreparedDataset:
        return open_dataset(self.dataset_dir)

    def units(self) -> list[Unit]:
        """The plan; the same wherever it is computed."""
        rows_by_class = [rows.tolist() for rows in self.dataset().rows_by_class("train")]
        return plan_units(self.config, rows_by_class, self.class_ids())

    def class_ids(self) -> list[int]:
        """The classes that images are made of, ascending."""
        return class_ids_of(self.config.classes, self.dataset().class_names)


@lru_cache(maxsize=4)
def open_dataset(folder: str) -> PreparedDataset:
    """A prepared data set, opened once per process."""
    return PreparedDataset.open(folder)


@dataclass(frozen=True)
class UnitRef:
    """Which unit: index of its run among the worker's, stage, index in the run's plan. A row of the work list."""

    run: int
    stage: str
    unit: int


Chain = Sequence[UnitRef]
"""Units that one worker makes one after another, each from the one before: images, then their labels."""


class ArtifactItem:
    """Work whose result is an artifact; `folder` is its address."""

    folder: str

    @property
    def is_done(self) -> bool:
        return is_complete(self.folder)


@dataclass(frozen=True)
class TeacherItem(ArtifactItem):
    """One teacher to train, or one from elsewhere to check and copy; `folder` is where its artifact belongs."""

    name: str
    teacher: TeacherConfig
    teach: TeachConfig
    dataset_dir: str
    folder: str
    threads: int
    gpus: float


@dataclass(frozen=True)
class GeneratorItem(ArtifactItem):
    """A small text-to-image pipeline to train; `folder` is where its artifact belongs."""

    world: WorldConfig
    phrases: tuple[str, ...]  # what each class is called in captions
    dataset_dir: str
    folder: str
    gpus: float
    name: ClassVar[str] = "generator"


@dataclass(frozen=True)
class PromptsItem(ArtifactItem):
    """A table of prompts to write; `folder` is where its artifact belongs."""

    prompts: PromptsConfig
    class_names: tuple[str, ...]
    seed: int
    generator_dir: str  # whose tokenizer counts
    folder: str
    phrases: tuple[str, ...] = ()  # what teachers chose to call each class; empty: the first that it may be called
    name: ClassVar[str] = "prompts"


@dataclass(frozen=True)
class PhrasesSettings:
    """All that decides which phrases a teacher recognizes, and so names their folder."""

    generator: str  # digest of its folder
    settings: dict[str, Any]  # how it computes and samples
    teacher: str
    teacher_digest: str  # of its weights and of its description
    names: tuple[str, ...]  # of all classes
    phrases: dict[str, str]  # as given by the user
    class_ids: tuple[int, ...]
    num_images: int  # of each phrase
    seed: int
    threads: int
    version: int = 1


@dataclass(frozen=True)
class PhrasesItem(ArtifactItem):
    """Samples of everything that ambiguous classes may be called; `folder` is where its artifact belongs."""

    spec: RunSpec
    settings: PhrasesSettings
    folder: str
    name: ClassVar[str] = "phrases"


@dataclass(frozen=True)
class CalibrationSettings:
    """All that decides the energies of unguided samples, and so names their folder."""

    generator: str  # digest of its folder
    settings: dict[str, Any]  # how it computes and samples
    prompts: str  # digest of the table
    teachers: dict[str, str]  # by name, digest of its weights and of its description
    class_ids: tuple[int, ...]
    num_images: int
    quantile: float
    temperature: float
    class_weight: float
    seed: int
    threads: int
    version: int = 2


@dataclass(frozen=True)
class CalibrationItem(ArtifactItem):
    """Unguided samples, for the margins of guided ones; `folder` is where its artifact belongs."""

    spec: RunSpec
    settings: CalibrationSettings
    folder: str
    name: ClassVar[str] = "calibration"


@dataclass(frozen=True)
class StatisticsSettings:
    """All that decides the statistics of a teacher's layers on the real images, and so names their folder."""

    teacher: str  # sha256 of its weights and of its description
    dataset: str  # content hash
    conv: bool  # of convolutions too
    patch_size: int | None  # patches along a side; None without convolutions
    class_wise: bool
    crop_area_min: float
    flip_probability: float
    threads: int
    version: int = 1


@dataclass(frozen=True)
class StatisticsItem(ArtifactItem):
    """One pass of the real training images through a teacher; `folder` is where its artifact belongs."""

    name: str
    teacher_dir: str
    dataset_dir: str
    settings: StatisticsSettings
    folder: str
    gpus: float


@dataclass(frozen=True)
class Drawing:
    """Which real images and crops are looked at, where not all are; see `config.MethodConfig`."""

    candidates: int
    seed: int  # of the run
    tiles: int = 1
    crops: int = 0


@dataclass(frozen=True)
class StartsSettings:
    """All that decides which real images and crops synthetic images start from, and so names their folder."""

    kind: str  # "mosaic", or a selection of whole images
    judges: tuple[str, ...]  # of each, sha256 of its weights and of its description
    dataset: str  # content hash
    class_ids: tuple[int, ...]
    images_per_class: int
    reserved: int  # last real images of each class, which none may start from
    mosaic: Drawing | None
    regression: Drawing | None
    threads: int
    version: int = 1


@dataclass(frozen=True)
class StartsItem(ArtifactItem):
    """Teachers' choice of the real images and crops to start from; `folder` is where its artifact belongs."""

    judge_dirs: tuple[str, ...]
    dataset_dir: str
    settings: StartsSettings
    folder: str
    gpus: float

    @property
    def name(self) -> str:
        return f"{self.settings.kind} starts"


@dataclass(frozen=True)
class StudentItem:
    """One student to train."""

    spec: RunSpec
    seed: int
    labels: LabelKind

    @property
    def name(self) -> str:
        return f"{self.labels.name}-seed{self.seed}"

    @property
    def is_done(self) -> bool:
        ledger = self.spec.ledger()
        receipt = ledger.receipt(DISTILL, self.name)
        return receipt is not None and ledger.is_done(receipt, learned_from(self.spec, self.labels))


@dataclass(frozen=True)
class SearchItem:
    """One student trained to try a learning rate, judged on the validation split; only its accuracy is kept."""

    spec: RunSpec
    labels: LabelKind
    lr: float

    @property
    def name(self) -> str:
        return f"{self.labels.name}-lr{self.lr!r}"

    @property
    def seed(self) -> int:
        return self.spec.config.student.seeds[0]

    @property
    def key(self) -> str:
        return f"metrics/search/{self.name}.json"

    @property
    def is_done(self) -> bool:
        result = read_json(self.spec.ledger().store, self.key)
        return result is not None and result.get("inputs") == learned_from(self.spec, self.labels)


def chosen_lr(spec: RunSpec, kind: LabelKind) -> float:
    """Learning rate of a run's students: as set, or the grid's best on the validation split, of equals the smaller.

    Raises:
        PrismError: a learning rate of the grid has not been tried.
    """
    student = spec.config.student
    if not student.lr_grid:
        return student.lr
    store, inputs, tried = spec.ledger().store, learned_from(spec, kind), {}
    for lr in student.lr_grid:
        result = read_json(store, SearchItem(spec, kind, lr).key)
        if result is None or result["inputs"] != inputs:
            raise PrismError(f"{spec.run_dir}: learning rate {lr:g} was not tried for {kind.name} labels; run distill")
        tried[lr] = result["top1"]
    return min(tried, key=lambda lr: (-tried[lr], lr))


@dataclass(frozen=True)
class DiversityItem:
    """The measurement of how alike a run's images are, and of what judges make of them."""

    spec: RunSpec
    name: ClassVar[str] = "diversity"

    @property
    def is_done(self) -> bool:
        ledger = self.spec.ledger()
        found = read_json(ledger.store, DIVERSITY)
        if found is None or found.get("version") != DIVERSITY_VERSION:
            return False
        return found.get("inputs") == student_inputs(ledger, LabelKind.hard)


Item = (
    TeacherItem
    | GeneratorItem
    | PhrasesItem
    | PromptsItem
    | CalibrationItem
    | StatisticsItem
    | StartsItem
    | StudentItem
    | SearchItem
    | DiversityItem
)


def address_of(item: Item) -> str:
    """Where the result of an item belongs: beside an artifact, or in its run; every worker reaches it."""
    return split(item.folder)[0] if isinstance(item, ArtifactItem) else item.spec.run_dir


def image_receipt(unit: Unit) -> Receipt:
    """The receipt of an image shard before it is made. Its inputs are pinned by the run, so none are listed."""
    return Receipt(stage=SYNTHESIZE, name=unit.name, unit_id=unit.unit_id, key=f"images/{unit.name}.parquet")


def lost_images(images: Mapping[str, Receipt]) -> list[dict[str, str]]:
    """Images of a run that could not be made, though their units were: id and reason; from its receipts by unit."""
    return [entry for _, receipt in sorted(images.items()) for entry in receipt.details.get(LOST, [])]


def without_lost(unit: Unit, details: Mapping[str, Any]) -> Unit:
    """A unit with the images that its shard holds: those that could not be made are in the details of its receipt."""
    lost = {entry["image_id"] for entry in details.get(LOST, [])}
    return replace(unit, images=tuple(i for i in unit.images if i.image_id not in lost)) if lost else unit


def label_receipt(unit: Unit, images: Receipt) -> Receipt:
    """The receipt of a label shard before it is made: it belongs to the very bytes of its images."""
    return Receipt(
        stage=RELABEL,
        name=unit.name,
        unit_id=unit.labels_id,
        key=f"labels/{unit.name}.parquet",
        inputs={images.key: images.sha256},
    )


def student_inputs(ledger: Ledger, kind: LabelKind) -> dict[str, str]:
    """What a student learns from, sha256 by key: every image shard that exists today, with its labels if soft.

    Labels made from other bytes of the images than today's do not count.
    """
    images, labels = ledger.receipts(SYNTHESIZE), ledger.receipts(RELABEL)
    if kind is not LabelKind.soft:
        return {receipt.key: receipt.sha256 for receipt in images.values()}
    names = [n for n in images if n in labels and labels[n].inputs == {images[n].key: images[n].sha256}]
    return {receipts[name].key: receipts[name].sha256 for receipts in (images, labels) for name in names}


def learned_from(spec: RunSpec, kind: LabelKind) -> dict[str, str]:
    """What a student of a run learns from today, sha256 by key; labels made in its own steps are no object."""
    return student_inputs(spec.ledger(), LabelKind.hard if spec.config.labels.online else kind)


def teacher_folder(
    name: str,
    teacher: TeacherConfig,
    teach: TeachConfig,
    dataset: PreparedDataset,
    artifacts_dir: str | Path,
    threads: int,
) -> str:
    """Where the artifact of these settings belongs. A folder from elsewhere counts by the digests of its files."""
    settings: dict[str, Any] = {"version": 2, "teacher": plain(teacher), "dataset": dataset.content_hash}
    for key in ("allow_pickle", "licence"):
        del settings["teacher"][key]
    if teacher.source == "train":
        settings |= {"teach": {k: v for k, v in plain(teach).items() if k != "checkpoint_every"}, "threads": threads}
    elif is_folder(teacher.source):
        settings["teacher"]["source"] = _digests(teacher.source)
    return join(artifacts_dir, "teachers", f"{name}-{content_hash(settings)}")


def statistics_item(spec: RunSpec, name: str, artifacts_dir: str | Path) -> StatisticsItem:
    """The pass over the real images that measures what a run matches of one of its teachers."""
    method, compute, dataset = spec.config.method, spec.config.compute, spec.dataset()
    settings = StatisticsSettings(
        teacher=classifier_digest(spec.teacher_dirs[name]),
        dataset=dataset.content_hash,
        conv=method.conv_statistics,
        patch_size=method.patch_size if method.conv_statistics else None,
        class_wise=method.class_share > 0,
        crop_area_min=method.crop_area_min,
        flip_probability=method.flip_probability,
        threads=compute.threads,
    )
    folder = join(artifacts_dir, "statistics", f"{name}-{content_hash(plain(settings))}")
    gpus = compute.gpus_per_train_worker
    return StatisticsItem(name, spec.teacher_dirs[name], spec.dataset_dir, settings, folder, gpus)


def starts_item(spec: RunSpec, artifacts_dir: str | Path) -> StartsItem:
    """The pass over the real images that chooses what a run's images start from."""
    config, method = spec.config, spec.config.method
    assert config.images_per_class is not None, "refused by validation"
    judge_dirs = tuple(spec.teacher_dirs[name] for name in selecting(config))
    is_mosaic = method.init is Init.mosaic
    is_regression = not is_mosaic and method.selection is Selection.regression
    mosaic = Drawing(method.candidates, config.seed, tiles=method.mosaic_tiles, crops=method.mosaic_crops)
    settings = StartsSettings(
        kind="mosaic" if is_mosaic else method.selection.name,
        judges=tuple(classifier_digest(folder) for folder in judge_dirs),
        dataset=spec.dataset().content_hash,
        class_ids=tuple(spec.class_ids()),
        images_per_class=config.images_per_class,
        reserved=reserved_images(config),
        mosaic=mosaic if is_mosaic else None,
        regression=Drawing(method.candidates, config.seed) if is_regression else None,
        threads=config.compute.threads,
    )
    folder = join(artifacts_dir, "starts", f"{settings.kind}-{content_hash(plain(settings))}")
    return StartsItem(judge_dirs, spec.dataset_dir, settings, folder, config.compute.gpus_per_train_worker)


def started_from(spec: RunSpec) -> Ledger:
    """The run of the same storage whose images this one starts from, see `method.init_run`."""
    return open_ledger(join(split(spec.run_dir)[0], str(spec.config.method.init_run)))


def check_starts(spec: RunSpec) -> None:
    """Refuse to start from more images than there are, before anything is trained.

    Raises:
        InputError: names the class and the numbers, or the run that has no images.
    """
    config, method = spec.config, spec.config.method
    if method.init is Init.generated:
        found = sum(receipt.rows for receipt in started_from(spec).receipts(SYNTHESIZE).values())
        wanted = len(spec.class_ids()) * (config.images_per_class or 0)
        if found < wanted:
            raise InputError(
                f"method.init_run={method.init_run}: has {found} images, of which {wanted} are to start; "
                f"name a run in {split(spec.run_dir)[0]} with as many, or lower images_per_class"
            )
    if not needs_starts(config):
        return
    assert config.images_per_class is not None, "refused by validation"
    is_mosaic = method.init is Init.mosaic
    needed = config.images_per_class * (method.mosaic_tiles**2 if is_mosaic else 1)
    for class_id in spec.class_ids():
        available = max(0, spec.dataset().counts["train"][class_id] - reserved_images(config))
        looked_at = min(available, method.candidates)
        if is_mosaic and looked_at < needed:
            raise InputError(
                f"images_per_class={config.images_per_class}: takes crops of {needed} real training images of class "
                f"{class_id}, of which there are {available} and {looked_at} are looked at; lower it or "
                "method.mosaic_tiles, or raise method.candidates"
            )
        if available < needed:
            raise InputError(
                f"images_per_class={config.images_per_class}: class {class_id} has only {available} real training "
                "images; lower it or start from noise (method.init=noise)"
            )
        if method.selection is Selection.regression and looked_at < needed:
            raise InputError(
                f"images_per_class={config.images_per_class}: more than the method.candidates={method.candidates} real "
                "images of a class that are looked at; lower it, or raise method.candidates"
            )


def weights_sha256(folder: str | Path) -> str:
    """Digest of the weights of a classifier, an artifact or a folder from elsewhere."""
    return _digests(folder)[0]


def classifier_digest(folder: str | Path) -> str:
    """Digest of a classifier's weights and of its description."""
    return content_hash(_digests(folder))


def _digests(folder: str | Path) -> list[str]:
    """sha256 of a classifier's weights and of its description, which holds its preprocessing."""
    weights = WEIGHTS if is_remote(folder) else find_weights(Path(folder)).name
    return [sha256_in(folder, name) for name in (weights, "config.json")]
