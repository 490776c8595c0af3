"""The scaling model: limits, directions, and figures worked by hand."""

import math
import random
import statistics
import time
from dataclasses import replace

import pytest

from prism_ray.scaling import Actors, Forecast, Overheads, expected_s, forecast

NONE = Overheads(start_s=0, gap_s=0, driver_s=0, recovery_s=0)


def of(units: int, actors: int, unit_s: float = 60.0, overheads: Overheads = NONE, **facts: float) -> Forecast:
    return forecast([unit_s] * units, [Actors(count=actors, **facts)], overheads)  # pyright: ignore[reportArgumentType]


def test_a_run_worked_by_hand() -> None:
    """Ten units of 100 s on four actors are three rounds; every actor starts in 30 s and is idle 2 s after each.

    30 + 3 * 102 = 336 s; four devices are paid 1344 s for 1000 s of work: 0.3733 device-hours, at 3 an hour 1.12.
    Two actors have three units and two have two, so two wait 102 s each: 204 of 1344.
    """
    found = of(10, 4, 100.0, Overheads(start_s=30, gap_s=2, driver_s=0), price=3.0)
    assert found.makespan_s == pytest.approx(336)
    assert found.efficiency == pytest.approx(1000 / 1344)
    assert found.idle == pytest.approx(204 / 1344)
    assert found.device_hours == {"default": pytest.approx(1344 / 3600)}
    assert found.cost == pytest.approx(1.12)


def test_preemptions_worked_by_hand() -> None:
    """A unit of an hour, a loss an hour, two minutes to be back: (1 h + 2 min) (e - 1) = 106.5 min without kept state.

    With state kept every quarter of an hour: 62 min * 4 * (e^0.25 - 1) = 70.4 min.
    """
    hourly = Actors(count=1, preemptions_per_hour=1.0)
    plain = Overheads(start_s=0, gap_s=0, recovery_s=120)
    assert expected_s(3600, hourly, plain) == pytest.approx(60 * 106.53, rel=1e-3)
    assert expected_s(3600, hourly, replace(plain, checkpoint_s=900)) == pytest.approx(60 * 70.44, rel=1e-3)


def test_two_kinds_of_actors_take_from_one_list() -> None:
    """Units of 10 s where they were counted, twice that on the slow one: fast, slow, fast, and both are done at 20."""
    fast, slow = Actors(count=1, name="fast", price=2.0), Actors(count=1, name="slow", slowness=2.0)
    found = forecast([10.0] * 3, [fast, slow], NONE)
    assert found.makespan_s == 20
    assert found.efficiency == 1
    assert found.device_hours == {"fast": pytest.approx(20 / 3600), "slow": pytest.approx(20 / 3600)}
    assert found.cost is None, "one price is not known"


@pytest.mark.parametrize(("units", "actors"), [(1, 1), (7, 3), (64, 64), (65, 64), (3, 8)])
def test_equal_units_are_whole(units: int, actors: int) -> None:
    found = of(units, actors)
    assert found.makespan_s == pytest.approx(60 * math.ceil(units / actors))
    assert found.efficiency == pytest.approx(units / actors / math.ceil(units / actors))
    assert found.efficiency + found.idle == pytest.approx(1)


def test_without_overhead_one_actor_does_nothing_but_work() -> None:
    assert of(9, 1).efficiency == pytest.approx(1)


def test_units_that_differ_end_no_later_than_the_mean_load_and_the_longest() -> None:
    unit_s = [40.0, 35.0, 30.0, 25.0, 20.0, 15.0, 10.0, 5.0] * 3
    found = forecast(unit_s, [Actors(count=5)], NONE)
    assert sum(unit_s) / 5 <= found.makespan_s <= sum(unit_s) / 5 + max(unit_s)


def test_more_actors_are_never_slower_and_never_more_efficient() -> None:
    runs = [of(100, count, overheads=Overheads()) for count in (1, 2, 4, 5, 10, 20, 50, 100, 200)]
    assert [run.makespan_s for run in runs] == sorted((run.makespan_s for run in runs), reverse=True)
    assert [run.efficiency for run in runs] == sorted((run.efficiency for run in runs), reverse=True)


@pytest.mark.parametrize(
    ("name", "values"),
    [("start_s", (0, 1, 60)), ("gap_s", (0, 0.1, 5)), ("recovery_s", (0, 60, 600)), ("checkpoint_s", (5, 20, None))],
)
def test_every_overhead_costs(name: str, values: tuple[float | None, ...]) -> None:
    found = [of(100, 8, overheads=replace(Overheads(), **{name: value}), preemptions_per_hour=2.0) for value in values]
    assert found[0].makespan_s < found[1].makespan_s < found[2].makespan_s
    assert found[0].efficiency > found[1].efficiency > found[2].efficiency


def test_preemptions_cost_more_the_more_there_are() -> None:
    rates = (0.0, 0.01, 0.1, 1.0, 10.0)
    found = [of(100, 8, overheads=Overheads(), preemptions_per_hour=rate).makespan_s for rate in rates]
    assert found == sorted(found)
    assert found[1] == pytest.approx(found[0], rel=1e-3), "no jump where they begin"


@pytest.mark.parametrize(("unit_s", "checkpoint_s", "stretch_s"), [(900, None, 900), (900, 300, 300), (200, 300, 200)])
def test_a_rare_loss_costs_recovery_and_half_of_what_is_not_kept(
    unit_s: float, checkpoint_s: float | None, stretch_s: float
) -> None:
    rate = 0.01
    overheads = Overheads(gap_s=0, recovery_s=120, checkpoint_s=checkpoint_s)
    found = expected_s(unit_s, Actors(count=1, preemptions_per_hour=rate), overheads)
    losses = rate * unit_s / 3600
    assert found - unit_s == pytest.approx(losses * (120 + stretch_s / 2), rel=0.01)


def played(unit_s: float, rate: float, overheads: Overheads, draws: random.Random) -> float:
    """Seconds of one unit that is lost at random moments and goes on from what it kept last."""
    at, kept_s, step_s = 0.0, 0.0, overheads.stretch_s(unit_s)
    loss = draws.expovariate(rate)
    while kept_s < unit_s:
        wanted = min(step_s, unit_s - kept_s)
        if loss < wanted:
            at, loss = at + loss + overheads.recovery_s, draws.expovariate(rate)
        else:
            at, loss, kept_s = at + wanted, loss - wanted, kept_s + wanted
    return at


@pytest.mark.parametrize(("unit_s", "checkpoint_s"), [(3600.0, None), (3600.0, 300.0), (1000.0, 300.0)])
def test_units_that_are_lost_at_random_take_as_long_as_expected(unit_s: float, checkpoint_s: float | None) -> None:
    draws, overheads = random.Random(0), Overheads(gap_s=0, recovery_s=120, checkpoint_s=checkpoint_s)
    mean = statistics.fmean(played(unit_s, 1 / 3600, overheads, draws) for _ in range(20_000))
    expected = expected_s(unit_s, Actors(count=1, preemptions_per_hour=1.0), overheads)
    assert mean == pytest.approx(expected, rel=0.02), "a standard error of 0.7 percent at most"


def test_a_unit_that_keeps_every_step_loses_next_to_nothing() -> None:
    often = Actors(count=1, preemptions_per_hour=1.0)
    overheads = Overheads(gap_s=0, recovery_s=0, checkpoint_s=0)
    assert expected_s(3600, often, overheads) == pytest.approx(3600, rel=1e-3)


def test_the_driver_is_the_bound_where_units_are_too_short_for_the_actors() -> None:
    busy = of(10_000, 1000, 1.0, Overheads(start_s=0, gap_s=0, driver_s=0.004))
    assert busy.driver == pytest.approx(4.0)
    assert busy.makespan_s == pytest.approx(10_000 * 0.004 + 1)
    calm = of(10_000, 1000, 60.0, Overheads(start_s=0, gap_s=0, driver_s=0.004))
    assert calm.driver == pytest.approx(4 / 60)
    assert calm.makespan_s == pytest.approx(600)


def test_a_unit_that_is_always_lost_takes_for_ever_and_is_no_error() -> None:
    found = of(1, 1, 1e6, preemptions_per_hour=1000.0)
    assert found.makespan_s > 1e100
    assert found.efficiency == pytest.approx(0)


def test_actors_that_share_a_device_pay_it_once() -> None:
    whole, halves = of(40, 4, price=2.0), of(40, 4, devices=0.5, price=2.0)
    assert whole.cost is not None
    assert halves.cost == pytest.approx(whole.cost / 2)
    assert halves.efficiency == whole.efficiency


def test_nothing_to_do_is_refused() -> None:
    with pytest.raises(ValueError, match="0 units and 3 actors"):
        of(0, 3)


def test_a_run_of_twenty_thousand_units_is_foreseen_at_once() -> None:
    began = time.process_time()
    assert of(20_000, 64, overheads=Overheads()).makespan_s > 0
    assert time.process_time() - began < 2
