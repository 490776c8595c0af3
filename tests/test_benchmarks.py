"""The short form of benchmarks that measure time: both sides give the same, every figure is there. Never how fast."""

import pytest

from benchmarks import control_plane, feed, relabel

CIRCUMSTANCES = {"torch", "machine", "threads", "pairs", "load", "commit", "unit", "cell"}


def assert_spread(values: list[float]) -> None:
    middle, least, most = values
    assert 0 < least <= middle <= most


@pytest.mark.parametrize("cell", ["digits", "fashion_mnist_frobenius"])
def test_a_naive_loop_over_views_writes_the_labels_that_relabel_stores(cell: str) -> None:
    result = relabel.measure(cell, pairs=1, views=2, num_images=20)
    assert result["label_difference"] <= relabel.TOLERANCE
    assert result.keys() >= CIRCUMSTANCES
    assert (result["images"], result["views"]) == (20, 2)
    assert result["us"].keys() == {"naive", "stage"}
    assert_spread(result["naive_over_stage"])


def test_a_loader_of_files_shows_what_a_student_is_fed() -> None:
    result = feed.measure("digits", pairs=1, steps=3, num_images=20)
    assert result["pixel_difference"] <= feed.TOLERANCE
    assert result.keys() >= CIRCUMSTANCES
    assert result["ms"].keys() == {"loader", "memory", "mapped", "labels", "training"}
    for own in ("memory", "mapped"):
        assert_spread(result[f"loader_over_{own}"])
        assert 0 < result["wait_share"][own] < 1
    assert 0 < result["label_share"] < 1


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_units_that_only_sleep_come_back_once_each_from_actors_without_torch() -> None:
    result = control_plane.measure(units=24, actors=2, sleep_s=0.01)
    assert result["outcomes"] == {"done": 24}
    assert result["units"] == result["distinct"] == 24
    assert result["torch_in_actors"] is False
    assert result["driver_cpu_ms_per_unit"] > 0
