"""Progress of a run on a stream: a live panel on a terminal, a plain line every few seconds anywhere else."""

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from types import TracebackType
from typing import Self, TextIO

import psutil
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from prism_ray.errors import printable

SAME_AGAIN_S = 30.0
"""How long nothing new is not worth a line."""
ROUGH_BELOW = 3
"""Finished pieces of work below which an estimate of what is left is marked as rough."""
MAX_TRENDS = 2
"""Trends that are shown: those heard of last."""
MAX_TREND = 10_000
"""Values of a trend that are kept: the last ones."""
MAX_NAME = 30  # characters of a trend's name: the last ones, which say what it is
BARS, ASCII_BARS = "▁▂▃▄▅▆▇█", "_.-=+*#@"


@dataclass(frozen=True)
class StageState:
    """One stage at one moment. Immutable, so that the panel's refresh thread never sees half an update."""

    name: str
    total: int
    unit: str
    started_s: float  # on the progress clock
    initial_done: int  # finished by an earlier run of the same command, so no part of the speed
    initial_images: int
    done: int
    images: int | None = None
    quarantined: int | None = None
    note: str = ""
    working_s: float | None = None  # when work could begin, processes and models being there; None: at the start
    advanced_s: float | None = None  # when something was last finished; None: just now
    work_done: float = 0.0  # by this command, where pieces differ in cost
    work_left: float | None = None  # None: pieces count alike
    device: str = ""  # of the worker heard of last
    memory_bytes: int = 0  # largest resident size of any worker heard of
    device_memory_bytes: int = 0  # the same of its GPU
    trends: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # by name, a value for each finished piece

    def images_per_s(self, now_s: float) -> float | None:
        """Average since work began; None before the first image of this process."""
        elapsed_s = now_s - self._begun_s
        if self.images is None or self.images <= self.initial_images or elapsed_s <= 0:
            return None
        return (self.images - self.initial_images) / elapsed_s

    @property
    def _begun_s(self) -> float:
        return self.started_s if self.working_s is None else self.working_s

    @property
    def finished(self) -> int:
        """Pieces that this command finished."""
        return self.done - self.initial_done

    def eta_s(self, now_s: float) -> float | None:
        """Seconds left at the average speed so far; None before anything was finished.

        Pieces count by their cost where it is known: the expensive ones come first, so that their number would promise
        too little speed. Between two ends of pieces it counts down; once the next is overdue it grows.
        """
        left = self.work_left
        done, left = (self.finished, self._pieces_left()) if left is None else (self.work_done, left)
        begun_s, last_s = self._begun_s, now_s if self.advanced_s is None else self.advanced_s
        if done <= 0 or now_s <= begun_s:
            return None
        waited_s = min(now_s - last_s, (last_s - begun_s) / max(1, self.finished))
        return max(0.0, left * (now_s - begun_s - waited_s) / done - waited_s)

    def _pieces_left(self) -> int:
        return max(0, self.total - self.done - (self.quarantined or 0))

    def eta_text(self, now_s: float) -> str | None:
        """`0:12`, or `~0:12` while it is rough."""
        eta_s = self.eta_s(now_s)
        return None if eta_s is None else f"{'~' if self.finished < ROUGH_BELOW else ''}{format_duration(eta_s)}"

    def counts(self) -> tuple[object, ...]:
        """What is news when it changes; speed and estimate move by themselves."""
        return self.name, self.done, self.images, self.quarantined, self.note

    def line(self, now_s: float, *, final: bool = False) -> str:
        """`[synthesize] 12/40 units, 31.2 images/s, eta 0:12, quarantined 0`; a final line has the time taken."""
        parts = [f"[{self.name}] {self.done}/{self.total} {self.unit}"]
        if (speed := self.images_per_s(now_s)) is not None:
            parts.append(f"{format_speed(speed)} images/s")
        if final:
            parts.append(f"took {format_duration(now_s - self.started_s)}")
        elif (eta := self.eta_text(now_s)) is not None:
            parts.append(f"eta {eta}")
        if self.quarantined is not None:
            parts.append(f"quarantined {self.quarantined}")
        if self.note:
            parts.append(self.note)
        return ", ".join(parts)


class Progress:
    """Stages of a run, fed by the driver; use as a context manager, or call `close`.

    A stream is shown the live panel if it is a terminal that can move its cursor (`TERM` is not `dumb`); `NO_COLOR`
    takes the panel's colors away. Any other stream gets whole lines: one when a stage starts, one when it ends, and in
    between at most one per `interval_s`, while nothing is done one in half a minute.
    """

    def __init__(
        self,
        stream: TextIO,
        *,
        interval_s: float = 2.0,
        teachers: Sequence[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream
        self._interval_s = interval_s
        self._teachers = tuple(teachers)
        self._clock = clock
        self._state: StageState | None = None
        self._written_s = 0.0  # when the last plain line was written
        self._written: tuple[object, ...] = ()  # what it said
        self._live = _live_panel(stream, self._panel) if _is_terminal(stream) else None
        self._live_started = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def stage(self, name: str, total: int, unit: str = "units", *, done: int = 0, images: int = 0) -> None:
        """End the current stage and start the next. `done` and `images` were finished before, by an earlier run."""
        self._end_stage()
        self._state = StageState(
            name=name,
            total=total,
            unit=unit,
            started_s=self._clock(),
            initial_done=done,
            initial_images=images,
            done=done,
            quarantined=0 if unit == "units" else None,
        )
        if self._live is None:
            self._write_state(self._state)
        elif not self._live_started:
            self._live.start(refresh=True)
            self._live_started = True

    def working(self, *, work: float | None = None) -> None:
        """Processes and models are there: speed and estimate count from now on. `work`: cost of all that is left."""
        if self._state is not None:
            self._state = replace(self._state, working_s=self._clock(), work_left=work)

    def observe(
        self,
        *,
        work: float = 0.0,
        is_done: bool = True,
        device: str = "",
        memory_bytes: int = 0,
        device_memory_bytes: int = 0,
        values: Mapping[str, float] | None = None,
    ) -> None:
        """A piece of work has ended: its cost, where it was made, and what is to be followed from piece to piece."""
        if (state := self._state) is None:
            raise RuntimeError("Progress.observe was called before Progress.stage")
        trends = dict(state.trends)
        for name, value in (values or {}).items():
            trends[name] = (*trends.pop(name, ()), value)[-MAX_TREND:]  # the last heard of is the last
        self._state = replace(
            state,
            work_done=state.work_done + (work if is_done else 0.0),
            work_left=None if state.work_left is None else max(0.0, state.work_left - work),
            device=printable(device) or state.device,
            memory_bytes=max(memory_bytes, state.memory_bytes),
            device_memory_bytes=max(device_memory_bytes, state.device_memory_bytes),
            trends=trends,
        )

    def update(
        self, done: int, *, images: int | None = None, quarantined: int | None = None, note: str | None = None
    ) -> None:
        """The stage so far, as totals that include earlier runs; what is None stays as it was.

        `done` counts what finished well; a quarantined unit is counted in `quarantined` alone.
        """
        if self._state is None:
            raise RuntimeError("Progress.update was called before Progress.stage")
        self._state = replace(
            self._state,
            advanced_s=self._clock() if done > self._state.done else self._state.advanced_s,
            done=done,
            images=self._state.images if images is None else images,
            quarantined=self._state.quarantined if quarantined is None else quarantined,
            note=self._state.note if note is None else printable(" ".join(note.split())),
        )
        if self._live is None and self._clock() - self._written_s >= self._interval_s:
            is_news = self._state.counts() != self._written
            if is_news or self._clock() - self._written_s >= SAME_AGAIN_S:
                self._write_state(self._state)

    def message(self, text: str) -> None:
        """Show a text at once, above the panel or as lines of its own."""
        lines = printable("\n".join(text.splitlines()))  # also takes carriage returns away
        if self._live is not None and self._live_started:
            self._live.console.print(Text(lines))
        else:
            self._write(lines)

    def close(self) -> None:
        """End the current stage and give the terminal back. Safe to call twice."""
        self._end_stage()
        if self._live is not None and self._live_started:
            self._live.stop()
            self._live_started = False

    def _end_stage(self) -> None:
        state, self._state = self._state, None
        if state is None:
            return
        line = state.line(self._clock(), final=True)
        if self._live is None:
            self._write(line)
        else:
            self._live.console.print(Text(line))

    def _write_state(self, state: StageState) -> None:
        self._written_s, self._written = self._clock(), state.counts()
        self._write(state.line(self._written_s))

    def _write(self, line: str) -> None:
        self._stream.write(f"{line}\n")
        self._stream.flush()

    def _panel(self) -> RenderableType:
        state = self._state
        return Text("") if state is None else stage_panel(state, self._clock(), teachers=self._teachers)


def stage_panel(state: StageState, now_s: float, *, teachers: Sequence[str]) -> RenderableType:
    """The live view of a stage."""
    speed, eta = state.images_per_s(now_s), state.eta_text(now_s)
    head = Table.grid(padding=(0, 2), expand=True)
    head.add_column(no_wrap=True)
    head.add_column(ratio=1)
    head.add_column(justify="right", no_wrap=True)
    bar = ProgressBar(total=max(1, state.total), completed=state.done, complete_style="cyan", finished_style="green")
    head.add_row(Text(state.name, style="bold"), bar, f"{state.done}/{state.total} {state.unit}")

    facts = _facts(
        ("images/s", "-" if speed is None else format_speed(speed)),
        ("eta", "-" if eta is None else eta),
        ("elapsed", format_duration(now_s - state.started_s)),
    )
    if state.quarantined is not None:
        style = "bold red" if state.quarantined else ""
        facts.append("quarantined ", style="dim").append(str(state.quarantined), style=style)

    rows: list[RenderableType] = [head, Line(facts), Line(_usage(state))]
    rows += [Trend(name, values) for name, values in list(state.trends.items())[-MAX_TRENDS:]]
    if teachers:
        rows.append(Line(Text.assemble(("teachers ", "dim"), ", ".join(teachers))))
    if state.note:
        rows.append(Line(Text(state.note, style="dim")))
    return Panel(Group(*rows), title="prism-ray", title_align="left", border_style="dim")


def _facts(*facts: tuple[str, str]) -> Text:
    text = Text()
    for name, value in facts:
        text.append(f"{name} ", style="dim").append(f"{value}   ")
    return text


def _usage(state: StageState) -> Text:
    """Where the work is done, and how much memory that takes: of this machine, and of the largest worker."""
    memory = psutil.virtual_memory()
    used = f"{format_gb(memory.total - memory.available)} of {format_gb(memory.total)} GB here"
    worker = f", worker {format_gb(state.memory_bytes)} GB" if state.memory_bytes else ""
    worker += f", its GPU {format_gb(state.device_memory_bytes)} GB" if state.device_memory_bytes else ""
    facts = [("memory", f"{used}{worker}")]
    return _facts(*facts, *([("device", state.device)] if state.device else []))


@dataclass(frozen=True)
class Line:
    """A text of one line, cut to the terminal with a mark that its encoding has."""

    text: Text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        text = self.text.copy()
        text.no_wrap = True
        if text.cell_len > options.max_width:
            mark = "." if options.ascii_only else "…"
            text.truncate(options.max_width - 1)
            text.append(mark)
        yield text


@dataclass(frozen=True)
class Trend:
    """`cross-entropy 2.31 ▇▅▄▂▁ 0.012`: the first value, all of them as wide as there is room, the last."""

    name: str
    values: Sequence[float]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        first, last = f"{self.values[0]:.3g}", f"{self.values[-1]:.3g}"
        name = self.name if len(self.name) <= MAX_NAME else self.name[-MAX_NAME:]
        bars = ASCII_BARS if options.ascii_only else BARS
        shown = sparkline(self.values, options.max_width - len(name) - len(first) - len(last) - 3, bars=bars)
        yield from Line(Text.assemble((f"{name} ", "dim"), f"{first} ", (shown, "cyan"), f" {last}")).__rich_console__(
            console, options
        )


def sparkline(values: Sequence[float], width: int, *, bars: str = BARS) -> str:
    """At most `width` characters; equal values are all low. Values that are not finite are left out."""
    shown = [value for value in values if abs(value) < float("inf")]
    if not shown or width < 1:
        return ""
    num = min(width, len(shown))
    ends = [round(n * len(shown) / num) for n in range(num + 1)]
    means = [sum(shown[start:end]) / (end - start) for start, end in pairwise(ends)]
    low, span = min(means), max(means) - min(means)
    return "".join(bars[round((mean - low) / span * (len(bars) - 1)) if span else 0] for mean in means)


def format_duration(seconds: float) -> str:
    """`0:12`, `12:05` or `26:03:00`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def format_speed(per_s: float) -> str:
    """At least three significant digits, without an exponent where one can be avoided: `0.0312`, `31.2`, `3120`."""
    return f"{per_s:.0f}" if per_s >= 100 else f"{per_s:.3g}"


def format_gb(size_bytes: float) -> str:
    """Gigabytes with one digit behind the point; of less than one, two."""
    return f"{size_bytes / 1e9:.{1 if size_bytes >= 1e9 else 2}f}"


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def _live_panel(stream: TextIO, panel: Callable[[], RenderableType]) -> Live:
    # Other writers of the same terminal go above the panel; a stream that leads elsewhere is left alone.
    return Live(
        console=Console(file=stream, force_terminal=True),
        get_renderable=panel,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),
        redirect_stderr=sys.stderr.isatty(),
    )
