"""Jobs of a Ray cluster: which one this process is, what its metadata says, and how one is submitted and followed."""

import asyncio
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from prism_ray.errors import ExitCode, InputError, PrismError, one_line

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Environment variable in which Ray tells the driver of a submitted job which one it is."""

RECONNECT_S = 2.0
MAX_RECONNECTS = 30
"""How long a job server that stopped answering is asked again: a minute."""


def submission_id() -> str | None:
    """Submission id of the job whose driver this process is; None outside jobs."""
    try:
        return json.loads(os.environ.get(JOB_CONFIG, "{}")).get("metadata", {}).get("job_submission_id")
    except ValueError:
        return None


def note(metadata: Mapping[str, str]) -> None:
    """Add to the metadata of the job whose driver this is, for `ray job list` and the dashboard.

    Ray offers no public call for it from within a job, so this goes by the class that its job server itself uses; where
    that fails, the job's log and its run folders say the same.
    """
    job = submission_id()
    if job is None:
        return
    try:
        from ray._raylet import GcsClient  # pyright: ignore  # compiled, without stubs
        from ray.dashboard.modules.job.common import JobInfoStorageClient

        client = JobInfoStorageClient(GcsClient(address=os.environ["RAY_ADDRESS"]))

        async def update() -> None:
            info = await client.get_info(job, timeout=10)
            if info is not None and not info.status.is_terminal():
                info.metadata = {**(info.metadata or {}), **metadata}
                await client.put_info(job, info, timeout=10)

        asyncio.run(update())
    except Exception as error:
        print(f"prism-ray: the job's metadata stays as it was: {one_line(error)[:200]}", flush=True)


@dataclass(frozen=True)
class Submission:
    """What is submitted.

    Args:
        name: beginning of the submission id; the attempt's number follows.
        entrypoint: command line of the driver, in the working directory.
        working_dir: local folder that the cluster gets, without what its .rayignore names.
        runtime_env: path of a YAML file with the rest of the runtime environment.
        metadata: what `ray job list` is to show.
        num_cpus: CPUs reserved for the driver; 0: it runs on the head.
    """

    name: str
    entrypoint: str
    working_dir: str
    runtime_env: str
    metadata: dict[str, str]
    num_cpus: float = 0.0


def submit_and_follow(submission: Submission, *, address: str, follow: bool = True) -> int:
    """Submit, unless an attempt of the same name is still under way, and print its log until it ends.

    Returns:
        0 if it succeeded, 75 if it was stopped, else the driver's exit code or 1.

    Raises:
        InputError: there is no job server, or it refuses us.
    """
    from ray.job_submission import JobStatus

    client = _connect(address)
    attempts = _attempts(client, submission.name)
    active = [number for number, job in attempts.items() if not job.status.is_terminal()]
    job_id = f"{submission.name}-{active[-1] if active else max(attempts, default=0) + 1}"
    if active:
        print(f"{job_id} is {attempts[active[-1]].status.lower()} already: following it", flush=True)
    else:
        client.submit_job(
            entrypoint=submission.entrypoint,
            submission_id=job_id,
            runtime_env={**_runtime_env(submission.runtime_env), "working_dir": submission.working_dir},
            metadata=submission.metadata,
            entrypoint_num_cpus=submission.num_cpus or None,
        )
        print(f"{job_id} submitted; stop it with `ray job stop {job_id}`, submit again to continue", flush=True)
    if not follow:
        return ExitCode.done
    asyncio.run(_follow(client, job_id))
    info = client.get_job_info(job_id)
    print(f"{job_id}: {info.status}", flush=True)
    if info.status == JobStatus.SUCCEEDED:
        return ExitCode.done
    if info.status == JobStatus.STOPPED:
        return ExitCode.drained
    if not info.driver_exit_code and info.message:  # it never came to run
        raise PrismError(f"{job_id} failed: {' '.join(info.message.split())[-300:]}")
    return info.driver_exit_code or ExitCode.failure


def _connect(address: str) -> "JobSubmissionClient":
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise InputError(
            f"--address {address}: the cluster asks for a token; set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the "
            "cluster's, and RAY_AUTH_MODE=token"
        ) from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InputError(
            f"--address {address}: no job server answers there ({one_line(error)[:200]}); start the cluster, forward "
            "its port 8265, or correct the address"
        ) from error


def _attempts(client: "JobSubmissionClient", name: str) -> dict[int, Any]:
    """Earlier submissions of the same name by their number, in order."""
    found = {}
    for job in client.list_jobs():
        prefix, _, number = (job.submission_id or "").rpartition("-")
        if prefix == name and number.isdigit():
            found[int(number)] = job
    return dict(sorted(found.items()))


def _runtime_env(path: str) -> dict[str, Any]:
    with open(path) as file:
        try:
            content = yaml.safe_load(file) or {}
        except yaml.YAMLError as error:
            raise InputError(f"--runtime-env {path}: no YAML ({one_line(error)[:200]})") from error
    if not isinstance(content, dict):
        raise InputError(f"--runtime-env {path}: holds no mapping; expected keys such as env_vars and pip")
    return content


async def _follow(client: "JobSubmissionClient", job_id: str) -> None:
    """Print a job's log until it ends; a connection that breaks is made again, and what was printed is skipped."""
    printed, failures = 0, 0
    while True:
        position = 0
        try:
            async for text in client.tail_job_logs(job_id):
                new = text[max(0, printed - position) :]
                position += len(text)
                printed = max(printed, position)
                failures = 0
                print(new, end="", flush=True)
            if client.get_job_status(job_id).is_terminal():
                return
        except (OSError, RuntimeError) as error:
            failures += 1
            if failures > MAX_RECONNECTS:
                raise PrismError(
                    f"{job_id}: its log can't be followed any more ({one_line(error)[:200]}); run the same command to "
                    "try again, the job goes on"
                ) from error
        await asyncio.sleep(RECONNECT_S)
