from itertools import pairwise

import pytest

from prism_ray.methods.schedules import cos2_factor, cosine_factor, cosine_lr, half_cosine_factor


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


@pytest.mark.parametrize("factor", [cosine_factor, half_cosine_factor, cos2_factor])
def test_factors_start_at_one_and_never_rise(factor):
    values = [factor(step, 97) for step in range(98)]
    assert values[0] == 1
    assert all(later < earlier for earlier, later in pairwise(values))


@pytest.mark.parametrize(("step", "total"), [(-1, 10), (11, 10), (0, 0)])
@pytest.mark.parametrize("factor", [cosine_factor, half_cosine_factor, cos2_factor])
def test_steps_outside_the_schedule_are_refused(factor, step, total):
    with pytest.raises(ValueError, match=f"step={step}"):
        factor(step, total)
