"""Trainings under Ray Train: a list of networks, shared out among the workers of one TorchTrainer run."""

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.exceptions import RayError
from ray.train.torch import TorchTrainer

from prism_ray.config import ComputeConfig
from prism_ray.errors import ExitCode, InputError, PrismError, one_line
from prism_ray.runtime.session import fitting
from prism_ray.stages.item_worker import ItemWorker
from prism_ray.work import Item, scratch_dir

MAX_FAILURES = 3
"""Restarts of a training group; each continues from the checkpoints, so a restart costs little."""


def run_trainings(compute: ComputeConfig, items: Sequence[Item]) -> None:
    """Train a list of networks, shared out among the workers of one TorchTrainer run."""
    resources = ray.cluster_resources()
    gpus_each = compute.gpus_per_train_worker
    workers = fitting(
        compute.train_workers,
        todo=len(items),
        cpus_each=1.0,
        gpus_each=gpus_each,
        cpus=resources.get("CPU", 0.0),
        gpus=resources.get("GPU", 0.0),
    )
    scaling = ray.train.ScalingConfig(
        num_workers=workers,
        use_gpu=gpus_each > 0,
        resources_per_worker={"CPU": 1.0, **({"GPU": gpus_each} if gpus_each > 0 else {})},
    )
    with _shared_folder(items[0]) as shared:
        trainer = TorchTrainer(
            _train_share,
            train_loop_config={"items": list(items), "shared": str(shared)},
            scaling_config=scaling,
            # Checkpoints are the items' own, in the run folder, where inline runs and later commands find them too.
            run_config=ray.train.RunConfig(
                name="ray_train",
                storage_path=str(shared),
                failure_config=ray.train.FailureConfig(max_failures=MAX_FAILURES),
            ),
        )
        try:
            with _quiet():
                trainer.fit()
        except (RayError, ray.train.TrainingFailedError) as error:
            raise PrismError(f"training failed: {_innermost(error)}; run the same command to continue") from error
        _raise_reported(shared)


@contextlib.contextmanager
def _shared_folder(item: Item) -> Iterator[Path]:
    """A folder that driver and workers reach while they train; beside what the items make."""
    folder = scratch_dir(item) / f".train-{uuid.uuid4().hex}"
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _train_share(config: dict[str, Any]) -> None:
    """A training worker: every n-th item of the list. Which worker trains an item changes nothing in it."""
    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    worker = ItemWorker()
    try:
        for item in config["items"][rank::size]:
            worker.process(item)
    except PrismError as error:
        # Trying again can't help; an exception would have Ray restart the group.
        content = {"message": one_line(error), "exit_code": int(error.exit_code)}
        (Path(config["shared"]) / f"error-{rank:03d}.json").write_text(json.dumps(content))


def _raise_reported(shared: Path) -> None:
    """Raise what a worker could not mend by trying again."""
    for path in sorted(shared.glob("error-*.json")):
        content = json.loads(path.read_text())
        raise (InputError if content["exit_code"] == ExitCode.bad_input else PrismError)(content["message"])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Ray Train's own progress lines out of ours."""
    with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink):
        yield


def _innermost(error: BaseException) -> str:
    causes = getattr(error, "worker_failures", None) or {}
    return one_line(next(iter(causes.values()), error))[:300]
