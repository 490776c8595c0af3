"""Figures of image sets: where they lie among real images, and how the losses of their units fell."""

from collections.abc import Sequence
from typing import TypeVar

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from prism_ray.report.comparison import one_per_image_set
from prism_ray.report.contents import RunSummary
from prism_ray.report.plots import (
    MUTED,
    SERIES,
    SOFT,
    STYLE,
    WIDTH_IN,
    draw_loss_terms,
    new_figure,
    shortened,
    svg_of,
)

T = TypeVar("T")
MOST_SETS = 12  # planes that are drawn
MOST_DRAWN = 1500  # points of either kind, over all of them
MOST_CURVES = 60  # loss curves, over all runs
NUM_COLUMNS = 2


def plane_plot(summaries: Sequence[RunSummary]) -> str | None:
    """For each set of images, it and real images in the plane in which those vary most. None without any."""
    found = [(s.label, s.plane) for s in one_per_image_set(summaries) if s.plane is not None][:MOST_SETS]
    if not found:
        return None
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        num_columns = min(NUM_COLUMNS, len(found))
        num_rows = -(-len(found) // num_columns)
        side_in = WIDTH_IN / num_columns
        figure = new_figure(0.35 + num_rows * (side_in if num_columns > 1 else 0.75 * side_in))
        panels = figure.subplots(num_rows, num_columns, squeeze=False).flatten()
        for axes, (label, plane) in zip(panels, found, strict=False):
            for points, color, marker, name in (
                (plane.real_points, MUTED, "o", "real"),
                (plane.points, SOFT, "x", "these images"),
            ):
                x, y = np.array(_some(points, MOST_DRAWN // len(found))).T
                fill = {"facecolors": "none"} if marker == "o" else {}
                axes.scatter(x, y, s=9, color=color, marker=marker, linewidths=0.7, alpha=0.8, label=name, **fill)
            axes.set_title(shortened(label), fontsize=9, loc="left", parse_math=False)
            axes.xaxis.set_major_locator(NullLocator())
            axes.yaxis.set_major_locator(NullLocator())
            first, second = (f"{100 * share:.0f} %" for share in [*plane.shares, 0.0][:2])
            axes.set_xlabel(f"axis 1: {first}", fontsize=8)
            axes.set_ylabel(f"axis 2: {second}", fontsize=8)
        for axes in panels[len(found) :]:
            axes.set_visible(False)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=2, borderpad=0, handlelength=1.2)
        return svg_of(figure, "plane", "Images and held-out real ones in the plane in which the real ones vary most")


def curve_plot(summaries: Sequence[RunSummary]) -> str | None:
    """Loss terms of single units over their iterations, a line for each. None where no run has any."""
    runs = [
        (s.label, [unit.history for unit in s.loss_curve if len(unit.history) > 1])
        for s in one_per_image_set(summaries)
    ]
    runs = [(label, histories) for label, histories in runs if histories]
    if not runs:
        return None

    def draw(axes: Axes, term: int) -> None:
        for number, (label, histories) in enumerate(runs):
            for place, history in enumerate(_some(histories, max(1, MOST_CURVES // len(runs)))):
                x, y = np.array([[point[0], point[1 + term]] for point in history], dtype=float).T
                axes.plot(
                    x,
                    y,
                    color=SERIES[number % len(SERIES)],
                    # Colors alone do not tell more than one run apart for everybody.
                    linestyle=("-", "--", ":", "-.")[number % 4],
                    linewidth=0.9,
                    alpha=0.75,
                    label=shortened(label) if place == 0 else None,
                )

    with mpl.rc_context(STYLE):
        figure = new_figure(3.4 + 0.1 * len(runs))
        draw_loss_terms(figure, draw, across="iteration")
        return svg_of(figure, "curves", "Loss terms of units over their iterations")


def _some(values: Sequence[T], most: int) -> list[T]:
    """At most so many, evenly chosen, the first and the last among them."""
    places = np.unique(np.linspace(0, len(values) - 1, min(len(values), max(most, 2))).round().astype(int))
    return [values[place] for place in places]
