"""Wall time, CPU time and peak memory of a command with everything it starts, as one JSON line.

    python benchmarks/cost_of_command.py [--loopback] -- .venv/bin/prism-ray bench suite=digits storage=DIR

Memory is the sum of the proportional set sizes (PSS) of the process tree, so that shared pages count once. CPU time is
that of every process of the tree, as last seen: beside other work it says more than wall time, best with
OMP_WAIT_POLICY=PASSIVE, or threads that wait for each other count too. Both are sampled twice a second. `--loopback`
runs the command in a network namespace that has nothing but the loopback device (needs root).
"""

import argparse
import json
import subprocess
import sys
import time

import psutil

INTERVAL_S = 0.5


def tree_pss(root: psutil.Process) -> int:
    """Bytes of the process and all its descendants; those that end meanwhile count as nothing."""
    total = 0
    for process in [root, *root.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied):
            continue
    return total


def count_cpu(root: psutil.Process, seen: dict[tuple[int, float], float]) -> None:
    """Note the CPU seconds so far of the process and all its descendants, by process id and start."""
    for process in [root, *root.children(recursive=True)]:
        try:
            times = process.cpu_times()
            seen[process.pid, process.create_time()] = times.user + times.system
        except (psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied):
            continue


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loopback", action="store_true")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    command = options.command
    if options.loopback:
        command = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *command]
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=sys.stderr)
    peak, cpu_s = 0, {}
    while process.poll() is None:
        try:
            peak = max(peak, tree_pss(psutil.Process(process.pid)))
            count_cpu(psutil.Process(process.pid), cpu_s)
        except psutil.NoSuchProcess:
            break
        time.sleep(INTERVAL_S)
    result = {
        "exit_code": process.wait(),
        "wall_s": round(time.monotonic() - started, 1),
        "cpu_s": round(sum(cpu_s.values()), 1),
        "peak_pss_gib": round(peak / 2**30, 2),
        "loopback_only": options.loopback,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
