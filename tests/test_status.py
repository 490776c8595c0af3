"""Which state a run is in, who works on it, what to do next; and the log of its changes of state."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import SMOKE, Command

from prism_ray import cli
from prism_ray.config import Row
from prism_ray.errors import Drained, PrismError
from prism_ray.ledger import EVENTS, Ledger
from prism_ray.lock import RunLock, look_at_owner
from prism_ray.pipeline import noted_end
from prism_ray.runs import locate
from prism_ray.status import STATES
from prism_ray.storage import LocalStore

SOURCES = Path(cli.__file__).parent.parent
GONE = (
    "import sys; from prism_ray.lock import RunLock; from prism_ray.storage import LocalStore;"
    "RunLock(LocalStore(sys.argv[1]), name='r', lease_s=30).acquire()"
)


def state(text: str) -> str:
    found = re.match(r"run \S+: ([a-z ]+), in ", text)
    assert found is not None, text
    return found[1]


def next_command(text: str) -> list[str]:
    """The command that the last line gives, without the program's name."""
    label, _, command = text.splitlines()[-1].strip().partition(" ")
    assert label == "next"
    program, *arguments = shlex.split(command, comments=True)
    assert program == "prism-ray"
    return arguments


def events(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]


def unfinished(run_dir: Path) -> None:
    """As it would be had its command ended before the last labels."""
    (run_dir / "manifest.json").unlink()
    (run_dir / "receipts/relabel/train-00003-of-00004.json").unlink()


def test_a_finished_run_is_done(prism: Command, run_dir: Path) -> None:
    looked = prism("status")
    assert (looked.code, state(looked.out)) == (0, "done")
    assert next_command(looked.out)[0] == "export"


def test_a_run_of_which_something_is_left_is_partial_and_says_how_to_go_on(prism: Command, run_dir: Path) -> None:
    unfinished(run_dir)
    looked = prism("status")
    assert state(looked.out) == "partial"
    assert "relabel     3/4 units" in looked.out
    again = prism.bare(*next_command(looked.out))
    assert again.code == 0
    assert state(prism("status").out) == "done"


def test_a_run_that_is_worked_on_is_locked_by_whom_and_since_when(prism: Command, run_dir: Path) -> None:
    unfinished(run_dir)
    with RunLock(LocalStore(run_dir), name="r", lease_s=30):
        looked = prism("status")
    assert state(looked.out) == "locked"
    assert re.search(rf"lock +process {os.getpid()} on {socket.gethostname()} since \d{{4}}-\S+, at work", looked.out)
    assert f"next        kill {os.getpid()} " in looked.out
    assert state(prism("status").out) == "partial", "released"


def test_a_run_whose_command_died_is_stale_and_the_next_one_takes_it_over(prism: Command, run_dir: Path) -> None:
    unfinished(run_dir)
    subprocess.run([sys.executable, "-c", GONE, str(run_dir)], check=True, timeout=60)
    looked = prism("status")
    assert state(looked.out) == "stale"
    assert ", gone" in looked.out
    assert next_command(looked.out)[0] == "run"
    assert prism("run", "stages=[prepare]").code == 0
    taken = [event for event in events(run_dir) if event["event"] == "taken_over"]
    assert [(event["epoch"], event["replaced"]) for event in taken] == [(3, 2)]


def test_a_run_without_a_unit_is_quarantined_with_the_reason_and_retry_forgets_it(
    prism: Command, run_dir: Path
) -> None:
    ledger, name = Ledger(LocalStore(run_dir)), "train-00003-of-00004"
    ledger.quarantine("relabel", name, "x", ["it burns"] * 3)
    looked = prism("status")
    assert state(looked.out) == "quarantined"
    assert f"relabel {name}, 3 attempts: it burns" in looked.out
    assert "relabel     4/4 units, 1 quarantined" in looked.out
    again = prism.bare(*next_command(looked.out))
    assert again.code == 0
    assert "1 quarantined units may be tried again" in again.out
    assert state(prism("status").out) == "done"
    assert [event["units"] for event in events(run_dir) if event["event"] == "retried"] == [[f"relabel {name}"]]


def test_a_run_that_verify_found_damaged_says_so_and_how_to_repair_it(prism: Command, run_dir: Path) -> None:
    key = "images/train-00000-of-00004.parquet"
    (run_dir / key).write_bytes(b"")
    assert prism("verify").code == 1
    looked = prism("status")
    assert state(looked.out) == "damaged"
    assert f"damaged     {key}: has 0 bytes" in looked.out
    assert prism.bare(*next_command(looked.out)).code == 0
    assert state(prism("status").out) == "done"
    told = [event["event"] for event in events(run_dir)]
    for kind in ("damaged", "set_aside", "repaired"):
        assert kind in told
    assert told[-1] == "finished"


def test_a_manifest_that_lists_other_objects_is_found_and_written_again(prism: Command, run_dir: Path) -> None:
    path = run_dir / "manifest.json"
    before = path.read_bytes()
    listed = json.loads(before)
    listed["synthesize"][0]["sha256"] = "0" * 64
    path.write_text(json.dumps(listed))
    looked = prism("verify")
    assert (looked.code, "manifest.json: synthesize: lists other objects" in looked.out) == (1, True)
    assert prism("run").code == 0
    assert path.read_bytes() == before
    assert prism("verify").code == 0


def test_a_run_that_has_not_prepared_its_data_has_a_state_too(prism: Command, storage: Path, run_dir: Path) -> None:
    unfinished(run_dir)
    (folder,) = (storage / "artifacts/datasets").iterdir()
    folder.rename(storage / "elsewhere")
    looked = prism("status")
    assert (looked.code, state(looked.out)) == (0, "partial")
    assert "prepare     0/1 data sets" in looked.out


def test_a_suite_has_a_line_for_every_run(prism: Command, run_dir: Path, tmp_path: Path) -> None:
    suite = tmp_path / "mine.yaml"
    suite.write_text("recipe: digits_smoke\nrows: {made: [method=prism], not yet: [method=sre2l]}\n")
    looked = prism.bare("status", f"suite={suite}", "compute=inline", f"storage={run_dir.parent.parent}")
    assert looked.code == 0
    assert "suite mine: 2 runs, 1 not begun, 1 done" in looked.out
    assert f"made  done: {run_dir.name} (prepare 1/1" in looked.out
    assert "not yet  not begun: digits_smoke-sre2l-" in looked.out
    assert next_command(looked.out)[:2] == ["bench", f"suite={suite}"]


def test_every_state_is_explained() -> None:
    assert set(STATES) == {"not begun", "locked", "stale", "partial", "damaged", "quarantined", "done"}


# Owners whose process can't be seen


@pytest.mark.parametrize("is_alive", [True, False])
def test_an_owner_elsewhere_is_alive_if_its_heart_beats(tmp_path: Path, is_alive: bool) -> None:
    store = LocalStore(tmp_path)
    subprocess.run([sys.executable, "-c", GONE, str(tmp_path)], check=True, timeout=60)
    (epoch,) = tmp_path.glob("lock/*.epoch")
    epoch.write_text(json.dumps(json.loads(epoch.read_text()) | {"host": "another"}))
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if is_alive:
            epoch.with_suffix(".beat").write_text('{"beats": 99}')

    owner = look_at_owner(store, lease_s=30, sleep=sleep)
    assert owner is not None
    assert (owner.is_here, owner.is_alive, owner.host) == (False, is_alive, "another")
    assert 2 <= sum(slept) <= 10
    assert ("at work" if is_alive else "silent") in owner.described()


# Events


def test_a_run_logs_its_way_from_its_beginning_to_its_end(prism: Command, run_dir: Path) -> None:
    told = events(run_dir)
    kinds = [event["event"] for event in told]
    assert (kinds[0], kinds[-1]) == ("begun", "finished")
    stages = [(event["event"], event["stage"]) for event in told if event["event"].startswith("stage")]
    for stage in ("teach", "synthesize", "distill"):
        assert stages.index(("stage", stage)) < stages.index(("stage_ended", stage))
    assert [event["at"] for event in told] == sorted(event["at"] for event in told)
    assert prism("run").code == 0
    assert events(run_dir) == told, "nothing changed"


def test_every_kind_of_event_is_documented_and_none_that_never_occurs() -> None:
    text = "".join(path.read_text() for path in SOURCES.rglob("*.py"))
    used = set(re.findall(r'(?:\.event|\bnote)\((?:[a-z.]+, )?\s*"([a-z_]+)"', text)) | {
        "drained",
        "failed",
        "interrupted",
    }
    assert used == set(EVENTS)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (lambda: Drained("asked to stop"), "drained"),
        (lambda: KeyboardInterrupt(), "interrupted"),
        (lambda: PrismError("no space left"), "failed"),
    ],
)
def test_a_command_that_ends_early_leaves_a_line(tmp_path: Path, error: Callable[[], BaseException], kind: str) -> None:
    run = locate(Row("", cli.compose([*SMOKE, f"storage={tmp_path}"])))
    with pytest.raises(type(error())), noted_end([run]):
        raise error()
    (line,) = events(Path(run.store.url))
    assert line["event"] == kind
    assert line["reason"]
