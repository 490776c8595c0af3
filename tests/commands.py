"""The command line as tests call it, and what they compare its results by."""

import hashlib
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from prism_ray import cli
from prism_ray.inspection import open_existing
from prism_ray.lock import newest_epoch
from prism_ray.work import RunSpec

SMOKE = ["recipe=digits_smoke", "compute=inline"]


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str


class Command:
    """`prism-ray VERB` in this process; defaults give way to overrides of the same key."""

    def __init__(self, capsys: pytest.CaptureFixture[str], storage: Path) -> None:
        self._capsys, self._storage = capsys, storage

    def __call__(self, verb: str, *overrides: str) -> Result:
        given = {override.partition("=")[0] for override in overrides}
        defaults = [d for d in (*SMOKE, f"storage={self._storage}") if d.partition("=")[0] not in given]
        return self.bare(verb, *defaults, *overrides)

    def bare(self, *arguments: str) -> Result:
        """The very arguments, no defaults."""
        self._capsys.readouterr()
        code = cli.main(arguments)
        captured = self._capsys.readouterr()
        return Result(code, captured.out, captured.err)


def spec_of_copy(finished: Path, copy: Path, settings: list[str]) -> RunSpec:
    """A finished run in a copy of its storage, as its workers see it."""
    found = open_existing(cli.compose([*settings, f"storage={shutil.copytree(finished, copy)}"]))
    return replace(found.spec(), epoch=newest_epoch(found.store))


def products(run_dir: Path) -> dict[str, str]:
    """sha256 of everything a run promises to make again bit for bit."""
    folders = ("images", "labels", "student")
    files = [path for folder in folders for path in (run_dir / folder).rglob("*.*") if path.is_file()]
    return {
        path.relative_to(run_dir).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(files)
        if path.suffix in (".parquet", ".safetensors")
    }
