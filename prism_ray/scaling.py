"""How long units take on so many actors, what of the paid time is work, and what it costs. Arithmetic alone.

    E(tau) = (1 / lambda + R) (exp(lambda tau) - 1)

is the time in which a stretch of tau seconds is done by an actor that is lost lambda times a second without notice,
begins the stretch anew and needs R seconds to be back; tau for lambda = 0. A stretch is a whole unit, or what lies
between two times that it keeps its state. To first order in lambda a loss costs R and half a stretch.
Source: Daly 2006, "A higher order estimate of the optimum checkpoint interval for restart dumps", eq. 13, with
recovery that is not itself interrupted.

Left out: units that slow each other down on one device or one link, writing of kept state, labels, which keep none,
retries of units that fail, preparation, teachers and students. A node that leaves with notice loses less than this.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

HOUR_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class Overheads:
    """Seconds that are paid and do no work."""

    start_s: float = 30.0
    """From an actor's start to its first unit: process, imports, models. Assumed; all actors start at once."""
    gap_s: float = 0.5
    """Of an actor between two units: 0.1 for the hand-over (`benchmarks/control_plane.py`, eight actors on two busy
    cores) and 0.4 assumed for ten requests to an object store."""
    driver_s: float = 0.0037
    """CPU time of the driver for a unit (the same benchmark); the driver hands units out one after another."""
    recovery_s: float = 120.0
    """From the loss of an actor to its successor's first unit. Assumed; how long a new node takes is the cloud's."""
    checkpoint_s: float | None = None
    """Between two times that a unit keeps its state; None: never."""

    def stretch_s(self, work_s: float) -> float:
        """Most of so much work on a unit that is lost at once; a second where every step is kept."""
        return work_s if self.checkpoint_s is None else min(work_s, max(self.checkpoint_s, 1.0))


@dataclass(frozen=True, kw_only=True)
class Actors:
    """Actors that are alike.

    `slowness` are seconds on one of them of a unit that takes a second where units were counted; `devices` what each
    of them holds, fractions where they share one; `price` of a device for an hour, in any currency.
    """

    count: int
    name: str = "default"
    slowness: float = 1.0
    devices: float = 1.0
    price: float | None = None
    preemptions_per_hour: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What is to be expected of a list of units.

    `efficiency` is the share of the paid device-seconds in which a unit is worked on and that work counts, 0 to 1;
    `idle` the share in which actors wait for the last unit; `driver` how busy the driver is, where above 1 all wait for
    it. `cost` is None where some price is not known.
    """

    makespan_s: float
    efficiency: float
    idle: float
    driver: float
    device_hours: dict[str, float]
    cost: float | None


def expected_s(unit_s: float, actors: Actors, overheads: Overheads) -> float:
    """Seconds in which such an actor is expected to be done with a unit of so many, losses and hand-over included."""
    work_s = unit_s * actors.slowness
    rate = actors.preemptions_per_hour / HOUR_S
    if rate == 0 or work_s == 0:
        return work_s + overheads.gap_s
    stretch_s = overheads.stretch_s(work_s)
    full, rest_s = divmod(work_s, stretch_s)
    growth = full * math.expm1(min(rate * stretch_s, 700.0)) + math.expm1(min(rate * rest_s, 700.0))
    return (1 / rate + overheads.recovery_s) * growth + overheads.gap_s


def forecast(unit_s: Sequence[float], actors: Sequence[Actors], overheads: Overheads) -> Forecast:
    """The units in their order, each taken by the actor that is free first, as `runtime.units` hands them out.

    Units are whole: so many equal ones on A actors take ceil(units / A) times one. All devices are paid until the last
    unit is done. Actors without a unit are paid too.

    Args:
        unit_s: work of each unit, seconds where `slowness` is 1.

    Raises:
        ValueError: there is no unit or no actor.
    """
    kinds = [kind for kind in actors for _ in range(kind.count)]
    if not unit_s or not kinds:
        raise ValueError(f"{len(unit_s)} units and {len(kinds)} actors; expected at least one of each")
    free = [(overheads.start_s, number) for number in range(len(kinds))]
    known: dict[tuple[float, int], float] = {}  # few units differ
    useful_s = 0.0
    for work_s in unit_s:
        at, number = heapq.heappop(free)
        kind = kinds[number]
        key = (work_s, id(kind))
        if key not in known:
            known[key] = expected_s(work_s, kind, overheads)
        useful_s += work_s * kind.slowness * kind.devices
        heapq.heappush(free, (at + known[key], number))
    busy_s = max(at for at, _ in free)
    makespan_s = max(busy_s, overheads.start_s + len(unit_s) * overheads.driver_s + min(known.values()))
    waiting_s = sum((busy_s - at) * kinds[number].devices for at, number in free)
    paid_s = makespan_s * sum(kind.devices for kind in kinds)
    device_hours: dict[str, float] = {}
    for kind in actors:
        hours = kind.count * kind.devices * makespan_s / HOUR_S
        device_hours[kind.name] = device_hours.get(kind.name, 0.0) + hours
    prices = [kind.price for kind in kinds if kind.price is not None]
    cost = sum(kind.price * kind.devices for kind in kinds if kind.price is not None) * makespan_s / HOUR_S
    return Forecast(
        makespan_s=makespan_s,
        efficiency=useful_s / paid_s,
        idle=waiting_s / paid_s,
        driver=len(unit_s) * overheads.driver_s / max(busy_s - overheads.start_s, 1e-9),
        device_hours=device_hours,
        cost=cost if len(prices) == len(kinds) else None,
    )
