"""Entry points submitted to a Ray cluster: names that find a run's job again, metadata, the log followed to its end."""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from prism_ray.config import Config
from prism_ray.errors import InputError
from prism_ray.identity import content_hash, run_id
from prism_ray.jobs import STAGES, command_of, compose_all, metadata, split_strict
from prism_ray.runtime.submission import Submission, submit_and_follow
from prism_ray.signals import exit_with

DESCRIPTION = """Submit an entry point of this folder, follow its log, and end as it ends. The same command follows the
job while it runs, and submits it again when it has ended: its run then continues where it was."""


def main() -> NoReturn:
    """End the process as the job ends that its command line asks for."""
    exit_with(lambda: submit(sys.argv[1:], jobs_dir=Path(sys.argv[0]).resolve().parent))


def submit(arguments: Sequence[str], *, jobs_dir: Path) -> int:
    """Submit an entry point, after everything was checked that can be checked from here.

    Args:
        arguments: see `--help`.
        jobs_dir: folder of the entry points; the folder above it is what the cluster gets.
    """
    options = _parser().parse_args(arguments)
    _, overrides = split_strict(options.settings)
    configs = compose_all(*command_of(options.job, overrides))
    check_storage(configs)
    runtime_env = Path(options.runtime_env or jobs_dir / "runtime_env.yaml")
    if not runtime_env.is_file():
        raise InputError(f"--runtime-env {runtime_env}: not found; give the path of a YAML file")
    os.environ["RAY_AUTH_MODE"] = options.auth  # read when ray is imported, and never guessed
    return submit_and_follow(
        Submission(
            name=job_name(options.job, configs),
            entrypoint=shlex.join(["python", f"jobs/{options.job}.py", *options.settings]),
            working_dir=str(jobs_dir.parent),
            runtime_env=str(runtime_env),
            metadata=metadata(configs),
            num_cpus=options.entrypoint_num_cpus,
        ),
        address=options.address,
        follow=not options.no_wait,
    )


def check_storage(configs: Sequence[Config]) -> None:
    """Refuse a folder that would be gone with a job's working directory."""
    for config in configs:
        if "://" not in config.storage and not Path(config.storage).is_absolute():
            raise InputError(
                f"storage={config.storage}: would lie in the job's working directory, which the cluster deletes; give "
                "an address (s3://…, gs://…) or the absolute path of a file system that all nodes share"
            )


def job_name(job: str, configs: Sequence[Config]) -> str:
    """Beginning of a job's submission id: the same for the same runs, so that they are found again."""
    names = [run_id(config) for config in configs]
    return f"{job}-{names[0] if len(names) == 1 else content_hash(names)[:12]}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="submit.py", description=DESCRIPTION)
    parser.add_argument("job", choices=list(STAGES), help="jobs/JOB.py")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="its settings, like recipe=digits storage=URL")
    parser.add_argument(
        "--address",
        default=os.environ.get("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265"),
        help="of the cluster's job server; default: RAY_API_SERVER_ADDRESS, else %(default)s",
    )
    parser.add_argument(
        "--auth",
        choices=["token", "disabled"],
        default=os.environ.get("RAY_AUTH_MODE", "token"),
        help="whether the job server asks for a token (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token); "
        "default: RAY_AUTH_MODE, else token",
    )
    parser.add_argument("--runtime-env", metavar="FILE", help="default: runtime_env.yaml beside this program")
    parser.add_argument(
        "--entrypoint-num-cpus",
        type=float,
        default=0.0,
        metavar="N",
        help="CPUs reserved for the driver, on any node; default: none, on the head",
    )
    parser.add_argument("--no-wait", action="store_true", help="do not follow the log")
    return parser
