"""Progress: what a terminal and a log file get to see."""

import contextlib
import io
import os
import pty
import re
from collections.abc import Callable
from typing import TextIO

import pytest
from rich.console import Console

from prism_ray.progress import Progress, StageState, format_duration, format_speed, sparkline, stage_panel


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def plain(clock: Clock) -> tuple[io.StringIO, Progress]:
    stream = io.StringIO()
    return stream, Progress(stream, interval_s=2.0, clock=clock)


def test_the_first_line_is_written_when_the_stage_starts(plain: tuple[io.StringIO, Progress]) -> None:
    stream, progress = plain
    progress.stage("synthesize", 40)
    assert stream.getvalue() == "[synthesize] 0/40 units, quarantined 0\n"


def test_a_line_has_units_speed_eta_and_quarantine_count(plain: tuple[io.StringIO, Progress], clock: Clock) -> None:
    stream, progress = plain
    progress.stage("synthesize", 40)
    clock.now_s += 10
    progress.update(20, images=312, quarantined=0)
    assert stream.getvalue().splitlines()[-1] == "[synthesize] 20/40 units, 31.2 images/s, eta 0:10, quarantined 0"


def test_there_is_never_more_than_one_line_per_interval(plain: tuple[io.StringIO, Progress], clock: Clock) -> None:
    stream, progress = plain
    progress.stage("synthesize", 1000)
    for done in range(1, 101):  # 10 s in steps of 0.1 s
        clock.now_s += 0.1
        progress.update(done, images=done)
    lines = stream.getvalue().splitlines()
    assert 5 <= len(lines) <= 6  # the first and one per 2 s


def test_a_line_that_says_nothing_new_is_repeated_only_as_a_sign_of_life(
    plain: tuple[io.StringIO, Progress], clock: Clock
) -> None:
    stream, progress = plain
    progress.stage("teach", 2, "networks")
    for _ in range(35):
        clock.now_s += 1.0
        progress.update(0)
    assert stream.getvalue().splitlines() == ["[teach] 0/2 networks"] * 2


def test_the_final_line_is_written_within_the_interval_and_once(
    plain: tuple[io.StringIO, Progress], clock: Clock
) -> None:
    stream, progress = plain
    with progress:
        progress.stage("synthesize", 2)
        clock.now_s += 0.5
        progress.update(2, images=20)
    progress.close()
    assert stream.getvalue().splitlines() == [
        "[synthesize] 0/2 units, quarantined 0",
        "[synthesize] 2/2 units, 40 images/s, took 0:00, quarantined 0",
    ]


def test_a_stage_that_fails_still_shows_how_far_it_came(plain: tuple[io.StringIO, Progress], clock: Clock) -> None:
    stream, progress = plain
    with contextlib.suppress(ValueError), progress:
        progress.stage("synthesize", 8)
        clock.now_s += 1
        progress.update(3)
        raise ValueError
    assert stream.getvalue().splitlines()[-1] == "[synthesize] 3/8 units, took 0:01, quarantined 0"


def test_the_next_stage_ends_the_one_before(plain: tuple[io.StringIO, Progress], clock: Clock) -> None:
    stream, progress = plain
    progress.stage("teach", 300, unit="steps")
    clock.now_s += 65
    progress.update(300)
    progress.stage("synthesize", 4)
    assert stream.getvalue().splitlines()[-2:] == [
        "[teach] 300/300 steps, took 1:05",
        "[synthesize] 0/4 units, quarantined 0",
    ]


def test_work_of_an_earlier_run_is_no_part_of_the_speed(plain: tuple[io.StringIO, Progress], clock: Clock) -> None:
    stream, progress = plain
    progress.stage("synthesize", 40, done=30, images=300)
    clock.now_s += 5
    progress.update(35, images=350)
    assert stream.getvalue().splitlines() == [
        "[synthesize] 30/40 units, quarantined 0",
        "[synthesize] 35/40 units, 10 images/s, eta 0:05, quarantined 0",
    ]


def test_quarantined_units_are_not_waited_for(plain: tuple[io.StringIO, Progress], clock: Clock) -> None:
    stream, progress = plain
    progress.stage("synthesize", 40)
    clock.now_s += 10
    progress.update(20, quarantined=10)
    assert "eta 0:05, quarantined 10" in stream.getvalue()


def test_a_stage_without_work_ends_without_a_speed(plain: tuple[io.StringIO, Progress]) -> None:
    stream, progress = plain
    progress.stage("synthesize", 0)
    progress.update(0, images=0)
    progress.close()
    assert stream.getvalue().splitlines()[-1] == "[synthesize] 0/0 units, took 0:00, quarantined 0"


def test_plain_output_has_no_control_characters(plain: tuple[io.StringIO, Progress], clock: Clock) -> None:
    stream, progress = plain
    progress.stage("synthesize", 4)
    clock.now_s += 3
    progress.update(1, images=3, note="teachers a,\r\n b")
    progress.message("unit 3 failed\r\nretrying")
    progress.close()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", stream.getvalue())
    assert "quarantined 0, teachers a, b\n" in stream.getvalue()
    assert "unit 3 failed\nretrying\n" in stream.getvalue()


def test_every_plain_line_is_flushed() -> None:
    class Recorder(io.StringIO):
        def __init__(self) -> None:
            super().__init__()
            self.flushed = ""

        def flush(self) -> None:
            self.flushed = self.getvalue()

    stream = Recorder()
    progress = Progress(stream)
    progress.stage("synthesize", 4)
    assert stream.flushed == "[synthesize] 0/4 units, quarantined 0\n"


def test_an_update_without_a_stage_is_refused(plain: tuple[io.StringIO, Progress]) -> None:
    with pytest.raises(RuntimeError, match=r"before Progress\.stage"):
        plain[1].update(1)


def test_the_panel_shows_stage_count_speed_eta_teachers_and_quarantine() -> None:
    state = StageState("synthesize", 40, "units", 0.0, 0, 0, done=20, images=312, quarantined=2, note="slice 3")
    console = Console(file=io.StringIO(), width=80, record=True)
    console.print(stage_panel(state, 10.0, teachers=["resnet", "vgg"]))
    text = console.export_text()
    for fact in ("synthesize", "20/40 units", "images/s 31.2", "eta 0:09", "quarantined 2", "resnet, vgg", "slice 3"):
        assert fact in text


def test_brackets_in_names_are_no_markup() -> None:
    state = StageState("synthesize", 2, "units", 0.0, 0, 0, done=1, note="[bold]x[/nope]")
    console = Console(file=io.StringIO(), width=80, record=True)
    console.print(stage_panel(state, 1.0, teachers=["[red]t"]))
    text = console.export_text()
    assert "[bold]x[/nope]" in text
    assert "[red]t" in text


def on_terminal(work: Callable[[TextIO], None]) -> str:
    """What `work` writes to a pseudo-terminal; small enough for the terminal's own buffer."""
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as stream:
        work(stream)
    written = b""
    try:
        # One read returns at most 4 KiB, and a terminal whose other end is closed ends with EIO.
        with contextlib.suppress(OSError):
            while chunk := os.read(leader, 1 << 16):
                written += chunk
    finally:
        os.close(leader)
    return written.decode()


def run_one_stage(stream: TextIO) -> None:
    with Progress(stream, teachers=["resnet"]) as progress:
        progress.stage("synthesize", 2)
        progress.message("a [message]")
        progress.update(2, images=20)


def test_a_terminal_gets_a_panel_and_keeps_the_final_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = on_terminal(run_one_stage)
    assert "prism-ray" in text
    assert "a [message]" in text
    assert "[synthesize] 2/2 units" in text
    assert "\x1b[?25l" in text  # the cursor is hidden ...
    assert "\x1b[?25h" in text  # ... and given back


def test_no_color_takes_the_colors_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    color = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-8]|9[0-7])[;m]")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert color.search(on_terminal(run_one_stage))
    monkeypatch.setenv("NO_COLOR", "1")
    assert not color.search(on_terminal(run_one_stage))


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    text = on_terminal(run_one_stage)
    assert "\x1b" not in text
    assert text.startswith("[synthesize] 0/2 units, quarantined 0")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (12.4, "0:12"), (59.6, "1:00"), (725, "12:05"), (93_780, "26:03:00")]
)
def test_durations_read_as_clocks_do(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(("per_s", "text"), [(0.0312, "0.0312"), (31.24, "31.2"), (3120.4, "3120"), (12345.6, "12346")])
def test_speeds_keep_three_digits(per_s: float, text: str) -> None:
    assert format_speed(per_s) == text


# Estimates


def working(clock: Clock, *, work: float | None = None) -> tuple[io.StringIO, Progress]:
    stream = io.StringIO()
    progress = Progress(stream, interval_s=0.0, clock=clock)
    progress.stage("synthesize", 10)
    clock.now_s += 60  # processes start, models are loaded
    progress.working(work=work)
    return stream, progress


def test_the_time_until_work_can_begin_is_no_part_of_speed_and_estimate(clock: Clock) -> None:
    stream, progress = working(clock)
    clock.now_s += 10
    progress.update(5, images=50)
    assert "5/10 units, 5 images/s, eta 0:10" in stream.getvalue().splitlines()[-1]


def test_expensive_units_first_do_not_make_the_estimate_too_long(clock: Clock) -> None:
    stream, progress = working(clock, work=1000.0)
    clock.now_s += 40
    progress.observe(work=800.0)  # four of ten units were four fifths of the work
    progress.update(4)
    assert "eta 0:10" in stream.getvalue().splitlines()[-1]


def test_what_was_given_up_is_neither_waited_for_nor_taken_for_speed(clock: Clock) -> None:
    stream, progress = working(clock, work=1000.0)
    clock.now_s += 40
    for _ in range(4):
        progress.observe(work=100.0)
    progress.observe(work=200.0, is_done=False)
    progress.update(4, quarantined=1)
    assert "eta 0:40" in stream.getvalue().splitlines()[-1]


def test_an_estimate_counts_down_until_the_next_unit_is_overdue_and_then_grows(clock: Clock) -> None:
    _, progress = working(clock)
    clock.now_s += 40
    progress.update(4)
    state = progress._state
    assert state is not None
    estimates = [state.eta_s(clock.now_s + wait_s) for wait_s in (0, 5, 10, 50)]
    assert estimates == [60, 55, 50, 110]


def test_an_estimate_from_a_unit_or_two_is_marked_as_rough(clock: Clock) -> None:
    stream, progress = working(clock)
    for done in (2, 3):
        clock.now_s += 5
        progress.update(done)
    assert [line.partition("eta ")[2].partition(",")[0] for line in stream.getvalue().splitlines()[1:]] == [
        "~0:20",
        "0:23",
    ]


# The panel with all that units tell


def full_panel(width: int, *, encoding: str = "utf-8") -> str:
    losses = tuple(3.0 * 0.97**n for n in range(120))
    state = StageState(
        "synthesize",
        240,
        "units",
        0.0,
        0,
        0,
        done=120,
        images=1200,
        quarantined=1,
        device="cpu:AMD EPYC 9R14 AVX512",
        memory_bytes=612_000_000,
        trends={"cross-entropy": losses, "statistics": tuple(reversed(losses))},
    )
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=stream, width=width)
    console.print(stage_panel(state, 60.0, teachers=["resnet", "vgg", "a_teacher_with_a_rather_long_name"] * 3))
    stream.seek(0)
    return stream.read()


@pytest.mark.parametrize("width", [80, 200])
def test_the_panel_fits_narrow_and_wide_terminals(width: int) -> None:
    lines = full_panel(width).splitlines()
    assert {len(line) for line in lines} == {width}
    text = "\n".join(lines)
    for fact in (
        *("120/240 units", "images/s 20", "eta 1:00", "elapsed 1:00", "quarantined 1", "teachers resnet, vgg"),
        *("GB here, worker 0.61 GB", "device cpu:AMD EPYC" if width == 200 else "device cpu:"),
    ):
        assert fact in text
    down, up = (next(line for line in lines if name in line) for name in ("cross-entropy", "statistics"))
    assert re.search(r"cross-entropy 3 █[▂-█]*▁+ 0\.08 ", down)
    assert re.search(r"statistics 0\.08 ▁[▁-▇]*█+ 3 ", up)
    assert sum(character in "▁▂▃▄▅▆▇█" for character in down) == (120 if width == 200 else 55)


def test_a_terminal_without_unicode_gets_a_panel_too() -> None:
    assert full_panel(80, encoding="ascii").isascii()


def test_a_sparkline_shows_means_of_neighbours_and_skips_what_is_no_number() -> None:
    assert sparkline([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], 20) == "▁▂▃▄▅▆▇█"
    assert sparkline([0.0, 0.0, 7.0, 7.0], 2) == "▁█"
    assert sparkline([1.0, float("nan"), 1.0, float("inf")], 9) == "▁▁"
    assert sparkline([float("nan")], 9) == ""
    assert sparkline([1.0], 0) == ""
