"""What will be made: config → units of work → images with class, index, seed, teachers and companions. Pure.

A unit is one batch of images optimized together and one shard. Which images share a unit, which teachers guide it and
every seed follow from the settings alone, so any number of workers in any order makes the same shards.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

from prism_ray.config import Config, MethodConfig, label_teachers
from prism_ray.errors import InputError
from prism_ray.identity import content_hash, images_hash, plain
from prism_ray.methods.batches import Batch, class_major_batches, cross_class_batches
from prism_ray.methods.inversion.budgets import iterations_of_slice
from prism_ray.methods.inversion.subsets import (
    draw_auxiliaries,
    draw_index,
    draw_statistics_teachers,
    draw_subset,
)
from prism_ray.options import (
    BatchPlan,
    Cadence,
    Engine,
    EvaluationSplit,
    Init,
    Judges,
    LogitRole,
    Selection,
    StatisticsRole,
)
from prism_ray.seeds import seed_for

IMAGES_VERSION = 3
"""Raised when the same settings make other bytes of images, if only in rounding, so that old ones are made again."""

LABELS_VERSION = 3
"""Likewise of labels."""

REAL_IMAGES_PER_UNIT = 500
"""Images of a shard of real images: there is no batch to keep together."""


@dataclass(frozen=True)
class PlannedImage:
    """One image to make. `source_row` indexes the real training split; None where the plan alone doesn't decide it."""

    image_id: str
    class_id: int
    index_in_class: int
    seed: int
    source_row: int | None


@dataclass(frozen=True)
class Unit:
    """One batch of images: made together, published as one shard, complete or absent.

    `unit_id` and `labels_id` name what decides the bytes of the images and of their labels: equal ids, equal bytes.
    """

    index: int
    unit_id: str
    labels_id: str
    name: str
    slice_index: int
    chunk_index: int
    images: tuple[PlannedImage, ...]
    iterations: int
    seed: int
    first_step: int
    """Steps of all units before this one, as one process would count them that makes them in order."""


@dataclass(frozen=True)
class Guiding:
    """Names of the teachers that guide one iteration."""

    logits: tuple[str, ...]
    statistics: tuple[str, ...]


def plan_units(
    config: Config, rows_by_class: Sequence[Sequence[int]], class_ids: Sequence[int] | None = None
) -> list[Unit]:
    """Every unit of a run, slice by slice, or chunk by chunk where batches are class-major.

    Args:
        config: checked settings.
        rows_by_class: for each class, the rows of its real training images in source order.
        class_ids: classes to make images of; None: all.

    Raises:
        InputError: a class has fewer real images than the plan takes, or the plan is larger than `max_images`.
    """
    chosen = list(range(len(rows_by_class)) if class_ids is None else class_ids)
    reserved = reserved_images(config)
    rows_by_class = [rows[: max(0, len(rows) - reserved)] for rows in rows_by_class]
    check_size(config, [len(rows_by_class[class_id]) for class_id in chosen])
    batches = _batches(config, [len(rows_by_class[class_id]) for class_id in chosen])
    sources = _selected_rows(config, rows_by_class, chosen) if takes_rows(config) else None
    made_from = images_hash(config)
    labelled_by = content_hash([plain(config.labels), label_teachers(config), LABELS_VERSION])
    units: list[Unit] = []
    first_step = 0
    for index, batch in enumerate(batches):
        images = tuple(_planned_image(config, chosen[position], k, sources) for position, k in batch.images)
        key = (batch.slice_index, batch.chunk_index)
        units.append(
            Unit(
                index=index,
                unit_id=content_hash([made_from, "synthesize", *key, IMAGES_VERSION]),
                labels_id=content_hash([made_from, "relabel", *key, labelled_by]),
                name=f"train-{index:05d}-of-{len(batches):05d}",
                slice_index=batch.slice_index,
                chunk_index=batch.chunk_index,
                images=images,
                iterations=_iterations(config.method, batch.slice_index),
                seed=seed_for(config.seed, "batch", *key),
                first_step=first_step,
            )
        )
        first_step += units[-1].iterations
    return units


def reserved_images(config: Config) -> int:
    """Last real training images of each class that none may start from, because students are measured on them."""
    return config.student.validation_images if config.evaluate.split is EvaluationSplit.validation else 0


def check_size(config: Config, real_images: Sequence[int]) -> None:
    """Refuse a plan of too many images before it is made; `real_images` counts those of each class.

    Raises:
        InputError: more than `max_images`.
    """
    wanted = config.images_per_class
    num_images = sum(real_images) if wanted is None else wanted * len(real_images)
    if num_images > config.max_images:
        raise InputError(
            f"images_per_class={'null' if wanted is None else wanted}: makes {num_images} images, more than "
            f"max_images={config.max_images}; lower it, or raise max_images if you mean it"
        )


def guiding_teachers(config: Config, unit: Unit, iteration: int) -> Guiding:
    """Names of the teachers that guide one iteration of a unit."""
    teachers, method = config.teachers, config.method
    active = (teachers.pool[(unit.first_step + iteration) % len(teachers.pool)],)
    statistics = active if method.statistics_role is StatisticsRole.active else _drawn(config, unit, iteration)
    logits = {
        LogitRole.primary: (teachers.primary,),
        LogitRole.active: active,
        LogitRole.drawn: statistics,
    }[method.logit_role]
    return Guiding(logits, statistics if method.bn_weight else ())


def _drawn(config: Config, unit: Unit, iteration: int) -> tuple[str, ...]:
    """The draw of statistics teachers in force at an iteration."""
    teachers, method = config.teachers, config.method
    if method.statistics_role is StatisticsRole.fixed:
        return tuple(method.statistics_fixed or [teachers.primary])
    if method.statistics_role is StatisticsRole.all:
        return tuple(teachers.pool)
    key = draw_index(
        method.cadence.name,
        slice_index=unit.slice_index,
        chunk_index=unit.chunk_index,
        iteration=iteration,
        every=method.cadence_every,
    )
    seed = seed_for(config.seed, "statistics_teachers", *key)
    if method.statistics_role is StatisticsRole.k_subset:
        return draw_subset(teachers.pool, count=method.statistics_count, seed=seed)
    draw = draw_statistics_teachers if method.statistics_role is StatisticsRole.bernoulli_slots else draw_auxiliaries
    return draw(
        teachers.primary,
        [name for name in teachers.pool if name != teachers.primary],
        slots=method.statistics_slots,
        probability=method.statistics_probability,
        seed=seed,
    )


def guided(config: Config, unit: Unit) -> list[tuple[range, Guiding]]:
    """A unit's iterations in stretches that the same teachers guide."""
    method = config.method
    takes_turns = method.logit_role is LogitRole.active or method.statistics_role is StatisticsRole.active
    if not takes_turns and method.cadence in (Cadence.run, Cadence.slice, Cadence.batch):
        return [(range(unit.iterations), guiding_teachers(config, unit, 0))] if unit.iterations else []
    found = []
    for guiding, same in groupby(range(unit.iterations), key=lambda t: guiding_teachers(config, unit, t)):
        iterations = list(same)
        found.append((range(iterations[0], iterations[-1] + 1), guiding))
    return found


def has_statistics(config: Config, name: str) -> bool:
    """Whether a teacher has layers to match, by its declaration."""
    return config.teachers.models[name].batch_norm or config.method.conv_statistics


def asked(config: Config, guiding: Guiding) -> set[str]:
    """The networks that run in an iteration: each once, those without anything to match only for their logits."""
    return {*guiding.logits, *(name for name in guiding.statistics if has_statistics(config, name))}


def check_statistics(config: Config, units: Sequence[Unit]) -> None:
    """Refuse a plan in which some draw of statistics teachers has nothing to match.

    Raises:
        InputError: names the first such unit.
    """
    if all(has_statistics(config, name) for name in statistics_pool(config)):
        return
    for unit in units:
        for iterations, guiding in guided(config, unit):
            drawn = guiding.statistics
            if drawn and not any(has_statistics(config, name) for name in drawn):
                primary = config.teachers.primary
                at_fault = (
                    f"teachers.pool={config.teachers.pool}: holds teachers without batch norm"
                    if has_statistics(config, primary)
                    else f"teachers.primary={primary!r}: has no batch norm"
                )
                raise InputError(
                    f"{at_fault}, and unit {unit.name} draws {', '.join(drawn)} at iteration {iterations.start}, so "
                    "it has no statistics to match; leave such teachers out, or draw more of them "
                    "(statistics_probability=1)"
                )


def used_teachers(config: Config) -> list[str]:
    """Names of the teachers a run needs, each once: those that guide it, label teachers, feature model.

    The primary is always among them: it is asked about every stored image.
    """
    feature_model = [config.evaluate.feature_model] if config.evaluate.feature_model else []
    asked = [*feature_model, *config.evaluate.judges]
    return list(dict.fromkeys([*guiding_pool(config), *selecting(config), *label_teachers(config), *asked]))


def guiding_pool(config: Config) -> list[str]:
    """Names of the teachers that a worker needs to make images: the primary, and all that may guide some unit."""
    role = config.method.logit_role
    logits = {LogitRole.primary: [], LogitRole.active: config.teachers.pool, LogitRole.drawn: _drawable(config)}[role]
    optimized = logits if _optimizes(config) else []
    steering = energy_teachers(config) if config.method.engine is Engine.diffusion else []
    return list(dict.fromkeys([config.teachers.primary, *statistics_pool(config), *optimized, *steering]))


def energy_teachers(config: Config) -> list[str]:
    """Names of the teachers whose energies steer or select samples."""
    return config.method.guidance.teachers or [config.teachers.primary]


def needs_generator(config: Config) -> bool:
    """Whether images are sampled from a generator."""
    return config.method.engine is Engine.diffusion


def needs_calibration(config: Config) -> bool:
    """Whether a pilot round of unguided samples must be looked at before the run's own are drawn."""
    guidance = config.method.guidance
    several = len(energy_teachers(config)) > 1
    is_steered = guidance.scale != 0 and (guidance.margin_quantile is not None or several or guidance.adapt > 0)
    return needs_generator(config) and (is_steered or config.method.sampling.widen is not None)


def statistics_pool(config: Config) -> list[str]:
    """Names of the teachers whose statistics some unit may match; none where nothing is optimized."""
    return _drawable(config) if _optimizes(config) and config.method.bn_weight else []


def _optimizes(config: Config) -> bool:
    return config.method.engine is Engine.inversion


def _drawable(config: Config) -> list[str]:
    """Names of the teachers that a draw may hold."""
    teachers, method = config.teachers, config.method
    if method.statistics_role is StatisticsRole.fixed:
        return method.statistics_fixed or [teachers.primary]
    if method.statistics_role is StatisticsRole.auxiliary_slots:
        return [name for name in teachers.pool if name != teachers.primary]
    return teachers.pool


def needs_statistics_pass(config: Config) -> bool:
    """Whether targets must be measured on the real images, beyond what batch norm carries."""
    return (config.method.conv_statistics or config.method.class_share > 0) and bool(statistics_pool(config))


def needs_starts(config: Config) -> bool:
    """Whether teachers select the real images or crops that synthetic ones start from."""
    method = config.method
    if method.engine in (Engine.real, Engine.diffusion):
        return False
    return method.init is Init.mosaic or (method.init is Init.real and not _in_plan(method.selection))


def selecting(config: Config) -> list[str]:
    """Names of the teachers that select real images and crops."""
    if not needs_starts(config):
        return []
    return config.teachers.pool if config.method.judges is Judges.pool else [config.teachers.primary]


def takes_rows(config: Config) -> bool:
    """Whether the plan itself names the real images that are taken or started from."""
    method = config.method
    if method.engine is Engine.diffusion:
        return False
    if method.engine is Engine.real:
        return True
    return method.init is Init.real and _in_plan(method.selection)


def _in_plan(selection: Selection) -> bool:
    return selection in (Selection.first, Selection.random)


def _batches(config: Config, num_real: Sequence[int]) -> list[Batch]:
    """Every batch, of positions among the chosen classes, of which `num_real` counts the real images."""
    wanted, method = config.images_per_class, config.method
    if method.engine is Engine.real:
        num_images = [count if wanted is None else wanted for count in num_real]
        return _even_batches(num_images, REAL_IMAGES_PER_UNIT)
    assert wanted is not None, "refused by validation"
    if method.engine is Engine.diffusion:
        return _even_batches([wanted] * len(num_real), method.batch_size)
    form = {
        BatchPlan.cross_class: cross_class_batches,
        BatchPlan.class_major: class_major_batches,
        BatchPlan.single_class: partial(class_major_batches, max_classes=1),
    }[method.batch_plan]
    return form(
        len(num_real),
        wanted,
        batch_size=method.batch_size,
        order=method.class_order.name,
        seed=seed_for(config.seed, "class_order"),
    )


def _even_batches(num_images: Sequence[int], size: int) -> list[Batch]:
    """So many images of each class, slice by slice in shards of one size; for images that need no companions."""
    pairs = [(c, k) for k in range(max(num_images)) for c, count in enumerate(num_images) if k < count]
    # Slices don't fit into such units, so the chunk index alone names them.
    return [Batch(0, n, tuple(pairs[start : start + size])) for n, start in enumerate(range(0, len(pairs), size))]


def _selected_rows(
    config: Config, rows_by_class: Sequence[Sequence[int]], chosen: Sequence[int]
) -> dict[int, list[int]]:
    """For each chosen class, the real rows in the order they are taken."""
    wanted = config.images_per_class
    selected = {}
    for class_id in chosen:
        rows = rows_by_class[class_id]
        if wanted is not None and len(rows) < wanted:
            raise InputError(
                f"images_per_class={wanted}: class {class_id} has only {len(rows)} real training images; "
                "lower it or start from noise (method.init=noise)"
            )
        selected[class_id] = (
            permuted(rows, seed_for(config.seed, "selection", class_id)) if _is_random(config) else list(rows)
        )
    return selected


def _is_random(config: Config) -> bool:
    return config.method.selection is Selection.random and config.images_per_class is not None


def permuted(rows: Sequence[int], seed: int) -> list[int]:
    """Rows in an order that depends on the seed and each row alone: what is left keeps its order when others go."""
    return sorted(rows, key=lambda row: seed_for(seed, "row", int(row)))


def _planned_image(config: Config, class_id: int, k: int, sources: dict[int, list[int]] | None) -> PlannedImage:
    return PlannedImage(
        image_id=f"{class_id:06d}-{k:06d}",
        class_id=class_id,
        index_in_class=k,
        seed=seed_for(config.seed, "image", class_id, k),
        source_row=None if sources is None else int(sources[class_id][k]),
    )


def _iterations(method: MethodConfig, slice_index: int) -> int:
    if method.engine is Engine.diffusion:
        return method.sampling.steps
    if method.engine is not Engine.inversion:
        return 0
    return iterations_of_slice(method.iterations, slice_index, decay=method.budget_decay, period=method.budget_period)
