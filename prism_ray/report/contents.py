"""What a report is made from: one `RunSummary` per run, JSON-ready, without tensors, clocks or machine names.

Accuracies and shares are from 0 to 1, times in seconds, sizes in bytes. None is a value that was not measured; a NaN
(the cosine at one image per class) is kept in memory and written as null, so that the JSON stays strict.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

LabelName = Literal["soft", "hard", "plain"]
"""What a student learns from: label teachers' logits, the class, or the class on unaugmented images."""
KINDS: tuple[LabelName, ...] = ("soft", "hard", "plain")
"""In the order of tables."""


@dataclass(frozen=True, kw_only=True)
class DatasetFacts:
    """The real data a run was made from and is judged on."""

    name: str
    class_names: list[str]
    image_size: int  # side of the square images, pixels
    channels: int  # 1 gray, 3 RGB
    num_train: int  # 0 where there are only names of classes
    num_test: int
    class_ids: list[int] = field(default_factory=list)  # classes that images were made of; empty: all

    @property
    def num_chosen(self) -> int:
        """Classes that images were made of."""
        return len(self.class_ids or self.class_names)


@dataclass(frozen=True, kw_only=True)
class Quarantined:
    """A unit that failed on every attempt, so that its images are missing."""

    unit_id: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class TeacherFacts:
    """A trained classifier and what it did in the run."""

    name: str
    arch: str
    accuracy: float | None  # held-out top-1
    num_params: int
    num_bn_layers: int
    roles: list[str]  # for example primary, statistics, labels, features
    sha256: str  # of its weights file
    bn_distance_first: float | None = None  # statistics term of real images at its first batch-norm layer
    bn_distance_rest: float | None = None  # sum over the other layers


@dataclass(frozen=True, kw_only=True)
class StudentResult:
    """One trained student."""

    seed: int
    labels: LabelName
    top1: float | None  # on the real held-out images, after the last step
    seconds: float | None  # training alone
    steps: int
    num_params: int
    best_on_test: float | None = None  # highest top-1 seen during training; None if only the end was looked at
    lr: float | None = None  # peak learning rate
    images_per_s: float | None = None
    data_wait_share: float | None = None  # of the training time, spent waiting for data
    shifts: dict[str, float] = field(default_factory=dict)  # top-1 on shifted test sets, by name
    confusion: list[list[int]] | None = None  # images it was measured on, by class and by what they were taken for


@dataclass(frozen=True, kw_only=True)
class StudentFacts:
    """The network that every student of a run is."""

    arch: str
    recipe: str  # name of the training preset
    in_pool: list[str] = field(default_factory=list)  # teachers of the run with the same architecture name


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """One learning rate that was tried, judged on a validation split and never on the test images."""

    labels: LabelName
    lr: float
    top1: float  # on the validation split
    chosen: bool  # whether the run's students were trained with it
    validation: str  # where the split comes from: training or synthetic
    num_images: int | None = None  # of the split


Space = Literal["held-out", "primary", "raw"]
"""Where likeness is measured: features of a teacher outside the pool, of the primary, or pixels as they are."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A measure of the images of a class: mean and deviation over classes (of pooled runs over the runs)."""

    mean: float | None = None
    std: float | None = None
    real_mean: float | None = None  # of as many real images; None where there are none
    real_std: float | None = None


@dataclass(frozen=True, kw_only=True)
class Diversity:
    """How alike a class's images are in one feature space, and how like held-out real ones; beside it real images."""

    space: Space
    model: str | None = None  # whose features; None: raw pixels
    cosine: Measured = field(default_factory=Measured)
    vendi: Measured = field(default_factory=Measured)  # 1 to images per class
    effective_rank: Measured = field(default_factory=Measured)  # 1 to images per class
    # Against `num_set` held-out real images; `real_mean` is what as many real training images reach.
    precision: Measured = field(default_factory=Measured)
    recall: Measured = field(default_factory=Measured)
    density: Measured = field(default_factory=Measured)
    coverage: Measured = field(default_factory=Measured)
    fid: Measured = field(default_factory=Measured)
    kid: Measured = field(default_factory=Measured)
    num_set: int = 0  # images of either set; 0: too few to be measured
    k: int = 0  # neighbor that gives a ball its radius, for precision and recall
    k_coverage: int = 0  # ... for density and coverage
    class_coverage: dict[str, float] = field(default_factory=dict)  # by class id
    class_precision: dict[str, float] = field(default_factory=dict)  # likewise, of classes with enough images
    class_recall: dict[str, float] = field(default_factory=dict)


MEASURES = ("cosine", "vendi", "effective_rank")
"""Of the images of a class."""
SET_MEASURES = ("precision", "recall", "density", "coverage", "fid", "kid")
"""Of all images against real ones."""


@dataclass(frozen=True, kw_only=True)
class Energies:
    """What a teacher's free energy makes of the images and of as many held-out real ones, 0 to 1 where not said."""

    teacher: str
    temperature: float
    num_images: int  # of either set
    mean: float  # nats, like the next
    real_mean: float
    overlap: float  # of the two histograms: 1 alike, 0 disjoint
    auroc: float  # of telling them apart by it: 0.5 can't be; above, synthetic images have the higher energies
    fpr95: float  # share of synthetic images below the energy that 95 % of the real ones are below
    agreement: float  # share of synthetic images that the teacher names as planned
    effective_classes: float  # 1 to the number of classes
    class_agreement: dict[str, float] = field(default_factory=dict)  # by class id
    edges: list[float] = field(default_factory=list)  # of the histograms' bins
    shares: list[float] = field(default_factory=list)  # of the synthetic images, by bin
    real_shares: list[float] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What a teacher makes of the images."""

    judge: str
    num_images: int
    top1_hits: int  # images whose class is the teacher's first answer
    top5_hits: int  # ... or among its first five

    @property
    def top1(self) -> float:
        """Share from 0 to 1."""
        return self.top1_hits / self.num_images

    @property
    def top5(self) -> float:
        """Share from 0 to 1."""
        return self.top5_hits / self.num_images


@dataclass(frozen=True, kw_only=True)
class Cosine(Measured):
    """Intra-class cosine similarity in the features that tables show: of a teacher outside the pool if there is one."""

    feature_model: str | None = None  # whose features


@dataclass(frozen=True, kw_only=True)
class UnitLosses:
    """Loss terms of a unit at its last iteration, and on the way there."""

    unit_id: str
    ce: float | None  # cross-entropy, nats
    bn: float | None  # statistics term, unweighted
    history: list[list[float | None]] = field(default_factory=list)  # [iteration, ce, bn] of some iterations


@dataclass(frozen=True, kw_only=True)
class Plane:
    """A run's images and held-out real ones in the plane in which the features of the real ones vary most."""

    shares: list[float]  # of the real images' variance, of the two axes
    class_ids: list[int]  # of the points of either set
    points: list[list[float]]
    real_points: list[list[float]]


@dataclass(frozen=True, kw_only=True)
class Neighbors:
    """How near a run's images are to real training images, in the features of a network."""

    model: str
    num_training: int  # real images among which the nearest was looked for
    num_images: int
    nearer_share: float  # of them, nearer than 95 % of held-out real images are to theirs; 0.05 is what is usual
    images: list[list[Any]] = field(default_factory=list)  # image id, row of its nearest real image, distance


@dataclass(frozen=True, kw_only=True)
class Confusion:
    """What a network takes held-out real images for."""

    name: str
    matrix: list[list[int]]  # images by class and by the class they are taken for


@dataclass(frozen=True, kw_only=True)
class FileFacts:
    """An object that a run published."""

    key: str  # relative to the run's folder
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Paths:
    """Where the parts of a run lie, relative to its folder."""

    report: str = "report/report.html"
    images_glob: str = "images/*.parquet"
    student: str | None = None  # a folder in timm's local-dir form


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """Everything the report and the data-set card say about one run."""

    run_id: str
    label: str  # the row's name in tables; distinct within a report, together with the column
    method: str
    recipe: str
    dataset: DatasetFacts
    images_per_class: int | None  # None: all real images
    num_images: int
    num_units: int  # planned, the quarantined ones included
    image_bytes: int  # of the image shards on disk
    label_bytes: int  # of the soft-label shards on disk; 0 without
    config: dict[str, Any]  # resolved, nested
    config_hash: str
    column: str | None = None  # where a suite crosses its rows, say with architectures of the student
    student: StudentFacts | None = None
    label_codec: str | None = None  # of the stored soft labels; "online" if they are computed while training
    label_views: int | None = None  # stored views of each image
    label_s: float | None = None  # device-seconds of labelling
    student_s: float | None = None  # sum of the students' training seconds
    search: list[SearchResult] = field(default_factory=list)
    quarantined: list[Quarantined] = field(default_factory=list)
    lost_images: list[Quarantined] = field(default_factory=list)  # single ones of units that were made
    synthesis_s: float | None = None  # sum over units, whatever ran side by side
    images_per_s: float | None = None
    teachers: list[TeacherFacts] = field(default_factory=list)
    students: list[StudentResult] = field(default_factory=list)
    cosine: Cosine = field(default_factory=Cosine)
    diversity: list[Diversity] = field(default_factory=list)  # in every feature space there is
    energies: list[Energies] = field(default_factory=list)  # by teacher
    judges: list[Judged] = field(default_factory=list)
    plane: Plane | None = None
    neighbors: Neighbors | None = None
    confusions: list[Confusion] = field(default_factory=list)  # of teachers
    split: Literal["test", "validation"] = "test"  # what students were measured on
    num_measured: int | None = None  # real images of it, of the chosen classes; None: all test images
    synthesis_cpu_s: float | None = None  # CPU time of the units; None where a unit's is not known
    budget: list[int] = field(default_factory=list)  # iterations of each slice
    versions: dict[str, str] = field(default_factory=dict)  # package: version
    environment: dict[str, str] = field(default_factory=dict)  # of the last command that worked on the run
    devices: list[str] = field(default_factory=list)  # kinds of devices that its units and students were made on
    files: list[FileFacts] = field(default_factory=list)  # that its manifest lists
    shards: list[str] = field(default_factory=list)  # paths or URLs of the image shards
    real_images: list[str] = field(default_factory=list)  # paths or URLs of the prepared training split
    loss_curve: list[UnitLosses] = field(default_factory=list)  # in plan order
    paths: Paths = field(default_factory=Paths)
    run_ids: list[str] = field(default_factory=list)  # of the runs that were pooled; empty for a single run

    @property
    def name(self) -> str:
        """The run's name where rows and columns stand in one list."""
        return self.label if self.column is None else f"{self.label}, {self.column}"

    @property
    def num_runs(self) -> int:
        """Runs that this says something of: one, or those that were pooled."""
        return max(1, len(self.run_ids))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, strict: a NaN becomes None."""
        return _plain(self)

    def accuracies(self, kind: str) -> dict[int, float]:
        """Top-1 of the students of a label kind, by seed."""
        return {s.seed: s.top1 for s in self.students if s.labels == kind and s.top1 is not None}


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
