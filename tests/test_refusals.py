"""The list of bad inputs: 45 that every tool of this kind meets, and those found by trying to break this one.

Each is refused by one line on stderr and exit code 2, within seconds, with nothing written and no Ray started. Those
numbered 1 to 45 are of the project's list; many of them have more rows in `test_bad_inputs`, whose settings count too.
"""

import base64
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from commands import SMOKE, Command, Result
from PIL import Image
from safetensors.torch import save
from test_bad_inputs import (
    LIMIT_S,
    SETTINGS,
    assert_refused,
    bomb,
    class_without_images,
    cpu_of_children,
    cut_short,
    disguised_pickle,
    empty_folder,
    good_folder,
    lfs_pointer,
    picture,
    text_among_images,
    web_page,
)

from prism_ray.errors import InputError
from prism_ray.prompts.table import from_jsonl
from prism_ray.schema import REAL_COLUMNS, image_schema


@dataclass(frozen=True)
class Case:
    """One bad input. `{here}` in overrides is the test's folder, which `make` fills."""

    name: str
    overrides: list[str]
    words: list[str]
    make: Callable[[Path], Any] = lambda here: None
    verb: str = "run"
    environment: tuple[tuple[str, str], ...] = ()


# What is made for them


def data(make: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """A folder of images, spoilt."""

    def made(here: Path) -> None:
        good_folder(here / "data")
        make(here / "data")

    return made


def instead(make: Callable[[Path], Any]) -> Callable[[Path], Any]:
    return lambda here: make(here / "data")


FOLDER = ["dataset=image_folder", "dataset.path={here}/data"]
PARQUET = ["dataset=parquet", "dataset.path={here}/data"]


def other_test_class(root: Path) -> None:
    shutil.rmtree(root)
    for name in ("train/cat", "train/dog", "val/cat", "val/emu"):
        picture(root / name / "0.png")


def gif_named_as_a_png(root: Path) -> None:
    Image.new("L", (4, 4)).save(root / "cat/0.gif")
    (root / "cat/0.gif").rename(root / "cat/0.png")


def table_of(**columns: list[Any]) -> Callable[[Path], None]:
    """Rows of a parquet data set of two classes; None for what is left out."""

    def made(here: Path) -> None:
        Image.new("L", (4, 4), 9).save(here / "0.png")
        png = (here / "0.png").read_bytes()
        found: dict[str, list[Any]] = {
            "image": [{"bytes": png, "path": None}] * 4,
            "label": [0, 1, 0, 1],
            "image_id": list("abcd"),
        } | columns
        known = image_schema(REAL_COLUMNS, ["cat", "dog"])
        arrays = {
            name: pa.array(values, None if name in columns and name != "image" else known.field(name).type)
            for name, values in found.items()
        }
        (here / "data").mkdir()
        table = pa.table(arrays).replace_schema_metadata(known.metadata)
        pq.write_table(table, here / "data/train.parquet")

    return made


def teacher(config: Any, weights: bytes | Callable[[Path], Any] | None = None) -> Callable[[Path], None]:
    """A folder in timm's local-dir form, spoilt."""

    def made(here: Path) -> None:
        folder = here / "teacher"
        folder.mkdir()
        (folder / "config.json").write_bytes(config if isinstance(config, bytes) else json.dumps(config).encode())
        if callable(weights):
            weights(folder / "model.safetensors")
        else:
            content = save({"w": torch.zeros(3)}) if weights is None else weights
            (folder / "model.safetensors").write_bytes(content)

    return made


TEACHER = ["teachers.models.vgg.source={here}/teacher"]
CONFIG = {"architecture": "prism_vgg", "num_classes": 10}
IMAGES_OF_THREE = {"input_size": [1, 16, 16], "mean": [0.1, 0.2, 0.3], "std": [0.4]}
NOT_A_NUMBER = torch.tensor([0.0, float("nan"), 1.0])


def written(name: str, content: str | bytes) -> Callable[[Path], None]:
    def made(here: Path) -> None:
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return made


def suite(content: str) -> Callable[[Path], None]:
    return written("my.yaml", content)


SUITE = ["suite={here}/my.yaml", "compute=inline"]
GENERATOR = ["recipe=digits_dfkd_smoke", "prompts.world=photo", "generator.source={here}/generator"]
SAMPLED = ["recipe=digits_dfkd_smoke"]
NESTED = "{a:" * 300 + "1" + "}" * 300

CASES = [
    # The project's list, as far as single settings do not show it.
    Case("19 teacher of other classes", TEACHER, ["7 classes", "has 10"], teacher(CONFIG | {"num_classes": 7})),
    Case(
        "21 a mean of another number of channels",
        TEACHER,
        ["mean=[0.1, 0.2, 0.3]", "1 channels"],
        teacher(CONFIG | {"pretrained_cfg": IMAGES_OF_THREE}),
    ),
    Case(
        "20 a side that the autoencoder can't halve", [*SAMPLED, "dataset.image_size=15"], ["image_size=15", "multiple"]
    ),
    Case("22 no weights", TEACHER, ["holds no weights"], teacher(CONFIG, lambda path: None)),
    Case("23 weights that are a web page", TEACHER, ["web page"], teacher(CONFIG, web_page)),
    Case("23 weights that are a pointer", TEACHER, ["git-lfs pointer"], teacher(CONFIG, lfs_pointer)),
    Case("24 weights cut short", TEACHER, ["its header says"], teacher(CONFIG, cut_short)),
    Case("25 a pickle as weights", TEACHER, ["pickle"], teacher(CONFIG, disguised_pickle)),
    Case("26 empty folder of images", FOLDER, ["no class folders"], instead(empty_folder)),
    Case("27 class without images", FOLDER, ["emu", "no images"], instead(class_without_images)),
    Case("28 text among images", FOLDER, ["dog/notes.txt"], instead(text_among_images)),
    Case("29 decompression bomb", FOLDER, ["dog/0.png", "megapixels"], instead(bomb)),
    Case(
        "30 storage that is a file", ["storage={here}/file"], ["/file", "choose another storage"], written("file", "")
    ),
    Case("40 unknown sampler", [*SAMPLED, "method.sampling.sampler=dimm"], ["sampler=dimm", "ddim"]),
    Case("40 no steps", [*SAMPLED, "method.sampling.steps=0"], ["method.sampling.steps=0", "at least 1"]),
    Case(
        "40 window of guidance that ends before it begins",
        [*SAMPLED, "method.guidance.start=0.8", "method.guidance.end=0.2"],
        ["method.guidance.start=0.8", "end=0.2"],
    ),
    Case(
        "43 recipe that is no YAML",
        ["recipe={here}/my.yaml"],
        ["my.yaml", "not a YAML file"],
        written("my.yaml", "a: [1"),
    ),
    # Found by trying. The command line:
    Case("46 a character that ends texts", ["storage={here}/a\0b"], ["control character"]),
    Case("47 bytes that are no UTF-8", ["storage={here}/\udcff"], ["no text in this locale"]),
    Case("48 a line break in a path", ["storage={here}/a\nb"], ["control character"]),
    Case("49 an override of many pages", [f"classes=[{'a,' * 20_000}a]"], ["characters", "recipe file"]),
    Case(
        "50 a mapping nested three hundred times",
        [f"student.model_args={NESTED}"],
        ["student.model_args", "not readable"],
    ),
    Case(
        "51 an integer of five thousand digits",
        ["images_per_class=" + "9" * 5000],
        ["images_per_class", "not readable"],
    ),
    Case("52 a seed of more than 64 bits", ["seed=123456789012345678901234567890"], ["seed=12345", "64 bits"]),
    Case("52 a student's seed of more than 64 bits", ["student.seeds=[0,9223372036854775808]"], ["seeds", "64 bits"]),
    Case("53 a hundred thousand threads", ["compute.threads=100000"], ["compute.threads=100000", "1 to 1024"]),
    Case("53 threads in words", ["compute.threads=two"], ["compute.threads=two", "an integer"]),
    Case("54 images of a million pixels a side", ["dataset.image_size=1000000"], ["image_size=1000000", "8192"]),
    Case("55 a lease of no time", ["compute.lease_s=0"], ["compute.lease_s=0", "0.1 to 3600"]),
    Case("55 a lease for ever", ["compute.lease_s=1e300"], ["compute.lease_s=1e+300", "0.1 to 3600"]),
    Case("56 a stage twice", ["stages=[prepare,prepare]"], ["stages", "'prepare'", "twice"]),
    Case("57 students without images", ["stages=[distill]"], ["stages=[distill]", "needs images"]),
    Case("57 labels without images", ["stages=[relabel,distill]"], ["relabel needs images"]),
    Case("57 a report without images", ["stages=[report]"], ["report needs images"]),
    Case("58 a name of three hundred characters", ["run_id=" + "x" * 300], ["run_id=xxx", "1 to 128"]),
    Case("58 a name in other letters", ["run_id=größe"], ["run_id=größe", "letters"]),
    Case(
        "59 more iterations than can be counted", ["method.iterations=4294967296"], ["iterations=4294967296", "2**31"]
    ),
    # Storage:
    Case("60 the home of nobody", ["storage=~nobody-of-that-name/x"], ["no home folder"]),
    Case("61 an address of a file without its path", ["storage=file://"], ["'file://'", "file:///FOLDER"]),
    Case("61 an address of a file on another host", ["storage=file://host/x"], ["file:///FOLDER"]),
    Case(
        "62 storage that is a link to itself",
        ["storage={here}/loop"],
        ["symbolic links", "choose another storage"],
        lambda here: (here / "loop").symlink_to(here / "loop"),
    ),
    # Recipes and suites:
    Case(
        "63 a recipe that is a folder",
        ["recipe={here}/my.yaml"],
        ["no such file"],
        lambda here: (here / "my.yaml").mkdir(),
    ),
    Case(
        "63 a recipe that is a pipe",
        ["recipe={here}/my.yaml"],
        ["no such file"],
        lambda here: os.mkfifo(here / "my.yaml"),
    ),
    Case(
        "64 a row with a storage of its own",
        SUITE,
        ["storage=/x", "same for all rows"],
        suite("recipe: digits_smoke\nrows: {a: ['storage=/x']}"),
        "bench",
    ),
    Case(
        "64 a row with a name for its run",
        SUITE,
        ["run_id=x", "same for all rows"],
        suite("recipe: digits_smoke\nrows: {a: [run_id=x]}"),
        "bench",
    ),
    Case(
        "64 a row on another executor",
        SUITE,
        ["compute=ray", "same for all rows"],
        suite("recipe: digits_smoke\nrows: {a: [compute=ray]}"),
        "bench",
    ),
    Case(
        "65 a row with a wrong setting",
        SUITE,
        ["row 'bad'", "method.lr=nan"],
        suite("recipe: digits_smoke\nrows: {good: [], bad: [method.lr=nan]}"),
        "bench",
    ),
    Case(
        "66 a row without a name", SUITE, ["row ''", "no name"], suite("recipe: digits_smoke\nrows: {'': []}"), "bench"
    ),
    Case(
        "67 two recipes in a suite",
        SUITE,
        ["must hold 'recipe'"],
        suite("recipe: [digits_smoke]\nrows: {a: []}"),
        "bench",
    ),
    Case(
        "67 a row that is no list",
        SUITE,
        ["must hold 'recipe' and 'rows'"],
        suite("recipe: digits_smoke\nrows: {a: seed=1}"),
        "bench",
    ),
    Case(
        "67 one seed twice",
        SUITE,
        ["seeds=[0, 0]", "twice"],
        suite("recipe: digits_smoke\nrows: {a: []}\nseeds: [0, 0]"),
        "bench",
    ),
    Case(
        "67 a row named twice",
        SUITE,
        ["'a' stands twice"],
        suite("recipe: digits_smoke\nrows:\n  a: [seed=1]\n  a: [seed=2]\n"),
        "bench",
    ),
    Case(
        "67 a suite nested five thousand times",
        SUITE,
        ["nested too deeply"],
        suite("rows: " + "[" * 5000 + "]" * 5000),
        "bench",
    ),
    # Clusters:
    Case("68 the address of a dashboard", ["compute=ray", "compute.address=http://127.0.0.1:8265"], ["web address"]),
    Case("69 a host that can't be", ["compute=ray", "compute.address=.:6379"], ["'.:6379'", "no Ray cluster answers"]),
    Case("69 a port that can't be", ["compute=ray", "compute.address=127.0.0.1:99999"], ["not an address"]),
    Case(
        "70 nonsense in the environment",
        ["compute=ray"],
        ["RAY_ADDRESS='nonsense'", "HOST:PORT"],
        environment=(("RAY_ADDRESS", "nonsense"),),
    ),
    # Images:
    Case(
        "71 an image of no bytes",
        FOLDER,
        ["cat/0.png", "cannot be decoded"],
        data(lambda root: (root / "cat/0.png").write_bytes(b"")),
    ),
    Case("72 another format under a PNG's name", FOLDER, ["cat/0.png", "cannot be decoded"], data(gif_named_as_a_png)),
    Case("73 a pipe among images", FOLDER, ["cat/0z.png", "a pipe"], data(lambda root: os.mkfifo(root / "cat/0z.png"))),
    Case(
        "73 a broken link among images",
        FOLDER,
        ["cat/9.png", "broken link"],
        data(lambda root: (root / "cat/9.png").symlink_to("nowhere.png")),
    ),
    Case(
        "74 a folder among images",
        FOLDER,
        ["cat/more is a folder"],
        data(lambda root: picture(root / "cat/more/0.png")),
    ),
    Case("75 a class to test that none is trained on", FOLDER, ["val/emu", "train/emu"], data(other_test_class)),
    Case(
        "76 data that are a link to themselves",
        FOLDER,
        ["symbolic links"],
        lambda here: (here / "data").symlink_to(here / "data"),
    ),
    Case(
        "77 data at an address where nobody answers",
        ["dataset=image_folder", "dataset.path=http://127.0.0.1:1/x"],
        ["http://127.0.0.1:1/x", "cannot be read"],
    ),
    Case(
        "78 data in an archive that is missing",
        ["dataset=image_folder", "dataset.path=zip::file://none.zip"],
        ["zip::file://none.zip"],
    ),
    Case("79 an image that is null", PARQUET, ["train:000000", "no image bytes"], table_of(image=[None] * 4)),
    Case("80 a label out of range", PARQUET, ["label 2", "0 to 1"], table_of(label=[2, 1, 0, 1])),
    Case("80 a negative label", PARQUET, ["label -2", "0 to 1"], table_of(label=[-2, 1, 0, 1])),
    Case("81 a label that is null", PARQUET, ["label None"], table_of(label=[None, 1, 0, 1])),
    Case("82 labels that are text", PARQUET, ["label_column", "string"], table_of(label=["cat", "dog", "cat", "dog"])),
    Case(
        "83 images that are numbers",
        ["dataset=parquet", "dataset.path={here}/data", "dataset.image_column=label"],
        ["image_column", "int64"],
        table_of(),
    ),
    # Teachers, students, generators:
    Case("84 a description that is no JSON", TEACHER, ["config.json", "no model configuration"], teacher(b"<html>")),
    Case("84 a description that is a list", TEACHER, ["config.json", "no model configuration"], teacher([])),
    Case("85 a description without its architecture", TEACHER, ["config.json", "'architecture'"], teacher({})),
    Case(
        "85 an architecture that nobody knows",
        TEACHER,
        ["config.json", "'resnet81'", "resnet18"],
        teacher({"architecture": "resnet81"}),
    ),
    Case("86 a number of classes in words", TEACHER, ["'ten' classes"], teacher(CONFIG | {"num_classes": "ten"})),
    Case(
        "87 classes in another order",
        TEACHER,
        ["class 0 is '1'", "same order"],
        teacher(CONFIG | {"pretrained_cfg": {"label_names": list("1023456789")}}),
    ),
    Case(
        "88 weights that are no numbers",
        TEACHER,
        ["w holds values", "no finite numbers"],
        teacher(CONFIG, save({"w": NOT_A_NUMBER})),
    ),
    Case(
        "88 weights that are no numbers, in 16 bits",
        TEACHER,
        ["no finite numbers"],
        teacher(CONFIG, save({"w": NOT_A_NUMBER.bfloat16()})),
    ),
    Case(
        "89 an argument that a student does not take",
        ["student.model_args={widths: [8]}"],
        ["student.model_args", "'widths'"],
    ),
    Case("89 an argument of another type", ["student.model_args={channels: many}"], ["student.model_args", "'many'"]),
    Case(
        "89 an argument that a teacher does not take",
        ["teachers.models.vgg.model_args={depth: 3}"],
        ["teachers.models.vgg.model_args", "'depth'"],
    ),
    Case(
        "90 images too small for a network",
        ["dataset.image_size=1"],
        ["teachers.models.vgg.model_args", "images of 1 pixels"],
    ),
    Case(
        "91 a generator without its index", GENERATOR, ["model_index.json"], lambda here: (here / "generator").mkdir()
    ),
    Case(
        "91 a generator's index that is no JSON",
        GENERATOR,
        ["model_index.json", "no JSON"],
        written("generator/model_index.json", "{"),
    ),
    Case(
        "91 a pipeline of another kind",
        GENERATOR,
        ["FluxPipeline", "StableDiffusionPipeline"],
        written("generator/model_index.json", '{"_class_name": "FluxPipeline"}'),
    ),
    Case(
        "92 a name on the hub without its owner",
        [*SAMPLED, "prompts.world=photo", "generator.source=hub:model"],
        ["'hub:model'", "OWNER/NAME"],
    ),
    Case("93 prompts from a server without its address", [*SAMPLED, "prompts.back_end=http"], ["prompts."]),
    # Verbs:
    Case("94 the state of a run that is not there", [], ["not found", "start it"], verb="status"),
    Case("94 units of a run that is not there to be tried again", [], ["not found", "start it"], verb="retry"),
    Case("94 an export of a run that is not there", [], ["not found", "start it"], verb="export"),
    Case("95 a verb in capitals", [], ["'RUN'", "known: init, run"], verb="RUN"),
]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_it_is_refused_in_one_line_and_nothing_is_written(
    prism: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: Case
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name, value in case.environment:
        monkeypatch.setenv(name, value)
    case.make(tmp_path)
    before, had_ray = sorted(tmp_path.rglob("*")), "ray" in sys.modules
    started = time.process_time()
    overrides = [override.replace("{here}", str(tmp_path)) for override in case.overrides]
    if case.verb == "bench":
        result = prism.bare("bench", *overrides, f"storage={tmp_path}/outputs")
    else:
        result = prism(case.verb, *overrides)
    assert time.process_time() - started < LIMIT_S
    assert_refused(result, *case.words)
    assert sorted(tmp_path.rglob("*")) == before
    assert ("ray" in sys.modules) == had_ray


def test_the_list_is_complete() -> None:
    numbers = {int(name.split()[0]) for name in (*(case[0] for case in SETTINGS), *NAMES_OF_OTHERS)}
    numbers |= {int(case.name.split()[0]) for case in CASES}
    assert set(range(1, 46)) <= numbers
    assert len(numbers - set(range(1, 46))) >= 20
    assert len({case.name for case in CASES}) == len(CASES)


# Those that need more than settings and files


def own_process(here: Path, *overrides: str, **environment: str) -> Result:
    """`prism-ray run` in a process of its own, with nothing of ours in its environment."""
    given = {override.partition("=")[0] for override in overrides}
    defaults = [d for d in (*SMOKE, f"storage={here}/outputs") if d.partition("=")[0] not in given]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "RAY_"))}
    before = cpu_of_children()
    ended = subprocess.run(
        [sys.executable, "-m", "prism_ray", "run", *defaults, *overrides],
        capture_output=True,
        text=True,
        env=kept | {"CUDA_VISIBLE_DEVICES": "", "HOME": str(here)} | environment,
        timeout=240,
        check=False,
    )
    assert cpu_of_children() - before < LIMIT_S
    return Result(ended.returncode, ended.stdout, ended.stderr)


NAMES_OF_OTHERS = (
    "31 a run folder of other settings",  # in test_bad_inputs, with a run that is there
    "33 a bucket that is missing",
    "34 no credentials",
    "38 another token",
    "39 another version",
    "41 a table of prompts that is empty or no text",
)

BUCKET = ["dataset=image_folder", "dataset.path=s3://none-such/pets"]


def test_34_a_bucket_without_credentials_is_refused(tmp_path: Path) -> None:
    result = own_process(tmp_path, *BUCKET, AWS_EC2_METADATA_DISABLED="true")
    assert_refused(result, "s3://none-such/pets", "credentials")
    assert not (tmp_path / "outputs").exists()


def test_33_a_bucket_that_is_missing_is_refused_and_no_key_is_echoed(tmp_path: Path) -> None:
    answering = "import http.server, sys\n"
    answering += "class Answer(http.server.BaseHTTPRequestHandler):\n"
    answering += "    def do_GET(self):\n"
    answering += "        body = b'<Error><Code>NoSuchBucket</Code><Message>no such bucket</Message></Error>'\n"
    answering += "        self.send_response(404); self.send_header('Content-Length', str(len(body)))\n"
    answering += "        self.end_headers(); self.wfile.write(b'' if self.command == 'HEAD' else body)\n"
    answering += "    do_HEAD = do_GET\n"
    answering += "    def log_message(self, *a): pass\n"
    answering += "server = http.server.HTTPServer(('127.0.0.1', 0), Answer)\n"
    answering += "print(server.server_port, flush=True); server.serve_forever()\n"
    with subprocess.Popen([sys.executable, "-c", answering], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            address = f"http://127.0.0.1:{server.stdout.readline().strip()}"
            keys = {"AWS_ACCESS_KEY_ID": "canary-id", "AWS_SECRET_ACCESS_KEY": "canary-secret"}
            result = own_process(tmp_path, *BUCKET, AWS_ENDPOINT_URL=address, AWS_REGION="us-east-1", **keys)
        finally:
            server.kill()
    assert_refused(result, "s3://none-such/pets")
    assert "canary" not in result.err
    assert not (tmp_path / "outputs").exists()


TOKEN = "0123456789abcdef" * 2


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[str]:
    """The address of the part of a Ray cluster that knows its members, alone; it asks for `TOKEN`."""
    ray = find_spec("ray")
    assert ray is not None
    assert ray.origin is not None
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "session").mkdir()
    command = [
        str(Path(ray.origin).parent / "core/src/ray/gcs/gcs_server"),
        f"--log_dir={tmp_path}/session",
        f"--session-dir={tmp_path}/session",
        f"--gcs_server_port={port}",
        "--metrics-agent-port=0",
        "--node-ip-address=127.0.0.1",
        "--session-name=alone",
        f"--config_list={base64.b64encode(b'{}').decode()}",
        "--ray-commit=none",
    ]
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path
    ) as server:
        try:
            for _ in range(300):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.1)
            yield f"127.0.0.1:{port}"
        finally:
            server.kill()


def test_38_a_cluster_that_refuses_our_token_is_refused(tmp_path: Path, cluster: str) -> None:
    for environment in ({}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 32}):
        result = own_process(tmp_path, "compute=ray", f"compute.address={cluster}", **environment)
        assert_refused(result, cluster, "token", "RAY_AUTH_TOKEN")
        assert TOKEN not in result.err
    assert not (tmp_path / "outputs").exists()


def test_39_a_cluster_of_another_version_is_refused(tmp_path: Path, cluster: str) -> None:
    entered = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    versions = json.dumps({"ray_version": "2.1.0", "python_version": "3.9.1"})
    program = (
        "import sys; from ray._raylet import GcsClient;"
        "GcsClient(address=sys.argv[1]).internal_kv_put("
        "b'CLUSTER_METADATA', sys.argv[2].encode(), True, namespace=b'cluster')"
    )
    subprocess.run([sys.executable, "-c", program, cluster, versions], env=os.environ | entered, check=True, timeout=60)
    result = own_process(tmp_path, "compute=ray", f"compute.address={cluster}", **entered)
    assert_refused(result, "ray 2.1.0 there", "python 3.9.1 there", "install the same")
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"\n\n"])
def test_41_a_table_of_prompts_that_is_empty_or_no_text_is_refused(content: bytes) -> None:
    with pytest.raises(InputError, match="prompt table") as caught:
        from_jsonl(content)
    assert re.fullmatch(r"[^\n]+", str(caught.value))
