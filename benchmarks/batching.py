"""CPU time of synthesis over the size of its batches: what a loop over classes costs beside batches across classes.

    python benchmarks/batching.py [--cells digits fashion_mnist] [--pairs 7] [--sizes 1 2 5 10 20 50 100]

A loop over classes has batches of as many images as a class has; a batch across classes has one image of each of as
many classes. One engine, pool, thread and precision (fp32) for all sizes: only the number of images in a batch differs.
In every round each size runs the iterations of a descent, with each set of statistics teachers equally often, which is
how often they are drawn. Before anything is timed, the first cross-entropy of a batch must be, to 1e-5, the mean of
those of its images alone.

Prints a JSON line per cell: milliseconds of CPU time per image and iteration by size (median, least, largest over
interleaved rounds); and `class_wise_over_cross_class`: by the size of the batches across classes (10 where there are
ten classes, 100 where there are hundreds) and by images per class, how much more the loop costs for the same images
and iterations. Ends with 1 if cross-entropies differ. What such images are worth: `prism-ray bench suite=batching`.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read once, when torch is imported: what follows comes after it

from benchmarks.measuring import circumstances, interleaved, print_cells, spread  # noqa: E402
from benchmarks.synthesis_step import Cell, descend, guides_of, load  # noqa: E402

SIZES = (1, 2, 5, 10, 20, 50, 100)
ACROSS = (10, 100)
TOLERANCE = 1e-5


def part(cell: Cell, start: int, stop: int) -> Cell:
    """A batch of some of a cell's images."""
    return replace(cell, initial=cell.initial[start:stop], class_ids=cell.class_ids[start:stop])


def iterations_of(size: int, num_sets: int) -> int:
    """Iterations of a round: each set equally often, and of small batches so many that a call's own cost is lost."""
    return num_sets * max(1, 20 // size)


def alone(cell: Cell, count: int) -> float:
    """Relative difference of a batch's first cross-entropy to the mean of its images' alone."""
    networks, guides = cell.networks, guides_of(cell, (cell.primary,))
    each = [descend(part(cell, n, n + 1), networks, lambda _: guides, 1).loss_ce for n in range(count)]
    return abs(descend(part(cell, 0, count), networks, lambda _: guides, 1).loss_ce / fmean(each) - 1)


def measure(name: str, *, pairs: int, sizes: Sequence[int]) -> dict[str, Any]:
    """All sizes of a cell, interleaved."""
    cell = load(name, max(sizes))
    difference = alone(cell, min(max(sizes), 10))
    networks, sets = cell.networks, [guides_of(cell, chosen) for chosen in cell.sets]
    counts = {size: iterations_of(size, len(sets)) for size in sizes}
    loops = {
        size: partial(descend, part(cell, 0, size), networks, lambda n: sets[n % len(sets)], counts[size])
        for size in sizes
    }
    seconds = interleaved(loops, pairs=pairs)
    ms = {size: [1e3 * total / counts[size] / size for total in seconds[size]] for size in sizes}
    ratios = {
        across: {size: spread([a / b for a, b in zip(ms[size], ms[across], strict=True)]) for size in sizes}
        for across in ACROSS
        if across in sizes
    }
    return {
        "cell": name,
        "pixels": cell.initial.shape[-1],
        "teachers": list(cell.teachers),
        "iterations": counts,
        "ms_per_image_iteration": {size: spread(values) for size, values in ms.items()},
        "class_wise_over_cross_class": {
            across: {ipc: found for ipc, found in own.items() if ipc != across} for across, own in ratios.items()
        },
        "ce_difference": difference,
        **circumstances(pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", default=["digits", "fashion_mnist"])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    options = parser.parse_args()
    measured = partial(measure, pairs=options.pairs, sizes=options.sizes)
    print_cells(options.cells, measured, difference="ce_difference", tolerance=TOLERANCE)


if __name__ == "__main__":
    main()
