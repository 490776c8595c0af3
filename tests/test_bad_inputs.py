"""Whatever is wrong is refused before Ray or a model starts: exit code 2, one line, what and where."""

import json
import os
import pickle
import resource
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import SMOKE, Command, Result
from PIL import Image

from prism_ray.models.classifier import build_classifier, save_classifier
from prism_ray.schema import REAL_COLUMNS, image_schema

LIMIT_S = 5.0
"""CPU seconds of a refusal: other work on the machine makes it take longer by the clock."""


def cpu_of_children() -> float:
    """CPU seconds of the processes that have ended here."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def assert_refused(result: Result, *words: str) -> None:
    assert result.code == 2, result
    assert result.out == "", "nothing was begun"
    assert result.err.startswith("prism-ray: "), result.err
    assert result.err.count("\n") == 1, result.err
    assert result.err.endswith("\n")
    for word in words:
        assert word in result.err, result.err


# Settings. The number is that of the project's list of bad inputs.

SETTINGS: list[tuple[str, list[str], list[str]]] = [
    ("1 unknown key", ["method.iteratoins=3"], ["method.iteratoins", "did you mean method.iterations?"]),
    ("1 unknown top-level key", ["ipc=10"], ["ipc: unknown setting", "images_per_class"]),
    ("1 key below a value", ["method.iterations.a=3"], ["method.iterations.a", "no parts"]),
    ("1 unknown key of a new teacher", ["teachers.models.new={archh: x}"], ["teachers.models.new.archh"]),
    ("1 hydra's own settings", ["hydra.run.dir=/tmp/x"], ["hydra.run.dir: unknown setting"]),
    ("2 typo in a preset", ["method=prsm"], ["method=prsm", "did you mean prism?"]),
    ("2 typo in a recipe", ["recipe=digts"], ["recipe=digts", "did you mean digits?"]),
    ("2 added group", ["+experiment=nope"], ["'+experiment=nope'", "key=value"]),
    ("2 preset by path", ["method=../method/prism"], ["method=../method/prism: unknown"]),
    ("2 another verb's group", ["suite=digits"], ["suite", "bench"]),
    ("3 two equal signs", ["a=="], ["'a=='", "expected key=value"]),
    ("3 no equal sign", ["method.iterations"], ["'method.iterations'", "expected key=value"]),
    ("3 deletion", ["~method"], ["'~method'", "added or deleted"]),
    ("3 sweep", ["seed=1,2"], ["'seed=1,2'", "one value only"]),
    ("4 unclosed list", ["student.seeds=[0,1"], ["'student.seeds=[0,1'", "[a,b]"]),
    ("5 text for an integer", ["images_per_class=ten"], ["images_per_class=ten", "expected an integer or null"]),
    ("5 fraction for an integer", ["method.iterations=1.5"], ["method.iterations=1.5", "expected an integer"]),
    ("5 text for a number", ["method.lr=fast"], ["method.lr=fast", "expected a number"]),
    ("5 nothing", ["method.iterations="], ["method.iterations=:", "expected an integer"]),
    ("5 null", ["method.iterations=null"], ["method.iterations=null", "expected an integer"]),
    ("5 one for a list", ["student.seeds=3"], ["student.seeds=3", "expected a list such as [a,b]"]),
    ("5 text in a list of integers", ["student.seeds=[a]"], ["student.seeds=[a]", "each an integer"]),
    ("5 unknown choice", ["method.init=rela"], ["method.init=rela", "expected one of real, noise"]),
    ("5 unknown choice in a list", ["student.labels=[softt]"], ["student.labels=[softt]", "one of soft, hard"]),
    ("5 neither true nor false", ["repair=maybe"], ["repair=maybe", "expected true or false"]),
    ("5 mapping for a value", ["method.lr={a: 1}"], ["method.lr={a: 1}", "expected a number"]),
    ("5 value for a mapping", ["student.model_args=3"], ["student.model_args=3", "expected a mapping"]),
    ("5 value for a teacher", ["teachers.models.vgg=3"], ["teachers.models.vgg=3", "expected a mapping"]),
    ("6 no images", ["images_per_class=0"], ["images_per_class=0", "at least 1"]),
    ("7 fewer than none", ["images_per_class=-1"], ["images_per_class=-1", "at least 1"]),
    ("8 a billion images", ["images_per_class=1000000000"], ["images_per_class=1000000000", "max_images"]),
    ("8 too many in all", ["images_per_class=1000000", "method=sre2l"], ["makes 10000000 images", "max_images"]),
    ("9 rate that is no number", ["method.lr=nan"], ["method.lr=nan", "finite"]),
    ("10 infinite rate", ["teach.lr=inf"], ["teach.lr=inf", "finite"]),
    ("11 negative decay", ["student.weight_decay=-0.1"], ["student.weight_decay=-0.1", "at least 0"]),
    ("12 empty batch", ["method.batch_size=0"], ["method.batch_size=0", "at least 1"]),
    ("13 no iterations", ["method.iterations=0"], ["method.iterations=0", "at least 1"]),
    ("14 unknown teacher", ["teachers.primary=nobody"], ["teachers.primary", "'nobody'", "convnet, vgg"]),
    ("14 unknown label teacher", ["labels.teachers=[nobody]"], ["labels.teachers", "'nobody'"]),
    ("14 unknown architecture", ["teachers.models.vgg.arch=prism_vg"], ["teachers.models.vgg.arch", "prism_vgg"]),
    ("14 unknown student", ["student.arch=resnet81"], ["student.arch", "'resnet81'", "did you mean resnet18"]),
    ("14 unknown pretrained teacher", ["teachers.models.vgg.source=timm:resnet81"], ["models.vgg.source", "resnet81"]),
    (
        "15 statistics of a teacher without batch norm",
        ["method=sre2l", "teachers.models.vgg.batch_norm=false"],
        ["teachers.primary='vgg'", "batch norm"],
    ),
    ("16 teacher twice in the pool", ["teachers.pool=[vgg,vgg]"], ["teachers.pool", "none of them twice"]),
    ("16 pool without its primary", ["teachers.pool=[convnet]"], ["teachers.pool", "'vgg'"]),
    (
        "17 more slots than teachers",
        ["method=prism_released", "method.statistics_slots=2"],
        ["method.statistics_slots=2", "auxiliary"],
    ),
    ("18 probability", ["method.statistics_probability=1.5"], ["method.statistics_probability=1.5", "0 to 1"]),
    ("18 betas", ["method.adam_betas=[0.9,1]"], ["method.adam_betas", "two numbers"]),
    ("20 padding beyond the image", ["dataset.pad=8"], ["dataset.pad=8", "image_size=16"]),
    ("20 channels", ["dataset.channels=2"], ["dataset.channels=2", "1 (gray) or 3 (RGB)"]),
    ("14 unknown class", ["classes=[eleven]"], ["classes", "'eleven'"]),
    ("14 class twice", ["classes=['1','1']"], ["classes", "twice"]),
    ("14 unknown judge", ["evaluate.judges=[nobody]"], ["evaluate.judges", "'nobody'"]),
    ("5 unknown role", ["method.statistics_role=primary"], ["method.statistics_role=primary", "fixed"]),
    ("5 unknown plan of batches", ["method.batch_plan=classwise"], ["batch_plan=classwise", "class_major"]),
    (
        "12 rounds of batches with one image of a class",
        ["method=prism_released", "method.rounds=2"],
        ["method.rounds=2", "method.batch_plan=class_major"],
    ),
    ("32 unknown scheme of storage", ["storage=ftp://host/x"], ["storage='ftp://host/x'", "file://"]),
    ("32 unknown scheme of data", ["dataset=image_folder", "dataset.path=foo://x"], ["dataset.path='foo://x'"]),
    ("35 run outside the storage", ["run_id=../x"], ["run_id=../x", "letters"]),
    ("35 start outside the storage", ["method.init=generated", "method.init_run=../x"], ["init_run=../x", "letters"]),
    ("35 absolute run", ["run_id=/etc/x"], ["run_id=/etc/x", "letters"]),
    ("35 teacher name that is a path", ["teachers.models.a/b.arch=prism_vgg"], ["teachers.models.a/b", "key=value"]),
    ("35 data set name that is a path", ["dataset.name=../../x"], ["dataset.name=../../x", "letters"]),
    ("36 no such GPU", ["compute=ray_gpu"], ["GPUs", "this machine has 0"]),
    ("36 GPU without a pool", ["compute.gpus_per_actor=1"], ["compute.actors=1", "this machine has 0"]),
    ("36 too many actors", ["compute=ray", "compute.actors=10000"], ["compute.actors=10000", "would wait for ever"]),
    ("36 no actors", ["compute=ray", "compute.actors=0"], ["compute.actors=0", "at least 1"]),
    ("37 one and a half GPUs", ["compute=ray", "compute.gpus_per_actor=1.5"], ["gpus_per_actor=1.5", "whole GPUs"]),
    ("38 nobody answers", ["compute=ray", "compute.address=127.0.0.1:1"], ["'127.0.0.1:1'", "no Ray cluster answers"]),
    ("38 no address", ["compute=ray", "compute.address=somewhere"], ["'somewhere'", "HOST:PORT"]),
    ("40 unknown stage", ["stages=[prepare,cook]"], ["stages", "'cook'", "distill"]),
    ("40 unknown executor", ["compute.executor=slurm"], ["compute.executor=slurm", "inline, ray"]),
    ("42 one seed twice", ["student.seeds=[1,1]"], ["student.seeds=[1, 1]", "twice"]),
    ("2 typo in a student preset", ["student=sre2"], ["student=sre2", "did you mean sre2l?"]),
    ("2 typo in a label preset", ["labels=slre2l"], ["labels=slre2l", "did you mean sre2l?"]),
    ("5 unknown rule", ["labels.rule=median"], ["labels.rule=median", "mean, frobenius, sample_norm"]),
    ("5 unknown mixing", ["labels.mix=blend"], ["labels.mix=blend", "none, cutmix, mixup"]),
    ("13 steps and epochs", ["student.epochs=3"], ["student.steps=10", "student.epochs=3", "null"]),
    ("13 neither steps nor epochs", ["student.steps=null"], ["student.steps=null", "student.epochs=null"]),
    ("18 bits between", ["labels.bits=12"], ["labels.bits=12", "16 (half precision) or 1 to 8"]),
    ("18 no class kept", ["labels.top_k=0"], ["labels.top_k=0", "at least 1"]),
    ("18 negative weight", ["labels.weights=[-1]"], ["labels.weights=[-1.0]", "above 0"]),
    ("18 averaging that never moves", ["student.ema_decay=1"], ["student.ema_decay=1", "below 1"]),
    ("14 label teacher twice", ["labels.teachers=[vgg,vgg]"], ["labels.teachers", "twice", "labels.weights"]),
    ("14 unknown own family", ["labels.own_family={prism_convnet: nobody}"], ["labels.own_family", "'nobody'"]),
    ("14 weights of other teachers", ["labels.weights=[1,2]"], ["labels.weights", "2 weights for 1 label teachers"]),
    (
        "12 coupled labels online",
        ["labels.online=true", "labels.rule=sample_norm"],
        ["labels.rule=sample_norm", "online"],
    ),
    (
        "12 coupled labels online",
        ["labels.online=true", "labels.batch_statistics=true"],
        ["batch_statistics", "online"],
    ),
    (
        "15 statistics of label teachers without batch norm",
        ["labels.batch_statistics=true", "teachers.models.vgg.batch_norm=false", "method=random_real"],
        ["labels.batch_statistics=true", "batch norm"],
    ),
    ("9 a grid of one", ["student.lr_grid=[0.1]"], ["student.lr_grid=[0.1]", "two or more"]),
    ("9 a grid with a negative rate", ["student.lr_grid=[0.1,-1]"], ["student.lr_grid", "above 0"]),
    ("5 unaugmented images within a training", ["student.blocks=[soft,plain]"], ["student.blocks", "soft and hard"]),
    ("5 soft labels that are never learned", ["student.blocks=[hard]"], ["student.blocks=[hard]", "[hard]"]),
    ("12 one teacher to balance", ["labels.rule=frobenius"], ["labels.rule=frobenius", "vgg is the only one"]),
    (
        "13 no image left to judge by",
        ["method=random_real", "images_per_class=null", "student.lr_grid=[0.1,0.2]"],
        ["student.lr_grid", "images_per_class=null"],
    ),
    (
        "13 one image to learn from and to judge by",
        ["images_per_class=1", "student.lr_grid=[0.1,0.2]", "student.validation=synthetic"],
        ["student.validation=synthetic", "images_per_class=1"],
    ),
    ("36 more workers than images", ["compute.workers_per_student=17"], ["workers_per_student=17", "batch_size=16"]),
    (
        "36 more workers than CPUs",
        ["compute=ray", "compute.workers_per_student=1000", "student.batch_size=1000"],
        ["compute.workers_per_student=1000", "would wait for ever"],
    ),
    ("36 fewer than the fewest", ["compute.min_workers_per_student=2"], ["min_workers_per_student=2", "lower it"]),
    ("44 target in arguments", ["student.model_args={_target_: os.system}"], ["_target_", "not allowed"]),
    ("44 target as a key", ["_target_=os.system"], ["_target_", "not allowed"]),
    ("45 interpolation", ["recipe_name=${oc.env:HOME}"], ["interpolations", "not allowed"]),
    ("45 interpolation in a list", ["student.seeds=[${seed}]"], ["interpolations", "not allowed"]),
]


@pytest.mark.parametrize(("overrides", "words"), [case[1:] for case in SETTINGS], ids=[case[0] for case in SETTINGS])
def test_a_wrong_setting_is_refused(
    prism: Command, monkeypatch: pytest.MonkeyPatch, overrides: list[str], words: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    started = time.process_time()
    result = prism("run", *overrides)
    assert time.process_time() - started < LIMIT_S
    assert_refused(result, *words)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["images_per_class=200", "method=prism_released"], ["images_per_class=200", "only 142 real"]),
        (["images_per_class=200", "method.init=real", "method.selection=herding"], ["only 142 real"]),
        (["images_per_class=50", "method=real_kth", "evaluate.split=validation"], ["only 42 real"]),
        (["images_per_class=20", "method=rded", "method.candidates=50"], ["crops of 80 real", "method.candidates"]),
    ],
    ids=["first", "selected", "beside those to measure on", "crops"],
)
def test_more_images_than_a_class_has_are_refused_before_teachers_are_trained(
    prism: Command, tmp_path: Path, overrides: list[str], words: list[str]
) -> None:
    result = prism("run", *overrides)  # known once the data is prepared
    assert not list((tmp_path / "outputs/artifacts").glob("teachers/*"))
    assert_refused(Result(result.code, "", result.err), *words)


# Recipe and suite files


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a: [1,\n b: }", ["not a YAML file"]),
        (b"recipe_name: \xff\xfe\n", ["not a YAML file"]),
        (b"\x00\x01\x02", ["not a YAML file"]),
        (b"", ["not a YAML mapping"]),
        (b"- 1\n", ["not a YAML mapping"]),
        (b"method: {_target_: os.system}\n", ["_target_"]),
        (b"recipe_name: ${oc.env:HOME}\n", ["interpolations"]),
        (b"method: !!python/object/apply:os.system ['true']\n", ["not a YAML file"]),
        (b"recipe_name: x\nfoo: 3\n", ["foo: unknown setting"]),
        (b"method: {iteratoins: 3}\n", ["did you mean method.iterations?"]),
        (b"images_per_class: ten\n", ["images_per_class", "'ten'", "expected an integer"]),
        (b"student: {labels: [softt]}\n", ["student.labels", "softt", "soft, hard"]),
        (b"defaults:\n  - override /dataset: nope\n", ["dataset=nope", "digits, fashion_mnist"]),
    ],
)
def test_a_recipe_file_that_is_none_is_refused(
    prism: Command, tmp_path: Path, content: bytes, words: list[str]
) -> None:
    (tmp_path / "my.yaml").write_bytes(content)
    assert_refused(prism("run", f"recipe={tmp_path}/my.yaml"), *words)


def test_a_recipe_that_is_missing_or_a_folder_is_refused(prism: Command, tmp_path: Path) -> None:
    for path in (f"{tmp_path}/none.yaml", f"{tmp_path}/"):
        assert_refused(prism("run", f"recipe={path}"), f"recipe={path}", "no such file")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"rows: [", ["not a YAML file"]),
        (b"recipe: digits_smoke\n", ["'recipe' and 'rows'"]),
        (b"recipe: digits_smoke\nrows: []\n", ["'recipe' and 'rows'"]),
        (b"recipe: digits_smoke\nrows: {a: [method=prsm]}\n", ["method=prsm"]),
        (b"recipe: nope\nrows: {a: [method=prism]}\n", ["recipe=nope: unknown"]),
        (b"recipe: digits_smoke\nrows: {a: []}\ncolums: {b: []}\n", ["may hold 'columns'"]),
        (
            b"recipe: digits_smoke\nrows: {a: []}\nreferences: {baseline: b}\n",
            ["references.baseline=b", "name of a row"],
        ),
        (b"recipe: digits_smoke\nrows: {a: []}\nreferences: {best: a}\n", ["references.best=a", "random_real"]),
        (b"recipe: digits_smoke\nrows: {a: [], b: []}\n", ["a and b have the same settings"]),
    ],
)
def test_a_suite_file_that_is_none_is_refused(prism: Command, tmp_path: Path, content: bytes, words: list[str]) -> None:
    (tmp_path / "my.yaml").write_bytes(content)
    assert_refused(prism.bare("bench", f"suite={tmp_path}/my.yaml", f"storage={tmp_path}/outputs"), *words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["suite=NAME", "digits"]),
        (["suite=nope"], ["suite=nope", "unknown"]),
        (["suite=digits", "suite=digits"], ["once"]),
        (["suite=digits", "recipe=digits"], ["recipe", "leave"]),
        (["suite=digits", "run_id=x"], ["run_id", "leave"]),
    ],
)
def test_a_bench_without_its_one_suite_is_refused(prism: Command, arguments: list[str], words: list[str]) -> None:
    assert_refused(prism.bare("bench", *arguments), *words)


# Teachers from elsewhere

CONFIG = {"architecture": "prism_vgg", "num_classes": 10}


def web_page(path: Path) -> None:
    path.write_text("<!DOCTYPE html><html>Sign in</html>")


def lfs_pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def cut_short(path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 9)


def garbage(path: Path) -> None:
    path.write_bytes(b"\xff" * 1000)


def pickled(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.with_name("pytorch_model.bin").write_bytes(pickle.dumps({"w": 1}))


def disguised_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"w": 1}))


@pytest.mark.parametrize(
    ("number", "make", "words"),
    [
        (22, lambda path: None, ["holds no weights"]),
        (23, web_page, ["web page"]),
        (23, lfs_pointer, ["git-lfs pointer", "git lfs pull"]),
        (24, cut_short, ["its header says"]),
        (24, garbage, ["no safetensors file"]),
        (24, Path.touch, ["is empty"]),
        (25, pickled, ["pickle", "allow_pickle=true"]),
        (25, disguised_pickle, ["pickle"]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_weights_that_are_none_are_refused_by_their_file(
    prism: Command, tmp_path: Path, number: int, make: Callable[[Path], None], words: list[str]
) -> None:
    folder = tmp_path / "teacher"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    make(folder / "model.safetensors")
    assert_refused(prism("run", f"teachers.models.vgg.source={folder}"), str(folder), *words)
    assert not (tmp_path / "outputs").exists()


def test_a_folder_of_weights_that_is_missing_is_refused(prism: Command, tmp_path: Path) -> None:
    assert_refused(prism("run", f"teachers.models.vgg.source={tmp_path}/none"), f"{tmp_path}/none", "no folder")
    (tmp_path / "bare").mkdir()
    assert_refused(prism("run", f"teachers.models.vgg.source={tmp_path}/bare"), "config.json")


@pytest.mark.parametrize(
    ("class_names", "words"),
    [
        (["a", "b", "c"], ["3 classes", "the data set has 10"]),
        (["1", "0", *map(str, range(2, 10))], ["class 0", "same order"]),
    ],
    ids=["19 other number of classes", "19 other order of classes"],
)
def test_a_teacher_of_other_classes_is_refused_before_anything_is_made(
    prism: Command, tmp_path: Path, class_names: list[str], words: list[str]
) -> None:
    teacher = build_classifier(
        "prism_vgg",
        num_classes=len(class_names),
        in_chans=1,
        image_size=16,
        mean=[0.3],
        std=[0.4],
        model_args={"channels": [8, 8, 16]},
        seed=0,
    )
    save_classifier(teacher, tmp_path / "teacher", class_names=class_names, extra={})
    result = prism("run", f"teachers.models.vgg.source={tmp_path}/teacher", "teachers.models.vgg.model_args={}")
    assert_refused(result, "teachers.models.vgg", *words)
    assert not (tmp_path / "outputs").exists()


def test_a_teacher_that_knows_nothing_is_refused_before_synthesis(prism: Command, storage: Path) -> None:
    result = prism("run", "seed=5", "teachers.min_accuracy=1.0")
    assert_refused(Result(result.code, "", result.err), "teachers.models.vgg", "teachers.min_accuracy=100.0%")
    (new,) = [run for run in (storage / "runs").iterdir() if not (run / "manifest.json").exists()]
    assert not (new / "images").exists()


# Real data


def picture(path: Path, size: tuple[int, int] = (4, 4)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, 7).save(path)


def good_folder(root: Path) -> None:
    for name in ("cat", "dog"):
        for k in range(3):
            picture(root / name / f"{k}.png")


def empty_folder(root: Path) -> None:
    root.mkdir()


def class_without_images(root: Path) -> None:
    good_folder(root)
    (root / "emu").mkdir()


def text_among_images(root: Path) -> None:
    good_folder(root)
    (root / "dog/notes.txt").write_text("woof")


def text_named_as_an_image(root: Path) -> None:
    good_folder(root)
    (root / "dog/0.png").write_text("woof")


def truncated_image(root: Path) -> None:
    good_folder(root)
    (root / "dog/0.png").write_bytes((root / "dog/0.png").read_bytes()[:40])


def chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def bomb(root: Path) -> None:
    good_folder(root)
    side = (100_000).to_bytes(4, "big")
    header = chunk(b"IHDR", side + side + bytes([8, 0, 0, 0, 0]))
    body = chunk(b"IDAT", zlib.compress(b"\0" * 10_000))
    (root / "dog/0.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + body + chunk(b"IEND", b""))


def one_class(root: Path) -> None:
    picture(root / "cat/0.png")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (empty_folder, ["no class folders"]),
        (class_without_images, ["emu", "no images"]),
        (text_among_images, ["dog/notes.txt"]),
        (text_named_as_an_image, ["dog/0.png", "cannot be decoded"]),
        (truncated_image, ["dog/0.png", "cannot be decoded"]),
        (bomb, ["dog/0.png", "megapixels"]),
        (one_class, ["at least 2"]),
        (lambda root: None, ["does not exist"]),
        (Path.touch, ["is a file"]),
    ],
    ids=[
        "26 empty folder",
        "27 class without images",
        "28 text file",
        "28 text named as an image",
        "28 truncated image",
        "29 decompression bomb",
        "42 one class",
        "no folder",
        "a file",
    ],
)
def test_a_folder_of_images_that_is_none_is_refused(
    prism: Command, tmp_path: Path, make: Callable[[Path], None], words: list[str]
) -> None:
    make(tmp_path / "data")
    assert_refused(prism("run", "dataset=image_folder", f"dataset.path={tmp_path}/data"), *words)
    assert not (tmp_path / "outputs").exists()


def test_a_source_without_its_path_is_refused(prism: Command) -> None:
    for source in ("image_folder", "parquet"):
        assert_refused(prism("run", f"dataset={source}"), "dataset.path", source)


def parquet_of(folder: Path, class_names: list[str]) -> None:
    folder.mkdir()
    Image.new("L", (4, 4), 9).save(folder / "0.png")
    png = (folder / "0.png").read_bytes()
    (folder / "0.png").unlink()
    rows = [
        {"image": {"bytes": png, "path": None}, "label": n % len(class_names), "image_id": str(n)}
        for n in range(4 * len(class_names))
    ]
    pq.write_table(
        pa.Table.from_pylist(rows, schema=image_schema(REAL_COLUMNS, class_names)), folder / "train-0.parquet"
    )


def test_class_names_that_occur_twice_are_refused(prism: Command, tmp_path: Path) -> None:
    parquet_of(tmp_path / "data", ["cat", "dog", "cat"])
    assert_refused(prism("run", "dataset=parquet", f"dataset.path={tmp_path}/data"), "['cat']", "more than once")


def test_a_table_without_the_image_column_is_refused(prism: Command, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table({"label": [0, 1]}), tmp_path / "data/train.parquet")
    assert_refused(prism("run", "dataset=parquet", f"dataset.path={tmp_path}/data"), "image", "train.parquet")


def test_a_table_that_is_none_is_refused(prism: Command, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.parquet").write_text("<html>")
    assert_refused(prism("run", "dataset=parquet", f"dataset.path={tmp_path}/data"), "train.parquet")


# Storage and cluster


def test_storage_that_cannot_be_written_is_refused(prism: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path in (f"{tmp_path}/file", f"{tmp_path}/file/below", "/proc/none", "/dev/null/x"):
        assert_refused(prism("run", f"storage={path}"), path, "choose another storage")


def test_a_run_folder_of_other_settings_is_refused(prism: Command, tmp_path: Path) -> None:
    assert prism("run", "run_id=mine", "stages=[prepare]").code == 0
    result = prism("run", "run_id=mine", "method.iterations=9")
    assert_refused(result, "run mine", "method.iterations: 8 → 9")


def test_a_cluster_of_the_environment_that_does_not_answer_is_refused(
    prism: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert_refused(prism("run", "compute=ray"), "'127.0.0.1:1'", "RAY_ADDRESS")


def test_without_ray_no_cluster_is_asked(prism: Command, storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert prism("run", "compute=inline").code == 0


# In a process of its own


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        (["method.iterations=ten"], "method.iterations=ten"),
        (["student.arch=resnet81"], "resnet18"),
        (["compute=ray", "compute.gpus_per_actor=8"], "GPUs"),
        (["compute=ray", "compute.address=127.0.0.1:1"], "no Ray cluster answers"),
        (["images_per_class=1000000", "method=sre2l"], "max_images"),
        (["teachers.models.vgg.source=/none"], "/none"),
        (["dataset=image_folder", "dataset.path=/none"], "/none"),
        (["storage=/dev/null/x"], "/dev/null/x"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_refusal_takes_seconds_and_starts_neither_ray_nor_torch(
    tmp_path: Path, overrides: list[str], word: str
) -> None:
    program = (
        "import sys; from prism_ray import cli; code = cli.main(sys.argv[1:]);"
        "print([m for m in ('torch', 'ray', 'timm') if m in sys.modules]); sys.exit(code)"
    )
    given = {override.partition("=")[0] for override in overrides}
    defaults = [d for d in (*SMOKE, f"storage={tmp_path}/outputs") if d.partition("=")[0] not in given]
    before = cpu_of_children()
    ended = subprocess.run(
        [sys.executable, "-c", program, "run", *defaults, *overrides],
        capture_output=True,
        text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        timeout=120,
        check=False,
    )
    assert cpu_of_children() - before < LIMIT_S
    assert_refused(Result(ended.returncode, "", ended.stderr), word)
    assert ended.stdout == "[]\n"
