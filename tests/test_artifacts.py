"""What synthesis measures of the real images beforehand: statistics to match, and which images and crops to start from.

Each is one pass, published whole in a folder that is named by all that decides its content and by nothing else.
"""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from commands import SMOKE as RECIPE
from commands import Command
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from prism_ray import cli
from prism_ray.artifacts import MARKER
from prism_ray.config import Row
from prism_ray.data.prepared import PreparedDataset, find_prepared
from prism_ray.errors import PrismError
from prism_ray.methods.inversion.statistics import matched_layers
from prism_ray.methods.selection import herding
from prism_ray.models.classifier import Classifier, load_classifier
from prism_ray.plan import used_teachers
from prism_ray.runs import Run, locate
from prism_ray.stages.starts import Starts, initial_pixels, make_starts
from prism_ray.stages.statistics import make_statistics, targets_for
from prism_ray.work import STARTS_FILE, STATISTICS_FILE, StartsItem, StatisticsItem

SMOKE = [*RECIPE, "method=prism_released"]
CPU = torch.device("cpu")
CONV = ["method.conv_statistics=true", "method.patch_size=2"]
MOSAIC = ["method.init=mosaic", "method.candidates=20", "method.mosaic_crops=3"]
WHOLE_VIEWS = ["method.crop_area_min=1.0", "method.flip_probability=0.0"]


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Storage with the smoke recipe's data set and teachers."""
    storage = tmp_path_factory.mktemp("taught")
    assert cli.main(["run", *SMOKE, "stages=[prepare,teach]", f"storage={storage}"]) == 0
    return storage


def run_of(storage: Path, *overrides: str) -> Run:
    """A run of other settings, with the data set and the teachers of the smoke recipe's own, whatever those say."""
    own, run = (locate(Row("row", cli.compose([*SMOKE, f"storage={storage}", *o]))) for o in ([], overrides))
    own.dataset = run.dataset = find_prepared(own.config.dataset, own.artifacts_dir)
    run.teacher_dirs = {name: own.teacher_folder(name) for name in used_teachers(own.config)}
    return run


def dataset_of(storage: Path) -> PreparedDataset:
    dataset = run_of(storage).dataset
    assert dataset is not None
    return dataset


def teacher_of(storage: Path, name: str) -> Classifier:
    return load_classifier(Path(run_of(storage).teacher_folder(name))).eval()


@cache
def real_images(storage: Path) -> Tensor:
    return torch.from_numpy(dataset_of(storage).images("train")).float() / 255


def measured(storage: Path, folder: Path, *overrides: str, name: str = "vgg") -> dict[str, Tensor]:
    """Statistics of one teacher, made in a folder."""
    (item,) = [item for item in run_of(storage, *overrides).statistics_items() if item.name == name]
    make_statistics(replace(item, folder=str(folder)))
    return load_file(folder / STATISTICS_FILE)


def starts_item(storage: Path, folder: Path, *overrides: str) -> StartsItem:
    item = run_of(storage, *overrides).starts_item()
    assert item is not None
    return replace(item, folder=str(folder))


def chosen(storage: Path, folder: Path, *overrides: str) -> list[dict[str, float]]:
    """Rows of the starts of a run, made in a folder."""
    make_starts(starts_item(storage, folder, *overrides))
    return pq.read_table(folder / STARTS_FILE).to_pylist()


def cross_entropies(storage: Path, images: Tensor, class_ids: Tensor, names: list[str]) -> Tensor:
    with torch.no_grad():
        logits = sum(teacher_of(storage, name)(images) for name in names) / len(names)
    assert isinstance(logits, Tensor)
    return functional.cross_entropy(logits, class_ids, reduction="none")


# Statistics


def test_statistics_are_the_moments_of_every_layers_inputs_on_the_real_images(taught: Path, tmp_path: Path) -> None:
    found = measured(taught, tmp_path / "made", *CONV, *WHOLE_VIEWS, "method.class_share=0.5")
    teacher = teacher_of(taught, "vgg")
    layers, inputs = matched_layers(teacher, conv=True), dict[nn.Module, Tensor]()

    def record(layer: nn.Module, args: tuple[Tensor]) -> None:
        inputs[layer] = args[0].double()

    for layer in layers:
        layer.register_forward_pre_hook(record)
    with torch.no_grad():
        teacher(real_images(taught))
    class_ids = torch.tensor(dataset_of(taught).labels("train"))
    for index, layer in enumerate(layers):
        x = inputs[layer]
        assert found[f"{index}.mean"].dtype == torch.float32
        torch.testing.assert_close(found[f"{index}.mean"].double(), x.mean(dim=(0, 2, 3)), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            found[f"{index}.var"].double(), x.var(dim=(0, 2, 3), correction=0), rtol=1e-4, atol=1e-5
        )
        own = x[class_ids == 3]
        torch.testing.assert_close(
            found[f"{index}.class_mean"][3].double(), own.mean(dim=(0, 2, 3)), rtol=1e-4, atol=1e-5
        )
        assert (f"{index}.patch_mean" in found) == isinstance(layer, nn.Conv2d)
    assert any(isinstance(layer, nn.BatchNorm2d) for layer in layers)
    marker = json.loads((tmp_path / "made" / MARKER).read_text())
    assert marker["num_layers"] == len(layers)
    assert marker["num_images"] == len(class_ids)


def test_statistics_are_of_one_seeded_view_of_each_image(taught: Path, tmp_path: Path) -> None:
    whole = measured(taught, tmp_path / "whole", *CONV, *WHOLE_VIEWS)
    cropped = measured(taught, tmp_path / "cropped", *CONV, "method.crop_area_min=0.1")
    assert not torch.allclose(whole["0.mean"], cropped["0.mean"], rtol=1e-3)


@pytest.mark.parametrize("kind", ["statistics", "confident", "herding", "mosaic"])
def test_the_same_pass_makes_the_same_bytes(taught: Path, tmp_path: Path, kind: str) -> None:
    for folder in (tmp_path / "once", tmp_path / "again"):
        if kind == "statistics":
            measured(taught, folder, *CONV, "method.class_share=0.5")
        else:
            chosen(taught, folder, *(MOSAIC if kind == "mosaic" else [f"method.selection={kind}"]))
    name = STATISTICS_FILE if kind == "statistics" else STARTS_FILE
    assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_class_shares_ask_for_no_statistics_of_a_teacher_without_batch_norm(taught: Path) -> None:
    run = run_of(taught, "method.class_share=0.5", "teachers.models.convnet.batch_norm=false")
    assert [item.name for item in run.statistics_items()] == ["vgg"]
    both = run_of(taught, *CONV, "teachers.models.convnet.batch_norm=false")
    assert [item.name for item in both.statistics_items()] == ["vgg", "convnet"]


def test_batch_norm_alone_asks_for_no_pass(taught: Path) -> None:
    run = run_of(taught)
    assert run.statistics_items() == []
    assert run.starts_item() is None
    teacher = teacher_of(taught, "vgg")
    targets = targets_for(run.spec(), "vgg", teacher, CPU)
    assert len(targets) == len(matched_layers(teacher, conv=False)) > 0


def test_targets_are_batch_norms_own_and_what_was_measured_of_convolutions_and_classes(
    taught: Path, tmp_path: Path
) -> None:
    overrides = [*CONV, "method.class_share=0.5"]
    found = measured(taught, tmp_path / "made", *overrides)
    run = run_of(taught, *overrides)
    run.statistics_dirs = {"vgg": str(tmp_path / "made")}
    teacher = teacher_of(taught, "vgg")
    targets = targets_for(run.spec(), "vgg", teacher, CPU)
    for index, (layer, target) in enumerate(zip(matched_layers(teacher, conv=True), targets, strict=True)):
        mean = layer.running_mean if isinstance(layer, nn.BatchNorm2d) else found[f"{index}.mean"]
        assert isinstance(mean, Tensor)
        assert torch.equal(target.mean, mean)
        assert target.class_mean is not None
        assert torch.equal(target.class_mean, found[f"{index}.class_mean"])


# Starts


def test_confident_takes_the_images_of_lowest_cross_entropy_first(taught: Path, tmp_path: Path) -> None:
    rows = chosen(taught, tmp_path / "made", "method.selection=confident", "images_per_class=5")
    assert [(r["class_id"], r["index_in_class"], r["tile"]) for r in rows] == [
        (c, k, 0) for c in range(10) for k in range(5)
    ]
    class_ids = torch.tensor(dataset_of(taught).labels("train"))
    scores = cross_entropies(taught, real_images(taught), class_ids, ["vgg"])
    for class_id in range(10):
        mine = [r for r in rows if r["class_id"] == class_id]
        assert all(class_ids[int(r["row"])] == class_id for r in mine)
        wanted = scores[class_ids == class_id].sort().values[:5].double()
        torch.testing.assert_close(torch.tensor([r["score"] for r in mine]).double(), wanted, rtol=1e-3, atol=1e-6)


def test_medium_takes_images_around_the_median_of_the_pools_cross_entropy(taught: Path, tmp_path: Path) -> None:
    rows = chosen(taught, tmp_path / "made", "method.selection=medium", "method.judges=pool")
    class_ids = torch.tensor(dataset_of(taught).labels("train"))
    scores = cross_entropies(taught, real_images(taught), class_ids, ["vgg", "convnet"])
    for class_id in range(10):
        own = scores[class_ids == class_id].double().numpy()
        nearest = np.sort(np.abs(own - np.median(own)))[:2]
        mine = [abs(r["score"] - np.median(own)) for r in rows if r["class_id"] == class_id]
        assert mine == pytest.approx(nearest.tolist(), abs=1e-4)


@pytest.mark.parametrize(("judges", "names"), [("primary", ["vgg"]), ("pool", ["vgg", "convnet"])])
def test_herding_is_on_the_judges_features_side_by_side(
    taught: Path, tmp_path: Path, judges: str, names: list[str]
) -> None:
    rows = chosen(taught, tmp_path / "made", "method.selection=herding", f"method.judges={judges}")
    own = dataset_of(taught).rows_by_class("train")[4]
    with torch.no_grad():
        features = [
            functional.normalize(teacher_of(taught, name).features(real_images(taught)[own]), dim=1) for name in names
        ]
    expected = [int(own[n]) for n in herding(torch.cat(features, dim=1), 2)]
    assert [r["row"] for r in rows if r["class_id"] == 4] == expected
    assert {r["score"] for r in rows} == {None}


def test_a_whole_image_is_started_from_bit_for_bit(taught: Path, tmp_path: Path) -> None:
    overrides = ["method.selection=confident"]
    chosen(taught, tmp_path / "made", *overrides)
    starts, images = Starts.open(tmp_path / "made"), run_of(taught, *overrides).units[0].images
    rows = [starts.sources(image.class_id, image.index_in_class)[0].row for image in images]
    assert torch.equal(initial_pixels(starts, dataset_of(taught), images), real_images(taught)[rows])


def test_tiles_are_the_surest_crops_one_of_each_image_of_the_class(taught: Path, tmp_path: Path) -> None:
    rows = chosen(taught, tmp_path / "made", *MOSAIC)
    dataset = dataset_of(taught)
    class_ids, side = dataset.labels("train"), dataset.image_size // 2
    for class_id in range(10):
        mine = [r for r in rows if r["class_id"] == class_id]
        assert [(r["index_in_class"], r["tile"]) for r in mine] == [(k, tile) for k in range(2) for tile in range(4)]
        assert len({r["row"] for r in mine}) == 8
        assert {int(class_ids[int(r["row"])]) for r in mine} == {class_id}
        assert [r["score"] for r in mine] == sorted(r["score"] for r in mine)
    for r in rows[:8]:
        top, left, height, width = (int(r[key]) for key in ("top", "left", "height", "width"))
        crop = real_images(taught)[int(r["row"])][:, top : top + height, left : left + width]
        tile = functional.interpolate(crop[None], size=(side, side), mode="bilinear", antialias=True)
        shown = torch.tensor(dataset.mean).reshape(1, -1, 1, 1).repeat(1, 1, 2 * side, 2 * side)
        start = side // 2
        shown[:, :, start : start + side, start : start + side] = tile
        (score,) = cross_entropies(taught, shown, torch.tensor([int(r["class_id"])]), ["vgg"]).tolist()
        assert score == pytest.approx(r["score"], abs=1e-4)


def test_a_mosaic_shows_its_tiles_row_by_row(taught: Path, tmp_path: Path) -> None:
    chosen(taught, tmp_path / "made", *MOSAIC)
    starts, images = Starts.open(tmp_path / "made"), run_of(taught, *MOSAIC).units[0].images
    pixels = initial_pixels(starts, dataset_of(taught), images)
    side = dataset_of(taught).image_size // 2
    assert pixels.dtype == torch.float32
    assert pixels.shape == (len(images), 1, 2 * side, 2 * side)
    assert 0 <= pixels.min() < pixels.max() <= 1
    row, top, left, height, width = starts.sources(images[1].class_id, images[1].index_in_class)[2]
    crop = real_images(taught)[row][:, top : top + height, left : left + width]
    tile = functional.interpolate(crop[None], size=(side, side), mode="bilinear", antialias=True)[0]
    torch.testing.assert_close(pixels[1, :, side:, :side], tile)


def test_more_images_of_a_class_and_fewer_classes_leave_the_starts_of_others_as_they_are(
    taught: Path, tmp_path: Path
) -> None:
    few = chosen(taught, tmp_path / "few", *MOSAIC, "images_per_class=1")
    many = chosen(taught, tmp_path / "many", *MOSAIC, "images_per_class=3")
    names = dataset_of(taught).class_names
    two = chosen(taught, tmp_path / "two", *MOSAIC, "images_per_class=3", f"classes=['{names[7]}','{names[2]}']")
    assert [r for r in many if r["index_in_class"] == 0] == few
    assert [r for r in many if r["class_id"] in (2, 7)] == two


def test_more_crops_tried_are_never_less_sure(taught: Path, tmp_path: Path) -> None:
    one = chosen(taught, tmp_path / "one", *MOSAIC, "method.mosaic_crops=1")
    many = chosen(taught, tmp_path / "many", *MOSAIC, "method.mosaic_crops=5")
    assert all(b["score"] <= a["score"] + 1e-5 for a, b in zip(one, many, strict=True))
    assert any(b["score"] < a["score"] for a, b in zip(one, many, strict=True))


@pytest.mark.parametrize("overrides", [["method.selection=confident"], MOSAIC], ids=["confident", "mosaic"])
def test_images_kept_for_validation_are_not_started_from(taught: Path, tmp_path: Path, overrides: list[str]) -> None:
    split = ["evaluate.split=validation", "student.validation_images=100"]
    rows = chosen(taught, tmp_path / "made", *overrides, *split)
    for class_id, own in enumerate(dataset_of(taught).rows_by_class("train")):
        assert {r["row"] for r in rows if r["class_id"] == class_id} <= set(own[:-100].tolist())


# Names


@pytest.mark.parametrize(
    ("change", "is_other"),
    [
        ("method.patch_size=4", True),
        ("method.class_share=0.5", True),
        ("method.crop_area_min=0.5", True),
        ("method.flip_probability=0.25", True),
        ("compute.threads=2", True),
        ("method.conv_skip_probability=0.3", False),
        ("method.lr=0.7", False),
        ("method.iterations=3", False),
        ("method.first_bn_multiplier=1", False),
        ("method.selection=random", False),
        ("images_per_class=3", False),
        ("seed=5", False),
        ("student.steps=3", False),
        ("method.statistics_role=all", False),
    ],
)
def test_statistics_are_named_by_what_decides_them_alone(taught: Path, change: str, is_other: bool) -> None:
    before, after = (run_of(taught, *CONV, *others).statistics_items() for others in ([], [change]))
    assert ([i.folder for i in before] != [i.folder for i in after]) == is_other


def test_statistics_of_classes_are_named_without_their_share_and_without_patches(taught: Path) -> None:
    def folders(*overrides: str) -> list[str]:
        return [item.folder for item in run_of(taught, *overrides).statistics_items()]

    assert folders("method.class_share=0.5") == folders("method.class_share=0.9", "method.patch_size=3")
    assert folders("method.class_share=0.5") != folders("method.class_share=0.5", "method.conv_statistics=true")


@pytest.mark.parametrize(
    ("base", "change", "is_other"),
    [
        ("confident", "images_per_class=3", True),
        ("confident", "method.selection=medium", True),
        ("confident", "method.judges=pool", True),
        ("confident", "evaluate.split=validation", True),
        ("confident", "student.validation_images=7", False),
        ("confident", "seed=5", False),
        ("confident", "method.mosaic_crops=4", False),
        ("confident", "method.lr=0.7", False),
        ("confident", "method.conv_statistics=true", False),
        ("confident", "method.iterations=3", False),
        ("confident", "method.engine=initial", False),
        ("confident", "compute.threads=2", True),
        ("mosaic", "seed=5", True),
        ("mosaic", "images_per_class=1", True),
        ("mosaic", "method.mosaic_tiles=1", True),
        ("mosaic", "method.candidates=30", True),
        ("mosaic", "method.mosaic_crops=4", True),
        ("mosaic", "method.judges=pool", True),
        ("mosaic", "method.selection=medium", False),
        ("mosaic", "method.crop_area_min=0.5", False),
        ("mosaic", "student.steps=3", False),
    ],
)
def test_starts_are_named_by_what_decides_them_alone(taught: Path, base: str, change: str, is_other: bool) -> None:
    overrides = MOSAIC if base == "mosaic" else ["method.selection=confident"]
    before, after = (run_of(taught, *overrides, *others).starts_item() for others in ([], [change]))
    assert before is not None
    assert after is not None
    assert (before.folder != after.folder) == is_other


def test_starts_are_named_by_the_classes_in_any_order(taught: Path) -> None:
    names = dataset_of(taught).class_names

    def folder(*classes: str) -> str:
        chosen = ",".join(f"'{name}'" for name in classes)
        item = run_of(taught, "method.selection=medium", f"classes=[{chosen}]").starts_item()
        assert item is not None
        return item.folder

    assert folder(names[1], names[2]) == folder(names[2], names[1]) != folder(names[1])
    assert folder() == folder(*names)


def items_of(storage: Path, judge: Path) -> tuple[StatisticsItem, StartsItem]:
    run = run_of(storage, *CONV, "method.selection=medium")
    run.teacher_dirs = {**run.teacher_dirs, "vgg": str(judge)}
    starts = run.starts_item()
    assert starts is not None
    return run.statistics_items()[0], starts


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_another_teacher_makes_another_folder(taught: Path, tmp_path: Path, name: str) -> None:
    own = Path(run_of(taught).teacher_folder("vgg"))
    for file in ("model.safetensors", "config.json"):
        (tmp_path / file).write_bytes((own / file).read_bytes())
    copied = items_of(taught, tmp_path)
    assert [item.folder for item in copied] == [item.folder for item in items_of(taught, own)], "wherever it lies"
    (tmp_path / name).write_bytes((own / name).read_bytes() + b" ")
    changed = items_of(taught, tmp_path)
    assert all(a.folder != b.folder for a, b in zip(copied, changed, strict=True))


# Whole or not at all


@pytest.mark.parametrize("kind", ["statistics", "starts"])
def test_a_folder_that_a_kill_left_half_is_made_again_and_a_whole_one_is_left_alone(
    taught: Path, tmp_path: Path, kind: str
) -> None:
    run = run_of(taught, *CONV, "method.selection=medium")
    folder = tmp_path / "artifacts" / "made"
    folder.mkdir(parents=True)
    name = STATISTICS_FILE if kind == "statistics" else STARTS_FILE
    (folder / name).write_bytes(b"half")

    def make() -> None:
        if kind == "statistics":
            make_statistics(replace(run.statistics_items()[0], folder=str(folder)))
        else:
            make_starts(starts_item(taught, folder, *CONV, "method.selection=medium"))

    make()
    assert (folder / name).read_bytes() != b"half"
    assert (folder / MARKER).is_file()
    assert [path.name for path in folder.parent.iterdir()] == ["made"], "nothing is left beside it"
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    make()
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_pass_that_fails_leaves_nothing(taught: Path, tmp_path: Path) -> None:
    item = starts_item(taught, tmp_path / "starts" / "made", "method.selection=medium")
    statistics = run_of(taught, *CONV).statistics_items()[0]
    damaged = tmp_path / "teacher"
    damaged.mkdir()
    (damaged / "config.json").write_text("{}")
    (damaged / "model.safetensors").write_bytes(b"")
    with pytest.raises(PrismError):
        make_starts(replace(item, judge_dirs=(str(damaged),)))
    with pytest.raises(PrismError):
        make_statistics(replace(statistics, teacher_dir=str(damaged), folder=str(tmp_path / "starts" / "other")))
    assert not (tmp_path / "starts").exists() or not list((tmp_path / "starts").iterdir())


# The pipeline


ALL = [*CONV, *MOSAIC, "method.class_share=0.5", "stages=[prepare,teach,synthesize]"]


def artifacts(storage: Path) -> dict[Path, int]:
    return {
        path: path.stat().st_mtime_ns
        for kind in ("statistics", "starts")
        for path in storage.glob(f"artifacts/{kind}/*/*")
    }


def test_a_run_measures_once_what_it_needs_and_runs_share_it(prism: Command, tmp_path: Path) -> None:
    result = prism("run", *ALL)
    assert result.code == 0, result
    assert "[measure] 3/3 passes" in result.out
    made = artifacts(tmp_path / "outputs")
    assert len(made) == 3 * 2
    other = prism("run", *ALL, "method.lr=0.2")
    assert other.code == 0, other
    again = prism("run", *ALL)
    assert again.code == 0, again
    assert "[measure]" not in again.out, "all its units are there"
    assert artifacts(tmp_path / "outputs") == made


def test_images_of_measured_statistics_and_starts_are_the_same_again(prism: Command, tmp_path: Path) -> None:
    def images(storage: Path) -> list[bytes]:
        assert prism("run", *ALL, f"storage={storage}").code == 0
        return [path.read_bytes() for path in sorted(storage.glob("runs/*/images/*.parquet"))]

    first, second = images(tmp_path / "one"), images(tmp_path / "two")
    assert len(first) == 4
    assert first == second


def test_a_run_does_not_go_on_with_other_starts_than_it_began_with(prism: Command, tmp_path: Path) -> None:
    overrides = ["method.selection=medium", "stages=[prepare,teach,synthesize]"]
    assert prism("run", *overrides).code == 0
    (starts,) = (tmp_path / "outputs/artifacts/starts").glob("*/starts.parquet")
    next((tmp_path / "outputs/runs").glob("*/images/*.parquet")).unlink()
    table = pq.read_table(starts)
    pq.write_table(table.set_column(3, "row", table["row"].take(np.arange(len(table))[::-1])), starts)
    result = prism("run", *overrides)
    assert result.code == 2, result
    assert "began with sha256 of starts" in result.err


def test_an_image_says_which_real_ones_it_started_from(prism: Command, tmp_path: Path) -> None:
    overrides = ["method.selection=herding", "stages=[prepare,teach,synthesize]"]
    assert prism("run", *overrides).code == 0
    (folder,) = (tmp_path / "outputs/artifacts/starts").iterdir()
    starts, names = Starts.open(folder), dataset_of(tmp_path / "outputs").image_ids("train")
    for path in (tmp_path / "outputs").glob("runs/*/images/*.parquet"):
        for image in pq.read_table(path).to_pylist():
            (start,) = starts.sources(image["label"], image["index_in_class"])
            assert image["source_image_id"] == names[start.row]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method.selection=confident", "images_per_class=400"], "class 0 has only"),
        (["method.init=mosaic", "images_per_class=80"], "takes crops of 320 real training images of class 0"),
        (["method.init=mosaic", "images_per_class=6", "method.candidates=20"], "and 20 are looked at"),
    ],
)
def test_too_few_real_images_are_refused_before_a_teacher_is_trained(
    prism: Command, tmp_path: Path, overrides: list[str], message: str
) -> None:
    result = prism("run", *overrides)
    assert result.code == 2, result
    assert message in result.err
    assert not (tmp_path / "outputs/artifacts/teachers").exists()
