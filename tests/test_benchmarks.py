"""The short form of benchmarks that measure time: both sides give the same, every figure is there. Never how fast."""

from pathlib import Path

import pytest

from benchmarks import (
    batching,
    control_plane,
    feed,
    guided_sampling,
    image_bytes,
    pipeline,
    relabel,
    scaling,
    synthesis_step,
)
from prism_ray.cli import compose
from prism_ray.device_time import duration
from prism_ray.inspection import plan_text

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


def test_a_shard_of_a_hundred_images_takes_hardly_more_than_their_files() -> None:
    result = image_bytes.measure("fashion_mnist", num_images=100)
    assert 0.9 < result["shard_over_files"] < 1.1
    assert result["manifest_share"] < result["receipt_share"] < 0.01


def test_a_recipe_on_paper_takes_what_plan_says(tmp_path: Path) -> None:
    settings = ["recipe=digits_smoke", "method.iterations=9000000", f"storage={tmp_path}/none"]
    overheads = scaling.overheads_of(settings)
    result = scaling.foresee(scaling.seconds(settings, 0.01), 2, overheads=overheads)
    assert result.warnings
    told = plan_text(compose([*settings, "compute.actors=2", "compute.effective_tflops=0.01"]))
    assert f"2 actors: {duration(result.forecasts[0].makespan_s)}," in told
    assert [f"warning     {text}" in told for text in result.warnings] == [True] * len(result.warnings)
    times = [found.makespan_s for found in result.forecasts]
    assert times == sorted(times)


def test_the_table_on_paper_has_every_run_on_every_number_of_devices() -> None:
    rows = (scaling.ROOT / "benchmarks/results/scaling.md").read_text().splitlines()
    for recipe, images_per_class in scaling.RUNS:
        found = [row.split("|")[5].strip() for row in rows if row.startswith(f"| `{recipe}`, {images_per_class} |")]
        assert found == [str(devices) for devices in scaling.DEVICES] * len(scaling.TFLOPS)


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


@pytest.mark.slow
@pytest.mark.timeout(300)
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
    assert len(result["driver_rss_mb"]) == len(result["by_tenth"]) + 1 == 11
    assert (result["preemptions"], result["recovery_s"]) == (0, None)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_units_of_actors_that_end_themselves_come_back_once_each_and_the_model_is_told_so() -> None:
    result = control_plane.measure(units=24, actors=2, sleep_s=0.5, preemptions_per_hour=600)
    assert result["outcomes"] == {"done": 24}
    assert result["units"] == result["distinct"] == 24
    assert result["preemptions"] > 0
    assert result["recovery_s"] > 0
    assert result["model"]["makespan_s"] > 24 * 0.5 / 2
    assert result["scale"] == 120


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_run_on_ray_is_put_beside_a_loop_over_the_same_units(tmp_path: Path) -> None:
    lab = pipeline.Lab(tmp_path)
    result = pipeline.one_actor(lab, unit_s=0.1, units=10, pairs=1)
    for side in ("ray", "bare"):
        assert_spread(result["unit_s"][side])
    assert_spread(result["ratio"])
    assert 0 < result["making"][0] < 1
    assert result["start_s"][0] > 0
    pair = pipeline.two_actors(lab, unit_s=0.1, units=400, pairs=1, turn_s=3)
    assert_spread(pair["ratio"])
    assert_spread(pair["over_one_actor"])
    assert all(0 < cores[0] < 2.5 for cores in pair["cores"].values())
    assert 0 < pipeline.publish(lab, pairs=1)["ms"][0] < 5000
    again = pipeline.finished(lab, units=20, pairs=1)
    assert again["s"].keys() == {"20"}
