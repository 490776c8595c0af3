"""What `plan` says of time: from receipts where there are some, else from what is declared; and when it warns."""

import json
import re
import shutil
from pathlib import Path
from statistics import median

import pytest
from commands import Command

from prism_ray.cli import compose
from prism_ray.device_time import Kind, duration, fleet_warnings, kinds_of, size_warnings
from prism_ray.identity import run_id
from prism_ray.scaling import Actors, Overheads, forecast

ORDINARY = Overheads(checkpoint_s=300.0)
LONG = ["method.iterations=100000", "compute=ray"]


def lines(text: str, name: str) -> list[str]:
    return [line.removeprefix(f"  {name}").strip() for line in text.splitlines() if line.startswith(f"  {name} ")]


def in_seconds(text: str) -> float:
    """The first duration of a line."""
    value, unit = re.findall(r"([\d.,]+) (s|min|h)\b", text)[0]
    return float(value.replace(",", "")) * {"s": 1, "min": 60, "h": 3600}[unit]


# Measured and declared


def test_a_run_with_receipts_is_foreseen_from_their_median(prism: Command, run_dir: Path) -> None:
    receipts = sorted((run_dir / "receipts/synthesize").glob("*.json"))
    seconds = []
    for path, slow in zip(receipts, (1, 1, 1, 5), strict=True):
        receipt = json.loads(path.read_text())
        seconds.append(0.25 * receipt["rows"] * receipt["details"]["iterations"])
        path.write_text(json.dumps({**receipt, "seconds": slow * seconds[-1]}))
    planned = prism("plan", "compute.price_per_hour=7200")
    (unit,) = lines(planned.out, "a unit")
    assert f"in 4 units of run {run_dir.name}" in unit
    assert "measured on " in unit
    assert "assumed" not in unit, "labels were measured too"
    assert in_seconds(unit) == pytest.approx(median(seconds), rel=0.01), "one slow unit changes nothing"
    (time,) = lines(planned.out, "time")
    assert time.startswith("1 actor: "), "inline has one"
    assert float(time.rpartition("cost ")[2]) == pytest.approx(2 * in_seconds(time), rel=0.02)


def test_another_run_of_the_storage_counts_if_its_units_are_made_alike(
    prism: Command, storage: Path, run_dir: Path
) -> None:
    index = storage / "artifacts/same_images/0123456789abcdef"
    index.mkdir(parents=True)
    (index / run_dir.name).touch()
    (unit,) = lines(prism("plan", "seed=1", "labels.views=9").out, "a unit")
    assert f"of run {run_dir.name}, labels assumed at 0.01 TFLOP/s" in unit
    (unit,) = lines(prism("plan", "seed=1").out, "a unit")
    assert unit.endswith(f"of run {run_dir.name}")
    (unit,) = lines(prism("plan", "method.batch_size=4").out, "a unit")
    assert unit.endswith("assumed at 0.01 TFLOP/s")
    (run_dir / "config.yaml").write_bytes(b"{ not: [yaml")
    (unit,) = lines(prism("plan", "seed=1").out, "a unit")
    assert unit.endswith("assumed at 0.01 TFLOP/s")


def test_receipts_of_two_devices_are_two_answers(prism: Command, run_dir: Path) -> None:
    path = sorted((run_dir / "receipts/synthesize").glob("*.json"))[0]
    receipt = json.loads(path.read_text())
    path.write_text(json.dumps({**receipt, "fingerprint": "cuda:Fast 9000|torch", "seconds": 1e-3}))
    units, times = (lines(prism("plan").out, name) for name in ("a unit", "time"))
    assert len(units) == len(times) == 2
    assert ["measured on Fast 9000 in 1 units" in unit for unit in units].count(True) == 1


def test_a_declared_speed_divides_operations(prism: Command, tmp_path: Path) -> None:
    def unit_s(*settings: str) -> float:
        return in_seconds(lines(prism("plan", f"storage={tmp_path}/none", *LONG, *settings).out, "a unit")[0])

    assert unit_s("compute.effective_tflops=0.1") == pytest.approx(unit_s() / 10, rel=0.02)
    halves = unit_s("compute.gpus_per_actor=0.5", "compute.effective_tflops=0.1")
    assert halves == pytest.approx(unit_s() / 5, rel=0.02), "two actors share what the GPU does"


def test_actors_that_are_not_set_are_tried_up_to_as_many_as_there_are_units(prism: Command, tmp_path: Path) -> None:
    planned = prism("plan", f"storage={tmp_path}/none", *LONG, "images_per_class=5", "method.batch_size=5").out
    assert [line.split(":")[0] for line in lines(planned, "time")] == ["1 actor", "8 actors"]
    (time,) = lines(prism("plan", f"storage={tmp_path}/none", *LONG, "compute.actors=3").out, "time")
    assert time.startswith("3 actors: ")


POOLS = (
    "compute.pools={new:{actors:2,gpus:1,tflops:0.4,price_per_hour:3},"
    "old:{actors:4,gpus:1,tflops:0.1,preemptions_per_hour:0.2}}"
)


def test_every_pool_has_its_speed_price_and_share(prism: Command, tmp_path: Path) -> None:
    wanted = ["plan", f"storage={tmp_path}/none", *LONG, "images_per_class=50", POOLS, "compute.mixed_devices=true"]
    new, old = lines(prism(*wanted).out, "a unit")
    assert "of pool new, assumed at 0.4 TFLOP/s" in new
    assert in_seconds(old) == pytest.approx(4 * in_seconds(new), rel=0.02)
    (time,) = lines(prism(*wanted).out, "time")
    assert "cost" not in time, "the price of one pool is not known"
    (time,) = lines(prism(*wanted, "compute.price_per_hour=1").out, "time")
    total, in_new, in_old, cost = (
        float(each)
        for each in re.findall(r"([\d.]+) device-hours \(new ([\d.]+), old ([\d.]+)\).* cost ([\d.]+)", time)[0]
    )
    assert in_old == pytest.approx(2 * in_new, rel=0.02)
    assert total == pytest.approx(in_new + in_old, rel=0.02)
    assert cost == pytest.approx(3 * in_new + in_old, rel=0.02)


def test_a_pool_takes_what_it_does_not_say_from_compute() -> None:
    config = compose(["recipe=digits_smoke", POOLS, "compute.mixed_devices=true", "compute.preemptions_per_hour=2"])
    assert kinds_of(config.compute) == [
        Kind("new", actors=2, gpus=1.0, tflops=0.4, price=3.0, preemptions_per_hour=2.0),
        Kind("old", actors=4, gpus=1.0, tflops=0.1, price=None, preemptions_per_hour=0.2),
    ]


def test_what_is_paid_is_no_part_of_a_run_s_name() -> None:
    named = {
        run_id(compose(["recipe=digits_smoke", *settings]))
        for settings in ([], ["compute.price_per_hour=2"], ["compute.preemptions_per_hour=1"], [POOLS])
    }
    assert len(named) == 1


@pytest.mark.parametrize(
    "setting", ["compute.price_per_hour=-1", "compute.preemptions_per_hour=-0.1", "compute.pools={a:{tflops:0}}"]
)
def test_a_price_a_rate_or_a_speed_below_zero_is_refused(prism: Command, setting: str) -> None:
    refused = prism("plan", setting)
    assert refused.code == 2
    assert refused.err.count("\n") == 1
    assert "expected" in refused.err


def test_what_costs_nothing_or_is_not_known_has_no_time(prism: Command, storage: Path) -> None:
    shutil.rmtree(storage / "runs")
    planned = prism("plan", "method=random_real", "student.labels=[hard]")
    assert planned.code == 0
    assert lines(planned.out, "a unit") == lines(planned.out, "time") == []


# Warnings


@pytest.mark.parametrize(
    ("unit_s", "overheads", "words"),
    [
        ([60.0] * 100, ORDINARY, []),
        ([10.0] * 1000, ORDINARY, ["units of 10 s are small", "method.batch_size"]),
        ([10.0] * 10, ORDINARY, []),
        ([4000.0] * 10, ORDINARY, ["compute.unit_timeout_s=3600", "66.7 min", "raise it to 8000"]),
        ([1200.0] * 10, Overheads(), ["up to 20 min of work", "compute.unit_checkpoint_s=300"]),
        ([1200.0] * 10, ORDINARY, []),
    ],
    ids=["ordinary", "small", "small but few", "longer than a try", "nothing kept", "kept"],
)
def test_sizes_of_units_that_cost_are_warned_about(unit_s: list[float], overheads: Overheads, words: list[str]) -> None:
    found = size_warnings(unit_s, overheads=overheads, timeout_s=3600)
    assert len(found) == bool(words)
    assert all(word in found[0] for word in words)


@pytest.mark.parametrize(
    ("units", "unit_s", "actors", "words"),
    [
        (640, 600.0, 64, []),
        (100, 600.0, 128, ["100 units leave 28 of 128 actors without work"]),
        (65, 3600.0, 64, ["49% of the paid time", "the last of 65 units"]),
        (640, 60.0, 64, ["starts in 30 s, more than 2% of the 10 min"]),
        (10_000, 30.0, 6000, ["the driver is busy"]),
        (30, 60.0, 64, []),
    ],
    ids=["ordinary", "idle", "last round", "short", "driver", "less than an hour"],
)
def test_numbers_of_actors_that_cost_are_warned_about(units: int, unit_s: float, actors: int, words: list[str]) -> None:
    found = forecast([unit_s] * units, [Actors(count=actors)], ORDINARY)
    advice = fleet_warnings([unit_s] * units, actors, found, overheads=ORDINARY)
    assert bool(advice) == bool(words)
    assert all(word in advice[0] for word in words)


def test_durations_have_three_digits_and_a_unit() -> None:
    assert [duration(s) for s in (0.0741, 59.99, 119, 120, 754.3, 7200, 400_000)] == [
        *("0.0741 s", "60 s", "119 s", "2 min", "12.6 min", "2 h", "111 h")
    ]
