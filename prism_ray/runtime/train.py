"""Trainings under Ray Train: a list of networks, done by the workers of one TorchTrainer run.

The list is shared out: each worker trains networks of its own. With `compute.workers_per_student` above 1 the students
of the list are trained by all workers together, one after another, and the rest is shared out.
"""

import contextlib
import os
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import ray
import ray.train
from ray.exceptions import RayError
from ray.train.backend import Backend
from ray.train.torch import TorchConfig, TorchTrainer

from prism_ray import drain
from prism_ray.config import ComputeConfig
from prism_ray.errors import ExitCode, InputError, PrismError, one_line
from prism_ray.runtime.placement import room, train_need
from prism_ray.runtime.session import Notice, cluster_nodes
from prism_ray.stages.data_parallel import Group
from prism_ray.stages.item_worker import ItemWorker
from prism_ray.storage import Store, open_store, read_json, to_json
from prism_ray.work import TROUBLES, Item, StudentItem, address_of

MAX_FAILURES = 3
"""Restarts of a training group; each continues from the checkpoints, so a restart costs little."""

RESIZE_CHECK_S = 30.0
"""How often an elastic group looks whether it could have more workers again; it restarts to take them in."""


class SeparateConfig(TorchConfig):
    """Workers that train networks of their own: no process group, whose store would listen to everybody."""

    @property
    def backend_cls(self) -> Any:
        return Backend


def run_trainings(compute: ComputeConfig, items: Sequence[Item]) -> None:
    """Train a list of networks on one TorchTrainer run."""
    gpus_each = compute.gpus_per_train_worker
    are_joint = compute.workers_per_student > 1 and any(isinstance(item, StudentItem) for item in items)
    scaling = ray.train.ScalingConfig(
        num_workers=_joint_workers(compute) if are_joint else _separate_workers(compute, len(items)),
        use_gpu=gpus_each > 0,
        resources_per_worker=train_need(compute).amounts(),
        label_selector=compute.train_labels or None,
        elastic_resize_monitor_interval_s=RESIZE_CHECK_S,
    )
    store, folder = open_store(address_of(items[0])), f"{TROUBLES}/{uuid.uuid4().hex}"
    with tempfile.TemporaryDirectory(prefix="prism_ray-train-") as own, contextlib.ExitStack() as stack:
        stack.callback(store.remove, folder)
        trainer = TorchTrainer(
            _train_share,
            train_loop_config={"items": list(items), "troubles": (store.url, folder), "are_joint": are_joint},
            # NCCL refuses two workers on one GPU.
            torch_config=(TorchConfig if are_joint else SeparateConfig)(backend="gloo" if 0 < gpus_each < 1 else None),
            scaling_config=scaling,
            # Checkpoints are the items' own, in the run folder, where inline runs and later commands find them too.
            # None is given to Ray, and so it looks at its own storage where it made it, on this node, and nowhere else.
            run_config=ray.train.RunConfig(
                name="ray_train",
                storage_path=own,
                failure_config=ray.train.FailureConfig(max_failures=MAX_FAILURES),
            ),
        )
        try:
            with _quiet():
                trainer.fit()
        except (RayError, ray.train.TrainingFailedError) as error:
            raise PrismError(f"training failed: {_innermost(error)}; run the same command to continue") from error
        _raise_reported(store, folder)


def _joint_workers(compute: ComputeConfig) -> int | tuple[int, int]:
    """Workers of one student; a least and a largest number where it goes on while some are lost."""
    least = compute.min_workers_per_student
    return compute.workers_per_student if least is None else (least, compute.workers_per_student)


def _separate_workers(compute: ComputeConfig, todo: int) -> int:
    """As many as are set, or as fit now, at most one per piece of work."""
    nodes = list(cluster_nodes().values())
    fit = room(train_need(compute), nodes)
    wanted = compute.train_workers if compute.autoscaling else min(compute.train_workers or fit, fit)
    return max(1, min(wanted or max(fit, 1), todo))


def _train_share(config: dict[str, Any]) -> None:
    """A training worker: every n-th item of the list, after the students that all workers train together, if any.

    Which worker trains an item, and how many train it, changes nothing in what is trained.
    """
    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    url, folder = config["troubles"]
    store = open_store(url)
    joint, separate = [], []
    for item in config["items"]:
        (joint if config["are_joint"] and isinstance(item, StudentItem) else separate).append(item)
    if joint and store.keys(folder):
        return  # a group that starts again after an error that trying again can't mend
    drain.watch(Notice(ray.get_runtime_context().get_node_id()))
    worker = ItemWorker()
    try:
        for item in joint:
            worker.process(item, Group(rank, size))
        for item in separate[rank::size]:
            worker.process(item)
    except PrismError as error:
        # Trying again can't help; an exception would have Ray restart the group.
        content = {"message": one_line(error), "exit_code": int(error.exit_code)}
        store.put(f"{folder}/{rank:03d}.json", to_json(content))
        if joint and size > 1:
            raise  # Ray then ends the others too, which may wait for this one


def _raise_reported(store: Store, folder: str) -> None:
    """Raise what a worker could not mend by trying again."""
    for key in store.keys(folder):
        content = read_json(store, key)
        assert content is not None, "written once"
        raise (InputError if content["exit_code"] == ExitCode.bad_input else PrismError)(content["message"])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Ray Train's own progress lines out of ours."""
    with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink):
        yield


def _innermost(error: BaseException) -> str:
    causes = getattr(error, "worker_failures", None) or {}
    return one_line(next(iter(causes.values()), error))[:300]
