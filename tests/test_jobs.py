"""Entry points as jobs of a real cluster: submitted, followed, stopped, continued; and what is refused before."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from commands import products
from head_node import PATIENCE_S, Head, head_node

from prism_ray import jobs
from prism_ray.config import STAGES
from prism_ray.errors import InputError
from prism_ray.submit import check_storage

ROOT = Path(__file__).parents[1]
ENTRY_POINTS = sorted(path.stem for path in (ROOT / "jobs").glob("*.py") if path.stem != "submit")
SMOKE = "recipe=digits_smoke"
TEST_S = 1800  # whichever comes first pays for the cluster, the undisturbed run and two jobs


# Without a cluster.


def test_every_entry_point_is_thin_and_says_what_to_expect_of_it() -> None:
    assert sorted(jobs.STAGES) == ENTRY_POINTS
    for name in ENTRY_POINTS:
        text = (ROOT / "jobs" / f"{name}.py").read_text()
        for heading in ("Reproduces:", "Hardware:", "Time and result:", "How sure:", f"python jobs/{name}.py "):
            assert heading in text, f"jobs/{name}.py lacks {heading!r}"
        code = text.rpartition('"""')[2]
        assert code.split() == f'from prism_ray.jobs import main if __name__ == "__main__": main("{name}")'.split()


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_the_commands_in_an_entry_points_header_are_accepted(name: str) -> None:
    text = (ROOT / "jobs" / f"{name}.py").read_text()
    commands = re.findall(rf"python jobs/{name}\.py (.+)", text)
    assert len(commands) >= 2
    for command in commands:
        verb, settings = jobs.command_of(name, command.split())
        configs = jobs.compose_all(verb, settings)
        check_storage(configs)
        assert set(configs[0].stages) <= set(STAGES)


def test_stages_are_refused_where_the_entry_point_has_its_own() -> None:
    with pytest.raises(InputError, match=r"use jobs/pipeline\.py"):
        jobs.command_of("synthesize", [SMOKE, "stages=[teach]"])


def entry_point(name: str, *settings: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, f"jobs/{name}.py", *settings],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


def test_a_storage_that_a_job_would_not_find_is_refused_before_it_is_submitted() -> None:
    refused = entry_point("submit", "pipeline", SMOKE, "storage=outputs")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "storage=outputs: would lie in the job's working directory" in refused.stderr


def test_a_setting_that_is_wrong_ends_an_entry_point_with_one_line() -> None:
    for settings in (["recipe=nonsense"], [SMOKE, "strict=perhaps"], [SMOKE, "no.such.key=1"]):
        refused = entry_point("pipeline", *settings)
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1), refused.stderr


def test_quarantined_units_end_a_job_with_0_and_a_loud_line_unless_it_is_strict(run_dir: Path) -> None:
    (receipt,) = run_dir.glob("receipts/synthesize/*-00001-of-*.json")
    unit = json.loads(receipt.read_text())
    entry = {"stage": "synthesize", "name": receipt.stem, "unit_id": unit["unit_id"], "attempts": 3, "reason": "poison"}
    path = run_dir / "quarantine/units/synthesize" / receipt.name
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(entry))
    for stage, folder in (("synthesize", "images"), ("relabel", "labels")):
        (run_dir / "receipts" / stage / receipt.name).unlink()
        (run_dir / folder / f"{receipt.stem}.parquet").unlink()
    settings = [SMOKE, "compute=inline", f"storage={run_dir.parents[1]}"]
    strict = entry_point("pipeline", *settings, "strict=true")
    assert strict.returncode == 3, strict.stderr
    lenient = entry_point("pipeline", *settings)
    assert lenient.returncode == 0, lenient.stderr
    assert "UNITS WERE QUARANTINED" in lenient.stdout


PACKAGE = """
import logging, sys, zipfile
from pathlib import Path
from ray._private.runtime_env.packaging import create_package

create_package(".", Path(sys.argv[1]), include_gitignore=True, logger=logging.getLogger("quiet"))
print("\\n".join(zipfile.ZipFile(sys.argv[1]).namelist()))
"""


def test_what_is_uploaded_is_small_and_has_all_that_a_run_needs(tmp_path: Path) -> None:
    package = tmp_path / "package.zip"
    done = subprocess.run(
        [sys.executable, "-c", PACKAGE, str(package)], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stderr
    names = done.stdout.splitlines()
    assert package.stat().st_size < 2_000_000
    tracked = [path.relative_to(ROOT).as_posix() for path in (ROOT / "prism_ray").rglob("*") if path.is_file()]
    needed = [name for name in tracked if "__pycache__" not in name]
    assert any(name.startswith("prism_ray/conf/recipe/") for name in needed)
    assert set(needed) <= set(names)
    assert {f"jobs/{name}.py" for name in ENTRY_POINTS} <= set(names)
    assert not [name for name in names if name.split("/")[0] in ("tests", "outputs", ".git", ".venv", "benchmarks")]


# On a cluster.


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with head_node() as started:
        yield started


@dataclass(frozen=True)
class Story:
    """A run that was submitted, stopped in the middle and submitted again."""

    run_dir: Path
    first: dict[str, object]
    first_log: str
    second: dict[str, object]
    again: subprocess.CompletedProcess[str]


def wait_for(condition: Callable[[], object], what: str) -> None:
    until = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until, f"no {what} within {PATIENCE_S} s"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def story(head: Head, pristine_storage: Path, tmp_path_factory: pytest.TempPathFactory) -> Story:
    """Plain `ray job submit`, `ray job stop` when the first images are there, then jobs/submit.py."""
    storage = tmp_path_factory.mktemp("job") / "outputs"
    shutil.copytree(pristine_storage / "artifacts", storage / "artifacts")
    shutil.rmtree(storage / "artifacts/same_images")
    settings = [SMOKE, f"storage={storage}"]
    command = ["--working-dir", ".", "--runtime-env", "jobs/runtime_env.yaml", "--submission-id", "first", "--no-wait"]
    submitted = head.ray("submit", *command, "--", "python", "jobs/pipeline.py", *settings)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    wait_for(lambda: list(storage.glob("runs/*/images/*.parquet")) or not head.works_on("first"), "image")
    stopped = head.ray("stop", "first")
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    again = head.submit("pipeline", *settings)
    (run_dir,) = (storage / "runs").iterdir()
    return Story(
        run_dir,
        head.job("first"),
        head.ray("logs", "first").stdout,
        head.job(f"pipeline-{run_dir.name}-1"),
        again,
    )


@pytest.mark.slow
@pytest.mark.timeout(TEST_S)
def test_a_job_that_is_stopped_ends_in_order(story: Story) -> None:
    assert story.first["status"] == "STOPPED", story.first_log
    assert "stopped by SIGTERM" in story.first_log
    assert re.search(r"^\[synthesize\] \d/4 units", story.first_log, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.timeout(TEST_S)
def test_the_same_job_submitted_again_continues_to_the_bytes_of_an_undisturbed_run(
    story: Story, pristine_storage: Path
) -> None:
    assert story.again.returncode == 0, story.again.stdout + story.again.stderr
    assert story.second["status"] == "SUCCEEDED"
    (undisturbed,) = (pristine_storage / "runs").iterdir()
    assert products(story.run_dir) == products(undisturbed)
    for name in ("manifest.json", "report/report.html", "README.md", "config.yaml"):
        assert (story.run_dir / name).is_file(), name
    attempts = [json.loads(line) for line in (story.run_dir / "events.jsonl").read_text().splitlines()]
    jobs_of_run = [event["submission_id"] for event in attempts if event["event"] == "job"]
    assert jobs_of_run == ["first", f"pipeline-{story.run_dir.name}-1"]


@pytest.mark.slow
@pytest.mark.timeout(TEST_S)
def test_a_jobs_log_and_metadata_name_the_run(story: Story) -> None:
    line = next(line for line in story.again.stdout.splitlines() if line.startswith(jobs.NOTE))
    noted = json.loads(line.removeprefix(jobs.NOTE))
    assert noted["runs"] == [{"run_id": story.run_dir.name, "url": str(story.run_dir)}]
    expected = {"prism_ray_run_id": story.run_dir.name, "prism_ray_url": str(story.run_dir)}
    assert story.second["metadata"] == expected  # given when it was submitted
    assert story.first["metadata"] == expected  # added by the job itself


@pytest.mark.slow
@pytest.mark.timeout(TEST_S)
def test_a_log_has_calm_lines_and_no_control_characters(story: Story) -> None:
    for log in (story.first_log, story.again.stdout):
        own = [line for line in log.splitlines() if line.startswith("[")]
        assert own
        assert not any("\x1b" in line or "\r" in line for line in own)


@pytest.mark.slow
@pytest.mark.timeout(TEST_S)
def test_who_has_no_token_is_refused(head: Head) -> None:
    submit = ["submit", "--working-dir", ".", "--no-wait", "--submission-id", "intruder", "--", "true"]
    for changed in ({"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": ""}, {"RAY_AUTH_TOKEN": "0" * 64}):
        refused = head.ray(*submit, **changed)
        assert refused.returncode != 0
        assert re.search(r"Unauthorized|Forbidden|[Aa]uthentication", refused.stdout + refused.stderr)
        ours = head.submit("pipeline", SMOKE, "storage=/nowhere", **changed)
        assert (ours.returncode, ours.stderr.count("\n")) == (2, 1), ours.stderr
        assert "asks for a token" in ours.stderr
    body = json.dumps({"entrypoint": "true", "submission_id": "intruder"}).encode()
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(
            urllib.request.Request(f"{head.address}/api/jobs/", data=body, method="POST"), timeout=60
        )
    with caught.value as refusal:
        assert refusal.code in (401, 403)
    with pytest.raises(urllib.error.HTTPError) as caught:
        head.job("intruder")
    with caught.value as missing:
        assert missing.code == 404
