"""The report's figures as inline SVG that takes its colors and font from the page, so that it follows light and dark.

matplotlib draws with stand-in colors; in the SVG they are replaced by the page's CSS variables. The same numbers give
the same bytes: no date, no random ids.
"""

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from prism_ray.report.comparison import one_per_image_set
from prism_ray.report.contents import KINDS, RunSummary
from prism_ray.report.format import Spread, format_bytes, is_measured, spread
from prism_ray.report.ranking import RowScores

INK, MUTED, GRID, PAPER = "#010101", "#020202", "#030303", "#040404"
SOFT, HARD, PLAIN = "#050505", "#060606", "#070707"
SERIES = ("#0a0a0a", "#0b0b0b", "#0c0c0c", "#0d0d0d", "#0e0e0e", "#0f0f0f")
KIND_COLORS: dict[str, str] = dict(zip(KINDS, (SOFT, HARD, PLAIN), strict=True))
VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--line", PAPER: "--card"}
VARIABLES |= {SOFT: "--soft", HARD: "--hard", PLAIN: "--plain"}
VARIABLES |= {color: f"--series-{index}" for index, color in enumerate(SERIES)}
"""Stand-in color to CSS variable. None of them is black, which SVG writers leave out as the default."""

WIDTH_IN = 4.0  # 384 CSS pixels: three side by side, or one on a phone, with text at about its size
MAX_LABEL = 18  # characters of a run's name on an axis
MAX_LEGEND = 30  # of the names in one line of the legend
MARKERS = ("o", "s", "^", "D", "v", "P")
MIN_SIZE_RATIO = 1.5  # of label sizes that differ on purpose; compression alone makes them differ by less

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
    """Top-1 of the students of each label kind: bar and whisker for mean and deviation, a dot for each."""
    kinds = [kind for kind in KINDS if any(summary.accuracies(kind) for summary in summaries)]
    if not kinds:
        return None
    with mpl.rc_context(STYLE):
        figure, axes = row_figure(len(summaries), row_in=0.2 * len(kinds) + 0.18)
        height = 0.8 / len(kinds)
        for number, kind in enumerate(kinds):
            color, offset = KIND_COLORS[kind], height * (number - (len(kinds) - 1) / 2)
            for row, summary in enumerate(summaries):
                values = [100 * top1 for top1 in summary.accuracies(kind).values()]
                _accuracy_bar(axes, row + offset, values, color, height=0.9 * height)
            axes.barh([0], [0], color=color, label=f"{kind} labels")  # legend entry, also if the first run has none
        chance = 100 / len(summaries[0].dataset.class_names)
        axes.axvline(chance, color=MUTED, linewidth=1, linestyle=(0, (2, 2)), label="chance")
        axes.set_xlim(0, 113)  # room for the number behind a full bar
        axes.set_xticks(range(0, 101, 20))
        measured_on = "test" if summaries[0].split == "test" else "validation"
        axes.set_xlabel(f"top-1 on the real {measured_on} images, %")
        name_rows(axes, summaries, has_columns=True)
        return svg_of(figure, "accuracy", f"Top-1 of each run's students with {' and '.join(kinds)} labels")


def _accuracy_bar(axes: Axes, y: float, values: Sequence[float], color: str, *, height: float) -> None:
    measured = spread(values)
    if measured is None:
        return
    axes.barh(y, measured.mean, height=height, color=color, alpha=0.55, linewidth=0)
    if measured.std is not None:
        axes.errorbar(
            measured.mean,
            y,
            xerr=measured.std,
            fmt="none",
            color=INK,
            ecolor=INK,
            elinewidth=1.2,
            capsize=2.5,
            zorder=4,
        )
    axes.scatter(values, [y] * len(values), s=16, color=color, edgecolors=PAPER, linewidths=0.8, zorder=3)
    axes.text(
        max(*values, measured.mean + (measured.std or 0.0)) + 2.5, y, f"{measured.mean:.1f}", va="center", fontsize=8.5
    )


def storage_plot(summaries: Sequence[RunSummary]) -> str | None:
    """Top-1 with soft labels over the stored bytes of an image's labels. None unless rows differ in that size."""
    points = []
    for summary in summaries:
        measured = spread(summary.accuracies("soft").values())
        if measured and summary.label_bytes and summary.num_images:
            points.append((summary, summary.label_bytes / summary.num_images, measured))
    sizes = [size for _, size, _ in points]
    if not sizes or max(sizes) < MIN_SIZE_RATIO * min(sizes):
        return None
    with mpl.rc_context(STYLE):
        figure, axes = _scatter(points)
        axes.xaxis.set_major_formatter(lambda value, _: format_bytes(round(value)))
        axes.set_xlabel("stored labels of one image (log)")
        axes.set_ylabel("top-1 with soft labels, %")
        return svg_of(figure, "storage", "Top-1 with soft labels over the stored bytes of the labels of one image")


def cost_plot(summaries: Sequence[RunSummary]) -> str | None:
    """Top-1, soft labels before hard, over the device-seconds of images and labels. None for fewer than two rows."""
    points = []
    for summary in summaries:
        measured = spread(summary.accuracies("soft").values()) or spread(summary.accuracies("hard").values())
        seconds = (summary.synthesis_s or 0.0) + (summary.label_s or 0.0)
        if measured and seconds:
            points.append((summary, seconds, measured))
    if len(points) < 2:
        return None
    with mpl.rc_context(STYLE):
        figure, axes = _scatter(points)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} s")
        axes.set_xlabel("device time of images and labels (log)")
        axes.set_ylabel("top-1, %")
        return svg_of(figure, "cost", "Top-1 over the device-seconds of images and labels")


def _scatter(points: Sequence[tuple[RunSummary, float, Spread]]) -> tuple[Figure, Axes]:
    """Accuracies over some cost of each row, with their deviation; told apart by shape and by color."""
    figure = new_figure(2.9 + 0.1 * len(points))
    axes = figure.subplots()
    for number, (summary, cost, measured) in enumerate(points):
        axes.errorbar(
            cost,
            100 * measured.mean,
            yerr=None if measured.std is None else 100 * measured.std,
            # Shape and color go round together, and shape once more, so that any two rows differ.
            fmt=MARKERS[(number + number // len(SERIES)) % len(MARKERS)],
            color=SERIES[number % len(SERIES)],
            markersize=6,
            elinewidth=1.5,
            markeredgecolor=PAPER,
            label=shortened(summary.name),
        )
    axes.set_xscale("log")
    costs = [cost for _, cost, _ in points]
    # Of less than a decade and a half, powers of ten alone could leave the axis without a number.
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(costs) < 30 * min(costs) else (1,)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.1, y=0.15)
    axes.tick_params(axis="y", labelcolor=MUTED)
    add_legend(axes)
    return figure, axes


def difference_plot(scores: Sequence[RowScores], baseline: str | None) -> str | None:
    """Each row's difference to the baseline, paired by seed, with its deviation. None without any."""
    kinds = [kind for kind in KINDS if any(kind in row.differences for row in scores)]
    rows = [row for row in scores if row.differences]
    if not rows:
        return None
    with mpl.rc_context(STYLE):
        figure, axes = row_figure(len(rows), row_in=0.16 * len(kinds) + 0.18)
        for number, kind in enumerate(kinds):
            offset = 0.7 / len(kinds) * (number - (len(kinds) - 1) / 2)
            for place, row in enumerate(rows):
                if (found := row.differences.get(kind)) is not None:
                    error = None if found.std is None else 100 * found.std
                    style = {"color": KIND_COLORS[kind], "markersize": 6, "elinewidth": 1.5, "markeredgecolor": PAPER}
                    axes.errorbar(100 * found.mean, place + offset, xerr=error, fmt=MARKERS[number], **style)
            axes.plot([], [], MARKERS[number], color=KIND_COLORS[kind], label=f"{kind} labels")
        axes.axvline(0, color=MUTED, linewidth=1, linestyle=(0, (2, 2)))
        axes.set_xlabel(f"difference to {shortened(baseline or '')}, points", parse_math=False)
        name_row_labels(axes, [shortened(row.name) for row in rows])
        return svg_of(figure, "differences", "Differences of top-1 to the baseline, paired by seed")


def cosine_plot(summaries: Sequence[RunSummary]) -> str | None:
    """Intra-class cosine of each run, ± over classes, beside that of as many real images. None without a value."""
    summaries = one_per_image_set(summaries)
    if not any(is_measured(summary.cosine.mean) for summary in summaries):
        return None
    with mpl.rc_context(STYLE):
        figure, axes = row_figure(len(summaries), row_in=0.46)
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
        name_rows(axes, summaries)
        return svg_of(figure, "cosine", "Cosine similarity within classes, synthetic and real")


def energy_plot(summaries: Sequence[RunSummary]) -> str | None:
    """Histograms of the first teacher's energies, a row for each set of images. None without any."""
    found = [(s.label, s.energies[0]) for s in one_per_image_set(summaries) if s.energies]
    if not found:
        return None
    with mpl.rc_context(STYLE):
        figure = new_figure(0.6 + 0.62 * len(found))
        panels = figure.subplots(len(found), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (label, energies) in zip(panels, found, strict=True):
            axes.stairs(energies.real_shares, energies.edges, fill=True, color=MUTED, alpha=0.35)
            axes.stairs(energies.shares, energies.edges, fill=True, color=SOFT, alpha=0.6)
            axes.set_ylabel(shortened(label), rotation=0, ha="right", va="center", parse_math=False)
            axes.set_yticks([])
            axes.spines["left"].set_visible(False)
        panels[-1].set_xlabel(f"free energy in {found[0][1].teacher}")
        return svg_of(figure, "energies", "Histograms of energies, synthetic and real")


def is_sampled(summary: RunSummary) -> bool:
    """Whether a run's images were sampled from a generator."""
    method = summary.config.get("method")
    return isinstance(method, dict) and method.get("engine") == "diffusion"


def loss_plot(summaries: Sequence[RunSummary]) -> str | None:
    """Loss terms of each unit at its last iteration, in plan order. None where no run has any."""
    curves = [
        (s.label, s.loss_curve)
        for s in one_per_image_set(summaries)
        if any(is_measured(u.ce) or is_measured(u.bn) for u in s.loss_curve)
    ]
    if not curves:
        return None

    def draw(axes: Axes, term: int) -> None:
        for number, (label, units) in enumerate(curves):
            values = np.array([(unit.ce, unit.bn)[term] for unit in units], dtype=float)  # None becomes NaN: a gap
            axes.plot(
                np.arange(len(values)),
                values,
                color=SERIES[number % len(SERIES)],
                linewidth=1.4,
                marker="o" if len(values) <= 40 else None,
                markersize=3,
                label=shortened(label),
            )

    with mpl.rc_context(STYLE):
        figure = new_figure(3.4 + 0.1 * len(curves))
        draw_loss_terms(figure, draw, across="unit, in plan order")
        return svg_of(figure, "losses", "Loss terms of every unit at its last iteration")


def draw_loss_terms(figure: Figure, draw: Callable[[Axes, int], None], *, across: str) -> None:
    """Two panels over one axis: `draw` is called with those of the cross-entropy (0) and of the statistics term (1)."""
    panels = figure.subplots(2, 1, sharex=True, gridspec_kw={"hspace": 0.12})
    for term, (axes, name) in enumerate(zip(panels, ("cross-entropy", "statistics term"), strict=True)):
        draw(axes, term)
        axes.set_ylabel(scaled(axes, name))
        axes.tick_params(axis="y", labelcolor=MUTED)
    panels[-1].set_xlabel(across)
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    add_legend(panels[0])


def scaled(axes: Axes, name: str) -> str:
    """A logarithmic axis where the values span more than a factor of 50; the axis label says so."""
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.get_lines()])
    values = values[np.isfinite(values)]
    if len(values) and values.min() > 0 and values.max() / values.min() > 50:
        axes.set_yscale("log")
        return f"{name} (log)"
    axes.set_ylim(bottom=min(0.0, values.min() if len(values) else 0.0))
    return name


def new_figure(height_in: float) -> Figure:
    figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
    FigureCanvasSVG(figure)
    return figure


def row_figure(num_rows: int, *, row_in: float) -> tuple[Figure, Axes]:
    figure = new_figure(0.95 + row_in * num_rows)
    return figure, figure.subplots()


def name_rows(axes: Axes, summaries: Sequence[RunSummary], *, has_columns: bool = False) -> None:
    """One row per run, the first on top; its column on a second line."""
    names = [[s.label, s.column] if has_columns and s.column is not None else [s.label] for s in summaries]
    name_row_labels(axes, ["\n".join(shortened(part) for part in name) for name in names])


def name_row_labels(axes: Axes, labels: Sequence[str]) -> None:
    """One name per row, the first on top, and the legend."""
    axes.set_yticks(range(len(labels)), labels, parse_math=False)
    axes.set_ylim(len(labels) - 0.45, -0.55)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    add_legend(axes)


def add_legend(axes: Axes) -> None:
    labels = axes.get_legend_handles_labels()[1]
    fits = len(labels) <= 3 and sum(map(len, labels)) <= MAX_LEGEND  # in one line beside the names of rows
    # Entries that carry a run's name must not be read as formulas.
    legend = axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=3 if fits else 2,
        borderpad=0,
        handlelength=1.2,
        columnspacing=1.2,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def shortened(label: str) -> str:
    return label if len(label) <= MAX_LABEL else f"{label[: MAX_LABEL - 1]}…"


def svg_of(figure: Figure, name: str, description: str) -> str:
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
