"""The Ray executor: one session per command, started with the first work; a finished run answers without Ray."""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Self

from prism_ray.config import ComputeConfig
from prism_ray.ledger import Outcome
from prism_ray.runtime import session
from prism_ray.work import Chain, Item, RunSpec, UnitRef


class RayRuntime:
    """Units on Ray Data, lists of networks under Ray Train. Imports ray on first use.

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

    def units(self, specs: Sequence[RunSpec], chains: Sequence[Chain]) -> Iterator[tuple[UnitRef, Outcome]]:
        """Make units on actors, yielding how each ended, in the order they end."""
        self._start()
        from prism_ray.runtime.units import run_units

        return run_units(self._compute, specs, chains)

    def train(self, items: Sequence[Item]) -> None:
        """Do every item of a list."""
        self._start()
        from prism_ray.runtime.train import run_trainings

        run_trainings(self._compute, items)

    def _start(self) -> None:
        if self._is_running:
            return
        session.start(self._compute)
        self._is_running = True
        for name in ("ray.data", "ray.train"):
            logging.getLogger(name).setLevel(logging.ERROR)
        self._started()
