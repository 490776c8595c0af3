"""The prompt table: what is in it, that it repeats, that it survives being a file."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from prism_ray.data.imagenet_names import class_names
from prism_ray.errors import InputError
from prism_ray.prompts.captions import STYLE_AXES, caption
from prism_ray.prompts.content import PHOTO_AXES, STYLES
from prism_ray.prompts.names import class_phrases
from prism_ray.prompts.table import (
    PHOTO,
    SMALL_STYLES,
    PromptRow,
    TableSettings,
    count_words,
    from_jsonl,
    table_hash,
    to_jsonl,
    write_table,
)
from prism_ray.prompts.write import FALLBACK, Author, Messages

PHRASES = ["tench", "crane, large long-necked wading bird", "t-shirt or top"]
PHOTOS = TableSettings(per_class=40, photo_share=0.75, neutral_share=0.5, seed=0, is_small=False)
SMALL = replace(PHOTOS, is_small=True)
PLACES = "marsh pond meadow ditch harbour rooftop dune quarry orchard vineyard glacier canyon bridge tunnel attic barn"
SCENES = [f"a {place} {time}" for time in ("at dawn", "at noon", "in the rain") for place in PLACES.split()]


def of_class(rows: list[PromptRow], class_id: int) -> list[PromptRow]:
    return [row for row in rows if row.class_id == class_id]


def words(text: str) -> int:
    return len(text.split())


def author(answers: Callable[[int], str]) -> Author:
    """Answers by the number of the question."""
    asked: list[Messages] = []

    def ask(messages: Messages) -> str:
        asked.append(messages)
        return answers(len(asked) - 1)

    return Author("http", ask)


@pytest.mark.parametrize("settings", [PHOTOS, SMALL, replace(PHOTOS, name_only=True), replace(SMALL, name_only=True)])
def test_every_prompt_names_its_class_and_has_its_place(settings: TableSettings) -> None:
    rows = write_table(PHRASES, settings)
    for class_id, phrase in enumerate(PHRASES):
        own = of_class(rows, class_id)
        assert [row.prompt_index for row in own] == list(range(1 if settings.name_only else 40))
        assert all(phrase in row.prompt and row.phrase == phrase for row in own)


def test_a_name_alone_is_a_plain_photo_or_caption() -> None:
    photo, small = (write_table(["ankle boot", "bag"], replace(s, name_only=True)) for s in (PHOTOS, SMALL))
    assert [row.prompt for row in photo] == ["a photo of an ankle boot", "a photo of a bag"]
    assert [row.prompt for row in small] == [caption("ankle boot", {}), caption("bag", {})]
    assert {row.style for row in (*photo, *small)} == {PHOTO}


def test_a_table_repeats_with_its_seed_alone() -> None:
    rows = write_table(PHRASES, PHOTOS)
    assert table_hash(rows) == table_hash(write_table(PHRASES, PHOTOS))
    assert table_hash(rows) != table_hash(write_table(PHRASES, replace(PHOTOS, seed=1)))


def test_the_contents_of_a_class_do_not_depend_on_the_others() -> None:
    alone, together = write_table(PHRASES[:1], PHOTOS), write_table(PHRASES, PHOTOS)
    assert of_class(together, 0) == alone


def test_photo_prompts_of_a_class_differ() -> None:
    own = of_class(write_table(PHRASES, PHOTOS), 0)
    assert len({row.prompt.casefold() for row in own}) == 40


def test_a_prompt_says_its_style_its_name_and_its_values_in_order() -> None:
    for row in write_table(PHRASES, PHOTOS):
        start = "a photo" if row.style == PHOTO else row.style
        said = [row.values[axis] for axis in PHOTO_AXES if row.values[axis]]
        assert row.prompt == ", ".join([f"{start} of a {row.phrase}", *said])
        assert (row.source, row.reason) == ("template", None)


def test_axes_of_photos_are_balanced_exactly() -> None:
    for class_id in range(3):
        photos = [row for row in of_class(write_table(PHRASES, PHOTOS), class_id) if row.style == PHOTO]
        for axis, values in PHOTO_AXES.items():
            counts = Counter(row.values[axis] for row in photos)
            assert max(counts[value] for value in values) - min(counts[value] for value in values) <= 1


def test_axes_of_a_table_pass_a_chi_square_test() -> None:
    rows = write_table([f"thing {n}" for n in range(30)], PHOTOS)
    for axis, values in PHOTO_AXES.items():
        counts, expected = Counter(row.values[axis] for row in rows), len(rows) / len(values)
        # 11 degrees of freedom at most: 99 % of uniform draws stay below 24.7.
        assert sum((counts[value] - expected) ** 2 / expected for value in values) < 24.7


@pytest.mark.parametrize("settings", [PHOTOS, SMALL])
def test_the_photo_share_is_exact(settings: TableSettings) -> None:
    for class_id in range(3):
        styles = Counter(row.style for row in of_class(write_table(PHRASES, settings), class_id))
        assert styles.pop(PHOTO) == 30
        assert sum(styles.values()) == 10
        assert max(styles.values()) - min(styles.values()) <= 1


@pytest.mark.parametrize(("per_class", "share", "photos"), [(1, 0.8, 1), (7, 0.8, 6), (10, 0.0, 0), (10, 1.0, 10)])
def test_the_photo_share_is_rounded(per_class: int, share: float, photos: int) -> None:
    for settings in (PHOTOS, SMALL):
        rows = write_table(["tench"], replace(settings, per_class=per_class, photo_share=share))
        assert len(rows) == per_class
        assert sum(row.style == PHOTO for row in rows) == photos


def test_styles_that_a_class_has_no_room_for_come_in_another() -> None:
    rows = write_table([f"thing {n}" for n in range(10)], replace(PHOTOS, per_class=4))  # 3 photos, 1 of 10 styles
    assert {row.style for row in rows if row.style != PHOTO} == set(STYLES)


def test_any_first_part_of_a_class_has_about_the_share_of_photos() -> None:
    for settings in (PHOTOS, SMALL):
        own = of_class(write_table(PHRASES, settings), 1)
        for size in (10, 20, 30):
            assert sum(row.style == PHOTO for row in own[:size]) == pytest.approx(0.75 * size, abs=5)
    places = [
        row.prompt_index for row in of_class(write_table(PHRASES, replace(SMALL, photo_share=1)), 0) if not row.values
    ]
    assert {b - a for a, b in pairwise(places)} <= {1, 2, 3}


def test_small_photos_have_no_style_and_half_of_them_no_attribute_at_all() -> None:
    rows = of_class(write_table(PHRASES, SMALL), 0)
    photos = [row for row in rows if row.style == PHOTO]
    assert not any(axis in row.values for row in photos for axis in STYLE_AXES)
    assert sum(row.prompt == caption("tench", {}) for row in photos) == 15
    counts = Counter(row.prompt for row in photos)
    del counts[caption("tench", {})]
    assert len(counts) == 8
    assert max(counts.values()) - min(counts.values()) <= 1
    assert all(caption(row.phrase, row.values) == row.prompt for row in rows)


def test_every_style_of_the_small_world_is_one_attribute_of_how_a_picture_is_made() -> None:
    rows = [row for row in write_table(PHRASES, SMALL) if row.style != PHOTO]
    assert {row.style for row in rows} == {"thin", "bold", "gray", "noisy", "blurred", "inverted"}
    assert all(row.values[SMALL_STYLES[row.style]] == row.style for row in rows)
    assert all(sum(axis in row.values for axis in STYLE_AXES) == 1 for row in rows)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_neutral_share_is_exact(share: float) -> None:
    rows = write_table(["bag"], replace(SMALL, neutral_share=share, photo_share=1))
    assert sum(row.prompt == "a bag" for row in rows) == round(40 * share)


def test_a_prompt_that_is_too_long_loses_its_end_and_keeps_its_class() -> None:
    rows = write_table(PHRASES, replace(PHOTOS, max_tokens=16), count_tokens=words)
    assert all(len(row.prompt.split()) <= 16 for row in rows)
    assert all(PHRASES[row.class_id] in row.prompt for row in rows)
    assert all(all(value in row.prompt for value in row.values.values()) for row in rows)
    for class_id in range(3):
        assert len({row.prompt for row in of_class(rows, class_id)}) == 40, "what repeats once cut is drawn anew"


def test_more_prompts_than_can_differ_are_refused_with_their_number() -> None:
    settings = replace(PHOTOS, max_tokens=6, photo_share=1)  # room for "a photo of a tench, alone"
    with pytest.raises(
        InputError, match=r"per_class=40: 40 prompts of style 'photo' for 'tench' were to differ, \d do"
    ):
        write_table(["tench"], settings, count_tokens=words)


@pytest.mark.parametrize("settings", [PHOTOS, SMALL, replace(PHOTOS, name_only=True)])
def test_a_class_whose_name_alone_is_too_long_is_refused(settings: TableSettings) -> None:
    with pytest.raises(InputError, match=r"max_tokens=3.*prompts\.phrases"):
        write_table(PHRASES, replace(settings, max_tokens=3))


def test_values_that_name_a_class_are_not_drawn() -> None:
    rows = write_table(["kitchen", "forest"], PHOTOS)
    assert not any("forest" in row.prompt for row in of_class(rows, 0))
    assert not any("kitchen" in row.prompt for row in of_class(rows, 1))


def test_all_of_imagenet_fits_a_text_encoder_of_77_tokens() -> None:
    phrases = [found[0] for found in class_phrases(class_names())]
    rows = write_table(phrases, replace(PHOTOS, per_class=10))
    assert max(count_words(row.prompt) for row in rows) <= 60
    assert len({row.prompt for row in rows}) == len(rows) == 10_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"per_class": 0}, r"per_class=0"),
        ({"photo_share": 1.1}, r"photo_share=1\.1"),
        ({"neutral_share": -0.1}, r"neutral_share=-0\.1"),
        ({"styles": ()}, r"styles=\[\]"),
        ({"styles": ("a cartoon", "photo")}, "with 'photo'"),
        ({"styles": ("a cartoon", "a cartoon")}, "twice"),
    ],
)
def test_settings_that_make_no_table_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=rf"^prompts\..*{message}"):
        replace(PHOTOS, **change)


# Scenes by an author


def test_scenes_of_an_author_stand_behind_style_and_name() -> None:
    settings = replace(PHOTOS, per_class=12)
    rows = write_table(["tench"], settings, author=author(lambda _: json.dumps(SCENES[:24])))
    assert Counter(row.style == PHOTO for row in rows) == {True: 9, False: 3}
    assert {row.source for row in rows} == {"http"}
    assert len({row.values["scene"] for row in rows}) == 12
    for row in rows:
        assert row.values["scene"] in SCENES
        assert row.prompt == f"{'a photo' if row.style == PHOTO else row.style} of a tench, {row.values['scene']}"


def test_an_author_without_a_useful_answer_is_replaced_and_every_row_says_why() -> None:
    rows = write_table(["tench"], PHOTOS, author=author(lambda _: "Sure, here they are!"))
    assert len(rows) == 40
    assert {(row.source, row.reason) for row in rows} == {(FALLBACK, "the answer is not JSON")}


def test_what_replaces_missing_scenes_is_not_the_renditions_alone() -> None:
    rows = write_table(["tench"], PHOTOS, author=author(lambda n: json.dumps(SCENES[:20] if n == 0 else [])))
    assert Counter(row.source for row in rows) == {"http": 20, FALLBACK: 20}
    assert {row.source for row in rows if row.style != PHOTO} == {"http", FALLBACK}


def test_a_scene_that_is_too_long_is_cut_between_words() -> None:
    scene = "a marsh at dawn, with reeds and a wooden landing stage in the fog"
    settings = replace(PHOTOS, per_class=1, photo_share=1, max_tokens=9)
    (row,) = write_table(["tench"], settings, author=author(lambda _: json.dumps([scene])), count_tokens=words)
    assert row.prompt == "a photo of a tench, a marsh at dawn"
    assert row.values == {"scene": "a marsh at dawn"}


def test_an_author_is_told_what_a_class_is() -> None:
    asked: list[Messages] = []
    writer = Author("http", lambda messages: asked.append(messages) or "[]")
    write_table(["tench"], replace(PHOTOS, per_class=1), author=writer, glosses=["a freshwater fish"])
    assert all("a freshwater fish" in messages[-1]["content"] for messages in asked)


def test_an_author_for_the_small_world_is_refused() -> None:
    with pytest.raises(InputError, match=r"prompts\.back_end: .* template"):
        write_table(PHRASES, SMALL, author=author(lambda _: "[]"))


# The file


@pytest.mark.parametrize("settings", [PHOTOS, SMALL])
def test_a_table_survives_being_a_file(settings: TableSettings) -> None:
    rows = write_table([*PHRASES, 'café\u2028 "x"'], settings)
    assert from_jsonl(to_jsonl(rows)) == rows
    assert to_jsonl(rows).count(b"\n") == len(rows)
    assert list(json.loads(to_jsonl(rows).splitlines()[0])) == sorted(
        ["class_id", "phrase", "prompt", "prompt_index", "reason", "source", "style", "values"]
    )


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"",
        b"[]",
        b"null",
        b'{"class_id": 0}',
        b"\x00",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"class_id": "0"}',
        b'{"surprise": 1}',
    ],
)
def test_a_damaged_line_is_named(line: bytes) -> None:
    good = to_jsonl(write_table(PHRASES, replace(PHOTOS, name_only=True)))
    with pytest.raises(InputError, match="line 4"):
        from_jsonl(good + line + b"\n")


def test_a_line_that_was_cut_off_is_named() -> None:
    data = to_jsonl(write_table(PHRASES, replace(PHOTOS, name_only=True)))
    with pytest.raises(InputError, match="line 3"):
        from_jsonl(data[:-10])


@pytest.mark.parametrize(
    "change",
    [
        {"class_id": "0"},
        {"class_id": True},
        {"class_id": -1},
        {"prompt_index": 0.0},
        {"prompt": None},
        {"values": []},
        {"values": "none"},
        {"values": {"light": 3}},
        {"reason": 1},
    ],
)
def test_a_value_of_another_type_is_refused(change: dict[str, Any]) -> None:
    row = write_table(PHRASES, replace(PHOTOS, name_only=True))[0]
    damaged = json.loads(to_jsonl([row])) | change
    with pytest.raises(InputError, match="line 1"):
        from_jsonl(json.dumps(damaged).encode())


def test_two_prompts_of_one_place_are_refused() -> None:
    data = to_jsonl(write_table(PHRASES, replace(PHOTOS, name_only=True)))
    with pytest.raises(InputError, match=r"line 4: .*class 0 has prompt 0 already"):
        from_jsonl(data + data)
