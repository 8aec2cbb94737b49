"""Image files to RGB pixels, with limits checked before anything is decoded.

The size is read from the header first, so that a small file cannot unpack to gigabytes. Only
formats that Pillow decodes by itself are accepted; for some others (PostScript) it starts programs.
Of an animation, the first frame is read. What cannot be read raises a `DataError`.
"""

from __future__ import annotations

import base64
import io
import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import TiffImageFile

from megatron_sr1.data.guards import MAX_IMAGE_BYTES, inside, located, printable, read_file, shown
from megatron_sr1.errors import DataError

# For the whole process: `warnings.catch_warnings` is not safe while other threads decode.
warnings.filterwarnings("ignore", module=r"PIL\.")
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""JPEG includes MPO, a file of several pictures, of which the first is read."""
MAX_IMAGE_PIXELS = 64 * 2**20
"""Larger images are rejected before decoding: a few kilobytes can unpack to gigabytes."""
MAX_ASPECT_RATIO = 200
"""Largest ratio of the longer to the shorter side that Qwen2-VL's image processor accepts."""
MAX_JPEG_SCANS = 100
"""Progressive JPEGs have about ten scans; each one is another pass over all pixels."""
_DATA_URI = re.compile(r"data:image/[\w.+-]+;base64,")
_GREY_STEPS = {"L;2": 85, "L;4": 17}
"""For PNGs of 2 and 4 bits: Pillow scales pixels to 8 bits, but not the transparent value."""
_INTEGER_WHITES = (255.0, 1023.0, 4095.0, 16383.0, 65535.0)
"""White at 8, 10, 12, 14 and 16 bits: a TIFF of 32 bits does not say how many it uses."""
_FLOAT_WHITES = (1.0, 255.0)
_SLACK = 0.02
_DARKEST_WHITE = 8.0
"""A floating-point image whose maximum is below this and above 1 has an unknown range."""
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF


class ImageInfo(NamedTuple):
    """Width and height of a decoded image, pixels, and its file's extension, such as `png`."""

    width: int
    height: int
    extension: str


def largest_pixels(min_pixels: int, max_pixels: int, patch_side: int) -> int:
    """Return the largest area of any image after resizing, pixels.

    Sides are rounded to whole patches after the area is scaled, so an image can exceed
    `max_pixels`: an enlarged one is rounded up, and a thin one keeps a width of one patch. Source:
    `smart_resize` of transformers' Qwen2-VL image processor. `patch_side` is the side of a merged
    patch, pixels.
    """
    area = patch_side**2
    # Reduced: rounding down keeps the limit, unless a side below one patch is raised to one.
    thin = math.floor(math.sqrt(MAX_ASPECT_RATIO * max_pixels) / patch_side)
    largest = max(max_pixels // area, thin)
    # Enlarged to a x b = min_pixels / area patches, a <= b: the worst a is just above k - 1.
    patches = min_pixels / area
    narrowest = math.sqrt(patches / MAX_ASPECT_RATIO)
    for k in range(max(1, math.ceil(narrowest)), math.ceil(math.sqrt(patches)) + 1):
        longer = math.floor(patches / max(k - 1, narrowest)) + 1
        largest = max(largest, k * longer)
    return largest * area


def image_bytes(value: Any, folder: Path) -> bytes:
    """Return the bytes of an image of a row: bytes, a path, a data: URI, or `{"bytes", "path"}`."""
    if isinstance(value, Mapping):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        expected = "expected bytes, a path, or {'bytes': …, 'path': …}"
        raise DataError(f"a {type(value).__name__}; {expected}")
    if not value.startswith("data:"):
        path = inside(folder, value)
        with located(shown(str(path), 400)):
            return read_file(path, MAX_IMAGE_BYTES)
    try:
        head = _DATA_URI.match(value)
        if head is not None:
            return base64.b64decode("".join(value[head.end() :].split()), validate=True)
    except ValueError:  # incomplete, or characters outside the alphabet
        pass
    raise DataError(f"{shown(value)}; expected data:image/…;base64, followed by base64")


def file_extension(data: bytes) -> str:
    """Return the file extension of an image's bytes, by its header, e.g. `png` or `jpeg`."""
    with _open(data) as image:
        return str(image.format).lower()


def decode_image(data: bytes) -> Image.Image:
    """Decode an image file to RGB, rotated upright, with transparency composited over white."""
    with _open(data) as image:
        return _decoded(image)


def image_info(data: bytes) -> ImageInfo:
    """Decode an image file, so that a broken one is found, and return what it holds."""
    with _open(data) as image:
        extension = str(image.format).lower()
        return ImageInfo(*_decoded(image).size, extension)


def _decoded(image: Image.Image) -> Image.Image:
    try:
        return _to_rgb(image)
    except Exception as error:  # Pillow's decoders raise almost any error on broken files
        reason = printable(error) or type(error).__name__
        raise DataError(f"the image does not decode: {reason}") from None


def _open(data: bytes) -> Image.Image:
    """Open without decoding and check the size."""
    if len(data) > MAX_IMAGE_BYTES:
        raise DataError(f"an image file of {len(data)} bytes, at most {MAX_IMAGE_BYTES}")
    if data[:2] == b"\xff\xd8" and data.count(b"\xff\xda") > MAX_JPEG_SCANS:
        raise DataError(f"refused: a JPEG of more than {MAX_JPEG_SCANS} scans")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise DataError(f"refused: {error}") from None
    except Exception as error:  # Pillow's readers raise almost any error on broken headers
        reason = f"{len(data)} bytes, {printable(error, 120) or type(error).__name__}"
        formats = ", ".join(FORMATS)
        raise DataError(f"not an image that can be read as {formats} ({reason})") from None
    width, height = image.size
    size = f"{width} x {height} pixels"
    if width * height > MAX_IMAGE_PIXELS:
        raise DataError(f"{size}, more than {MAX_IMAGE_PIXELS}; scale it down")
    if max(width, height) > MAX_ASPECT_RATIO * max(1, min(width, height)):
        longest = f"at most {MAX_ASPECT_RATIO} times the shorter one"
        raise DataError(f"{size}; the model takes a longer side of {longest}")
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    tiles = getattr(image, "tile", ())
    raw_mode = tiles[0].args if image.format == "PNG" and tiles else ""
    image.load()
    transparent = image.info.get("transparency")
    if raw_mode in _GREY_STEPS and isinstance(transparent, int):
        image.info["transparency"] = transparent * _GREY_STEPS[raw_mode]
    elif raw_mode == "RGB;16B" and isinstance(transparent, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    upright = ImageOps.exif_transpose(image)
    if upright.mode == "F" or upright.mode.startswith("I"):  # Pillow would clip them at 255
        upright = _to_eight_bits(upright, image.tag_v2 if isinstance(image, TiffImageFile) else {})
    if upright.mode == "La":  # can be converted to LA only
        upright = upright.convert("LA")
    if upright.has_transparency_data:
        layer = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return upright.convert("RGB")


def _to_eight_bits(image: Image.Image, tags: Mapping[int, Any]) -> Image.Image:
    """Scale an image of mode F, I or I;16 to 8 bits, by the tags of the file if it is a TIFF."""
    deep = np.asarray(image).astype(np.float64)
    if not np.isfinite(deep).all():
        raise ValueError("pixels that are infinite or NaN; convert it to 8 bits")
    white = _white(image.mode, tags, float(deep.min()), float(deep.max()))
    grey = deep.clip(0, white) * 255 / white
    grey = np.rint(grey) if image.mode == "F" else np.floor(grey)
    if tags.get(_PHOTOMETRIC) == 0:  # white is zero
        grey = 255 - grey
    scaled = Image.fromarray(grey.astype(np.uint8))
    if isinstance(image.info.get("transparency"), int):
        opaque = deep != image.info["transparency"]
        scaled.putalpha(Image.fromarray((opaque * 255).astype(np.uint8)))  # mode LA
    return scaled


def _white(mode: str, tags: Mapping[int, Any], least: float, most: float) -> float:
    """Return the value of white: by the file's bit depth, else the smallest usual one that fits."""
    bits = tags.get(_BITS_PER_SAMPLE, (16,))[0]
    if mode != "F" and bits <= 16:
        is_signed = tags.get(_SAMPLE_FORMAT, (1,))[0] == 2
        if least < 0:
            raise ValueError(f"values from {least:g} on; expected none below 0")
        return float(2 ** (bits - is_signed) - 1)
    slack = _SLACK if mode == "F" else 0.0  # resampling filters overshoot
    usual = _FLOAT_WHITES if mode == "F" else _INTEGER_WHITES
    white = next((w for w in usual if least >= -slack * w and most <= w * (1 + slack)), None)
    if white is None or (white > 1.0 and mode == "F" and most < _DARKEST_WHITE):
        expected = f"0 to one of {', '.join(f'{w:g}' for w in usual)}"
        raise ValueError(
            f"values from {least:g} to {most:g}; expected {expected}; convert it to 8 bits"
        )
    return white
