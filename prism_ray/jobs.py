"""Runs as jobs of a Ray cluster: what the entry points in `jobs/` share.

An entry point is a verb with some settings fixed. Inside a job `compute.address` defaults to the job's own cluster,
since Ray sets RAY_ADDRESS there. The same job submitted again continues its run.
"""

import json
import sys
from collections.abc import Sequence
from typing import NoReturn

from prism_ray import cli
from prism_ray.config import Config
from prism_ray.errors import ExitCode, InputError
from prism_ray.identity import run_id
from prism_ray.runtime.submission import note, submission_id
from prism_ray.signals import exit_with

NOTE = "job: "
"""Beginning of the line of a job's log that is JSON: its submission id, and name and address of every run."""

STAGES = {
    "pipeline": None,
    "synthesize": "prepare,teach,synthesize",
    "relabel": "prepare,teach,relabel",
    "distill": "distill",
    "evaluate": "evaluate,report",
    "bench": None,
}
"""Entry points by name, with the stages that they are for; None: the caller's, or all."""


def main(name: str) -> NoReturn:
    """End the process with the exit code of an entry point; its settings are the command line's."""
    exit_with(lambda: run_job(name, sys.argv[1:]))


def run_job(name: str, arguments: Sequence[str]) -> int:
    """Drive the runs of an entry point, and say which they are in a line of JSON and in the job's metadata.

    Quarantined units end it with 0 and a loud line, because a cluster that retries jobs would do all of it again for
    nothing; with `strict=true` with 3.
    """
    is_strict, overrides = split_strict(arguments)
    verb, settings = command_of(name, overrides)
    configs = compose_all(verb, settings)
    runs = [{"run_id": run_id(config), "url": run_url(config)} for config in configs]
    print(f"{NOTE}{json.dumps({'submission_id': submission_id(), 'runs': runs})}", flush=True)
    note(metadata(configs))
    code = cli.main([verb, *settings])
    if code != ExitCode.quarantined:
        return code
    note({"quarantined": "true"})
    print("=" * 80)
    print("prism-ray: UNITS WERE QUARANTINED: the runs above are complete without them (prism-ray retry tries again)")
    print("=" * 80, flush=True)
    return code if is_strict else int(ExitCode.done)


def metadata(configs: Sequence[Config]) -> dict[str, str]:
    """What a job's metadata says of its runs: names and addresses."""
    return {
        "prism_ray_run_id": ",".join(run_id(config) for config in configs),
        "prism_ray_url": ",".join(run_url(config) for config in configs),
    }


def run_url(config: Config) -> str:
    """Address of a run's folder."""
    return f"{config.storage.rstrip('/')}/runs/{run_id(config)}"


def split_strict(arguments: Sequence[str]) -> tuple[bool, list[str]]:
    """The setting `strict`, which is the entry point's own, and all others."""
    values = [a.removeprefix("strict=") for a in arguments if a.startswith("strict=")]
    for value in values:
        if value not in ("true", "false"):
            raise InputError(f"strict={value}: expected true or false")
    return values[-1:] == ["true"], [a for a in arguments if not a.startswith("strict=")]


def command_of(name: str, overrides: list[str]) -> tuple[str, list[str]]:
    """The verb of an entry point, and all its settings."""
    if name == "bench":
        return "bench", overrides
    stages = STAGES[name]
    if stages is None:
        return "run", overrides
    if any(override.startswith("stages=") for override in overrides):
        raise InputError(f"stages: are those of jobs/{name}.py ({stages}); leave them out, or use jobs/pipeline.py")
    return "run", [*overrides, f"stages=[{stages}]"]


def compose_all(verb: str, settings: list[str]) -> list[Config]:
    """The checked settings of every run that a command drives."""
    if verb == "run":
        return [cli.compose(settings)]
    return [row.config for row in cli.compose_suite(settings)[1]]
