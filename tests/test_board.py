"""Event files: what TensorBoard finds in a run's folder, and that nothing else of the run knows of them."""

import shutil
import struct
import sys
from pathlib import Path

import pytest
from commands import SMOKE, Command, products
from tensorboardX.crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

from prism_ray import cli
from prism_ray.board import Point, curves_of, event_file, write_board
from prism_ray.inspection import open_existing


def masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


def events(data: bytes) -> list[Event]:
    """The messages of an event file, every checksum looked at."""
    found = []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        message = data[12 : 12 + length]
        assert data[8:12] == masked(data[:8])
        assert data[12 + length : 16 + length] == masked(message)
        found.append(Event.FromString(message))
        data = data[16 + length :]
    return found


def scalars(data: bytes) -> list[tuple[str, int, float]]:
    return [(value.tag, event.step, value.simple_value) for event in events(data) for value in event.summary.value]


def files(run_dir: Path) -> dict[str, bytes]:
    """Event files by the folder they are in."""
    return {path.parent.name: path.read_bytes() for path in sorted((run_dir / "tensorboard").rglob("*.*"))}


def test_an_event_file_begins_with_its_version_and_holds_every_point_in_order() -> None:
    data = event_file([Point("a", 0, 1.5, 0.0), Point("b", 7, -2.0, 3.5)])
    assert events(data)[0].file_version == "brain.Event:2"
    assert scalars(data) == [("a", 0, 1.5), ("b", 7, -2.0)]
    assert [event.wall_time for event in events(data)] == [0.0, 0.0, 3.5]


def test_a_run_leaves_losses_of_its_units_and_students(run_dir: Path) -> None:
    found = {name: scalars(data) for name, data in files(run_dir).items()}
    assert set(found) == {"synthesize", "losses", "soft-seed0", "hard-seed0"}
    assert [step for tag, step, _ in found["synthesize"] if tag == "unit/cross-entropy"] == [0, 1, 2, 3]
    curve = [step for tag, step, _ in found["losses"] if tag == "statistics/train-00002-of-00004"]
    assert curve == sorted(curve)
    assert len(curve) > 1
    assert {tag for tag, _, _ in found["soft-seed0"]} >= {"student/loss", "student/lr", "student/images_per_s"}


def test_event_files_that_are_gone_come_back_the_same_and_change_nothing(
    prism: Command, run_dir: Path, storage: Path
) -> None:
    def others() -> dict[str, bytes]:
        paths = (run_dir / name for name in ("manifest.json", "pins.json", "metrics/diversity.json"))
        return {path.name: path.read_bytes() for path in paths}

    before, made, known = files(run_dir), products(run_dir), others()
    shutil.rmtree(run_dir / "tensorboard")
    assert prism("run").code == 0
    assert (files(run_dir), products(run_dir), others()) == (before, made, known)


def test_without_a_writer_there_are_none_and_the_run_goes_on(
    prism: Command, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(run_dir / "tensorboard")
    monkeypatch.setitem(sys.modules, "tensorboardX.proto.event_pb2", None)
    assert prism("run").code == 0
    assert not (run_dir / "tensorboard").exists()


def test_event_files_that_are_up_to_date_are_not_written_again(run_dir: Path, storage: Path) -> None:
    run = open_existing(cli.compose([*SMOKE, f"storage={storage}"]))
    paths = sorted((run_dir / "tensorboard").rglob("*.*"))
    before = [path.stat().st_mtime_ns for path in paths]
    write_board(run)
    assert [path.stat().st_mtime_ns for path in paths] == before


def test_a_student_without_a_record_has_no_curve(run_dir: Path, storage: Path) -> None:
    (run_dir / "metrics/students/hard-seed0.jsonl").unlink()
    curves = curves_of(open_existing(cli.compose([*SMOKE, f"storage={storage}"])))
    assert curves["hard-seed0"] == []
    assert curves["soft-seed0"]
    (run_dir / "metrics/students/soft-seed0.jsonl").write_text("{")
    assert curves_of(open_existing(cli.compose([*SMOKE, f"storage={storage}"])))["soft-seed0"] == []


def test_runs_in_an_object_store_have_them_too(prism: Command) -> None:
    from prism_ray.storage import open_store

    assert prism("run", "storage=memory://board", "stages=[prepare,teach,synthesize]").code == 0
    store = open_store("memory://board")
    (key,) = [key for key in store.keys("runs") if key.endswith("tensorboard/synthesize/events.out.tfevents.0")]
    assert len(scalars(store.read(key))) == 12
