"""Reads the images of a row: paths, bytes, data: URIs, and the records that wrap them.

In: the value of an image column, or the images inside a conversation. Out: the bytes of the image
files. Nothing is downloaded: URLs are rejected.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_sr1.data.guards import MAX_IMAGE_BYTES, MAX_IMAGES, inside, read_file, shown
from megatron_sr1.errors import DataError

_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
_DATA_URI = re.compile(r"data:image/[\w.+-]+;base64,")


def image_files(value: Any, folder: Path, where: str) -> tuple[bytes, ...]:
    """Return the bytes of an image or of a list of images.

    Args:
        value: an image (a path, bytes, a data: URI, a Pillow image, `{"bytes", "path"}`) or a list
            of them.
        folder: base of relative paths, which must not lead out of it.
        where: names the row in errors.

    Raises:
        DataError: too many images, or one that cannot be read.
    """
    values = value if isinstance(value, list | tuple) else [value]
    if len(values) > MAX_IMAGES:
        raise DataError(f"{where}: {len(values)} images, at most {MAX_IMAGES}")
    return tuple(_image_file(v, folder, f"{where}, image {i}") for i, v in enumerate(values))


def _image_file(value: Any, folder: Path, where: str) -> bytes:
    if isinstance(value, Mapping):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, bytes | bytearray):
        return bytes(value)
    if isinstance(value, Image.Image):
        return _encoded(value, where)
    if isinstance(value, str) and value.startswith("data:"):
        return _decoded(value, where)
    if isinstance(value, str | Path):
        return read_file(inside(folder, value, where), MAX_IMAGE_BYTES, where)
    raise DataError(
        f"{where}: a {type(value).__name__}; expected bytes, a path, a PIL image or "
        "{'bytes': …, 'path': …}",
        kind="an image that is neither bytes nor a path",
    )


def _encoded(image: Image.Image, where: str) -> bytes:
    """Encode an image losslessly; PNG would clip some modes and cannot store others."""
    buffer = io.BytesIO()
    try:
        image.save(buffer, format="PNG" if image.mode in _PNG_MODES else "TIFF")
    except (OSError, KeyError, ValueError) as error:
        raise DataError(f"{where}: an image of mode {image.mode}: {error}") from None
    return buffer.getvalue()


def _decoded(uri: str, where: str) -> bytes:
    head = _DATA_URI.match(uri)
    try:
        if head is not None:
            return base64.b64decode("".join(uri[head.end() :].split()), validate=True)
    except ValueError:  # incomplete, or characters outside the alphabet
        pass
    raise DataError(f"{where}: {shown(uri)}; expected data:image/…;base64, followed by base64")
