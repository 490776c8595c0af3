"""The reference executor: everything in this process, one after another. No Ray."""

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

from prism_ray.ledger import Outcome
from prism_ray.work import RunSpec, TrainingItem, UnitRef


class InlineRuntime:
    """Runs units and trainings here. A unit that kills its process kills the run: the next call continues."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def units(self, specs: Sequence[RunSpec], refs: Sequence[UnitRef]) -> Iterator[tuple[UnitRef, Outcome]]:
        """Make units in plan order, yielding how each ended."""
        from prism_ray.stages.worker import Worker

        node = f"{socket.gethostname()}-{os.getpid()}"
        worker = Worker(specs, node=node, live_nodes=lambda: {node})
        for ref in refs:
            yield ref, worker.process(ref)

    def train(self, items: Sequence[TrainingItem]) -> None:
        """Train every network of a list."""
        from prism_ray.stages.training_worker import TrainingWorker

        worker = TrainingWorker()
        for item in items:
            worker.process(item)

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """One call, where the models are."""
        return function(*arguments)
