"""Verbs that look: what they find on a real run, and that `run` repairs what `verify` found."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Command, products

from prism_ray.cli import compose
from prism_ray.config import LabelsConfig
from prism_ray.inspection import estimate_operations, label_blob_bytes, plan_text
from prism_ray.methods.soft_labels import Codec
from prism_ray.plan import guiding_teachers, plan_units

FIRST, SECOND = "images/train-00000-of-00004.parquet", "images/train-00001-of-00004.parquet"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def swap(path: Path) -> None:
    other = path.with_name(Path(SECOND).name)
    first, second = path.read_bytes(), other.read_bytes()
    path.write_bytes(second)
    other.write_bytes(first)


# verify and repair


@pytest.mark.parametrize(
    ("key", "harm", "found"),
    [
        (FIRST, flip, [FIRST]),
        (FIRST, truncate, [FIRST]),
        (FIRST, empty, [FIRST]),
        (FIRST, Path.unlink, [FIRST]),
        (FIRST, swap, [FIRST, SECOND]),
        ("labels/train-00002-of-00004.parquet", flip, None),
        ("student/soft-seed0/model.safetensors", flip, None),
        ("student/hard-seed0/model.safetensors", Path.unlink, None),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_damage_is_found_by_verify_and_repaired_by_run_to_the_same_bytes(
    prism: Command, run_dir: Path, key: str, harm: Callable[[Path], None], found: list[str] | None
) -> None:
    before = products(run_dir)
    harm(run_dir / key)
    looked = prism("verify")
    assert looked.code == 1
    assert looked.err == ""
    named = [line.split(": ")[0] for line in looked.out.splitlines()[:-1]]
    assert set(named) == set(found or [key])
    assert f"`prism-ray run` with the same settings makes {len(named)} of them again" in looked.out
    assert prism("run").code == 0
    assert products(run_dir) == before
    again = prism("verify")
    assert (again.code, "every object matches" in again.out) == (0, True)
    assert (run_dir / "manifest.json").exists()


def test_one_command_looks_and_repairs(prism: Command, run_dir: Path) -> None:
    before = products(run_dir)
    flip(run_dir / FIRST)
    repaired = prism("verify", "repair=true")
    assert repaired.code == 0
    assert FIRST in repaired.out
    assert products(run_dir) == before


def test_a_wrong_size_is_repaired_without_verify(prism: Command, run_dir: Path) -> None:
    before = products(run_dir)
    truncate(run_dir / FIRST)
    done = prism("run")
    assert done.code == 0
    assert f"{FIRST} was damaged and is made again" in done.out
    assert products(run_dir) == before


def test_what_was_damaged_is_kept_aside_for_a_look(prism: Command, run_dir: Path) -> None:
    empty(run_dir / FIRST)
    assert prism("run").code == 0
    assert (run_dir / "quarantine/damaged" / FIRST).stat().st_size == 0


def test_a_foreign_file_among_the_images_is_reported(prism: Command, run_dir: Path) -> None:
    (run_dir / "images/stranger.parquet").write_bytes(b"PAR1")
    looked = prism("verify")
    assert looked.code == 1
    assert "images/stranger.parquet: belongs to no unit of this run" in looked.out


def weights_of_a_teacher(storage: Path) -> Path:
    return next((storage / "artifacts/teachers").glob("vgg-*")) / "model.safetensors"


@pytest.mark.parametrize(
    ("harm", "problem", "refusal"),
    [(flip, "differ from those the run began with", "began with sha256"), (Path.unlink, "are missing", "no weights")],
    ids=["flip", "delete"],
)
def test_another_teacher_than_the_run_began_with_is_found_and_refused(
    prism: Command, storage: Path, harm: Callable[[Path], None], problem: str, refusal: str
) -> None:
    weights = weights_of_a_teacher(storage)
    harm(weights)
    looked = prism("verify")
    assert looked.code == 1
    assert f"{weights.parent}: its weights {problem}" in looked.out
    refused = prism("run")
    assert refused.code == 2
    assert refused.err.count("\n") == 1
    assert refusal in refused.err
    assert "vgg" in refused.err


def test_a_damaged_data_set_is_found(prism: Command, storage: Path) -> None:
    table = next((storage / "artifacts/datasets").glob("digits-*/train-00000.parquet"))
    flip(table)
    looked = prism("verify")
    assert looked.code == 1
    assert f"{table}: differs from what was prepared" in looked.out


@pytest.mark.parametrize("verb", ["status", "verify", "run"])
@pytest.mark.parametrize(
    "name", ["receipts/synthesize/train-00000-of-00004.json", "pins.json", "config.yaml", "manifest.json"]
)
def test_a_damaged_record_is_one_line_with_its_path(prism: Command, run_dir: Path, name: str, verb: str) -> None:
    (run_dir / name).write_bytes(b"{ not: [json")
    looked = prism(verb)
    if (name, verb) == ("pins.json", "status"):
        assert looked.code == 0, "not looked at"
        return
    assert looked.code in (1, 2)
    assert looked.err.count("\n") == 1, looked.err
    assert str(run_dir / name) in looked.err


# plan


def test_plan_counts_units_images_and_labels_before_anything_exists(tmp_path: Path) -> None:
    storage = tmp_path / "outputs"
    settings = ["method=prism_released", "images_per_class=3", "method.batch_size=4"]
    config = compose(["recipe=digits_smoke", *settings, f"storage={storage}"])
    text = plan_text(config)
    for line in (
        "not begun",
        "classes     10",
        "units       9,",
        "images      30 of 16x16",
        "labels      120 views",
        "students    2, 10 steps of 16",
        "iterations  63 in all, per unit [8, 7, 6]",
        "FLOP",
    ):
        assert line in text, text
    assert not storage.exists(), "it makes nothing"


@pytest.mark.parametrize("num_classes", [3, 10, 256, 257])
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("top_k", [None, 1, 9, 300])
def test_plan_expects_labels_of_the_size_that_is_stored(num_classes: int, bits: int, top_k: int | None) -> None:
    labels = LabelsConfig(views=7, bits=bits, top_k=top_k)
    codec = Codec(num_classes, num_views=7, top_k=top_k, bits=bits)
    assert label_blob_bytes(labels, num_classes) == codec.blob_bytes


def test_plan_counts_the_steps_of_epochs_and_the_students_of_a_search(tmp_path: Path) -> None:
    settings = ["student.steps=null", "student.epochs=3", "student.lr_grid=[0.01,0.1]"]
    text = plan_text(compose(["recipe=digits_smoke", f"storage={tmp_path}", *settings]))
    # 20 images three times in batches of 16; two label kinds.
    assert "students    2, 4 steps of 16 images each, and 4 to try learning rates" in text


def test_labels_computed_while_students_train_need_no_storage(tmp_path: Path) -> None:
    online = ["labels.online=true", "labels.top_k=null", "labels.bits=16"]
    config = compose(["recipe=digits_smoke", f"storage={tmp_path}", *online])
    assert "labels      0 views, at most 0 B of logits, computed while students train" in plan_text(config)
    found = estimate_operations(config, plan_units(config, [[0, 1]] * 10), {"vgg": 100.0, "convnet": 7.0})
    assert found.label_flops == 10 * 16 * 100  # one student, 10 steps of 16


def test_plan_knows_the_operations_of_teachers_that_exist(prism: Command, storage: Path) -> None:
    planned = prism("plan", "compute.effective_tflops=0.5")
    assert planned.code == 0
    assert "begun" in planned.out
    assert planned.out.count("FLOP,") == 2
    assert "device-hours at 0.5 TFLOP/s" in planned.out


def test_plan_of_all_real_images_needs_the_prepared_data(prism: Command, tmp_path: Path, storage: Path) -> None:
    everything = ["method=random_real", "images_per_class=null"]
    planned = prism("plan", *everything)
    assert planned.code == 0
    assert "images      1438 of 16x16" in planned.out
    refused = prism("plan", *everything, f"storage={tmp_path}/empty")
    assert refused.code == 2
    assert "stages=[prepare]" in refused.err


@pytest.mark.parametrize("method", ["prism_released", "prism_strict", "prism_coupled", "sre2l"])
def test_the_estimate_counts_each_network_once_per_iteration_it_runs_in(method: str) -> None:
    config = compose(["recipe=digits_smoke", f"method={method}", "method.init=noise", "images_per_class=4"])
    units = plan_units(config, [[0]] * 10)
    forward = {"vgg": 100.0, "convnet": 7.0}
    expected = 0.0
    for unit in units:
        guiding = guiding_teachers(config, unit, 0)
        networks = {*guiding.logits, *guiding.statistics}
        expected += 2 * len(unit.images) * unit.iterations * sum(forward[name] for name in networks)
    found = estimate_operations(config, units, forward)
    assert found.synthesis_flops == expected > 0
    assert found.label_flops == 40 * 4 * 100


def test_a_teacher_with_nothing_to_match_is_not_run() -> None:
    settings = ["method.statistics_probability=1", "teachers.models.convnet.batch_norm=false"]
    config = compose(["recipe=digits_smoke", "method=prism_released", *settings])
    units = plan_units(config, [[0, 1]] * 10)
    steps = sum(len(unit.images) * unit.iterations for unit in units)
    found = estimate_operations(config, units, {"vgg": 100.0, "convnet": 7.0})
    assert found.synthesis_flops == 2 * steps * 100


def test_the_estimate_of_a_round_of_the_pool_counts_one_teacher_per_iteration() -> None:
    roles = ["method.logit_role=active", "method.statistics_role=active"]
    config = compose(["recipe=digits_smoke", "method=sre2l", *roles, "images_per_class=3"])
    units = plan_units(config, [[]] * 10)
    assert sum(unit.iterations for unit in units) % 2 == 0
    found = estimate_operations(config, units, {"vgg": 100.0, "convnet": 7.0})
    assert found.synthesis_flops == 2 * 5 * sum(unit.iterations for unit in units) * (100 + 7) / 2


def test_real_images_cost_no_synthesis() -> None:
    config = compose(["recipe=digits_smoke", "method=random_real"])
    units = plan_units(config, [range(9)] * 10)
    assert estimate_operations(config, units, {"vgg": 100.0}).synthesis_flops == 0


# status


def test_status_of_a_run_that_was_stopped_says_how_far_it_is(prism: Command, run_dir: Path) -> None:
    (run_dir / "manifest.json").unlink()
    (run_dir / "receipts/relabel/train-00003-of-00004.json").unlink()
    looked = prism("status")
    assert looked.code == 0
    for line in (": partial, in", "teach       2/2", "synthesize  4/4", "relabel     3/4", "distill     1/2"):
        assert line in looked.out, looked.out


def test_every_receipt_says_what_it_cost_and_where_it_is_promised_to_repeat(run_dir: Path) -> None:
    for path in (run_dir / "receipts").rglob("*.json"):
        receipt = json.loads(path.read_text())
        assert receipt["seconds"] > 0
        assert receipt["fingerprint"]
        assert receipt["rows"] >= 1


def test_a_student_with_soft_labels_is_bound_to_images_and_labels_and_one_without_to_images(run_dir: Path) -> None:
    shards = {key: digest for key, digest in products(run_dir).items() if key.endswith(".parquet")}
    images = {key: digest for key, digest in shards.items() if key.startswith("images/")}
    for name, expected in (("soft-seed0", shards), ("hard-seed0", images)):
        receipt = json.loads((run_dir / f"receipts/distill/{name}.json").read_text())
        assert receipt["inputs"] == expected


def test_damage_that_run_cannot_mend_stays_a_failure(prism: Command, storage: Path) -> None:
    (shard,) = storage.glob("artifacts/datasets/*/train-00000.parquet")
    flip(shard)
    looked = prism("verify", "repair=true")
    assert looked.code == 1
    assert "differs from what was prepared; delete the folder" in looked.out
    assert "1 damaged; `prism-ray run` with the same settings makes 0 of them again" in looked.out
