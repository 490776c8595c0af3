"""Captions of the small world: one wording for what its generator is trained on and for what it is asked for.

Prompts steer only what captions taught, so both are written here.
"""

from collections.abc import Mapping

PHRASES: dict[str, dict[str, str]] = {
    "rotation": {"none": "", "left": "rotated left", "right": "rotated right"},
    "scale": {"none": "", "small": "small", "large": "large"},
    "thickness": {"none": "", "thin": "thin", "bold": "bold"},
    "background": {"black": "", "gray": "on a gray background", "noisy": "on a noisy background"},
    "blur": {"none": "", "blurred": "blurred"},
    "inversion": {"none": "", "inverted": "inverted"},
}
"""Axis → value → words, those of `methods.attributes.AXES`; a neutral value has none."""

BEFORE = ("scale", "thickness", "blur", "inversion")
"""Axes whose words stand before the name; the others' follow it."""

STYLE_AXES = ("thickness", "background", "blur", "inversion")
CONTENT_AXES = ("rotation", "scale")
"""Which axes say how a picture is made, and which what is in it."""


def caption(phrase: str, values: Mapping[str, str]) -> str:
    """A caption of the class `phrase` with these attributes.

    >>> caption("sneaker", {"scale": "small", "rotation": "left", "background": "gray"})
    'a small sneaker rotated left on a gray background'

    Raises:
        ValueError: an axis or a value that does not exist.
    """
    words = {}
    for axis, value in values.items():
        if value not in PHRASES.get(axis, {}):
            raise ValueError(f"attribute {axis}={value}; known: {PHRASES}")
        words[axis] = PHRASES[axis][value]
    before = [words.get(axis, "") for axis in BEFORE]
    after = [words.get(axis, "") for axis in PHRASES if axis not in BEFORE]
    return with_article(" ".join(part for part in (*before, phrase, *after) if part))


def with_article(words: str) -> str:
    """Words with "a" or "an", by their first letter.

    >>> with_article("ankle boot"), with_article("bag")
    ('an ankle boot', 'a bag')
    """
    return f"{'an' if words[:1].lower() in tuple('aeiou') else 'a'} {words}"
