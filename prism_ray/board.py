"""A run's curves for TensorBoard: event files in its folder, made from receipts and students' records.

    tensorboard/synthesize/  tensorboard/losses/  tensorboard/<student>/     one file in each

For people: no manifest lists them and nothing is made from them. They are written at the end of a stage as a whole, so
that they lie in an object store like anywhere else. The same records give the same bytes: the time of a point, which
TensorBoard shows as relative time, is the seconds of work until then and not a clock's.
tensorboardX writes them, which Ray Train brings along; `torch.utils.tensorboard` would need all of `tensorboard`, a
server, to write a few numbers. Without it there are none.
"""

import json
import math
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from prism_ray.errors import StorageError
from prism_ray.ledger import Receipt, followed
from prism_ray.runs import Run
from prism_ray.work import DISTILL, LOSS_HISTORY, SYNTHESIZE

FOLDER = "tensorboard"
FILE = "events.out.tfevents.0"  # by its name TensorBoard knows it
MAX_CURVES = 20
"""Units whose loss curves are written, the first ones: a chart of thousands shows nothing."""
STUDENT_VALUES = ("loss", "top1", "lr", "images_per_s")


@dataclass(frozen=True)
class Point:
    """A number of a curve. `seconds`: of work until then."""

    tag: str
    step: int
    value: float
    seconds: float


def has_board(run: Run, stage: str) -> bool:
    """Whether a finished run has the event files of a stage: nothing was made since they were written."""
    if run.ledger.manifest() is None:
        return False
    names = ["synthesize"] if stage == SYNTHESIZE else sorted(run.ledger.receipts(DISTILL))
    return all(run.store.size(f"{FOLDER}/{name}/{FILE}") is not None for name in names)


def write_board(run: Run, stages: Collection[str] = (SYNTHESIZE, DISTILL)) -> None:
    """Bring the event files of stages of a run up to date; nothing without tensorboardX."""
    try:
        import tensorboardX.proto.event_pb2  # noqa: F401
    except Exception:  # not there, or made for another protobuf, which has errors of its own for that
        return
    with suppress(StorageError):  # curves for people are no reason to end a run; the next object says the same
        for name, points in curves_of(run, stages).items():
            key, data = f"{FOLDER}/{name}/{FILE}", event_file(points)
            if points and (run.store.size(key) != len(data) or run.store.read(key) != data):
                run.store.put(key, data)


def curves_of(run: Run, stages: Collection[str] = (SYNTHESIZE, DISTILL)) -> dict[str, list[Point]]:
    """By the name of a folder, the points of its curves; receipts of other stages are not read."""
    curves: dict[str, list[Point]] = {}
    if SYNTHESIZE in stages:
        images = [receipt for _, receipt in sorted(run.ledger.receipts(SYNTHESIZE).items())]
        curves |= {"synthesize": list(_units(images)), "losses": list(_losses(images))}
    if DISTILL in stages:
        for name, receipt in sorted(run.ledger.receipts(DISTILL).items()):
            curves[name] = list(_student(_record(run, name), receipt.seconds))
    return curves


def _units(images: Sequence[Receipt]) -> Iterator[Point]:
    """What units ended with, in plan order."""
    seconds = 0.0
    for step, receipt in enumerate(images):
        seconds += receipt.seconds
        values = {f"unit/{name}": value for name, value in followed(receipt).items()}
        if receipt.seconds > 0:
            values["unit/images_per_s"] = receipt.rows / receipt.seconds
        for tag, value in values.items():
            yield Point(tag, step, value, seconds)


def _losses(images: Sequence[Receipt]) -> Iterator[Point]:
    """Loss terms over the iterations of the first units."""
    for receipt in [receipt for receipt in images if receipt.details.get(LOSS_HISTORY)][:MAX_CURVES]:
        last = receipt.details[LOSS_HISTORY][-1][0] or 1
        for iteration, *terms in receipt.details[LOSS_HISTORY]:
            for name, value in zip(("cross-entropy", "statistics"), terms, strict=True):
                if value is not None:
                    seconds = receipt.seconds * iteration / last
                    yield Point(f"{name}/{receipt.name}", iteration, value, seconds)


def _record(run: Run, name: str) -> list[dict[str, Any]]:
    """A student's record, an entry for each epoch; empty if it is gone or damaged."""
    try:
        data = run.store.read(f"metrics/students/{name}.jsonl")
    except FileNotFoundError:
        return []
    with suppress(ValueError):  # damaged: it is for people too
        return [json.loads(line) for line in data.splitlines()]
    return []


def _student(record: Sequence[Mapping[str, Any]], seconds: float) -> Iterator[Point]:
    last = max((entry["step"] for entry in record), default=0) or 1
    for entry in record:
        for name in STUDENT_VALUES:
            value = entry.get(name)
            if value is not None and math.isfinite(value):
                yield Point(f"student/{name}", entry["step"], value, seconds * entry["step"] / last)


def event_file(points: Sequence[Point]) -> bytes:
    """The points as TensorBoard reads them: records of a length, its checksum, a protobuf message, its checksum."""
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
    from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

    events = [Event(wall_time=0.0, file_version="brain.Event:2")]
    for point in points:
        value = Summary.Value(tag=point.tag, simple_value=point.value)
        events.append(Event(wall_time=point.seconds, step=point.step, summary=Summary(value=[value])))
    return b"".join(_record_of(event.SerializeToString()) for event in events)


def _record_of(message: bytes) -> bytes:
    length = struct.pack("<Q", len(message))
    return length + _masked_crc(length) + message + _masked_crc(message)


def _masked_crc(data: bytes) -> bytes:
    """The checksum of TFRecord files: CRC-32C, turned by 15 bits and shifted by a constant."""
    from tensorboardX.crc32c import crc32c

    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
