"""Every method preset, end to end for a few steps on real digits: it composes, it runs, and it runs the same again."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import SMOKE, products
from PIL import Image

from prism_ray import cli
from prism_ray.cli.files import CONF, group_names, read_yaml
from prism_ray.identity import plain
from prism_ray.options import Engine, Init
from prism_ray.runs import Row, locate

PRESETS = [
    name for name in group_names("method") if read_yaml(CONF / f"method/{name}.yaml").get("engine") != "diffusion"
]  # those are in test_generation
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
    return Path(locate(Row("row", cli.compose(settings))).store.url)


def shard_rows(run_dir: Path) -> list[dict[str, Any]]:
    tables = [pq.read_table(path) for path in sorted((run_dir / "images").glob("*.parquet"))]
    return pa.concat_tables(tables).to_pylist()


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_says_where_it_comes_from_and_is_named_as_its_file(name: str) -> None:
    text = (CONF / "method" / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert cli.compose([*SMOKE, f"method={name}"]).method.name == name
    comment = text[: text.index("name:")].lower()
    assert any(word in comment for word in ("arxiv", "released", "control")), comment


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
    optimized = config.method.engine is Engine.inversion
    for row in rows:
        losses = [row["loss_ce"], row["loss_bn"]]
        assert all(math.isfinite(loss) for loss in losses) if optimized else losses == [None, None]
        assert (row["source_image_id"] is None) == (optimized and config.method.init is Init.noise)
        assert row["method"] == name


def test_sre2l_is_prism_with_no_slot_filled_bit_for_bit(taught: Path) -> None:
    prism, sre2l = (plain(cli.compose([*SMOKE, *settings]).method) for settings in (RELEASED, ["method=sre2l"]))
    own = ("name", "statistics_role")
    shared = [f"method.{key}={value}" for key, value in prism.items() if value != sre2l[key] and key not in own]
    ours, theirs = (shard_rows(synthesized(taught, *settings)) for settings in (RELEASED, ["method=sre2l", *shared]))
    assert {row["method"] for row in theirs} == {"sre2l"}  # not taken over from the other
    assert [row["image"] for row in ours] == [row["image"] for row in theirs]


def test_whose_statistics_were_matched_stands_with_every_image(taught: Path) -> None:
    for name, holds_primary in (("prism_strict", False), ("prism_released", True), ("prism_coupled", True)):
        rows = shard_rows(synthesized(taught, f"method={name}"))
        assert {"vgg" in row["statistics_teachers"] for row in rows} == {holds_primary}
    always = "method.statistics_probability=1"
    strict, released, coupled = (
        shard_rows(synthesized(taught, f"method={name}", always))
        for name in ("prism_strict", "prism_released", "prism_coupled")
    )
    assert {tuple(row["statistics_teachers"]) for row in strict} == {("convnet",)}
    assert {tuple(row["statistics_teachers"]) for row in released} == {("vgg", "convnet")}
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
    pixels = [row["image"]["bytes"] for row in shard_rows(start)]
    assert [row["image"]["bytes"] for row in shard_rows(same)] == pixels
    sources = {row["source_image_id"] for row in shard_rows(same)}
    assert f"{start.name}/000000-000000" in sources
    assert len(sources) == 20


GENERATED = ["method=prism_released", "method.init=generated"]


def refusal(capsys: pytest.CaptureFixture[str], *settings: str) -> str:
    """The one line with which a command refuses its settings."""
    capsys.readouterr()
    assert cli.main(["run", *SMOKE, STAGES, *settings]) == 2
    line = capsys.readouterr().err
    assert line.startswith("prism-ray: ")
    assert line.count("\n") == 1
    return line


def test_a_start_that_is_missing_is_refused_before_a_teacher_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(capsys, f"storage={tmp_path}", *GENERATED, "method.init_run=nobody")
    assert "method.init_run=nobody: has 0 images" in said
    assert not (tmp_path / "artifacts/teachers").exists()
    assert not (tmp_path / "runs/nobody").exists()


def test_a_start_of_too_few_images_is_refused(taught: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = synthesized(taught, "method=sre2l")
    own = [f"storage={taught}", *GENERATED, f"method.init_run={start.name}"]
    assert f"method.init_run={start.name}: has 20 images, of which 30" in refusal(capsys, *own, "images_per_class=3")


@pytest.fixture
def begun(fresh: Path) -> tuple[Path, list[str]]:
    """The run started from, and the settings of a run that lacks one of its own images again."""
    start = synthesized(fresh, "method=sre2l")
    settings = [f"storage={fresh}", *GENERATED, f"method.init_run={start.name}"]
    next((synthesized(fresh, *settings) / "images").glob("*.parquet")).unlink()
    return start, settings


def test_a_start_whose_images_were_made_again_otherwise_is_refused(
    begun: tuple[Path, list[str]], fresh: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start, settings = begun
    other = synthesized(fresh, "method=sre2l", "seed=1")
    for folder in ("images", "receipts"):
        shutil.rmtree(start / folder)
        shutil.copytree(other / folder, start / folder)
    assert f"began with images of run {start.name}" in refusal(capsys, *settings)


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[::-1])])
def test_a_start_whose_files_are_not_those_it_published_is_refused(
    harm: Callable[[Path], Any], begun: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    start, settings = begun
    shard = sorted((start / "images").glob("*.parquet"))[0]
    harm(shard)
    assert f"method.init_run={start.name}: images/{shard.name} is missing or damaged" in refusal(capsys, *settings)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["dataset.image_size=8"], "its images are of shape (1, 16, 16), those of this run of (1, 8, 8)"),
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
    data = [f"dataset.path={tmp_path}/data"] if "dataset=image_folder" in overrides else []
    settings = ["method=rded", "method.init=generated", f"method.init_run={start.name}", *overrides, *data]
    cheap = ["teach.epochs=1", "teachers.min_accuracy=0"]
    assert f"method.init_run={start.name}: " + said in refusal(capsys, f"storage={fresh}", *settings, *cheap)
