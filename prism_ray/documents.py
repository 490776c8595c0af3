"""JSON and YAML from files that anybody may have written: parsed within bounds, and never more than data.

The standard parsers do what a file says: follow it to any depth, build one node for every repetition of an alias (a
kilobyte can say 2**30 of them), keep halves of characters that nothing can write again.
"""

import json
import re
from collections.abc import Callable
from dataclasses import MISSING, fields
from functools import lru_cache
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")

MOST_YAML_BYTES = 1_000_000
"""Of a file of settings; the longest shipped one has three thousand."""
MOST_DEPTH = 50
KINDS = ("bool", "int", "float", "null")
"""What a YAML scalar without quotes can be, if it is no text."""


def is_plain(name: str) -> bool:
    """Whether a name is that of a file or folder in a folder, on every file system, and leads nowhere else."""
    return _PLAIN_NAME.fullmatch(name) is not None


def parse_json(data: bytes | str) -> Any:
    """The content of a JSON text.

    Raises:
        ValueError: it is none, is nested too deeply, or holds half a surrogate pair.
    """
    text = data.decode().removeprefix("\ufeff") if isinstance(data, bytes) else data
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error
    if "\\u" in text:
        json.dumps(content, ensure_ascii=False).encode()
    return content


def record(kind: type[T], content: Any) -> T:
    """A dataclass from what a document says of it.

    Raises:
        ValueError: a field is missing, unknown or of another type; names it.
    """
    if not isinstance(content, dict):
        raise ValueError(f"is a {type(content).__name__}; expected an object")
    checks, needed = _fields_of(kind)
    for name in sorted(needed - content.keys()):
        raise ValueError(f"lacks {name!r}")
    for name, value in content.items():
        if name not in checks:
            raise ValueError(f"has the unknown field {name!r}")
        if not checks[name](value):
            raise ValueError(f"has a {type(value).__name__} as {name!r}")
    return kind(**content)


def fits(value: Any, kind: Any) -> bool:
    """Whether a parsed value is of an annotated type, and so are its parts."""
    return _check_of(kind)(value)


@lru_cache
def _fields_of(kind: Any) -> tuple[dict[str, Callable[[Any], bool]], set[str]]:
    """How the value of each field of a dataclass is looked at, and which fields have no default."""
    needed = {f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING}
    return {name: _check_of(hint) for name, hint in get_type_hints(kind).items()}, needed


@lru_cache
def _check_of(kind: Any) -> Callable[[Any], bool]:
    """`fits` for one annotation, taken apart once: a run has thousands of records of a kind."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return lambda value: True
    if origin in (Union, UnionType):
        parts = [_check_of(each) for each in arguments]
        return lambda value: any(part(value) for part in parts)
    if origin is Literal:
        return lambda value: value in arguments
    if origin is list:
        part = _check_of(arguments[0])
        return lambda value: type(value) is list and all(map(part, value))
    if origin is dict:
        of_key, of_value = (_check_of(each) for each in arguments)
        if arguments == (str, Any):
            return lambda value: type(value) is dict and {*map(type, value)} <= {str}
        return lambda value: type(value) is dict and all(map(of_key, value)) and all(map(of_value, value.values()))
    if kind is float:
        return lambda value: type(value) in (int, float)
    exact = NoneType if kind is None else kind
    return lambda value: type(value) is exact


def parse_yaml(text: str) -> Any:
    """The content of a YAML text of settings: mappings, lists, texts, numbers, true, false and null.

    Raises:
        ValueError: it is none, holds anything else (aliases, tags, interpolations, targets), names a key of a mapping
            twice, or is nested too deeply or too long.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        # Dates, merges and the key "=" stay text.
        yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {  # pyright: ignore  # an attribute of the class in yaml
            first: [(tag, pattern) for tag, pattern in known if tag.rpartition(":")[2] in KINDS]
            for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

        def compose_node(self, parent: Any, index: Any) -> Any:
            event = self.peek_event()
            for is_one, what in ((isinstance(event, yaml.AliasEvent), "an alias"), (getattr(event, "tag", 0), "a tag")):
                if is_one:
                    raise ValueError(f"line {event.start_mark.line + 1} holds {what}; write the value itself")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            names = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if len(set(names)) < len(names):
                twice = next(name for _, name in names if [n for _, n in names].count(name) > 1)
                raise ValueError(f"line {node.start_mark.line + 1}: {twice!r} stands twice in a mapping; leave one out")
            return super().construct_mapping(node, deep)

    if len(text) > MOST_YAML_BYTES:
        raise ValueError(f"has more than {MOST_YAML_BYTES} characters")
    try:
        content = yaml.load(text, Loader=Loader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error
    _check_data(content)
    return content


def _check_data(content: Any) -> None:
    rest = [(content, 0)]
    while rest:
        value, depth = rest.pop()
        if depth > MOST_DEPTH:
            raise ValueError("is nested too deeply")
        if isinstance(value, dict):
            rest += [(part, depth + 1) for entry in value.items() for part in entry]
        elif isinstance(value, list):
            rest += [(part, depth + 1) for part in value]
        elif isinstance(value, str):
            value.encode()
            # Looked for in what was parsed: in the file an escape such as "\x24{" hides it.
            if "${" in value or "_target_" in value:
                raise ValueError("interpolations and _target_ are not allowed; write the values themselves")
