"""The command line on a real, small run: every verb, every way to end, nothing done twice."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from commands import Command, Result, products

from prism_ray import __version__
from prism_ray.cli import VERBS, compose
from prism_ray.stages.synthesize import Synthesizer
from prism_ray.storage import LocalStore


def python(program: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
        timeout=60,
    )


def is_one_line(text: str) -> bool:
    return text.startswith("prism-ray: ") and text.count("\n") == 1 and text.endswith("\n")


def refused(result: Result, *words: str) -> None:
    """Exit code 2 and one line on stderr with these words."""
    assert result.code == 2, result
    assert is_one_line(result.err), result.err
    for word in words:
        assert word in result.err


# Help


@pytest.mark.parametrize("arguments", [["--help"], [], ["run", "--help"], ["help"]], ids=str)
def test_help_answers_at_once_and_imports_nothing_heavy(arguments: list[str]) -> None:
    started = time.monotonic()
    asked = python(
        "import sys; from prism_ray import cli; code = cli.main(sys.argv[1:]);"
        "print([m for m in ('torch', 'ray', 'hydra', 'timm', 'pyarrow', 'numpy') if m in sys.modules]);"
        "sys.exit(code)",
        *arguments,
    )
    assert time.monotonic() - started < 2
    assert asked.returncode == 0
    assert asked.stderr == ""
    *text, imported = asked.stdout.splitlines()
    assert imported == "[]"
    for word in (*VERBS, "recipe=digits|digits_dfkd", "method=prism", "suite=digits"):
        assert any(word in line for line in text), word


def test_the_version_and_the_module_form_work() -> None:
    asked = subprocess.run([sys.executable, "-m", "prism_ray", "--version"], capture_output=True, text=True, check=True)
    assert asked.stdout == f"{__version__}\n"


def test_looking_imports_no_ray_and_a_status_no_torch(storage: Path) -> None:
    program = (
        "import sys; from prism_ray import cli; code = cli.main(sys.argv[1:]);"
        "print([m for m in ('torch', 'ray', 'timm') if m in sys.modules]); sys.exit(code)"
    )
    # A plan counts the memory of a step, for which networks are built without weights.
    for verb, imported in (("status", "[]"), ("plan", "['torch', 'timm']")):
        asked = python(program, verb, "recipe=digits_smoke", "compute=ray", f"storage={storage}")
        assert (asked.returncode, asked.stdout.splitlines()[-1]) == (0, imported), asked.stderr


# Verbs on a finished run


def test_a_finished_run_done_again_does_no_work(prism: Command, run_dir: Path) -> None:
    def state() -> dict[str, tuple[int, int]]:
        rewritten = ("config.yaml", "environment.json")
        kept = [p for p in run_dir.rglob("*") if p.is_file() and p.parent.name != "lock" and p.name not in rewritten]
        return {str(p): (p.stat().st_mtime_ns, p.stat().st_ino) for p in kept}

    assert prism("run").code == 0  # the report shows paths, so the copy gets one of its own
    before, started = state(), time.monotonic()
    done = prism("run")
    assert time.monotonic() - started < 10
    assert (done.code, done.err) == (0, "")
    assert state() == before
    assert "look at the report:" in done.out


def test_the_run_folder_holds_what_the_documentation_says(run_dir: Path) -> None:
    assert {path.name for path in run_dir.iterdir()} >= {
        "config.yaml",
        "environment.json",
        "manifest.json",
        "events.jsonl",
        "README.md",
        "images",
        "labels",
        "student",
        "metrics",
        "report",
        "receipts",
    }
    assert not list(run_dir.rglob(".tmp/*"))
    manifest = json.loads((run_dir / "manifest.json").read_text())
    found = products(run_dir)
    assert {
        entry["key"]: entry["sha256"] for s in ("synthesize", "relabel", "distill") for entry in manifest[s]
    } == found
    tables = [pq.read_table(path) for path in sorted((run_dir / "images").iterdir())]
    image_ids = [image_id for table in tables for image_id in table["image_id"].to_pylist()]
    assert len(image_ids) == len(set(image_ids)) == 20


def test_a_run_tells_no_host_no_user_and_no_path_in_what_is_shared(run_dir: Path) -> None:
    for name in ("environment.json", "manifest.json", "README.md"):
        text = (run_dir / name).read_text()
        assert os.uname().nodename not in text
        assert str(run_dir) not in text


def test_status_counts_what_is_there(prism: Command, storage: Path) -> None:
    looked = prism("status")
    assert looked.code == 0
    for line in (": done, in", "synthesize  4/4 units", "relabel     4/4 units", "distill     2/2", "quarantine  0"):
        assert line in looked.out


def test_report_is_written_again(prism: Command, run_dir: Path) -> None:
    page = run_dir / "report/report.html"
    page.unlink()
    written = prism("report")
    assert written.code == 0
    assert page.as_uri() in written.out
    assert page.stat().st_size > 1000


def test_verify_is_content_with_a_good_run(prism: Command, storage: Path) -> None:
    verified = prism("verify")
    assert (verified.code, verified.err) == (0, "")
    assert "every object matches its receipt" in verified.out


def test_retry_with_nothing_quarantined_changes_nothing(prism: Command, run_dir: Path) -> None:
    before = products(run_dir)
    again = prism("retry")
    assert again.code == 0
    assert "0 quarantined units" in again.out
    assert products(run_dir) == before


def test_doctor_finds_this_machine_healthy(prism: Command, tmp_path: Path) -> None:
    checked = prism("doctor")
    assert checked.code == 0
    assert "BAD" not in checked.out
    assert not (tmp_path / "outputs").exists(), "looking leaves nothing behind"


def test_doctor_fails_where_nothing_can_be_written(prism: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    checked = prism("doctor", f"storage={tmp_path}/file/x")
    assert checked.code == 1
    assert "BAD storage" in checked.out


def test_a_suite_of_ones_own_shares_teachers_and_gets_one_report(prism: Command, storage: Path, tmp_path: Path) -> None:
    suite = tmp_path / "mine.yaml"
    suite.write_text(
        "recipe: digits_smoke\nrows:\n  prism: [method=prism]\n  real: [method=random_real, 'student.labels=[hard]']\n"
    )
    teachers = sorted((storage / "artifacts/teachers").iterdir())
    done = prism.bare("bench", f"suite={suite}", "compute=inline", f"storage={storage}")
    assert (done.code, done.err) == (0, "")
    assert sorted((storage / "artifacts/teachers").iterdir()) == teachers
    assert len(list((storage / "runs").iterdir())) == 2
    (report,) = (storage / "benches").glob("mine-*/report.html")
    assert report.as_uri() in done.out
    assert all(row in report.read_text() for row in ("prism", "real"))


@pytest.mark.parametrize("verb", ["status", "verify", "report", "retry"])
def test_looking_at_a_run_that_does_not_exist_is_refused_and_makes_nothing(
    prism: Command, tmp_path: Path, verb: str
) -> None:
    refused(prism(verb), "run digits_smoke-prism-", "not found", f"{tmp_path}/outputs/runs")
    assert not (tmp_path / "outputs").exists()


def test_an_unknown_verb_is_refused_with_the_nearest(prism: Command) -> None:
    refused(prism.bare("runn"), "'runn'", "did you mean run?")


# The same command finds the same run


def test_what_does_not_decide_the_output_may_change_between_calls(prism: Command, storage: Path) -> None:
    done = prism("run", "compute.lease_s=12", "compute.max_attempts=1", "student.checkpoint_every=7")
    assert done.code == 0
    assert len(list((storage / "runs").iterdir())) == 1


@pytest.mark.parametrize("verb", ["run", "status", "verify", "report", "retry"])
def test_a_named_run_with_another_setting_is_refused_with_the_key_and_both_values(
    prism: Command, storage: Path, verb: str
) -> None:
    (folder,) = (storage / "runs").iterdir()
    folder.rename(folder.with_name("mine"))
    before = products(folder.with_name("mine"))
    again = prism(verb, "run_id=mine", "method.iterations=9", "seed=3")
    refused(again, "run mine", "method.iterations: 8 → 9", "seed: 0 → 3", "another run_id")
    assert products(folder.with_name("mine")) == before
    if verb == "status":
        assert prism("status", "run_id=mine").code == 0


def test_two_runs_of_other_settings_lie_beside_each_other(prism: Command, storage: Path) -> None:
    assert prism("run", "method.iterations=3", "stages=[synthesize]").code == 0
    assert len(list((storage / "runs").iterdir())) == 2


# Stages


def test_prepare_alone_trains_no_teacher(prism: Command, storage: Path) -> None:
    done = prism("run", "teach.seed=5", "stages=[prepare]", "run_id=second")
    assert done.code == 0
    assert len(list((storage / "artifacts/teachers").iterdir())) == 2, "those of the finished run"
    assert not (storage / "runs/second/manifest.json").exists()


def test_a_command_stops_after_the_stages_it_was_asked_for_and_goes_on_from_there(
    prism: Command, storage: Path, run_dir: Path
) -> None:
    second = storage / "runs/second"
    assert prism("run", "run_id=second", "stages=[prepare,teach]").code == 0
    assert not (second / "images").exists()
    assert "synthesize  0/4" in prism("status", "run_id=second").out
    assert prism("run", "run_id=second", "stages=[synthesize]").code == 0
    assert len(list((second / "images").iterdir())) == 4
    assert not (second / "labels").exists()
    assert prism("run", "run_id=second").code == 0
    assert products(second) == products(run_dir), "the same settings give the same bytes, in however many commands"


def test_leftovers_of_killed_drivers_are_swept(prism: Command, run_dir: Path) -> None:
    LocalStore(run_dir).put(".tmp/0123456789abcdef", b"half a shard")
    assert prism("run").code == 0
    assert list((run_dir / ".tmp").glob("*")) == []


# Failures


def failing_for(index: int, error: Callable[[], BaseException]) -> Any:
    """A compute that fails for one unit of the plan."""
    compute = Synthesizer.compute

    def failing(self: Synthesizer, unit: Any) -> Any:
        if unit.index == index:
            raise error()
        return compute(self, unit)

    return failing


def test_a_unit_that_always_fails_is_left_out_and_named_and_retry_completes_the_run(
    prism: Command, storage: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = storage / "runs/second"
    with monkeypatch.context() as patched:
        patched.setattr(Synthesizer, "compute", failing_for(2, lambda: FloatingPointError("the loss is nan")))
        done = prism("run", "run_id=second")
    assert done.code == 3
    assert done.err == ""
    assert "1 units quarantined; `prism-ray retry`" in done.out
    name = "train-00002-of-00004"
    left_out = {f"images/{name}.parquet", f"labels/{name}.parquet"}
    shards = {key: digest for key, digest in products(run_dir).items() if key.endswith(".parquet")}
    made = {key: digest for key, digest in products(second).items() if key.endswith(".parquet")}
    assert made == {key: digest for key, digest in shards.items() if key not in left_out}, "the others are untouched"
    (entry,) = json.loads((second / "manifest.json").read_text())["quarantined"]
    assert (entry["name"], entry["attempts"], entry["reason"]) == (name, 3, "FloatingPointError: the loss is nan")
    looked = prism("status", "run_id=second")
    assert "quarantine  1 units" in looked.out
    assert "the loss is nan" in looked.out
    assert prism("run", "run_id=second").code == 3, "given up is given up, until retry"
    again = prism("retry", "run_id=second")
    assert again.code == 0
    assert "1 quarantined units" in again.out
    assert products(second) == products(run_dir)
    assert json.loads((second / "manifest.json").read_text())["quarantined"] == []


def test_a_refusal_inside_a_unit_ends_the_run_and_quarantines_nothing(
    prism: Command, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prism_ray.errors import InputError

    monkeypatch.setattr(Synthesizer, "compute", failing_for(1, lambda: InputError("teachers: not of this data set")))
    refused(prism("run", "run_id=second"), "teachers: not of this data set")
    assert not (storage / "runs/second/quarantine").exists()
    assert not (storage / "runs/second/manifest.json").exists()


@pytest.mark.parametrize("after", [0, 12])
def test_a_full_disk_ends_the_run_with_one_line_and_the_same_command_completes_it(
    prism: Command, storage: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    fsync, calls = os.fsync, [0]

    def full(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] > after:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        stopped = prism("run", "run_id=second")
    assert stopped.code == 1
    assert is_one_line(stopped.err), stopped.err
    assert f"{storage}/runs/second" in stopped.err
    assert "bytes free" in stopped.err
    assert not (storage / "runs/second/manifest.json").exists()
    # Its lock could not be released either, and this very process still lives, so one lease passes.
    assert prism("run", "run_id=second", "compute.lease_s=0.5").code == 0
    assert products(storage / "runs/second") == products(run_dir)


def test_a_disk_that_is_full_while_data_is_prepared_is_one_line_too(
    prism: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def full(descriptor: int) -> None:
        if "artifacts" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    stopped = prism("run")
    assert stopped.code == 1
    assert is_one_line(stopped.err), stopped.err
    assert f"{tmp_path}/outputs/artifacts" in stopped.err


def test_an_interrupt_is_one_line_and_the_run_continues(
    prism: Command, storage: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(Synthesizer, "compute", failing_for(2, KeyboardInterrupt))
        stopped = prism("run", "run_id=second")
    assert stopped.code == 130
    assert is_one_line(stopped.err)
    assert len(list((storage / "runs/second/images").iterdir())) == 2
    assert prism("run", "run_id=second").code == 0
    assert products(storage / "runs/second") == products(run_dir)


# Settings as they are typed


@pytest.mark.parametrize(
    "path",
    ["with space", "ünïcode/数字", "a(b)", "~tilde", "x#y", "it's", "a,b", "c=d", "[e]", "f:g", "$h", "back\\slash"],
)
def test_a_path_needs_no_quotes_of_its_own(tmp_path: Path, path: str) -> None:
    assert compose([f"storage={tmp_path}/{path}"]).storage == f"{tmp_path}/{path}"
    assert compose([f"dataset.path={path}"]).dataset.path == path


def test_text_in_quotes_and_null_keep_their_meaning() -> None:
    config = compose(["storage='a b'", 'run_id="c"', "dataset.path=null"])
    assert (config.storage, config.run_id, config.dataset.path) == ("a b", "c", None)


def test_a_teacher_can_be_added_or_completed_in_one_setting_or_several() -> None:
    config = compose(
        [
            "recipe=digits_smoke",
            "teachers.models.new={arch: prism_vgg, model_args: {channels: [4]}}",
            "teachers.models.other.arch=resnet18",
            "teachers.models.other.model_args={stem_width: 8}",
            "teachers.models.vgg.batch_norm=true",
        ]
    )
    models = config.teachers.models
    assert set(models) == {"vgg", "convnet", "new", "other"}
    assert (models["new"].arch, models["new"].model_args, models["new"].source) == (
        "prism_vgg",
        {"channels": [4]},
        "train",
    )
    assert (models["other"].arch, models["other"].model_args) == ("resnet18", {"stem_width": 8})
    assert models["vgg"].model_args == {"channels": [8, 8, 16]}


def test_arguments_of_an_architecture_are_replaced_as_a_whole_or_one_by_one() -> None:
    assert compose(["recipe=digits_smoke", "student.model_args={depth: 3}"]).student.model_args == {"depth": 3}
    assert compose(["recipe=digits_smoke", "student.model_args={}"]).student.model_args == {}
    one = compose(["recipe=digits_smoke", "student.model_args.depth=3"]).student.model_args
    assert one == {"channels": [8, 8], "depth": 3}


def test_a_recipe_of_ones_own_is_a_path_and_names_its_runs(tmp_path: Path) -> None:
    path = tmp_path / "my recipe.yaml"
    path.write_text("images_per_class: 3\nmethod: {iterations: 11}\nstudent: {arch: prism_convnet}\n" + TEACHERS)
    config = compose([f"recipe={path}", "method.iterations=12"])
    assert (config.recipe_name, config.images_per_class, config.method.iterations) == ("my_recipe", 3, 12)


TEACHERS = yaml.safe_dump(
    {
        "teachers": {
            "primary": "vgg",
            "pool": ["vgg", "b", "c", "d"],
            "models": {name: {"arch": "prism_vgg"} for name in ("vgg", "b", "c", "d")},
        }
    }
)
