"""Every setting once: meaning, unit, default, check, and whether it affects the output.

Plain dataclasses, no Hydra. `cli` composes them from `conf/`; a stage gets its own part, a method plain arguments.
A setting that affects the output is part of `config_hash`, which names the run; one that does not (where the run is
stored, how many workers compute it, how long they may take) can change between two calls of the same run.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from typing import Any

Check = tuple[Callable[[Any], bool], str]

at_least_one: Check = (lambda v: v >= 1, "an integer of at least 1")
not_negative: Check = (lambda v: math.isfinite(v) and v >= 0, "a finite number of at least 0")
positive: Check = (lambda v: math.isfinite(v) and v > 0, "a finite number above 0")
fraction: Check = (lambda v: 0 <= v <= 1, "a number from 0 to 1")
below_one: Check = (lambda v: 0 <= v < 1, "a number from 0 to below 1")
open_or_one: Check = (lambda v: 0 < v <= 1, "a number above 0, at most 1")
open_fraction: Check = (lambda v: 0 < v < 1, "a number between 0 and 1, ends excluded")
gray_or_rgb: Check = (lambda v: v in (1, 3), "1 (gray) or 3 (RGB)")
two_betas: Check = (lambda v: len(v) == 2 and all(0 <= b < 1 for b in v), "two numbers from 0 to below 1")
not_empty: Check = (lambda v: len(v) > 0, "at least one entry")
distinct: Check = (lambda v: len(set(v)) == len(v) > 0, "at least one entry, none of them twice")
label_bits: Check = (lambda v: v == 16 or 1 <= v <= 8, "16 (half precision) or 1 to 8")
positive_entries: Check = (lambda v: all(math.isfinite(x) and x > 0 for x in v), "finite numbers above 0")
plain_name: Check = (
    lambda v: 0 < len(v) <= 128 and all(c.isascii() and (c.isalnum() or c in "._-") for c in v) and v[0] not in ".-",
    "1 to 128 letters, digits, '.', '_' or '-', not starting with '.' or '-'",
)


def setting(default: Any = ..., *, doc: str, check: Check | None = None, output: bool = True) -> Any:
    """A dataclass field with its meaning. `output=False`: changing it never changes a byte of the result.

    The one exception is `compute.workers_per_student`, after which sums are rounded in another order.
    """
    metadata = {"doc": doc, "check": check, "output": output}
    if default is ...:
        return field(metadata=metadata)
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


class Source(Enum):
    """Where real images come from."""

    digits = "digits"
    fashion_mnist = "fashion_mnist"
    image_folder = "image_folder"
    parquet = "parquet"
    imagenet_names = "imagenet_names"


class Engine(Enum):
    """How images are made: optimized (inversion), left as they would start (initial), or real ones in large shards."""

    inversion = "inversion"
    initial = "initial"
    real = "real"


class Init(Enum):
    """What an optimized image starts from: a real one, noise, tiles of confident crops, an image of another run."""

    real = "real"
    noise = "noise"
    mosaic = "mosaic"
    generated = "generated"


class Selection(Enum):
    """Which real images are taken.

    The first of each class in source order, a seeded draw, or by what the judges make of them: those they are surest
    of, those around the median of their certainty, those whose features' mean stays nearest the class's (herding), or
    those from which an untrained network best predicts their soft labels of all (regression).
    """

    first = "first"
    random = "random"
    confident = "confident"
    medium = "medium"
    herding = "herding"
    regression = "regression"


class Judges(Enum):
    """Whose logits or features select real images and crops: the primary's, or the mean over the pool."""

    primary = "primary"
    pool = "pool"


class BatchPlan(Enum):
    """Which images are optimized together: one of each class of a chunk, all of as many classes as fit, all of one."""

    cross_class = "cross_class"
    class_major = "class_major"
    single_class = "single_class"


class ClassOrder(Enum):
    """How class ids are cut into batches: consecutive, after a seeded permutation, or every n-th."""

    sorted = "sorted"
    permuted = "permuted"
    strided = "strided"


class LogitRole(Enum):
    """Whose cross-entropy guides: the primary's, that of the teacher whose turn it is, or of all drawn teachers."""

    primary = "primary"
    active = "active"
    drawn = "drawn"


class StatisticsRole(Enum):
    """Whose statistics are matched.

    `fixed`: a named set. `bernoulli_slots`: the primary and randomly filled slots. `auxiliary_slots`: the same without
    the primary, and at least one auxiliary. `k_subset`: so many of the pool, uniformly. `active`: the one teacher whose
    turn it is, another at each iteration, around the pool. `all`: the pool.
    """

    fixed = "fixed"
    bernoulli_slots = "bernoulli_slots"
    auxiliary_slots = "auxiliary_slots"
    k_subset = "k_subset"
    active = "active"
    all = "all"


class Reduction(Enum):
    """How the drawn teachers' statistics terms become one.

    Their mean, their sum, their mean weighted by accuracy, or their mean after each was rescaled to the primary's size
    on real images.
    """

    mean = "mean"
    sum = "sum"
    weighted = "weighted"
    normalized = "normalized"


class Curriculum(Enum):
    """How the smallest crop falls from `crop_area_start` to `crop_area_min`."""

    none = "none"
    linear = "linear"
    cosine = "cosine"


class Cadence(Enum):
    """When teachers are drawn again (`run`, `slice` and `batch`: before optimization; others: during it)."""

    run = "run"
    slice = "slice"
    batch = "batch"
    every_n = "every_n"
    iteration = "iteration"


class LabelKind(Enum):
    """What a student learns from: the label teachers' logits, the class alone, or the class on unaugmented images."""

    soft = "soft"
    hard = "hard"
    plain = "plain"


class LabelRule(Enum):
    """How label teachers' logits become one label.

    `mean`: weighted mean. `frobenius`: each teacher's logits first rescaled to the teachers' mean Frobenius norm over
    the label group. `sample_norm`: weighted mean, then each label rescaled to the label group's mean norm. The last two
    couple the images of a group.
    """

    mean = "mean"
    frobenius = "frobenius"
    sample_norm = "sample_norm"


class Mix(Enum):
    """What a view is mixed with: nothing, a box of a partner image (CutMix), or a blend with it (Mixup)."""

    none = "none"
    cutmix = "cutmix"
    mixup = "mixup"


class SoftLoss(Enum):
    """Loss against soft labels: KL divergence at a temperature, MSE of logits plus cross-entropy, or cosine."""

    kl = "kl"
    mse_ce = "mse_ce"
    cosine = "cosine"


class Schedule(Enum):
    """Learning-rate schedule of a student.

    `cosine` to 0; `half_cosine` to one half; `cos2` of PRISM's released program; `step`: a tenth at 30, 60 and 90 %.
    """

    cosine = "cosine"
    half_cosine = "half_cosine"
    cos2 = "cos2"
    step = "step"


class Optimizer(Enum):
    """A student's optimizer; SGD has momentum 0.9."""

    adamw = "adamw"
    sgd = "sgd"


class Precision(Enum):
    """Arithmetic of a student's forward pass: single precision, or bfloat16 where autocast allows it."""

    fp32 = "fp32"
    bf16 = "bf16"


class Validation(Enum):
    """Where the split comes from on which a learning rate is chosen: real training images, or synthetic ones."""

    training = "training"
    synthetic = "synthetic"


class EvaluationSplit(Enum):
    """What students are measured on: the test images, or real training images that the run holds none of (tuning)."""

    test = "test"
    validation = "validation"


class Executor(Enum):
    """Where units run: in this process (the reference), or on Ray actors."""

    inline = "inline"
    ray = "ray"


@dataclass(kw_only=True)
class DatasetConfig:
    name: str = setting(doc="name in tables, paths and the data-set card", check=plain_name)
    source: Source = setting(doc="kind of source")
    path: str | None = setting(None, doc="folder or URL; null where the source is found by itself", output=False)
    image_size: int = setting(doc="side of the square images, pixels", check=at_least_one)
    channels: int = setting(3, doc="1 gray, 3 RGB", check=gray_or_rgb)
    pad: int = setting(0, doc="zero padding on every side before resizing, pixels", check=not_negative)
    test_fraction: float = setting(
        0.2, doc="held-out share of each class where the source has no test split", check=open_fraction
    )
    split_seed: int = setting(0, doc="seed of that split")
    licence: str | None = setting(None, doc="SPDX identifier or name, for the data-set card", output=False)
    image_column: str = setting("image", doc="image column of a parquet source", check=not_empty)
    label_column: str = setting("label", doc="label column of a parquet source", check=not_empty)


@dataclass(kw_only=True)
class TeacherConfig:
    source: str = setting(
        "train",
        doc="'train' (here, on the data set), 'timm:NAME', 'imagenet_lite:0|1|2', or a folder in timm's local-dir form",
        check=not_empty,
    )
    arch: str | None = setting(None, doc="architecture, for 'train': any timm name or one of prism_ray.models")
    model_args: dict[str, Any] = setting({}, doc="arguments of that architecture")
    batch_norm: bool = setting(True, doc="whether the network has batch norm; verified when it is built")
    licence: str | None = setting(None, doc="of its weights, for the data-set card", output=False)
    allow_pickle: bool = setting(False, doc="accept pickled weights (loaded with weights_only)", output=False)


@dataclass(kw_only=True)
class TeachersConfig:
    models: dict[str, TeacherConfig] = setting(doc="every teacher of this run by name", check=not_empty)
    primary: str = setting(doc="the teacher whose logits guide synthesis", check=not_empty)
    pool: list[str] = setting(doc="teachers that may serve statistics; holds the primary", check=distinct)
    min_accuracy: float = setting(
        0.5, doc="held-out top-1 below which a teacher is refused", check=fraction, output=False
    )


@dataclass(kw_only=True)
class TeachConfig:
    epochs: int = setting(30, doc="passes over the training split", check=at_least_one)
    batch_size: int = setting(128, doc="images per step", check=at_least_one)
    lr: float = setting(0.01, doc="peak learning rate of AdamW, one-cycle", check=positive)
    weight_decay: float = setting(0.01, doc="of parameters with more than one dimension", check=not_negative)
    crop_area_min: float = setting(0.5, doc="smallest share of the image's area in a training crop", check=fraction)
    flip_probability: float = setting(0.5, doc="of a horizontal flip", check=fraction)
    seed: int = setting(0, doc="seed of initial weights, order and crops")
    checkpoint_every: int = setting(200, doc="steps between checkpoints", check=at_least_one, output=False)


@dataclass(kw_only=True)
class MethodConfig:
    name: str = setting(doc="name of the preset, in tables and rows", check=plain_name)
    engine: Engine = setting(Engine.inversion, doc="how images are made")

    init: Init = setting(Init.real, doc="what an optimized image starts from")
    init_run: str | None = setting(None, doc="for init generated: name of a run in this storage", check=plain_name)
    selection: Selection = setting(Selection.first, doc="which real images are taken")
    judges: Judges = setting(Judges.primary, doc="who selects real images and crops")
    mosaic_tiles: int = setting(2, doc="tiles along a side of a mosaic", check=at_least_one)
    candidates: int = setting(
        300, doc="real images of each class looked at, for mosaics and selection regression", check=at_least_one
    )
    mosaic_crops: int = setting(5, doc="crops tried of each of them, the surest is kept", check=at_least_one)

    iterations: int = setting(4000, doc="optimization steps of slice 0", check=at_least_one)
    budget_decay: float = setting(0.0, doc="share of `iterations` dropped per slice", check=fraction)
    budget_period: int = setting(8, doc="slices after which the budget starts again", check=at_least_one)
    rounds: int = setting(
        1,
        doc="groups in which the images of a class enter a class-major batch, one after another",
        check=at_least_one,
    )
    lr: float = setting(0.05, doc="Adam's learning rate, in units of the data set's standard deviation", check=positive)
    adam_betas: list[float] = setting([0.5, 0.9], doc="Adam's betas", check=two_betas)

    logit_role: LogitRole = setting(LogitRole.primary, doc="whose cross-entropy guides")
    statistics_role: StatisticsRole = setting(StatisticsRole.fixed, doc="whose statistics are matched")
    statistics_fixed: list[str] = setting([], doc="that set for role fixed; empty: the primary")
    statistics_slots: int = setting(3, doc="optional slots for auxiliary teachers", check=at_least_one)
    statistics_probability: float = setting(0.5, doc="that a slot is filled", check=fraction)
    statistics_count: int = setting(2, doc="teachers drawn for role k_subset", check=at_least_one)
    statistics_reduction: Reduction = setting(Reduction.mean, doc="how the drawn teachers' terms become one")
    accuracy_temperature: float = setting(
        5.0,
        doc="of the softmax over accuracies in percent that weights teachers, where they are weighted",
        check=positive,
    )
    cadence: Cadence = setting(Cadence.slice, doc="when teachers are drawn")
    cadence_every: int = setting(100, doc="iterations between draws, for cadence every_n", check=at_least_one)
    count_bn_free_teachers: bool = setting(
        True, doc="divide the statistics term also by teachers without batch norm, as released"
    )

    ce_weight: float = setting(1.0, doc="of the cross-entropy", check=not_negative)
    bn_weight: float = setting(0.01, doc="r, the weight of the statistics term", check=not_negative)
    first_bn_multiplier: float = setting(10.0, doc="weight of each teacher's first matched layer", check=not_negative)
    conv_statistics: bool = setting(False, doc="also match inputs of convolutions, per channel and per patch position")
    patch_size: int = setting(16, doc="patches along a side, for those", check=at_least_one)
    conv_skip_probability: float = setting(0.0, doc="that such a layer is left out of an iteration", check=below_one)
    class_share: float = setting(
        0.0, doc="share of class-wise statistics in the statistics term; the rest is the whole batch's", check=fraction
    )
    statistics_ema: float = setting(
        0.0, doc="decay of a moving average of the images' statistics over iterations; 0: none", check=below_one
    )
    tv_weight: float = setting(0.0, doc="of total variation", check=not_negative)
    l2_weight: float = setting(0.0, doc="of the images' norm", check=not_negative)
    eig_weight: float = setting(
        0.0,
        doc="of the divergence that flattens the spectrum of a class's images (data densification)",
        check=not_negative,
    )
    eig_temperature: float = setting(4.0, doc="of that divergence", check=positive)

    batch_plan: BatchPlan = setting(BatchPlan.cross_class, doc="which images are optimized together")
    batch_size: int = setting(100, doc="images per batch at most", check=at_least_one)
    class_order: ClassOrder = setting(ClassOrder.sorted, doc="how classes are cut into batches")

    crop_area_min: float = setting(0.08, doc="smallest share of the area in a random crop", check=fraction)
    crop_curriculum: Curriculum = setting(Curriculum.none, doc="how that share is reached")
    crop_area_start: float = setting(1.0, doc="where it starts from, with a curriculum", check=fraction)
    crop_milestone: float = setting(1.0, doc="share of the iterations after which it is reached", check=fraction)
    flip_probability: float = setting(0.5, doc="of a horizontal flip", check=fraction)
    roll_max: int = setting(32, doc="largest cyclic shift per axis, pixels", check=not_negative)
    antialias: bool = setting(False, doc="antialiased resizing of crops; the released results predate it")

    residual_parts: int = setting(
        1, doc="equal parts of the iterations, between which the initial images are mixed in again", check=at_least_one
    )
    residual_weight: float = setting(0.5, doc="share of the initial images then", check=fraction)
    residual_scale: float = setting(
        1.0,
        doc="size of the images in the first and every other part, share of the side",
        check=open_or_one,
    )


@dataclass(kw_only=True)
class LabelsConfig:
    teachers: list[str] = setting([], doc="label teachers; empty: the primary")
    weights: list[float] = setting([], doc="weight of each label teacher; empty: equal", check=positive_entries)
    own_family: dict[str, str] = setting(
        {}, doc="student architecture → the label teacher that takes the first place for it"
    )
    rule: LabelRule = setting(LabelRule.mean, doc="how the teachers' logits become one label")
    batch_statistics: bool = setting(
        False, doc="label teachers normalize with the statistics of the label group (BSSL) instead of their own"
    )
    online: bool = setting(
        False, doc="compute labels in the student's step, a new view every epoch; views, top_k and bits are unused"
    )
    views: int = setting(
        100, doc="stored views of each image, seen again in turn by a longer training", check=at_least_one
    )
    crop_area_min: float = setting(0.25, doc="smallest share of the area in a view's crop", check=fraction)
    flip_probability: float = setting(0.5, doc="of a horizontal flip", check=fraction)
    mix: Mix = setting(Mix.cutmix, doc="what every view is mixed with, from the same shard")
    top_k: int | None = setting(
        None, doc="classes kept of each label, the rest of its mass spread evenly; null: all", check=at_least_one
    )
    bits: int = setting(
        16, doc="bits of a stored logit: 16 half precision, 8 or fewer uniform in its image's range", check=label_bits
    )
    batch_size: int = setting(
        512, doc="views per forward pass, where the rule doesn't couple images", check=at_least_one
    )


@dataclass(kw_only=True)
class StudentConfig:
    recipe: str = setting("custom", doc="name of the preset, in tables", check=plain_name)
    arch: str = setting(doc="any timm name or one of prism_ray.models", check=not_empty)
    model_args: dict[str, Any] = setting({}, doc="arguments of that architecture")
    seeds: list[int] = setting([0, 1, 2], doc="one student per seed and label kind", check=distinct)
    labels: list[LabelKind] = setting(
        [LabelKind.soft, LabelKind.hard], doc="label kinds, a student of each", check=distinct
    )
    steps: int | None = setting(1000, doc="optimization steps; null: `epochs` decides", check=at_least_one)
    epochs: int | None = setting(None, doc="passes over the images, if `steps` is null", check=at_least_one)
    batch_size: int = setting(50, doc="images per step, over all its workers; labels fit any", check=at_least_one)
    optimizer: Optimizer = setting(Optimizer.adamw, doc="optimizer")
    lr: float = setting(0.001, doc="peak learning rate", check=positive)
    lr_grid: list[float] = setting(
        [], doc="learning rates tried on a validation split, the best one is used; empty: `lr`", check=positive_entries
    )
    validation: Validation = setting(Validation.training, doc="where that split comes from, never the test images")
    validation_images: int = setting(100, doc="images of each class in that split, at most", check=at_least_one)
    weight_decay: float = setting(0.01, doc="of parameters with more than one dimension", check=not_negative)
    schedule: Schedule = setting(Schedule.cosine, doc="learning-rate schedule")
    warmup: float = setting(0.0, doc="share of the steps over which the learning rate rises linearly", check=below_one)
    soft_loss: SoftLoss = setting(SoftLoss.kl, doc="loss against soft labels")
    temperature: float = setting(4.0, doc="of the KL loss", check=positive)
    temperature_squared: bool = setting(True, doc="multiply the KL loss by the temperature's square")
    ce_weight: float = setting(0.1, doc="of the cross-entropy in mse_ce", check=not_negative)
    hard_share: float = setting(0.0, doc="share of the hard label in the cosine loss's target", check=fraction)
    label_smoothing: float = setting(0.0, doc="of hard labels", check=below_one)
    blocks: list[LabelKind] = setting(
        [LabelKind.soft], doc="soft-label students: the steps in equal parts, what each learns from", check=not_empty
    )
    remix: float = setting(
        0.0,
        doc="probability that a step pastes boxes among its own images and mixes their labels (CutMix)",
        check=fraction,
    )
    clean_forward: bool = setting(False, doc="also show each step's unmixed images, without gradient, to batch norm")
    ema_decay: float = setting(0.0, doc="of the averaged student that is published; 0: none", check=below_one)
    precision: Precision = setting(Precision.fp32, doc="arithmetic of the forward pass")
    compile: bool = setting(False, doc="torch.compile the student")
    evaluate_every: int | None = setting(
        None, doc="steps between looks at the test images; null: only the end", check=at_least_one, output=False
    )
    checkpoint_every: int = setting(500, doc="steps between checkpoints", check=at_least_one, output=False)


@dataclass(kw_only=True)
class EvaluateConfig:
    feature_model: str | None = setting(
        None, doc="teacher outside the pool whose features measure diversity; null: the primary"
    )
    judges: list[str] = setting([], doc="teachers asked about every image, for its share that they name correctly")
    split: EvaluationSplit = setting(EvaluationSplit.test, doc="what students are measured on")


@dataclass(kw_only=True)
class ComputeConfig:
    executor: Executor = setting(Executor.ray, doc="in this process, or on Ray actors", output=False)
    address: str | None = setting(
        None, doc="Ray cluster to join; null: RAY_ADDRESS if set, else a local one", output=False
    )
    cpus: int | None = setting(
        None, doc="logical CPUs of a local cluster; null: the machine's", check=at_least_one, output=False
    )
    actors: int | None = setting(None, doc="actors; null: as many as fit", check=at_least_one, output=False)
    cpus_per_actor: float = setting(0.5, doc="logical CPUs reserved by an actor", check=positive, output=False)
    gpus_per_actor: float = setting(
        0.0, doc="GPUs of an actor, fractions below 1 allowed", check=not_negative, output=False
    )
    train_workers: int | None = setting(
        None,
        doc="workers that share a list of networks to train; null: as many as fit",
        check=at_least_one,
        output=False,
    )
    gpus_per_train_worker: float = setting(0.0, doc="GPUs of a training worker", check=not_negative, output=False)
    workers_per_student: int = setting(
        1,
        doc="training workers that share the batches of one student (data parallel): the same images in the same "
        "order, its weights equal up to the rounding of sums; `inline` has one",
        check=at_least_one,
        output=False,
    )
    min_workers_per_student: int | None = setting(
        None,
        doc="go on with fewer of them, down to this, while some are lost (elastic); null: wait for all",
        check=at_least_one,
        output=False,
    )
    in_memory_gb: float = setting(
        4.0,
        doc="decoded training images above this stay on disk and are read as needed, GB per training worker",
        check=not_negative,
        output=False,
    )
    threads: int = setting(1, doc="CPU threads of every computation; part of the plan", check=at_least_one)
    max_attempts: int = setting(3, doc="tries of a unit before it is quarantined", check=at_least_one, output=False)
    unit_timeout_s: float = setting(
        3600.0,
        doc="on Ray: without any unit made and labelled for this long, the run fails",
        check=positive,
        output=False,
    )
    effective_tflops: float = setting(
        0.01, doc="sustained TFLOP/s of one device, for the estimate of `plan`", check=positive, output=False
    )
    lease_s: float = setting(
        30.0, doc="silence after which another driver's lock may be taken over", check=positive, output=False
    )


@dataclass(kw_only=True)
class ExportConfig:
    folder: str | None = setting(None, doc="where to; null: export/ in the run folder", output=False)
    formats: list[str] = setting(
        ["timm", "hf", "imagefolder"],
        doc="what to write, of timm, hub, onnx (extra `export`), hf and imagefolder",
        check=not_empty,
        output=False,
    )
    student: str | None = setting(None, doc="name of the student, like soft-seed0; null: the first", output=False)


@dataclass(kw_only=True)
class Config:
    recipe_name: str = setting(doc="name of the recipe, first part of the run id", check=plain_name)
    run_id: str | None = setting(None, doc="name of the run; null: recipe, method and config hash", output=False)
    seed: int = setting(0, doc="seed of the run: every other seed of it is derived from this one")
    images_per_class: int | None = setting(
        10, doc="synthetic images of each class; null: all real ones (engine real only)"
    )
    classes: list[str] = setting([], doc="classes to make images of, by name; empty: all")
    storage: str = setting("outputs", doc="folder that holds runs/ and artifacts/", check=not_empty, output=False)
    stages: list[str] = setting([], doc="stages to run, in pipeline order; empty: all", output=False)
    max_images: int = setting(2_000_000, doc="refuse a plan of more images than this", check=at_least_one, output=False)
    export: ExportConfig = setting(ExportConfig, doc="verb export", output=False)
    repair: bool = setting(False, doc="verify: recompute what is damaged at once", output=False)
    dataset: DatasetConfig = setting(doc="real data")
    teachers: TeachersConfig = setting(doc="trained classifiers")
    teach: TeachConfig = setting(TeachConfig, doc="training of teachers")
    method: MethodConfig = setting(doc="synthesis")
    labels: LabelsConfig = setting(LabelsConfig, doc="soft labels")
    student: StudentConfig = setting(doc="students")
    evaluate: EvaluateConfig = setting(EvaluateConfig, doc="measurements")
    compute: ComputeConfig = setting(ComputeConfig, doc="where and how")


@dataclass(frozen=True)
class Row:
    """One run of a command: its row in tables, its column where a suite crosses its rows with others, its settings."""

    label: str
    config: Config
    column: str | None = None


STAGES = ("prepare", "teach", "synthesize", "relabel", "distill", "evaluate", "report")


def plain(value: Any) -> Any:
    """A setting's value as JSON-ready data: dataclasses become dicts, enum members their names."""
    if is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


def walk(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every leaf setting as (dotted key, value, field metadata), depth first in declaration order."""
    for f in fields(config):
        key, value = f"{prefix}{f.name}", getattr(config, f.name)
        if is_dataclass(value):
            yield from walk(value, f"{key}.")
        elif isinstance(value, dict) and any(is_dataclass(v) for v in value.values()):
            yield key, value, f.metadata
            for name, entry in value.items():
                yield from walk(entry, f"{key}.{name}.")
        else:
            yield key, value, f.metadata


def output_settings(config: Config) -> dict[str, Any]:
    """The settings that affect the output, by dotted key, JSON-ready."""
    return {
        key: plain(value)
        for key, value, metadata in walk(config)
        if metadata["output"] and not (isinstance(value, dict) and any(is_dataclass(v) for v in value.values()))
    }


def output_tree(config: Any) -> dict[str, Any]:
    """The same settings nested, JSON-ready: without paths, addresses and whatever else is this machine's alone."""
    found = {}
    for f in fields(config):
        value = getattr(config, f.name)
        if not f.metadata["output"]:
            continue
        if is_dataclass(value):
            found[f.name] = output_tree(value)
        elif isinstance(value, dict) and any(is_dataclass(v) for v in value.values()):
            found[f.name] = {name: output_tree(entry) for name, entry in value.items()}
        else:
            found[f.name] = plain(value)
    return found


def label_teachers(config: Config) -> list[str]:
    """Names of the teachers whose logits become soft labels; a student's own family first, where that is set.

    Source: PRISM's released program labels for ResNet students of each depth with the ResNet of that depth.
    """
    names = config.labels.teachers or [config.teachers.primary]
    own = config.labels.own_family.get(config.student.arch)
    return names if own is None else [own, *(name for name in names[1:] if name != own)]


def student_steps(student: StudentConfig, num_images: int) -> int:
    """Optimization steps of a student on so many images."""
    if student.steps is not None:
        return student.steps
    assert student.epochs is not None, "refused by validation"
    return math.ceil(student.epochs * num_images / student.batch_size)


IMAGE_SETTINGS = ("dataset", "teachers", "teach", "method", "seed", "images_per_class", "classes", "compute")
"""Groups of settings that decide the images; labels and students don't."""


def images_hash(config: Config) -> str:
    """16 hex digits over the settings that affect the images: runs that share it make the same ones."""
    decides = {k: v for k, v in output_tree(config).items() if k in IMAGE_SETTINGS}
    if config.evaluate.split is EvaluationSplit.validation:
        decides["reserved"] = config.student.validation_images  # real images that no synthetic one may start from
    return content_hash(decides)


def config_hash(config: Config) -> str:
    """16 hex digits over the settings that affect the output; the same for every machine, storage and worker count."""
    return content_hash(output_settings(config))


def content_hash(content: Any) -> str:
    """16 hex digits over JSON-ready content in canonical form."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def run_id(config: Config) -> str:
    """The run's name: as set, or recipe, method and config hash, so that the same command finds the same run."""
    return config.run_id or f"{config.recipe_name}-{config.method.name}-{config_hash(config)[:12]}"
