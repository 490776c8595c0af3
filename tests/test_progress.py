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

from prism_ray.progress import Progress, StageState, format_duration, format_speed, stage_panel


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
