"""Two hundred photos as somebody may have them: things drawn on pieces of scikit-learn's two real photos."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from sklearn.datasets import load_sample_images

CLASSES = ("ball", "box", "cross", "ring")


def make_photos(root: Path, *, per_class: int = 50, seed: int = 0) -> Path:
    """CLASS/NUMBER.jpg, colored, 80 to 160 pixels along each side; no test folder."""
    draws = np.random.default_rng(seed)
    backgrounds = [Image.fromarray(photo) for photo in load_sample_images().images]
    for name in CLASSES:
        (root / name).mkdir(parents=True)
        for number in range(per_class):
            _photo(name, backgrounds, draws).save(root / name / f"{number:03d}.jpg", quality=90)
    return root


def _photo(name: str, backgrounds: list[Image.Image], draws: np.random.Generator) -> Image.Image:
    width, height = draws.integers(80, 161, 2).tolist()
    background = backgrounds[draws.integers(len(backgrounds))]
    left, top = (
        int(draws.integers(0, have - need)) for have, need in zip(background.size, (width, height), strict=True)
    )
    image = background.crop((left, top, left + width, top + height))
    radius = float(draws.uniform(0.25, 0.4)) * min(width, height)
    x, y = (float(draws.uniform(radius, side - radius)) for side in (width, height))
    color = tuple(draws.integers(0, 256, 3).tolist())
    drawing, box = ImageDraw.Draw(image), (x - radius, y - radius, x + radius, y + radius)
    thick = max(3, round(radius / 3))
    if name == "ball":
        drawing.ellipse(box, fill=color)
    elif name == "box":
        drawing.rectangle(box, fill=color)
    elif name == "ring":
        drawing.ellipse(box, outline=color, width=thick)
    else:
        drawing.line((x - radius, y, x + radius, y), fill=color, width=thick)
        drawing.line((x, y - radius, x, y + radius), fill=color, width=thick)
    return image
