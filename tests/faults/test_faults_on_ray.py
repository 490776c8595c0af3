"""The same on Ray: workers, raylet, head, driver and all together are killed, and units kill their workers."""

import signal

import kinds
import pytest
from kinds import Lab
from product import Tally


def held(tally: Tally, *, faults: int) -> None:
    assert tally.is_passed, "\n".join(tally.problems)
    assert tally.faults >= faults, f"{tally.faults} faults came to act"


def test_a_unit_that_ends_its_process_is_quarantined_and_the_rest_completes(lab: Lab) -> None:
    held(kinds.poison(lab, what=["exit"], on_ray=True), faults=3)


@pytest.mark.slow
def test_killed_workers_cost_at_most_a_unit_each(lab: Lab) -> None:
    held(kinds.workers_killed(lab, kills=3, seed=1), faults=3)


@pytest.mark.slow
def test_a_run_whose_whole_process_group_is_killed_continues(lab: Lab) -> None:
    held(kinds.ray_part_killed(lab, part="whole process group", kills=1, seed=2), faults=1)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", ["driver", "raylet", "head (GCS)"])
def test_a_run_of_which_a_part_is_killed_continues(lab: Lab, part: str) -> None:
    held(kinds.ray_part_killed(lab, part=part, kills=2, seed=3), faults=2)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_units_poisoned_in_every_way_are_quarantined_and_the_rest_completes(lab: Lab) -> None:
    what = ["raise", "segfault", "hang", "exit", "lost_row", "oom", "spin"]
    held(kinds.poison(lab, what=what, timeout_s=30, on_ray=True, limit_s=800), faults=21)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_on_ray_and_all_its_processes(lab: Lab, number: signal.Signals) -> None:
    held(kinds.ray_signalled(lab, number=number, times=1, seed=4), faults=1)


@pytest.mark.slow
def test_a_slow_worker_gets_less_to_do(lab: Lab) -> None:
    held(kinds.slow_worker(lab), faults=1)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_driver_does_not_grow_with_two_thousand_units(lab: Lab) -> None:
    held(kinds.soak(lab, units=2000, on_ray=True), faults=0)


def test_more_gpus_than_there_are_is_refused_before_ray_starts(lab: Lab) -> None:
    held(kinds.too_many_gpus(lab), faults=1)
