"""Every method preset, end to end for a few steps on real digits: it composes, it runs, and it runs the same again."""

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import SMOKE, products
from PIL import Image

from prism_ray import cli
from prism_ray.cli.files import CONF, group_names
from prism_ray.config import Engine
from prism_ray.runs import Row, locate

PRESETS = group_names("method")
STAGES = "stages=[prepare,teach,synthesize]"
RELEASED = ["method=prism_released", "method.statistics_probability=0"]


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Storage with the smoke recipe's data set and teachers."""
    storage = tmp_path_factory.mktemp("taught") / "outputs"
    assert (
        cli.main(["run", *SMOKE, "labels.teachers=[vgg,convnet]", "stages=[prepare,teach]", f"storage={storage}"]) == 0
    )
    return storage


@pytest.fixture
def fresh(taught: Path, tmp_path: Path) -> Path:
    """Another storage, which shares the data set and the teachers and nothing else."""
    for kind in ("datasets", "teachers"):
        shutil.copytree(taught / "artifacts" / kind, tmp_path / "outputs/artifacts" / kind)
    return tmp_path / "outputs"


def synthesized(storage: Path, *overrides: str) -> Path:
    """The folder of a run that has made its images."""
    settings = [*SMOKE, STAGES, f"storage={storage}", *overrides]
    assert cli.main(["run", *settings]) == 0
    return locate(Row("row", cli.compose(settings))).store.root


def shard_rows(run_dir: Path) -> list[dict[str, object]]:
    tables = [pq.read_table(path) for path in sorted((run_dir / "images").glob("*.parquet"))]
    return pa.concat_tables(tables).to_pylist()


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_says_where_it_comes_from_and_is_named_as_its_file(name: str) -> None:
    text = (CONF / "method" / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert cli.compose([*SMOKE, f"method={name}"]).method.name == name
    comment = text[: text.index("name:")].lower()
    published = name not in ("random_real", "real_kth")
    assert not published or any(word in comment for word in ("arxiv", "released", "cv-dd")), comment


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_makes_the_planned_images_and_the_same_bytes_in_another_storage(
    name: str, taught: Path, fresh: Path
) -> None:
    first, second = (synthesized(storage, f"method={name}") for storage in (taught, fresh))
    assert products(first) == products(second) != {}
    config, rows = cli.compose([*SMOKE, f"method={name}"]), shard_rows(first)
    assert sorted((row["label"], row["index_in_class"]) for row in rows) == [
        (c, k) for c in range(10) for k in range(2)
    ]
    for row in rows:
        optimized = config.method.engine is Engine.inversion
        assert (row["loss_ce"] is not None) == (row["loss_bn"] is not None) == optimized
        assert (row["source_image_id"] is None) == (config.method.init.name == "noise" and optimized)
        assert row["method"] == name


def test_sre2l_is_prism_with_no_slot_filled_bit_for_bit(taught: Path) -> None:
    prism = cli.compose([*SMOKE, *RELEASED]).method
    names = ("init", "iterations", "budget_decay", "lr", "batch_size", "selection")
    shared = [f"method.{key}={getattr(prism, key) if key in names[1:5] else getattr(prism, key).name}" for key in names]
    ours, theirs = synthesized(taught, *RELEASED), synthesized(taught, "method=sre2l", *shared)
    assert [row["image"] for row in shard_rows(ours)] == [row["image"] for row in shard_rows(theirs)]


def test_whose_statistics_were_matched_stands_with_every_image(taught: Path) -> None:
    always = "method.statistics_probability=1"
    strict, released, coupled = (
        shard_rows(synthesized(taught, f"method={name}", always))
        for name in ("prism_strict", "prism_released", "prism_coupled")
    )
    assert {tuple(row["statistics_teachers"]) for row in strict} == {("convnet",)}  # type: ignore[arg-type]
    assert {tuple(row["statistics_teachers"]) for row in released} == {("vgg", "convnet")}  # type: ignore[arg-type]
    assert [row["image"] for row in coupled] != [row["image"] for row in released]


@pytest.mark.parametrize("selection", ["confident", "medium", "herding", "regression"])
def test_a_selection_without_optimization_is_a_coreset_of_distinct_real_images(selection: str, taught: Path) -> None:
    run_dir = synthesized(
        taught, "method=rded", "method.init=real", f"method.selection={selection}", "method.judges=pool"
    )
    rows = shard_rows(run_dir)
    assert len({row["source_image_id"] for row in rows}) == len(rows) == 20


# Images of another run as a start


def test_images_of_another_run_are_what_they_start_from(taught: Path) -> None:
    start = synthesized(taught, "method=sre2l")
    same = synthesized(taught, "method=rded", "method.init=generated", f"method.init_run={start.name}")
    pixels = [row["image"]["bytes"] for row in shard_rows(start)]  # type: ignore[index]
    assert [row["image"]["bytes"] for row in shard_rows(same)] == pixels  # type: ignore[index]
    sources = {row["source_image_id"] for row in shard_rows(same)}
    assert f"{start.name}/000000-000000" in sources
    assert len(sources) == 20


def test_a_start_that_is_missing_too_small_or_changed_is_refused(
    taught: Path, fresh: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = synthesized(fresh, "method=sre2l")
    more = [*SMOKE, STAGES, f"storage={fresh}", "method=prism_released", "method.init=generated"]
    for overrides, said in (
        ([*more, "method.init_run=nobody"], "method.init_run=nobody: has 0 images"),
        ([*more, f"method.init_run={start.name}", "images_per_class=3"], "has 20 images"),
    ):
        capsys.readouterr()
        assert cli.main(["run", *overrides]) != 0
        captured = capsys.readouterr()
        assert said in captured.out + captured.err
    begun = [*more, f"method.init_run={start.name}", "method.batch_size=10"]
    assert cli.main(["run", *begun]) == 0
    other = synthesized(fresh, "method=sre2l", "seed=1")
    for folder in ("images", "receipts"):
        shutil.rmtree(start / folder)
        shutil.copytree(other / folder, start / folder)
    (locate(Row("row", cli.compose(begun))).store.root / "images/train-00000-of-00002.parquet").unlink()
    capsys.readouterr()
    assert cli.main(["run", *begun]) == 2
    assert f"began with images of run {start.name}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["dataset.image_size=8"], "of shape (1, 16, 16), those of this run of (1, 8, 8)"),
        (["dataset=image_folder", "dataset.channels=1", "dataset.image_size=16"], "its class 0 is '0'"),
    ],
    ids=["another size", "other classes"],
)
def test_a_start_of_another_data_set_is_refused(
    overrides: list[str], said: str, fresh: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("cat", "dog"):
        for k in range(4):
            (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
            Image.new("L", (16, 16), 30 * k).save(tmp_path / "data" / name / f"{k}.png")
    start = synthesized(fresh, "method=sre2l")
    capsys.readouterr()
    data = [f"dataset.path={tmp_path}/data"] if "dataset=image_folder" in overrides else []
    settings = ["method=rded", "method.init=generated", f"method.init_run={start.name}", *overrides, *data]
    cheap = ["teach.epochs=1", "teachers.min_accuracy=0"]
    assert cli.main(["run", *SMOKE, STAGES, f"storage={fresh}", *settings, *cheap]) == 2
    refusal = capsys.readouterr().err
    assert said in refusal
    assert refusal.startswith(f"prism-ray: method.init_run={start.name}: ")
    assert refusal.count("\n") == 1
