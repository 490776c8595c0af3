"""The short form of benchmarks that measure time: both sides give the same, every figure is there. Never how fast."""

from pathlib import Path

import pytest

from benchmarks import batching, control_plane, feed, guided_sampling, relabel, synthesis_step

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


def test_a_synthesis_step_has_the_losses_of_the_released_structure_and_of_a_bare_loop() -> None:
    cell = synthesis_step.load("digits", 4)
    assert synthesis_step.agree(cell) <= synthesis_step.TOLERANCE
    result = synthesis_step.measure(cell, pairs=1, steps=1)
    assert (result["cell"], result["images"], result["pixels"]) == ("digits", 4, 16)
    assert sum(own["share"] for own in result["sets"]) == pytest.approx(1)
    for own in result["sets"]:
        assert own["ms"].keys() == {"engine", "released", "bare"}
        assert own["gflops"] > 0
        for ratio in ("released_over_engine", "engine_over_bare"):
            assert_spread(own[ratio])


def test_batches_of_every_size_compute_the_same_and_a_loop_over_classes_is_put_beside_them() -> None:
    result = batching.measure("digits", pairs=1, sizes=[1, 10])
    assert result["ce_difference"] <= batching.TOLERANCE
    assert result.keys() >= CIRCUMSTANCES - {"unit"}
    for size in (1, 10):
        assert_spread(result["ms_per_image_iteration"][size])
    assert result["class_wise_over_cross_class"].keys() == {10}
    assert_spread(result["class_wise_over_cross_class"][10][1])


def test_presets_of_guided_sampling_cost_the_operations_that_plan_counts(storage: Path) -> None:
    found = guided_sampling.measure("digits_dfkd_smoke", storage, rows=["freedom"], pairs=1, images=8)
    assert found.keys() == {"unguided", "eda", "eda_faithful", "freedom"}
    for result in found.values():
        assert result["flop_difference"] <= guided_sampling.TOLERANCE
        assert result.keys() >= CIRCUMSTANCES - {"unit", "cell"}
        for figure in ("ms_per_image", "over_unguided", "over_eda_faithful"):
            assert_spread(result[figure])
    assert found["unguided"]["over_unguided"] == [1, 1, 1]
    assert found["unguided"]["guided_steps"] == found["freedom"]["calibration_gflop_per_image"] == 0
    assert found["eda"]["calibration_gflop_per_image"] > 0
    assert found["freedom"]["gflop_per_image"] > found["eda_faithful"]["gflop_per_image"]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_units_that_only_sleep_come_back_once_each_from_actors_without_torch() -> None:
    result = control_plane.measure(units=24, actors=2, sleep_s=0.01)
    assert result["outcomes"] == {"done": 24}
    assert result["units"] == result["distinct"] == 24
    assert result["torch_in_actors"] is False
    assert result["driver_cpu_ms_per_unit"] > 0
