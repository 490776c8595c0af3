"""Keys of the schema: which there are, of which type, in words for people."""

import difflib
import typing
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

from prism_ray.config import Config
from prism_ray.errors import InputError


def expected(kind: Any) -> str:
    """A type of the schema in words."""
    arguments = [argument for argument in typing.get_args(kind) if argument is not type(None)]
    if typing.get_origin(kind) is list:
        return f"a list such as [a,b], each {expected(arguments[0])}"
    if typing.get_origin(kind) is dict or is_dataclass(kind):
        return "a mapping such as {a:1}"
    if arguments:
        return f"{expected(arguments[0])} or null"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return f"one of {', '.join(kind.__members__)}"
    return {int: "an integer", float: "a number", bool: "true or false", str: "text"}.get(kind, "another value")


def kind_of(key: str) -> Any:
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
                known = all_keys(Config)
                raise InputError(
                    f"{key}: unknown setting{nearest(key, known)}; "
                    f"keys of {'.'.join(walked) or 'the top level'}: {', '.join(names)}"
                )
            kind = typing.get_type_hints(kind)[part]
        elif typing.get_origin(kind) is dict:
            kind = typing.get_args(kind)[1]
        elif kind is not Any:
            raise InputError(f"{key}: unknown setting; {'.'.join(walked)} has no parts")
        walked.append(part)
    return kind


def all_keys(kind: Any, prefix: str = "") -> list[str]:
    hints = typing.get_type_hints(kind)
    keys = []
    for f in fields(kind):
        keys.append(prefix + f.name)
        if is_dataclass(hints[f.name]):
            keys += all_keys(hints[f.name], f"{prefix}{f.name}.")
    return keys


def is_text(kind: Any) -> bool:
    return kind is str or set(typing.get_args(kind)) == {str, type(None)}


def nearest(name: str, known: Iterable[str]) -> str:
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if not near and "." not in name:
        near = [key for key in names if key.rsplit(".", 1)[-1] == name][:1]
    return f", did you mean {near[0]}?" if near else ""
