"""What is refused in the first seconds: compute, data and teachers that can't work. No Ray, no model, no full scan."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from prism_ray.artifacts import local_folder
from prism_ray.config import ComputeConfig, Config, DatasetConfig, Row, TeacherConfig
from prism_ray.data.prepared import check_dataset
from prism_ray.data.records import class_ids_of
from prism_ray.data.shifted import check_shifted
from prism_ray.errors import InputError, within
from prism_ray.generation import TRAIN, class_ids_of_generator
from prism_ray.generator_files import check_generator, takes_class_ids
from prism_ray.options import Executor
from prism_ray.plan import check_size, needs_generator, used_teachers
from prism_ray.runs import Run, locate
from prism_ray.runtime.session import check_fits, local_node, preflight
from prism_ray.staging import DESCRIPTION, check_elsewhere, found_here
from prism_ray.storage import LocalStore, is_remote, open_store
from prism_ray.weights import (
    check_architecture,
    check_described,
    check_finite,
    check_weights_file,
    find_lite,
    find_weights,
    is_folder,
    read_model_config,
)
from prism_ray.work import SYNTHESIZE

NEED_IMAGES = ("relabel", "distill", "evaluate", "report")
"""Stages that work on images."""

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
    check_stages(configs)
    for config in configs:
        for name in used_teachers(config):
            check_teacher(name, config.teachers.models[name])
        check_architecture(config.student.arch, key="student.arch")
    known: list[tuple[Config, int]] = []
    for dataset in {str(config.dataset): config.dataset for config in configs}.values():
        class_names = check_dataset(dataset)
        for config in (config for config in configs if config.dataset == dataset):
            known.append((config, len(class_names)))
            chosen = class_ids_of(config.classes, class_names)
            check_teacher_classes(config, class_names)
            check_source(config, class_names)
            for name, where in config.evaluate.shifted_sets.items():
                check_shifted(dataset, class_names, name, where)
            if config.images_per_class is not None:
                check_size(config, [config.images_per_class] * len(chosen))
    check_networks(known)


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
        weights = find_weights(Path(teacher.source))
        check_weights_file(weights, allow_pickle=teacher.allow_pickle)
        read_model_config(Path(teacher.source))
        check_finite(weights)


def check_teacher_classes(config: Config, class_names: Sequence[str]) -> None:
    """Refuse teachers from folders that were made for other classes, as far as their config.json says so."""
    for name in used_teachers(config):
        source = config.teachers.models[name].source
        if is_folder(source):
            check_described(Path(source), class_names, key=f"teachers.models.{name}")


def check_stages(configs: Sequence[Config]) -> None:
    """Refuse stages that need images, where there are none and none is to be made."""
    stages = configs[0].stages
    needing = [stage for stage in stages if stage in NEED_IMAGES]
    if not needing or SYNTHESIZE in stages:
        return
    for config in configs:
        run = locate(Row("", config))
        if not _is_begun(run) or not (run.ledger.receipts(SYNTHESIZE) or run.ledger.quarantined()):
            raise InputError(
                f"stages=[{','.join(stages)}]: {needing[0]} needs images, and run {run.name} has none; add the stages "
                "before it"
            )


def _is_begun(run: Run) -> bool:
    try:
        return run.store.size("config.yaml") is not None
    except OSError:
        return False  # what is wrong with the storage is said when the run is opened


def _has_place(run: Run) -> bool:
    """Whether a folder for the run could be made, as far as can be seen without making it."""
    if not isinstance(run.store, LocalStore):
        return True
    nearest = next(path for path in (run.store.root, *run.store.root.parents) if path.exists())
    return nearest.is_dir() and os.access(nearest, os.W_OK)


def check_networks(configs: Sequence[tuple[Config, int]]) -> None:
    """Refuse arguments that an architecture does not take before the first stage of a run, not at its last.

    Only for runs that are not begun, because it imports torch.

    Args:
        configs: the runs' settings, each with the number of classes of its data set.
    """
    built = set()
    for config, num_classes in configs:
        run = locate(Row("", config))
        if _is_begun(run) or not _has_place(run):
            continue
        teachers = {f"teachers.models.{name}": config.teachers.models[name] for name in used_teachers(config)}
        student = TeacherConfig(arch=config.student.arch, model_args=config.student.model_args)
        for key, network in {**teachers, "student": student}.items():
            settings = repr((network.arch, network.model_args, config.dataset, num_classes))
            if network.source == TRAIN and settings not in built:
                built.add(settings)
                with within(key):
                    _check_network(network, config.dataset, num_classes)


def _check_network(network: TeacherConfig, dataset: DatasetConfig, num_classes: int) -> None:
    from prism_ray.models.classifier import build_classifier
    from prism_ray.models.flops import architecture_flops

    assert network.arch is not None, "refused by validation"
    shape = {"image_size": dataset.image_size, "in_chans": dataset.channels, "num_classes": num_classes}
    try:
        architecture_flops(network.arch, network.model_args, **shape)  # draws no weights
    except InputError:  # some networks compute with their weights while they are built: they need real ones
        build_classifier(
            network.arch, model_args=network.model_args, mean=[0.5] * dataset.channels, std=[0.5], seed=0, **shape
        )
