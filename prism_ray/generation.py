"""What sampling from a generator is made of: where its artifacts belong, and what they are made from."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from prism_ray.config import Config, WorldConfig
from prism_ray.data.prepared import PreparedDataset
from prism_ray.generator_files import check_generator
from prism_ray.identity import content_hash, plain
from prism_ray.plan import energy_teachers, needs_calibration
from prism_ray.prompts.names import class_phrases
from prism_ray.storage import sha256_of_file
from prism_ray.work import (
    MARKER,
    PROMPTS_FILE,
    CalibrationItem,
    CalibrationSettings,
    GeneratorItem,
    PromptsItem,
    RunSpec,
    classifier_digest,
)

TRAIN = "train"


def generator_of(config: Config, dataset: PreparedDataset, artifacts_dir: Path) -> tuple[str, GeneratorItem | None]:
    """Folder of a run's generator, and the work that makes it, None where it comes from elsewhere.

    Raises:
        InputError: the folder is no pipeline that can be sampled from.
    """
    source, world = config.generator.source, config.generator.world
    assert source is not None, "refused by validation"
    if source != TRAIN:
        elsewhere = Path(source).absolute()
        check_generator(elsewhere)
        return str(elsewhere), None
    phrases = tuple(found[0] for found in class_phrases(dataset.class_names, config.prompts.phrases))
    folder = str(_world_folder(world, phrases, dataset, artifacts_dir))
    gpus = config.compute.gpus_per_train_worker
    return folder, GeneratorItem(world, phrases, str(dataset.folder), folder, gpus)


def _world_folder(world: WorldConfig, phrases: Sequence[str], dataset: PreparedDataset, artifacts_dir: Path) -> Path:
    trained = {key: value for key, value in plain(world).items() if key != "checkpoint_every"}
    settings = {"version": 1, "world": trained, "phrases": list(phrases), "dataset": dataset.content_hash}
    return artifacts_dir / "generators" / f"world-{content_hash(settings)}"


def prompts_item(config: Config, dataset: PreparedDataset, generator_dir: str, artifacts_dir: Path) -> PromptsItem:
    """The table of prompts of a run."""
    names = tuple(dataset.class_names)
    settings = {
        "version": 1,
        "prompts": plain(config.prompts),
        "classes": list(names),
        "seed": config.seed,
        "tokenizer": generator_digest(Path(generator_dir), parts=("tokenizer",)),
    }
    folder = artifacts_dir / "prompts" / f"{config.prompts.world.name}-{content_hash(settings)}"
    return PromptsItem(config.prompts, names, config.seed, generator_dir, str(folder))


def calibration_item(spec: RunSpec, artifacts_dir: Path) -> CalibrationItem | None:
    """The samples that a run's guidance is calibrated on, None where it needs none."""
    config = spec.config
    if not needs_calibration(config):
        return None
    assert spec.generator_dir is not None, "the generator comes first"
    assert spec.prompts_dir is not None, "prompts come first"
    guidance, sampling = config.method.guidance, plain(config.method.sampling)
    for key in ("oversample", "keep", "abort_at"):
        del sampling[key]
    generator = {k: v for k, v in plain(config.generator).items() if k not in ("source", "world", "licence")}
    settings = CalibrationSettings(
        generator=generator_digest(Path(spec.generator_dir)),
        settings={"generator": generator, "sampling": sampling},
        prompts=sha256_of_file(Path(spec.prompts_dir) / PROMPTS_FILE),
        teachers={name: classifier_digest(Path(spec.teacher_dirs[name])) for name in energy_teachers(config)},
        class_ids=tuple(spec.class_ids()),
        num_images=guidance.calibration_images,
        quantile=0.5 if guidance.margin_quantile is None else guidance.margin_quantile,
        temperature=guidance.temperature,
        class_weight=guidance.class_weight,
        seed=config.seed,
        threads=config.compute.threads,
    )
    folder = artifacts_dir / "calibrations" / content_hash(plain(settings))
    return CalibrationItem(spec, settings, str(folder))


def generator_digest(folder: Path, *, parts: Sequence[str] = ()) -> str:
    """Digest over a pipeline's files; of some of its parts only, if they are named."""
    roots = [folder / part for part in parts] or [folder]
    files = sorted(path for root in roots for path in root.rglob("*") if path.is_file() and path.name != MARKER)
    return content_hash([[str(path.relative_to(folder)), _sha256_of(path, path.stat().st_mtime_ns)] for path in files])


@lru_cache(maxsize=1024)
def _sha256_of(path: Path, changed_ns: int) -> str:
    """sha256 of a file, read once for all runs of a command as long as nobody touches it."""
    return sha256_of_file(path)
