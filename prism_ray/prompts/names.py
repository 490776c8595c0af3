"""Names of classes that say which class is meant: the first part of diversified prompts.

ImageNet's come from timm's own tables of lemmas and glosses, so nothing is downloaded. Source: the problem of ambiguous
names is PRISM's (arXiv 2509.16897); the rules are this project's.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache

from prism_ray.data.imagenet_names import class_names as imagenet_names
from prism_ray.data.imagenet_names import synsets
from prism_ray.errors import InputError
from prism_ray.weights import timm_folder

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

MOST_GLOSS_WORDS = 7
LEADS = re.compile(
    r"^(?:(?:any|one|either) of (?:(?:various|numerous|several|two|the) )?|(?:a )?series of |any |an? |the |usually )+"
)
PREPOSITION = re.compile(
    "of|in|on|with|for|from|by|to|at|as|under|over|around|into|during|up|out|across|through|against|between|behind|upon"
)
CLAUSE = re.compile("that|which|who|whose|where|when|having|used|made")
LOOSE = re.compile("a|an|the|and|or|either|any|only|is|are|its|their|usually|especially|[a-z]+ly")
"""Words that a fragment of a gloss cannot end with, besides those above."""

VERBS = ("lifts", "holds")
"""How the only two glosses of ImageNet-1K's ambiguous names start that are no noun phrases."""


def class_phrases(class_names: Sequence[str], overrides: Mapping[str, str] | None = None) -> list[list[str]]:
    """For each class what it may be called, the best guess first; no two classes have a phrase in common.

    Args:
        class_names: of a data set. WordNet ids, and the readable names of ImageNet-1K as a whole, are looked up.
        overrides: class name → the phrase to use, where the user knows better.

    Raises:
        InputError: an override of no class, an empty phrase, or two classes with the same.
    """
    overrides = overrides or {}
    unknown = [name for name in overrides if name not in class_names]
    if unknown:
        raise InputError(
            f"prompts.phrases: {unknown[0]!r} is no class; known: {', '.join(class_names[:20])}; correct it"
        )
    ids = _synsets_of(class_names)
    found = [[readable(name)] for name in class_names] if ids is None else _looked_up(ids)
    pairs = zip(class_names, found, strict=True)
    found = [[_tidy(overrides[name])] if name in overrides else phrases for name, phrases in pairs]
    owners: dict[str, str] = {}
    for name, phrases in zip(class_names, found, strict=True):
        for phrase in phrases:
            owner = owners.setdefault(phrase.casefold(), name)
            if not phrase or owner != name:
                raise InputError(
                    f"prompts.phrases: {name!r} would be called {phrase!r}{f', as {owner!r} is' if phrase else ''}; "
                    f"expected a phrase of its own; set prompts.phrases={{'{name}': ...}}"
                )
    return found


def class_glosses(class_names: Sequence[str]) -> list[str]:
    """What WordNet says each class is; empty for the classes of other data sets."""
    ids = _synsets_of(class_names)
    return [""] * len(class_names) if ids is None else [_table("imagenet_synset_to_definition.txt")[s] for s in ids]


def choose_phrases(candidates: Sequence[Sequence[str]], agreement: Mapping[tuple[int, str], float]) -> list[str]:
    """The phrase of each class whose images teachers recognize most often; of equal ones the first.

    Args:
        candidates: as `class_phrases` lists them, by class id.
        agreement: (class id, phrase) → share of images that teachers name as that class; a phrase without has 0.
    """
    return [
        max(phrases, key=lambda phrase: agreement.get((class_id, phrase), 0.0))
        for class_id, phrases in enumerate(candidates)
    ]


def short_name(phrase: str) -> str:
    """The name alone.

    >>> short_name("crane, large long-necked wading bird of marshes")
    'crane'
    """
    return phrase.partition(",")[0]


def readable(name: str) -> str:
    """A class name as words.

    >>> readable("T-shirt/top"), readable("golden_retriever"), readable("3")
    ('t-shirt or top', 'golden retriever', 'digit three')
    """
    if len(name) == 1 and name in "0123456789":
        return f"digit {DIGITS[int(name)]}"
    return _tidy(name.replace("/", " or ").replace("_", " ")).lower()


def fragment(gloss: str) -> str:
    """The beginning of a gloss that stands on its own.

    >>> fragment("any of various terrestrial gastropods having an elongated slimy body and no external shell")
    'terrestrial gastropods'
    """
    clause = re.split(r"[;,:]", _tidy(re.sub(r"\([^)]*\)", "", gloss)), maxsplit=1)[0]
    words = LEADS.sub("", clause).split()
    if words[0] in VERBS:
        words = ["one", "that", *words]
    if len(words) <= MOST_GLOSS_WORDS:
        return " ".join(words)
    for joints in (False, True):
        fitting = [n for n in range(2, MOST_GLOSS_WORDS + 1) if _may_end(words, n, joints=joints)]
        if fitting:
            return " ".join(words[: max(fitting)])
    return " ".join(words[: next((n for n in range(2, len(words)) if _may_end(words, n, joints=True)), len(words))])


def _may_end(words: Sequence[str], end: int, *, joints: bool) -> bool:
    """Whether a gloss can stop before the word at `end`: where a part starts, or at a joint, where one may be cut."""
    last, following = words[end - 1], words[end]
    second = words[end + 1] if end + 1 < len(words) else ""
    if any(loose.fullmatch(last) for loose in (PREPOSITION, CLAUSE, LOOSE)):
        return False
    if words[end - 2] in ("that", "which", "who", "whose"):
        return False
    opens = PREPOSITION.fullmatch(following) or CLAUSE.fullmatch(following) or (joints and following in ("and", "or"))
    if opens and last.endswith(("ed", "ing")):
        return False
    starts_part = following.endswith(("ed", "ing", "en")) and PREPOSITION.fullmatch(second)
    is_aside = following in ("usually", "especially") and second.endswith(("ed", "ing", "along"))
    return bool(opens or starts_part or is_aside)


def _tidy(text: str) -> str:
    return " ".join(text.split())


def _synsets_of(class_names: Sequence[str]) -> list[str] | None:
    """WordNet ids of the classes, or None for names of another kind."""
    if list(class_names) == imagenet_names():
        return synsets()
    return list(class_names) if all(name in _table("imagenet_synset_to_lemma.txt") for name in class_names) else None


def _looked_up(ids: Sequence[str]) -> list[list[str]]:
    """Phrases of WordNet's classes: first a lemma that is nobody else's, with its gloss if the first is ambiguous."""
    lemmas = {synset: text.split(", ") for synset, text in _table("imagenet_synset_to_lemma.txt").items()}
    glosses = _table("imagenet_synset_to_definition.txt")
    meanings = Counter(lemma for names in lemmas.values() for lemma in _folded(names))
    own = Counter(lemma for synset in ids for lemma in _folded(lemmas[synset]))
    found = []
    for synset in ids:
        names = lemmas[synset]
        free = [name for name in names if own[name.casefold()] == 1]
        explained = [f"{name}, {fragment(glosses[synset])}" for name in free or names[:1]]
        first = explained[0] if meanings[names[0].casefold()] > 1 else names[0]
        found.append(list(dict.fromkeys([first, *free, *explained])))
    return found


def _folded(names: Sequence[str]) -> set[str]:
    return {name.casefold() for name in names}


@cache
def _table(name: str) -> dict[str, str]:
    """A file of timm, synset → text."""
    text = (timm_folder() / "data/_info" / name).read_text(encoding="utf-8")
    return dict(line.split("\t", 1) for line in text.splitlines())
