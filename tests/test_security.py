"""What a file from elsewhere, an answer of a language model and a careless setting can't do."""

import ast
import contextlib
import importlib.metadata
import io
import ipaddress
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import tomllib
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from commands import SMOKE, Command
from packaging.requirements import Requirement
from packaging.version import Version
from PIL import Image

from prism_ray.config import DatasetConfig
from prism_ray.data.hf_parquet import BATCH, HfParquet
from prism_ray.data.image_folder import ImageFolder
from prism_ray.data.pixels import MAX_PIXELS, decode
from prism_ray.data.prepared import PreparedDataset, prepare_dataset
from prism_ray.documents import is_plain, parse_json, parse_yaml, record
from prism_ray.errors import InputError, PrismError, one_line, printable, redacted
from prism_ray.generator_files import check_generator
from prism_ray.ledger import Attempt, Ledger, Receipt, read_table, run_unit
from prism_ray.methods.soft_labels import Codec
from prism_ray.models.classifier import build_classifier, load_classifier, save_classifier
from prism_ray.options import Source
from prism_ray.prompts.table import from_jsonl
from prism_ray.schema import IMAGE, table_bytes
from prism_ray.staging import _wanted
from prism_ray.storage import LocalStore, read_json, sha256_of, to_json
from prism_ray.weights import check_weights_file

ROOT = Path(__file__).parent.parent
SMOKE_RECIPE = (ROOT / "prism_ray/conf/recipe/digits_smoke.yaml").read_text()


class Attack:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)

    def __reduce__(self) -> Any:
        return open, (self._path, "w")


def assert_refused(prism: Command, *settings: str, words: tuple[str, ...]) -> None:
    result = prism("run", *settings)
    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1), result
    assert all(word in result.err for word in words), result.err


# Code in data


def test_nothing_in_the_package_unpickles_evaluates_or_builds_by_name() -> None:
    forbidden = re.compile(
        r"\bpickle\.|\bmarshal\.|\bshelve\.|\bjoblib\b|\bcloudpickle\b|(?<![\w.])(eval|exec|compile)\(|__import__\("
        r"|hydra\.utils|\binstantiate\(|yaml\.(unsafe_|full_)?load\((?!text, Loader=Loader)|os\.system|shell=True"
        r"|allow_pickle=True|trust_remote_code\W+True|weights_only=False"
    )
    found = []
    for path in sorted((ROOT / "prism_ray").rglob("*.py")):
        for call in (
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call | ast.keyword)
        ):
            text = ast.unparse(call)
            if forbidden.search(text.split("(")[0] + "(" if isinstance(call, ast.Call) else text):
                found.append(f"{path.relative_to(ROOT)}: {text[:80]}")
            if isinstance(call, ast.Call) and text.startswith("torch.load") and "weights_only=True" not in text:
                found.append(f"{path.relative_to(ROOT)}: {text[:80]}")
    assert [each for each in found if "Loader=Loader" not in each] == []


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "model.pth"])
def test_a_malicious_teacher_is_refused_before_anything_starts(prism: Command, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "teacher"
    folder.mkdir()
    (folder / "config.json").write_text('{"architecture": "prism_vgg"}')
    (folder / name).write_bytes(pickle.dumps(Attack(tmp_path / "written")))
    assert_refused(prism, f"teachers.models.vgg.source={folder}", words=("pickle", str(folder)))
    assert not (tmp_path / "written").exists()


INTERPOLATIONS = {
    "plain": "dataset: {licence: '${oc.env:CANARY}'}",
    "escaped": 'dataset: {licence: "\\x24{oc.env:CANARY}"}',
    "unicode": 'dataset: {licence: "\\u0024{oc.env:CANARY}"}',
    "in a key": 'student: {model_args: {"\\x24{oc.env:CANARY}": 1}}',
    "relative": 'dataset: {licence: "$\\x7bseed}"}',
    "built": "method: {_target_: pathlib.Path.unlink}",
    "built, escaped": 'student: {model_args: {"_tar\\x67et_": pathlib.Path.unlink}}',
    "built, deep": "teachers: {models: {vgg: {model_args: {a: [{b: {_target_: os.system}}]}}}}",
    "in defaults": 'defaults: [override /dataset: "\\x24{oc.env:CANARY}"]',
    "file outside": "defaults: [override /dataset: ../../../../etc/evil]",
    "hydra's own": "defaults: [override hydra/job_logging: colorlog]",
    "python tag": "method: !!python/object/apply:os.system [id]",
    "alias": "classes: &a ['1']\nlabels: {teachers: *a}",
    "merge of an alias": "a: &a {b: 1}\nc: {<<: *a}",
    "key twice": "seed: 1\nseed: 2",
}


@pytest.mark.parametrize("text", INTERPOLATIONS.values(), ids=INTERPOLATIONS.keys())
def test_a_recipe_is_data(prism: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("CANARY", "seen-in-the-environment")
    (tmp_path / "my.yaml").write_text(text)
    assert_refused(prism, f"recipe={tmp_path}/my.yaml", words=(f"{tmp_path}/my.yaml",))
    assert "seen-in-the-environment" not in prism("run", f"recipe={tmp_path}/my.yaml").err


@pytest.mark.parametrize("text", ["rows: {a: ['\\x24{seed}']}", "rows: &a {b: *a}", "rows: {a: [_target_=os.system]}"])
def test_a_suite_is_data(prism: Command, tmp_path: Path, text: str) -> None:
    (tmp_path / "my.yaml").write_text(f"recipe: digits_smoke\n{text.replace(chr(39), chr(34))}")
    result = prism.bare("bench", f"suite={tmp_path}/my.yaml", f"storage={tmp_path}/outputs")
    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1), result


@pytest.mark.parametrize(
    "text", ['settings: {a: "\\x24{oc.env:HOME}"}', "_target_: os.system", "a: &a [*a]", "[" * 999]
)
def test_the_settings_in_a_run_folder_are_data(prism: Command, run_dir: Path, storage: Path, text: str) -> None:
    (run_dir / "config.yaml").write_text(f"config_hash: x\n{text}")
    result = prism("status", f"storage={storage}")
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert "config.yaml: damaged" in result.err


def test_yaml_of_settings_is_what_yaml_says() -> None:
    content = {"a": [1, -0.5, True, None, "x: y", "#"], "b": {"c": {}, "d": []}, "e": "2001-01-01"}
    assert parse_yaml(yaml.safe_dump(content)) == content
    assert parse_yaml("a: 2001-01-01\nb: =\n") == {"a": "2001-01-01", "b": "="}


@pytest.mark.parametrize(
    "data", [b"[" * 100_000, b'{"a":' * 100_000, b'"\\ud800"', b"\xff", b"9" * 5000, b"", b"{'a': 1}"], ids=range(7)
)
def test_json_that_is_none_is_one_kind_of_error(data: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 (any message)
        parse_json(data)


# Tables


class Extension(pa.ExtensionType):
    """A type whose meaning is code."""

    def __init__(self) -> None:
        super().__init__(pa.binary(), "prism_ray.tests.extension")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: pa.DataType, serialized: bytes) -> "Extension":
        return cls()


FEATURES = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}
METADATA = {"huggingface": json.dumps({"info": {"features": FEATURES}})}


def source(path: Path) -> HfParquet:
    settings: dict[str, Any] = {"name": "p", "source": Source.parquet, "image_size": 4, "channels": 3}
    return HfParquet(DatasetConfig(**settings, path=str(path)))


def png(width: int = 4, height: int = 4) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (width, height)).save(sink, "PNG")
    return sink.getvalue()


def images(count: int = 2) -> pa.Array:
    return pa.array([{"bytes": png(), "path": None}] * count, type=IMAGE)


def deep(levels: int) -> pa.Array:
    kind = pa.int8()
    for _ in range(levels):
        kind = pa.struct([("a", kind)])
    return pa.nulls(2, kind)


def extension() -> pa.Array:
    return pa.ExtensionArray.from_storage(Extension(), pa.array([png()] * 2))


POISONED: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "extension type": (lambda: {"image": extension(), "label": [0, 1]}, "extension type"),
    "text for images": (lambda: {"image": ["a", "b"], "label": [0, 1]}, "expected encoded images"),
    "numbers for images": (lambda: {"image": [1.0, 2.0], "label": [0, 1]}, "expected encoded images"),
    "text for labels": (lambda: {"image": images(), "label": ["0", "1"]}, "expected integers"),
    "no labels": (lambda: {"image": images()}, "not one column"),
    "nested a thousand times": (lambda: {"image": deep(1000), "label": [0, 1]}, "deep"),
    "nested fifty times": (lambda: {"image": deep(50), "label": [0, 1]}, "expected encoded images"),
    "unknown label": (lambda: {"image": images(), "label": [0, 2**60]}, "has the label"),
    "a pickle for an image": (lambda: {"image": [pickle.dumps([1])] * 2, "label": [0, 1]}, "cannot be decoded"),
}


@pytest.mark.parametrize("case", POISONED)
def test_a_poisoned_table_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    columns, words = POISONED[case]
    pq.write_table(pa.table(columns()).replace_schema_metadata(METADATA), tmp_path / "train.parquet")
    pa.register_extension_type(Extension())
    try:
        with pytest.raises(InputError, match=words) as caught:
            source(tmp_path / "train.parquet").check()
    finally:
        pa.unregister_extension_type("prism_ray.tests.extension")
    assert "\n" not in str(caught.value)


def test_a_type_described_by_a_pickle_is_not_unpickled(tmp_path: Path) -> None:
    described = {
        "ARROW:extension:name": "arrow.py_extension_type",
        "ARROW:extension:metadata": pickle.dumps(Attack(tmp_path / "written"), protocol=0),
    }
    schema = pa.schema([pa.field("image", pa.binary(), metadata=described), ("label", pa.int64())], metadata=METADATA)
    pq.write_table(pa.table({"image": [png()], "label": [0]}, schema=schema), tmp_path / "train.parquet")
    with contextlib.suppress(InputError):
        source(tmp_path / "train.parquet").check()
    assert not (tmp_path / "written").exists()


def test_a_dictionary_that_repeats_a_large_value_is_read_a_few_rows_at_a_time(tmp_path: Path) -> None:
    path, value = tmp_path / "train.parquet", bytes(1 << 24)
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), pa.array([value]))
    with pq.ParquetWriter(
        path,
        pa.schema([("image", column.type), ("label", pa.int64())], metadata=METADATA),
        store_schema=False,
        dictionary_pagesize_limit=2**31 - 1,
        compression="zstd",
    ) as writer:
        writer.write_table(pa.table({"image": column, "label": [0] * 1000}, schema=writer.schema))
        writer.add_key_value_metadata(METADATA)
    assert path.stat().st_size < 10_000
    found = source(path)
    with found._open(found._files["train"][0]) as parquet:
        assert found._batch_rows(parquet, found._files["train"][0]) * len(value) <= 2**28
    with pytest.raises(InputError, match="cannot be decoded"):
        found.check()


def test_ordinary_tables_are_read_as_many_rows_at_a_time_as_ever(tmp_path: Path) -> None:
    table = pa.table({"image": images(200), "label": [0, 1] * 100}).replace_schema_metadata(METADATA)
    pq.write_table(table, tmp_path / "train.parquet")
    found = source(tmp_path / "train.parquet")
    with found._open(found._files["train"][0]) as parquet:
        assert found._batch_rows(parquet, found._files["train"][0]) == BATCH


def test_a_huge_row_group_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prism_ray.data.hf_parquet.MAX_GROUP_BYTES", 1000)
    table = pa.table({"image": images(100), "label": range(100)}).replace_schema_metadata(METADATA)
    pq.write_table(table, tmp_path / "train.parquet", use_dictionary=False)
    with pytest.raises(InputError, match=r"row group of \d+ bytes; expected at most 1000; save it with smaller"):
        source(tmp_path / "train.parquet").check()


# Names


@pytest.mark.parametrize("name", ["", "..", ".", "../a", "/a", "a/b", "a\\b", ".a", "-a", "a\0", "a\n", "é", "x" * 129])
def test_what_is_no_plain_name_of_a_file_is_none(name: str) -> None:
    assert not is_plain(name)


def test_names_of_a_model_elsewhere_lead_nowhere_but_into_its_copy() -> None:
    names = ("model_index.json", "unet/config.json", "../out.json", "unet/../../out.json", ".hidden.json", "a/b/c.json")

    class Elsewhere:
        def find(self, root: str, *, detail: bool) -> dict[str, dict[str, int]]:
            return {f"{root}/{name}": {"size": 2} for name in names}

    found = [str(name) for _, name, _ in _wanted(Elsewhere(), "/evil")]
    assert found == ["model_index.json", "unet/config.json"]


INDEX = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}


@pytest.mark.parametrize(
    "change",
    [
        {"../unet": ["diffusers", "X"]},
        {"/etc": ["diffusers", "X"]},
        {"vae": ["os", "system"]},
        {"vae": ["antigravity", "X"]},
        {"vae": ["diffusers"]},
        {"vae": ["diffusers", 3]},
    ],
)
def test_parts_of_a_generator_lie_in_it_and_come_from_known_libraries(tmp_path: Path, change: dict[str, Any]) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps(INDEX | change))
    with pytest.raises(InputError, match=r"is no folder in it|expected a class of diffusers or transformers"):
        check_generator(tmp_path)


def test_an_exported_image_never_leaves_its_folder(prism: Command, storage: Path, run_dir: Path) -> None:
    shard = sorted(run_dir.glob("images/*.parquet"))[0]
    table = pq.read_table(shard)
    place = table.schema.get_field_index("image_id")
    table = table.set_column(place, table.schema.field(place), pa.array(["../../../../out"] * len(table)))
    data = table_bytes(table)
    shard.write_bytes(data)
    receipt = run_dir / f"receipts/synthesize/{shard.stem}.json"
    before = json.loads(receipt.read_bytes())
    receipt.write_bytes(to_json(before | {"bytes": len(data)}))
    for path in run_dir.glob("receipts/*/*.json"):  # what was made from it says so
        path.write_text(path.read_text().replace(before["sha256"], sha256_of(data)))
    result = prism("export", f"storage={storage}", "export.formats=[imagefolder]", f"export.folder={storage}/x/y/z")
    assert (result.code, result.err.count("\n")) == (1, 1), result
    assert "'../../../../out'" in result.err
    assert not list(storage.rglob("out*.png"))


def test_a_receipt_that_names_a_file_outside_the_run_is_refused(tmp_path: Path) -> None:
    ledger = Ledger(LocalStore(tmp_path / "run"))
    ledger.write_receipt(Receipt(stage="synthesize", name="u", unit_id="0", key="../../outside"))
    with pytest.raises(InputError, match="leaves the run folder"):
        ledger.verify()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"files": [{"name": "../x", "split": "train", "rows": 0, "size_bytes": 0, "sha256": ""}]}, "counts|no name"),
        ({"counts": {"train": [2**40, 1], "test": [1, 1]}}, "counts other images"),
        ({"image_size": 2**40}, "pixels"),
        ({"class_names": "cat"}, "class_names"),
        ({"mean": [0.5]}, "one number per channel"),
    ],
)
def test_a_prepared_data_set_at_odds_with_itself_is_refused(tmp_path: Path, change: Any, words: str) -> None:
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            folder = tmp_path / "source" / split / name
            folder.mkdir(parents=True)
            (folder / "0.png").write_bytes(png())
    settings: dict[str, Any] = {"name": "p", "source": Source.image_folder, "image_size": 4, "channels": 3}
    folder = prepare_dataset(DatasetConfig(**settings, path=str(tmp_path / "source")), tmp_path).folder
    summary = json.loads((folder / "dataset.json").read_bytes())
    (folder / "dataset.json").write_text(json.dumps(summary | change))
    with pytest.raises(PrismError, match=words):
        PreparedDataset.open(folder)


@pytest.mark.parametrize("place", ["class", "image"])
def test_a_name_that_is_no_text_is_refused(tmp_path: Path, place: str) -> None:
    folder = tmp_path / ("cat\udcff" if place == "class" else "cat")
    folder.mkdir()
    (folder / ("\udcffa.png" if place == "image" else "a.png")).write_bytes(png())
    settings: dict[str, Any] = {"name": "p", "source": Source.image_folder, "image_size": 4, "channels": 3}
    with pytest.raises(InputError, match="not UTF-8; rename it") as caught:
        ImageFolder(DatasetConfig(**settings, path=str(tmp_path))).check()
    assert str(caught.value).isprintable()


# Images


def test_an_image_that_unpacks_to_gigapixels_is_refused_unread(tmp_path: Path) -> None:
    sink = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(sink, "PNG")
    assert len(sink.getvalue()) < 1_000_000
    with pytest.raises(InputError, match=rf"'cat/a\.png' has more than {MAX_PIXELS // 10**6} megapixels"):
        decode(sink.getvalue(), "cat/a.png")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb_png(*chunks: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">2I5B", 4, 4, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + png()[33:]


BOMBS = {
    "text": bomb_png(chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**28), 9))),
    "profile": bomb_png(chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2**28), 9))),
    "size": bomb_png()[:16] + struct.pack(">2I", 2**31 - 1, 2**31 - 1) + bomb_png()[24:],
}


@pytest.mark.parametrize("case", BOMBS)
def test_bombs_inside_an_image_are_refused_or_ignored(case: str) -> None:
    found = None
    with contextlib.suppress(InputError):
        found = decode(BOMBS[case], "cat/a.png")
    assert found is None or found.size == (4, 4)


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "BMP", "ICO", "PPM", "EPS", "PDF"])
def test_formats_other_than_three_are_not_even_tried(kind: str) -> None:
    sink = io.BytesIO()
    Image.new("RGB", (16, 16)).save(sink, kind)
    with pytest.raises(InputError, match=r"'x' cannot be decoded \(unknown format\)"):
        decode(sink.getvalue(), "x")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_truncated_image_is_named(kind: str) -> None:
    sink = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(sink, kind)
    with pytest.raises(InputError, match="'cat/a' cannot be decoded"):
        decode(sink.getvalue()[: len(sink.getvalue()) // 2], "cat/a")


def test_a_file_far_longer_than_an_image_is_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    with (tmp_path / "cat" / "a.png").open("wb") as file:
        file.truncate(2**40)  # sparse
    settings: dict[str, Any] = {"name": "p", "source": Source.image_folder, "image_size": 4, "channels": 3}
    with pytest.raises(InputError, match=rf"'cat/a\.png' has {2**40} bytes"):
        ImageFolder(DatasetConfig(**settings, path=str(tmp_path))).check()


# Numbers that would have to be allocated


def test_a_safetensors_header_longer_than_its_file_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for length in (2**20, 10**8, 2**40, 2**64 - 1):
        path.write_bytes(struct.pack("<Q", length) + b"{" * 100)
        with pytest.raises(InputError, match=r"cut short|unreadable"):
            check_weights_file(path, allow_pickle=False)


@pytest.mark.parametrize(
    "header", [b"[" * 100_000, b'{"a": {"data_offsets": [0, Infinity]}}', b'{"a": [1e999]}', b"[]"]
)
def test_a_safetensors_header_that_is_none_is_refused(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(InputError, match="unreadable"):
        check_weights_file(path, allow_pickle=False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_classes": 2**40}, "numbers"),
        ({"model_args": {"channels": [2**30, 2**30]}}, "numbers"),
        ({"pretrained_cfg": {"input_size": [1, 2**40, 2**40]}}, "pixels"),
        ({"pretrained_cfg": {"mean": "a"}}, "mean|images it takes"),
        ({"pretrained_cfg": {"input_size": 3}}, "do not load|images it takes"),
        ({"model_args": 3}, "no model configuration"),
    ],
)
def test_a_teacher_that_describes_more_than_its_weights_hold_is_refused(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    made = build_classifier(
        "prism_vgg",
        num_classes=3,
        in_chans=1,
        image_size=16,
        mean=[0.5],
        std=[0.5],
        model_args={"channels": [8, 8]},
        seed=0,
    )
    save_classifier(made, tmp_path, class_names=["a", "b", "c"], extra={})
    assert load_classifier(tmp_path).num_classes == 3
    config = json.loads((tmp_path / "config.json").read_bytes())
    for key, value in change.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    if "num_classes" in change:
        config["pretrained_cfg"]["num_classes"] = config["model_args"]["num_classes"] = change["num_classes"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=words) as caught:
        load_classifier(tmp_path)
    assert "\n" not in str(caught.value)


def test_labels_that_nobody_encoded_are_refused() -> None:
    codec = Codec(num_classes=10, num_views=2, top_k=3)
    blobs = np.zeros((1, codec.blob_bytes), np.uint8)
    codec.check(blobs)
    blobs[0, 0] = 10
    with pytest.raises(ValueError, match="class 10; there are 10"):
        codec.check(blobs)
    blobs[0, 0], blobs[0, -2:] = 0, (0x00, 0x7C)  # infinity in half precision
    with pytest.raises(ValueError, match=r"no finite number"):
        codec.check(blobs)


@pytest.mark.parametrize("data", [b"PAR1", b"", b"PAR1" + b"\xff" * 100 + b"PAR1"])
def test_a_shard_that_is_none_is_named(tmp_path: Path, data: bytes) -> None:
    store = LocalStore(tmp_path)
    store.put("images/0.parquet", data)
    with pytest.raises(PrismError, match=r"images/0\.parquet: is missing or damaged"):
        read_table(store, "images/0.parquet")


@pytest.mark.parametrize("content", [[], {}, {"stage": 1}, {"stage": "synthesize", "name": None}, 3, "x"])
def test_a_receipt_that_is_none_is_named(tmp_path: Path, content: Any) -> None:
    store = LocalStore(tmp_path)
    store.put("receipts/synthesize/u.json", to_json(content))
    with pytest.raises(PrismError, match=r"receipts/synthesize/u\.json: damaged"):
        Ledger(store).receipts("synthesize")


def test_a_record_keeps_to_its_types() -> None:
    good = {"stage": "s", "name": "n", "unit_id": "u", "key": "k", "seconds": 1, "inputs": {"a": "b"}}
    assert record(Receipt, good).inputs == {"a": "b"}
    for change in ({"rows": True}, {"rows": "1"}, {"inputs": {"a": 1}}, {"inputs": []}, {"key": None}, {"new": 1}):
        with pytest.raises(ValueError, match=r"field|has a"):
            record(Receipt, good | change)


# Texts from elsewhere


def test_a_terminal_is_told_nothing_by_a_name() -> None:
    text = "\x1b]0;title\x07\x1b[2Jcat\r\x9b31m\u202edog\u2066\ud800 ärmel 猫\n"
    shown = printable(text)
    assert shown == "\\x1b]0;title\\x07\\x1b[2Jcat\\r\\x9b31m\\u202edog\\u2066\\ud800 ärmel 猫\n"
    assert one_line(InputError(text)).isprintable()


def test_the_reason_of_a_quarantined_unit_does_nothing_to_a_terminal(
    prism: Command, storage: Path, run_dir: Path
) -> None:
    entry = {"stage": "synthesize", "name": "u", "unit_id": "0", "attempts": 3, "reason": "\x1b[2J\x1b]0;x\x07 gone"}
    (run_dir / "quarantine/units/synthesize").mkdir(parents=True)
    (run_dir / "quarantine/units/synthesize/u.json").write_bytes(to_json(entry))
    shown = prism("status", f"storage={storage}").out
    assert "gone" in shown
    assert "\x1b" not in shown


@pytest.mark.parametrize("text", ['"\\ud800"', "[" * 100_000, '{"_target_": 1}', '["\\u001b[31m"]'])
def test_a_row_of_prompts_is_a_row_or_refused(text: str) -> None:
    with pytest.raises(InputError, match="prompt table, line 1"):
        from_jsonl(text.encode())


# Secrets

CANARIES = {
    "AWS_SECRET_ACCESS_KEY": "canary/aws+77d2aa1c0e",
    "AWS_SESSION_TOKEN": "canary-session-90c1be",
    "HF_TOKEN": "hf_canary5f1c9e77d2a1b0c9",
    "OPENAI_API_KEY": "sk-canary-5f1c9e77d2a1b0c9d8",
    "WANDB_API_KEY": "canary-wandb-31ce0f",
    "MY_DATABASE_PASSWORD": "canary-password-0a9b8c",
}

WATCHED = """
import os, sys
def watch(event, arguments):
    if event == "socket.connect":
        address = arguments[1]
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            os.write(2, f"NETWORK {event} {address}\\n".encode())
            raise OSError("no network in this test")
    elif event.startswith("socket.get") and arguments and arguments[0] not in ("127.0.0.1", "localhost", None, ""):
        os.write(2, f"NETWORK {event} {arguments}\\n".encode())
        raise OSError("no network in this test")
sys.addaudithook(watch)
from prism_ray.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A run with secrets in its environment, under a hook that sees every connection."""
    folder = tmp_path_factory.mktemp("watched")
    environment = {**os.environ, **CANARIES, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", WATCHED, "run", *SMOKE, f"storage={folder}/outputs"]
    return folder, subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment, cwd=ROOT)


def holding(folder: Path, canaries: list[str]) -> list[str]:
    """Files with one of the secrets in them."""
    wanted = [canary.encode() for canary in canaries]
    return [
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and any(canary in path.read_bytes() for canary in wanted)
    ]


def test_no_secret_of_the_environment_is_in_anything_a_run_leaves(
    watched: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, done = watched
    assert done.returncode == 0, done.stderr
    names = {path.name for path in folder.rglob("*") if path.is_file()}
    assert {"config.yaml", "environment.json", "manifest.json", "events.jsonl", "report.html", "README.md"} <= names
    assert holding(folder, list(CANARIES.values())) == []
    assert not [canary for canary in CANARIES.values() if canary in done.stdout + done.stderr]


def test_nothing_is_asked_of_the_network_offline(watched: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    _, done = watched
    assert done.returncode == 0, done.stderr
    assert "NETWORK" not in done.stderr


@pytest.mark.parametrize(
    ("setting", "secret"),
    [
        ("dataset.path=s3://AKIA0000:hunter2hunter2@bucket/x", "hunter2hunter2"),
        ("dataset.path=https://me:hunter2hunter2@host/x", "hunter2hunter2"),
        ("dataset.path=https://host/x?X-Amz-Signature=0123456789abcdef&a=b", "0123456789abcdef"),
        ("generator.source=https://host/x?access_token=0123456789abcdef", "0123456789abcdef"),
        ("teachers.models.vgg.source=hf_0123456789abcdefghijklmnop", "hf_0123456789abcdefghijklmnop"),
        ("prompts.api_key_variable=sk-0123456789abcdefghijklmnop", "sk-0123456789abcdefghijklmnop"),
        ("evaluate.shifted_sets={a: 'https://me:hunter2hunter2@host/x'}", "hunter2hunter2"),
        ("storage=ftp://me:hunter2hunter2@host/x", "hunter2hunter2"),
    ],
)
def test_a_secret_in_a_setting_is_refused_without_repeating_it(
    prism: Command, tmp_path: Path, setting: str, secret: str
) -> None:
    result = prism("run", "dataset=image_folder", setting)
    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1), result
    assert secret not in result.err
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    "text",
    [
        "hub:stabilityai/sd-turbo@main",
        "/data/hf_parquet/train",
        "s3://bucket/sk-learn/digits?versionId=3",
        "https://user@host/path",
        "a@b.c: d",
        "http://127.0.0.1:8000/v1",
    ],
)
def test_what_only_resembles_a_secret_is_left_alone(text: str) -> None:
    assert redacted(text) == text


def test_an_error_that_repeats_a_secret_is_kept_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)

    def compute() -> Any:
        raise RuntimeError(f"refused: {' '.join(CANARIES.values())} at https://me:hunter2hunter2@host/")

    ledger = Ledger(LocalStore(tmp_path))
    receipt = Receipt(stage="synthesize", name="u", unit_id="0", key="images/u.parquet")
    attempt = Attempt(epoch=0, node="n", live_nodes=lambda: ["n"], max_attempts=2, timeout_s=600.0)
    outcome = run_unit(ledger, receipt, compute, attempt)
    assert outcome.status == "quarantined"
    assert "RuntimeError: refused: [secret]" in outcome.reason
    assert holding(tmp_path, [*CANARIES.values(), "hunter2"]) == []
    assert read_json(ledger.store, "quarantine/units/synthesize/u.json") is not None


# Dependencies

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FLOORS = {
    "ray": "2.60",
    "hydra-core": "1.3.6",
    "diffusers": "0.42.1",
    "torch": "2.10",
    "pillow": "12.3",
    "pyarrow": "14.0.1",
}
"""Below these, reading a file or a setting can run code or worse."""


def declared(*extras: str) -> dict[str, Requirement]:
    texts = [*PROJECT["dependencies"], *(text for extra in extras for text in PROJECT["optional-dependencies"][extra])]
    return {requirement.name.lower(): requirement for requirement in map(Requirement, texts)}


def imported(folder: str) -> set[str]:
    """First names of what the modules of a folder import, those of the standard library and its own left out."""
    found = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    own = {"prism_ray", *(path.stem for path in (ROOT / "tests").rglob("*.py"))}
    return found - set(sys.stdlib_module_names) - own


def test_every_import_is_of_a_declared_dependency() -> None:
    known = {name.lower().replace("_", "-") for name in declared("export")}
    owners = importlib.metadata.packages_distributions()
    missing = {
        name: owners.get(name)
        for name in imported("prism_ray")
        if not known & {owner.lower().replace("_", "-") for owner in owners.get(name, [])}
    }
    assert missing == {}


@pytest.mark.parametrize(("name", "floor"), FLOORS.items())
def test_versions_with_known_holes_are_not_installed(name: str, floor: str) -> None:
    requirement = declared()[name]
    bounds = [Version(each.version) for each in requirement.specifier if each.operator in (">=", "~=", "==")]
    assert bounds
    assert max(bounds) >= Version(floor)
    assert requirement.specifier.contains(importlib.metadata.version(name), prereleases=True)


def test_ray_stays_below_the_version_that_removes_what_we_use() -> None:
    assert not declared()["ray"].specifier.contains("2.64.0")


def test_the_hook_of_these_tests_sees_a_connection() -> None:
    attempt = "import socket\ntry: socket.create_connection(('192.0.2.1', 9), timeout=1)\nexcept OSError: pass"
    script = WATCHED.partition("from prism_ray")[0] + attempt
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert "NETWORK" in done.stderr


# A local cluster


def is_loopback(address: str) -> bool:
    found = ipaddress.ip_address(address)
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return (mapped or found).is_loopback


@pytest.mark.slow
def test_a_local_cluster_listens_to_this_machine_alone_and_keeps_secrets_out_of_its_logs(tmp_path: Path) -> None:
    """While a run works: every listening socket of its processes is on loopback, and no dashboard was started."""
    logs = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # sockets lie in it, whose paths have to be short
    environment = {**os.environ, **CANARIES, "RAY_TMPDIR": str(logs)}
    command = [sys.executable, "-m", "prism_ray", "run", "recipe=digits_smoke", "compute=ray", f"storage={tmp_path}"]
    listening, commands = set(), set()
    try:
        with subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
            while process.poll() is None:
                for each in psutil.Process(process.pid).children(recursive=True):
                    with contextlib.suppress(psutil.Error):
                        commands.add(" ".join(each.cmdline()))
                        listening |= {
                            (each.name(), c.laddr.ip) for c in each.net_connections("inet") if c.status == "LISTEN"
                        }
                time.sleep(2)
        assert process.returncode == 0
        assert any("raylet" in command for command in commands), "the run had a cluster"
        assert {entry for entry in listening if not is_loopback(entry[1])} == set()
        heads = [command for command in commands if "dashboard/dashboard.py" in command]
        assert [command for command in heads if "--disable-frontend" not in command] == []
        assert holding(tmp_path, list(CANARIES.values())) == []
        assert holding(logs, list(CANARIES.values())) == []
    finally:
        shutil.rmtree(logs, ignore_errors=True)
