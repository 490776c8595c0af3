"""The Ray executor: one session per command, started with the first work, so that a finished run answers without Ray."""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

from prism_ray.config import ComputeConfig
from prism_ray.errors import PrismError
from prism_ray.ledger import Outcome
from prism_ray.runtime import session
from prism_ray.work import RunSpec, TrainingItem, UnitRef


class RayRuntime:
    """Units on Ray Data, trainings under Ray Train, single calls as Ray tasks. Imports ray on first use.

    Args:
        compute: where and how many.
        started: called once the session runs, to install signal handlers that Ray has replaced.
    """

    def __init__(self, compute: ComputeConfig, *, started: Callable[[], None]) -> None:
        self._compute, self._started = compute, started
        self._is_running = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_running:
            session.stop()

    def units(self, specs: Sequence[RunSpec], refs: Sequence[UnitRef]) -> Iterator[tuple[UnitRef, Outcome]]:
        """Make units on actors, yielding how each ended, in the order they end."""
        self._start()
        from prism_ray.runtime.units import run_units

        return run_units(self._compute, specs, refs)

    def train(self, items: Sequence[TrainingItem]) -> None:
        """Train every network of a list."""
        self._start()
        from prism_ray.runtime.train import run_trainings

        run_trainings(self._compute, items)

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """One call on a node that has what an actor needs."""
        self._start()
        import ray
        from ray.exceptions import RayTaskError

        options = {"num_cpus": self._compute.cpus_per_actor, "num_gpus": self._compute.gpus_per_actor}
        try:
            return ray.get(ray.remote(**options)(function).remote(*arguments))
        except RayTaskError as error:
            if isinstance(error.cause, PrismError):
                raise error.cause from error
            raise

    def _start(self) -> None:
        if self._is_running:
            return
        session.start(self._compute)
        self._is_running = True
        for name in ("ray.data", "ray.train"):
            logging.getLogger(name).setLevel(logging.ERROR)
        self._started()
