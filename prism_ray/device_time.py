"""How long a run's units take, as measured before or as assumed, and what `plan` says of it.

What is measured are receipts: of this run, or of another run of the storage with the same teachers, generator and
method. The effort of a unit is its images times its iterations (sampling steps), by which units are compared.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from prism_ray.config import ComputeConfig, Config
from prism_ray.documents import parse_yaml
from prism_ray.identity import plain
from prism_ray.ledger import Ledger, Receipt
from prism_ray.options import Executor
from prism_ray.plan import Unit
from prism_ray.report.format import format_digits
from prism_ray.runs import Run
from prism_ray.scaling import HOUR_S, Actors, Forecast, Overheads, forecast
from prism_ray.storage import open_store
from prism_ray.work import RELABEL, SYNTHESIZE

LOOKED_AT = (1, 8, 64)
"""Numbers of actors that are shown where none is set."""
SHARE = 0.02
"""Of the time, that may go elsewhere than into units without a warning."""
IDLE = 0.1
"""Likewise of actors that wait for the last unit."""
WORTH_S = HOUR_S
"""Work of less than this is not warned about."""
MUCH_S = 600.0
"""Work that may be lost at once without a warning."""
OTHER = " (it changes the images)"


@dataclass(frozen=True)
class Pace:
    """How fast one kind of actor made units: medians, and where they are from."""

    device: str
    run: str
    units: int
    effort_s: float
    """Seconds of an image and iteration."""
    label_s: float | None
    """Seconds of all labels of an image; None: not measured."""


@dataclass(frozen=True)
class Work:
    """Operations of every unit: of its images (None: not known yet), and of labels that are stored."""

    units: Sequence[Unit]
    image_flops: Sequence[float] | None
    label_flops: Sequence[float]


@dataclass(frozen=True)
class Kind:
    """Actors that are alike, before their units are timed. `actors` None: as many as fit."""

    name: str
    actors: int | None
    gpus: float
    tflops: float
    price: float | None
    preemptions_per_hour: float


def time_lines(config: Config, run: Run, work: Work) -> list[str]:
    """Seconds of a unit, then time, efficiency and cost on the actors that are set, then what to change."""
    compute = config.compute
    paces = measured(run, with_labels=any(work.label_flops))
    declared = kinds_of(compute)
    if len(declared) > 1 or compute.pools:
        timed = [(kind, paces.get(kind.name)) for kind in declared]
        fleets = [timed]
    else:
        # Without pools, receipts of several devices are several answers, not one fleet.
        fleets = [[(declared[0], pace)] for pace in _by_device(paces)] or [[(declared[0], None)]]
    lines = []
    for fleet in fleets:
        lines += _fleet_lines(compute, work, fleet)
    return lines


def kinds_of(compute: ComputeConfig) -> list[Kind]:
    """The kinds of actors that are set: the pools, or one."""
    if not compute.pools:
        actors = 1 if compute.executor is Executor.inline else compute.actors
        speed, price, losses = compute.effective_tflops, compute.price_per_hour, compute.preemptions_per_hour
        return [Kind("default", actors, compute.gpus_per_actor, speed, price, losses)]
    return [
        Kind(
            name,
            pool.actors,
            _or(pool.gpus, compute.gpus_per_actor),
            _or(pool.tflops, compute.effective_tflops),
            compute.price_per_hour if pool.price_per_hour is None else pool.price_per_hour,
            _or(pool.preemptions_per_hour, compute.preemptions_per_hour),
        )
        for name, pool in compute.pools.items()
    ]


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def measured(run: Run, *, with_labels: bool) -> dict[str, Pace]:
    """By pool and device, how fast units were made: in this run, else in the first other one that makes them alike."""
    root = open_store(run.config.storage)
    others = (key.rpartition("/")[2] for key in root.keys("artifacts/same_images"))
    for name in dict.fromkeys([run.name, *sorted(others)]):
        store = open_store(root.url_of(f"runs/{name}"))
        if store.size("config.yaml") is None:
            continue
        is_own = name == run.name and run.config.run_id is None  # its hash says that everything is the same
        settings = {} if is_own else _settings(store.read("config.yaml"))
        if not is_own and not _alike(run.config, settings, ("teachers", "generator", "method")):
            continue
        labels_too = with_labels and (is_own or _alike(run.config, settings, ("labels",)))
        ledger = Ledger(store)
        images = ledger.receipts(SYNTHESIZE)
        if images:
            return _paces(name, images.values(), ledger.receipts(RELABEL).values() if labels_too else [])
    return {}


def _settings(data: bytes) -> Mapping[str, object]:
    """What a run was begun with; nothing if that can't be read, which `run` and `status` complain about."""
    try:
        return dict(parse_yaml(data.decode())["settings"])
    except (ValueError, LookupError, TypeError, AttributeError):
        return {}


def _alike(config: Config, settings: Mapping[str, object], groups: Sequence[str]) -> bool:
    return all(settings.get(group) == plain(getattr(config, group)) for group in groups)


def _paces(run: str, images: Iterable[Receipt], labels: Iterable[Receipt]) -> dict[str, Pace]:
    """By "POOL" and by "POOL on DEVICE"; actors without pools are those of pool `default`."""
    by_pool: dict[str, list[Receipt]] = defaultdict(list)
    label_s: dict[str, list[float]] = defaultdict(list)
    for receipt in images:
        for key in _keys(receipt):
            by_pool[key].append(receipt)
    for receipt in labels:
        for key in _keys(receipt):
            label_s[key].append(receipt.seconds / max(1, receipt.rows))
    return {
        key: Pace(
            device=_device(receipts[0]),
            run=run,
            units=len(receipts),
            effort_s=median(r.seconds / max(1, r.rows * (r.details.get("iterations") or 1)) for r in receipts),
            label_s=median(label_s[key]) if key in label_s else None,
        )
        for key, receipts in sorted(by_pool.items())
    }


def _keys(receipt: Receipt) -> list[str]:
    pool = receipt.worker.get("pool", "default")
    return [pool, f"{pool} on {_device(receipt)}"]


def _device(receipt: Receipt) -> str:
    return receipt.fingerprint.partition("|")[0].removeprefix("cuda:").removeprefix("cpu:")


def _by_device(paces: Mapping[str, Pace]) -> list[Pace]:
    return [pace for key, pace in paces.items() if " on " in key]


def _seconds(work: Work, kind: Kind, pace: Pace | None) -> tuple[list[float], list[float]] | None:
    """Of every unit, for images and for labels; None where neither operations nor receipts are known."""
    rate = kind.tflops * 1e12 * (min(kind.gpus, 1.0) or 1.0)  # actors that share a GPU share its speed
    if pace is not None:
        images = [pace.effort_s * len(unit.images) * (unit.iterations or 1) for unit in work.units]
    elif work.image_flops is not None:
        images = [flops / rate for flops in work.image_flops]
    else:
        return None
    if pace is None or pace.label_s is None:
        return images, [flops / rate for flops in work.label_flops]
    return images, [pace.label_s * len(unit.images) for unit in work.units]


def _fleet_lines(compute: ComputeConfig, work: Work, fleet: Sequence[tuple[Kind, Pace | None]]) -> list[str]:
    lines, unit_s, slowness = [], [], []
    for kind, pace in fleet:
        found = _seconds(work, kind, pace)
        if found is None:
            return []
        both = [image_s + label_s for image_s, label_s in zip(*found, strict=True)]
        if sum(both) == 0:
            return []
        unit_s = unit_s or both
        slowness.append(sum(both) / sum(unit_s))
        where = f" of pool {kind.name}" if compute.pools else ""
        lines.append(f"  a unit      {_unit_text(*found)}{where}, {_source(kind, pace, any(found[1]))}")
    checkpoint_s = compute.unit_checkpoint_s
    overheads = Overheads(checkpoint_s=checkpoint_s)
    is_set = all(kind.actors is not None for kind, _ in fleet)
    forecasts = []
    for count in (1,) if is_set else [count for count in LOOKED_AT if count <= max(1, len(unit_s))]:
        actors = [_actors(kind, slow, count) for (kind, _), slow in zip(fleet, slowness, strict=True)]
        forecasts.append((sum(each.count for each in actors), forecast(unit_s, actors, overheads)))
    lines += [f"  time        {_time_text(*each, named=bool(compute.pools))}" for each in forecasts]
    advice = size_warnings(unit_s, max(slowness), overheads=overheads, timeout_s=compute.unit_timeout_s)
    if is_set:
        advice += fleet_warnings(unit_s, *forecasts[0], overheads=overheads)
    return lines + [f"  warning     {text}" for text in advice]


def _actors(kind: Kind, slowness: float, count: int) -> Actors:
    return Actors(
        count=kind.actors or count,
        name=kind.name,
        slowness=slowness,
        devices=kind.gpus or 1.0,
        price=kind.price,
        preemptions_per_hour=kind.preemptions_per_hour,
    )


def _unit_text(image_s: Sequence[float], label_s: Sequence[float]) -> str:
    text = duration(median(image_s))
    if max(image_s) > 1.001 * min(image_s):
        text += f" ({duration(min(image_s))} to {duration(max(image_s))})"
    return f"{text} for images, {duration(median(label_s))} for labels" if any(label_s) else f"{text} for images"


def _source(kind: Kind, pace: Pace | None, has_labels: bool) -> str:
    assumed = f"assumed at {kind.tflops:g} TFLOP/s"
    if pace is None:
        return assumed
    only = f", labels {assumed}" if has_labels and pace.label_s is None else ""
    return f"measured on {pace.device} in {pace.units} units of run {pace.run}{only}"


def _time_text(count: int, found: Forecast, *, named: bool) -> str:
    hours = sum(found.device_hours.values())
    parts = [
        f"{count} actor{'s' if count > 1 else ''}: {duration(found.makespan_s)}",
        f"{format_digits(hours)} device-hours",
        f"{found.efficiency:.0%} of them work",
    ]
    if named:
        parts.insert(2, "(" + ", ".join(f"{n} {format_digits(h)}" for n, h in found.device_hours.items()) + ")")
    if found.cost is not None:
        parts.append(f"cost {format_digits(found.cost)}")
    return ", ".join(parts).replace(", (", " (")


def size_warnings(
    unit_s: Sequence[float], slowness: float = 1.0, *, overheads: Overheads, timeout_s: float
) -> list[str]:
    """What to change where units are too small or too large, a line each.

    Args:
        unit_s: of every unit on the fastest actors, without overheads.
        slowness: of the slowest actors.
        timeout_s: longest try of a unit.
    """
    middle_s, longest_s = median(unit_s), slowness * max(unit_s)
    lines = []
    if longest_s > timeout_s:
        lines.append(
            f"compute.unit_timeout_s={timeout_s:g} ends the longest unit, which takes {duration(longest_s)}: raise it "
            f"to {math.ceil(2 * longest_s)}, or lower method.batch_size{OTHER}"
        )
    stretch_s = overheads.stretch_s(longest_s)
    if stretch_s > MUCH_S:
        lines.append(
            f"a node that is lost takes up to {duration(stretch_s)} of work along: set "
            f"compute.unit_checkpoint_s={MUCH_S / 2:g}"
        )
    if sum(unit_s) >= WORTH_S and overheads.gap_s > SHARE * middle_s:
        lines.append(
            f"units of {duration(middle_s)} are small: to hand out and publish each takes {overheads.gap_s:g} s, more "
            f"than {SHARE:.0%}; raise method.batch_size{OTHER}"
        )
    return lines


def fleet_warnings(unit_s: Sequence[float], actors: int, found: Forecast, *, overheads: Overheads) -> list[str]:
    """What to change where so many actors are too many, a line each; nothing for less than an hour of work."""
    lines = []
    if sum(unit_s) < WORTH_S:
        return lines
    if found.driver > 0.5:
        lines.append(f"the driver is busy {found.driver:.0%} of the time: fewer actors than {actors}, or larger units")
    own_s = sum(unit_s) / actors
    if len(unit_s) < actors:
        lines.append(
            f"{len(unit_s)} units leave {actors - len(unit_s)} of {actors} actors without work: fewer actors, or a "
            f"lower method.batch_size{OTHER}"
        )
    elif found.idle > IDLE:
        lines.append(
            f"{found.idle:.0%} of the paid time is waiting for the last of {len(unit_s)} units: fewer actors than "
            f"{actors}, or a lower method.batch_size{OTHER}"
        )
    if overheads.start_s > SHARE * own_s:
        lines.append(
            f"an actor starts in {overheads.start_s:g} s, more than {SHARE:.0%} of the {duration(own_s)} that it "
            f"works; fewer than {actors} cost less"
        )
    return lines


def duration(seconds: float) -> str:
    """Three digits in seconds, minutes or hours."""
    for size, name in ((7200.0, "h"), (120.0, "min")):
        if seconds >= size:
            return f"{format_digits(seconds / (size / 2))} {name}"
    return f"{format_digits(seconds)} s"
