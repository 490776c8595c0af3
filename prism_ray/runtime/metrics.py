"""What actors report to Prometheus: units by stage and outcome, images, seconds.

Ray exports them on every node's metrics port with the prefix `ray_`, and with `_total` at the end of a counter's name.
Counters and a histogram only: unlike gauges they stay right when Ray drops the worker's label to keep series few. Ray
makes the histogram's sum up from its buckets: quantiles are to be read from it, averages from the busy seconds. Actors
report every ten seconds, and one that ends takes along what it has not reported: the record is in the receipts.
`cluster/kuberay/components/monitoring` has the dashboard that draws them.
"""

import time
from pathlib import Path

from ray.util.metrics import Counter, Histogram

from prism_ray.ledger import Outcome
from prism_ray.work import SYNTHESIZE, RunSpec, UnitRef

UNITS, IMAGES, UNIT_SECONDS = "prism_units", "prism_images", "prism_unit_seconds"
BUSY_SECONDS, IDLE_SECONDS = "prism_actor_busy_seconds", "prism_actor_idle_seconds"
BUCKETS_S = [1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0]


class UnitMetrics:
    """Counts the units of one actor as they end.

    Args:
        specs: the runs that units belong to; a run's folder name is the label `run`.
    """

    def __init__(self, specs: list[RunSpec]) -> None:
        self._runs = [Path(spec.run_dir).name for spec in specs]
        labels = ("run", "stage")
        self._units = Counter(
            UNITS,
            description="Units that ended, by outcome: done, quarantined, aborted.",
            tag_keys=(*labels, "outcome"),
        )
        self._images = Counter(IMAGES, description="Images synthesized and published.", tag_keys=("run",))
        self._seconds = Histogram(
            UNIT_SECONDS,
            description="Seconds of a unit, failed attempts included.",
            boundaries=BUCKETS_S,
            tag_keys=labels,
        )
        self._busy = Counter(BUSY_SECONDS, description="Seconds that actors spent in units.")
        self._idle = Counter(IDLE_SECONDS, description="Seconds between two units of an actor.")
        self._last_end: float | None = None

    def record(self, ref: UnitRef, outcome: Outcome, seconds: float) -> None:
        """A unit ended just now, after so many seconds."""
        end, labels = time.monotonic(), {"run": self._runs[ref.run], "stage": ref.stage}
        self._units.inc(1, {**labels, "outcome": outcome.status})
        if ref.stage == SYNTHESIZE and outcome.images:
            self._images.inc(outcome.images, {"run": labels["run"]})
        self._seconds.observe(seconds, labels)
        if seconds > 0:
            self._busy.inc(seconds)
        if self._last_end is not None and (idle := end - seconds - self._last_end) > 0:
            self._idle.inc(idle)
        self._last_end = end
