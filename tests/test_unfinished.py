"""What long units keep on the way: another attempt goes on from it to the same bytes; nothing wrong is ever used."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from commands import SMOKE, Command, products, spec_of_copy

from prism_ray import cli, drain
from prism_ray.errors import Drained
from prism_ray.ledger import UNFINISHED
from prism_ray.runs import Row, locate
from prism_ray.stages.synthesize import Synthesizer
from prism_ray.stages.unfinished import Unfinished, packed, unpacked
from prism_ray.work import RunSpec

SETTINGS = [*SMOKE, "images_per_class=1", "method.iterations=12", "method.init=noise", "compute.unit_checkpoint_s=1e9"]
TENSORS = {"iteration": torch.tensor(3), "x": torch.arange(12.0).reshape(3, 4), "half": torch.ones(2).bfloat16()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Storage with one finished run. Not to be written to."""
    storage = tmp_path_factory.mktemp("unfinished") / "outputs"
    assert cli.main(["run", *SETTINGS, "stages=[prepare,teach,synthesize]", f"storage={storage}"]) == 0
    return storage


@pytest.fixture
def spec(finished: Path, tmp_path: Path) -> RunSpec:
    return spec_of_copy(finished, tmp_path / "copy", SETTINGS)


@pytest.fixture
def leaves_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Says after how many questions this process is told to leave."""

    def set_count(count: int) -> None:
        asked = iter(range(10**9))
        drain.watch(lambda: next(asked) >= count)

    monkeypatch.setattr(drain, "_is_leaving", None)
    return set_count


def counted(synthesizer: Synthesizer, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The iterations that a synthesizer does from now on."""
    done: list[int] = []
    own = synthesizer._guides
    monkeypatch.setattr(synthesizer, "_guides", lambda unit, n: (done.append(n), own(unit, n))[1])
    return done


def content(table: pa.Table) -> list[dict]:
    return table.to_pylist()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"statistics_ema": 0.9},
        {"residual_parts": 3, "residual_scale": 0.5},
    ],
    ids=["plain", "averaged statistics", "residual parts"],
)
@pytest.mark.parametrize("iterations", [1, 7])
def test_a_unit_that_had_to_leave_goes_on_where_it_was_to_the_same_bytes(
    iterations: int,
    changes: dict,
    spec: RunSpec,
    leaves_after: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = replace(spec, config=replace(spec.config, method=replace(spec.config.method, **changes)))
    unit = spec.units()[1]
    whole, _ = Synthesizer(spec).compute(unit)
    first = Synthesizer(spec)
    leaves_after(iterations - 1)
    with pytest.raises(Drained):
        first.compute(unit)
    key = f"{UNFINISHED}/synthesize/{unit.name}.safetensors"
    assert spec.ledger().store.size(key)

    leaves_after(10**9)
    second = Synthesizer(spec)
    done = counted(second, monkeypatch)
    table, receipt = second.compute(unit)
    assert done == list(range(iterations, 12))
    assert content(table) == content(whole)
    assert receipt.details["cpu_s"] > 0
    second.forget()
    assert spec.ledger().store.size(key) is None


def flipped(data: bytes) -> bytes:
    return data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]


WRONG: dict[str, Callable[[bytes], bytes]] = {
    "one bit": flipped,
    "cut off": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "not ours": lambda data: b"PAR1" + data,
    "huge header": lambda data: b"\xff" * 8 + data[8:],
}


@pytest.mark.parametrize("fault", WRONG)
def test_what_is_damaged_is_not_used(
    fault: str, spec: RunSpec, leaves_after: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    unit = spec.units()[0]
    leaves_after(4)
    with pytest.raises(Drained):
        Synthesizer(spec).compute(unit)
    store, key = spec.ledger().store, f"{UNFINISHED}/synthesize/{unit.name}.safetensors"
    store.put(key, WRONG[fault](store.read(key)))
    leaves_after(10**9)
    again = Synthesizer(spec)
    done = counted(again, monkeypatch)
    table, _ = again.compute(unit)
    assert done == list(range(12))
    assert content(table) == content(Synthesizer(spec).compute(unit)[0])


@pytest.mark.parametrize("fault", [*WRONG, "another identity"])
def test_a_file_is_read_back_or_refused(fault: str) -> None:
    data = packed(TENSORS, identity="this", seconds=2.0, cpu_s=1.5)
    kept = unpacked(data, identity="this")
    assert kept is not None
    assert (kept.seconds, kept.cpu_s) == (2.0, 1.5)
    assert all(torch.equal(kept.tensors[name], tensor) for name, tensor in TENSORS.items())
    if fault == "another identity":
        assert unpacked(data, identity="that") is None
    else:
        assert unpacked(WRONG[fault](data), identity="this") is None


def test_what_was_kept_of_other_settings_is_not_used(
    spec: RunSpec, leaves_after: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    unit = spec.units()[0]
    leaves_after(4)
    with pytest.raises(Drained):
        Synthesizer(spec).compute(unit)
    leaves_after(10**9)
    other = replace(spec, config=replace(spec.config, method=replace(spec.config.method, lr=0.123)))
    unit = other.units()[0]
    again = Synthesizer(other)
    done = counted(again, monkeypatch)
    again.compute(unit)
    assert done == list(range(12))


def test_a_unit_that_fails_begins_again_from_its_start(spec: RunSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    compute = replace(spec.config.compute, unit_checkpoint_s=0.0)
    spec = replace(spec, config=replace(spec.config, compute=compute))
    unit, synthesizer = spec.units()[0], Synthesizer(spec)
    own = synthesizer._guides

    def failing(unit: object, iteration: int) -> object:
        if iteration == 5:
            raise RuntimeError("a fault of the unit")
        return own(unit, iteration)  # type: ignore[arg-type]

    monkeypatch.setattr(synthesizer, "_guides", failing)
    with pytest.raises(RuntimeError, match="a fault of the unit"):
        synthesizer.compute(unit)
    assert spec.ledger().store.keys(UNFINISHED) == []


def test_short_units_keep_nothing_and_null_switches_it_off(
    spec: RunSpec, leaves_after: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[str] = []
    monkeypatch.setattr(type(spec.ledger().store), "put", lambda self, key, data: kept.append(key))
    Synthesizer(spec).compute(spec.units()[0])
    assert kept == []
    leaves_after(0)
    off = replace(spec, config=replace(spec.config, compute=replace(spec.config.compute, unit_checkpoint_s=None)))
    Synthesizer(off).compute(off.units()[0])
    assert kept == []


def test_a_run_that_keeps_its_state_all_the_time_has_the_same_bytes_and_leaves_nothing(
    finished: Path, prism: Command, tmp_path: Path
) -> None:
    settings = [s for s in SETTINGS if "checkpoint" not in s]
    done = prism("run", *settings, "stages=[prepare,teach,synthesize]", "compute.unit_checkpoint_s=0")
    assert done.code == 0, done.err
    (mine,), (theirs,) = ((s / "runs").iterdir() for s in (tmp_path / "outputs", finished))
    assert products(mine) == products(theirs) != {}
    assert not list((mine / UNFINISHED).rglob("*.safetensors"))


def test_seconds_of_earlier_attempts_are_counted(spec: RunSpec) -> None:
    ledger = spec.ledger()
    first = Unfinished(ledger, "synthesize", "unit", identity="i", every_s=0.0)
    first.keep(lambda: TENSORS)
    key = f"{UNFINISHED}/synthesize/unit.safetensors"
    ledger.store.put(key, packed(TENSORS, identity="i", seconds=100.0, cpu_s=50.0))
    second = Unfinished(ledger, "synthesize", "unit", identity="i", every_s=0.0)
    assert second.found() is not None
    assert second.seconds > 100
    assert second.cpu_s >= 50


@pytest.mark.slow
def test_a_process_killed_inside_a_unit_loses_what_it_did_since_it_last_kept_something(
    finished: Path, tmp_path: Path
) -> None:
    """SIGKILL at whatever moment, three times; the last run goes on inside the unit, and the bytes are the same."""
    settings = [s for s in SETTINGS if "iterations" not in s and "checkpoint" not in s] + ["method.iterations=400"]
    storage = tmp_path / "outputs"
    command = [sys.executable, "-m", "prism_ray", "run", *settings, "stages=[prepare,teach,synthesize]"]
    killed_in = []
    for wait_s in (0.05, 0.7, 0.3):
        process = subprocess.Popen(
            [*command, f"storage={storage}", "compute.unit_checkpoint_s=0.2"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + 200
        while process.poll() is None and time.monotonic() < deadline:
            if list(storage.glob(f"runs/*/{UNFINISHED}/*/*.safetensors")):
                time.sleep(wait_s)
                break
            time.sleep(0.02)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=60)
        killed_in.append(process.returncode)
    assert -signal.SIGKILL in killed_in
    subprocess.run([*command, f"storage={storage}", "compute.unit_checkpoint_s=0.2"], check=True, timeout=250)
    whole = tmp_path / "whole"
    subprocess.run([*command, f"storage={whole}", "compute.unit_checkpoint_s=null"], check=True, timeout=250)
    (mine,), (theirs,) = ((s / "runs").iterdir() for s in (storage, whole))
    assert products(mine) == products(theirs) != {}
    assert locate(Row("row", cli.compose([*settings, f"storage={storage}"]))).ledger.quarantined() == []
