"""The reference executor: everything in this process, one after another. No Ray."""

import os
import socket
from collections.abc import Iterator, Sequence
from typing import Self

from prism_ray.ledger import Outcome
from prism_ray.work import Chain, Item, RunSpec, UnitRef


class InlineRuntime:
    """Runs units and trainings here. A unit that kills its process kills the run: the next call continues."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def start(self) -> None:
        """Nothing to start."""

    def units(self, specs: Sequence[RunSpec], chains: Sequence[Chain]) -> Iterator[tuple[UnitRef, Outcome]]:
        """Make units in the given order, yielding how each ended."""
        from prism_ray.stages.worker import Worker

        node = f"{socket.gethostname()}-{os.getpid()}"
        worker = Worker(specs, node=node, live_nodes=lambda: {node})
        for chain in chains:
            outcomes = worker.process(chain)
            yield from outcomes
            if any(outcome.status == "aborted" for _, outcome in outcomes):
                return

    def train(self, items: Sequence[Item]) -> None:
        """Do every item of a list."""
        from prism_ray.stages.item_worker import ItemWorker

        worker = ItemWorker()
        for item in items:
            worker.process(item)
