"""Image files to RGB pixels, with limits checked before anything is decoded.

In: the original bytes of an image file. Out: an upright RGB image of Pillow. Sizes are read from
the header first, so that a small file cannot unpack to gigabytes. Errors are `DataError`s that
name the image.
"""

from __future__ import annotations

import io
import warnings

from PIL import Image, ImageOps

from megatron_sr1.errors import DataError

MAX_IMAGE_PIXELS = 64 * 2**20
"""Larger images are refused before they are decoded: a few kilobytes can unpack to gigabytes."""
MAX_ASPECT_RATIO = 200
"""Qwen2-VL's image processor refuses a longer side more than so many times the shorter one."""


def image_format(data: bytes, where: str) -> str:
    """File extension of an image's bytes, as `png` or `jpeg`.

    Raises:
        DataError: not an image that Pillow knows, or too large.
    """
    with _open(data, where) as image:
        return str(image.format).lower()


def decode_image(data: bytes, where: str) -> Image.Image:
    """Decode an image file to RGB, turned upright, transparency laid over white.

    Args:
        data: the file's bytes.
        where: names the image in errors.

    Raises:
        DataError: not an image, truncated, too large, or too long for its width.
    """
    with _open(data, where) as image:
        try:
            image.load()
        except (OSError, SyntaxError, ValueError, EOFError) as error:
            raise DataError(f"{where}: the image does not decode: {error}") from None
        upright = ImageOps.exif_transpose(image)
        if upright.has_transparency_data:
            layer = upright.convert("RGBA")
            white = Image.new("RGBA", layer.size, "white")
            return Image.alpha_composite(white, layer).convert("RGB")
        return upright.convert("RGB")


def _open(data: bytes, where: str) -> Image.Image:
    """Open without decoding and check the size."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise DataError(f"{where}: refused: {error}") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(
            f"{where}: not an image that Pillow can read ({len(data)} bytes, {error})"
        ) from None
    width, height = image.size
    if width * height > MAX_IMAGE_PIXELS:
        raise DataError(
            f"{where}: {width} x {height} pixels, more than {MAX_IMAGE_PIXELS}; scale it down"
        )
    if max(width, height) > MAX_ASPECT_RATIO * max(1, min(width, height)):
        raise DataError(
            f"{where}: {width} x {height} pixels; the model takes a longer side of at most "
            f"{MAX_ASPECT_RATIO} times the shorter one"
        )
    return image
