"""What readers of foreign and of damaged files do with files that nobody would write.

    python benchmarks/fuzz.py [--cases 100000] [--readers NAME ...] [--seed 0] [--results FOLDER]

Every reader gets files that were valid and then changed: bytes flipped, cut, repeated; where the file is JSON or YAML,
values and keys replaced by others of wrong types, sizes and names, so that most cases reach the checks behind the
parser. A reader may accept a file or refuse it with this project's own error (a method, which knows no files, with
ValueError). Anything else is a finding, and so is a case that takes more than DEADLINE_S of the process's time or more
than MEMORY_BYTES beyond what the process began with. `tests/test_fuzz.py` runs the same readers for seconds.

Writes fuzz.json and fuzz.md; continues a table that is there, reader by reader.
"""

import argparse
import contextlib
import copy
import gzip
import hashlib
import io
import json
import mmap
import os
import random
import resource
import shutil
import signal
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

DEADLINE_S = 5.0
MEMORY_BYTES = 2 << 30
SHOWN_BYTES = 300
SHARE = 10_000

Mutate = Callable[[random.Random], Any]
Read = Callable[[Any], Any]


@dataclass(frozen=True)
class Reader:
    """A reader under test: `make` draws a case, `read` gives it to the reader, `refusals` are its own errors."""

    make: Mutate
    read: Read
    refusals: tuple[type[Exception], ...]


# Cases

WORDS = [
    "",
    "a",
    "../../etc/passwd",
    "/etc/passwd",
    "..",
    "x" * 300,
    "\ud800",
    "\x1b[31m",
    "${oc.env:HOME}",
    "_target_",
    "\0",
]
NASTY: list[Any] = [
    *WORDS,
    *(None, True, False, 0, -1, 1, 2**31, 2**40, 2**63, 2**70, -(2**70), 0.5, float("nan"), float("inf"), 1e308),
    *([], {}, [[]], {"a": []}, [None], ["a", 1], {"": ""}, {"_target_": "os.system"}),
]
SPLICES = [
    b"[" * 3000,
    b'{"a":' * 3000,
    b"9" * 5000,
    b"1e999",
    b"NaN",
    b'"\\ud800"',
    b"\\u0000",
    b"&a [*a, *a]",
    b"!!python/object/apply:os.system [id]",
    b"<<: *a",
    b"2001-99-99",
    b"\xff\xfe",
    b"\x00" * 8,
    b"\xff" * 8,
    b"\x1b[2J",
    b"<script>alert(1)</script>",
    b"{{7*7}}",
]


def changed_bytes(data: bytes, draw: random.Random, most: int = 4) -> bytes:
    """Some bytes flipped, replaced, cut out, repeated or put in."""
    content = bytearray(data)
    for _ in range(draw.randint(1, most)):
        place = draw.randrange(len(content) + 1)
        kind = draw.randrange(7)
        if kind == 0 and place < len(content):
            content[place] ^= 1 << draw.randrange(8)
        elif kind == 1 and place < len(content):
            content[place] = draw.choice((0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)))
        elif kind == 2:
            del content[place : place + draw.choice((1, 2, 8, 64, len(content)))]
        elif kind == 3:
            content[place:place] = content[place : place + draw.choice((1, 4, 32))] * draw.choice((1, 2, 50))
        elif kind == 4:
            content[place:place] = draw.choice(SPLICES)
        elif kind == 5:
            content[place:place] = bytes(draw.randrange(256) for _ in range(draw.choice((1, 4, 16))))
        elif kind == 6:
            number = draw.choice((0, 1, 2**16, 2**31 - 1, 2**32 - 1, 2**40, 2**63, 2**64 - 1))
            content[place : place + 8] = number.to_bytes(8, draw.choice(("little", "big")))
    return bytes(content)


def changed_tree(tree: Any, draw: random.Random) -> Any:
    """One to three values or keys of a parsed document replaced, removed, added or moved."""
    tree = copy.deepcopy(tree)
    for _ in range(draw.randint(1, 3)):
        if not isinstance(tree, dict | list) or not tree or draw.random() < 0.02:
            return copy.deepcopy(draw.choice(NASTY))
        inner = tree
        while True:
            key = draw.choice(list(inner)) if isinstance(inner, dict) else draw.randrange(len(inner))
            below = inner[key]
            if not isinstance(below, dict | list) or not below or draw.random() < 0.3:
                break
            inner = below
        kind = draw.randrange(5)
        if kind == 0:
            del inner[key]
        elif kind == 1 and isinstance(inner, dict):
            inner[draw.choice(WORDS)] = inner.pop(key)
        elif kind == 2 and isinstance(inner, dict):
            inner[draw.choice(WORDS)] = copy.deepcopy(draw.choice(NASTY))
        elif kind == 3 and isinstance(inner, list):
            inner.append(copy.deepcopy(draw.choice(NASTY)))
        else:
            inner[key] = copy.deepcopy(draw.choice(NASTY))
    return tree


def documents(trees: list[Any], dump: Callable[[Any], bytes]) -> Mutate:
    """Changed trees, written, of which every fourth gets changed bytes as well."""

    def make(draw: random.Random) -> bytes:
        tree = draw.choice(trees)
        if draw.random() < 0.25:
            return changed_bytes(dump(tree), draw)
        data = dump(changed_tree(tree, draw))
        return changed_bytes(data, draw, 2) if draw.random() < 0.15 else data

    return make


def as_json(tree: Any) -> bytes:
    return json.dumps(tree).encode()


def as_yaml(tree: Any) -> bytes:
    """Every JSON text is YAML, up to how it writes the numbers that are none; sometimes that is all it takes."""
    import yaml

    try:
        return yaml.safe_dump(tree, sort_keys=False).encode(errors="surrogatepass")
    except yaml.YAMLError:
        return as_json(tree)


class MemoryStore:
    """Objects in memory behind the interface of a store, to be read only."""

    url = "memory"

    def __init__(self, root: Path, objects: dict[str, bytes]) -> None:
        from prism_ray.storage import LocalStore

        self._local, self.objects = LocalStore(root), objects

    def path(self, key: str) -> Path:
        return self._local.path(key)

    def url_of(self, key: str) -> str:
        return str(self.path(key))

    def read(self, key: str) -> bytes:
        self.path(key)
        if key not in self.objects:
            raise FileNotFoundError(key)
        return self.objects[key]

    def size(self, key: str) -> int | None:
        self.path(key)
        return len(self.objects[key]) if key in self.objects else None

    def keys(self, prefix: str) -> list[str]:
        return sorted(key for key in self.objects if key.startswith(f"{prefix}/"))

    def read_all(self, prefix: str) -> dict[str, bytes]:
        return {key: self.objects[key] for key in self.keys(prefix)}

    def sizes(self, prefix: str) -> dict[str, int]:
        return {key: len(data) for key, data in self.read_all(prefix).items()}

    def sha256(self, key: str) -> str:
        return hashlib.sha256(self.read(key)).hexdigest()


# Readers


def readers(folder: Path) -> dict[str, Reader]:
    """Every reader by name; they keep their files in `folder`, best one in memory."""
    from prism_ray.errors import PrismError

    own = (PrismError,)
    found = {}
    for name, make, read in (*run_folder_readers(folder), *data_readers(folder), *model_readers(folder)):
        found[name] = Reader(make, read, own)
    for name, make, read in method_readers():
        found[name] = Reader(make, read, (ValueError,))
    for name, make, read in prompt_readers():
        found[name] = Reader(make, read, own)
    return found


Entry = tuple[str, Mutate, Read]


def run_folder_readers(folder: Path) -> Iterator[Entry]:
    from prism_ray import cli
    from prism_ray.cli.compose import _stored_recipe, load_suite
    from prism_ray.cli.files import CONF, read_yaml
    from prism_ray.config import Row
    from prism_ray.data.prepared import PreparedDataset
    from prism_ray.errors import PrismError
    from prism_ray.identity import config_hash, plain
    from prism_ray.ledger import Ledger, Receipt, read_table
    from prism_ray.lock import RunLock
    from prism_ray.runs import PINS, _agree, _check_same, locate
    from prism_ray.schema import class_names_of, text_metadata
    from prism_ray.storage import read_json

    def store(**objects: bytes) -> Any:
        return MemoryStore(folder, {key.replace("__", "/"): data for key, data in objects.items()})

    receipt = asdict(
        Receipt(
            stage="synthesize",
            name="00001",
            unit_id="0123456789abcdef",
            key="images/00001.parquet",
            rows=2,
            bytes=4,
            sha256="9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
            inputs={"images/00000.parquet": "ab" * 32},
            worker={"device": "cpu"},
            details={"files": {"model.safetensors": "ab" * 32}, "loss": 1.5},
        )
    )
    listed = {key: receipt[key] for key in ("key", "unit_id", "rows", "bytes", "sha256")}
    manifest = {"version": 1, "run_id": "a-b", "quarantined": [], "synthesize": [listed], "relabel": [], "distill": []}

    def read_manifest(data: bytes) -> None:
        Ledger(store(**{"manifest.json": data})).manifest()

    def read_receipts(data: bytes) -> None:
        ledger = Ledger(store(**{"receipts__synthesize__00001.json": data, "images__00001.parquet": b"test"}))
        for each in ledger.receipts("synthesize").values():
            ledger.is_done(each, {})
        ledger.verify()

    def read_attempts(data: bytes) -> None:
        ledger = Ledger(store(**{"attempts__synthesize__u__000001-001.json": data, "quarantine__units__a.json": data}))
        with contextlib.suppress(PrismError):
            ledger.failed_attempts("synthesize", "u", epoch=1, live_nodes=["n"])
        ledger.quarantined()

    def read_pins(data: bytes) -> None:
        _agree({"sha256 of teacher a": "ab"}, store(**{PINS: data}))
        read_json(store(**{PINS: data}), PINS)

    def read_lock(data: bytes) -> None:
        objects = {"lock__000001.epoch": data, "lock__000001.beat": data, "lock__x.epoch": b"", "lock__-1.epoch": b""}
        lock = RunLock(store(**objects), name="r", lease_s=1.0)
        lock._wait_for_owner(1, lambda _: None)

    config = cli.compose(["recipe=digits_smoke", "compute=inline", f"storage={folder}"])
    settings = {"config_hash": config_hash(config), "settings": plain(config)}
    run: Any = locate(Row("", config))

    def read_config(data: bytes) -> None:
        run.store = store(**{"config.yaml": data})
        _check_same(run)

    recipe = read_yaml(CONF / "recipe" / "digits_smoke.yaml")
    suites = [read_yaml(path) for path in sorted((CONF / "suite").glob("*.yaml"))]
    file = folder / "file.yaml"

    class Stored:
        def store(self, **_: Any) -> None: ...

    def read_recipe(data: bytes) -> None:
        file.write_bytes(data)
        _stored_recipe(f"recipe={file}", Stored())

    def read_suite(data: bytes) -> None:
        file.write_bytes(data)
        load_suite(str(file))

    images, labels = shards()

    def read_shard(data: bytes) -> None:
        table = read_table(store(**{"images__0.parquet": data}), "images/0.parquet")
        class_names_of(table.schema), text_metadata(table.schema)

    def read_summary(data: bytes) -> None:
        (prepared / "dataset.json").write_bytes(data)
        PreparedDataset.open(prepared).images("train", [0, 1])

    prepared = prepare(folder)
    summary = json.loads((prepared / "dataset.json").read_bytes())

    good = (prepared / "train-00000.parquet").read_bytes()
    damaged = folder / "damaged"
    shutil.copytree(prepared, damaged)
    prepared_rows = damaged / "train-00000.parquet"

    def read_prepared_rows(data: bytes) -> None:
        prepared_rows.write_bytes(data[: len(good)].ljust(len(good), b"\0"))
        dataset = PreparedDataset.open(damaged)
        dataset.images("train"), dataset.labels("train")

    yield "manifest", documents([manifest], as_json), read_manifest
    yield "receipt", documents([receipt], as_json), read_receipts
    yield (
        "attempt and quarantine",
        documents(
            [
                {"epoch": 1, "node": "n", "error": None},
                {"epoch": 1, "node": "n", "error": "x", "traceback": "y"},
                {"stage": "synthesize", "name": "u", "unit_id": "0", "attempts": 3, "reason": "x"},
            ],
            as_json,
        ),
        read_attempts,
    )
    yield "pins", documents([{"sha256 of teacher a": "ab", "digest of generator": "cd"}], as_json), read_pins
    yield (
        "lock",
        documents(
            [{"host": "h", "boot": "", "pids": "", "pid": 1, "started": "0"}, {"beats": 3}, {"released": True}], as_json
        ),
        read_lock,
    )
    # Without what is alike: the parser is the slow part, and follows the length.
    few = {key: settings["settings"][key] for key in ("recipe_name", "seed", "classes", "teach", "compute")}
    yield "config.yaml of a run", documents([settings | {"settings": few}], as_json), read_config
    short = {key: recipe[key] for key in ("defaults", "recipe_name", "method")}
    yield "recipe", documents([short], as_yaml), read_recipe
    yield "suite", documents(sorted(suites, key=lambda suite: len(str(suite)))[:4], as_yaml), read_suite
    yield "image and label shards", lambda draw: changed_bytes(draw.choice((images, labels)), draw), read_shard
    yield "prepared data set: dataset.json", documents([summary], as_json), read_summary
    yield "prepared data set: rows", lambda draw: changed_bytes(good, draw), read_prepared_rows


def shards() -> tuple[bytes, bytes]:
    """A small shard of images and one of labels."""
    import pyarrow as pa
    import torch

    from prism_ray import schema
    from prism_ray.methods.soft_labels import Codec
    from prism_ray.stages.labels import label_table

    rows = {"image": [{"bytes": picture("PNG"), "path": None}] * 4, "label": [0, 1, 0, 1], "image_id": list("abcd")}
    images = pa.table(rows, schema=schema.image_schema(schema.REAL_COLUMNS, ["cat", "dog"]))
    labels = label_table(Codec(2, 2), torch.zeros(4, 2, 2), list("abcd"), views_hash="0", group="0")
    return schema.table_bytes(images), schema.table_bytes(labels)


def picture(kind: str) -> bytes:
    import numpy as np
    from PIL import Image

    sink = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(sink, kind)
    return sink.getvalue()


def prepare(folder: Path) -> Path:
    """A prepared data set of six images."""
    from prism_ray.config import DatasetConfig
    from prism_ray.data.prepared import prepare_dataset
    from prism_ray.options import Source

    for split, count in (("train", 2), ("test", 1)):
        for name in ("cat", "dog"):
            (folder / "images" / split / name).mkdir(parents=True, exist_ok=True)
            for k in range(count):
                (folder / "images" / split / name / f"{k}.png").write_bytes(picture("PNG"))
    settings: dict[str, Any] = {"name": "pets", "source": Source.image_folder, "image_size": 8, "channels": 3}
    return prepare_dataset(DatasetConfig(**settings, path=str(folder / "images")), folder / "artifacts").folder


def data_readers(folder: Path) -> Iterator[Entry]:
    import fsspec

    from prism_ray.config import DatasetConfig
    from prism_ray.data.fashion_mnist import FILES, FashionMnist
    from prism_ray.data.hf_parquet import HfParquet
    from prism_ray.data.pixels import decode, fit
    from prism_ray.options import Source

    memory = fsspec.filesystem("memory")
    raw = {
        "train-images-idx3-ubyte.gz": struct.pack(">4I", 0x803, 3, 4, 4) + bytes(48),
        "train-labels-idx1-ubyte.gz": struct.pack(">2I", 0x801, 3) + bytes(3),
    }
    packed = {name: gzip.compress(raw[name.replace("t10k", "train")], 1) for name in FILES}
    idx = DatasetConfig(name="i", source=Source.fashion_mnist, image_size=28, channels=1, path="memory://idx")

    def make_idx(draw: random.Random) -> dict[str, bytes]:
        files = dict(packed)
        for name in draw.sample(FILES[:2], draw.choice((1, 1, 2))):
            if draw.random() < 0.6:
                files[name] = gzip.compress(changed_bytes(raw[name], draw), 1)
            else:
                files[name] = changed_bytes(files[name], draw)
        return files

    def read_idx(files: dict[str, bytes]) -> None:
        for name, data in files.items():
            memory.pipe_file(f"/idx/{name}", data)
        source = FashionMnist(idx)
        source.check()
        for image in source.images("train"):
            image.load()

    good, table = (
        shards()[0],
        DatasetConfig(name="p", source=Source.parquet, image_size=8, channels=3, path="memory://p/train.parquet"),
    )

    def read_parquet(data: bytes) -> None:
        memory.pipe_file("/p/train.parquet", data)
        source = HfParquet(table)
        source.check()
        for image in source.images("train"):
            image.load()

    pictures = [picture(kind) for kind in ("PNG", "JPEG", "WEBP")]

    def read_picture(data: bytes) -> None:
        fit(decode(data, "x"), image_size=8, channels=3, pad=0)

    yield "IDX files", make_idx, read_idx
    yield "parquet from elsewhere", lambda draw: changed_bytes(good, draw), read_parquet
    yield "encoded images", lambda draw: changed_bytes(draw.choice(pictures), draw), read_picture


def model_readers(folder: Path) -> Iterator[Entry]:
    import torch
    from safetensors.torch import save

    from prism_ray.generator_files import check_generator
    from prism_ray.models.checkpoint import read_extra, save_checkpoint
    from prism_ray.weights import check_weights_file, read_model_config

    weights = save({"a": torch.zeros(2, 3), "b": torch.zeros(4)}, metadata={"format": "pt"})
    header = json.loads(weights[8 : 8 + int.from_bytes(weights[:8], "little")])
    body = weights[8 + int.from_bytes(weights[:8], "little") :]
    write_header = documents([header], as_json)
    path = folder / "model.safetensors"

    def make_weights(draw: random.Random) -> bytes:
        if draw.random() < 0.3:
            return changed_bytes(weights, draw)
        new = write_header(draw)
        length = len(new) if draw.random() < 0.9 else draw.choice((0, 1, 2**31, 2**40, 2**63, 2**64 - 1))
        return length.to_bytes(8, "little") + new + body

    def read_weights(data: bytes) -> None:
        path.write_bytes(data)
        check_weights_file(path, allow_pickle=False)

    checkpoint, network = folder / "checkpoint.safetensors", torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    save_checkpoint(checkpoint, module=network, optimizer=optimizer, step=1, extra={"a": 1})
    state = checkpoint.read_bytes()
    length = int.from_bytes(state[:8], "little")
    described = json.loads(state[8 : 8 + length])
    inner = json.loads(described["__metadata__"]["prism_ray.checkpoint"])
    write_inner = documents([inner], as_json)

    def make_checkpoint(draw: random.Random) -> bytes:
        if draw.random() < 0.3:
            return changed_bytes(state, draw)
        text = write_inner(draw).decode(errors="replace")
        new = json.dumps(described | {"__metadata__": {"prism_ray.checkpoint": text}}).encode()
        return len(new).to_bytes(8, "little") + new + state[8 + length :]

    def read_checkpoint(data: bytes) -> None:
        checkpoint.write_bytes(data)
        read_extra(checkpoint)

    generator = folder / "generator"
    for part in ("unet", "vae"):
        (generator / part).mkdir(parents=True, exist_ok=True)
        (generator / part / "config.json").write_text("{}")
        (generator / part / "diffusion_pytorch_model.safetensors").write_bytes(weights)
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None],
    }
    shard_index = {"weight_map": {"a": "diffusion_pytorch_model.safetensors"}}

    def make_generator(draw: random.Random) -> tuple[bytes, bytes]:
        if draw.random() < 0.5:
            return write_index(draw), as_json(shard_index)
        return as_json(index), write_shard_index(draw)

    write_index, write_shard_index = documents([index], as_json), documents([shard_index], as_json)

    def read_generator(case: tuple[bytes, bytes]) -> None:
        (generator / "model_index.json").write_bytes(case[0])
        (generator / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_bytes(case[1])
        check_generator(generator)

    config = folder / "config.json"
    described_network = {
        "architecture": "prism_vgg",
        "num_classes": 10,
        "pretrained_cfg": {"input_size": [1, 16, 16], "mean": [0.1], "std": [0.2], "num_classes": 10},
        "model_args": {"channels": [8, 8]},
    }

    def read_config(data: bytes) -> None:
        config.write_bytes(data)
        read_model_config(folder)

    yield "safetensors header", make_weights, read_weights
    yield "training checkpoint", make_checkpoint, read_checkpoint
    yield "generator's indexes", make_generator, read_generator
    yield "teacher's config.json", documents([described_network], as_json), read_config


def method_readers() -> Iterator[Entry]:
    import numpy as np
    import torch

    from prism_ray.methods.attributes import AXES, apply_attributes
    from prism_ray.methods.soft_labels import Codec

    def make_blobs(draw: random.Random) -> tuple[Codec, np.ndarray]:
        codec = Codec(
            num_classes=draw.choice((1, 2, 10, 300)),
            num_views=draw.choice((1, 3, 7)),
            top_k=draw.choice((None, 1, 3, 9)),
            bits=draw.choice((16, 1, 2, 3, 4, 5, 8)),
        )
        rows = draw.choice((1, 2))
        if draw.random() < 0.3:
            logits = torch.randn(rows, codec.num_views, codec.num_classes, generator=torch.Generator().manual_seed(0))
            blobs = np.frombuffer(changed_bytes(codec.encode(logits).tobytes(), draw, 2), np.uint8)
        else:
            blobs = np.frombuffer(draw.randbytes(rows * codec.blob_bytes), np.uint8)
        return codec, blobs.reshape(rows, -1) if len(blobs) % rows == 0 else blobs.reshape(1, -1)

    def read_blobs(case: tuple[Codec, np.ndarray]) -> None:
        codec, blobs = case
        codec.check(blobs)
        rows, views = np.arange(len(blobs)), np.full(len(blobs), codec.num_views - 1)
        logits = codec.decode(blobs, rows, views)
        assert logits.shape == (len(blobs), codec.num_classes)
        assert torch.isfinite(logits).all()

    image = torch.zeros(1, 1, 8, 8)
    names = [*AXES, "nowhere", ""]

    def make_attributes(draw: random.Random) -> tuple[dict[Any, Any], int]:
        values = {}
        for name in draw.sample(names, draw.randint(0, 4)):
            known = AXES.get(name, ("none",))
            values[name] = draw.choice(known) if draw.random() < 0.9 else draw.choice(WORDS)
        return values, draw.choice((0, 1, 2**32, 2**63, 2**64 - 1))

    def read_attributes(case: tuple[dict[Any, Any], int]) -> None:
        assert torch.isfinite(apply_attributes(image, [case[0]], [case[1]])).all()

    yield "label codecs", make_blobs, read_blobs
    yield "attributes of a prompt", make_attributes, read_attributes


def prompt_readers() -> Iterator[Entry]:
    from prism_ray.errors import InputError
    from prism_ray.prompts.chat_server import _text_of
    from prism_ray.prompts.table import PromptRow, from_jsonl, to_jsonl
    from prism_ray.prompts.write import names_pattern, validate
    from prism_ray.storage import to_json

    rows = [
        asdict(PromptRow(0, 0, "a photo of a cat", "cat", "photo")),
        asdict(PromptRow(0, 1, "a cat, at dusk", "cat", "photo", {"lighting": "at dusk"}, "fallback", "too few")),
    ]
    write_row = documents(rows, lambda tree: json.dumps(tree).encode())

    def make_table(draw: random.Random) -> bytes:
        return b"\n".join((json.dumps(rows[0]).encode(), write_row(draw)))

    def read_prompts(data: bytes) -> None:
        table = from_jsonl(data)
        assert from_jsonl(to_jsonl(table)) == table

    scenes = ["in a meadow at dusk", "on a beach, seen from above", "by a river"]
    write_scenes = documents([scenes], lambda tree: json.dumps(tree).encode())
    others = names_pattern(["cat", "dog"])

    def make_answer(draw: random.Random) -> bytes:
        text = write_scenes(draw).decode(errors="replace")
        if draw.random() < 0.3:
            text = f"```json\n{text}\n```"
        if draw.random() < 0.5:
            return json.dumps({"choices": [{"message": {"content": text}}]}).encode()
        return changed_bytes(json.dumps({"choices": [{"message": {"content": text}}]}).encode(), draw)

    def read_answer(data: bytes) -> None:
        try:
            text = _text_of(data)
        except ValueError as error:  # which `author_behind` counts as no answer
            raise InputError(str(error)) from error
        to_json({"answer": text})
        for scene in validate(text, "cat", others=others)[0]:
            assert scene.isprintable()
            assert not set(scene) & set('<>{}[]/\\$`:;"&|')

    yield "prompt table", make_table, read_prompts
    yield "answers of a language model", make_answer, read_answer


# Running


@dataclass
class Outcome:
    """What a reader did with its cases."""

    reader: str
    seed: int
    cases: int = 0
    accepted: int = 0
    refused: int = 0
    cpu_s: float = 0.0
    slowest_s: float = 0.0
    findings: list[dict[str, str]] = field(default_factory=list)


class TooSlow(BaseException):
    """A case took more than DEADLINE_S."""


def try_case(reader: Reader, case: Any) -> tuple[bool, BaseException | None]:
    """Whether a case was accepted, and the error that no reader may raise."""
    try:
        reader.read(case)
    except reader.refusals as error:
        lines = str(error).strip().splitlines()
        return False, None if lines else AssertionError("an error without a message")
    except (Exception, TooSlow) as error:
        return False, error
    return True, None


def make_case(name: str, reader: Reader, *, seed: int, number: int) -> Any:
    """One case of a reader; it depends on nothing but its arguments."""
    return reader.make(random.Random(f"{name} {seed} {number}"))


def fuzz(name: str, reader: Reader, *, cases: int, seed: int) -> Outcome:
    """So many cases of one reader, in processes that it may take down with it."""
    outcome = Outcome(name, seed)
    at, share = mmap.mmap(-1, 8), SHARE
    while outcome.cases < cases:
        first, last = outcome.cases, min(outcome.cases + share, cases)
        at[:] = first.to_bytes(8, "little")
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            _limit_memory()
            found = asdict(_share(name, reader, range(first, last), seed, at))
            with open(writing, "w") as pipe:
                json.dump(found, pipe)
            os._exit(0)
        os.close(writing)
        with open(reading) as pipe:
            text = pipe.read()
        _, status = os.waitpid(child, 0)
        if status == 0:
            part = json.loads(text)
        else:
            number = int.from_bytes(at[:], "little")
            if number > first:  # the counts of those before it went down with it: again, up to there
                share = number - first
                continue
            case = repr(make_case(name, reader, seed=seed, number=number))[:SHOWN_BYTES]
            finding = {"error": f"the process ended with status {status}", "case": case}
            part = asdict(Outcome(name, seed, cases=1, findings=[finding]))
        share = SHARE
        for key in ("cases", "accepted", "refused", "cpu_s"):
            setattr(outcome, key, getattr(outcome, key) + part[key])
        outcome.slowest_s = max(outcome.slowest_s, part["slowest_s"])
        outcome.findings = [*outcome.findings, *part["findings"]]
    return outcome


def _share(name: str, reader: Reader, numbers: range, seed: int, at: mmap.mmap) -> Outcome:
    outcome = Outcome(name, seed)
    start = time.process_time()
    for number in numbers:
        at[:] = number.to_bytes(8, "little")
        case = make_case(name, reader, seed=seed, number=number)
        begun = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, DEADLINE_S)
        accepted, error = try_case(reader, case)
        signal.setitimer(signal.ITIMER_PROF, 0)
        outcome.slowest_s = max(outcome.slowest_s, time.process_time() - begun)
        outcome.cases += 1
        outcome.accepted += accepted
        outcome.refused += not accepted and error is None
        if error is not None and len(outcome.findings) < 20:
            outcome.findings.append(
                {"error": f"{type(error).__name__}: {error}"[:300], "case": repr(case)[:SHOWN_BYTES]}
            )
    outcome.cpu_s = time.process_time() - start
    return outcome


def markdown(outcomes: list[dict[str, Any]]) -> str:
    """The table of the results file."""
    lines = [
        "# Readers under files that nobody would write",
        "",
        "    python benchmarks/fuzz.py",
        "",
        "| reader | cases | accepted | refused | findings | CPU, s | slowest case, s | seed |",
        "| --- | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for each in outcomes:
        numbers = [each["cases"], each["accepted"], each["refused"], len(each["findings"])]
        times = [f"{each['cpu_s']:.0f}", f"{each['slowest_s']:.3f}"]
        lines.append(f"| {' | '.join([each['reader'], *map(str, numbers), *times, str(each['seed'])])} |")
    lines += [
        "",
        "- Accepted: what the change left valid. Refused: with the project's own error. Finding: any other exception, "
        f"more than {DEADLINE_S:g} s or more than {MEMORY_BYTES >> 30} GiB.",
        "- The same seed draws the same cases (same versions of Python and of the libraries that write the originals).",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--readers", nargs="*", help="by name; all if none is named")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()

    def too_slow(*_: Any) -> None:
        raise TooSlow

    signal.signal(signal.SIGPROF, too_slow)
    shared_memory = Path("/dev/shm")
    root = shared_memory if os.access(shared_memory, os.W_OK) else None
    results = options.results / "fuzz.json"
    done = json.loads(results.read_bytes()) if results.exists() else []
    with tempfile.TemporaryDirectory(dir=root) as folder:
        known = readers(Path(folder))
        for name in options.readers or known:
            outcome = asdict(fuzz(name, known[name], cases=options.cases, seed=options.seed))
            print(json.dumps({**outcome, "findings": outcome["findings"][:3]}), flush=True)
            by_name = {each["reader"]: each for each in done} | {name: outcome}
            done = [by_name[each] for each in known if each in by_name]
            results.write_text(json.dumps(done, indent=1) + "\n")
            (options.results / "fuzz.md").write_text(markdown(done))


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


if __name__ == "__main__":
    main()
