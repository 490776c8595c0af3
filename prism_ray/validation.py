"""Settings out of range or at odds with each other, refused by name. Each range stands with its setting in `config`."""

import math
from typing import Any

from prism_ray.config import STAGES, Check, Config, label_teachers, plain_name
from prism_ray.errors import InputError, holds_secret
from prism_ray.identity import plain, walk
from prism_ray.options import (
    BackEnd,
    BatchPlan,
    Engine,
    EvaluationSplit,
    Init,
    Keep,
    LabelKind,
    LabelRule,
    PromptWorld,
    Reduction,
    Rule,
    Selection,
    Sizing,
    Source,
    StatisticsRole,
    Validation,
)

MOST_UNTRAINED = 0.01
"""Share of the initial weights in an averaged network at most."""


def check_config(config: Config) -> None:
    """Refuse settings out of range or at odds with each other.

    Raises:
        InputError: one line that names the setting, its value, what was expected and what to do.
    """
    for key, value, metadata in walk(config):
        _check_secrets(key, value)
        _check_value(key, value, metadata["check"])
    if config.run_id is not None:
        _check_value("run_id", config.run_id, plain_name)
    for name in config.teachers.models:
        _check_value(f"teachers.models.{name}", name, plain_name)
    for name in config.compute.pools:
        _check_value(f"compute.pools.{name}", name, plain_name)
    _check_stages(config)
    _check_teachers(config)
    _check_roles(config)
    _check_images(config)
    _check_method(config)
    _check_sampling(config)
    _check_prompts(config)
    _check_real_images(config)
    _check_labels(config)
    _check_student(config)


def _check_value(key: str, value: Any, check: Check | None) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{key}={value}: not a finite number; give one")
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, int) and abs(number) >= 2**63:
            raise InputError(f"{key}={str(number)[:20]}…: not allowed; expected an integer of at most 64 bits")
    if check is None or value is None:
        return
    accepts, expected = check
    if not accepts(value):
        raise InputError(f"{key}={plain(value)}: not allowed; expected {expected}")


def _check_secrets(key: str, value: Any) -> None:
    """Refuse an address with a password or a signature in it: settings are written into run folder and report."""
    texts = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    if isinstance(value, dict):
        texts = [part for entry in value.items() for part in entry]
    for text in texts:
        if isinstance(text, str) and holds_secret(text):
            raise InputError(
                f"{key}: holds a password or key, which would be written into the run folder; give it in the "
                "environment, as AWS_SECRET_ACCESS_KEY or HF_TOKEN, or in a file that its program reads"
            )


def _shown(value: Any) -> Any:
    return "null" if value is None else value


def _check_stages(config: Config) -> None:
    for stage in config.stages:
        if stage not in STAGES:
            raise InputError(f"stages: {stage!r} is unknown; known: {', '.join(STAGES)}")
        if config.stages.count(stage) > 1:
            raise InputError(f"stages: {stage!r} is given twice; expected each stage once; leave one out")


def _check_teachers(config: Config) -> None:
    teachers, method = config.teachers, config.method
    known = ", ".join(sorted(teachers.models))
    named = {
        "teachers.primary": [teachers.primary],
        "teachers.pool": teachers.pool,
        "labels.teachers": config.labels.teachers,
        "labels.own_family": list(config.labels.own_family.values()),
        "evaluate.feature_model": [config.evaluate.feature_model] if config.evaluate.feature_model else [],
        "evaluate.judges": config.evaluate.judges,
        "method.statistics_fixed": method.statistics_fixed,
        "method.guidance.teachers": method.guidance.teachers,
    }
    for key, names in named.items():
        for name in names:
            if name not in teachers.models:
                raise InputError(f"{key}: teacher {name!r} is unknown; known: {known}; add it under teachers.models")
    if teachers.primary not in teachers.pool:
        raise InputError(f"teachers.pool={teachers.pool}: lacks the primary {teachers.primary!r}; add it")
    for name, teacher in teachers.models.items():
        if teacher.source == "train" and teacher.arch is None:
            raise InputError(f"teachers.models.{name}.arch: missing; a teacher trained here needs an architecture")


def _check_roles(config: Config) -> None:
    """Refuse roles that the pool cannot fill."""
    teachers, method = config.teachers, config.method
    if method.engine is not Engine.inversion:
        return
    for more, given in {
        "method.conv_statistics=true": method.conv_statistics,
        f"method.class_share={method.class_share:g}": method.class_share > 0,
        f"method.statistics_ema={method.statistics_ema:g}": method.statistics_ema > 0,
    }.items():
        if method.compile and given:
            raise InputError(f"method.compile=true: compiled passes hold no {more}; leave one out")
    if not method.bn_weight and not method.ce_weight:
        raise InputError("method.bn_weight=0, method.ce_weight=0: leave nothing to optimize for; set one above 0")
    role, auxiliaries = method.statistics_role, len(teachers.pool) - 1
    slots = role in (StatisticsRole.bernoulli_slots, StatisticsRole.auxiliary_slots)
    if slots and method.statistics_slots > auxiliaries:
        raise InputError(
            f"method.statistics_slots={method.statistics_slots}: more than the {auxiliaries} auxiliary teachers of "
            "teachers.pool; lower it or add teachers"
        )
    if role is StatisticsRole.k_subset and method.statistics_count > len(teachers.pool):
        raise InputError(
            f"method.statistics_count={method.statistics_count}: more than the {len(teachers.pool)} teachers of "
            "teachers.pool; lower it or add teachers"
        )
    fixed = method.statistics_fixed or [teachers.primary]
    if len(set(fixed)) < len(fixed):
        raise InputError(f"method.statistics_fixed={fixed}: names a teacher twice; leave one out")
    if not method.bn_weight:
        return
    has_bn = {name: teacher.batch_norm for name, teacher in teachers.models.items()}
    if method.statistics_reduction is Reduction.normalized and not has_bn[teachers.primary]:
        raise InputError(
            f"method.statistics_reduction=normalized: rescales to the primary's statistics, and {teachers.primary!r} "
            "has no batch norm; choose another primary, or statistics_reduction=mean"
        )
    if method.statistics_reduction is Reduction.normalized and method.conv_statistics:
        raise InputError(
            "method.statistics_reduction=normalized: rescales by the size of batch-norm statistics, and "
            "method.conv_statistics=true adds others to them; leave one out"
        )
    if method.conv_statistics:
        return
    if role is StatisticsRole.fixed and not any(has_bn[name] for name in fixed):
        named = f"method.statistics_fixed={fixed}" if method.statistics_fixed else f"teachers.primary={fixed[0]!r}"
        raise InputError(
            f"{named}: has no batch norm, and method {method.name!r} matches the statistics of nobody else; choose a "
            "teacher with batch norm, or statistics_role=bernoulli_slots"
        )
    if not any(has_bn[name] for name in teachers.pool):
        raise InputError("teachers.pool: no teacher in it has batch norm, so there are no statistics to match; add one")


def _check_method(config: Config) -> None:
    """Refuse settings of synthesis that contradict each other."""
    method = config.method
    if method.engine is Engine.diffusion:
        return
    if method.engine is Engine.real:
        if method.selection not in (Selection.first, Selection.random):
            raise InputError(
                f"method.selection={method.selection.name}: needs teachers, which engine real does without; use "
                "method.engine=initial"
            )
        return
    if (method.init is Init.generated) != (method.init_run is not None):
        raise InputError(
            f"method.init={method.init.name}, method.init_run={_shown(method.init_run)}: init generated takes the name "
            "of a run, any other init none; correct one of them"
        )
    if method.init is Init.mosaic and method.mosaic_tiles > config.dataset.image_size:
        raise InputError(
            f"method.mosaic_tiles={method.mosaic_tiles}: more than the {config.dataset.image_size} pixels of a side; "
            "lower it"
        )
    cross_class = method.batch_plan is BatchPlan.cross_class
    for key, value, off in (("rounds", method.rounds, 1), ("eig_weight", method.eig_weight, 0)):
        if value != off and cross_class:
            raise InputError(
                f"method.{key}={value}: is about several images of a class in one batch; use "
                "method.batch_plan=class_major"
            )
    if method.rounds > 1 and method.residual_parts > 1:
        raise InputError(
            f"method.rounds={method.rounds}, method.residual_parts={method.residual_parts}: images that enter late "
            "have no common parts; use 1 for one of them"
        )
    for key, value in (("rounds", method.rounds), ("residual_parts", method.residual_parts)):
        if value > method.iterations:
            raise InputError(f"method.{key}={value}: more than the {method.iterations} iterations; lower it")
    if method.crop_area_start < method.crop_area_min and method.crop_curriculum.name != "none":
        raise InputError(
            f"method.crop_area_start={method.crop_area_start}: below crop_area_min={method.crop_area_min}, where the "
            "curriculum ends; raise it"
        )


def _check_sampling(config: Config) -> None:
    """Refuse settings of sampling and guidance that contradict each other."""
    if config.method.engine is not Engine.diffusion:
        return
    sampling, guidance = config.method.sampling, config.method.guidance
    if config.generator.source is None:
        raise InputError(
            f"generator.source=null: method {config.method.name!r} samples from a generator; give a diffusers pipeline "
            "folder, or train (then set prompts.world=small)"
        )
    for key, start, end in (
        ("sampling.cfg", sampling.cfg_start, sampling.cfg_end),
        ("guidance.", guidance.start, guidance.end),
        ("guidance.travel", guidance.travel_start, guidance.travel_end),
    ):
        joint = "" if key.endswith(".") else "_"
        if start >= end:
            raise InputError(
                f"method.{key}{joint}start={start}: not below {key}{joint}end={end}, so no step is left between them; "
                "lower it"
            )
    if guidance.sizing is Sizing.needed and guidance.rule is not Rule.clean:
        raise InputError(
            f"method.guidance.sizing=needed, method.guidance.rule={guidance.rule.name}: how far is needed is measured "
            "in the clean image; use rule=clean, or sizing=normalized"
        )
    if guidance.sizing is Sizing.needed and guidance.margin_quantile is None:
        raise InputError(
            "method.guidance.sizing=needed: moves until an energy is low enough, and guidance.margin_quantile=null "
            "says none is; set it, or use sizing=normalized"
        )
    if sampling.abort_at is not None and sampling.oversample == 1:
        raise InputError(
            f"method.sampling.abort_at={sampling.abort_at}: with oversample=1 there is nothing to choose from; raise "
            "oversample, or set abort_at=null"
        )
    if sampling.keep is Keep.of_prompt and sampling.oversample != int(sampling.oversample):
        raise InputError(
            f"method.sampling.oversample={sampling.oversample}: keep=of_prompt draws so many for every image; expected "
            "a whole number"
        )
    if len(set(guidance.teachers)) < len(guidance.teachers):
        raise InputError(f"method.guidance.teachers={guidance.teachers}: names a teacher twice; leave one out")


def _check_prompts(config: Config) -> None:
    """Refuse prompts that nobody can write or that the generator was not taught."""
    if config.method.engine is not Engine.diffusion:
        return
    prompts, is_trained = config.prompts, config.generator.source == "train"
    if (prompts.world is PromptWorld.small) != is_trained:
        raise InputError(
            f"prompts.world={prompts.world.name}, generator.source={config.generator.source}: a generator trained here "
            "knows the attributes of world small and nothing else, any other one photos; correct one of them"
        )
    wanted = {"model": prompts.back_end is not BackEnd.template, "url": prompts.back_end is BackEnd.http}
    for name, is_wanted in wanted.items():
        value = getattr(prompts, name)
        if (value is not None) != is_wanted:
            raise InputError(
                f"prompts.{name}={value}: back_end={prompts.back_end.name} {'needs one' if is_wanted else 'has none'}; "
                f"set {'it' if is_wanted else 'it to null'}, or correct back_end"
            )
    if prompts.back_end is not BackEnd.template and (is_trained or prompts.name_only):
        raise InputError(
            f"prompts.back_end={prompts.back_end.name}: nothing to write where prompts are "
            f"{'names alone' if prompts.name_only else 'captions of world small'}; set it to template"
        )
    if is_trained and config.dataset.image_size % 2 ** (len(config.generator.world.vae_channels) - 1):
        factor = 2 ** (len(config.generator.world.vae_channels) - 1)
        raise InputError(
            f"generator.world.vae_channels: {len(config.generator.world.vae_channels)} levels divide a side by "
            f"{factor}, which dataset.image_size={config.dataset.image_size} is no multiple of; use fewer levels"
        )
    world = config.generator.world
    untrained = world.ema_decay**world.unet_steps
    if is_trained and untrained > MOST_UNTRAINED:
        raise InputError(
            f"generator.world.ema_decay={world.ema_decay}: after {world.unet_steps} steps the average still holds "
            f"{untrained:.0%} of the untrained network; lower it, or raise generator.world.unet_steps"
        )
    if is_trained and config.generator.world.text_width % 4:
        raise InputError(
            f"generator.world.text_width={config.generator.world.text_width}: no multiple of 4, its attention heads"
        )


def _check_real_images(config: Config) -> None:
    """Refuse what needs real images where there are only names of classes."""
    if config.evaluate.split is EvaluationSplit.validation and config.images_per_class is None:
        raise InputError(
            "evaluate.split=validation: with images_per_class=null no real training image is left to measure on; use "
            "evaluate.split=test"
        )
    method = config.method
    if config.evaluate.split is EvaluationSplit.validation and method.init_run is not None:
        raise InputError(
            f"evaluate.split=validation: images of method.init_run={method.init_run} may have started from those that "
            "students are measured on; use evaluate.split=test, or another method.init"
        )
    if config.dataset.source is not Source.imagenet_names:
        return
    reasons = {
        f"method.engine={method.engine.name}": method.engine is Engine.real,
        f"method.init={method.init.name}": method.engine is Engine.inversion
        and method.init in (Init.real, Init.mosaic),
        f"method.class_share={method.class_share}": method.class_share > 0,
        "method.conv_statistics=true": method.conv_statistics,
        f"method.statistics_reduction={method.statistics_reduction.name}": method.statistics_reduction
        in (Reduction.normalized, Reduction.weighted),
    }
    for name, teacher in config.teachers.models.items():
        reasons[f"teachers.models.{name}.source=train"] = teacher.source == "train"
    reasons["stages: distill"] = "distill" in (config.stages or STAGES)
    for setting, given in reasons.items():
        if given:
            raise InputError(
                f"{setting}: needs real images, and dataset.source=imagenet_names has only the names of classes; use "
                "dataset=image_folder with dataset.path, or leave it out"
            )


def _check_images(config: Config) -> None:
    if config.images_per_class is None:
        if config.method.engine is not Engine.real:
            raise InputError(
                "images_per_class=null: means all real images and needs method.engine=real; give a number of at least 1"
            )
    elif config.images_per_class < 1:
        raise InputError(f"images_per_class={config.images_per_class}: not allowed; expected an integer of at least 1")
    elif config.images_per_class > config.max_images:
        raise InputError(
            f"images_per_class={config.images_per_class}: more than max_images={config.max_images} in one class alone; "
            "lower it, or raise max_images if you mean it"
        )
    if config.dataset.pad and config.dataset.image_size <= 2 * config.dataset.pad:
        raise InputError(
            f"dataset.pad={config.dataset.pad}: leaves no image within image_size={config.dataset.image_size}"
        )


def _check_labels(config: Config) -> None:
    labels = config.labels
    names = label_teachers(config)
    if len(set(names)) < len(names):
        raise InputError(f"labels.teachers={names}: names a teacher twice; give it a weight instead (labels.weights)")
    if labels.weights and len(labels.weights) != len(names):
        raise InputError(
            f"labels.weights={labels.weights}: {len(labels.weights)} weights for {len(names)} label teachers "
            f"({', '.join(names)}); give one each, or none"
        )
    couples = labels.rule is not LabelRule.mean or labels.batch_statistics
    if labels.rule is LabelRule.frobenius and len(names) == 1:
        raise InputError(
            f"labels.rule=frobenius: balances several teachers, and {names[0]} is the only one; name more in "
            "labels.teachers, or use rule=mean"
        )
    if labels.online and couples:
        setting = "labels.batch_statistics" if labels.batch_statistics else f"labels.rule={labels.rule.name}"
        raise InputError(
            f"{setting}: couples the images of a shard, which labels.online=true never sees together; "
            "store labels, or use rule=mean without batch_statistics"
        )
    if labels.batch_statistics and not any(config.teachers.models[name].batch_norm for name in names):
        raise InputError(
            f"labels.batch_statistics=true: no label teacher ({', '.join(names)}) has batch norm; leave it out"
        )


def _check_student(config: Config) -> None:
    student, compute = config.student, config.compute
    if (student.steps is None) == (student.epochs is None):
        raise InputError(
            f"student.steps={_shown(student.steps)}, student.epochs={_shown(student.epochs)}: expected one number and "
            "one null; set the other to null"
        )
    if len(student.lr_grid) == 1 or len(set(student.lr_grid)) < len(student.lr_grid):
        raise InputError(f"student.lr_grid={student.lr_grid}: expected two or more different rates, or none and lr")
    if LabelKind.plain in student.blocks or LabelKind.soft not in student.blocks:
        names = ", ".join(kind.name for kind in student.blocks)
        raise InputError(
            f"student.blocks=[{names}]: expected soft and hard parts, at least one of them soft; for students of the "
            "class alone use student.labels=[hard] or [plain]"
        )
    _check_search(config)
    if student.steps is not None and len(student.blocks) > student.steps:
        raise InputError(f"student.blocks: {len(student.blocks)} parts of {student.steps} steps; expected fewer parts")
    least = compute.min_workers_per_student
    if least is not None and least > compute.workers_per_student:
        raise InputError(
            f"compute.min_workers_per_student={least}: more than workers_per_student={compute.workers_per_student}; "
            "lower it"
        )
    if compute.workers_per_student > student.batch_size:
        raise InputError(
            f"compute.workers_per_student={compute.workers_per_student}: more workers than images in a step "
            f"(student.batch_size={student.batch_size}); lower it"
        )


def _check_search(config: Config) -> None:
    """Refuse a search of the learning rate that will find no image to judge by."""
    student = config.student
    if not student.lr_grid:
        return
    if student.validation is Validation.training and config.images_per_class is None:
        raise InputError(
            "student.lr_grid: with images_per_class=null no real training image is left for validation; set student.lr "
            "alone, or use student.validation=synthetic"
        )
    if student.validation is Validation.synthetic and config.images_per_class == 1:
        raise InputError(
            "student.validation=synthetic: needs at least 2 images of each class, images_per_class=1 makes one; use "
            "student.validation=training"
        )
