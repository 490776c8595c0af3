"""Every command and every piece of code in the documents works.

The rules by which a document's commands are made small, so that a test can run them:

- a recipe becomes the smoke recipe of its track; what is said beside it (method, prompts, teachers, ...) stays;
- a suite becomes one of the same rows under that recipe, with one seed, without columns;
- a recipe file of the reader's own stays, and a few settings make it short;
- `/data/birds`, `/models/sd15` and `/models/taesd` become a small folder of images and twins of the generators;
- `compute=...` becomes `compute=inline`; results go to `outputs` in an empty working directory.

What needs a GPU, a bucket, a cluster, ImageNet or hours is not run: its settings are composed and checked, its shell
is parsed, its files are looked for. A block of YAML begins with the name of its file, and is written there; blocks of a
document run from top to bottom in one directory.
"""

import ast
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from commands import Command
from documents import NAMES, ROOT, Block, blocks, commands
from PIL import Image
from pipelines import save_twin, tiny

import prism_ray
from prism_ray import cli
from prism_ray.cli import VERBS, compose, compose_suite
from prism_ray.cli.files import group_file, group_names, read_yaml
from prism_ray.identity import run_id
from prism_ray.jobs import command_of, compose_all

LANGUAGES = ("sh", "python", "yaml", "text")
OTHER_PROGRAMS = (
    "export",
    "ray",
    "docker",
    "kind",
    "helm",
    "kubectl",
    "kustomize",
    "mkdir",
    "ssh",
    "cd",
    "RAY_AUTH_MODE=token",
)
"""Programs that a cluster or a cloud is needed for, and words of the shell."""
LOOKING = ("plan", "status", "verify", "retry", "report", "show", "export", "config", "doctor")
"""Verbs that make no image."""
ADDING = ("Adding a method", "Adding a teacher", "Adding a data set", "Adding a generator")
"""Sections of the guide with tests of their own."""
SMALL = {"digits": "digits_smoke", "fashion_mnist": "digits_smoke", "digits_dfkd": "digits_dfkd_smoke"}
SMALL |= {"fashion_mnist_dfkd": "digits_dfkd_smoke"}
SHORT = [
    *("teach.epochs=1", "teachers.min_accuracy=0", "method.iterations=2", "labels.views=2", "student.steps=3"),
    *("student.seeds=[0]", "images_per_class=1"),
]
"""What makes a run of a reader's own recipe short."""
BIG = re.compile(r"imagenet|ray_gpu|s3://|compute\.address|HEAD|BUCKET|FOLDER|suite=fashion_mnist|suite=ablation")
"""A command with one of these is composed and not run."""

ALL = [block for name in NAMES for block in blocks(name)]
SHELL = [block for block in ALL if block.language == "sh"]
OWN = [(block, words) for block in SHELL for words in commands(block) if words[0] == "prism-ray"]


def named(value: Any) -> str | None:
    if isinstance(value, Block):
        return value.named
    return " ".join(value) if isinstance(value, list) else None


# Form


def test_there_are_documents_with_blocks_of_known_languages() -> None:
    assert {block.document for block in ALL} == set(NAMES)
    assert len(OWN) > 30
    assert [block.named for block in ALL if block.language not in LANGUAGES] == []


@pytest.mark.parametrize("block", SHELL, ids=named)
def test_shell_is_shell(block: Block) -> None:
    read = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True, check=False)
    assert (read.returncode, read.stderr) == (0, "")


@pytest.mark.parametrize("block", [block for block in ALL if block.language == "yaml"], ids=named)
def test_yaml_is_data_and_begins_with_its_file(block: Block) -> None:
    assert re.match(r"# [\w./]+\.yaml\n", block.text)
    assert isinstance(yaml.safe_load(block.text), dict)


@pytest.mark.parametrize("document", NAMES)
def test_what_a_document_points_at_is_there(document: str) -> None:
    text = (ROOT / document).read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if path.startswith("http"):
            continue
        found = (ROOT / document).parent / path if path else ROOT / document
        assert found.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", found.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}, target


def test_the_first_page_is_one_screen() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 100


def test_every_verb_preset_and_recipe_is_in_the_guide() -> None:
    guide = (ROOT / "GUIDE.md").read_text()
    for verb in VERBS:
        assert f"prism-ray {verb}" in guide, verb
    for group in ("recipe", "method", "labels", "student", "prompts"):
        for name in group_names(group):
            assert re.search(rf"\b{name}\b", guide), f"{group}={name}"
    for benchmark in (ROOT / "benchmarks").glob("*.py"):
        assert f"benchmarks/{benchmark.name}" in (ROOT / "benchmarks/README.md").read_text()


def test_the_guide_s_tree_names_every_module() -> None:
    guide = (ROOT / "GUIDE.md").read_text()
    tree = guide[guide.index("## The code") :]
    for path in (ROOT / "prism_ray").iterdir():
        if path.name.startswith("__") or path.name in ("py.typed",):
            continue
        assert path.name in tree, path.name


# Every command, composed


def settings_of(words: list[str]) -> list[str]:
    return [word for word in words if re.match(r"[a-z_.]+=", word)]


@pytest.fixture
def at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with what the documents' readers have made when they come to a command."""
    monkeypatch.chdir(tmp_path)
    with_presets_of_its_own(tmp_path, monkeypatch)
    for block in ALL:
        if block.language == "yaml":
            write_yaml(block, tmp_path)
    letters = make_birds(tmp_path / "birds")
    assert cli.main(["init", f"dataset.path={letters}", "out=birds.yaml"]) == 0
    return tmp_path


def with_presets_of_its_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped presets in a copy, where a document may add some."""
    shutil.copytree(ROOT / "prism_ray/conf", folder / "prism_ray/conf")
    for module in ("files", "compose"):
        monkeypatch.setattr(sys.modules[f"prism_ray.cli.{module}"], "CONF", folder / "prism_ray/conf")


def write_yaml(block: Block, folder: Path) -> None:
    path = folder / block.text.split()[1]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(block.text)


def make_birds(root: Path) -> Path:
    draws = np.random.default_rng(0)
    for name in ("owl", "wren"):
        (root / name).mkdir(parents=True)
        for number in range(8):
            pixels = draws.integers(0, 200, (20, 24, 3), dtype=np.uint8) + 50 * np.uint8(name == "owl")
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


def test_every_command_s_settings_are_accepted(at_hand: Path) -> None:
    checked: set[str] = set()
    for block, words in OWN:
        verb, *overrides = words[1:]
        assert verb in VERBS, (block.named, words)
        if verb in ("config", "init"):
            continue
        key = " ".join(overrides)
        suite = next((o.removeprefix("suite=") for o in overrides if o.startswith("suite=")), None)
        if suite in group_names("suite"):
            assert len(overrides) == 1, "test_suites composes the shipped ones"
        elif key not in checked:
            compose_suite(overrides) if suite else compose(overrides)
        checked.add(key)
    assert len(checked) > 15


@pytest.mark.parametrize(
    ("block", "words"),
    [
        pytest.param(
            block, words, marks=[pytest.mark.slow] if words[0] == "python" and "benchmarks" in words[1] else []
        )
        for block in SHELL
        for words in commands(block)
        if words[0] != "prism-ray"
    ],
    ids=named,
)
def test_every_other_command_names_what_is_there(block: Block, words: list[str]) -> None:
    program = words[0]
    if program == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif program == "python" and words[1].startswith("benchmarks/"):
        done = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stdout
    elif "jobs/submit.py" in words or any(word.startswith("jobs/") and word.endswith(".py") for word in words):
        names = [Path(word).stem for word in words if re.fullmatch(r"jobs/\w+\.py", word) and word != "jobs/submit.py"]
        (name,) = names or [word for word in words if (ROOT / f"jobs/{word}.py").is_file()]
        settings = [word.replace("$HOME", "/home/me") for word in settings_of(words)]
        assert compose_all(*command_of(name, settings))
    else:
        assert program in OTHER_PROGRAMS, words
    for path in re.findall(r"(?:cluster|jobs)/[\w./-]+\w", " ".join(words)):
        assert (ROOT / path).exists(), path


def test_extras_that_documents_name_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for name in NAMES:
        for extra in re.findall(r"(?:prism-ray|\.)\[(\w[\w-]*)\]", (ROOT / name).read_text()):
            assert extra in extras, (name, extra)


# Commands that a finished run answers


def small(words: list[str]) -> list[str]:
    """A command by the rules above, without the program's name."""
    verb, *overrides = words
    if verb in ("config", "init"):
        return [word.replace("/data/birds", "birds") for word in words]
    if verb == "doctor":
        return words
    recipe = next((o.removeprefix("recipe=") for o in overrides if o.startswith("recipe=")), "digits")
    suite = next((o.removeprefix("suite=") for o in overrides if o.startswith("suite=")), None)
    kept = [o for o in overrides if not o.startswith(("recipe=", "suite=", "compute=", "compute.", "storage="))]
    if suite is not None:
        return [verb, f"suite={small_suite(suite)}", *kept, "compute=inline"]
    mine = recipe.endswith(".yaml")
    return [verb, f"recipe={recipe if mine else SMALL[recipe]}", *kept, *(SHORT if mine else []), "compute=inline"]


def small_suite(name: str) -> str:
    """A suite of the same rows on the smoke recipe, in the working directory."""
    content = read_yaml(group_file("suite", name))
    rows = {label: [*row, "student.seeds=[0]"] for label, row in content["rows"].items()}
    path = Path(f"small_{Path(name).stem}.yaml")
    shared = {"recipe": SMALL[content["recipe"]], "references": content.get("references", {})}
    path.write_text(json.dumps({**shared, "rows": rows}))
    return str(path)


def is_answered(words: list[str], finished: str) -> bool:
    """Whether a command looks at the smoke recipe's run, or at no run."""
    verb = words[1]
    if BIG.search(" ".join(words)) or any(word.startswith("suite=") or ".yaml" in word for word in words):
        return verb == "init"
    if verb in ("config", "init", "doctor"):
        return True
    return verb in (*LOOKING, "run") and run_id(compose(small(words[1:])[1:])) == finished


def test_commands_that_look_at_a_finished_run_answer(
    at_hand: Path, storage: Path, prism: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    (run,) = (storage / "runs").iterdir()
    answered = [
        words for words in {" ".join(words): words for _, words in OWN}.values() if is_answered(words, run.name)
    ]
    assert {words[1] for words in answered} == {*LOOKING, "run", "init"}
    assert storage == at_hand / "outputs"
    (at_hand / "birds.yaml").unlink()
    for words in answered:
        if "export" in words[1] and "onnx" in " ".join(words):
            continue  # seconds, and test_export does it
        done = prism.bare(*small(words[1:]))
        assert (done.code, done.err) == (0, ""), (words, done)
        assert done.out, words


# Python


def python_of(block: Block) -> str:
    """A block of Python by the rules above."""
    text = re.sub(r'"recipe=(\w+)"', lambda found: f'"recipe={SMALL[found[1]]}"', block.text)
    return text.replace("/models/", "models/")


@pytest.mark.parametrize("block", [block for block in ALL if block.language == "python"], ids=named)
def test_python_parses_and_imports_what_exists(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            exec(ast.unparse(node), {})


def test_the_first_page_s_python_runs(at_hand: Path, storage: Path) -> None:
    (block,) = (block for block in blocks("README.md") if block.language == "python")
    names: dict[str, Any] = {}
    exec(compile(python_of(block), block.named, "exec"), names)
    assert names["images"].pixels.shape == (20, 1, 16, 16)
    assert names["batch"].shape == (3, 1, 16, 16)
    (run,) = (storage / "runs").iterdir()
    assert names["folder"] == str(run)


# Everything, from top to bottom


def section(heading: str) -> list[Block]:
    """The blocks of a section of the guide."""
    lines = (ROOT / "GUIDE.md").read_text().splitlines()
    first = lines.index(f"## {heading}") + 1
    last = next((n for n, line in enumerate(lines[first:], first + 1) if line.startswith("## ")), len(lines) + 1)
    return [block for block in blocks("GUIDE.md") if first < block.line < last]


def followed(found: list[Block], prism: Command, folder: Path) -> list[str]:
    """Run blocks in order; returns the verbs that were run."""
    ran = []
    for block in found:
        if block.language == "yaml":
            write_yaml(block, folder)
        elif block.language == "python":
            exec(compile(python_of(block), block.named, "exec"), {})
        elif block.language == "sh":
            for words in (words for words in commands(block) if words[0] == "prism-ray"):
                if BIG.search(" ".join(words)):
                    continue
                (folder / "birds.png").unlink(missing_ok=True)
                if words[1] == "init":
                    (folder / "birds.yaml").unlink(missing_ok=True)
                done = prism.bare(*small(words[1:]))
                assert done.code == 0, (block.named, words, done)
                ran.append(words[1])
    return ran


@pytest.fixture
def finished(at_hand: Path, storage: Path) -> Path:
    """The same directory, where the smoke recipe was run before."""
    return at_hand


@pytest.mark.slow
@pytest.mark.parametrize("heading", ["Adding a method", "Adding a teacher", "Adding a data set"])
def test_what_is_added_by_the_guide_is_used_by_a_run(finished: Path, prism: Command, heading: str) -> None:
    before = {path.name for path in (finished / "outputs/runs").iterdir()}
    assert followed(section(heading), prism, finished) == ["run"]
    (made,) = {path.name for path in (finished / "outputs/runs").iterdir()} - before
    settings = yaml.safe_load((finished / "outputs/runs" / made / "config.yaml").read_text())["settings"]
    added = {
        "Adding a method": settings["method"]["name"],
        "Adding a teacher": settings["teachers"]["primary"],
        "Adding a data set": settings["dataset"]["name"],
    }
    assert added[heading] == "mine"
    if heading == "Adding a data set":
        assert prism_ray.load_images(str(finished / "outputs/runs" / made)).class_names == ["dark", "bright"]


@pytest.mark.slow
def test_a_generator_that_is_added_by_the_guide_is_sampled_from(finished: Path, prism: Command) -> None:
    save_twin("sd", finished / "models/sd15", with_tiny=False)
    tiny().save_pretrained(finished / "models/taesd", safe_serialization=True)
    assert followed(section("Adding a generator"), prism, finished) == ["run"]
    assert (finished / "my_generator/tiny_decoder/config.json").is_file()
    assert len(list((finished / "outputs/runs").iterdir())) == 2


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("document", ["README.md", "GUIDE.md", "benchmarks/README.md"])
def test_a_document_s_commands_run_from_top_to_bottom(finished: Path, prism: Command, document: str) -> None:
    elsewhere = [block for heading in ADDING for block in section(heading)]
    done = followed([block for block in blocks(document) if block not in elsewhere], prism, finished)
    assert len(done) >= 2
