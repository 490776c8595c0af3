"""The prompt table: written once, hashed, then frozen. One JSON object a line, so that people can read and edit it."""

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace

import numpy as np

from prism_ray.documents import parse_json, record
from prism_ray.errors import InputError, shortened
from prism_ray.prompts.captions import CONTENT_AXES, PHRASES, STYLE_AXES, caption, with_article
from prism_ray.prompts.content import PHOTO_AXES, STYLES, axes_without, draw_axes
from prism_ray.prompts.selection import plainly
from prism_ray.prompts.write import FALLBACK, Author, Content, names_pattern, write_contents
from prism_ray.seeds import seed_for

PHOTO, TEMPLATE = "photo", "template"

SCENES_PER_PROMPT = 2
"""How many scenes an author is asked for, of which the most different are kept."""
SPARES_PER_PROMPT = 20
"""How many more contents are tried before a class has too few different prompts."""

SMALL_STYLES = {value: axis for axis in STYLE_AXES for value, words in PHRASES[axis].items() if words}
"""Style of the small world → its axis."""

SMALL_CONTENT: list[dict[str, str]] = [
    dict(zip(CONTENT_AXES, values, strict=True))
    for values in itertools.product(*(PHRASES[axis] for axis in CONTENT_AXES))
    if any(PHRASES[axis][value] for axis, value in zip(CONTENT_AXES, values, strict=True))
]
"""What a photo of the small world can show, beside the neutral one."""


@dataclass(frozen=True)
class PromptRow:
    """One prompt and how it came about."""

    class_id: int
    prompt_index: int  # order of use within the class
    prompt: str
    phrase: str  # what the class is called in it
    style: str  # "photo", or the style
    values: dict[str, str] = field(default_factory=dict)  # axis → value
    source: str = TEMPLATE  # who wrote it: template, transformers, http, or fallback
    reason: str | None = None  # of a fallback

    @property
    def is_plain(self) -> bool:
        """Whether it asks for the class and nothing else."""
        return self.style == PHOTO and not any(PHRASES.get(axis, {}).get(v, v) for axis, v in self.values.items())


@dataclass(frozen=True)
class TableSettings:
    """What a table is made from; see `config.PromptsConfig`."""

    per_class: int
    photo_share: float
    neutral_share: float
    seed: int
    is_small: bool
    name_only: bool = False
    styles: tuple[str, ...] = STYLES
    max_tokens: int = 60

    def __post_init__(self) -> None:
        if self.per_class < 1:
            raise InputError(f"prompts.per_class={self.per_class}: no prompt at all; set it to at least 1")
        for name, share in (("photo_share", self.photo_share), ("neutral_share", self.neutral_share)):
            if not 0 <= share <= 1:
                raise InputError(f"prompts.{name}={share}: is no share; set it between 0 and 1")
        if not self.styles or len({*self.styles, PHOTO}) <= len(self.styles):
            raise InputError(
                f"prompts.styles={list(self.styles)}: empty, with {PHOTO!r} or with one twice; list different styles"
            )

    @property
    def num_photos(self) -> int:
        """Prompts of a class that have no style."""
        return round(self.per_class * self.photo_share)


def count_words(text: str) -> int:
    """Tokens of a text, both ends included, guessed from its words, their length and its punctuation."""
    return 2 + sum(1 + (len(part) - 1) // 8 for part in re.findall(r"\w+|[^\w\s]", text))


def write_table(
    phrases: Sequence[str],
    settings: TableSettings,
    *,
    count_tokens: Callable[[str], int] = count_words,
    author: Author | None = None,
    glosses: Sequence[str] | None = None,
) -> list[PromptRow]:
    """Prompts of every class, the same wherever they are written.

    Args:
        phrases: what each class is called, by class id.
        settings: how many, and which.
        count_tokens: as the generator's tokenizer counts; a prompt that is too long loses its last additions.
        author: writes the scenes of the prompts; None: they are drawn from `content.PHOTO_AXES`.
        glosses: what each class is, for the author.

    Raises:
        InputError: a class's name alone is too long, there are not so many different prompts, or an author is to write
            captions of the small world.
    """
    if settings.is_small and author is not None:
        raise InputError("prompts.back_end: captions of the small world have fixed words; set it to template")
    names = names_pattern(phrases)
    axes = axes_without(PHOTO_AXES, names)
    rows: list[PromptRow] = []
    for class_id, phrase in enumerate(phrases):
        seed = seed_for(settings.seed, "prompts", class_id)
        if settings.name_only:
            made = [[_row(phrase, PHOTO, Content({}, TEMPLATE), settings, count_tokens)]]
        elif settings.is_small:
            made = _small_rows(phrase, class_id, settings, seed, count_tokens)
        else:
            written = None
            if author is not None:
                written = write_contents(
                    author,
                    phrase,
                    gloss=glosses[class_id] if glosses else "",
                    num=settings.per_class,
                    candidates=SCENES_PER_PROMPT * settings.per_class,
                    others=names,
                    axes=axes,
                    seed=seed_for(seed, "fallback"),
                )
            contents = _contents(written, axes, settings, seed)
            made = _photo_rows(phrase, class_id, settings, contents, count_tokens)
        rows += [replace(row, class_id=class_id, prompt_index=index) for index, row in enumerate(_interleaved(made))]
    return rows


def _small_rows(
    phrase: str, class_id: int, settings: TableSettings, seed: int, count_tokens: Callable[[str], int]
) -> list[list[PromptRow]]:
    """Captions of the small world by style, the neutral ones first; there are few, so they repeat."""
    num_neutral = round(settings.num_photos * settings.neutral_share)
    changed = {"place": [str(place) for place in range(len(SMALL_CONTENT))]}
    drawn = draw_axes(changed, settings.num_photos - num_neutral, seed_for(seed, PHOTO))
    groups: list[tuple[str, list[dict[str, str]]]] = [
        (PHOTO, [{}] * num_neutral),
        (PHOTO, [SMALL_CONTENT[int(row["place"])] for row in drawn]),
    ]
    content = draw_axes(
        {axis: tuple(PHRASES[axis]) for axis in CONTENT_AXES},
        settings.per_class - settings.num_photos,
        seed_for(seed, "styles"),
    )
    for style, count in _quotas(tuple(SMALL_STYLES), class_id, len(content)).items():
        groups.append((style, [values | {SMALL_STYLES[style]: style} for values in content[:count]]))
        content = content[count:]
    return [
        [_row(phrase, style, Content(values, TEMPLATE), settings, count_tokens) for values in group]
        for style, group in groups
    ]


def _contents(
    written: Sequence[Content] | None, axes: Mapping[str, Sequence[str]], settings: TableSettings, seed: int
) -> Iterator[Content]:
    """What the photos of a class show, then its renditions; then spare ones, should prompts repeat once they fit."""
    if written is None:
        for count, part in ((settings.num_photos, PHOTO), (settings.per_class - settings.num_photos, "styles")):
            yield from (Content(values, TEMPLATE) for values in draw_axes(axes, count, seed_for(seed, part)))
    else:
        # What replaces missing scenes comes last, and is not to become the renditions' alone.
        random = np.random.Generator(np.random.Philox(key=seed_for(seed, "order")))
        yield from (written[n] for n in random.permutation(len(written)))
    for values in draw_axes(axes, SPARES_PER_PROMPT * settings.per_class, seed_for(seed, "spare")):
        yield Content(values, TEMPLATE) if written is None else Content(values, FALLBACK, "repeated once it fitted")


def _photo_rows(
    phrase: str,
    class_id: int,
    settings: TableSettings,
    contents: Iterator[Content],
    count_tokens: Callable[[str], int],
) -> list[list[PromptRow]]:
    """Prompts for a generator that knows photos, by style; no two of a class are the same."""
    num_styled = settings.per_class - settings.num_photos
    quotas = {PHOTO: settings.num_photos} | _quotas(settings.styles, class_id, num_styled)
    planned, groups = [next(contents) for _ in range(settings.per_class)], []
    for style, count in quotas.items():
        rows: dict[str, PromptRow] = {}
        mine, planned = planned[:count], planned[count:]
        while len(rows) < count and (content := mine.pop(0) if mine else next(contents, None)) is not None:
            row = _row(phrase, style, content, settings, count_tokens)
            rows.setdefault(plainly(row.prompt), row)
        if len(rows) < count:
            raise InputError(
                f"prompts.per_class={settings.per_class}: {count} prompts of style {style!r} for {phrase!r} were to "
                f"differ, {len(rows)} do; lower it, or raise prompts.max_tokens"
            )
        groups.append(list(rows.values()))
    return groups


def _row(
    phrase: str, style: str, content: Content, settings: TableSettings, count_tokens: Callable[[str], int]
) -> PromptRow:
    """A prompt without the last additions that do not fit; its place in the table comes later."""
    values = dict(content.values)
    while count_tokens(text := _text(phrase, style, values, settings)) > settings.max_tokens:
        said = [axis for axis, value in values.items() if value]
        if settings.is_small or not said:
            raise InputError(
                f"prompts.max_tokens={settings.max_tokens}: {text!r} is longer; raise it, or give the class a shorter "
                "name in prompts.phrases"
            )
        # A scene is one value of many words: it loses them one by one.
        values[said[-1]] = values[said[-1]].rpartition(" ")[0].rstrip(" ,") if said == ["scene"] else ""
    return PromptRow(0, 0, text, phrase, style, values, content.source, content.reason)


def _text(phrase: str, style: str, values: Mapping[str, str], settings: TableSettings) -> str:
    if settings.is_small:
        return caption(phrase, values)
    start = "a photo" if style == PHOTO else style
    return ", ".join([f"{start} of {with_article(phrase)}", *(value for value in values.values() if value)])


def _quotas(styles: Sequence[str], class_id: int, count: int) -> dict[str, int]:
    """How many prompts of a class have each style; dealt out from class to class, so that all occur equally often."""
    dealt = [styles[n % len(styles)] for n in range(class_id * count, (class_id + 1) * count)]
    return {style: dealt.count(style) for style in dict.fromkeys(dealt)}


def _interleaved(groups: Sequence[Sequence[PromptRow]]) -> list[PromptRow]:
    """All rows, mixed so that any first part of them has about the same shares as the whole."""
    placed = [((n + 0.5) / len(group), row) for group in groups for n, row in enumerate(group)]
    return [row for _, row in sorted(placed, key=lambda entry: entry[0])]


def to_jsonl(rows: Sequence[PromptRow]) -> bytes:
    """The table as a file; equal tables give equal bytes."""
    lines = (json.dumps(asdict(row), sort_keys=True, ensure_ascii=False) for row in rows)
    return "".join(f"{line}\n" for line in lines).encode()


def table_hash(rows: Sequence[PromptRow]) -> str:
    """sha256 of the table's file, hexadecimal."""
    return hashlib.sha256(to_jsonl(rows)).hexdigest()


def from_jsonl(data: bytes) -> list[PromptRow]:
    """The table from its file.

    Raises:
        InputError: a line is no row, or has the place of another; names it. Or there is no line.
    """
    rows: dict[tuple[int, int], PromptRow] = {}
    for number, line in enumerate(data.splitlines(), 1):
        try:
            row = record(PromptRow, parse_json(line))
            if row.class_id < 0 or row.prompt_index < 0:
                raise ValueError("a negative number")
            if rows.setdefault((row.class_id, row.prompt_index), row) is not row:
                raise ValueError(f"class {row.class_id} has prompt {row.prompt_index} already")
        except ValueError as error:
            expected = ", ".join(entry.name for entry in fields(PromptRow))
            raise InputError(
                f"prompt table, line {number}: is no prompt ({shortened(error, 80)}); expected an object with "
                f"{expected}; delete its folder and run again"
            ) from error
    if not rows:
        raise InputError("prompt table: is empty; expected a line for each prompt; delete its folder and run again")
    return list(rows.values())
