"""One wording for what is taught and what is asked."""

import pytest

from prism_ray.methods.attributes import AXES
from prism_ray.prompts.captions import CONTENT_AXES, PHRASES, STYLE_AXES, caption


def test_every_attribute_has_words_and_only_the_neutral_ones_have_none() -> None:
    assert {axis: tuple(values) for axis, values in PHRASES.items()} == AXES
    for axis, values in AXES.items():
        assert [bool(PHRASES[axis][value]) for value in values] == [False, *[True] * (len(values) - 1)]


def test_every_axis_is_content_or_style() -> None:
    assert sorted([*CONTENT_AXES, *STYLE_AXES]) == sorted(AXES)


def test_captions_of_different_attributes_differ() -> None:
    made = {caption("bag", {axis: value}) for axis, values in AXES.items() for value in values[1:]}
    assert len(made) == sum(len(values) - 1 for values in AXES.values())
    assert caption("bag", {}) not in made


def test_the_class_is_named_as_it_is() -> None:
    assert "ankle boot" in caption("ankle boot", {axis: values[-1] for axis, values in AXES.items()})


@pytest.mark.parametrize("values", [{"mood": "happy"}, {"blur": "very"}])
def test_attributes_without_words_are_refused(values: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="known"):
        caption("bag", values)
