"""Settings: documented, checked, and hashed exactly where they decide the output."""

import copy
import os
import subprocess
import sys
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

import prism_ray
from prism_ray.cli import compose, compose_suite
from prism_ray.config import Config, TeacherConfig
from prism_ray.errors import InputError
from prism_ray.identity import config_hash, content_hash, output_settings, plain, run_id, walk
from prism_ray.validation import check_config

SMOKE = compose(["recipe=digits_smoke", "method=prism_released", "compute=inline"])
LEAVES = {key: metadata for key, _, metadata in walk(SMOKE)}
RECIPES = ["digits", "digits_smoke"]
METHODS = sorted(
    path.stem
    for path in Path(prism_ray.__file__).parent.glob("conf/method/*.yaml")
    if "engine: diffusion" not in path.read_text()  # they need a recipe with a generator
)


def schema_classes(kind: Any = Config) -> list[Any]:
    """Every dataclass of the schema."""
    inner = [hint for hint in get_type_hints(kind).values() if is_dataclass(hint)]
    return [kind, TeacherConfig, *inner] if kind is Config else [kind]


def reach(config: Any, key: str) -> tuple[Any, str]:
    """The holder of a dotted key and the key's last part."""
    *path, last = key.split(".")
    for part in path:
        config = config[part] if isinstance(config, dict) else getattr(config, part)
    return config, last


def with_setting(config: Config, key: str, value: Any) -> Config:
    """A copy with one setting replaced."""
    config = copy.deepcopy(config)
    holder, last = reach(config, key)
    setattr(holder, last, value)
    return config


def another(value: Any, hint: Any) -> Any:
    """Some other value of the same type."""
    if value is None:
        value = next(kind for kind in get_args(hint) if kind is not type(None))()
    if isinstance(value, Enum):
        return next(member for member in type(value) if member is not value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, dict):
        return {**value, "other": TeacherConfig(arch="prism_vgg") if hint == dict[str, TeacherConfig] else 1}
    assert isinstance(value, list)
    return [*value, another(value[0], None) if value else "other"]


@pytest.mark.parametrize("kind", schema_classes(), ids=lambda kind: kind.__name__)
def test_every_setting_says_what_it_means(kind: Any) -> None:
    for entry in fields(kind):
        doc = entry.metadata.get("doc", "")
        assert len(doc) >= 3, f"{kind.__name__}.{entry.name} has no doc"
        assert not doc.endswith("."), f"{kind.__name__}.{entry.name}: {doc}"


@pytest.mark.parametrize("key", LEAVES)
def test_a_setting_changes_the_hash_exactly_if_it_decides_the_output(key: str) -> None:
    holder, last = reach(SMOKE, key)
    changed = with_setting(SMOKE, key, another(getattr(holder, last), get_type_hints(type(holder))[last]))
    assert plain(changed) != plain(SMOKE)
    assert (config_hash(changed) != config_hash(SMOKE)) == LEAVES[key]["output"]


def test_where_and_how_fast_never_decides_what() -> None:
    free = {key for key, metadata in LEAVES.items() if not metadata["output"]}
    assert {"storage", "run_id", "stages", "dataset.path", "compute.actors", "compute.address"} <= free
    assert "compute.threads" not in free, "the thread count decides the last bits of a sum"
    assert not {key for key in free if key.startswith(("method.", "labels."))}


def test_the_hash_is_the_same_in_every_process() -> None:
    program = (
        "from prism_ray.cli import compose; from prism_ray.identity import config_hash;"
        "print(config_hash(compose(['recipe=digits_smoke', 'method=prism_released', 'compute=ray'])))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "12345", "LC_ALL": "C"}
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True
    ).stdout.strip()
    assert found == config_hash(SMOKE)


def test_content_is_hashed_by_value_not_by_order_of_keys() -> None:
    assert content_hash({"b": [1, 2.5, None, True], "ä": "ö"}) == "53143665d7a8b540"
    assert content_hash({"a": 1, "b": 2}) == content_hash({"b": 2, "a": 1})
    assert content_hash([1, 2]) != content_hash([2, 1])
    assert content_hash({"a": 1}) != content_hash({"a": "1"})
    with pytest.raises(ValueError, match="JSON"):
        content_hash(float("nan"))


def test_arguments_of_an_architecture_count_one_by_one() -> None:
    settings = output_settings(SMOKE)
    assert settings["teachers.models.vgg.model_args"] == {"channels": [8, 8, 16]}
    assert "teachers.models" not in settings, "a teacher's free settings must not slip in through its parent"


def test_allowing_a_pickle_is_not_another_run() -> None:
    assert config_hash(with_setting(SMOKE, "teachers.models.vgg.allow_pickle", True)) == config_hash(SMOKE)


def test_two_configs_never_share_a_default() -> None:
    first, second = compose(["recipe=digits_smoke"]), compose(["recipe=digits_smoke"])
    first.student.model_args["new"] = 1
    first.stages.append("prepare")
    first.method.adam_betas[0] = 0.1
    assert (second.student.model_args.get("new"), second.stages, second.method.adam_betas[0]) == (None, [], 0.5)


def test_the_run_is_named_after_recipe_method_and_hash_unless_it_has_a_name() -> None:
    assert run_id(SMOKE) == f"digits_smoke-prism_released-{config_hash(SMOKE)[:12]}"
    assert run_id(with_setting(SMOKE, "run_id", "mine")) == "mine"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_shipped_recipe_takes_every_method(recipe: str, method: str) -> None:
    config = compose([f"recipe={recipe}", f"method={method}"])
    assert (config.recipe_name, config.method.name) == (recipe, method)


def test_what_is_written_on_the_command_line_wins_over_recipe_and_preset() -> None:
    config = compose(["method.iterations=7", "recipe=digits", "method=sre2l", "student.lr=0.25"])
    assert (config.method.iterations, config.method.name, config.student.lr) == (7, "sre2l", 0.25)


def test_the_rows_of_the_shipped_suite_are_different_runs_of_the_same_student() -> None:
    suite, rows = compose_suite(["suite=digits", "compute=inline"])
    assert suite.recipe == "digits"
    assert len({run_id(row.config) for row in rows}) == len(rows) >= 4
    assert len({(r.config.student.arch, r.config.student.steps, r.config.seed) for r in rows}) == 1


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("method.lr", float("nan"), "finite"),
        ("method.lr", float("-inf"), "finite"),
        ("method.lr", 0.0, "above 0"),
        ("method.first_bn_multiplier", -1.0, "at least 0"),
        ("method.crop_area_min", 1.1, "from 0 to 1"),
        ("method.adam_betas", [0.5, 1.0], "two numbers"),
        ("dataset.test_fraction", 1.0, "ends excluded"),
        ("dataset.channels", 2, "gray"),
        ("dataset.name", "../up", "letters"),
        ("dataset.name", "", "letters"),
        ("recipe_name", ".hidden", "letters"),
        ("recipe_name", "ünïcode", "letters"),
        ("run_id", "a/b", "letters"),
        ("run_id", "a" * 129, "128"),
        ("student.seeds", [], "at least one"),
        ("student.seeds", [3, 3], "none of them twice"),
        ("compute.actors", 0, "at least 1"),
        ("compute.train_workers", -1, "at least 1"),
        ("compute.cpus", 0, "at least 1"),
        ("images_per_class", 0, "at least 1"),
        ("images_per_class", 3_000_000, "max_images"),
        ("images_per_class", None, "engine=real"),
        ("dataset.pad", 8, "image_size"),
        ("stages", ["prepare", "cook"], "cook"),
        ("teachers.primary", "nobody", "convnet, vgg"),
        ("teachers.pool", ["convnet"], "primary"),
        ("labels.teachers", ["nobody"], "nobody"),
        ("evaluate.feature_model", "nobody", "nobody"),
        ("method.statistics_slots", 2, "auxiliary"),
        ("teachers.models.vgg.arch", None, "architecture"),
        ("evaluate.judges", ["nobody"], "nobody"),
        ("method.statistics_fixed", ["nobody"], "nobody"),
        ("method.statistics_fixed", ["vgg", "vgg"], "twice"),
        ("method.statistics_count", 0, "at least 1"),
        ("method.accuracy_temperature", 0.0, "above 0"),
        ("method.class_share", 1.5, "from 0 to 1"),
        ("method.statistics_ema", 1.0, "below 1"),
        ("method.conv_skip_probability", 1.0, "below 1"),
        ("method.tv_weight", -1.0, "at least 0"),
        ("method.eig_weight", -1.0, "at least 0"),
        ("method.eig_temperature", 0.0, "above 0"),
        ("method.rounds", 0, "at least 1"),
        ("method.residual_parts", 9, "8 iterations"),
        ("method.residual_weight", 1.1, "from 0 to 1"),
        ("method.residual_scale", 0.0, "above 0"),
        ("method.mosaic_tiles", 0, "at least 1"),
        ("method.eig_weight", 1.0, "class_major"),
        ("method.rounds", 2, "class_major"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_its_key(key: str, value: Any, expected: str) -> None:
    with pytest.raises(InputError) as refused:
        check_config(with_setting(SMOKE, key, value))
    message = str(refused.value)
    assert message.startswith(key)
    assert expected in message
    assert "\n" not in message


def test_statistics_need_a_teacher_with_batch_norm() -> None:
    config = compose(["recipe=digits_smoke", "method=sre2l"])
    config.teachers.models["vgg"].batch_norm = False
    with pytest.raises(InputError, match=r"teachers\.primary='vgg': has no batch norm"):
        check_config(config)
    for teacher in config.teachers.models.values():
        teacher.batch_norm = False
    config.method.statistics_role = SMOKE.method.statistics_role
    with pytest.raises(InputError, match="no teacher in it has batch norm"):
        check_config(config)


def test_real_images_need_no_batch_norm_and_no_auxiliary() -> None:
    config = compose(["recipe=digits_smoke", "method=random_real", "method.statistics_slots=9"])
    for teacher in config.teachers.models.values():
        teacher.batch_norm = False
    check_config(config)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ("method.bn_weight=0 method.ce_weight=0", ["method.bn_weight=0", "method.ce_weight=0", "nothing to optimize"]),
        ("method.statistics_role=auxiliary_slots method.statistics_slots=2", ["statistics_slots=2", "1 auxiliary"]),
        ("method.statistics_role=k_subset method.statistics_count=3", ["statistics_count=3", "2 teachers"]),
        (
            "method.statistics_role=fixed method.statistics_fixed=[convnet] teachers.models.convnet.batch_norm=false",
            ["method.statistics_fixed=['convnet']", "no batch norm"],
        ),
        (
            "method.statistics_reduction=normalized teachers.models.vgg.batch_norm=false",
            ["method.statistics_reduction=normalized", "'vgg'"],
        ),
        (
            "method.statistics_reduction=normalized method.conv_statistics=true",
            ["method.statistics_reduction=normalized", "method.conv_statistics=true"],
        ),
        ("method.compile=true method.conv_statistics=true", ["method.compile=true", "method.conv_statistics=true"]),
        ("method.compile=true method.statistics_ema=0.5", ["method.compile=true", "method.statistics_ema=0.5"]),
        ("method=random_real method.selection=herding", ["method.selection=herding", "engine=initial"]),
        ("method.init=generated", ["method.init=generated", "method.init_run=null", "name of a run"]),
        ("method.init_run=other", ["method.init=real", "method.init_run=other"]),
        ("method.init=mosaic method.mosaic_tiles=17", ["method.mosaic_tiles=17", "16 pixels"]),
        ("method.batch_plan=single_class method.rounds=9", ["method.rounds=9", "8 iterations"]),
        (
            "method.batch_plan=class_major method.rounds=2 method.residual_parts=2",
            ["method.rounds=2", "method.residual_parts=2", "no common parts"],
        ),
        (
            "method.crop_curriculum=cosine method.crop_area_start=0.1 method.crop_area_min=0.5",
            ["method.crop_area_start=0.1", "crop_area_min=0.5"],
        ),
        (
            "method=random_real images_per_class=null evaluate.split=validation",
            ["evaluate.split=validation", "images_per_class=null"],
        ),
        (
            "method.init=generated method.init_run=other evaluate.split=validation",
            ["evaluate.split=validation", "method.init_run=other"],
        ),
    ],
)
def test_settings_at_odds_are_refused_by_their_names(overrides: str, expected: list[str]) -> None:
    with pytest.raises(InputError) as refused:
        compose(["recipe=digits_smoke", "method=prism_released", *overrides.split()])
    for words in expected:
        assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "overrides",
    [
        "method.bn_weight=0 teachers.models.vgg.batch_norm=false teachers.models.convnet.batch_norm=false",
        "method=sre2l method.conv_statistics=true teachers.models.vgg.batch_norm=false",
        "method=random_real method.statistics_slots=9",
        "method=random_real method.compile=true method.statistics_ema=0.5",
        "method=real_kth method.statistics_slots=9",
        "method.batch_plan=class_major method.rounds=2 method.eig_weight=1",
        "method.batch_plan=single_class method.residual_parts=8",
        "method.crop_area_start=0.1 method.crop_area_min=0.5",
        "method.init=mosaic method.mosaic_tiles=16",
    ],
)
def test_what_is_not_used_or_just_fits_is_accepted(overrides: str) -> None:
    compose(["recipe=digits_smoke", "method=prism_released", *overrides.split()])


NAMES_ALONE = ["recipe=imagenet_lite", "method=prism_released", "method.init=noise", "method.statistics_slots=1"]


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("method.init=real", "method.init=real"),
        ("method.init=mosaic", "method.init=mosaic"),
        ("method.engine=real", "method.engine=real"),
        ("method.class_share=0.5", "method.class_share=0.5"),
        ("method.conv_statistics=true", "method.conv_statistics=true"),
        ("method.statistics_reduction=normalized", "method.statistics_reduction=normalized"),
        ("method.statistics_reduction=weighted", "method.statistics_reduction=weighted"),
        ("teachers.models.new={arch: prism_vgg}", "teachers.models.new.source=train"),
        ("stages=[]", "stages: distill"),
        ("stages=[synthesize,distill]", "stages: distill"),
    ],
)
def test_what_needs_real_images_is_refused_where_there_are_only_names(override: str, named: str) -> None:
    compose(NAMES_ALONE)
    overrides = [kept for kept in NAMES_ALONE if kept.partition("=")[0] != override.partition("=")[0]]
    with pytest.raises(InputError) as refused:
        compose([*overrides, override])
    message = str(refused.value)
    assert message.startswith(f"{named}: needs real images")
    assert "\n" not in message


def test_every_shift_can_be_asked_for_by_name() -> None:
    from prism_ray.config import ATTRIBUTES, CORRUPTIONS
    from prism_ray.methods.attributes import AXES, SHIFTS

    assert tuple(SHIFTS) == CORRUPTIONS
    assert {f"{axis}:{value}" for axis, values in AXES.items() for value in values[1:]} == set(ATTRIBUTES)
