"""The ImageNet recipes: whole on two cores without an image, and the papers' own, of which two steps run."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from commands import Command
from PIL import Image
from timm.models import get_pretrained_cfg

from prism_ray import cli
from prism_ray.cli.compose import compose_suite
from prism_ray.config import label_teachers
from prism_ray.models.classifier import build_classifier, save_classifier
from prism_ray.plan import guiding_pool, plan_units, used_teachers

CLASSES = ["n01440764", "n02099601", "n02391049"]
LITE = ["recipe=imagenet_lite", "compute=inline"]
TINY_LITE = [*LITE, "classes=[zebra,daisy]", "images_per_class=2", "method.iterations=2"]


@pytest.fixture(scope="module")
def lite_storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Storage with a finished run of the recipe: two classes, two images of each, two steps."""
    storage = tmp_path_factory.mktemp("lite") / "outputs"
    assert cli.main(["run", *TINY_LITE, f"storage={storage}"]) == 0
    return storage


def test_imagenet_lite_makes_images_of_the_chosen_classes_from_names_alone(lite_storage: Path) -> None:
    (run,) = (lite_storage / "runs").iterdir()
    tables = [pq.read_table(path) for path in sorted((run / "images").glob("*.parquet"))]
    rows = [row for table in tables for row in table.to_pylist()]
    assert sorted(row["image_id"] for row in rows) == [f"{c:06d}-{k:06d}" for c in (340, 985) for k in (0, 1)]
    assert {row["class_name"] for row in rows} == {"zebra", "daisy"}
    assert {row["source_image_id"] for row in rows} == {None}
    assert (run / "report/report.html").stat().st_size > 0


def test_imagenet_lite_is_judged_by_a_teacher_that_never_guides(lite_storage: Path) -> None:
    (run,) = (lite_storage / "runs").iterdir()
    metrics = json.loads((run / "metrics/diversity.json").read_text())
    assert [(judge["judge"], judge["num_images"]) for judge in metrics["judges"]] == [("lite2", 4)]
    assert {space["cosine"]["real_mean"] for space in metrics["spaces"]} == {None}
    config = cli.compose(LITE)
    assert "lite2" in used_teachers(config)
    assert "lite2" not in guiding_pool(config)


def test_nothing_is_claimed_about_the_accuracy_of_teachers_without_images(lite_storage: Path) -> None:
    for folder in (lite_storage / "artifacts/teachers").iterdir():
        facts = json.loads((folder / "prism_ray.json").read_text())
        unknown = ("accuracy", "order", "bn_distance_first", "bn_distance_rest")
        assert {facts[key] for key in unknown} == {None}, folder
        assert facts["num_bn_layers"] in (49, 64)


def test_imagenet_lite_again_finds_everything_done(lite_storage: Path, prism: Command) -> None:
    again = prism.bare("run", *TINY_LITE, f"storage={lite_storage}")
    assert again.code == 0, again.err
    assert "[synthesize] 2/2 units" in again.out
    for verb in ("plan", "status", "verify", "report"):
        looked = prism.bare(verb, *TINY_LITE, f"storage={lite_storage}")
        assert looked.code == 0, (verb, looked.err)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("teachers.models.lite1.source=imagenet_lite:9", "teachers.models.lite1.source: 'imagenet_lite:9' is unknown"),
        ("classes=[zebra,dasy]", "classes: 'dasy' is no class of the data set; did you mean daisy"),
        ("method.init=real", "method.init=real: needs real images"),
        ("stages=[prepare,teach,synthesize,distill]", "stages: distill: needs real images"),
        ("dataset.path=/data", "dataset.path='/data'"),
    ],
)
def test_what_needs_more_than_names_is_refused_before_anything_is_made(
    prism: Command, tmp_path: Path, override: str, words: str
) -> None:
    result = prism.bare("run", *LITE, f"storage={tmp_path}/outputs", override)
    assert (result.code, result.out) == (2, "")
    assert words in result.err
    assert not (tmp_path / "outputs").exists()


def test_the_lite_suite_has_three_seeds_of_every_row() -> None:
    _, rows = compose_suite(["suite=imagenet_lite"])
    assert [(row.label, row.config.seed) for row in rows] == [
        (label, seed) for seed in (0, 1, 2) for label in ("sre2l", "prism")
    ]
    for row in rows:
        units = plan_units(row.config, [[]] * 1000, list(range(8)))
        assert [len(unit.images) for unit in units] == [8] * 4, "two workers have two batches each"
        assert row.config.method.lr == 0.1


# The papers' recipes

RECIPES = ["imagenet1k_prism", "imagenet1k_sre2l"]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("images_per_class", [10, 50])
def test_a_paper_recipe_plans_ten_and_fifty_images_per_class(recipe: str, images_per_class: int) -> None:
    config = cli.compose([f"recipe={recipe}", f"images_per_class={images_per_class}"])
    units = plan_units(config, [range(images_per_class)] * 1000)
    assert len(units) == 10 * images_per_class, "slices of ten batches of a hundred classes"
    assert {len(unit.images) for unit in units} == {100}
    iterations = [unit.iterations for unit in units[::10]][:10]
    expected = [4000 - 500 * (k % 8) for k in range(10)] if recipe == "imagenet1k_prism" else [4000] * 10
    assert iterations == expected


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_pretrained_teacher_of_a_paper_recipe_is_published_with_weights(recipe: str) -> None:
    for name, teacher in cli.compose([f"recipe={recipe}"]).teachers.models.items():
        cfg = get_pretrained_cfg(teacher.source.removeprefix("timm:"))
        assert cfg is not None, name
        assert cfg.has_weights, name
        assert cfg.hf_hub_id, name
        assert (cfg.num_classes, cfg.input_size) == (1000, (3, 224, 224)), name


@pytest.mark.parametrize(("depth", "preset"), [(18, "prism_released"), (50, "prism_released_r50")])
def test_students_of_prism_are_labelled_by_their_own_family_first(depth: int, preset: str) -> None:
    config = cli.compose(["recipe=imagenet1k_prism", f"labels={preset}", f"student.arch=resnet{depth}"])
    assert label_teachers(config) == [f"resnet{depth}", "mobilenet", "vgg", "lcnet"]


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of random images in ImageNet's layout."""
    root = tmp_path_factory.mktemp("imagenet")
    for split, count in (("train", 2), ("val", 1)):
        for class_id, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for k in range(count):
                pixels = np.random.default_rng([len(split), class_id, k]).integers(0, 256, (80, 96, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{name}_{k}.JPEG")
    return root


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Every teacher that the recipes use by default, of its real architecture with random weights; 700 MB."""
    root = tmp_path_factory.mktemp("untrained")
    folders = {}
    config = cli.compose(["recipe=imagenet1k_prism"])
    for name in used_teachers(config):
        arch = config.teachers.models[name].source.removeprefix("timm:").partition(".")[0]
        classifier = build_classifier(
            arch,
            num_classes=len(CLASSES),
            in_chans=3,
            image_size=224,
            mean=[0.5] * 3,
            std=[0.25] * 3,
            model_args={},
            seed=0,
        )
        folders[name] = root / name
        save_classifier(classifier, folders[name], class_names=CLASSES, extra={})
    yield folders
    shutil.rmtree(root)


def local(recipe: str, image_folder: Path, untrained: dict[str, Path], storage: Path) -> list[str]:
    """A recipe with everything it would download, at one image per class, two steps and two views."""
    known = cli.compose([f"recipe={recipe}"]).teachers.models
    return [
        f"recipe={recipe}",
        "compute=inline",
        f"dataset.path={image_folder}",
        f"storage={storage}",
        *(f"teachers.models.{name}.source={folder}" for name, folder in untrained.items() if name in known),
        "teachers.min_accuracy=0.0",
        "images_per_class=1",
        "method.iterations=2",
        "labels.views=2",
        "student.seeds=[0]",
        "student.labels=[soft]",
        "student.epochs=2",
        "student.batch_size=3",
    ]


@pytest.mark.parametrize("recipe", [pytest.param("imagenet1k_prism", marks=pytest.mark.slow), "imagenet1k_sre2l"])
def test_a_paper_recipe_runs_with_its_own_architectures(
    recipe: str, image_folder: Path, untrained: dict[str, Path], prism: Command, tmp_path: Path
) -> None:
    overrides = local(recipe, image_folder, untrained, tmp_path / "outputs")
    result = prism.bare("run", *overrides)
    assert result.code == 0, result.err
    (run,) = (tmp_path / "outputs/runs").iterdir()
    (images,) = (run / "images").glob("*.parquet")
    rows = pq.read_table(images).to_pylist()
    assert [row["class_name"] for row in rows] == CLASSES
    assert {row["iterations"] for row in rows} == {2}
    assert all(np.isfinite(row["loss_ce"]) for row in rows)
    assert (run / "report/report.html").is_file()
    shutil.rmtree(tmp_path / "outputs/artifacts/teachers")


@pytest.mark.parametrize("recipe", RECIPES)
def test_operations_are_planned_before_teachers_exist(
    recipe: str, image_folder: Path, prism: Command, tmp_path: Path
) -> None:
    overrides = [f"recipe={recipe}", f"dataset.path={image_folder}", f"storage={tmp_path}/outputs"]
    result = prism.bare("plan", *overrides, "images_per_class=2", "compute.effective_tflops=100")
    assert result.code == 0, result.err
    for line in ("synthesis", "labels"):
        (found,) = [text for text in result.out.splitlines() if text.startswith(f"  {line}   ") and "FLOP" in text]
        assert "device-hours at 100 TFLOP/s" in found
    assert not (tmp_path / "outputs").exists()
    if recipe == "imagenet1k_sre2l":
        # 6 images for 4000 steps, forward and backward to the pixels: resnet18 with a layer for three classes.
        flops = 2 * 6 * 4000 * (3628146688 - 2 * 512 * 997)
        assert f"{flops:.3g} FLOP" in result.out
