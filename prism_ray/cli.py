"""Verbs and their settings: `prism-ray VERB [key=value ...]`. The only module that knows Hydra.

Everything heavy is imported inside the verb that needs it, after the settings were checked, so that help and a refused
setting answer at once.
"""

import difflib
import os
import re
import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from prism_ray import __version__
from prism_ray.config import Config, check_config
from prism_ray.errors import ExitCode, InputError, PrismError, one_line

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
        return int(error.exit_code)
    except KeyboardInterrupt:
        print("prism-ray: interrupted; run the same command to continue", file=sys.stderr)
        return ExitCode.interrupted
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
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    checked = [_stored_recipe(override, store) for override in checked]
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            composed = hydra_compose("config", overrides=checked)
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        reason = str(error.msg if hasattr(error, "msg") else error).splitlines()[0]
        raise InputError(f"{key or 'settings'}: {reason}; see prism_ray/config.py for its type") from error
    except (HydraException, yaml.YAMLError) as error:
        cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
        raise InputError(f"settings: {_first_lines(cause)}; see prism_ray/config.py for keys and types") from error
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
    _check_syntax(override)
    if key in GROUPS:
        _group_file(key, value)
    elif key == "suite":
        raise InputError("suite=...: belongs to the verb bench")
    else:
        _check_key(key)
    return override


def _check_syntax(override: str) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if override.startswith("recipe="):
        return  # a path may hold characters that Hydra's grammar wants quoted
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException as error:
        raise InputError(f"{override!r}: {str(error).splitlines()[0]}; expected key=value, lists as [a,b]") from error
    if parsed.is_sweep_override():
        raise InputError(f"{override!r}: one value only; write a list as [a,b], and compare settings with a suite")


def _check_key(key: str) -> None:
    """Follow a dotted key through the schema."""
    kind: Any = Config
    walked: list[str] = []
    for part in key.split("."):
        if is_dataclass(kind):
            names = [f.name for f in fields(kind)]
            if part not in names:
                known = _all_keys(Config)
                raise InputError(
                    f"{key}: unknown setting{_nearest(key, known)}; keys of {'.'.join(walked) or 'the top level'}: {', '.join(names)}"
                )
            kind = typing.get_type_hints(kind)[part]
        elif typing.get_origin(kind) is dict:
            kind = typing.get_args(kind)[1]
        elif kind is not Any:
            raise InputError(f"{key}: unknown setting; {'.'.join(walked)} has no parts")
        walked.append(part)


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
    content.setdefault("recipe_name", name)
    store.store(group="recipe", name=name, package="_global_", node=content)
    return f"recipe={name}"


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


def _first_lines(error: BaseException | None) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])


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
