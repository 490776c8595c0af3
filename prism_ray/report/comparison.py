"""Runs side by side: what their rows share, and in which settings they differ."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, get_args, get_origin, get_type_hints

from prism_ray.config import Config
from prism_ray.errors import InputError
from prism_ray.identity import IMAGE_SETTINGS
from prism_ray.report.contents import RunSummary, TeacherFacts

COLUMNS = ("student.labels",)
"""Settings that say which columns of a row are filled, and change nothing in them."""
PROTOCOL = {
    "dataset": "data-set",
    "teachers": "teacher",
    "teach": "teacher-training",
    "labels": "label",
    "student": "student",
    "evaluate": "evaluation",
    "compute": "compute",
}
"""Groups of settings that must be equal for a fair comparison; the others (method, images_per_class) are compared."""
COMPARED = ("label", "student")
"""Those of them that a suite may compare on purpose."""


@dataclass(frozen=True)
class Difference:
    """A setting that is not the same in every run; values as text, in the order of the runs."""

    key: str
    values: list[str]
    is_protocol: bool


@dataclass(frozen=True)
class TeacherRow:
    """A teacher and its roles in each run that has it."""

    facts: TeacherFacts
    roles: list[tuple[str, list[str]]]  # (run label, roles); a single entry without label if all runs agree


def check_comparable(summaries: Sequence[RunSummary]) -> None:
    """Refuse runs that have no common table.

    Raises:
        InputError: no run, two rows with one name, or different classes or test images.
    """
    if not summaries:
        raise InputError("report: there is no run to report; finish the evaluate stage of at least one run first")
    first, names = summaries[0], set()
    for summary in summaries:
        if summary.name in names:
            raise InputError(f"report: two runs have the label {summary.name!r}; give each run a name of its own")
        names.add(summary.name)
        for name in ("name", "class_names", "image_size", "channels", "num_test", "class_ids"):
            if getattr(summary.dataset, name) != getattr(first.dataset, name):
                raise InputError(
                    f"report: runs {first.run_id} and {summary.run_id} differ in dataset.{name}; "
                    "report runs on different data separately"
                )


def differences(summaries: Sequence[RunSummary]) -> list[Difference]:
    """Every setting that affects the output and is not the same in all runs, in the order of the first config."""
    configs = [flat_config(summary.config) for summary in summaries]
    keys = list(dict.fromkeys(key for config in configs for key in config))
    found = []
    for key in keys:
        values = [config.get(key, "") for config in configs]
        if len(set(values)) > 1 and key != "recipe_name" and affects_output(key):
            found.append(Difference(key, values, key.split(".")[0] in PROTOCOL and key not in COLUMNS))
    return found


def protocol_groups(found: Sequence[Difference]) -> dict[str, list[str]]:
    """The protocol's settings that differ, by the name of their group and without it: `student`: `arch`, `lr`."""
    groups: dict[str, list[str]] = {}
    for difference in found:
        if difference.is_protocol:
            group, _, setting = difference.key.partition(".")
            groups.setdefault(PROTOCOL[group], []).append(setting or group)
    return groups


def crossed(summaries: Sequence[RunSummary]) -> tuple[list[str], dict[str, dict[str, RunSummary]]]:
    """Names of the columns, and each row's runs by column; nothing where rows aren't crossed with columns."""
    columns = list(dict.fromkeys(s.column for s in summaries if s.column is not None))
    rows: dict[str, dict[str, RunSummary]] = {}
    for summary in summaries:
        if summary.column is not None:
            rows.setdefault(summary.label, {})[summary.column] = summary
    return columns, rows


def one_per_image_set(summaries: Sequence[RunSummary]) -> list[RunSummary]:
    """The first run of each set of images, named by what its runs share: their row, their column, else itself."""
    sets: dict[str, list[RunSummary]] = {}
    for summary in summaries:
        made_by = {key: value for key, value in summary.config.items() if key in IMAGE_SETTINGS}
        sets.setdefault(json.dumps([summary.method, made_by], sort_keys=True), []).append(summary)
    found = []
    for runs in sets.values():
        first, labels, columns = runs[0], {run.label for run in runs}, {run.column for run in runs}
        name = first.label if len(labels) == 1 else first.column if len(columns) == 1 else first.name
        found.append(replace(first, label=name or first.name, column=None))
    if len({summary.label for summary in found}) < len(found):  # a row whose columns differ in their images
        firsts = [runs[0] for runs in sets.values()]
        return [replace(first, label=first.name, column=None) for first in firsts]
    return found


def flat_config(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Every leaf by dotted key, its value as it would be given on the command line."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= flat_config(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return flat


def affects_output(key: str) -> bool:
    """Whether a dotted setting is part of the config hash; a key the schema does not know is taken to be."""
    kind: Any = Config
    for part in key.split("."):
        if is_dataclass(kind):
            setting = next((f for f in fields(kind) if f.name == part), None)
            if setting is None:
                return True
            if not setting.metadata["output"]:
                return False
            kind = get_type_hints(kind)[part]
        else:  # a dict of settings by name, or a free one
            kind = get_args(kind)[1] if get_origin(kind) is dict else None
    return True


def teacher_rows(summaries: Sequence[RunSummary]) -> list[TeacherRow]:
    """Each distinct teacher once; two networks of one name but other weights are two teachers."""
    roles: dict[tuple[str, str], list[tuple[str, list[str]]]] = {}
    facts: dict[tuple[str, str], TeacherFacts] = {}
    for summary in summaries:
        for teacher in summary.teachers:
            key = (teacher.name, teacher.sha256)
            facts.setdefault(key, teacher)
            roles.setdefault(key, []).append((summary.name, teacher.roles))
    rows = []
    for key, teacher in facts.items():
        by_run = roles[key]
        agree = len(by_run) == len(summaries) and all(entry == by_run[0][1] for _, entry in by_run)
        rows.append(TeacherRow(teacher, [("", by_run[0][1])] if agree else by_run))
    return rows


def renamed_weights(summaries: Sequence[RunSummary]) -> list[str]:
    """Names of teachers whose weights are not the same in all runs."""
    weights: dict[str, set[str]] = {}
    for summary in summaries:
        for teacher in summary.teachers:
            weights.setdefault(teacher.name, set()).add(teacher.sha256)
    return [name for name, hashes in weights.items() if len(hashes) > 1]
