"""The ledger: units complete or absent, counted fairly, found when damaged."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from prism_ray.errors import Drained, ExitCode, Fenced, InputError, PrismError
from prism_ray.ledger import (
    Attempt,
    Ledger,
    NondeterministicUnit,
    Outcome,
    Receipt,
    read_table,
    run_unit,
)
from prism_ray.storage import LocalStore, sha256_of

TABLE = pa.table({"image_id": ["a", "b"], "label": [0, 1]})
OTHER = pa.table({"image_id": ["a", "b"], "label": [0, 2]})
NAME = "train-00000-of-00002"


def receipt(name: str = NAME, *, fingerprint: str = "cpu", inputs: dict[str, str] | None = None) -> Receipt:
    key = f"images/{name}.parquet"
    return Receipt(stage="synthesize", name=name, unit_id="u0", key=key, fingerprint=fingerprint, inputs=inputs or {})


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(LocalStore(tmp_path / "run"))


def attempt(epoch: int = 1, node: str = "here", alive: tuple[str, ...] = ("here",), max_attempts: int = 3) -> Attempt:
    return Attempt(epoch, node, lambda: alive, max_attempts, timeout_s=60.0)


# Publishing


def test_a_published_unit_is_a_shard_and_its_receipt(ledger: Ledger) -> None:
    published = ledger.publish(TABLE, receipt(), epoch=1)
    data = ledger.store.read(published.key)
    assert (published.rows, published.bytes, published.sha256) == (2, len(data), sha256_of(data))
    assert ledger.receipts("synthesize") == {NAME: published}
    assert ledger.is_done(published, {})
    assert read_table(ledger.store, published.key).equals(TABLE)


def test_publishing_the_same_bytes_again_changes_nothing(ledger: Ledger) -> None:
    first = ledger.publish(TABLE, receipt(), epoch=1)
    path = Path(ledger.store.url_of(first.key))
    before = path.stat()
    assert ledger.publish(TABLE, receipt(), epoch=2) == first
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_other_bytes_in_the_same_environment_stop_the_run_and_name_the_unit(ledger: Ledger) -> None:
    first = ledger.publish(TABLE, receipt(), epoch=1)
    with pytest.raises(NondeterministicUnit, match=rf"unit {NAME} \(u0\)"):
        ledger.publish(OTHER, receipt(), epoch=1)
    assert ledger.receipts("synthesize") == {NAME: first}
    assert read_table(ledger.store, first.key).equals(TABLE)


def test_other_bytes_of_another_environment_leave_the_first_and_a_note(ledger: Ledger) -> None:
    first = ledger.publish(TABLE, receipt(fingerprint="cpu"), epoch=1)
    assert ledger.publish(OTHER, receipt(fingerprint="h100"), epoch=1) == first
    assert read_table(ledger.store, first.key).equals(TABLE)
    (line,) = ledger.store.read("events.jsonl").decode().splitlines()
    assert json.loads(line)["event"] == "kept_first"


def test_a_shard_made_from_other_inputs_is_replaced(ledger: Ledger) -> None:
    ledger.publish(TABLE, receipt(inputs={"images/a": "1"}), epoch=1)
    again = ledger.publish(OTHER, receipt(inputs={"images/a": "2"}), epoch=1)
    assert read_table(ledger.store, again.key).equals(OTHER)
    assert ledger.is_done(ledger.receipt("synthesize", NAME), {"images/a": "2"})
    assert ledger.verify() == []


def test_the_same_bytes_made_by_other_settings_get_the_new_receipt(ledger: Ledger) -> None:
    ledger.publish(TABLE, receipt(), epoch=1)
    renamed = replace(receipt(), unit_id="u1")
    assert ledger.publish(TABLE, renamed, epoch=1).unit_id == "u1"
    committed = ledger.receipt("synthesize", NAME)
    assert committed is not None
    assert committed.unit_id == "u1"


def test_a_damaged_shard_is_replaced_by_a_good_one(ledger: Ledger) -> None:
    first = ledger.publish(TABLE, receipt(), epoch=1)
    path = Path(ledger.store.url_of(first.key))
    path.write_bytes(path.read_bytes()[:-1])
    assert ledger.publish(TABLE, receipt(), epoch=1).sha256 == first.sha256
    assert ledger.verify() == []


def test_a_replaced_driver_publishes_nothing(ledger: Ledger) -> None:
    ledger.store.put("lock/000002.epoch", b"{}")
    with pytest.raises(Fenced):
        ledger.publish(TABLE, receipt(), epoch=1)
    assert ledger.store.keys("images") == []
    assert ledger.receipts("synthesize") == {}


def test_a_unit_without_its_receipt_or_of_the_wrong_size_is_not_done(ledger: Ledger) -> None:
    published = ledger.publish(TABLE, receipt(), epoch=1)
    assert not ledger.is_done(None, {})
    assert not ledger.is_done(published, {"images/a": "new"})
    Path(ledger.store.url_of(published.key)).write_bytes(b"short")
    assert not ledger.is_done(published, {})


CRASH = """
import os, sys
import pyarrow as pa
from prism_ray import ledger, storage

def die(*arguments, **settings):
    os._exit(9)

point = sys.argv[2]
if point == "before the temporary file":
    storage.uuid.uuid4 = die
elif point == "half written":
    storage.os.fsync = die
elif point == "before the link":
    storage.os.link = die
elif point == "after the link":
    storage.sync_path = die
elif point == "before the receipt":
    ledger.Ledger.write_receipt = die
elif point == "half a receipt":
    storage.os.replace = die
table = pa.table({"image_id": ["a", "b"], "label": [0, 1]})
name = "train-00000-of-00002"
receipt = ledger.Receipt(stage="synthesize", name=name, unit_id="u0", key=f"images/{name}.parquet", fingerprint="cpu")
ledger.Ledger(storage.LocalStore(sys.argv[1])).publish(table, receipt, epoch=1)
"""


@pytest.mark.parametrize(
    ("point", "is_shard_there"),
    [
        ("before the temporary file", False),
        ("half written", False),
        ("before the link", False),
        ("after the link", True),
        ("before the receipt", True),
        ("half a receipt", True),
    ],
)
def test_a_kill_at_any_step_of_publishing_leaves_a_unit_that_is_made_again_whole(
    ledger: Ledger, tmp_path: Path, point: str, is_shard_there: bool
) -> None:
    reference = Ledger(LocalStore(tmp_path / "reference")).publish(TABLE, receipt(), epoch=1)
    killed = subprocess.run([sys.executable, "-c", CRASH, ledger.store.url, point], check=False)
    assert killed.returncode == 9
    assert ledger.receipts("synthesize") == {}, "nobody takes the unit for done"
    assert ledger.store.keys("images") == ([reference.key] if is_shard_there else [])
    assert ledger.publish(TABLE, receipt(), epoch=2) == reference
    assert ledger.receipts("synthesize") == {NAME: reference}
    assert ledger.store.keys("images") == [reference.key]
    assert ledger.verify() == []


# Attempts and quarantine


def test_errors_count_for_ever_and_deaths_only_with_driver_and_node_alive(ledger: Ledger) -> None:
    failed = ledger.start_attempt("synthesize", NAME, epoch=1, node="here")
    ledger.fail_attempt(failed, ValueError("no\nluck"))
    ledger.start_attempt("synthesize", NAME, epoch=1, node="here")
    ledger.start_attempt("synthesize", NAME, epoch=2, node="gone")
    ledger.start_attempt("synthesize", NAME, epoch=2, node="here")

    def reasons(epoch: int, *alive: str) -> list[str]:
        return ledger.failed_attempts("synthesize", NAME, epoch=epoch, live_nodes=alive)

    error, death = "ValueError: no luck", "its process died"
    assert reasons(2, "here") == [error, death]
    assert reasons(2, "here", "gone") == [error, death, death]
    assert reasons(1, "here") == [error, death]
    assert reasons(3, "here", "gone") == [error], "a new driver forgives deaths, not errors"
    assert reasons(2) == [error], "a lost node takes its deaths along"


def test_attempts_of_one_unit_say_nothing_about_another(ledger: Ledger) -> None:
    ledger.start_attempt("synthesize", "train-1", epoch=1, node="here")
    assert ledger.failed_attempts("synthesize", "train-10", epoch=1, live_nodes=["here"]) == []
    assert ledger.failed_attempts("relabel", "train-1", epoch=1, live_nodes=["here"]) == []


class Failing:
    """A compute that always raises, and counts how often it was asked."""

    def __init__(self, error: BaseException) -> None:
        self._error, self.calls = error, 0

    def __call__(self) -> tuple[pa.Table, Receipt]:
        self.calls += 1
        raise self._error


def test_a_unit_that_always_fails_is_quarantined_after_its_attempts_and_the_next_is_made(ledger: Ledger) -> None:
    compute = Failing(FloatingPointError("loss of image 3 is nan"))
    outcome = run_unit(ledger, receipt(), compute, attempt(max_attempts=3))
    assert outcome == Outcome("quarantined", NAME, "FloatingPointError: loss of image 3 is nan")
    assert compute.calls == 3
    (entry,) = ledger.quarantined()
    assert entry == {
        "stage": "synthesize",
        "name": NAME,
        "unit_id": "u0",
        "attempts": 3,
        "reason": "FloatingPointError: loss of image 3 is nan",
    }
    other = receipt("train-00001-of-00002")
    assert run_unit(ledger, other, lambda: (OTHER, other), attempt()).status == "done"
    assert list(ledger.receipts("synthesize")) == [other.name]


def test_a_unit_that_recovers_is_published_and_its_attempts_are_forgotten(ledger: Ledger) -> None:
    errors = [RuntimeError("once"), RuntimeError("twice")]

    def compute() -> tuple[pa.Table, Receipt]:
        if errors:
            raise errors.pop()
        return TABLE, receipt()

    assert run_unit(ledger, receipt(), compute, attempt()) == Outcome("done", NAME, images=2, device="cpu")
    assert ledger.store.keys("attempts") == []
    assert ledger.quarantined() == []


def test_a_unit_that_killed_its_process_too_often_is_not_tried_again(ledger: Ledger) -> None:
    for _ in range(2):
        ledger.start_attempt("synthesize", NAME, epoch=1, node="here")
    compute = Failing(AssertionError("must not run"))
    outcome = run_unit(ledger, receipt(), compute, attempt(max_attempts=2))
    assert (outcome.status, outcome.reason) == ("quarantined", "its process died")
    assert compute.calls == 0


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("teachers: not this data set"), ExitCode.bad_input),
        (Drained("stopped"), ExitCode.drained),
        (Fenced("replaced"), ExitCode.failure),
    ],
)
def test_what_is_no_fault_of_the_unit_stops_the_run_and_quarantines_nothing(
    ledger: Ledger, error: PrismError, code: ExitCode
) -> None:
    compute = Failing(error)
    outcome = run_unit(ledger, receipt(), compute, attempt())
    assert (outcome.status, outcome.reason, outcome.exit_code) == ("aborted", str(error), code)
    assert compute.calls == 1
    assert ledger.quarantined() == []
    if isinstance(error, Drained):
        assert ledger.store.keys("attempts") == [], "the unit goes on elsewhere: this was no attempt"


def test_a_full_disk_stops_the_run_instead_of_blaming_the_unit(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def full_after(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 2:  # the start marker and its folder
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_after)
    outcome = run_unit(ledger, receipt(), lambda: (TABLE, receipt()), attempt())
    monkeypatch.undo()
    assert outcome.status == "aborted"
    assert "no space left" in outcome.reason
    assert ledger.quarantined() == []
    assert run_unit(ledger, receipt(), lambda: (TABLE, receipt()), attempt(epoch=2)).status == "done"


def test_nondeterminism_stops_the_run(ledger: Ledger) -> None:
    def beaten_by_another_worker() -> tuple[pa.Table, Receipt]:
        ledger.publish(TABLE, receipt(), epoch=1)
        return OTHER, receipt()

    outcome = run_unit(ledger, receipt(), beaten_by_another_worker, attempt())
    assert outcome.status == "aborted"
    assert "gave other bytes" in outcome.reason


def test_a_unit_that_is_committed_is_not_computed_again(ledger: Ledger) -> None:
    ledger.publish(TABLE, receipt(), epoch=1)
    ledger.start_attempt("synthesize", receipt().name, epoch=1, node="dead")
    outcome = run_unit(ledger, receipt(), Failing(AssertionError("computed")), attempt())
    assert (outcome.status, outcome.images) == ("done", TABLE.num_rows)
    assert ledger.failed_attempts("synthesize", receipt().name, epoch=1, live_nodes={"dead"}) == []


def test_out_of_memory_names_the_setting_to_change(ledger: Ledger) -> None:
    outcome = run_unit(ledger, receipt(), Failing(MemoryError()), attempt(max_attempts=1))
    assert "MemoryError" in outcome.reason
    assert "lower method.batch_size" in outcome.reason


def test_retry_forgets_quarantine_and_attempts(ledger: Ledger) -> None:
    run_unit(ledger, receipt(), Failing(ValueError("bad")), attempt())
    assert ledger.retry() == 1
    assert (ledger.quarantined(), ledger.store.keys("attempts"), ledger.retry()) == ([], [], 0)
    assert run_unit(ledger, receipt(), lambda: (TABLE, receipt()), attempt()).status == "done"


# Verification and repair


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "flip":
        data[len(data) // 2] ^= 1
    path.unlink()
    if how != "delete":
        path.write_bytes(data if how == "flip" else data[:-1] if how == "truncate" else b"")


@pytest.mark.parametrize("how", ["flip", "truncate", "empty", "delete"])
def test_damage_is_found_by_name_set_aside_and_made_again(ledger: Ledger, how: str) -> None:
    published = ledger.publish(TABLE, receipt(), epoch=1)
    damage(Path(ledger.store.url_of(published.key)), how)
    problems = ledger.verify()
    assert [(p["key"], p["stage"], p["name"]) for p in problems] == [(published.key, "synthesize", NAME)]
    ledger.record_damage(problems)
    assert ledger.set_damaged_aside() == [published.key]
    assert ledger.store.keys("images") == []
    assert ledger.receipts("synthesize") == {}
    assert ledger.publish(TABLE, receipt(), epoch=1) == published
    assert ledger.verify() == []
    assert ledger.set_damaged_aside() == []


def test_every_bit_of_a_shard_is_covered(ledger: Ledger) -> None:
    published = ledger.publish(TABLE, receipt(), epoch=1)
    path = Path(ledger.store.url_of(published.key))
    good = path.read_bytes()
    for position in range(0, len(good), 7):
        path.write_bytes(good[:position] + bytes([good[position] ^ 0x80]) + good[position + 1 :])
        assert len(ledger.verify()) == 1, f"byte {position}"


def test_a_repaired_report_of_damage_does_not_touch_a_good_object(ledger: Ledger) -> None:
    published = ledger.publish(TABLE, receipt(), epoch=1)
    damage(Path(ledger.store.url_of(published.key)), "flip")
    ledger.record_damage(ledger.verify())
    damage(Path(ledger.store.url_of(published.key)), "flip")  # the same bit back
    assert ledger.set_damaged_aside() == []
    assert ledger.receipts("synthesize") == {NAME: published}


def test_a_foreign_file_is_reported_and_left_alone(ledger: Ledger) -> None:
    ledger.publish(TABLE, receipt(), epoch=1)
    ledger.store.put("images/stranger.parquet", b"")
    assert [problem["key"] for problem in ledger.verify()] == ["images/stranger.parquet"]
    assert ledger.set_damaged_aside() == []
    assert ledger.store.size("images/stranger.parquet") == 0


def test_a_damaged_receipt_is_one_line_with_its_path(ledger: Ledger) -> None:
    ledger.publish(TABLE, receipt(), epoch=1)
    Path(ledger.store.url_of(f"receipts/synthesize/{NAME}.json")).write_bytes(b"")
    with pytest.raises(PrismError, match=rf"receipts/synthesize/{NAME}\.json: damaged"):
        ledger.receipts("synthesize")
