"""Inject every kind of fault into small runs and compare what they end with to undisturbed ones.

    python benchmarks/faults.py [KIND ...] [--folder DIR]

Without kinds: all of them, one after another. The figures of each kind replace its former ones in
`benchmarks/results/faults.json`, and `faults.md` is written from all of them. Exit code 1 if any kind had a problem.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests/faults"), str(ROOT / "tests")]

import kinds  # noqa: E402
from product import Tally  # noqa: E402

RESULTS = ROOT / "benchmarks/results/faults.json"

KINDS: dict[str, Callable[[kinds.Lab], Tally]] = {
    "driver": lambda lab: kinds.driver_killed(lab, kills=25, seed=1),
    "cycles": lambda lab: kinds.killed_again_and_again(lab, cycles=50, seed=2),
    "points": lambda lab: kinds.crashed_at(lab, list(kinds.CRASH_POINTS)),
    "anywhere": lambda lab: kinds.crashed_anywhere(lab, crashes=30, seed=3),
    "full": lambda lab: kinds.disk_full_anywhere(lab, times=15, seed=4),
    "eio": lambda lab: kinds.write_error_anywhere(lab, times=15, seed=5),
    "tmpfs": lambda lab: kinds.disk_full(lab, sizes_kb=[40, 120, 240, 400]),
    "sigterm": lambda lab: kinds.signalled(lab, number=signal.SIGTERM, times=10, seed=6),
    "sigint": lambda lab: kinds.signalled(lab, number=signal.SIGINT, times=10, seed=7),
    "drivers": lambda lab: kinds.two_drivers(lab, times=6),
    "settings": kinds.changed_settings,
    **{
        f"damage-{kind.split()[0]}": lambda lab, kind=kind: kinds.damaged(lab, kind=kind, shards=10, seed=8)
        for kind in (*kinds.DAMAGE, "swapped")
    },
    "poison-inline": lambda lab: kinds.poison(lab, what=kinds.IMAGE_POISON, on_ray=False),
    "poison-labels": lambda lab: kinds.poison(lab, what=kinds.LABEL_POISON, stage="relabel", on_ray=False),
    "hang-inline": lambda lab: kinds.hanging_inline(lab, what="hang"),
    "spin-inline": lambda lab: kinds.hanging_inline(lab, what="spin"),
    "poison-ray": lambda lab: kinds.poison(
        lab,
        what=["raise", "segfault", "hang", "exit", "lost_row", "oom", "spin"],
        timeout_s=30,
        on_ray=True,
        limit_s=1800,
    ),
    "poison-labels-ray": lambda lab: kinds.poison(
        lab,
        what=["raise", "segfault", "hang", "exit", "lost_column"],
        stage="relabel",
        timeout_s=30,
        on_ray=True,
        limit_s=1800,
    ),
    "ray-workers": lambda lab: kinds.workers_killed(lab, kills=20, seed=9),
    "ray-driver": lambda lab: kinds.ray_part_killed(lab, part="driver", kills=5, seed=10),
    "ray-group": lambda lab: kinds.ray_part_killed(lab, part="whole process group", kills=5, seed=11),
    "ray-raylet": lambda lab: kinds.ray_part_killed(lab, part="raylet", kills=3, seed=12),
    "ray-head": lambda lab: kinds.ray_part_killed(lab, part="head (GCS)", kills=3, seed=13),
    "ray-sigterm": lambda lab: kinds.ray_signalled(lab, number=signal.SIGTERM, times=3, seed=14),
    "ray-sigint": lambda lab: kinds.ray_signalled(lab, number=signal.SIGINT, times=3, seed=15),
    "slow-worker": kinds.slow_worker,
    "gpus": kinds.too_many_gpus,
    "places": lambda lab: kinds.odd_places(lab, names=list(kinds.PLACES)),
    "places-ray": lambda lab: kinds.odd_places(
        lab, names=["spaces in the path", "Unicode in the path, C locale"], executor=kinds.ON_RAY
    ),
    "clock": lambda lab: kinds.clock_jumps(lab, jumps=[3600, -3600, 10 * 365 * 86400, -86400 * 40]),
    "orders": lambda lab: kinds.orders(lab, shuffles=3),
    "s3": lambda lab: kinds.object_store_faults(lab, seeds=range(3)),
    "s3-driver": lambda lab: kinds.object_store_kills(lab, kills=5, seed=16),
    "soak": lambda lab: kinds.soak(lab, units=2000, on_ray=False),
    "soak-ray": lambda lab: kinds.soak(lab, units=2000, on_ray=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)}")
    parser.add_argument("--folder", type=Path, help="where runs are kept; a temporary folder otherwise")
    options = parser.parse_args()
    unknown = set(options.kinds) - set(KINDS)
    if unknown:
        parser.error(f"unknown kinds {', '.join(sorted(unknown))}; known: {', '.join(KINDS)}")
    with tempfile.TemporaryDirectory(prefix="faults-") as temporary:
        lab = kinds.Lab(Path(options.folder or temporary))
        failed = [name for name in options.kinds or KINDS if not run_kind(lab, name)]
    if failed:
        sys.exit(f"problems in {', '.join(failed)}; see {RESULTS}")


def run_kind(lab: kinds.Lab, name: str) -> bool:
    """Run a kind and put its figures in the results; whether it held."""
    started = time.monotonic()
    try:
        tally = KINDS[name](lab)
    except AssertionError as error:
        tally = Tally(name, problems=[str(error)])
    figures: dict[str, Any] = asdict(tally) | {"seconds": round(time.monotonic() - started, 1)}
    figures |= {"passed": tally.is_passed, "commit": commit()}
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[name] = figures
    ordered = {kind: results[kind] for kind in KINDS if kind in results}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(ordered, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(table(ordered))
    print(
        f"{name}: {'held' if tally.is_passed else 'PROBLEMS'}, {tally.faults} faults, {figures['seconds']} s",
        flush=True,
    )
    for problem in tally.problems:
        print(f"  {problem}", flush=True)
    return tally.is_passed


def commit() -> str:
    """What the figures are of; with a plus if files were changed since."""
    command = ["git", "describe", "--always", "--exclude=*", "--dirty=+"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return done.stdout.strip() or "unknown"


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results as a page."""
    head = ["kind", "executor", "faults", "runs", "rows expected", "found", "doubled", "lost", "equal", "recomputed"]
    lines = ["# Faults", "", "Written by `benchmarks/faults.py`.", ""]
    lines += [" | ".join(["", *head, "recovery, s", ""]).strip(), "|---" * (len(head) + 1) + "|"]
    numbers = (
        "faults",
        "runs",
        "rows_expected",
        "rows_found",
        "duplicates",
        "lost",
        "compared",
        "identical",
        "recomputed",
    )
    sums = {number: sum(figures[number] for figures in results.values()) for number in numbers}
    for figures in (*results.values(), {"kind": "**all**", "executor": "", "recover_s": [], **sums}):
        recovered = figures["recover_s"]
        cells = [
            figures["kind"],
            figures["executor"],
            *(figures[number] for number in numbers[:6]),
            f"{figures['identical']} of {figures['compared']}",
            figures["recomputed"],
            f"{median(recovered):.1f} (at most {max(recovered):.1f})" if recovered else "",
        ]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    lines += [
        "",
        "Rows: of images and labels, summed over all runs that were compared. Equal: final states whose shards and "
        "students have the sha256, and whose manifest has the content, of the undisturbed run. Recomputed: units begun "
        "more often than once. Recovery: from a kill to the next published unit, the command's new start included.",
        "",
        "## Figures",
        "",
    ]
    for figures in results.values():
        if figures["figures"] or figures["notes"] or figures["problems"]:
            lines.append(f"- **{figures['kind']}** ({figures['executor']}): {json.dumps(figures['figures'])}")
            lines += [f"  - {text}" for text in (*figures["notes"], *(f"PROBLEM: {p}" for p in figures["problems"]))]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
