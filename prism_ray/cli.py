"""Verbs and their settings: `prism-ray VERB [key=value ...]`. The only module that knows Hydra.

Everything heavy is imported inside the verb that needs it, after the settings were checked, so that help and a refused
setting answer at once.
"""

import difflib
import os
import re
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from prism_ray import __version__
from prism_ray.config import Config, check_config
from prism_ray.errors import ExitCode, InputError, PrismError, one_line
from prism_ray.signals import leave

CONF = Path(__file__).parent / "conf"
GROUPS = ("recipe", "dataset", "method", "compute")
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Suite:
    """A benchmark: one recipe, and for each row of its table the settings that differ."""

    name: str
    recipe: str
    rows: dict[str, list[str]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns its exit code and prints errors as one line."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(help_text())
        return ExitCode.done
    if arguments[0] in ("-V", "--version"):
        print(__version__)
        return ExitCode.done
    try:
        return int(_run_verb(arguments[0], arguments[1:]))
    except PrismError as error:
        print(f"prism-ray: {one_line(error)}", file=sys.stderr)
        return int(leave(error.exit_code))
    except KeyboardInterrupt:
        print("prism-ray: interrupted; run the same command to continue", file=sys.stderr)
        return int(leave(ExitCode.interrupted))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.failure


def _run_verb(verb: str, overrides: list[str]) -> ExitCode:
    if verb not in VERBS:
        raise InputError(f"{verb!r}: unknown verb{_nearest(verb, VERBS)}; known: {', '.join(VERBS)}")
    function, _ = VERBS[verb]
    if any(argument in ("-h", "--help") for argument in overrides):
        print(help_text())
        return ExitCode.done
    return function(overrides)


def help_text() -> str:
    """What `prism-ray --help` prints."""
    lines = [f"prism-ray {__version__}: makes training sets out of models", "", "  prism-ray VERB [key=value ...]", ""]
    lines += [f"  {verb:8} {text}" for verb, (_, text) in VERBS.items()]
    lines.append("")
    lines += [f"  {group}={'|'.join(_group_names(group))}" for group in (*GROUPS, "suite")]
    lines += [
        "",
        "  Any setting of prism_ray/config.py is a key: method.iterations=500 student.seeds=[0,1] storage=DIR",
        "  The same command, run again, continues. Exit codes: 0 done, 1 failure, 2 bad input, 3 done but units",
        "  quarantined, 75 stopped by SIGTERM (run again to continue), 130 interrupted.",
    ]
    return "\n".join(lines)


# Composition


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


def compose_suite(overrides: Sequence[str]) -> tuple[Suite, dict[str, Config]]:
    """A suite and the settings of each of its rows."""
    names = [o.removeprefix("suite=") for o in overrides if o.startswith("suite=")]
    others = [o for o in overrides if not o.startswith("suite=")]
    if len(names) != 1:
        raise InputError(f"bench: needs suite=NAME once; known: {', '.join(_group_names('suite'))}")
    if any(o.split("=")[0] in ("recipe", "run_id") for o in others):
        raise InputError("bench: recipe and run_id are the suite's to choose; leave them out")
    suite = load_suite(names[0])
    return suite, {label: compose([f"recipe={suite.recipe}", *row, *others]) for label, row in suite.rows.items()}


def load_suite(name: str) -> Suite:
    """A suite by name or by the path of its YAML file."""
    content = _read_yaml(_group_file("suite", name))
    wrong = set(content) ^ {"recipe", "rows"}
    if wrong or not isinstance(content["rows"], dict) or not content["rows"]:
        raise InputError(f"suite={name}: must hold exactly 'recipe' and 'rows' (row name to a list of overrides)")
    return Suite(Path(name).stem, content["recipe"], {str(k): [str(o) for o in v] for k, v in content["rows"].items()})


def _checked_override(override: str) -> str:
    """Refuse what would be misread or accepted in silence, with the nearest key that exists."""
    key, separator, value = override.partition("=")
    if key.startswith(("+", "~")):
        raise InputError(f"{override!r}: settings can't be added or deleted; write key=value with a known key")
    if not separator or not NAME.fullmatch(key) or value.startswith("="):
        raise InputError(f"{override!r}: not an override; expected key=value")
    if "${" in value or "_target_" in override:
        raise InputError(f"{override!r}: interpolations and _target_ are not allowed; write the value itself")
    if key in GROUPS:
        _group_file(key, value)
    elif key == "suite":
        raise InputError("suite=...: belongs to the verb bench")
    elif _is_text(_kind_of(key)) and value != "null" and value[:1] not in ("'", '"'):
        return f"{key}={_quoted(value)}"  # a path may hold characters that Hydra's grammar wants quoted
    else:
        _check_syntax(override)
    return override


def _check_syntax(override: str) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{override!r}: not readable ({reason}); expected key=value, with lists as [a,b] and mappings as {{a:1}}"
        ) from error
    if parsed.is_sweep_override():
        raise InputError(f"{override!r}: one value only; write a list as [a,b], and compare settings with a suite")


def _quoted(text: str) -> str:
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(text, Quote.single).with_quotes()


def _is_text(kind: Any) -> bool:
    return kind is str or set(typing.get_args(kind)) == {str, type(None)}


def _is_free(key: str) -> bool:
    """Whether a key lies in a mapping of names of the user's own, such as `teachers.models` and `model_args`."""
    parts = key.split(".")
    heads = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return key not in GROUPS and any(typing.get_origin(_kind_of(head)) is dict for head in heads)


def _with_entry(composed: Any, override: str) -> Any:
    """The settings with an entry of such a mapping set: arguments are replaced, a teacher is added or completed."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    key = override.partition("=")[0]
    value = OverridesParser.create().parse_override(override).value()
    kind = _kind_of(key)
    if (typing.get_origin(kind) is dict or is_dataclass(kind)) and not isinstance(value, dict):
        raise InputError(f"{override}: not allowed; expected {_expected(kind)}")
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
    key, reason = None, _first_lines(error)
    cause: BaseException | None = error
    while cause is not None and key is None:
        key = getattr(cause, "full_key", None)
        reason = _first_lines(cause, 1) if key else reason
        cause = cause.__cause__ or cause.__context__
    key = (key or "").partition("[")[0]
    given = [override for override in overrides if override.startswith(f"{key}=")]
    try:
        expected = f"expected {_expected(_kind_of(key))}"
    except InputError:
        expected = "see prism_ray/config.py for keys and types"
    return InputError(
        f"{given[-1]}: not allowed; {expected}" if given else f"{key or 'settings'}: {reason}; {expected}"
    )


def _expected(kind: Any) -> str:
    """A type of the schema in words."""
    arguments = [argument for argument in typing.get_args(kind) if argument is not type(None)]
    if typing.get_origin(kind) is list:
        return f"a list such as [a,b], each {_expected(arguments[0])}"
    if typing.get_origin(kind) is dict or is_dataclass(kind):
        return "a mapping such as {a:1}"
    if arguments:
        return f"{_expected(arguments[0])} or null"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return f"one of {', '.join(kind.__members__)}"
    return {int: "an integer", float: "a number", bool: "true or false", str: "text"}.get(kind, "another value")


def _kind_of(key: str) -> Any:
    """Follow a dotted key through the schema to its type.

    Raises:
        InputError: there is no such setting; names the nearest.
    """
    kind: Any = Config
    walked: list[str] = []
    for part in key.split("."):
        if is_dataclass(kind):
            names = [f.name for f in fields(kind)]
            if part not in names:
                known = _all_keys(Config)
                raise InputError(
                    f"{key}: unknown setting{_nearest(key, known)}; "
                    f"keys of {'.'.join(walked) or 'the top level'}: {', '.join(names)}"
                )
            kind = typing.get_type_hints(kind)[part]
        elif typing.get_origin(kind) is dict:
            kind = typing.get_args(kind)[1]
        elif kind is not Any:
            raise InputError(f"{key}: unknown setting; {'.'.join(walked)} has no parts")
        walked.append(part)
    return kind


def _all_keys(kind: Any, prefix: str = "") -> list[str]:
    hints = typing.get_type_hints(kind)
    keys = []
    for f in fields(kind):
        keys.append(prefix + f.name)
        if is_dataclass(hints[f.name]):
            keys += _all_keys(hints[f.name], f"{prefix}{f.name}.")
    return keys


def _stored_recipe(override: str, store: Any) -> str:
    """A recipe given as a path becomes a named one; its content is data: no targets, no interpolation."""
    key, _, value = override.partition("=")
    if key != "recipe" or value in _group_names("recipe"):
        return override
    path = Path(value)
    content = _read_yaml(path)
    name = re.sub(r"[^A-Za-z0-9_]", "_", path.stem)
    for key in _keys_within(content):
        try:
            _kind_of(key)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
    content.setdefault("recipe_name", name)
    store.store(group="recipe", name=name, package="_global_", node=content)
    return f"recipe={name}"


def _keys_within(content: dict[Any, Any], prefix: str = "") -> Iterator[str]:
    """Dotted keys of a recipe's settings."""
    for key, value in content.items():
        if prefix or key != "defaults":
            yield f"{prefix}{key}"
            if isinstance(value, dict):
                yield from _keys_within(value, f"{prefix}{key}.")


def _group_names(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def _group_file(group: str, name: str) -> Path:
    """File of a group's option; recipes and suites may also be paths."""
    if name in _group_names(group):
        return CONF / group / f"{name}.yaml"
    if group in ("recipe", "suite") and (name.endswith((".yaml", ".yml")) or "/" in name):
        if Path(name).is_file():
            return Path(name)
        raise InputError(f"{group}={name}: no such file; known names: {', '.join(_group_names(group))}")
    known = _group_names(group)
    raise InputError(f"{group}={name}: unknown{_nearest(name, known)}; known: {', '.join(known)}")


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: not a YAML file ({_first_lines(error)})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a YAML mapping; expected keys of prism_ray/config.py")
    if "${" in text or "_target_" in text:
        raise InputError(f"{path}: interpolations and _target_ are not allowed; write the values themselves")
    return content


def _nearest(name: str, known: Any) -> str:
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if not near and "." not in name:
        near = [key for key in names if key.rsplit(".", 1)[-1] == name][:1]
    return f", did you mean {near[0]}?" if near else ""


def _first_lines(error: BaseException | None, count: int = 2) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:count])


# Verbs


def _run(overrides: list[str]) -> ExitCode:
    config = compose(overrides)
    from prism_ray import pipeline

    return pipeline.run(
        {config.method.name: config},
        title=f"{config.recipe_name}: {config.method.name}",
        command=_command("run", overrides),
    )


def _bench(overrides: list[str]) -> ExitCode:
    suite, rows = compose_suite(overrides)
    from prism_ray import pipeline

    return pipeline.run(rows, title=f"suite {suite.name}", command=_command("bench", overrides), suite=suite.name)


def _plan(overrides: list[str]) -> ExitCode:
    config = compose(overrides)
    from prism_ray import inspection

    print(inspection.plan_text(config))
    return ExitCode.done


def _status(overrides: list[str]) -> ExitCode:
    config = compose(overrides)
    from prism_ray import inspection

    print(inspection.status_text(config))
    return ExitCode.done


def _verify(overrides: list[str]) -> ExitCode:
    config = compose(overrides)
    from prism_ray import inspection

    problems = inspection.verify(config)
    for problem in problems:
        print(f"{problem['key']}: {problem['problem']}")
    if not problems:
        print(f"{inspection.describe(config)}: every object matches its receipt")
        return ExitCode.done
    print(f"{inspection.describe(config)}: {len(problems)} damaged; the same `prism-ray run` makes them again")
    return _run([o for o in overrides if not o.startswith("repair=")]) if config.repair else ExitCode.failure


def _retry(overrides: list[str]) -> ExitCode:
    config = compose(overrides)
    from prism_ray import inspection

    count = inspection.retry(config)
    print(f"{inspection.describe(config)}: {count} quarantined units may be tried again")
    return _run(overrides)


def _report(overrides: list[str]) -> ExitCode:
    config = compose(overrides)
    from prism_ray import inspection

    print(inspection.rewrite_report(config, command=_command("report", overrides)))
    return ExitCode.done


def _doctor(overrides: list[str]) -> ExitCode:
    config = compose(overrides)
    from prism_ray import inspection

    text, healthy = inspection.doctor_text(config)
    print(text)
    return ExitCode.done if healthy else ExitCode.failure


def _command(verb: str, overrides: list[str]) -> str:
    return " ".join(["prism-ray", verb, *overrides])


VERBS: dict[str, tuple[Callable[[list[str]], ExitCode], str]] = {
    "run": (_run, "make a data set and all that belongs to it: run recipe=digits method=prism"),
    "bench": (_bench, "several methods under one protocol, one report: bench suite=digits"),
    "plan": (_plan, "units, images, bytes and operations of a run; starts nothing"),
    "status": (_status, "how far a run is"),
    "verify": (_verify, "compare every object with its checksum (repair=true: make damaged ones again)"),
    "retry": (_retry, "try quarantined units again"),
    "report": (_report, "write a run's report again"),
    "doctor": (_doctor, "what this machine and this installation can do"),
}

if __name__ == "__main__":
    sys.exit(main())
