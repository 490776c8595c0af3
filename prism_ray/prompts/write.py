"""Scenes for prompts by a language model: what it is asked, and which part of its answer is let through.

The answer is text from outside. Only short noun phrases of plain letters pass; whatever is missing then comes from the
axes of `content`, and every scene says who wrote it. Source: that a language model writes the content is PRISM's
(arXiv 2509.16897); question, rules and fallback are this project's.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from prism_ray.prompts.content import draw_axes
from prism_ray.prompts.names import short_name
from prism_ray.prompts.selection import most_different, near_duplicates, plainly

Messages = list[dict[str, str]]
"""A conversation as chat servers take it: {"role": …, "content": …}."""

PER_REQUEST = 25
RETRIES = 2
"""Questions beyond those that a faultless model needs."""
MOST_WORDS, MOST_LETTERS = 25, 200
MOST_ANSWER_LETTERS = 100_000
FALLBACK = "fallback"

# Latin letters, digits and what stands between words: no markup, address, weight of a prompt or other script has room.
_PLAIN = re.compile(r"[A-Za-z0-9À-ÖØ-öø-ɏ ,'’-]+")
_INSTRUCTION = re.compile(
    r"http|www|\bignor|\bdisregard|\bforget|\boverrid|\binstruct|\bprompt|\bsystem\b|\bassistant\b|\byour?\b|\bplease\b"
)
_FENCE = re.compile(r"```(?:json)?\s*\n(.*)\n\s*```", re.DOTALL)

_RULES = (
    "You describe scenes for a data set of photos. Answer with a JSON list of strings and nothing else. Every string "
    f"is an English noun phrase of at most {MOST_WORDS} words in plain letters: a place, a light, a viewpoint, what is "
    "around. It does not name the object itself, nor any object of another class. No two strings resemble each other."
)


@dataclass(frozen=True)
class Author:
    """A language model: `source` is its name in a table, `ask` takes a conversation and returns its answer."""

    source: str
    ask: Callable[[Messages], str]


@dataclass(frozen=True)
class Content:
    """What a prompt says beside class and style, as `table.PromptRow` stores it."""

    values: dict[str, str]
    source: str
    reason: str | None = None


def write_contents(
    author: Author,
    phrase: str,
    *,
    gloss: str,
    num: int,
    candidates: int,
    others: re.Pattern[str],
    axes: Mapping[str, Sequence[str]],
    seed: int,
) -> list[Content]:
    """Contents of the `num` prompts of a class: the most different scenes an author wrote, filled up from the axes.

    Args:
        phrase: what the class is called.
        gloss: what it is, for the author; may be empty.
        candidates: scenes asked for, at least `num`.
        others: of `names_pattern`.
        axes: of templates, for what the author fails to deliver.
        seed: of draws from them.
    """
    scenes, reason = write_scenes(author.ask, phrase, gloss=gloss, num=candidates, others=others)
    similar = set(near_duplicates(scenes))
    scenes = [scene for n, scene in enumerate(scenes) if n not in similar]
    kept = [scenes[n] for n in most_different(scenes, min(num, len(scenes)))]
    found = [Content({"scene": scene}, author.source) for scene in kept]
    reason = reason or f"{len(similar)} scenes resemble others"
    return found + [Content(values, FALLBACK, reason) for values in draw_axes(axes, num - len(found), seed)]


def write_scenes(
    ask: Callable[[Messages], str], phrase: str, *, gloss: str, num: int, others: re.Pattern[str]
) -> tuple[list[str], str | None]:
    """At most `num` scenes that passed, and why there are not more.

    It is asked for `PER_REQUEST` at a time and told which it wrote already, so that no two questions are the same.
    """
    scenes: list[str] = []
    refusals: list[str] = []
    for _ in range(-(-num // PER_REQUEST) + RETRIES):
        missing = min(PER_REQUEST, num - len(scenes))
        if missing == 0:
            break
        answer = ask(question(phrase, gloss, num=missing, written=scenes, refusals=refusals))
        found, refusals = validate(answer, phrase, others=others)
        known = {plainly(scene) for scene in scenes}
        new = [scene for scene in found if plainly(scene) not in known]
        scenes += new[:missing]
        if len(new) < len(found):
            refusals.append("was written before")
    return scenes, None if len(scenes) == num else "; ".join(dict.fromkeys(refusals)) or "too few scenes"


def question(phrase: str, gloss: str, *, num: int, written: Sequence[str], refusals: Sequence[str]) -> Messages:
    """What the author is asked. A class is named inside JSON, where its name cannot pass for a part of the rules."""
    asked: dict[str, object] = {"class": phrase, "meaning": gloss, "number of scenes": num}
    if written:
        asked["written already"] = list(written)
    if refusals:
        asked["why others were refused"] = list(dict.fromkeys(refusals))
    return [
        {"role": "system", "content": _RULES},
        {"role": "user", "content": json.dumps(asked, ensure_ascii=False)},
    ]


def validate(answer: str, phrase: str, *, others: re.Pattern[str]) -> tuple[list[str], list[str]]:
    """The scenes of an answer that may become part of a prompt, and a reason for each of the rest.

    Reasons never repeat what was refused. A list may stand in a Markdown fence, as many models write it.
    """
    if len(answer) > MOST_ANSWER_LETTERS:
        return [], [f"the answer is longer than {MOST_ANSWER_LETTERS} letters"]
    fenced = _FENCE.fullmatch(answer.strip())
    try:
        # Not `parse_json`: one scene with half a character in it is to cost that scene alone.
        entries = json.loads(fenced[1] if fenced else answer)
    except (ValueError, RecursionError):
        return [], ["the answer is not JSON"]
    if not isinstance(entries, list) or not entries:
        return [], ["the answer is not a JSON list of scenes"]
    scenes: dict[str, str] = {}
    refusals = []
    for entry in entries:
        scene = _normalized(entry)
        reason = _refusal(scene, phrase, others) or ("was written before" if plainly(scene) in scenes else None)
        if reason is None:
            scenes[plainly(scene)] = scene
        else:
            refusals.append(reason)
    return list(scenes.values()), refusals


def names_pattern(phrases: Sequence[str]) -> re.Pattern[str]:
    """Finds the name of any class as a whole word, singular or plural.

    A part of a hyphenated word is another word ("shirt" in "t-shirt").
    """
    # The longest first, or "tiger beetle" would count as a tiger.
    names = sorted({short_name(phrase) for phrase in phrases}, key=lambda name: (-len(name), name))
    return re.compile(rf"(?<![\w-])({'|'.join(map(re.escape, names))})(?:e?s)?(?![\w-])", re.IGNORECASE)


def _normalized(entry: object) -> str:
    """A scene in composed letters without a full stop; nothing if it is no string."""
    return unicodedata.normalize("NFC", entry).strip(" ").removesuffix(".") if isinstance(entry, str) else ""


def _refusal(scene: str, phrase: str, others: re.Pattern[str]) -> str | None:
    """Why a scene may not become part of a prompt, None if it may."""
    if not scene.strip(" ,'’-"):
        return "is empty or no string"
    if len(scene.split()) > MOST_WORDS or len(scene) > MOST_LETTERS:
        return f"is longer than {MOST_WORDS} words or {MOST_LETTERS} letters"
    if _PLAIN.fullmatch(scene) is None:
        return "holds something other than plain letters, digits, commas, apostrophes and hyphens"
    if _INSTRUCTION.search(scene.casefold()):
        return "reads like an instruction or an address"
    own = short_name(phrase).casefold()
    if any(found[1].casefold() != own for found in others.finditer(scene)):
        return "names another class"
    return None
