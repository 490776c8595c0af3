"""Send a signal at random moments of a run's start and work, and count how the runs ended.

    python benchmarks/stop_at_any_moment.py --times 20 --storage DIR [overrides ...]

Each run goes on from where the one before was stopped. A run that is over before its signal came starts anew, in
another storage. Prints one JSON line per signal and one for all: exit codes, the seconds to the end, lines on stderr,
and processes that were left.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil

MARK = "PRISM_RAY_STOPPED_RUN"
"""Environment variable by which the processes of one run are found, also those that lost their parent."""


def marked(value: str) -> list[psutil.Process]:
    """Processes that inherited the mark of one run."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == value and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def answers_sigterm(pid: int) -> bool:
    """Whether a process has come so far that its handlers are in place."""
    (mask,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt:")]
    return bool(int(mask.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def stopped_run(command: list[str], delay_s: float, number: signal.Signals) -> dict[str, object]:
    """Start a run, signal it `delay_s` seconds after it could answer, and see how it ends."""
    mark = uuid.uuid4().hex
    environment = os.environ | {MARK: mark}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        while not answers_sigterm(process.pid):
            time.sleep(0.001)
        try:
            process.wait(delay_s)
        except subprocess.TimeoutExpired:
            started = time.monotonic()
            process.send_signal(number)
            out, err = process.communicate(timeout=60)
            seconds = time.monotonic() - started
        else:
            out, err = process.communicate()
            if process.returncode:
                raise SystemExit(f"a run failed before its signal came: exit {process.returncode}, {err}")
            return {"delay_s": round(delay_s, 2), "exit": process.returncode, "over_before": True}
    left_s = time.monotonic()
    while marked(mark) and time.monotonic() - left_s < 20:
        time.sleep(0.1)
    stage = next((line for line in reversed(out.splitlines()) if line.startswith("[")), "")
    return {
        "signal": number.name,
        "delay_s": round(delay_s, 2),
        "exit": process.returncode,
        "seconds": round(seconds, 2),
        "left_s": round(time.monotonic() - left_s, 1),
        "left": [process.name() for process in marked(mark)],
        "stage": stage,
        "err": err.splitlines(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--storage", type=Path, required=True)
    parser.add_argument(
        "--longest", type=float, default=15.0, help="seconds; signals come at up to this after the start"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", default=[])
    options = parser.parse_args()
    chosen = random.Random(options.seed)
    overrides = options.overrides or ["recipe=digits_smoke", "compute=ray"]
    results: list[dict[str, object]] = []
    storage = 0
    while len(results) < options.times:
        command = [sys.executable, "-m", "prism_ray", "run", *overrides, f"storage={options.storage}/{storage}"]
        number = chosen.choice([signal.SIGTERM, signal.SIGTERM, signal.SIGINT])
        result = stopped_run(command, chosen.uniform(0, options.longest), number)
        print(json.dumps(result), flush=True)
        if "over_before" in result:
            storage += 1
        else:
            results.append(result)
    wanted = {"SIGTERM": 75, "SIGINT": 130}
    summary = {
        "signals": len(results),
        "as_wanted": sum(r["exit"] == wanted[str(r["signal"])] for r in results),
        "one_line": sum(len(list(r["err"])) == 1 for r in results),  # type: ignore[call-overload]
        "longest_s": max(float(str(r["seconds"])) for r in results),
        "left": sum(bool(r["left"]) for r in results),
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
