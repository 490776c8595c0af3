"""Units on Ray Data: plan rows in, pools of actors that hold the models, outcomes out."""

import json
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import cycle
from typing import Any, TypeVar

import ray
import ray.data
from ray.data.exceptions import ExecutionTimeoutError
from ray.exceptions import RayError

from prism_ray import drain
from prism_ray.config import ComputeConfig
from prism_ray.errors import ExitCode, PrismError, one_line
from prism_ray.ledger import Outcome
from prism_ray.runtime.metrics import UnitMetrics
from prism_ray.runtime.placement import Need, Pool, place, pool_here, pools_of, sizes
from prism_ray.runtime.session import Notice, all_nodes, cluster_nodes
from prism_ray.stages.worker import Worker
from prism_ray.work import Chain, RunSpec, UnitRef

T = TypeVar("T")

NODE_CACHE_S = 5.0
ANSWER_S = 5.0
"""Time for the last answer of an actor that leaves with its node; one that is lost is asked for again elsewhere."""

LOOK_S = 0.1
"""How often Ray Data looks at its tasks."""

MANY, MOST_WAITING = 50, 3
"""For every so many units per actor one waits at each actor while it makes another, up to the most, because Ray Data
needs two or three looks to replace one. Units are then ready when an actor is, and that it may have some more than
others at the end weighs little."""

RESTART_S = 120.0
"""A process that ended starts again within this time, Ray and models included."""


def run_units(
    compute: ComputeConfig, specs: Sequence[RunSpec], chains: Sequence[Chain]
) -> Iterator[tuple[UnitRef, Outcome]]:
    """Make units on actors that hold the models, yielding how each ended, in the order they end.

    Ray Data neither decides what a unit is (a block holds one row, a call gets one block) nor writes anything: the
    actor publishes its own shard, and errors come back as rows. An actor is given a unit when it has none, or before
    where there are many, see `MANY`; a lost node costs no more than the units that were being made there.
    """
    pools = pools_of(compute)
    counts = sizes(pools, list(cluster_nodes().values()), todo=len(chains), grows=compute.autoscaling)
    pools = [pool for pool in pools if pool.name in counts]
    # The guard counts moving blocks only, so a unit longer than its default of 30 minutes would end the run. Units end
    # themselves in time; this is for actors that never start, and long enough for one that fails as often as it may.
    context = ray.data.DataContext.get_current()
    context.execution_options.verbose_progress = False
    # A share of the cluster for each operator, counted anew at every look: there is one operator.
    context.op_resource_reservation_enabled = False
    tries = compute.max_attempts * max(len(chain) for chain in chains)
    no_progress_s = tries * (compute.unit_timeout_s + RESTART_S)
    context.execution_no_progress_timeout_s = no_progress_s
    actors = sum(counts.values())
    waiting = min(MOST_WAITING, len(chains) // (MANY * actors))
    rows = [{"chain": json.dumps([asdict(ref) for ref in chain])} for chain in chains]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*ray_remote_args_fn.*")
        # Items are blocks of the driver: unlike a read, they need no task and so no CPU beside the pool.
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _Actor,
            batch_size=1,
            # Actors that the cluster has no room for yet wait, which is what an autoscaler goes by.
            # Ray Data runs `_Actor.__call__` in one thread of its own: of two calls one waits for it, ready to begin.
            compute=ray.data.ActorPoolStrategy(
                size=actors,
                max_tasks_in_flight_per_actor=1 + waiting,
                max_concurrent_calls_per_actor=min(2, 1 + waiting),
            ),
            fn_constructor_kwargs={"specs": list(specs), "pools": pools},
            **_options(pools[0].need),
            ray_remote_args_fn=_in_turn(pools, counts) if len(pools) > 1 else None,
        )
    try:
        # Not as batches, whose iterator sends statistics of all units so far every few seconds, and keeps them.
        for bundle in _paced(dataset.iter_internal_ref_bundles()):
            blocks: list[Any] = [entry.ref for entry in bundle.blocks]
            for block in ray.get(blocks):
                (row,) = block["outcomes"].to_pylist()
                for ref, outcome in json.loads(row):
                    yield UnitRef(**ref), Outcome(**outcome)
    except ExecutionTimeoutError as error:
        raise PrismError(
            f"no unit ended within {no_progress_s:.0f} s, although compute.unit_timeout_s={compute.unit_timeout_s:g}; "
            "look for actors that wait for CPUs or GPUs, and run the same command to continue"
        ) from error
    except RayError as error:
        raise PrismError(f"Ray ended the run: {one_line(error)[:300]}; run the same command to continue") from error


def _paced(bundles: Iterator[T]) -> Iterator[T]:
    """The same, asking no more often than Ray Data looks at its tasks: who asks looks a hundred times a second."""
    asked = time.monotonic()
    for bundle in bundles:
        has_waited = time.monotonic() - asked > LOOK_S / 10
        yield bundle
        if has_waited:
            time.sleep(LOOK_S)
        asked = time.monotonic()


def _options(need: Need) -> dict[str, Any]:
    """What an actor reserves, in Ray's words."""
    named = {"resources": dict(need.resources), "label_selector": dict(need.labels)}
    return {"num_cpus": need.cpus, "num_gpus": need.gpus, **named}


def _in_turn(pools: Sequence[Pool], counts: dict[str, int]) -> Callable[[], dict[str, Any]]:
    """Options of one actor after the other, each pool's as often as it has actors.

    All pools are one to Ray Data, so that whichever actor is free gets the next unit. Ray marks the argument that this
    is for as removed from 2.64 on, which `pyproject.toml` excludes.
    """
    options = cycle([_options(pool.need) for pool in pools for _ in range(counts[pool.name])])
    return lambda: next(options)


class _Actor:
    """A worker on an actor: one row in, one row out, nothing raised for a unit's own fault."""

    def __init__(self, specs: list[RunSpec], pools: list[Pool]) -> None:
        self._nodes: tuple[float, set[str]] = (0.0, set())
        self._is_leaving = False
        here = ray.get_runtime_context()
        self._node = here.get_node_id()
        drain.watch(Notice(self._node))
        node = all_nodes()[self._node]
        pool = pool_here(pools, node, here.get_assigned_resources())
        self._worker = Worker(
            [_in_pool(spec, pool) for spec in specs],
            node=self._node,
            live_nodes=self._live_nodes,
            place=place(pool, node),
            observe=UnitMetrics(specs).record,
        )

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        (row,) = batch["chain"]
        chain = [UnitRef(**ref) for ref in json.loads(str(row))]
        outcomes = self._worker.process(chain)
        if outcomes[-1][1].exit_code == ExitCode.drained:
            if self._is_leaving:  # the answer of the call before may not be out yet
                time.sleep(ANSWER_S)
            os._exit(1)  # Ray starts this actor again on a node that stays, and hands it the same chain
        if drain.should_stop():
            self._is_leaving = True
            threading.Timer(ANSWER_S, os._exit, [1]).start()
        return {"outcomes": [json.dumps([(asdict(ref), asdict(outcome)) for ref, outcome in outcomes])]}

    def _live_nodes(self) -> set[str]:
        if time.monotonic() - self._nodes[0] > NODE_CACHE_S:
            self._nodes = (time.monotonic(), set(cluster_nodes()))
        return self._nodes[1]


def _in_pool(spec: RunSpec, pool: Pool) -> RunSpec:
    """The run as a pool's actor sees it: with its share of GPUs, by which stages choose their device."""
    compute = replace(spec.config.compute, gpus_per_actor=pool.need.gpus)
    return replace(spec, config=replace(spec.config, compute=compute))
