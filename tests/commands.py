"""The command line as tests call it, and what they compare its results by."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import pytest

from prism_ray import cli

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


def products(run_dir: Path) -> dict[str, str]:
    """sha256 of everything a run promises to make again bit for bit."""
    folders = ("images", "labels", "student")
    files = [path for folder in folders for path in (run_dir / folder).rglob("*.*") if path.is_file()]
    return {
        path.relative_to(run_dir).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(files)
        if path.suffix in (".parquet", ".safetensors")
    }
