"""The real pipeline while its cluster changes: the bytes of a run that nothing disturbed, and no unit lost.

Each test runs `benchmarks/elastic.py`, which has a cluster of its own.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks/elastic.py"
FEW = ["images_per_class=2", "student.labels=[hard]"]


def elastic(scenario: str, storage: Path, *arguments: str, timeout_s: float) -> dict[str, Any]:
    command = [sys.executable, str(SCRIPT), scenario, "--storage", str(storage), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    assert done.stdout, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["passed"], result
    return result


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_node_that_is_killed_in_a_unit_costs_that_unit_alone(tmp_path: Path) -> None:
    result = elastic("killed", tmp_path, "--units-s=4", *FEW, timeout_s=590)
    assert result["identical"]
    assert len(result["begun_again"]) == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_four_nodes_of_one_gpu_make_the_bytes_of_one_process(tmp_path: Path) -> None:
    result = elastic("raylets", tmp_path, timeout_s=890)
    assert (result["units"], result["begun_again"]) == (12, [])
    assert result["units_by_pool_and_type"] == {"gpu:A100": 12}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_outlives_nodes_that_are_killed_drained_and_added(tmp_path: Path) -> None:
    result = elastic("changing", tmp_path, timeout_s=890)
    assert set(result["units_by_pool_and_type"]) == {"big:A100", "small:T4"}
    assert len(result["begun_again"]) <= 2, "a lost node costs no more than the units it was making"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_an_autoscaler_starts_three_workers_for_a_run_and_takes_them_away_again(tmp_path: Path) -> None:
    result = elastic("autoscaler", tmp_path, timeout_s=1790)
    assert max(workers for _, workers in result["workers_at_s"]) == 3
    assert result["workers_at_s"][-1][1] == 0
    assert result["begun_again"] == []
