"""What a pilot round decides: more guidance for missed classes, wider prompts for classes that are all alike."""

import pytest

from prism_ray.methods.diffusion.adaptation import dealt, strengths, wide_shares


def test_the_best_class_keeps_its_scale_and_others_gain_by_what_they_lack() -> None:
    assert strengths({0: 0.9, 1: 0.4, 2: 0.9}, gain=2.0) == pytest.approx({0: 1.0, 1: 2.0, 2: 1.0})


def test_without_gain_all_classes_are_guided_alike() -> None:
    assert set(strengths({0: 0.1, 1: 1.0}, gain=0.0).values()) == {1.0}


def test_the_most_diverse_class_gets_plain_prompts_and_one_of_equal_samples_the_most_wide_ones() -> None:
    assert wide_shares({0: 0.2, 1: 0.1, 2: 0.0}, most=0.5) == pytest.approx({0: 0.0, 1: 0.25, 2: 0.5})


def test_a_pilot_without_any_diversity_widens_every_class() -> None:
    assert wide_shares({0: 0.0, 1: 0.0}, most=0.4) == {0: 0.4, 1: 0.4}


@pytest.mark.parametrize("share", [0.0, 0.25, 0.3, 1.0])
def test_wide_prompts_are_spread_evenly_and_each_list_is_used_in_turn(share: float) -> None:
    prompts = [dealt(["p0", "p1", "p2"], ["w0", "w1"], k, share=share) for k in range(40)]
    wide = [prompt for prompt in prompts if prompt.startswith("w")]
    assert len(wide) == int(40 * share)
    assert wide == [f"w{n % 2}" for n in range(len(wide))]
    plain = [prompt for prompt in prompts if prompt.startswith("p")]
    assert plain == [f"p{n % 3}" for n in range(len(plain))]


def test_where_one_list_is_empty_the_other_serves() -> None:
    assert [dealt([], ["a", "b"], k, share=0.0) for k in range(3)] == ["a", "b", "a"]
    assert [dealt(["a"], [], k, share=1.0) for k in range(2)] == ["a", "a"]
