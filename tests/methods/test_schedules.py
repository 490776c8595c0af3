from itertools import pairwise

import pytest

from prism_ray.methods.schedules import (
    SCHEDULES,
    cos2_factor,
    cosine_factor,
    cosine_lr,
    half_cosine_factor,
    step_factor,
    with_warmup,
)
from prism_ray.options import Schedule


def test_cosine_lr_of_the_released_budget_has_its_golden_values():
    assert cosine_lr(0.05, step=0, total=500) == 0.05
    assert cosine_lr(0.05, step=250, total=500) == pytest.approx(0.025, rel=1e-12)
    assert cosine_lr(0.05, step=499, total=500) == pytest.approx(4.9e-7, abs=0.05e-7)


def test_cosine_ends_at_zero_one_past_the_last_step():
    assert cosine_factor(40, 40) == pytest.approx(0, abs=1e-15)
    assert cosine_factor(39, 40) > 0


def test_half_cosine_ends_near_one_half():
    assert half_cosine_factor(0, 300) == 1
    assert half_cosine_factor(299, 300) == pytest.approx(0.502618, abs=5e-7)
    assert half_cosine_factor(300, 300) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("epoch", "factor"),
    [(0, 1), (100, 0.956773), (200, 0.834565), (250, 0.75), (251, 0.1225), (275, 0.0625), (299, 0.0025), (300, 0)],
)
def test_cos2_has_the_check_values_of_the_released_schedule(epoch, factor):
    assert cos2_factor(epoch, 300) == pytest.approx(factor, abs=5e-7)


@pytest.mark.parametrize("total", [6, 60, 300, 600, 606])
def test_the_joint_of_cos2_belongs_to_its_first_piece(total):
    assert cos2_factor(total * 5 // 6, total) == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("epoch", "factor"), [(0, 1), (29, 1), (30, 0.1), (59, 0.1), (60, 0.01), (89, 0.01), (90, 0.001), (100, 0.001)]
)
def test_steps_are_a_tenth_at_30_60_and_90_percent(epoch, factor):
    assert step_factor(epoch, 100) == pytest.approx(factor, rel=1e-12)
    assert step_factor(2 * epoch, 200) == step_factor(epoch, 100)


@pytest.mark.parametrize("factor", [cosine_factor, half_cosine_factor, cos2_factor])
def test_factors_start_at_one_and_never_rise(factor):
    values = [factor(step, 97) for step in range(98)]
    assert values[0] == 1
    assert all(later < earlier for earlier, later in pairwise(values))


def test_every_schedule_of_the_settings_has_its_function():
    assert set(SCHEDULES) == {schedule.value for schedule in Schedule}


@pytest.mark.parametrize("factor", SCHEDULES.values())
def test_no_warmup_leaves_a_schedule_as_it_is(factor):
    assert [with_warmup(factor, step, 50, 0.0) for step in range(51)] == [factor(step, 50) for step in range(51)]


@pytest.mark.parametrize("factor", SCHEDULES.values())
def test_warmup_rises_linearly_and_then_runs_the_whole_schedule(factor):
    values = [with_warmup(factor, step, 50, 0.1) for step in range(51)]
    assert values[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0], rel=1e-12)
    assert values[5:] == [factor(step, 45) for step in range(46)]


def test_a_schedule_can_be_all_warmup():
    assert [with_warmup(cosine_factor, step, 4, 1.0) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize("warmup", [-0.1, 1.5, float("nan")])
def test_a_warmup_that_is_no_share_is_refused(warmup):
    with pytest.raises(ValueError, match="0 to 1"):
        with_warmup(cosine_factor, 0, 10, warmup)


@pytest.mark.parametrize("step", [-1, 11])
def test_warmup_refuses_steps_outside_the_schedule(step):
    with pytest.raises(ValueError, match=f"step={step}"):
        with_warmup(cosine_factor, step, 10, 0.5)


@pytest.mark.parametrize(("step", "total"), [(-1, 10), (11, 10), (0, 0)])
@pytest.mark.parametrize("factor", SCHEDULES.values())
def test_steps_outside_the_schedule_are_refused(factor, step, total):
    with pytest.raises(ValueError, match=f"step={step}"):
        factor(step, total)
