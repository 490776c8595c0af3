"""Decoding of foreign images and the geometry of prepared ones."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from prism_ray.data import pixels
from prism_ray.data.pixels import decode, decode_png, encode_png, fit
from prism_ray.errors import InputError


def encoded(image: Image.Image, image_format: str = "PNG", **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, format=image_format, **options)
    return sink.getvalue()


def gradient(height: int, width: int, channels: int = 3) -> np.ndarray:
    values = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return values[..., 0] if channels == 1 else values


@pytest.mark.parametrize("channels", [1, 3])
def test_png_keeps_every_pixel(channels: int) -> None:
    array = gradient(9, 9, channels)
    np.testing.assert_array_equal(
        decode_png(encode_png(array), shape=(*array.shape[:2], array.ndim if array.ndim == 3 else 1)), array
    )


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
def test_the_three_formats_are_decoded_whatever_the_file_is_called(image_format: str) -> None:
    assert decode(encoded(Image.new("RGB", (5, 3)), image_format), "cat/1.png").size == (5, 3)


@pytest.mark.parametrize("image_format", ["BMP", "GIF", "TIFF"])
def test_other_decoders_never_see_foreign_bytes(image_format: str) -> None:
    with pytest.raises(InputError, match=r"'cat/1\.png' cannot be decoded .* PNG, JPEG or WebP"):
        decode(encoded(Image.new("RGB", (5, 3)), image_format), "cat/1.png")


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
def test_a_truncated_image_is_refused_by_name(image_format: str) -> None:
    data = encoded(Image.fromarray(gradient(64, 64)), image_format)
    with pytest.raises(InputError, match=r"'dog/7' cannot be decoded"):
        decode(data[: len(data) // 2], "dog/7")


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header promises a size that its few bytes of data do not hold."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [8_001, 12_000, 40_000])  # below PIL's warning, at it, above its error
def test_a_decompression_bomb_is_refused_by_name_before_it_is_decoded(side: int) -> None:
    with pytest.raises(InputError, match=r"'cat/bomb\.png' has more than 64 megapixels"):
        decode(png_of_size(side, side), "cat/bomb.png")


def test_the_pixel_limit_itself_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.new("L", (6, 4)))
    monkeypatch.setattr(pixels, "MAX_PIXELS", 24)
    assert decode(data, "x").size == (6, 4)
    monkeypatch.setattr(pixels, "MAX_PIXELS", 23)
    with pytest.raises(InputError):
        decode(data, "x")


def test_an_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to see it upright
    image = Image.fromarray(gradient(4, 8))
    turned = decode(encoded(image, "PNG", exif=exif), "x")
    np.testing.assert_array_equal(np.asarray(turned), np.rot90(np.asarray(image), k=-1))


def test_fit_takes_the_centre_square_of_a_wide_and_of_a_tall_image() -> None:
    wide, tall = gradient(4, 10), gradient(10, 4)
    np.testing.assert_array_equal(fit(Image.fromarray(wide), image_size=4, channels=3, pad=0), wide[:, 3:7])
    np.testing.assert_array_equal(fit(Image.fromarray(tall), image_size=4, channels=3, pad=0), tall[3:7])


def test_fit_pads_with_zeros_before_it_resizes() -> None:
    array = gradient(4, 4, 1)
    padded = fit(Image.fromarray(array), image_size=8, channels=1, pad=2)
    np.testing.assert_array_equal(padded, np.pad(array, 2))
    shrunk = fit(Image.fromarray(np.full((4, 4), 255, np.uint8)), image_size=4, channels=1, pad=2)
    assert shrunk.shape == (4, 4)
    assert shrunk[0, 0] < 128 < shrunk[2, 2]


def test_fit_is_the_identity_on_an_image_that_fits() -> None:
    array = gradient(6, 6)
    np.testing.assert_array_equal(fit(Image.fromarray(array), image_size=6, channels=3, pad=0), array)


def test_fit_shrinks_with_antialiasing() -> None:
    """Plain bilinear sampling of a one-pixel checkerboard would give stripes; its average is gray."""
    board = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    shrunk = fit(Image.fromarray(board), image_size=8, channels=1, pad=0).astype(int)
    assert np.abs(shrunk - 127.5).max() < 4


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_becomes_gray_or_rgb(mode: str, channels: int) -> None:
    array = fit(Image.new(mode, (7, 5)), image_size=5, channels=channels, pad=0)
    assert array.shape == ((5, 5) if channels == 1 else (5, 5, 3))
    assert array.dtype == np.uint8


def test_16_bit_gray_is_scaled_not_clipped() -> None:
    data = encoded(Image.fromarray(np.array([[0, 40_000], [65_535, 300]], dtype=np.uint16)))
    array = fit(decode(data, "x"), image_size=2, channels=1, pad=0)
    np.testing.assert_array_equal(array, [[0, 156], [255, 1]])


def test_a_transparent_palette_raises_no_warning() -> None:
    image = Image.new("P", (2, 2))
    image.putpalette([10, 20, 30, 40, 50, 60])
    data = encoded(image, transparency=b"\x00\x80")
    np.testing.assert_array_equal(fit(decode(data, "x"), image_size=2, channels=3, pad=0)[0, 0], [10, 20, 30])
