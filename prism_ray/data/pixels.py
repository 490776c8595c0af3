"""Pixels: image bytes of unknown origin to one square uint8 array, and that array to PNG and back.

Arrays are uint8, (H, W) for one channel and (H, W, 3) for RGB.
"""

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from prism_ray.errors import InputError, one_line

FORMATS = ("PNG", "JPEG", "WEBP")
"""The only decoders that ever see foreign bytes."""

MAX_PIXELS = 64_000_000
"""Larger images are refused before they are decoded: a small file can expand to any size."""


MAX_BYTES = 2**28
"""Larger files are refused before they are read: no image of so many pixels needs as much."""


def decode(data: bytes, name: str) -> Image.Image:
    """A foreign image, decoded to its last byte and turned as its EXIF orientation says.

    Raises:
        InputError: not a PNG, JPEG or WebP, truncated or damaged, or too large; names the image.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise _too_large(name)
        image.load()
        return ImageOps.exif_transpose(image)
    except InputError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(name) from error
    except UnidentifiedImageError as error:  # its own message is the address of a buffer
        raise _damaged(name, "unknown format") from error
    except Exception as error:  # decoders raise nearly anything on damaged bytes, and all of it means the same
        raise _damaged(name, one_line(error)) from error


def _damaged(name: str, reason: str) -> InputError:
    return InputError(
        f"dataset: image {name!r} cannot be decoded ({reason}); expected a complete PNG, JPEG or WebP file; "
        "replace or remove it"
    )


def too_many_bytes(name: str, size_bytes: int) -> InputError:
    """The refusal of an image file that is too long."""
    return InputError(
        f"dataset: image {name!r} has {size_bytes} bytes; expected at most {MAX_BYTES}; scale it down or remove it"
    )


def _too_large(name: str) -> InputError:
    return InputError(
        f"dataset: image {name!r} has more than {MAX_PIXELS // 1_000_000} megapixels; expected at most that many; "
        "scale it down or remove it"
    )


def fit(image: Image.Image, *, image_size: int, channels: int, pad: int) -> np.ndarray:
    """The image as a square array: gray or RGB, centre crop, zero padding of `pad` pixels, bilinear resize.

    PIL's bilinear filter is antialiased when it shrinks. Transparency is dropped, 16-bit gray keeps its high byte.
    """
    if image.mode in ("I", "I;16", "I;16B", "I;16L"):  # PIL would clip 16 bits to 255, not scale them
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")
    image = image.convert("L" if channels == 1 else "RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    if pad:
        image = ImageOps.expand(image, border=pad, fill=0)
    if image.width != image_size:
        image = image.resize((image_size, image_size), Image.Resampling.BILINEAR)
    return np.asarray(image)


def encode_png(pixels: np.ndarray) -> bytes:
    """The array as PNG, and nothing else: colour profiles and texts of the source stay behind."""
    sink = io.BytesIO()
    # Level 1: on small natural images higher levels cost several times the time for a few percent of size.
    Image.fromarray(pixels).save(sink, format="PNG", compress_level=1)
    return sink.getvalue()


def decode_png(data: bytes, *, shape: tuple[int, int, int]) -> np.ndarray:
    """The array inside a PNG written by `encode_png`.

    Args:
        shape: (height, width, channels) it must have.

    Raises:
        OSError, SyntaxError, ValueError: it is none, is damaged, or has another shape, which is seen before it is
            decoded.
    """
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        if (image.height, image.width, len(image.getbands())) != shape or image.mode not in ("L", "RGB"):
            raise ValueError(f"is {image.mode} of {image.height} x {image.width} pixels; expected {shape}")
        return np.asarray(image)
