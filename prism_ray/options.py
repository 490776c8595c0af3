"""What a setting can be: the choices of `config`, each with what it means."""

from enum import Enum


class Source(Enum):
    """Where real images come from."""

    digits = "digits"
    fashion_mnist = "fashion_mnist"
    image_folder = "image_folder"
    parquet = "parquet"
    mnist = "mnist"
    imagenet_names = "imagenet_names"


class Engine(Enum):
    """How images are made.

    Optimized (inversion), left as they would start (initial), real ones in large shards, or sampled by a generator.
    """

    inversion = "inversion"
    initial = "initial"
    real = "real"
    diffusion = "diffusion"


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
    """Arithmetic of a network's forward pass: single precision, or bfloat16 where autocast allows it."""

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


class Rule(Enum):
    """What energy guidance differentiates and moves, see `methods.diffusion.guidance.Guidance`."""

    clean = "clean"
    noise = "noise"
    step = "step"


class Form(Enum):
    """How a displacement of the clean image is handed to a sampler: with the same noise, or with the same sample."""

    keep_noise = "keep_noise"
    rederive_noise = "rederive_noise"


class Sizing(Enum):
    """How far guidance moves: always by the scale, as far as needed within it, or by the raw gradient."""

    normalized = "normalized"
    needed = "needed"
    raw = "raw"


class Reference(Enum):
    """The length that a guidance scale is a share of: what classifier-free guidance adds, or what is moved."""

    cfg = "cfg"
    state = "state"


class Decoder(Enum):
    """By which decoder guidance sees a clean image: the tiny one where the generator has one, or the full one."""

    tiny = "tiny"
    full = "full"


class Keep(Enum):
    """Of candidates sampled in excess, the least energies are kept: among those of a class, or of the same prompt."""

    of_class = "of_class"
    of_prompt = "of_prompt"


class Dtype(Enum):
    """Numbers that a generator computes with."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class BackEnd(Enum):
    """Who writes the scenes of prompts: fixed axes, a local language model, or one behind an OpenAI-compatible URL."""

    template = "template"
    transformers = "transformers"
    http = "http"


class PromptWorld(Enum):
    """What prompts can ask for: anything a photo may show, or the attributes of a generator trained here."""

    photo = "photo"
    small = "small"
