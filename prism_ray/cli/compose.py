"""From `key=value` strings to checked settings, one line for whatever is wrong with them."""

import re
import typing
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any

from prism_ray.cli.files import CONF, GROUPS, first_lines, group_file, group_names, read_yaml
from prism_ray.cli.keys import expected, is_text, kind_of
from prism_ray.config import Config, Row
from prism_ray.errors import InputError, shortened
from prism_ray.identity import run_id
from prism_ray.validation import check_config

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
MOST_CHARACTERS = 20_000
"""Of one override; what is longer belongs into a recipe file."""


@dataclass(frozen=True)
class Column:
    """Settings that a suite crosses its rows with; `rows` names those it is for, None: all."""

    settings: list[str]
    rows: list[str] | None = None


@dataclass(frozen=True)
class Suite:
    """A benchmark: one recipe, and for each row of its table the settings that differ.

    With `columns` (say, architectures of the student) every row is run in each of them that is for it. With `seeds`
    every such cell is one run per seed, which decides images and students alike, and its results are pooled.
    `references` names the rows that scores compare with: `random_real`, `full_data`, and the `baseline` of paired
    differences.
    """

    name: str
    recipe: str
    rows: dict[str, list[str]]
    columns: dict[str, Column] = field(default_factory=dict)
    references: dict[str, str] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=list)


def compose(overrides: Sequence[str]) -> Config:
    """The checked settings of one run.

    Args:
        overrides: `key=value` strings; `recipe=` also takes the path of a YAML file.

    Raises:
        InputError: one line for anything unknown, malformed, of a wrong type or out of range.
    """
    import yaml
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    checked = [_checked_override(override) for override in overrides]
    # Hydra adds nothing to a mapping that is there, and merges one into it; see `_with_entry`.
    free = [override for override in checked if _is_free(override.partition("=")[0])]
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    ruled = [_stored_recipe(override, store) for override in checked if override not in free]
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            composed = hydra_compose("config", overrides=ruled)
        OmegaConf.set_struct(composed, False)
        for override in free:
            composed = _with_entry(composed, override)
        config = OmegaConf.to_object(composed)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise _refusal(error, overrides) from error
    assert isinstance(config, Config)
    check_config(config)
    return config


REFERENCES = ("random_real", "full_data", "baseline")
SHARED = ("recipe", "run_id", "suite", "storage", "stages", "compute", "export", "out", "repair")
"""Settings that the runs of a suite have in common."""


def compose_suite(overrides: Sequence[str]) -> tuple[Suite, list[Row]]:
    """A suite and its runs: row by row, each in its columns; with seeds all of them seed by seed.

    In that order a suite that is stopped early has all its cells, with fewer seeds.
    """
    names = [o.removeprefix("suite=") for o in overrides if o.startswith("suite=")]
    others = [o for o in overrides if not o.startswith("suite=")]
    if len(names) != 1:
        raise InputError(f"bench: needs suite=NAME once; known: {', '.join(group_names('suite'))}")
    if any(o.split("=")[0] in ("recipe", "run_id") for o in others):
        raise InputError("bench: recipe and run_id are the suite's to choose; leave them out")
    suite = load_suite(names[0])
    _refuse_shared(suite)
    columns: list[tuple[str | None, Column]] = [*suite.columns.items()] or [(None, Column([]))]
    planned = [
        (label, [*row, *column.settings, *others], name)
        for label, row in suite.rows.items()
        for name, column in columns
        if column.rows is None or label in column.rows
    ]
    if suite.seeds:
        _refuse_seeds(suite, [override for _, settings, _ in planned for override in settings])
    rows = [
        Row(label, _composed_cell(suite, label, settings, others=others), column) for label, settings, column in planned
    ]
    if suite.seeds:
        rows = [replace(row, config=_with_seed(row.config, seed)) for seed in suite.seeds for row in rows]
    known: dict[str, Row] = {}
    for row in rows:
        twin = known.setdefault(run_id(row.config), row)
        if twin is not row:
            cells = " and ".join("/".join(filter(None, (r.label, r.column))) for r in (twin, row))
            raise InputError(f"suite={suite.name}: {cells} have the same settings; change one, or leave it out")
    return suite, rows


def _composed_cell(suite: Suite, label: str, settings: Sequence[str], *, others: Sequence[str]) -> Config:
    """The settings of one row, in one of its columns; what is wrong with them is said with the row's name."""
    try:
        return compose([f"recipe={suite.recipe}", *settings])
    except InputError as error:
        if any(str(error).lstrip("'\"").startswith(override.partition("=")[0]) for override in others):
            raise  # the command's own
        raise InputError(f"suite={suite.name}: row {label!r}: {error}") from error


def _refuse_shared(suite: Suite) -> None:
    """Refuse settings of rows and columns that all runs of a command share, where only one row's would count."""
    parts = [*suite.rows.values(), *(column.settings for column in suite.columns.values())]
    for override in (override for settings in parts for override in settings):
        key = override.partition("=")[0]
        if key.partition(".")[0] in SHARED and key != "compute.threads":
            raise InputError(
                f"suite={suite.name}: {override}: is the same for all rows; leave it out, and give it with the command "
                "if it belongs there"
            )


def _refuse_seeds(suite: Suite, settings: Sequence[str]) -> None:
    for override in settings:
        if override.partition("=")[0] in ("seed", "student.seeds"):
            raise InputError(
                f"suite={suite.name}: {override}: the suite has seeds, which are those of its runs and their students; "
                "leave it out, or change the suite's seeds"
            )


def _with_seed(config: Config, seed: int) -> Config:
    return replace(config, seed=seed, student=replace(config.student, seeds=[seed]))


SUITE_KEYS = ("recipe", "rows", "columns", "references", "seeds")


def load_suite(name: str) -> Suite:
    """A suite by name or by the path of its YAML file."""
    content = read_yaml(group_file("suite", name))
    missing, unknown = {"recipe", "rows"} - set(content), set(content) - set(SUITE_KEYS)
    tables = [content.get(key, {}) for key in ("rows", "columns", "references")]
    well_formed = all(isinstance(table, dict) for table in tables) and all(map(_is_list, tables[0].values()))
    well_formed = well_formed and isinstance(content.get("recipe"), str)
    if missing or unknown or not content["rows"] or not well_formed:
        raise InputError(
            f"suite={name}: must hold 'recipe' and 'rows' (row name to a list of overrides), and may hold 'columns' "
            "(the same, or {rows: [row names], settings: [overrides]} for some rows), 'references' (which row is "
            "which) and 'seeds' (a list)"
        )
    rows = {str(label): [str(override) for override in row] for label, row in tables[0].items()}
    for label in rows:
        if not label.strip() or not label.isprintable():
            raise InputError(f"suite={name}: row {label!r}: is no name; expected printable text; rename it")
    columns = {str(key): _column(name, str(key), column, rows) for key, column in tables[1].items()}
    for label in rows:
        if columns and not any(column.rows is None or label in column.rows for column in columns.values()):
            raise InputError(f"suite={name}: row {label!r} is in no column; name it in one, or leave the row out")
    references = {str(k): str(v) for k, v in tables[2].items()}
    for key, row in references.items():
        if key not in REFERENCES or row not in rows:
            raise InputError(
                f"suite={name}: references.{key}={row}: expected {', '.join(REFERENCES)} and the name of a row "
                f"({', '.join(rows)})"
            )
    return Suite(Path(name).stem, content["recipe"], rows, columns, references, _seeds(name, content.get("seeds", [])))


def _column(suite: str, name: str, content: Any, rows: Mapping[str, list[str]]) -> Column:
    """A column from a list of overrides, or from such a list and the rows that it is for."""
    if _is_list(content):
        return Column([str(override) for override in content])
    is_sparse = isinstance(content, dict) and set(content) == {"rows", "settings"}
    if not is_sparse or not all(map(_is_list, content.values())):
        raise InputError(
            f"suite={suite}: columns.{name}: expected a list of overrides, or "
            "{rows: [row names], settings: [overrides]}"
        )
    settings, chosen = ([str(entry) for entry in content[key]] for key in ("settings", "rows"))
    for label in chosen:
        if label not in rows:
            raise InputError(f"suite={suite}: columns.{name}.rows: no row {label!r}; known: {', '.join(rows)}")
    return Column(settings, chosen)


def _seeds(suite: str, seeds: Any) -> list[int]:
    if not _is_list(seeds) or any(type(seed) is not int for seed in seeds) or len(set(seeds)) < len(seeds):
        raise InputError(f"suite={suite}: seeds={seeds}: expected a list of integers, none of them twice")
    return seeds


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _checked_override(override: str) -> str:
    """Refuse what would be misread or accepted in silence, with the nearest key that exists."""
    key, separator, value = override.partition("=")
    if any(unicodedata.category(c) == "Cc" for c in override):
        raise InputError(f"{override!r}: holds a control character; expected one line of plain text; leave it out")
    if len(override) > MOST_CHARACTERS:
        raise InputError(
            f"{shortened(override, 40)!r}: has {len(override)} characters; expected at most {MOST_CHARACTERS}; write "
            "it into a recipe file"
        )
    if key.startswith(("+", "~")):
        raise InputError(f"{override!r}: settings can't be added or deleted; write key=value with a known key")
    if not separator or not NAME.fullmatch(key) or value.startswith("="):
        raise InputError(f"{override!r}: not an override; expected key=value")
    if "${" in value or "_target_" in override:
        raise InputError(f"{override!r}: interpolations and _target_ are not allowed; write the value itself")
    if key in GROUPS:
        group_file(key, value)
    elif key == "suite":
        raise InputError("suite=...: belongs to the verb bench")
    elif is_text(kind_of(key)) and value != "null" and value[:1] not in ("'", '"'):
        return f"{key}={_quoted(value)}"  # a path may hold characters that Hydra's grammar wants quoted
    else:
        _check_syntax(override)
    return override


def _check_syntax(override: str) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_override(override)
    except (HydraException, ValueError, RecursionError) as error:
        reason = shortened(error)
        raise InputError(
            f"{shortened(override)!r}: not readable ({reason}); expected key=value, with lists as [a,b] and mappings "
            "as {a:1}"
        ) from error
    if parsed.is_sweep_override():
        raise InputError(f"{override!r}: one value only; write a list as [a,b], and compare settings with a suite")


def _quoted(text: str) -> str:
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(text, Quote.single).with_quotes()


def _is_free(key: str) -> bool:
    """Whether a key lies in a mapping of names of the user's own, such as `teachers.models` and `model_args`."""
    parts = key.split(".")
    heads = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return key not in GROUPS and any(typing.get_origin(kind_of(head)) is dict for head in heads)


def _with_entry(composed: Any, override: str) -> Any:
    """The settings with an entry of such a mapping set: arguments are replaced, a teacher is added or completed."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    key = override.partition("=")[0]
    value = OverridesParser.create().parse_override(override).value()
    kind = kind_of(key)
    if (typing.get_origin(kind) is dict or is_dataclass(kind)) and not isinstance(value, dict):
        raise InputError(f"{override}: not allowed; expected {expected(kind)}")
    if kind == dict[str, Any]:
        # Arguments of another architecture would be of no use to this one.
        composed = OmegaConf.merge(composed, _nested(key, {}))
        OmegaConf.update(composed, key, value, merge=False)
        return composed
    return OmegaConf.merge(composed, _nested(key, value))


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _refusal(error: BaseException, overrides: Sequence[str]) -> InputError:
    """One line for what Hydra or OmegaConf refused: key, value, what was expected."""
    missing = getattr(error, "missing_cfg_file", None)
    if missing:
        known = ", ".join(getattr(error, "options", None) or [])
        return InputError(f"recipe: its defaults name {missing}, which does not exist; known: {known}")
    key, reason = None, first_lines(error)
    cause: BaseException | None = error
    while cause is not None and key is None:
        key = getattr(cause, "full_key", None)
        reason = first_lines(cause, 1) if key else reason
        cause = cause.__cause__ or cause.__context__
    key = (key or "").partition("[")[0]
    given = [override for override in overrides if override.startswith(f"{key}=")]
    try:
        wanted = f"expected {expected(kind_of(key))}"
    except InputError:
        wanted = "see prism_ray/config.py for keys and types"
    return InputError(f"{given[-1]}: not allowed; {wanted}" if given else f"{key or 'settings'}: {reason}; {wanted}")


def _stored_recipe(override: str, store: Any) -> str:
    """A recipe given as a path becomes a named one; its content is data: no targets, no interpolation."""
    key, _, value = override.partition("=")
    if key != "recipe" or value in group_names("recipe"):
        return override
    path = Path(value)
    content = read_yaml(path)
    _check_defaults(path, content.get("defaults", []))
    name = re.sub(r"[^A-Za-z0-9_]", "_", path.stem)
    for key in _keys_within(content):
        try:
            kind_of(key)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
    content.setdefault("recipe_name", name)
    store.store(group="recipe", name=name, package="_global_", node=content)
    return f"recipe={name}"


def _check_defaults(path: Path, defaults: Any) -> None:
    """Refuse all but shipped presets in what a recipe builds on: Hydra would take files and settings of its own too."""
    expected = "expected a list of shipped recipes and of 'override /GROUP: NAME'"
    if not isinstance(defaults, list):
        raise InputError(f"{path}: defaults: {defaults!r} is no list; {expected}")
    for entry in defaults:
        if entry == "_self_":
            continue
        option = entry if isinstance(entry, dict) else {"override /recipe": entry}
        if len(option) != 1:
            raise InputError(f"{path}: defaults: {entry!r} is not one entry; {expected}")
        ((key, name),) = option.items()
        group = str(key).removeprefix("override /")
        if group == key or group not in GROUPS or not isinstance(name, str) or "/" in name:
            raise InputError(f"{path}: defaults: {entry!r} is no preset; {expected}")
        try:
            group_file(group, name)
        except InputError as error:
            raise InputError(f"{path}: defaults: {error}") from error


def _keys_within(content: dict[Any, Any], prefix: str = "") -> Iterator[str]:
    """Dotted keys of a recipe's settings."""
    for key, value in content.items():
        if prefix or key != "defaults":
            yield f"{prefix}{key}"
            if isinstance(value, dict):
                yield from _keys_within(value, f"{prefix}{key}.")
