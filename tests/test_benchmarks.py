"""The short form of benchmarks that measure time: both sides give the same, every figure is there. Never how fast."""

from pathlib import Path

import pytest

from benchmarks import control_plane, feed, relabel, scaling
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
