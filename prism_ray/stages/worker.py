"""What an executor runs: one object per worker process that does any unit of any stage of the runs it was told of."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from prism_ray.drain import should_stop
from prism_ray.errors import ExitCode
from prism_ray.ledger import Attempt, Outcome, Receipt, run_unit
from prism_ray.plan import Unit
from prism_ray.schema import IMAGE_COLUMNS, LABEL_COLUMNS
from prism_ray.stages.relabel import Relabeler
from prism_ray.stages.synthesize import Synthesizer
from prism_ray.work import SYNTHESIZE, Chain, RunSpec, UnitRef, image_receipt, label_receipt, without_lost

Columns = Sequence[tuple[str, pa.DataType]]


class Worker:
    """Holds plans and teachers of several runs; a stage of a run is built when its first unit comes.

    Args:
        specs: the runs.
        node: name of this worker's node.
        live_nodes: names of the nodes that are alive now and stay so.
        place: what else is known of where this worker is; noted in receipts.
        observe: told of every unit as it ends, with its seconds.
    """

    def __init__(
        self,
        specs: Sequence[RunSpec],
        *,
        node: str,
        live_nodes: Callable[[], Collection[str]],
        place: Mapping[str, Any] | None = None,
        observe: Callable[[UnitRef, Outcome, float], None] = lambda ref, outcome, seconds: None,
    ) -> None:
        self._specs, self._node, self._live_nodes, self._observe = specs, node, live_nodes, observe
        self._place = {"node": node, **(place or {})}
        self._plans: dict[int, list[Unit]] = {}
        self._synthesizers: dict[int, Synthesizer] = {}
        self._relabelers: dict[int, Relabeler] = {}

    def process(self, chain: Chain) -> list[tuple[UnitRef, Outcome]]:
        """Make the units of a chain until one of them is not done; nothing raises for a unit's own fault."""
        outcomes: list[tuple[UnitRef, Outcome]] = []
        for ref in chain:
            started = time.monotonic()
            outcome = self._make(ref)
            self._observe(ref, outcome, time.monotonic() - started)
            outcomes.append((ref, outcome))
            if outcome.status != "done":
                break
        return outcomes

    def _make(self, ref: UnitRef) -> Outcome:
        """One unit, from plan to receipt."""
        spec = self._specs[ref.run]
        ledger = spec.ledger()
        compute = spec.config.compute
        attempt = Attempt(spec.epoch, self._node, self._live_nodes, compute.max_attempts, compute.unit_timeout_s)
        unit = self._plan(ref.run)[ref.unit]
        if should_stop():
            return Outcome("aborted", unit.name, "its node is about to leave", exit_code=int(ExitCode.drained))
        images = None if ref.stage == SYNTHESIZE else ledger.receipt(SYNTHESIZE, unit.name)
        assert images or ref.stage == SYNTHESIZE, f"unit {unit.name} is labelled before its images exist"
        receipt = label_receipt(unit, images) if images else image_receipt(unit)

        def make() -> tuple[pa.Table, Receipt]:
            if images:
                held = without_lost(unit, images.details)
                made = _checked(held, self._relabeler(ref.run).compute(held, receipt), LABEL_COLUMNS)
            else:
                made = self._synthesizer(ref.run).compute(unit)
                made = _checked(without_lost(unit, made[1].details), made, IMAGE_COLUMNS)
            return made[0], replace(made[1], worker={**made[1].worker, **self._place})

        outcome = run_unit(ledger, receipt, make, attempt)
        if outcome.status == "done" and not images and ref.run in self._synthesizers:
            self._synthesizers[ref.run].forget()
        return outcome

    def _plan(self, run: int) -> list[Unit]:
        if run not in self._plans:
            self._plans[run] = self._specs[run].units()
        return self._plans[run]

    def _synthesizer(self, run: int) -> Synthesizer:
        if run not in self._synthesizers:
            self._synthesizers[run] = Synthesizer(self._specs[run])
        return self._synthesizers[run]

    def _relabeler(self, run: int) -> Relabeler:
        if run not in self._relabelers:
            self._relabelers[run] = Relabeler(self._specs[run])
        return self._relabelers[run]


def _checked(unit: Unit, made: tuple[pa.Table, Receipt], columns: Columns) -> tuple[pa.Table, Receipt]:
    """A unit's table as it came, if it holds the unit's images and the columns of its kind."""
    table, planned = made[0], [image.image_id for image in unit.images]
    expected = [name for name, _ in columns]
    if table.column_names != expected:
        raise ValueError(f"the unit's table has columns {table.column_names}, expected {expected}")
    found = table["image_id"].to_pylist()
    if found != planned:
        raise ValueError(f"the unit's table holds images {_few(found)}, planned were {_few(planned)}")
    return made


def _few(names: Sequence[str]) -> str:
    return f"{', '.join(names[:3])}{', …' if len(names) > 3 else ''} ({len(names)})"
