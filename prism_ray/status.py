"""What state runs are in and what to do next, read from their folders alone: verb status."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prism_ray.artifacts import is_complete
from prism_ray.config import Config, Row
from prism_ray.data.prepared import find_prepared
from prism_ray.ledger import DAMAGED
from prism_ray.lock import Owner, look_at_owner
from prism_ray.plan import used_teachers
from prism_ray.runs import Run, locate, require
from prism_ray.storage import read_json
from prism_ray.work import RELABEL, SYNTHESIZE, lost_images

STATES = {
    "not begun": "no command has worked on it",
    "locked": "a command works on it now",
    "stale": "the command that worked on it is gone without saying so",
    "partial": "something is left to do, and nobody does it",
    "damaged": "verify found objects that differ from their receipts",
    "quarantined": "finished, without the units that were given up",
    "done": "finished: everything is there",
}
"""What `status` calls a run, and what it means; the first that applies, from the top."""


@dataclass(frozen=True)
class Stage:
    """How far a stage of a run is."""

    name: str
    done: int
    total: int
    what: str
    given_up: int = 0


def status_text(config: Config, overrides: Sequence[str]) -> str:
    """State, lock, every stage, what was given up, and the command to go on with.

    Args:
        overrides: those of the command line, for that command.
    """
    run = require(config)
    owner = look_at_owner(run.store, lease_s=config.compute.lease_s)
    state, stages, given_up = state_of(run, owner), stages_of(run), run.ledger.quarantined()
    lines = [f"run {run.name}: {state}, in {run.store.url}", f"  {STATES[state]}"]
    if owner is not None and state in ("locked", "stale"):
        lines.append(f"  lock        {owner.described()}")
    for stage in stages:
        without = f", {stage.given_up} quarantined" if stage.given_up else ""
        lines.append(f"  {stage.name:10}  {stage.done}/{stage.total} {stage.what}{without}")
    lines.append(f"  quarantine  {len(given_up)} units")
    lines += [f"    {e['stage']} {e['name']}, {e['attempts']} attempts: {e['reason']}" for e in given_up]
    lines += [f"  no image    {e['image_id']}: {e['reason']}" for e in lost_images(run.ledger.receipts(SYNTHESIZE))]
    damaged = read_json(run.store, DAMAGED, list[dict[str, str]]) or []
    lines += [f"  damaged     {entry['key']}: {entry['problem']}" for entry in damaged]
    lines.append(f"  next        {_next(state, owner, overrides)}")
    return "\n".join(lines)


def suite_status_text(title: str, rows: Sequence[Row], overrides: Sequence[str]) -> str:
    """A line for every run of a suite, and the command to go on with."""
    lines, states = [], []
    for row in rows:
        run = locate(row)
        owner, stages = None, []
        if run.store.size("config.yaml") is not None:
            run, owner = require(row.config), look_at_owner(run.store, lease_s=row.config.compute.lease_s)
            stages = stages_of(run)
        states.append(state_of(run, owner))
        cell = "/".join(filter(None, (row.label, row.column)))
        counts = ", ".join(f"{stage.name} {stage.done}/{stage.total}" for stage in stages)
        lines.append(f"  {cell}  {states[-1]}: {run.name}{f' ({counts})' if counts else ''}")
    counted = ", ".join(f"{states.count(state)} {state}" for state in STATES if state in states)
    command = _command("bench", overrides)
    if set(states) == {"done"}:
        command = f"nothing is left to do; for the report again: {command}"
    return "\n".join([f"{title}: {len(rows)} runs, {counted}", *lines, f"  next  {command}"])


def state_of(run: Run, owner: Owner | None) -> str:
    """The first of `STATES` that applies."""
    holds: dict[str, Callable[[], bool]] = {
        "not begun": lambda: run.store.size("config.yaml") is None,
        "locked": lambda: owner is not None and owner.is_alive,
        "damaged": lambda: run.store.size(DAMAGED) is not None,
        "quarantined": lambda: run.ledger.manifest() is not None and bool(run.ledger.quarantined()),
        "done": lambda: run.ledger.manifest() is not None,
        "stale": lambda: owner is not None,
    }
    return next((state for state, applies in holds.items() if applies()), "partial")


def stages_of(run: Run) -> list[Stage]:
    """How far every stage is, as far as it is known before the data are prepared."""
    run.dataset = find_prepared(run.config.dataset, run.artifacts_dir)
    stages = [Stage("prepare", int(run.dataset is not None), 1, "data sets")]
    if run.dataset is None:
        return stages
    run.teacher_dirs = {name: run.teacher_folder(name) for name in used_teachers(run.config)}
    taught = sum(is_complete(folder) for folder in run.teacher_dirs.values())
    stages.append(Stage("teach", taught, len(run.teacher_dirs), "networks"))
    given_up = [entry["stage"] for entry in run.ledger.quarantined()]
    for name in (SYNTHESIZE, RELABEL) if run.needs_labels() else (SYNTHESIZE,):
        done = len(run.done_units(name))
        stages.append(Stage(name, done, len(run.units), "units", given_up.count(name)))
    students = run.students()
    stages.append(Stage("distill", sum(item.is_done for item in students), len(students), "networks"))
    return stages


def _next(state: str, owner: Owner | None, overrides: Sequence[str]) -> str:
    """One command line to copy."""
    if state == "locked":
        assert owner is not None
        return f"kill {owner.pid}  # or wait; the same command continues" if owner.is_here else "wait for it to end"
    verbs = {
        "damaged": ("verify", "repair=true"),
        "quarantined": ("retry",),
        "done": ("export",),
    }
    verb, *more = verbs.get(state, ("run",))
    return _command(verb, [*overrides, *more])


def _command(verb: str, overrides: Sequence[str]) -> str:
    return shlex.join(["prism-ray", verb, *overrides])
