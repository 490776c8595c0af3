"""What sampling from a generator is made of: where its artifacts belong, and what they are made from."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from prism_ray.artifacts import LISTING, MARKER, join, listing_of, local_folder, sha256_in
from prism_ray.config import Config, WorldConfig
from prism_ray.data.imagenet_names import class_names as imagenet_names
from prism_ray.data.imagenet_names import synsets
from prism_ray.data.prepared import PreparedDataset
from prism_ray.documents import parse_json
from prism_ray.errors import InputError
from prism_ray.generator_files import takes_class_ids
from prism_ray.identity import content_hash, plain, walk
from prism_ray.plan import energy_teachers, needs_calibration
from prism_ray.prompts.names import class_phrases
from prism_ray.staging import DESCRIPTION, staged
from prism_ray.storage import is_remote, sha256_of_file
from prism_ray.work import (
    PROMPTS_FILE,
    CalibrationItem,
    CalibrationSettings,
    GeneratorItem,
    PhrasesItem,
    PhrasesSettings,
    PromptsItem,
    RunSpec,
    classifier_digest,
)

TRAIN = "train"


def generator_of(
    config: Config, dataset: PreparedDataset, artifacts_dir: str | Path
) -> tuple[str, GeneratorItem | None]:
    """Address of a run's generator, and the work that makes it, None where it comes from elsewhere.

    Raises:
        InputError: the folder is no pipeline that can be sampled from.
    """
    source, world = config.generator.source, config.generator.world
    assert source is not None, "refused by validation"
    if source != TRAIN:
        return staged(source, artifacts_dir), None
    phrases = tuple(found[0] for found in class_phrases(dataset.class_names, config.prompts.phrases))
    folder = _world_folder(world, phrases, dataset, artifacts_dir)
    gpus = config.compute.gpus_per_train_worker
    return folder, GeneratorItem(world, phrases, dataset.url, folder, gpus)


def _world_folder(
    world: WorldConfig, phrases: Sequence[str], dataset: PreparedDataset, artifacts_dir: str | Path
) -> str:
    trained = {key: value for key, value in plain(world).items() if key != "checkpoint_every"}
    settings = {"version": 1, "world": trained, "phrases": list(phrases), "dataset": dataset.content_hash}
    return join(artifacts_dir, "generators", f"world-{content_hash(settings)}")


def prompts_item(
    config: Config,
    dataset: PreparedDataset,
    generator_dir: str,
    artifacts_dir: str | Path,
    *,
    phrases: Sequence[str] = (),
) -> PromptsItem:
    """The table of prompts of a run.

    Args:
        phrases: what teachers chose to call each class; empty: the first that it may be called.
    """
    names = tuple(dataset.class_names)
    settings = {
        "version": 1,
        "prompts": {key: plain(value) for key, value, field in walk(config.prompts) if field["output"]},
        "phrases": list(phrases),
        "classes": list(names),
        "seed": config.seed,
        # What prompts depend on of it: how it counts, or which classes it knows.
        "generator": generator_digest(generator_dir, parts=("tokenizer", "transformer/config.json")),
    }
    folder = join(artifacts_dir, "prompts", f"{config.prompts.world.name}-{content_hash(settings)}")
    return PromptsItem(config.prompts, names, config.seed, generator_dir, folder, tuple(phrases))


def phrases_item(spec: RunSpec, artifacts_dir: str | Path) -> PhrasesItem | None:
    """The samples by which a teacher chooses what ambiguous classes are called, None where it is not asked."""
    config, names = spec.config, spec.dataset().class_names
    assert spec.generator_dir is not None, "the generator comes first"
    if not config.prompts.judged_images or takes_class_ids(local_folder(spec.generator_dir, only=DESCRIPTION)):
        return None
    possible = class_phrases(names, config.prompts.phrases)
    ambiguous = [class_id for class_id in spec.class_ids() if len(possible[class_id]) > 1]
    if not ambiguous:
        return None
    teacher = config.teachers.primary
    settings = PhrasesSettings(
        generator=generator_digest(spec.generator_dir),
        settings=_sampled_by(config),
        teacher=teacher,
        teacher_digest=classifier_digest(spec.teacher_dirs[teacher]),
        names=tuple(names),
        phrases=dict(config.prompts.phrases),
        class_ids=tuple(ambiguous),
        num_images=config.prompts.judged_images,
        seed=config.seed,
        threads=config.compute.threads,
    )
    return PhrasesItem(spec, settings, join(artifacts_dir, "phrases", content_hash(plain(settings))))


def _sampled_by(config: Config) -> dict[str, Any]:
    """What decides an unguided sample beside its prompt and its seed."""
    sampling = {
        k: v for k, v in plain(config.method.sampling).items() if k not in ("oversample", "keep", "abort_at", "widen")
    }
    generator = {k: v for k, v in plain(config.generator).items() if k not in ("source", "world", "licence")}
    return {"generator": generator, "sampling": sampling}


def calibration_item(spec: RunSpec, artifacts_dir: str | Path) -> CalibrationItem | None:
    """The samples that a run's guidance is calibrated on, None where it needs none."""
    config = spec.config
    if not needs_calibration(config):
        return None
    assert spec.generator_dir is not None, "the generator comes first"
    assert spec.prompts_dir is not None, "prompts come first"
    guidance = config.method.guidance
    settings = CalibrationSettings(
        generator=generator_digest(spec.generator_dir),
        settings=_sampled_by(config),
        prompts=sha256_in(spec.prompts_dir, PROMPTS_FILE),
        teachers={name: classifier_digest(spec.teacher_dirs[name]) for name in energy_teachers(config)},
        class_ids=tuple(spec.class_ids()),
        num_images=guidance.calibration_images,
        quantile=0.5 if guidance.margin_quantile is None else guidance.margin_quantile,
        temperature=guidance.temperature,
        class_weight=guidance.class_weight,
        seed=config.seed,
        threads=config.compute.threads,
    )
    folder = join(artifacts_dir, "calibrations", content_hash(plain(settings)))
    return CalibrationItem(spec, settings, folder)


def generator_digest(folder: str | Path, *, parts: Sequence[str] = ()) -> str:
    """Digest over a pipeline's files; of some of its parts only, if they are named."""
    found = {PurePosixPath(name): sha256 for name, sha256 in _digests(folder, parts)}
    return content_hash([[str(name), found[name]] for name in sorted(found)])


def _digests(folder: str | Path, parts: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Name and sha256 of each of a pipeline's files; those of an object store are as they were published."""
    if is_remote(folder):
        for name, facts in listing_of(str(folder)).files.items():
            if name != MARKER and (not parts or any(name == part or name.startswith(f"{part}/") for part in parts)):
                yield name, facts["sha256"]
        return
    folder = Path(folder)
    for root in [folder / part for part in parts] or [folder]:
        for path in (root, *root.rglob("*")):
            if path.is_file() and path.name not in (MARKER, LISTING):
                yield path.relative_to(folder).as_posix(), _sha256_of(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=1024)
def _sha256_of(path: Path, changed_ns: int) -> str:
    """sha256 of a file, read once for all runs of a command as long as nobody touches it."""
    return sha256_of_file(path)


def class_ids_of_generator(generator: str | Path, class_names: Sequence[str]) -> list[int]:
    """The ids that a pipeline asked by class id has for the classes of a data set, in their order.

    Its own classes are taken for the data set's where their numbers agree; ImageNet's 1000 are found by name or WordNet
    id.

    Raises:
        InputError: the pipeline was trained on other classes.
    """
    path = local_folder(generator, only=DESCRIPTION) / "transformer" / "config.json"
    try:
        num_classes = dict(parse_json(path.read_bytes())).get("num_embeds_ada_norm")
    except (OSError, TypeError, ValueError) as error:
        raise InputError(f"{path}: is no JSON object; download or copy the folder again") from error
    if num_classes == len(class_names):
        return list(range(len(class_names)))
    known = {name: n for names in (imagenet_names(), synsets()) for n, name in enumerate(names)}
    unknown = [name for name in class_names if name not in known]
    if num_classes != len(synsets()) or unknown:
        wrong = f"; {unknown[0]!r} is none of ImageNet's" if unknown else ""
        raise InputError(
            f"generator {generator}: knows {num_classes} classes, the data set has {len(class_names)}{wrong}; expected "
            "a model of the same classes, or of ImageNet's 1000 for some of these"
        )
    return [known[name] for name in class_names]
