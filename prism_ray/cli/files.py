"""The YAML files behind the settings: shipped groups by name, recipes and suites also by path."""

from pathlib import Path
from typing import Any

from prism_ray.cli.keys import nearest
from prism_ray.documents import parse_yaml
from prism_ray.errors import InputError

CONF = Path(__file__).parent.parent / "conf"
GROUPS = ("recipe", "dataset", "method", "prompts", "labels", "student", "compute")


def group_names(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def group_file(group: str, name: str) -> Path:
    """File of a group's option; recipes and suites may also be paths."""
    if name in group_names(group):
        return CONF / group / f"{name}.yaml"
    if group in ("recipe", "suite") and (name.endswith((".yaml", ".yml")) or "/" in name):
        if Path(name).is_file():
            return Path(name)
        raise InputError(f"{group}={name}: no such file; known names: {', '.join(group_names(group))}")
    known = group_names(group)
    raise InputError(f"{group}={name}: unknown{nearest(name, known)}; known: {', '.join(known)}")


def read_yaml(path: Path) -> dict[str, Any]:
    """A file of settings.

    Raises:
        InputError: it can't be read, or is not what `parse_yaml` takes.
    """
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a YAML file of settings ({first_lines(error)})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a YAML mapping; expected keys of prism_ray/config.py")
    return content


def first_lines(error: BaseException | None, count: int = 2) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:count])
