"""Every setting once: meaning, unit, default, check, and whether it affects the output.

Plain dataclasses, no Hydra. `cli` composes them from `conf/`; a stage gets its own part, a method plain arguments.
A setting that affects the output is part of `config_hash`, which names the run (see `identity`); one that does not
(where the run is stored, how many workers compute it, how long they may take) can change between two calls of a run.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from prism_ray.documents import is_plain
from prism_ray.options import (
    BackEnd,
    BatchPlan,
    Cadence,
    ClassOrder,
    Curriculum,
    Decoder,
    Dtype,
    Engine,
    EvaluationSplit,
    Executor,
    Form,
    Init,
    Judges,
    Keep,
    LabelKind,
    LabelRule,
    LogitRole,
    Mix,
    Optimizer,
    Precision,
    PromptWorld,
    Reduction,
    Reference,
    Rule,
    Schedule,
    Selection,
    Sizing,
    SoftLoss,
    Source,
    StatisticsRole,
    Validation,
)

SAMPLERS = ("ddim", "ddpm", "dpm++", "sde-dpm++", "unipc", "euler", "euler_ancestral", "flow_euler")
"""Names in `models.samplers`."""
ATTENTION = ("auto", "native", "xformers")
"""Names in `models.attention`."""
CORRUPTIONS = ("sheared", "occluded", "speckled", "pixelated", "faded", "striped")
ATTRIBUTES = (
    *("rotation:left", "rotation:right", "scale:small", "scale:large", "thickness:thin", "thickness:bold"),
    *("background:gray", "background:noisy", "blur:blurred", "inversion:inverted"),
)
"""Names in `methods.attributes`, and what a world's prompts can ask for."""

Check = tuple[Callable[[Any], bool], str]

at_least_one: Check = (lambda v: 1 <= v < 2**31, "an integer of at least 1, below 2**31")
thread_count: Check = (lambda v: 1 <= v <= 1024, "an integer from 1 to 1024")
image_side: Check = (lambda v: 1 <= v <= 8192, "an integer from 1 to 8192")
lease: Check = (lambda v: 0.1 <= v <= 3600, "a number from 0.1 to 3600")
not_negative: Check = (lambda v: math.isfinite(v) and v >= 0, "a finite number of at least 0")
up_to_a_year: Check = (lambda v: 0 < v <= 3.2e7, "a number above 0, at most 3.2e7 (a year)")
positive: Check = (lambda v: math.isfinite(v) and v > 0, "a finite number above 0")
fraction: Check = (lambda v: 0 <= v <= 1, "a number from 0 to 1")
below_one: Check = (lambda v: 0 <= v < 1, "a number from 0 to below 1")
open_or_one: Check = (lambda v: 0 < v <= 1, "a number above 0, at most 1")
open_fraction: Check = (lambda v: 0 < v < 1, "a number between 0 and 1, ends excluded")
gray_or_rgb: Check = (lambda v: v in (1, 3), "1 (gray) or 3 (RGB)")
from_one: Check = (lambda v: math.isfinite(v) and v >= 1, "a finite number of at least 1")
finite: Check = (math.isfinite, "a finite number")
channel_counts: Check = (lambda v: len(v) >= 1 and all(c >= 8 and c % 8 == 0 for c in v), "multiples of 8, one a level")
sampler_name: Check = (lambda v: v in SAMPLERS, f"one of {', '.join(SAMPLERS)}, or null")
attention_name: Check = (lambda v: v in ATTENTION, f"one of {', '.join(ATTENTION)}")
two_betas: Check = (lambda v: len(v) == 2 and all(0 <= b < 1 for b in v), "two numbers from 0 to below 1")
not_empty: Check = (lambda v: len(v) > 0, "at least one entry")
distinct: Check = (lambda v: len(set(v)) == len(v) > 0, "at least one entry, none of them twice")
shift_names: Check = (
    lambda v: set(v) <= {*CORRUPTIONS, *ATTRIBUTES},
    f"names among {', '.join((*CORRUPTIONS, *ATTRIBUTES))}",
)
label_bits: Check = (lambda v: v == 16 or 1 <= v <= 8, "16 (half precision) or 1 to 8")
positive_entries: Check = (lambda v: all(math.isfinite(x) and x > 0 for x in v), "finite numbers above 0")
texts: Check = (lambda v: all(isinstance(t, str) and t for t in v.values()), "text for every label")
amounts: Check = (lambda v: all(math.isfinite(x) and x > 0 for x in v.values()), "a number above 0 for every resource")
variable_name: Check = (
    lambda v: v.isascii() and v.isidentifier() and v == v.upper(),
    "the name of an environment variable, in capitals; never the key itself",
)
plain_name: Check = (
    is_plain,
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


@dataclass(kw_only=True)
class DatasetConfig:
    name: str = setting(doc="name in tables, paths and the data-set card", check=plain_name)
    source: Source = setting(doc="kind of source")
    path: str | None = setting(None, doc="folder or URL; null where the source is found by itself", output=False)
    image_size: int = setting(doc="side of the square images, pixels", check=image_side)
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
class WorldConfig:
    """A small text-to-image pipeline trained here, for generator source 'train'."""

    vae_channels: list[int] = setting(
        [32, 64, 64], doc="per level of the autoencoder; each but the last halves the side", check=channel_counts
    )
    tiny_channels: int = setting(32, doc="of the tiny decoder", check=at_least_one)
    unet_channels: list[int] = setting([64, 128], doc="per level of the U-Net", check=channel_counts)
    text_width: int = setting(64, doc="of the text encoder, a multiple of 4", check=at_least_one)
    text_layers: int = setting(2, doc="of the text encoder", check=at_least_one)
    text_length: int = setting(24, doc="tokens of a prompt, both ends included", check=at_least_one)
    attribute_share: float = setting(
        0.5, doc="share of training images shown with attributes that their captions name", check=fraction
    )
    vae_steps: int = setting(1500, doc="of the autoencoder", check=at_least_one)
    decoder_steps: int = setting(1000, doc="of the tiny decoder", check=at_least_one)
    unet_steps: int = setting(4000, doc="of text encoder and U-Net", check=at_least_one)
    batch_size: int = setting(64, doc="images per step", check=at_least_one)
    vae_lr: float = setting(0.002, doc="peak learning rate of autoencoder and decoder", check=positive)
    lr: float = setting(0.001, doc="peak learning rate of text encoder and U-Net", check=positive)
    kl_weight: float = setting(1e-4, doc="of the autoencoder's divergence from a normal", check=not_negative)
    caption_drop: float = setting(0.1, doc="share of captions left empty, for guidance without", check=below_one)
    ema_decay: float = setting(0.998, doc="of the averaged U-Net and text encoder", check=below_one)
    seed: int = setting(0, doc="of weights, order, attributes and noise")
    threads: int = setting(2, doc="CPU threads of this training", check=thread_count)
    checkpoint_every: int = setting(200, doc="steps between checkpoints", check=at_least_one, output=False)


@dataclass(kw_only=True)
class GeneratorConfig:
    source: str | None = setting(
        None,
        doc="'train' (here, on the data set), a diffusers pipeline folder or its URL, or 'hub:OWNER/NAME'; null: none",
        check=not_empty,
    )
    tiny_decoder: str | None = setting(
        None,
        doc="folder of an AutoencoderTiny, on every node; null: tiny_decoder/ in the generator's folder, if there",
        check=not_empty,
    )
    image_size: int | None = setting(None, doc="side of its images, pixels; null: its own", check=image_side)
    dtype: Dtype = setting(Dtype.fp32, doc="numbers of its networks; teachers always compute in single precision")
    attention: str = setting("auto", doc="attention back end", check=attention_name)
    channels_last: bool = setting(False, doc="memory format of its convolutions")
    compile: bool = setting(False, doc="torch.compile its repeated blocks")
    licence: str | None = setting(None, doc="of its weights, for the data-set card", output=False)
    world: WorldConfig = setting(WorldConfig, doc="the pipeline that source 'train' makes")


@dataclass(kw_only=True)
class PromptsConfig:
    """The table of prompts that a text-to-image generator is asked, made once and then frozen."""

    world: PromptWorld = setting(PromptWorld.photo, doc="what prompts can ask for")
    name_only: bool = setting(False, doc="one prompt a class, its name alone")
    per_class: int = setting(50, doc="prompts of each class, used in turn", check=at_least_one)
    photo_share: float = setting(0.8, doc="share of prompts without a style", check=fraction)
    neutral_share: float = setting(0.5, doc="in the small world: share of those without any attribute", check=fraction)
    styles: list[str] = setting([], doc="styles of the others; empty: those of prism_ray.prompts.content")
    phrases: dict[str, str] = setting({}, doc="class name → what it is called, where that is not found by itself")
    max_tokens: int = setting(60, doc="of a prompt, as the generator's tokenizer counts", check=at_least_one)
    back_end: BackEnd = setting(BackEnd.template, doc="who writes scenes; whatever is refused comes from templates")
    model: str | None = setting(
        None, doc="the writing language model: its folder for transformers, its name at the server for http"
    )
    url: str | None = setting(None, doc="of that server, such as http://127.0.0.1:8000/v1", output=False)
    api_key_variable: str = setting(
        "OPENAI_API_KEY", doc="environment variable with the server's key", check=variable_name, output=False
    )
    timeout_s: float = setting(60.0, doc="of one request, seconds", check=positive, output=False)
    judged_images: int = setting(
        0,
        doc="samples by which teachers choose among the phrases that an ambiguous class may be called; 0: the first",
        check=not_negative,
    )


@dataclass(kw_only=True)
class SamplingConfig:
    """How a generator samples, for engine diffusion."""

    sampler: str | None = setting(None, doc="sampler; null: the generator's own", check=sampler_name)
    steps: int = setting(20, doc="steps from noise to image", check=at_least_one)
    eta: float = setting(0.0, doc="noise of ddim, 0: none", check=fraction)
    cfg_scale: float = setting(2.0, doc="classifier-free guidance, 1: none", check=from_one)
    cfg_start: float = setting(0.0, doc="step at which it begins, share of all", check=fraction)
    cfg_end: float = setting(1.0, doc="step before which it ends, share of all", check=fraction)
    widen: float | None = setting(
        None,
        doc="share of prompts beyond the plain ones for a class whose pilot samples are all alike; null: as the table "
        "has them, for every class",
        check=fraction,
    )
    micro_batch: int = setting(50, doc="samples of a forward pass, padded to this number", check=at_least_one)
    oversample: float = setting(1.0, doc="candidates for each image; the least energies are kept", check=from_one)
    keep: Keep = setting(Keep.of_class, doc="among which candidates")
    abort_at: float | None = setting(
        None,
        doc="step, share of all, at which the energies of clean estimates decide; null: at the end",
        check=open_fraction,
    )


@dataclass(kw_only=True)
class GuidanceConfig:
    """How a teacher's energy steers a sampler, for engine diffusion."""

    scale: float = setting(0.0, doc="0: none; a share of the reference unless sizing is raw", check=finite)
    adapt: float = setting(
        0.0,
        doc="how much more a class is guided of which a pilot round's samples are missed; 0: all classes alike",
        check=not_negative,
    )
    rule: Rule = setting(Rule.clean, doc="what is differentiated and moved")
    form: Form = setting(Form.keep_noise, doc="how the clean image's displacement is handed on, for rule clean")
    sizing: Sizing = setting(Sizing.normalized, doc="how far it moves")
    reference: Reference = setting(Reference.cfg, doc="length that the scale is a share of")
    start: float = setting(0.0, doc="first guided step, share of all", check=fraction)
    end: float = setting(1.0, doc="step before which guidance ends, share of all", check=fraction)
    every: int = setting(1, doc="of those, every n-th is guided", check=at_least_one)
    travel: int = setting(1, doc="times a step of the travel window is taken", check=at_least_one)
    travel_start: float = setting(0.0, doc="first step of that window, share of all", check=fraction)
    travel_end: float = setting(1.0, doc="step before which it ends, share of all", check=fraction)
    teachers: list[str] = setting([], doc="whose energies guide; empty: the primary's")
    temperature: float = setting(1.0, doc="T of the free energy", check=positive)
    class_weight: float = setting(0.0, doc="0: free energy; 1: joint energy of image and class", check=not_negative)
    margin_quantile: float | None = setting(
        0.5,
        doc="energies below this quantile of unguided samples of the right class are low enough; null: never",
        check=fraction,
    )
    calibration_images: int = setting(200, doc="unguided samples that it is measured on", check=at_least_one)
    decoder: Decoder = setting(Decoder.tiny, doc="by which decoder guidance sees the clean image")


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
    attribute_share: float = setting(
        0.0,
        doc="engine real: share of images shown with attributes, as a generator trained here sees them",
        check=fraction,
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
    precision: Precision = setting(
        Precision.fp32, doc="arithmetic of the teachers' passes in inversion; moments and losses are always single"
    )
    compile: bool = setting(
        False, doc="torch.compile the teachers' passes in inversion: minutes at an actor's start, less time per step"
    )

    residual_parts: int = setting(
        1, doc="equal parts of the iterations, between which the initial images are mixed in again", check=at_least_one
    )
    residual_weight: float = setting(0.5, doc="share of the initial images then", check=fraction)
    residual_scale: float = setting(
        1.0,
        doc="size of the images in the first and every other part, share of the side",
        check=open_or_one,
    )

    sampling: SamplingConfig = setting(SamplingConfig, doc="how a generator samples")
    guidance: GuidanceConfig = setting(GuidanceConfig, doc="how teachers' energies steer it")


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
        512,
        doc="most views per forward pass, where the rule doesn't couple images; a CPU takes fewer, as its caches hold",
        check=at_least_one,
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
    set_images: int = setting(
        100,
        doc="images of each class, at most, in precision, recall and energies, beside as many real ones of that split",
        check=at_least_one,
    )
    shifts: list[str] = setting(
        [],
        doc="corruptions and attributes under which students are also shown held-out images",
        check=shift_names,
    )
    shift_images: int = setting(200, doc="held-out images of each class shown so, at most", check=at_least_one)
    shifted_sets: dict[str, str] = setting(
        {}, doc="name → other test sets that students are measured on: a folder of class folders, or 'mnist'"
    )


@dataclass(kw_only=True)
class PoolConfig:
    """Actors of one kind of node. They pull their units from one list, so a faster pool makes more of them."""

    actors: int | None = setting(
        None, doc="actors at most; null: as many as the cluster holds now", check=at_least_one, output=False
    )
    cpus: float | None = setting(
        None, doc="logical CPUs reserved by an actor; null: compute.cpus_per_actor", check=positive, output=False
    )
    gpus: float | None = setting(
        None,
        doc="GPUs of an actor, fractions below 1 allowed; null: compute.gpus_per_actor",
        check=not_negative,
        output=False,
    )
    labels: dict[str, str] = setting(
        {},
        doc="labels that its nodes have, all of them; Ray's own are ray.io/accelerator-type (found on GPU nodes), "
        "ray.io/market-type (RAY_NODE_MARKET_TYPE of the node: spot, on-demand) and ray.io/node-group",
        check=texts,
        output=False,
    )
    resources: dict[str, float] = setting(
        {}, doc="other resources reserved by an actor, as its nodes announce them", check=amounts, output=False
    )
    tflops: float | None = setting(None, doc="for `plan`; null: compute.effective_tflops", check=positive, output=False)
    price_per_hour: float | None = setting(
        None, doc="for `plan`; null: compute.price_per_hour", check=not_negative, output=False
    )
    preemptions_per_hour: float | None = setting(
        None, doc="for `plan`; null: compute.preemptions_per_hour", check=not_negative, output=False
    )


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
    pools: dict[str, PoolConfig] = setting(
        {}, doc="actors by kind of node, by name; empty: one pool of the three settings above, anywhere", output=False
    )
    mixed_devices: bool = setting(
        False,
        doc="let a run's units be made on several kinds of devices, between which the same unit differs in bytes",
        output=False,
    )
    autoscaling: bool = setting(
        False,
        doc="the joined cluster grows on demand, even from no worker: ask for the actors and workers that are set, "
        "instead of refusing what is not there yet",
        output=False,
    )
    train_workers: int | None = setting(
        None,
        doc="workers that share a list of networks to train; null: as many as fit",
        check=at_least_one,
        output=False,
    )
    gpus_per_train_worker: float = setting(0.0, doc="GPUs of a training worker", check=not_negative, output=False)
    train_labels: dict[str, str] = setting(
        {}, doc="labels of the nodes that train and measure, all of them; see compute.pools", check=texts, output=False
    )
    train_resources: dict[str, float] = setting(
        {}, doc="other resources reserved by a training worker", check=amounts, output=False
    )
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
    threads: int = setting(1, doc="CPU threads of every computation; part of the plan", check=thread_count)
    max_attempts: int = setting(3, doc="tries of a unit before it is quarantined", check=at_least_one, output=False)
    unit_timeout_s: float = setting(
        3600.0,
        doc="longest try of a unit, loading its models included; then its process is ended and the try has failed, on "
        "Ray the unit is tried again at once, inline when the command is run again",
        check=up_to_a_year,
        output=False,
    )
    unit_checkpoint_s: float | None = setting(
        300.0,
        doc="a unit that takes longer keeps its state in the run folder this often, and goes on from it; null: never",
        check=not_negative,
        output=False,
    )
    effective_tflops: float = setting(
        0.01,
        doc="sustained TFLOP/s of one device, a GPU or an actor's CPUs, for the estimate of `plan` before units exist",
        check=positive,
        output=False,
    )
    price_per_hour: float | None = setting(
        None, doc="of one device for an hour, in any currency, for `plan`", check=not_negative, output=False
    )
    preemptions_per_hour: float = setting(
        0.0,
        doc="how often an actor is lost with its node in an hour, without notice, for `plan`",
        check=not_negative,
        output=False,
    )
    lease_s: float = setting(
        30.0, doc="silence after which another driver's lock may be taken over, seconds", check=lease, output=False
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
    storage: str = setting(
        "outputs",
        doc="folder that holds runs/ and artifacts/: a path, or s3://, gs:// or (inline alone) memory://",
        check=not_empty,
        output=False,
    )
    stages: list[str] = setting([], doc="stages to run, in pipeline order; empty: all", output=False)
    max_images: int = setting(2_000_000, doc="refuse a plan of more images than this", check=at_least_one, output=False)
    export: ExportConfig = setting(ExportConfig, doc="verb export", output=False)
    out: str | None = setting(
        None,
        doc="init, show: file to write, never over one that is there; null: init CLASSFOLDER.yaml here, "
        "show report/images.png in the run folder",
        check=not_empty,
        output=False,
    )
    repair: bool = setting(False, doc="verify: recompute what is damaged at once", output=False)
    dataset: DatasetConfig = setting(doc="real data")
    teachers: TeachersConfig = setting(doc="trained classifiers")
    teach: TeachConfig = setting(TeachConfig, doc="training of teachers")
    generator: GeneratorConfig = setting(GeneratorConfig, doc="text-to-image model that images are sampled from")
    prompts: PromptsConfig = setting(PromptsConfig, doc="what the generator is asked for")
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
