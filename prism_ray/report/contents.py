"""What a report is made from: one `RunSummary` per run, JSON-ready, without tensors, clocks or machine names.

Accuracies and shares are from 0 to 1, times in seconds, sizes in bytes. None is a value that was not measured; a NaN
(the cosine at one image per class) is kept in memory and written as null, so that the JSON stays strict.
"""

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

from prism_ray.errors import InputError

REWRITE = "run the evaluate stage again to rewrite the summary"


@dataclass(frozen=True, kw_only=True)
class DatasetFacts:
    """The real data a run was made from and is judged on."""

    name: str
    class_names: list[str]
    image_size: int  # side of the square images, pixels
    channels: int  # 1 gray, 3 RGB
    num_train: int
    num_test: int


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


@dataclass(frozen=True, kw_only=True)
class StudentResult:
    """One trained student."""

    seed: int
    labels: Literal["soft", "hard"]
    top1: float | None  # on the real held-out images
    seconds: float | None  # training alone
    steps: int
    num_params: int


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """Intra-class cosine similarity of features, over classes; beside it that of as many real images."""

    mean: float | None = None
    std: float | None = None
    real_mean: float | None = None
    real_std: float | None = None
    feature_model: str | None = None  # whose features


@dataclass(frozen=True, kw_only=True)
class UnitLosses:
    """Loss terms of a unit at its last iteration."""

    unit_id: str
    ce: float | None  # cross-entropy, nats
    bn: float | None  # statistics term, unweighted


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
    label: str  # the row's name in tables, distinct within a report
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
    quarantined: list[Quarantined] = field(default_factory=list)
    synthesis_s: float | None = None  # sum over units, whatever ran side by side
    images_per_s: float | None = None
    teachers: list[TeacherFacts] = field(default_factory=list)
    students: list[StudentResult] = field(default_factory=list)
    cosine: Cosine = field(default_factory=Cosine)
    budget: list[int] = field(default_factory=list)  # iterations of each slice
    versions: dict[str, str] = field(default_factory=dict)  # package: version
    shards: list[str] = field(default_factory=list)  # paths or URLs of the image shards
    real_images: list[str] = field(default_factory=list)  # paths or URLs of the prepared training split
    loss_curve: list[UnitLosses] = field(default_factory=list)  # in plan order
    paths: Paths = field(default_factory=Paths)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """The summary that `to_dict` wrote.

        Raises:
            InputError: names the key that is missing, unknown or of another type.
        """
        return _read(cls, content, "summary")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, strict: a NaN becomes None."""
        return _plain(self)


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


def _read(kind: Any, value: Any, where: str) -> Any:
    """`value` as the annotated type `kind`: a dataclass, a list or dict, a union with None, a Literal or a scalar."""
    arguments = get_args(kind)
    if isinstance(kind, type) and is_dataclass(kind):
        return _read_fields(kind, value, where)
    if type(None) in arguments:
        return None if value is None else _read(arguments[0], value, where)
    if get_origin(kind) is list and isinstance(value, list | tuple):
        return [_read(arguments[0], entry, f"{where}[{index}]") for index, entry in enumerate(value)]
    if get_origin(kind) is dict and isinstance(value, Mapping):
        return {str(key): _read(arguments[1], entry, f"{where}.{key}") for key, entry in value.items()}
    if kind is float and type(value) in (int, float):
        return float(value)
    if kind in (str, int) and type(value) is kind:  # by exact type, because a bool is no count
        return value
    if kind is Any or (get_origin(kind) is Literal and value in arguments):
        return value
    expected = kind.__name__ if isinstance(kind, type) else kind
    raise InputError(f"{where}={value!r}: expected {expected}; {REWRITE}")


def _read_fields(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise InputError(f"{where}={value!r}: expected an object; {REWRITE}")
    known = {f.name: f for f in fields(kind)}
    if unknown := sorted(set(value) - set(known)):
        raise InputError(f"{where}: unknown key {unknown[0]!r}; {REWRITE}")
    required = {name for name, f in known.items() if f.default is MISSING and f.default_factory is MISSING}
    if missing := sorted(required - set(value)):
        raise InputError(f"{where}: the key {missing[0]!r} is missing; {REWRITE}")
    hints = get_type_hints(kind)
    return kind(**{name: _read(hints[name], entry, f"{where}.{name}") for name, entry in value.items()})
