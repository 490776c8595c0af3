"""The verb `config`: every setting with its meaning, type, default and check, as `config.py` has them."""

import difflib
import json
import textwrap
import typing
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from enum import Enum
from typing import Any

from prism_ray.cli.keys import expected
from prism_ray.config import Config
from prism_ray.errors import InputError
from prism_ray.identity import plain

ANY_NAME = "NAME"
"""Stands in a key for a name of the user's own, such as that of a teacher."""
WIDTH = 110


@dataclass(frozen=True)
class Setting:
    """One setting, or a group of them (then `default` is None)."""

    key: str
    doc: str
    kind: Any
    is_group: bool
    default: str | None
    check: str | None
    affects_output: bool


def all_settings(kind: Any = Config, prefix: str = "") -> Iterator[Setting]:
    """Every setting in the order of `config.py`, each group before its members."""
    hints = typing.get_type_hints(kind)
    for f in fields(kind):
        key, hint = f"{prefix}{f.name}", hints[f.name]
        entries = typing.get_args(hint)[-1] if typing.get_origin(hint) is dict else None
        is_group = is_dataclass(hint)
        check = f.metadata["check"]
        yield Setting(
            key=key,
            doc=f.metadata["doc"],
            kind=hint,
            is_group=is_group,
            default=None if is_group else _default(f),
            check=check[1] if check else None,
            affects_output=f.metadata["output"],
        )
        if is_group:
            yield from all_settings(hint, f"{key}.")
        elif is_dataclass(entries):
            yield from all_settings(entries, f"{key}.{ANY_NAME}.")


def settings_text(prefixes: Sequence[str]) -> str:
    """The settings whose key begins with one of `prefixes`, all of them without any.

    Raises:
        InputError: no setting begins so; names near ones.
    """
    settings = list(all_settings())
    for prefix in prefixes:
        _check_prefix(prefix, [setting.key for setting in settings])
    wanted = [s for s in settings if not prefixes or any(_begins(s.key, prefix) for prefix in prefixes)]
    lines = ["Defaults are those of prism_ray/config.py; presets and recipes set others.", ""]
    for setting in wanted:
        lines += [*_lines(setting), ""]
    return "\n".join(lines[:-1])


def _default(f: Field[Any]) -> str:
    if f.default is not MISSING:
        value = f.default
    elif f.default_factory is not MISSING:
        value = f.default_factory()
    else:
        return "none, must be set"
    return json.dumps(plain(value), ensure_ascii=False) if not isinstance(value, str | Enum) else str(plain(value))


def _lines(setting: Setting) -> list[str]:
    if setting.is_group:
        return [f"[{setting.key}] {setting.doc}"]
    facts = [_values(setting), f"default: {setting.default}"]
    if not setting.affects_output:
        facts.append("changes no byte of the result")
    texts = [setting.doc, "; ".join(facts)]
    if isinstance(setting.kind, type) and issubclass(setting.kind, Enum):
        texts.insert(1, " ".join((setting.kind.__doc__ or "").split()))
    wrapped = (textwrap.wrap(text, WIDTH - 4, break_on_hyphens=False) for text in texts)
    return [setting.key, *(f"    {line}" for lines in wrapped for line in lines)]


def _values(setting: Setting) -> str:
    """What it may be: its check where that says the type too, else type and check."""
    kind = expected(setting.kind)
    bare = kind.removesuffix(" or null")
    if setting.check is None:
        return kind
    if setting.check.startswith((bare, "a finite number")):
        return setting.check + kind.removeprefix(bare) * ("null" not in setting.check)
    return f"{kind}; {setting.check}"


def _begins(key: str, prefix: str) -> bool:
    """Whether a key begins with a prefix, in which any name may stand for `NAME`."""
    *whole, last = prefix.split(".")
    parts = key.split(".")
    same = all(part in (wanted, ANY_NAME) for part, wanted in zip(parts, whole, strict=False))
    return same and len(parts) > len(whole) and (parts[len(whole)].startswith(last) or parts[len(whole)] == ANY_NAME)


def _check_prefix(prefix: str, keys: Sequence[str]) -> None:
    if any(_begins(key, prefix) for key in keys):
        return
    names = [*keys, *dict.fromkeys(key.rpartition(".")[2] for key in keys)]
    near = difflib.get_close_matches(prefix, names, n=3, cutoff=0.5)
    full = dict.fromkeys(key for name in near for key in keys if key == name or key.endswith(f".{name}"))
    hint = f"did you mean {', '.join(list(full)[:3])}? " if full else ""
    groups = ", ".join(dict.fromkeys(key.partition(".")[0] for key in keys if "." in key))
    raise InputError(
        f"config {prefix!r}: no setting begins so; {hint}expected the beginning of a key, such as method.logit; "
        f"groups: {groups}"
    )
