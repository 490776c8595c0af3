"""What a run has done: shards, receipts, attempts, quarantine, manifest.

A unit is done when its receipt exists and its shard has the receipt's size. The receipt is written after the shard, so
a kill at any moment leaves a unit complete or absent. Start markers tell a process that died in a unit: they carry the
driver's epoch and the node, and count as an attempt only while that driver and that node are still there and the node
is not about to leave.
"""

import io
import json
import math
import sys
import traceback
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prism_ray.deadline import ended_after
from prism_ray.documents import fits
from prism_ray.errors import Drained, Fenced, InputError, PrismError, StorageError, one_line, redacted, shortened
from prism_ray.lock import check_epoch
from prism_ray.schema import table_bytes
from prism_ray.storage import Store, open_store, parsed_json, read_json, sha256_of, to_json

MANIFEST = "manifest.json"
DAMAGED = "damaged.json"
FOLDERS = {"synthesize": "images", "relabel": "labels", "distill": "student"}
"""Where the objects of each stage lie."""
UNFINISHED = "unfinished"
"""Folder of what long units keep on the way, see `stages.unfinished`; nothing in it when a run is complete."""
EVENTS = {
    "begun": "the first command began to work on the run",
    "taken_over": "a command went on for one that was gone without releasing the run",
    "job": "the command is a job submitted to a Ray cluster",
    "stage": "a stage began to do what is left of it",
    "stage_ended": "that stage has ended",
    "adopted": "a unit was taken over from a run that made the same one",
    "not_adopted": "a unit could not be taken over, and is made here",
    "kept_first": "a unit came out differently in another environment; the published one stays",
    "quarantined": "a unit was given up",
    "retried": "units that were given up may be tried again",
    "damaged": "verify found objects that differ from their receipts",
    "set_aside": "a damaged object was put aside, to be made again",
    "repaired": "objects that were put aside are whole again",
    "drained": "the command was asked to stop, and did",
    "interrupted": "the command was interrupted",
    "failed": "the command ended with an error",
    "finished": "everything is there, and the manifest is written",
}
"""Kinds of lines in events.jsonl. Each also has the time (UTC)."""


class NondeterministicUnit(PrismError):
    """The same unit gave other bytes in the same environment."""


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """Proof that an object was published: what it holds, what it was made from, what it cost."""

    stage: str
    name: str
    unit_id: str
    key: str
    rows: int = 0
    bytes: int = 0
    sha256: str = ""
    seconds: float = 0.0
    inputs: dict[str, str] = field(default_factory=dict)
    """sha256 of what it was made from, by key: if one changes, it must be made again."""
    fingerprint: str = ""
    """Environment within which the bytes are promised to repeat."""
    worker: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Marker:
    """That a unit is being tried, and what came of it."""

    epoch: int
    node: str
    error: str | None = None
    traceback: str = ""


@dataclass(frozen=True, kw_only=True)
class GivenUp:
    """A unit in quarantine."""

    stage: str
    name: str
    unit_id: str
    attempts: int
    reason: str


class Ledger:
    """The record of one run, in its folder. Every answer is read from the store; what it has read before, it knows."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._parsed: dict[str, tuple[bytes, Receipt]] = {}
        self._receipts: dict[str, tuple[Mapping[str, bytes], Mapping[str, Receipt]]] = {}

    # Receipts

    def receipts(self, stage: str) -> Mapping[str, Receipt]:
        """Receipts of a stage by unit name; the same object where the store's answer is."""
        files = self.store.read_all(f"receipts/{stage}")  # what has not changed is the same object
        if stage in self._receipts and self._receipts[stage][0] is files:
            return self._receipts[stage][1]
        found = {}
        for key, data in files.items():
            known = self._parsed.get(key)
            if known is None or known[0] is not data:
                known = self._parsed[key] = (data, parsed_json(data, partial(self.store.url_of, key), Receipt))
            found[known[1].name] = known[1]
        self._receipts[stage] = (files, found)
        return found

    def receipt(self, stage: str, name: str) -> Receipt | None:
        return read_json(self.store, f"receipts/{stage}/{name}.json", Receipt)

    def write_receipt(self, receipt: Receipt) -> None:
        self.store.put(f"receipts/{receipt.stage}/{receipt.name}.json", to_json(asdict(receipt)))

    def is_done(self, receipt: Receipt | None, inputs: dict[str, str], sizes: Mapping[str, int] | None = None) -> bool:
        """Whether a published object is there, whole, and made from today's inputs.

        `sizes` of a listing save asking for each of many objects.
        """
        if receipt is None or receipt.inputs != inputs:
            return False
        size = self.store.size(receipt.key) if sizes is None else sizes.get(receipt.key)
        return size == receipt.bytes

    # Publishing

    def publish(self, table: pa.Table, receipt: Receipt, *, epoch: int) -> Receipt:
        """Commit a shard, then its receipt. Doing it twice with the same bytes changes nothing.

        Raises:
            Fenced: the driver of `epoch` was replaced.
            NondeterministicUnit: the unit is published with other bytes, made in the same environment.
        """
        data = table_bytes(table)
        receipt = replace(receipt, rows=table.num_rows, bytes=len(data), sha256=sha256_of(data))
        check_epoch(self.store, epoch)
        if not self.store.create(receipt.key, data, check=lambda written: _check_footer(written, table)):
            published = self._resolve_published(receipt)
            if published is not None:
                return published
            self.store.put(receipt.key, data)
        check_epoch(self.store, epoch)
        self.write_receipt(receipt)
        return receipt

    def adopt(self, receipt: Receipt, source: Store, *, epoch: int) -> bool:
        """Publish another run's object here, receipt and all; False if its bytes are not what the receipt says."""
        if source.sha256(receipt.key) != receipt.sha256:
            return False
        check_epoch(self.store, epoch)
        self.store.copy(receipt.key, source, receipt.key)  # whatever lies there has no receipt that counts
        check_epoch(self.store, epoch)
        self.write_receipt(receipt)
        self.event("adopted", key=receipt.key, source=source.url)
        return True

    def _resolve_published(self, receipt: Receipt) -> Receipt | None:
        """The receipt to keep for a name that is taken, or None if what lies there must be replaced."""
        present = sha256_of(self.store.read(receipt.key))
        committed = self.receipt(receipt.stage, receipt.name)
        made_from = (receipt.unit_id, receipt.inputs)
        if committed is None or committed.sha256 != present or (committed.unit_id, committed.inputs) != made_from:
            if present != receipt.sha256:
                return None  # never committed, damaged, or made from something else
            self.write_receipt(receipt)
            return receipt
        if present == receipt.sha256:
            return committed
        if committed.fingerprint == receipt.fingerprint:
            raise NondeterministicUnit(
                f"unit {receipt.name} ({receipt.unit_id}): computed again in the same environment and gave other bytes "
                f"({present[:12]} published, {receipt.sha256[:12]} now); look for a nondeterministic kernel"
            )
        self.event("kept_first", stage=receipt.stage, unit=receipt.name, published=present, refused=receipt.sha256)
        return committed

    # Attempts and quarantine

    def start_attempt(self, stage: str, name: str, *, epoch: int, node: str) -> str:
        """Mark that a unit is being tried; returns the marker's key."""
        number = len(self.store.keys(f"attempts/{stage}/{name}")) + 1
        key = f"attempts/{stage}/{name}/{epoch:06d}-{number:03d}.json"
        self.store.put(key, to_json({"epoch": epoch, "node": node, "error": None}))
        return key

    def fail_attempt(self, key: str, error: BaseException, *, stack: str = "") -> None:
        """Turn a start marker into a failure with its reason; `stack` says where, if the error itself does not."""
        marker = asdict(parsed_json(self.store.read(key), partial(self.store.url_of, key), Marker))
        text = stack or "".join(traceback.format_exception(error))
        self.store.put(key, to_json({**marker, "error": _reason(error), "traceback": redacted(text)[-8000:]}))

    def failed_attempts(self, stage: str, name: str, *, epoch: int, live_nodes: Collection[str]) -> list[str]:
        """Reasons of the attempts that count: errors, and deaths that the driver and the node survived."""
        reasons = []
        for key, data in self.store.read_all(f"attempts/{stage}/{name}").items():
            marker = parsed_json(data, partial(self.store.url_of, key), Marker)
            if marker.error is not None:
                reasons.append(marker.error)
            elif marker.epoch == epoch and marker.node in live_nodes:
                reasons.append("its process died")
        return reasons

    def clear_attempts(self, stage: str, name: str) -> None:
        self.store.remove(f"attempts/{stage}/{name}")

    def quarantine(self, stage: str, name: str, unit_id: str, reasons: list[str]) -> None:
        """Give a unit up; the rest of the run goes on."""
        content = {"stage": stage, "name": name, "unit_id": unit_id, "attempts": len(reasons), "reason": reasons[-1]}
        self.store.put(f"quarantine/units/{stage}/{name}.json", to_json(content))

    def quarantined(self) -> list[dict[str, Any]]:
        """Every unit that was given up."""
        entries = self.store.read_all("quarantine/units").items()
        return [asdict(parsed_json(data, partial(self.store.url_of, key), GivenUp)) for key, data in entries]

    def retry(self) -> int:
        """Forget quarantine and attempts, so that the next run tries again; returns the number of units."""
        entries = self.quarantined()
        if entries:
            self.store.remove(MANIFEST)
        for entry in entries:
            self.clear_attempts(entry["stage"], entry["name"])
            self.store.remove(f"quarantine/units/{entry['stage']}/{entry['name']}.json")
        if entries:
            self.event("retried", units=[f"{entry['stage']} {entry['name']}" for entry in entries])
        return len(entries)

    # Verification and repair

    def verify(self) -> list[dict[str, str]]:
        """Compare every published object with its receipt, byte for byte.

        Returns:
            One entry per problem: object key, stage and name of its receipt, and what is wrong with it.
        """
        problems = []
        known = set()
        for stage in FOLDERS:
            for receipt in self.receipts(stage).values():
                known.add(receipt.key)
                problem = self._problem(receipt)
                if problem:
                    problems.append({"key": receipt.key, "stage": stage, "name": receipt.name, "problem": problem})
        for prefix in ("images", "labels"):
            for key in self.store.keys(prefix):
                if key not in known:
                    problems.append({"key": key, "stage": "", "name": "", "problem": "belongs to no unit of this run"})
        return problems

    def _problem(self, receipt: Receipt) -> str | None:
        size = self.store.size(receipt.key)
        if size is None:
            return "missing"
        if size != receipt.bytes:
            return f"has {size} bytes, its receipt says {receipt.bytes}"
        if self.store.sha256(receipt.key) != receipt.sha256:
            return "its content differs from its receipt (same size)"
        folder, files = receipt.key.rpartition("/")[0], receipt.details.get("files", {})
        if not fits(files, dict[str, str]):
            return "its receipt names its files in no known form"
        for name, sha256 in files.items():
            key = f"{folder}/{name}"
            if self.store.size(key) is None or self.store.sha256(key) != sha256:
                return f"its {name} is missing or differs from its receipt"
        return None

    def record_damage(self, problems: list[dict[str, str]]) -> None:
        """Write the findings of `verify` down, so that the next run looks at just these objects."""
        if problems:
            self.store.put(DAMAGED, to_json(problems))
        else:
            self.store.remove(DAMAGED)

    def set_damaged_aside(self) -> list[str]:
        """Move damaged objects into quarantine/damaged and drop their receipts, so that they are made again.

        Looks at sizes everywhere and at the content of what `verify` had found.
        """
        suspects = {entry.get("key") for entry in read_json(self.store, DAMAGED, list[dict[str, str | None]]) or []}
        aside = []
        for stage, folder in FOLDERS.items():
            sizes = self.store.sizes(folder)
            for receipt in self.receipts(stage).values():
                wrong_size = sizes.get(receipt.key) != receipt.bytes
                if wrong_size or (receipt.key in suspects and self._problem(receipt)):
                    self._set_aside(receipt)
                    aside.append(receipt.key)
        self.store.remove(DAMAGED)
        return aside

    def _set_aside(self, receipt: Receipt) -> None:
        # The manifest and the receipt go first: without them the object counts for nothing, wherever a kill falls.
        self.store.remove(MANIFEST)
        self.store.remove(f"receipts/{receipt.stage}/{receipt.name}.json")
        if self.store.size(receipt.key) is not None:
            self.store.move(receipt.key, f"quarantine/damaged/{receipt.key}")
        self.event("set_aside", key=receipt.key)

    # Manifest and events

    def manifest(self) -> dict[str, Any] | None:
        return read_json(self.store, MANIFEST)

    def write_manifest(self, content: dict[str, Any]) -> None:
        """The commit of a run; written last."""
        self.store.put(MANIFEST, to_json(content))

    def event(self, kind: str, **content: Any) -> None:
        """Append one line to events.jsonl (an object store: one object below events/), see `EVENTS`; for people."""
        line = {"event": kind, "at": datetime.now(UTC).isoformat(timespec="milliseconds"), **content}
        with suppress(StorageError):  # a line for people is no reason to end a run; the next object says the same
            self.store.append("events.jsonl", json.dumps(line, sort_keys=True))


@lru_cache(maxsize=64)
def open_ledger(url: str) -> Ledger:
    """The record of the run at this address, one per process: it knows what it has read."""
    return Ledger(open_store(url))


@dataclass(frozen=True)
class Attempt:
    """Who tries a unit: the driver's epoch, this node, the nodes that are there to stay; how often and how long."""

    epoch: int
    node: str
    live_nodes: Callable[[], Collection[str]]
    max_attempts: int
    timeout_s: float


@dataclass(frozen=True)
class Outcome:
    """How a unit ended: `done`, `quarantined`, or `aborted` (the run must stop: the fault is not the unit's)."""

    status: str
    name: str
    reason: str = ""
    images: int = 0
    exit_code: int = 0
    values: dict[str, float] = field(default_factory=dict)
    """What of a unit's numbers is followed from unit to unit: its loss terms at the end, or its mean energy."""
    device: str = ""
    memory_bytes: int = 0
    device_memory_bytes: int = 0


def run_unit(
    ledger: Ledger, receipt: Receipt, compute: Callable[[], tuple[pa.Table, Receipt]], attempt: Attempt
) -> Outcome:
    """One unit from plan to receipt: counted attempts, published once, or quarantined with its reason.

    An attempt that takes longer than it may ends this process; it counts, wherever the unit is tried next.

    Args:
        receipt: names the unit; `compute` returns it filled in, with the table to publish.
    """
    stage, name = receipt.stage, receipt.name
    committed = ledger.receipt(stage, name)
    if committed and committed.unit_id == receipt.unit_id and ledger.is_done(committed, receipt.inputs):
        # Ray replays a chain whose worker died in a later unit, or between the receipt and the answer.
        ledger.clear_attempts(stage, name)
        return _done(committed)
    while True:
        reasons = ledger.failed_attempts(stage, name, epoch=attempt.epoch, live_nodes=attempt.live_nodes())
        if len(reasons) >= attempt.max_attempts:
            ledger.quarantine(stage, name, receipt.unit_id, reasons)
            return Outcome("quarantined", name, reasons[-1])
        try:
            marker = ledger.start_attempt(stage, name, epoch=attempt.epoch, node=attempt.node)
            with ended_after(attempt.timeout_s, _too_long(ledger, marker, name, attempt.timeout_s)):
                try:
                    table, filled = compute()
                except Exception as error:
                    if isinstance(error, Drained):
                        ledger.store.remove(marker)  # it goes on elsewhere, and was no attempt
                    if isinstance(error, InputError | Drained | Fenced):
                        raise
                    ledger.fail_attempt(marker, error)
                    continue
                published = ledger.publish(table, filled, epoch=attempt.epoch)
                ledger.clear_attempts(stage, name)
            return _done(published)
        except PrismError as error:
            return Outcome("aborted", name, one_line(error), exit_code=int(error.exit_code))


FOLLOWED = {"cross-entropy": "loss_ce", "statistics": "loss_bn", "energy": "mean_energy"}
"""Numbers in the details of a receipt of images that are followed from unit to unit."""


def followed(receipt: Receipt) -> dict[str, float]:
    """Those of them that a unit has and that are finite, by name."""
    found = {name: receipt.details.get(key) for name, key in FOLLOWED.items()}
    return {name: value for name, value in found.items() if isinstance(value, float) and math.isfinite(value)}


def _done(receipt: Receipt) -> Outcome:
    return Outcome(
        "done",
        receipt.name,
        images=receipt.rows,
        values=followed(receipt),
        device=receipt.fingerprint.partition("|")[0],
        memory_bytes=receipt.worker.get("peak_memory_bytes", 0),
        device_memory_bytes=receipt.worker.get("peak_device_bytes", 0),
    )


def _too_long(ledger: Ledger, marker: str, name: str, seconds: float) -> Callable[[str], None]:
    """What is done before the process of an attempt that takes too long ends: its end gets a reason."""

    def record(stack: str) -> None:
        error = TimeoutError(f"took longer than compute.unit_timeout_s={seconds:g}; raise it if such units need longer")
        print(f"prism-ray: {name}: {error}; run the same command to continue", file=sys.stderr, flush=True)
        ledger.fail_attempt(marker, error, stack=stack)

    return record


def _check_footer(written: Path | io.BytesIO, table: pa.Table) -> None:
    """Read a written shard's footer back: rows and columns as meant."""
    footer = pq.read_metadata(written)
    if footer.num_rows != table.num_rows or footer.schema.to_arrow_schema().names != table.schema.names:
        raise PrismError(f"{written}: the shard read back differs from what was written; check the disk")


def _reason(error: BaseException) -> str:
    text = f"{type(error).__name__}: {one_line(error)}"
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        # Never retried with a smaller batch: that would change the images.
        text += " (out of memory: lower method.batch_size or labels.batch_size, or give the actor a larger device)"
    return text[:1000]


def read_table(store: Store, key: str) -> pa.Table:
    """A published shard.

    Raises:
        PrismError: it is missing or damaged.
    """
    return _read(store, key, None)


def read_columns(store: Store, key: str, columns: list[str]) -> pa.Table:
    """Some columns of a published shard; the others are not read.

    Raises:
        PrismError: it is missing or damaged.
    """
    return _read(store, key, columns)


def _read(store: Store, key: str, columns: list[str] | None) -> pa.Table:
    try:
        if columns is None:
            return pq.read_table(io.BytesIO(store.read(key)))
        with store.open(key) as source:
            return pq.read_table(source, columns=columns)
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise PrismError(
            f"{store.url_of(key)}: is missing or damaged ({shortened(error)}); `prism-ray verify` with repair=true "
            "makes it again"
        ) from error
