"""Progress of a run on a stream: a live panel on a terminal, a plain line every few seconds anywhere else."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from prism_ray.errors import printable

SAME_AGAIN_S = 30.0
"""How long nothing new is not worth a line."""


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

    def images_per_s(self, now_s: float) -> float | None:
        """Average since the stage started; None before the first image of this process."""
        elapsed_s = now_s - self.started_s
        if self.images is None or self.images <= self.initial_images or elapsed_s <= 0:
            return None
        return (self.images - self.initial_images) / elapsed_s

    def eta_s(self, now_s: float) -> float | None:
        """Seconds left at the average speed so far (units differ in length, so a recent window would mislead)."""
        finished = self.done - self.initial_done
        elapsed_s = now_s - self.started_s
        if finished <= 0 or elapsed_s <= 0:
            return None
        return max(0, self.total - self.done - (self.quarantined or 0)) * elapsed_s / finished

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
        elif (eta_s := self.eta_s(now_s)) is not None:
            parts.append(f"eta {format_duration(eta_s)}")
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
    speed, eta_s = state.images_per_s(now_s), state.eta_s(now_s)
    head = Table.grid(padding=(0, 2), expand=True)
    head.add_column(no_wrap=True)
    head.add_column(ratio=1)
    head.add_column(justify="right", no_wrap=True)
    bar = ProgressBar(total=max(1, state.total), completed=state.done, complete_style="cyan", finished_style="green")
    head.add_row(Text(state.name, style="bold"), bar, f"{state.done}/{state.total} {state.unit}")

    facts = Text()
    for name, value in (
        ("images/s", "-" if speed is None else format_speed(speed)),
        ("eta", "-" if eta_s is None else format_duration(eta_s)),
        ("elapsed", format_duration(now_s - state.started_s)),
    ):
        facts.append(f"{name} ", style="dim").append(f"{value}   ")
    if state.quarantined is not None:
        style = "bold red" if state.quarantined else ""
        facts.append("quarantined ", style="dim").append(str(state.quarantined), style=style)

    rows: list[RenderableType] = [head, facts]
    if teachers:
        rows.append(Text.assemble(("teachers ", "dim"), ", ".join(teachers), overflow="ellipsis", no_wrap=True))
    if state.note:
        rows.append(Text(state.note, style="dim", overflow="ellipsis", no_wrap=True))
    return Panel(Group(*rows), title="prism-ray", title_align="left", border_style="dim")


def format_duration(seconds: float) -> str:
    """`0:12`, `12:05` or `26:03:00`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def format_speed(per_s: float) -> str:
    """At least three significant digits, without an exponent where one can be avoided: `0.0312`, `31.2`, `3120`."""
    return f"{per_s:.0f}" if per_s >= 100 else f"{per_s:.3g}"


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
