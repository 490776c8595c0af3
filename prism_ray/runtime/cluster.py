"""The Ray executor: one session per command, started with the first work; a finished run answers without Ray."""

import logging
from collections.abc import Iterator, Sequence
from typing import Self

from prism_ray.config import ComputeConfig
from prism_ray.errors import Stopped
from prism_ray.ledger import Outcome
from prism_ray.runtime import session
from prism_ray.work import Chain, Item, RunSpec, UnitRef


class RayRuntime:
    """Units on Ray Data, lists of networks under Ray Train. Imports ray on first use.

    Args:
        compute: where and how many.
    """

    def __init__(self, compute: ComputeConfig) -> None:
        self._compute = compute
        self._is_running = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not self._is_running:
            return
        # After a signal a call is still under way in its thread, and an orderly shutdown would wait for it.
        is_abandoned = kind is not None and issubclass(kind, Stopped | KeyboardInterrupt)
        if is_abandoned:
            session.abandon(self._compute)
            return
        try:
            session.stop()
        except (Stopped, KeyboardInterrupt):
            session.abandon(self._compute)
            raise

    def units(self, specs: Sequence[RunSpec], chains: Sequence[Chain]) -> Iterator[tuple[UnitRef, Outcome]]:
        """Make units on actors, yielding how each ended, in the order they end."""
        from prism_ray.runtime.units import run_units

        return run_units(self._compute, specs, chains)

    def train(self, items: Sequence[Item]) -> None:
        """Do every item of a list."""
        from prism_ray.runtime.train import run_trainings

        run_trainings(self._compute, items)

    def start(self) -> None:
        """Start or join the cluster, once; comes before the first work."""
        if self._is_running:
            return
        self._is_running = True  # from here on there may be something to end
        session.start(self._compute)
        for name in ("ray.data", "ray.train"):
            logging.getLogger(name).setLevel(logging.ERROR)
