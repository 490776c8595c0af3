"""Units on Ray Data: plan rows in, an actor pool that holds the models, outcomes out."""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import ray
import ray.data
from ray.data.exceptions import ExecutionTimeoutError
from ray.exceptions import RayError

from prism_ray.config import ComputeConfig
from prism_ray.errors import PrismError, one_line
from prism_ray.ledger import Outcome
from prism_ray.runtime.metrics import UnitMetrics
from prism_ray.runtime.session import fitting
from prism_ray.stages.worker import Worker
from prism_ray.work import Chain, RunSpec, UnitRef

NODE_CACHE_S = 5.0

RESTART_S = 120.0
"""A process that ended starts again within this time, Ray and models included."""


def run_units(
    compute: ComputeConfig, specs: Sequence[RunSpec], chains: Sequence[Chain]
) -> Iterator[tuple[UnitRef, Outcome]]:
    """Make units on an actor pool that holds the models, yielding how each ended, in the order they end.

    Ray Data neither decides what a unit is (a block holds one row, a call gets one block) nor writes anything: the
    actor publishes its own shard, and errors come back as rows.
    """
    resources = ray.cluster_resources()
    actors = fitting(
        compute.actors,
        todo=len(chains),
        cpus_each=compute.cpus_per_actor,
        gpus_each=compute.gpus_per_actor,
        cpus=resources.get("CPU", 0.0),
        gpus=resources.get("GPU", 0.0),
    )
    # The guard counts moving blocks only, so a unit longer than its default of 30 minutes would end the run. Units end
    # themselves in time; this is for actors that never start, and long enough for one that fails as often as it may.
    context = ray.data.DataContext.get_current()
    context.execution_options.verbose_progress = False
    tries = compute.max_attempts * max(len(chain) for chain in chains)
    no_progress_s = tries * (compute.unit_timeout_s + RESTART_S)
    context.execution_no_progress_timeout_s = no_progress_s
    rows = [{"chain": json.dumps([asdict(ref) for ref in chain])} for chain in chains]
    # Items are blocks of the driver: unlike a read, they need no task and so no CPU beside the pool.
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        _Actor,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=compute.cpus_per_actor,
        num_gpus=compute.gpus_per_actor or None,
        fn_constructor_kwargs={"specs": list(specs)},
    )
    try:
        for batch in dataset.iter_batches(batch_size=1, prefetch_batches=0):
            for ref, outcome in json.loads(str(batch["outcomes"][0])):
                yield UnitRef(**ref), Outcome(**outcome)
    except ExecutionTimeoutError as error:
        raise PrismError(
            f"no unit ended within {no_progress_s:.0f} s, although compute.unit_timeout_s={compute.unit_timeout_s:g}; "
            "look for actors that wait for CPUs or GPUs, and run the same command to continue"
        ) from error
    except RayError as error:
        raise PrismError(f"Ray ended the run: {one_line(error)[:300]}; run the same command to continue") from error


class _Actor:
    """A worker on an actor: one row in, one row out, nothing raised for a unit's own fault."""

    def __init__(self, specs: list[RunSpec]) -> None:
        self._nodes: tuple[float, set[str]] = (0.0, set())
        node = ray.get_runtime_context().get_node_id()
        observe = UnitMetrics(specs).record
        self._worker = Worker(specs, node=node, live_nodes=self._live_nodes, observe=observe)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        (row,) = batch["chain"]
        chain = [UnitRef(**ref) for ref in json.loads(str(row))]
        return {
            "outcomes": [json.dumps([(asdict(ref), asdict(outcome)) for ref, outcome in self._worker.process(chain)])]
        }

    def _live_nodes(self) -> set[str]:
        if time.monotonic() - self._nodes[0] > NODE_CACHE_S:
            self._nodes = (time.monotonic(), {node["NodeID"] for node in ray.nodes() if node["Alive"]})
        return self._nodes[1]
