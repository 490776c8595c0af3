"""Runs submitted to a Ray cluster as jobs: one undisturbed, one stopped in the middle and submitted again, one on S3.

    python benchmarks/submitted.py [local s3] --storage DIR [--share 0.1] [overrides ...]

A head node on loopback asks for a token. First `ray job submit` of jobs/pipeline.py, its log followed to the end: the
undisturbed run. `local`: another storage, `ray job stop` while images are made, then `python jobs/submit.py`. `s3`: the
same two steps with an S3 server on loopback (moto) behind a proxy that spoils a share of all requests. Every shard,
label and student is compared with the undisturbed run's by sha256, and rows are counted. Prints a JSON line per
scenario; ends with 1 if anything differs.
"""

import argparse
import io
import json
import sys
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

import pyarrow.parquet as pq  # noqa: E402
import s3_server  # noqa: E402
from head_node import Head, head_node  # noqa: E402

from benchmarks.elastic import wait_until  # noqa: E402
from prism_ray.storage import Store, open_store  # noqa: E402

TIMEOUT_S = 1500


def job(head: Head, *settings: str, name: str) -> list[str]:
    """Arguments of a plain `ray job submit`."""
    options = ["submit", "--working-dir", ".", "--runtime-env", "jobs/runtime_env.yaml", "--submission-id", name]
    return [*options, "--", "python", "jobs/pipeline.py", *settings]


def undisturbed(head: Head, storage: str, overrides: list[str]) -> dict[str, Any]:
    """One job, followed until it has succeeded."""
    began = time.monotonic()
    done = head.ray(*job(head, *overrides, f"storage={storage}", name="undisturbed"))
    status = head.job("undisturbed")["status"]
    result = {"scenario": "undisturbed", "status": status, "seconds": round(time.monotonic() - began, 1)}
    lines = [line for line in done.stdout.splitlines() if line.startswith("[synthesize]")]
    result |= {"log_followed": bool(lines), "objects": len(s3_server.products_at(storage)), **rows_of(storage)}
    if done.returncode != 0 or status != "SUCCEEDED":
        raise SystemExit(f"{result}\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    return {**result, "passed": result["log_followed"] and not result["doubled"]}


def stopped(head: Head, storage: str, overrides: list[str], expected: dict[str, str], *, name: str) -> dict[str, Any]:
    """A job that is stopped while images are made, and submitted again by jobs/submit.py until it is done."""
    settings = [*overrides, f"storage={storage}"]
    submit = job(head, *settings, name=name)
    submitted = head.ray(*submit[:1], "--no-wait", *submit[1:])
    if submitted.returncode != 0:
        raise SystemExit(submitted.stdout + submitted.stderr)
    store = open_store(storage)
    wait_until(lambda: bool(shards(store)) or not head.works_on(name), "an image is there", timeout_s=TIMEOUT_S)
    began = time.monotonic()
    head.ray("stop", name)
    stop_s = time.monotonic() - began
    units = len(shards(store))
    began = time.monotonic()
    again = head.submit("pipeline", *settings)
    found = s3_server.products_at(storage)
    result = {
        "scenario": name,
        "first": head.job(name)["status"],
        "stop_s": round(stop_s, 1),
        "units_before_the_stop": units,
        "units": len(shards(store)),
        "second": "SUCCEEDED" if again.returncode == 0 else f"exit code {again.returncode}",
        "second_s": round(time.monotonic() - began, 1),
        "identical": found == expected,
        **rows_of(storage),
    }
    if again.returncode != 0:
        print(again.stdout[-4000:], again.stderr[-4000:], file=sys.stderr)
    done = again.returncode == 0 and result["first"] == "STOPPED" and 0 < units < result["units"]
    return {**result, "passed": done and result["identical"] and not result["doubled"]}


def shards(store: Store) -> list[str]:
    """Keys of the shards of images in a storage."""
    return [key for key in store.keys("runs") if "/images/" in key and key.endswith(".parquet")]


def rows_of(storage: str) -> dict[str, int]:
    """Images of a storage's only run, and how many are there more than once."""
    store = open_store(storage)
    counted: Counter[str] = Counter()
    for key in shards(store):
        table = pq.read_table(io.BytesIO(store.read(key)), columns=["image_id"])
        counted.update(str(image) for image in table["image_id"].to_pylist())
    return {"rows": counted.total(), "doubled": counted.total() - len(counted)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arguments", nargs="*", metavar="local | s3 | override", help="default: both scenarios")
    parser.add_argument("--storage", type=Path, required=True, help="an empty folder")
    parser.add_argument("--share", type=float, default=0.1, help="of requests that the proxy spoils")
    options = parser.parse_args()
    scenarios = [name for name in options.arguments if "=" not in name] or ["local", "s3"]
    if unknown := set(scenarios) - {"local", "s3"}:
        parser.error(f"unknown scenarios {sorted(unknown)}; known: local, s3")
    overrides = [setting for setting in options.arguments if "=" in setting] or ["recipe=digits"]
    folder = options.storage.resolve()
    results = []

    def note(result: dict[str, Any]) -> None:
        results.append(result)
        print(json.dumps(result), flush=True)

    reference = str(folder / "undisturbed")
    with head_node() as head:
        note(undisturbed(head, reference, overrides))
        expected = s3_server.products_at(reference)
        if "local" in scenarios:
            note(stopped(head, str(folder / "stopped"), overrides, expected, name="local"))
    if "s3" in scenarios:
        with ExitStack() as stack:
            server = stack.enter_context(s3_server.s3_server())
            proxy = stack.enter_context(s3_server.faulty(server, share=options.share))
            stack.enter_context(s3_server.environment(server))
            head = stack.enter_context(head_node(proxy.environment))
            result = stopped(head, f"s3://{s3_server.BUCKET}/jobs", overrides, expected, name="s3")
            note({**result, "requests": proxy.requests.total(), "faults": dict(proxy.faults)})
    sys.exit(not all(result["passed"] for result in results))


if __name__ == "__main__":
    main()
