"""Settings out of range or at odds with each other, refused by name. Each range stands with its setting in `config`."""

import math
from typing import Any

from prism_ray.config import STAGES, Check, Config, Engine, StatisticsRole, plain, plain_name, walk
from prism_ray.errors import InputError


def check_config(config: Config) -> None:
    """Refuse settings out of range or at odds with each other.

    Raises:
        InputError: one line that names the setting, its value, what was expected and what to do.
    """
    for key, value, metadata in walk(config):
        _check_value(key, value, metadata["check"])
    if config.run_id is not None:
        _check_value("run_id", config.run_id, plain_name)
    for name in config.teachers.models:
        _check_value(f"teachers.models.{name}", name, plain_name)
    _check_stages(config)
    _check_teachers(config)
    _check_images(config)


def _check_value(key: str, value: Any, check: Check | None) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{key}={value}: not a finite number; give one")
    if check is None or value is None:
        return
    accepts, expected = check
    if not accepts(value):
        raise InputError(f"{key}={plain(value)}: not allowed; expected {expected}")


def _check_stages(config: Config) -> None:
    for stage in config.stages:
        if stage not in STAGES:
            raise InputError(f"stages: {stage!r} is unknown; known: {', '.join(STAGES)}")


def _check_teachers(config: Config) -> None:
    teachers, method = config.teachers, config.method
    known = ", ".join(sorted(teachers.models))
    named = {
        "teachers.primary": [teachers.primary],
        "teachers.pool": teachers.pool,
        "labels.teachers": config.labels.teachers,
        "evaluate.feature_model": [config.evaluate.feature_model] if config.evaluate.feature_model else [],
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
    if method.engine is not Engine.inversion:
        return
    auxiliaries = len(teachers.pool) - 1
    if method.statistics_role is StatisticsRole.bernoulli_slots and method.statistics_slots > auxiliaries:
        raise InputError(
            f"method.statistics_slots={method.statistics_slots}: more than the {auxiliaries} auxiliary teachers of "
            "teachers.pool; lower it or add teachers"
        )
    if method.statistics_role is StatisticsRole.primary and not teachers.models[teachers.primary].batch_norm:
        raise InputError(
            f"teachers.primary={teachers.primary!r}: has no batch norm and is the only statistics teacher of method "
            f"{method.name!r}; choose a primary with batch norm or statistics_role=bernoulli_slots"
        )
    if not any(teachers.models[name].batch_norm for name in teachers.pool):
        raise InputError("teachers.pool: no teacher in it has batch norm, so there are no statistics to match; add one")


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
