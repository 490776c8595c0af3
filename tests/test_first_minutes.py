"""What a stranger meets first: help, the list of settings, the doctor, a recipe for own photos, a contact sheet."""

import json
import shutil
import time
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import yaml
from commands import Command
from photos import CLASSES, make_photos
from PIL import Image
from test_bad_inputs import assert_refused

import prism_ray
from prism_ray import doctor
from prism_ray.cli import EXAMPLES, VERBS, compose, help_text
from prism_ray.cli.settings import all_settings
from prism_ray.config import Config
from prism_ray.doctor import Finding, Level
from prism_ray.identity import walk

# Help


def test_the_help_has_examples_of_the_verbs_that_come_first() -> None:
    text = help_text()
    for verb in ("run", "show", "init", "plan", "bench", "config"):
        assert any(example.startswith(f"prism-ray {verb} ") for example in EXAMPLES), verb
    assert all(example in text for example in EXAMPLES)
    assert all(len(line) <= 120 for line in text.splitlines() if "=" not in line.partition("|")[0] or "|" not in line)


# config


def every_field(kind: Any = Config, prefix: str = "") -> dict[str, Any]:
    """Every field of the schema by key, found by another walk than the product's."""
    found = {}
    for f in fields(kind):
        key, hint = f"{prefix}{f.name}", get_type_hints(kind)[f.name]
        found[key] = f
        inner = [part for part in (hint, *get_args(hint)) if is_dataclass(part)]
        name = "" if is_dataclass(hint) else "NAME."
        for part in inner:
            found |= every_field(part, f"{key}.{name}")
    return found


def test_every_setting_has_a_meaning_and_is_listed_with_type_default_and_check(prism: Command) -> None:
    listed = prism.bare("config")
    assert (listed.code, listed.err) == (0, "")
    known = every_field()
    assert {setting.key for setting in all_settings()} == set(known)
    lines = listed.out.splitlines()
    words = " ".join(listed.out.split())
    for key, f in known.items():
        doc, check = f.metadata["doc"], f.metadata["check"]
        assert len(doc) > 3, key
        assert doc in words, key
        assert key in lines or f"[{key}] {doc}" in lines, key
        assert check is None or check[1] in words, key
    assert {key for key, _, _ in walk(compose(["recipe=digits_smoke"])) if "teachers.models." not in key} <= set(known)


@pytest.mark.parametrize(
    ("prefix", "first", "last"),
    [
        ("method.statistics_r", "method.statistics_role", "method.statistics_reduction"),
        ("teachers.models.mine.arch", "teachers.models.NAME.arch", "teachers.models.NAME.arch"),
        ("compute.pools.big", "compute.pools.NAME.actors", "compute.pools.NAME.preemptions_per_hour"),
        ("student.lr", "student.lr", "student.lr_grid"),
    ],
)
def test_a_prefix_lists_the_settings_that_begin_so(prism: Command, prefix: str, first: str, last: str) -> None:
    keys = [line for line in prism.bare("config", prefix).out.splitlines()[2:] if line and not line.startswith(" ")]
    assert (keys[0], keys[-1]) == (first, last)
    assert len(keys) <= 8


def test_a_choice_is_explained_and_a_default_shown(prism: Command) -> None:
    text = prism.bare("config", "method.logit_role").out
    for words in ("whose cross-entropy guides", "one of primary, active, drawn", "default: primary"):
        assert words in text


@pytest.mark.parametrize(
    ("prefix", "words"),
    [
        ("methd", ["'methd'", "did you mean method"]),
        ("iteratons", ["'iteratons'", "did you mean method.iterations"]),
        ("method.iterations=3", ["'method.iterations=3'", "beginning of a key"]),
        ("zzzzzz", ["'zzzzzz'", "groups: ", "student"]),
    ],
)
def test_a_wrong_prefix_is_refused_with_those_near_it(prism: Command, prefix: str, words: list[str]) -> None:
    assert_refused(prism.bare("config", prefix), *words)


# doctor


def test_the_doctor_looks_at_all_that_a_run_needs(prism: Command, tmp_path: Path) -> None:
    checked = prism("doctor", "compute=ray", f"storage={tmp_path}/out")
    assert checked.code == 0, checked.out
    for name in ("python", "torch 2", "GPU", "xformers", "ray", "CPUs", "memory", "/dev/shm", "temporary", "storage"):
        assert name in checked.out, name


def test_every_finding_of_the_doctor_that_is_not_well_says_what_to_do(prism: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    checked = prism("doctor", "compute=ray_gpu", f"storage={tmp_path}/file/x")
    assert checked.code == 1
    lines = checked.out.splitlines()
    unwell = [number for number, line in enumerate(lines) if line.split()[0] in ("BAD", "--")]
    assert len(unwell) >= 2, "no GPU, and no place for files"
    assert all("→" in lines[number + 1] for number in unwell)


MEASURED: list[tuple[Finding, Level, str]] = [
    (doctor.python_finding((3, 11)), Level.ok, ""),
    (doctor.python_finding((3, 14)), Level.bad, "3.13"),
    (doctor.python_finding((3, 10)), Level.bad, "3.11"),
    (doctor.packages_finding(dict.fromkeys(doctor.PACKAGES, "1")), Level.ok, ""),
    (doctor.packages_finding({"torch": "2.14"}), Level.bad, "pip install"),
    (doctor.memory_finding(8 << 30, 6 << 30), Level.ok, ""),
    (doctor.memory_finding(8 << 30, 1 << 30), Level.note, "compute=inline"),
    (doctor.shm_finding(64 << 20), Level.note, "--shm-size"),
    (doctor.shm_finding(2 << 30), Level.ok, ""),
    (doctor.shm_finding(None), Level.ok, ""),
    (doctor.devices_finding(["H200"], kernels="AVX2", has_driver=True, cuda="13.0"), Level.ok, ""),
    (doctor.devices_finding([], kernels="AVX2", has_driver=False, cuda=None), Level.ok, ""),
    (doctor.devices_finding([], kernels="AVX2", has_driver=True, cuda=None), Level.note, "pytorch.org"),
    (doctor.devices_finding([], kernels="AVX2", has_driver=True, cuda="13.0"), Level.note, "nvidia-smi"),
]


@pytest.mark.parametrize(("finding", "level", "remedy"), MEASURED, ids=lambda value: getattr(value, "name", None))
def test_what_the_doctor_measures_is_judged(finding: Finding, level: Level, remedy: str) -> None:
    assert finding.level is level
    assert remedy in (finding.remedy or "")
    assert (finding.remedy is None) == (level is Level.ok)


# init


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 photos of four classes, without a test folder. Not to be written to."""
    return make_photos(tmp_path_factory.mktemp("photos") / "my things")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_recipe_fits_the_photos_and_says_so(prism: Command, photos: Path, here: Path) -> None:
    written = prism.bare("init", f"dataset.path={photos}")
    assert (written.code, written.err) == (0, "")
    for words in ("my_things.yaml: 4 classes, 160 images to train on, 40 held out", "color", "prism-ray run recipe="):
        assert words in written.out
    config = compose(["recipe=my_things.yaml", "compute=inline"])
    assert config.dataset.path == str(photos)
    assert (config.recipe_name, config.dataset.image_size, config.dataset.channels) == ("my_things", 32, 3)
    assert (config.images_per_class, config.dataset.test_fraction) == (10, 0.2)
    planned = prism.bare("plan", "recipe=my_things.yaml", "compute=inline")
    assert "images      40 of 32x32" in planned.out
    assert sorted(path.name for path in here.iterdir()) == ["my_things.yaml"], "looking leaves nothing else"


def gray_letters(root: Path, *, per_class: int = 6, side: int = 12, split: bool = True) -> Path:
    draws = np.random.default_rng(0)
    for folder, number in (("train", per_class), ("val", 2)) if split else (("", per_class),):
        for name in ("a", "b"):
            (root / folder / name).mkdir(parents=True)
            for n in range(number):
                pixels = draws.integers(0, 256, (side, side), dtype=np.uint8)
                image = Image.fromarray(pixels) if n % 2 else Image.fromarray(np.stack([pixels] * 3, axis=-1))
                image.save(root / folder / name / f"{n}.png")
    return root


def test_small_gray_images_with_a_test_folder_are_taken_as_they_are(prism: Command, here: Path) -> None:
    gray_letters(here / "letters")
    written = prism.bare("init", "dataset.path=letters", "out=mine.yaml")
    assert "2 classes, 12 images to train on, 4 in the folder of test images" in written.out
    config = compose(["recipe=mine.yaml"])
    assert (config.dataset.image_size, config.dataset.channels, config.images_per_class) == (12, 1, 3)
    assert config.dataset.path == f"{here}/letters", "the recipe works from any folder"


def test_what_is_given_is_not_chosen(prism: Command, photos: Path, here: Path) -> None:
    given = ["dataset.image_size=48", "images_per_class=3", "dataset.name=mine", "dataset.test_fraction=0.5"]
    assert prism.bare("init", f"dataset.path={photos}", *given, "dataset.licence=CC0-1.0").code == 0
    config = compose(["recipe=mine.yaml"])
    assert (config.dataset.image_size, config.images_per_class, config.recipe_name) == (48, 3, "mine")
    assert (config.dataset.test_fraction, config.dataset.licence) == (0.5, "CC0-1.0")


def test_a_folder_may_have_any_name(prism: Command, here: Path) -> None:
    name = 'ünï 数字, it\'s "x" #hash: {x}'
    gray_letters(here / name)
    assert prism.bare("init", f"dataset.path={here}/{name}", "out=r.yaml").code == 0
    assert compose(["recipe=r.yaml"]).dataset.path == f"{here}/{name}"
    assert yaml.safe_load((here / "r.yaml").read_text())["dataset"]["name"] == "n_it_s_x_hash_x"


def test_a_recipe_is_never_written_over(prism: Command, photos: Path, here: Path) -> None:
    (here / "my_things.yaml").write_text("mine")
    for out in ([], ["out=my_things.yaml"]):
        assert_refused(prism.bare("init", f"dataset.path={photos}", *out), "my_things.yaml", "is there already")
    assert (here / "my_things.yaml").read_text() == "mine"


def one_image(root: Path) -> None:
    gray_letters(root, split=False)
    for path in sorted((root / "a").iterdir())[1:]:
        path.unlink()


def flat_folder(root: Path) -> None:
    root.mkdir()
    Image.new("L", (4, 4)).save(root / "0.png")


def text_inside(root: Path) -> None:
    gray_letters(root)
    (root / "train/a/notes.txt").write_text("x")


def one_class(root: Path) -> None:
    gray_letters(root, split=False)
    shutil.rmtree(root / "b")


BAD: list[tuple[str, list[str], list[str], Any]] = [
    ("no path", [], ["init: dataset.path is missing", "dataset.path=FOLDER"], None),
    ("no such folder", ["dataset.path=data"], ["'data' does not exist"], None),
    ("a file", ["dataset.path=data"], ["'data' is a file"], lambda root: root.write_text("x")),
    ("no classes", ["dataset.path=data"], ["no class folders", "train/<class>/"], flat_folder),
    ("empty", ["dataset.path=data"], ["no class folders"], lambda root: root.mkdir()),
    ("one class", ["dataset.path=data"], ["expected at least 2"], one_class),
    ("one image", ["dataset.path=data"], ["class 'a' has one image", "at least 2"], one_image),
    ("text inside", ["dataset.path=data"], ["train/a/notes.txt is no image file"], text_inside),
    ("too many wanted", ["dataset.path=data", "images_per_class=7"], ["images_per_class=7", "has 6"], gray_letters),
    ("wrong ending", ["dataset.path=data", "out=x.txt"], ["out='x.txt'", ".yaml"], gray_letters),
    ("no folder", ["dataset.path=data", "out=no/x.yaml"], ["out='no/x.yaml'", "does not exist"], gray_letters),
    (
        "another key",
        ["dataset.path=data", "method.iterations=3"],
        ["'method.iterations'", "in the recipe"],
        gray_letters,
    ),
    ("bad size", ["dataset.path=data", "dataset.image_size=0"], ["dataset.image_size=0", "1 to 8192"], gray_letters),
    ("bad scheme", ["dataset.path=foo://x"], ["'foo://x'", "known URL schemes"], None),
]


@pytest.mark.parametrize(("overrides", "words", "make"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_what_no_recipe_can_be_made_of_is_refused_and_nothing_is_written(
    prism: Command, here: Path, overrides: list[str], words: list[str], make: Any
) -> None:
    if make is not None:
        make(here / "data")
    before = sorted(here.rglob("*"))
    assert_refused(prism.bare("init", *overrides), *words)
    assert sorted(here.rglob("*")) == before


# show


def test_a_contact_sheet_is_drawn_into_the_run_folder_again_and_again(prism: Command, run_dir: Path) -> None:
    for _ in range(2):
        shown = prism("show")
        assert (shown.code, shown.out) == (0, f"{run_dir}/report/images.png: 20 images of 10 classes\n")
    with Image.open(run_dir / "report/images.png") as sheet:
        assert sheet.format == "PNG"
        assert sheet.height == 4 + 10 * 52
        pixels = np.asarray(sheet.convert("L"))
    cells = pixels[:, -2 * 52 :]  # two columns of images of 16 pixels, enlarged to 48
    images = prism_ray.load_images(str(run_dir))
    np.testing.assert_array_equal(cells[4:52:3, :48:3], images.pixels[0, 0])
    np.testing.assert_array_equal(cells[4 + 9 * 52 : 52 + 9 * 52 : 3, 52:100:3], images.pixels[19, 0])
    assert prism("verify").code == 0, "it is no part of what the manifest promises"


def test_a_contact_sheet_goes_where_it_is_wanted_but_never_over_a_file(
    prism: Command, storage: Path, here: Path
) -> None:
    assert "sheet.png: 20 images" in prism("show", "out=sheet.png").out
    before = (here / "sheet.png").read_bytes()
    assert_refused(prism("show", "out=sheet.png"), "out='sheet.png'", "is there already")
    assert (here / "sheet.png").read_bytes() == before
    assert_refused(prism("show", "out=sheet.jpg"), "out='sheet.jpg'", ".png")
    assert_refused(prism("show", "out=no/sheet.png"), "out='no/sheet.png'", "does not exist")


def test_a_run_that_is_not_there_or_has_no_image_is_not_shown(prism: Command, storage: Path) -> None:
    assert_refused(prism("show", "seed=7"), "not found")
    assert prism("run", "run_id=second", "stages=[prepare,teach]").code == 0
    assert_refused(prism("show", "run_id=second"), "run second: has no images yet")


# All of it


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_hundred_photos_become_a_small_set_a_student_and_a_report(prism: Command, photos: Path, here: Path) -> None:
    """Within ten minutes; a test takes both parts in one process, one after the other."""
    started = time.monotonic()
    for command in (
        ["init", f"dataset.path={photos}", "out=things.yaml"],
        ["run", "recipe=things.yaml", "compute=inline"],
        ["show", "recipe=things.yaml", "compute=inline", "out=things.png"],
    ):
        done = prism.bare(*command)
        assert (done.code, done.err) == (0, ""), done
    assert time.monotonic() - started < 600
    (folder,) = (here / "outputs/runs").iterdir()
    images = prism_ray.load_images(str(folder))
    assert images.pixels.shape == (40, 3, 32, 32)
    assert images.class_names == list(CLASSES)
    student = prism_ray.load_teacher(str(folder / "student/soft-seed0"))
    assert student.num_classes == 4
    results = [json.loads(path.read_text()) for path in folder.glob("student/soft-*/prism_ray.json")]
    assert len(results) == 2
    assert (folder / "report/report.html").stat().st_size > 10_000
    assert (here / "things.png").stat().st_size > 10_000


def test_every_verb_has_a_line_in_the_help() -> None:
    assert {"init", "config", "show", "doctor"} <= set(VERBS)
    assert all(len(text) > 20 for _, text in VERBS.values())
