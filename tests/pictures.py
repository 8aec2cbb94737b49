"""Image files of one colour, for the data sets that tests make."""

import io

from PIL import Image


def png(color="red", size=(9, 5)) -> bytes:
    """Return a PNG; `color` is a name, or red, green and blue up to 255."""
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()
