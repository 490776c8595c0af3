"""Nothing lost, nothing doubled, whatever happens to a run: a few faults of each kind, inline.

All of them, with figures: `benchmarks/faults.py`.
"""

import signal

import kinds
import pytest
from kinds import CRASH_POINTS, DAMAGE, Lab
from product import Tally


def held(tally: Tally, *, faults: int) -> None:
    assert tally.is_passed, "\n".join(tally.problems)
    assert tally.faults >= faults, f"{tally.faults} faults came to act"


def test_a_killed_driver_costs_at_most_the_unit_in_flight(lab: Lab) -> None:
    held(kinds.driver_killed(lab, kills=3, per_run=3, seed=1), faults=3)


@pytest.mark.slow
def test_a_run_that_is_killed_fifty_times_still_ends(lab: Lab) -> None:
    held(kinds.killed_again_and_again(lab, cycles=50, seed=2), faults=50)


SOME_POINTS = (
    "half of a temporary shard",
    "between images and receipt",
    "before a receipt",
    "before a student's folder gets its name",
    "before the manifest",
)


@pytest.mark.parametrize("point", SOME_POINTS)
def test_a_process_that_dies_while_it_publishes_leaves_a_unit_complete_or_absent(lab: Lab, point: str) -> None:
    held(kinds.crashed_at(lab, [point]), faults=1)


@pytest.mark.slow
@pytest.mark.parametrize("point", [point for point in CRASH_POINTS if point not in SOME_POINTS])
def test_a_process_that_dies_at_any_point_leaves_a_unit_complete_or_absent(lab: Lab, point: str) -> None:
    held(kinds.crashed_at(lab, [point]), faults=1)


def test_a_process_may_die_at_any_file_operation(lab: Lab) -> None:
    held(kinds.crashed_anywhere(lab, crashes=3, seed=3), faults=2)


def test_a_disk_that_fills_up_is_one_line_and_no_manifest(lab: Lab) -> None:
    held(kinds.disk_full_anywhere(lab, times=3, seed=4), faults=3)


def test_a_write_that_fails_is_one_line_and_no_manifest(lab: Lab) -> None:
    held(kinds.write_error_anywhere(lab, times=3, seed=5), faults=2)


def test_a_run_goes_on_when_its_full_disk_has_room_again(lab: Lab) -> None:
    tally = kinds.disk_full(lab, sizes_kb=[200])
    if tally.notes:
        pytest.skip(tally.notes[0])
    held(tally, faults=1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_at_any_moment_is_an_orderly_end(lab: Lab, number: signal.Signals) -> None:
    held(kinds.signalled(lab, number=number, times=2, seed=6), faults=2)


def test_the_same_command_twice_at_once_is_refused_and_harms_nothing(lab: Lab) -> None:
    held(kinds.two_drivers(lab, times=1), faults=1)


@pytest.mark.slow
def test_of_two_commands_started_at_the_same_moment_one_drives(lab: Lab) -> None:
    held(kinds.two_drivers(lab, times=4), faults=4)


def test_changed_settings_under_the_same_run_id_are_refused_by_name(lab: Lab) -> None:
    held(kinds.changed_settings(lab), faults=3)


@pytest.mark.parametrize("kind", ["flipped bit", "swapped"])
def test_damage_is_found_and_made_again(lab: Lab, kind: str) -> None:
    held(kinds.damaged(lab, kind=kind, shards=4, seed=7), faults=4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*DAMAGE, "swapped"])
def test_ten_damaged_shards_of_each_kind_are_found_and_made_again(lab: Lab, kind: str) -> None:
    held(kinds.damaged(lab, kind=kind, shards=10, seed=8), faults=10)


def test_units_that_always_fail_are_quarantined_and_the_rest_completes(lab: Lab) -> None:
    held(kinds.poison(lab, what=kinds.IMAGE_POISON, on_ray=False), faults=24)


@pytest.mark.slow
def test_labels_that_always_fail_are_quarantined_and_the_rest_completes(lab: Lab) -> None:
    held(kinds.poison(lab, what=kinds.LABEL_POISON, stage="relabel", on_ray=False), faults=21)


def test_a_unit_that_hangs_inline_is_cut_and_quarantined_by_the_next_command(lab: Lab) -> None:
    held(kinds.hanging_inline(lab, what="hang", tries=1), faults=1)


@pytest.mark.slow
def test_a_unit_that_hangs_in_c_code_is_cut_too(lab: Lab) -> None:
    held(kinds.hanging_inline(lab, what="spin", tries=1), faults=1)


def test_units_in_any_order_are_the_same_bytes(lab: Lab) -> None:
    held(kinds.orders(lab, shuffles=1, on_ray=False), faults=0)


def test_a_clock_that_jumps_changes_nothing(lab: Lab) -> None:
    held(kinds.clock_jumps(lab, jumps=[-86400.0]), faults=1)


def test_a_c_locale_and_an_odd_path_change_nothing(lab: Lab) -> None:
    held(kinds.odd_places(lab, names=["Unicode in the path, C locale"]), faults=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(kinds.PLACES))
def test_locales_time_zones_and_paths_change_nothing(lab: Lab, name: str) -> None:
    held(kinds.odd_places(lab, names=[name]), faults=1)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_object_store_may_spoil_a_tenth_of_all_requests(lab: Lab) -> None:
    held(kinds.object_store_faults(lab, seeds=[0]), faults=20)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_driver_on_an_object_store_costs_at_most_the_unit_in_flight(lab: Lab) -> None:
    held(kinds.object_store_kills(lab, kills=3), faults=3)


@pytest.mark.slow
def test_two_thousand_small_units_are_all_there(lab: Lab) -> None:
    held(kinds.soak(lab, units=2000, on_ray=False), faults=0)
