"""The report's figures as inline SVG that takes its colors and font from the page, so that it follows light and dark.

matplotlib draws with stand-in colors; in the SVG they are replaced by the page's CSS variables. The same numbers give
the same bytes: no date, no random ids.
"""

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from prism_ray.report.contents import RunSummary
from prism_ray.report.format import is_measured, spread

INK, MUTED, GRID, PAPER = "#010101", "#020202", "#030303", "#040404"
SOFT, HARD = "#050505", "#060606"
SERIES = ("#0a0a0a", "#0b0b0b", "#0c0c0c", "#0d0d0d", "#0e0e0e", "#0f0f0f")
VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--line", PAPER: "--card", SOFT: "--soft", HARD: "--hard"} | {
    color: f"--series-{index}" for index, color in enumerate(SERIES)
}
"""Stand-in color to CSS variable. None of them is black, which SVG writers leave out as the default."""

WIDTH_IN = 4.0  # 384 CSS pixels: three side by side, or one on a phone, with text at about its size
MAX_LABEL = 18  # characters of a run's name on an axis

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "prism_ray",
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": INK,
    "ytick.major.size": 0,
    "xtick.major.size": 0,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


def accuracy_plot(summaries: Sequence[RunSummary]) -> str | None:
    """Top-1 of soft- and hard-label students: a bar for the mean, a dot for each seed. None without students."""
    if not any(is_measured(student.top1) for summary in summaries for student in summary.students):
        return None
    with mpl.rc_context(STYLE):
        figure, axes = _row_figure(len(summaries), row_in=0.58)
        for offset, kind, color in ((-0.2, "soft", SOFT), (0.2, "hard", HARD)):
            for row, summary in enumerate(summaries):
                values = [100 * s.top1 for s in summary.students if s.labels == kind and s.top1 is not None]
                _accuracy_bar(axes, row + offset, values, color)
            axes.barh([0], [0], color=color, label=f"{kind} labels")  # legend entry, also if the first run has none
        chance = 100 / len(summaries[0].dataset.class_names)
        axes.axvline(chance, color=MUTED, linewidth=1, linestyle=(0, (2, 2)), label="chance")
        axes.set_xlim(0, 108)  # room for the number behind a full bar
        axes.set_xticks(range(0, 101, 20))
        axes.set_xlabel("top-1 on the real test images, %")
        _name_rows(axes, [summary.label for summary in summaries])
        return _svg(figure, "accuracy", "Top-1 of each run's students with soft and hard labels")


def _accuracy_bar(axes: Axes, y: float, values: Sequence[float], color: str) -> None:
    measured = spread(values)
    if measured is None:
        return
    axes.barh(y, measured.mean, height=0.36, color=color, alpha=0.55, linewidth=0)
    axes.scatter(values, [y] * len(values), s=16, color=color, edgecolors=PAPER, linewidths=0.8, zorder=3)
    axes.text(max(*values, measured.mean) + 1.5, y, f"{measured.mean:.1f}", va="center", fontsize=8.5)


def cosine_plot(summaries: Sequence[RunSummary]) -> str | None:
    """Intra-class cosine of each run, ± over classes, beside that of as many real images. None without a value."""
    if not any(is_measured(summary.cosine.mean) for summary in summaries):
        return None
    with mpl.rc_context(STYLE):
        figure, axes = _row_figure(len(summaries), row_in=0.46)
        for row, summary in enumerate(summaries):
            cosine = summary.cosine
            for value, std, color, marker, offset in (
                (cosine.mean, cosine.std, SOFT, "o", -0.12),
                (cosine.real_mean, cosine.real_std, MUTED, "D", 0.12),
            ):
                if is_measured(value):
                    error = std if is_measured(std) else None
                    style = {"color": color, "markersize": 6, "elinewidth": 1.5, "markeredgecolor": PAPER}
                    axes.errorbar(value, row + offset, xerr=error, fmt=marker, **style)
        axes.plot([], [], "o", color=SOFT, label="run's images")
        axes.plot([], [], "D", color=MUTED, label="real images")
        axes.set_xlabel("cosine similarity within a class")
        axes.margins(x=0.1)
        _name_rows(axes, [summary.label for summary in summaries])
        return _svg(figure, "cosine", "Cosine similarity within classes, synthetic and real")


def loss_plot(summaries: Sequence[RunSummary]) -> str | None:
    """Loss terms of each unit at its last iteration, in plan order. None where no run has any."""
    curves = [
        (s.label, s.loss_curve) for s in summaries if any(is_measured(u.ce) or is_measured(u.bn) for u in s.loss_curve)
    ]
    if not curves:
        return None
    with mpl.rc_context(STYLE):
        figure = _figure(3.3)
        panels = figure.subplots(2, 1, sharex=True, gridspec_kw={"hspace": 0.12})
        for axes, term, name in zip(panels, ("ce", "bn"), ("cross-entropy, nats", "statistics term"), strict=True):
            for number, (label, units) in enumerate(curves):
                values = np.array([getattr(unit, term) for unit in units], dtype=float)  # None becomes NaN: a gap
                axes.plot(
                    np.arange(len(values)),
                    values,
                    color=SERIES[number % len(SERIES)],
                    linewidth=1.4,
                    marker="o" if len(values) <= 40 else None,
                    markersize=3,
                    label=_shortened(label),
                )
            axes.set_ylabel(_scaled(axes, name))
            axes.tick_params(axis="y", labelcolor=MUTED)
        panels[-1].set_xlabel("unit, in plan order")
        panels[-1].xaxis.get_major_locator().set_params(integer=True)
        _legend(panels[0])
        return _svg(figure, "losses", "Loss terms of every unit at its last iteration")


def _scaled(axes: Axes, name: str) -> str:
    """A logarithmic axis where the values span more than a factor of 50; the axis label says so."""
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.get_lines()])
    values = values[np.isfinite(values)]
    if len(values) and values.min() > 0 and values.max() / values.min() > 50:
        axes.set_yscale("log")
        return f"{name} (log)"
    axes.set_ylim(bottom=min(0.0, values.min() if len(values) else 0.0))
    return name


def _figure(height_in: float) -> Figure:
    figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
    FigureCanvasSVG(figure)
    return figure


def _row_figure(num_rows: int, *, row_in: float) -> tuple[Figure, Axes]:
    figure = _figure(0.95 + row_in * num_rows)
    return figure, figure.subplots()


def _name_rows(axes: Axes, labels: Sequence[str]) -> None:
    """One row per run, the first on top."""
    axes.set_yticks(range(len(labels)), [_shortened(label) for label in labels], parse_math=False)
    axes.set_ylim(len(labels) - 0.45, -0.55)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    _legend(axes)


def _legend(axes: Axes) -> None:
    # Entries that carry a run's name must not be read as formulas.
    legend = axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderpad=0, handlelength=1.2, columnspacing=1.2
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _shortened(label: str) -> str:
    return label if len(label) <= MAX_LABEL else f"{label[: MAX_LABEL - 1]}…"


def _svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an <svg> element whose ids are unique in the page."""
    sink = io.StringIO()
    figure.savefig(sink, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = sink.getvalue()
    svg = svg[svg.index("<svg") :]
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Written as a shorthand up to matplotlib 3.9 and as single properties after it.
    svg = re.sub(r"(font: (?:\d+ )?[\d.]+px|font-family:) [^;\"]+", r"\1 var(--font)", svg)
    svg = re.sub(r'(\bid="|url\(#|xlink:href="#)', rf"\1{name}-", svg)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{description}" ', 1)
