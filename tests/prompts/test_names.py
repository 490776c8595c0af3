"""Names of classes, against the facts of timm's own tables."""

from collections import Counter
from functools import cache

import pytest

from prism_ray.data.imagenet_names import class_names, synsets
from prism_ray.errors import InputError
from prism_ray.prompts import names
from prism_ray.prompts.names import choose_phrases, class_glosses, class_phrases, fragment, readable, short_name


@pytest.fixture(scope="module")
def imagenet() -> list[list[str]]:
    return class_phrases(class_names())


@cache
def lemmas() -> dict[str, list[str]]:
    table = names._table("imagenet_synset_to_lemma.txt")
    return {synset: text.casefold().split(", ") for synset, text in table.items()}


def ambiguous() -> list[bool]:
    """Of each ImageNet class, whether its first name means several things in all of WordNet's 21,844 classes."""
    meanings = Counter(name for found in lemmas().values() for name in set(found))
    return [meanings[lemmas()[synset][0]] > 1 for synset in synsets()]


def test_three_pairs_of_imagenet_share_a_first_lemma_and_191_name_several_things() -> None:
    first = Counter(lemmas()[synset][0] for synset in synsets())
    assert {name for name, count in first.items() if count > 1} == {"crane", "cardigan", "maillot"}
    assert sum(ambiguous()) == 191


def test_every_class_of_imagenet_has_phrases_of_its_own(imagenet: list[list[str]]) -> None:
    assert len({phrases[0].casefold() for phrases in imagenet}) == 1000
    owners = Counter(phrase.casefold() for phrases in imagenet for phrase in phrases)
    assert set(owners.values()) == {1}


@pytest.mark.parametrize("shared", ["crane", "cardigan", "maillot"])
def test_classes_that_share_a_name_get_phrases_that_share_none(shared: str, imagenet: list[list[str]]) -> None:
    ids = [n for n, synset in enumerate(synsets()) if lemmas()[synset][0] == shared]
    assert len(ids) == 2
    assert not set(imagenet[ids[0]]) & set(imagenet[ids[1]])


def test_exactly_the_ambiguous_names_are_explained(imagenet: list[list[str]]) -> None:
    assert ["," in phrases[0] for phrases in imagenet] == ambiguous()


def test_a_name_is_the_first_lemma_of_no_other_class(imagenet: list[list[str]]) -> None:
    owners = Counter(name for synset in synsets() for name in set(lemmas()[synset]))
    for synset, phrases in zip(synsets(), imagenet, strict=True):
        own = lemmas()[synset]
        free = [name for name in own if owners[name] == 1]
        assert short_name(phrases[0]).casefold() == (free or own)[0]


@pytest.mark.parametrize(
    ("class_id", "phrase"),
    [
        (1, "goldfish"),
        (134, "crane, large long-necked wading bird"),
        (517, "crane, one that lifts and moves heavy objects"),
        (264, "Cardigan Welsh corgi, slightly bowlegged variety of corgi"),
        (474, "cardigan, knitted jacket"),
        (638, "maillot, tights for dancers or gymnasts"),
        (639, "tank suit, woman's one-piece bathing suit"),
    ],
)
def test_phrases_of_imagenet_as_measured(class_id: int, phrase: str, imagenet: list[list[str]]) -> None:
    assert imagenet[class_id][0] == phrase


def test_wordnet_ids_are_looked_up_like_readable_names(imagenet: list[list[str]]) -> None:
    assert class_phrases(synsets()) == imagenet
    assert class_glosses(synsets()) == class_glosses(class_names())


def test_names_of_a_part_of_imagenet_collide_with_that_part_alone() -> None:
    corgi, beaver, jacket = "n02113186", "n02363005", "n02963159"
    assert short_name(class_phrases([corgi, beaver, jacket])[0][0]) == "Cardigan Welsh corgi"
    assert short_name(class_phrases([corgi, beaver])[0][0]) == "Cardigan"


def test_glosses_are_wordnets_where_it_knows_the_classes() -> None:
    assert class_glosses(class_names())[134].startswith("large long-necked wading bird of marshes and plains")
    assert class_glosses(["bag", "coat"]) == ["", ""]


@pytest.mark.parametrize(
    ("gloss", "words"),
    [
        ("box with a lid; used for storage", "box with a lid"),
        (
            "(computer science) an output device that prints the results of data",
            "output device that prints the results",
        ),
        ("any of various terrestrial gastropods having an elongated slimy body and no shell", "terrestrial gastropods"),
        ("a long (usually round) rod of wood or metal or plastic", "long rod"),
        ("lifts and moves heavy objects; lifting tackle is suspended", "one that lifts and moves heavy objects"),
        ("a rocket carrying a warhead of conventional or nuclear explosives", "rocket carrying a warhead"),
        ("a device for lighting or igniting fuel or charges or fires", "device for lighting or igniting fuel"),
    ],
)
def test_a_fragment_is_a_part_that_stands_alone(gloss: str, words: str) -> None:
    assert fragment(gloss) == words


def test_fragments_are_short_and_do_not_end_in_the_middle(imagenet: list[list[str]]) -> None:
    fragments = [phrases[0].partition(", ")[2] for phrases in imagenet if "," in phrases[0]]
    assert max(len(text.split()) for text in fragments) <= 8
    assert not {text.split()[-1] for text in fragments} & {"of", "a", "an", "the", "and", "or", "with", "that", "in"}


@pytest.mark.parametrize(
    ("name", "words"),
    [("T-shirt/top", "t-shirt or top"), ("Ankle_boot", "ankle boot"), ("3", "digit three"), ("  a  b ", "a b")],
)
def test_other_names_become_words(name: str, words: str) -> None:
    assert readable(name) == words


def test_the_user_knows_better() -> None:
    assert class_phrases(["Bag", "Coat"], {"Bag": "handbag"}) == [["handbag"], ["coat"]]
    assert class_phrases(synsets(), {"n03710637": "ballet tights"})[638] == ["ballet tights"]


@pytest.mark.parametrize(
    ("class_names", "overrides", "message"),
    [
        (["Bag", "Coat"], {"bag": "handbag"}, "'bag' is no class; known: Bag, Coat"),
        (["Bag", "Coat"], {"Bag": "Coat"}, "'Coat' would be called 'coat', as 'Bag' is"),
        (["ankle boot", "Ankle_boot"], {}, "'Ankle_boot' would be called 'ankle boot', as 'ankle boot' is"),
        (["Bag", "Coat"], {"Bag": " "}, "'Bag' would be called ''; expected a phrase of its own"),
        (["Bag", "_"], {}, "'_' would be called ''"),
    ],
)
def test_a_name_of_nothing_or_of_two_classes_is_refused(
    class_names: list[str], overrides: dict[str, str], message: str
) -> None:
    with pytest.raises(InputError, match=rf"prompts\.phrases: .*{message}"):
        class_phrases(class_names, overrides)


def test_the_phrase_that_teachers_recognize_is_chosen_and_of_equal_ones_the_first() -> None:
    candidates = [["maillot, tights", "tank suit"], ["crane", "bird"], ["ox"]]
    agreement = {
        (0, "maillot, tights"): 0.1,
        (0, "tank suit"): 0.8,
        (1, "crane"): 0.5,
        (1, "bird"): 0.5,
        (2, "bird"): 1,
    }
    assert choose_phrases(candidates, agreement) == ["tank suit", "crane", "ox"]
    assert choose_phrases(candidates, {}) == ["maillot, tights", "crane", "ox"]
