"""Image files to RGB pixels, with limits checked before anything is decoded.

In: the original bytes of an image file. Out: an upright RGB image of Pillow, of an animation its
first frame. Sizes are read from the header first, so that a small file cannot unpack to gigabytes.
Only formats that Pillow decodes by itself are read: for some others it starts programs
(PostScript). Errors are `DataError`s that name the image.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

from megatron_sr1.data.guards import MAX_IMAGE_BYTES, printable
from megatron_sr1.errors import DataError

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""JPEG includes the several pictures of MPO, of which the first is read."""
MAX_IMAGE_PIXELS = 64 * 2**20
"""Larger images are refused before they are decoded: a few kilobytes can unpack to gigabytes."""
MAX_ASPECT_RATIO = 200
"""Qwen2-VL's image processor refuses a longer side more than so many times the shorter one."""
MAX_JPEG_SCANS = 100
"""A progressive JPEG has about ten; each one more is another pass over all pixels."""


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
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return _to_rgb(image)
        except Exception as error:  # a broken file ends in almost any error of Pillow's decoders
            reason = printable(str(error))[:200] or type(error).__name__
            raise DataError(f"{where}: the image does not decode: {reason}") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):  # 16 bits: Pillow would clip them at 255
        deep = np.asarray(upright).astype(np.int64)
        upright = Image.fromarray((deep.clip(0, 65535) // 257).astype(np.uint8))
    if upright.has_transparency_data:
        layer = upright.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return upright.convert("RGB")


def _open(data: bytes, where: str) -> Image.Image:
    """Open without decoding and check the size."""
    if len(data) > MAX_IMAGE_BYTES:
        raise DataError(f"{where}: an image file of {len(data)} bytes, at most {MAX_IMAGE_BYTES}")
    if data[:2] == b"\xff\xd8" and data.count(b"\xff\xda") > MAX_JPEG_SCANS:
        raise DataError(f"{where}: refused: a JPEG of more than {MAX_JPEG_SCANS} scans")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise DataError(f"{where}: refused: {error}") from None
    except Exception as error:  # a broken header ends in almost any error of Pillow's readers
        reason = printable(str(error))[:120] or type(error).__name__
        raise DataError(
            f"{where}: not an image that can be read as {', '.join(FORMATS)} ({len(data)} bytes, "
            f"{reason})"
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
