"""What is refused in the first seconds: compute, data and teachers that can't work. No Ray, no model, no full scan."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from prism_ray.artifacts import local_folder
from prism_ray.config import ComputeConfig, Config, TeacherConfig
from prism_ray.data.prepared import check_dataset
from prism_ray.data.records import class_ids_of
from prism_ray.data.shifted import check_shifted
from prism_ray.errors import InputError
from prism_ray.generation import TRAIN, class_ids_of_generator
from prism_ray.generator_files import check_generator, takes_class_ids
from prism_ray.options import Executor
from prism_ray.plan import check_size, needs_generator, used_teachers
from prism_ray.runtime.session import check_fits, local_node, preflight
from prism_ray.staging import DESCRIPTION, check_elsewhere, found_here
from prism_ray.storage import is_remote, open_store
from prism_ray.weights import check_architecture, check_weights_file, find_lite, find_weights, is_folder

JOB_FOLDERS = "/runtime_resources/working_dir_files/"
"""Where Ray unpacks the working directory of a submitted job, on every node for itself."""


def check_before_start(configs: Sequence[Config]) -> None:
    """Look at everything a command needs; the compute settings are the first run's.

    Raises:
        InputError: one line that names what is wrong and what to do.
    """
    for config in configs:
        check_storage(config)
    check_compute(configs[0].compute)
    for config in configs:
        for name in used_teachers(config):
            check_teacher(name, config.teachers.models[name])
        check_architecture(config.student.arch, key="student.arch")
    for dataset in {str(config.dataset): config.dataset for config in configs}.values():
        class_names = check_dataset(dataset)
        for config in (config for config in configs if config.dataset == dataset):
            chosen = class_ids_of(config.classes, class_names)
            check_source(config, class_names)
            for name, where in config.evaluate.shifted_sets.items():
                check_shifted(dataset, class_names, name, where)
            if config.images_per_class is not None:
                check_size(config, [config.images_per_class] * len(chosen))


def check_source(config: Config, class_names: Sequence[str]) -> None:
    """Look at a generator from elsewhere: its files, or its address if they are not here yet."""
    source = config.generator.source
    if not needs_generator(config) or source in (None, TRAIN):
        return
    artifacts_dir = open_store(config.storage).url_of("artifacts")
    check_elsewhere(source, artifacts_dir)
    folder = found_here(source, artifacts_dir)
    if folder is None:
        return
    if not is_remote(folder):
        tiny = config.generator.tiny_decoder
        check_generator(Path(folder), None if tiny is None else Path(tiny))
    if takes_class_ids(local_folder(folder, only=DESCRIPTION)):
        class_ids_of_generator(folder, class_names)


def check_storage(config: Config) -> None:
    """Refuse a storage that not every worker reaches, or that does not outlive the command.

    Raises:
        InputError: memory with a cluster, or a folder inside the copy of a submitted job's working directory.
    """
    store = open_store(config.storage)
    if config.storage.startswith("memory:") and config.compute.executor is not Executor.inline:
        raise InputError(
            f"storage={config.storage!r}: is the memory of this process alone, which no worker reaches; set "
            "compute=inline, or choose another storage=..."
        )
    if JOB_FOLDERS in store.url:
        raise InputError(
            f"storage={config.storage!r}: lies in the working directory of a submitted job, {store.url}, and would be "
            "deleted with it; choose an absolute folder that every node reaches, or s3://BUCKET/FOLDER"
        )


def check_compute(compute: ComputeConfig) -> None:
    """Refuse a cluster that does not answer, or work that would wait for ever."""
    if compute.executor is Executor.ray:
        preflight(compute)
    else:
        # No pool and no cluster, whatever RAY_ADDRESS says: one worker of each kind, here.
        alone = replace(compute, actors=1, train_workers=1, workers_per_student=1, min_workers_per_student=None)
        alone = replace(alone, address="local", pools={}, autoscaling=False, train_labels={}, train_resources={})
        check_fits(alone, [local_node(compute)], where="this machine")


def check_teacher(name: str, teacher: TeacherConfig) -> None:
    """Look at a teacher's architecture name or weights file without loading it."""
    key = f"teachers.models.{name}"
    if teacher.source == "train":
        assert teacher.arch is not None
        check_architecture(teacher.arch, key=f"{key}.arch")
    elif teacher.source.startswith("timm:"):
        check_architecture(teacher.source.removeprefix("timm:"), key=f"{key}.source")
    elif not is_folder(teacher.source):
        find_lite(teacher.source, key=f"{key}.source")
    else:
        check_weights_file(find_weights(Path(teacher.source)), allow_pickle=teacher.allow_pickle)
