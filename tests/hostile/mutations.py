"""Valid files, and the damage that fuzzing does to them.

Some edited files get correct checksums again, so that the damage is not detected by them.
"""

import io
import json
import random
import struct
import zlib

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from megatron_sr1.data.images import FORMATS


def picture(kind, mode="RGB", size=(67, 49), **options):
    """An image file of that format."""
    pixels = np.random.default_rng(7).integers(256, size=(size[1], size[0], 4), dtype=np.uint8)
    image = Image.fromarray(pixels, "RGBA").convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def valid_images():
    """One file of each format and of the odd kinds of each."""
    frames = [Image.new("RGB", (9, 7), c) for c in ("red", "green", "blue")]
    found = [picture(kind) for kind in FORMATS]
    found += [picture("PNG", m) for m in ("1", "L", "LA", "P", "RGBA", "I;16")]
    found += [picture("JPEG", m) for m in ("L", "CMYK")]
    found += [picture("JPEG", progressive=True), picture("WEBP", "RGBA", lossless=True)]
    found += [picture("TIFF", compression=c) for c in ("tiff_lzw", "jpeg", "tiff_deflate")]
    found += [picture("TIFF", m) for m in ("CMYK", "F", "I")]
    for kind in ("GIF", "WEBP", "PNG", "TIFF", "MPO"):
        buffer = io.BytesIO()
        frames[0].save(buffer, format=kind, save_all=True, append_images=frames[1:])
        found.append(buffer.getvalue())
    exif = frames[0].getexif()
    exif[0x0112] = 6
    found.append(picture("JPEG", exif=exif))
    return found


VALID_IMAGES = valid_images()
EDIT = st.tuples(
    st.sampled_from(["flip", "set", "cut", "insert", "copy", "zero", "number"]),
    st.floats(0, 1, exclude_max=True),
    st.integers(0, 2**32 - 1),
)
EDITS = st.one_of(EDIT.map(lambda edit: [edit]), st.lists(EDIT, min_size=1, max_size=8))


def mutated(data, edits):
    """Bytes with some edits; the places are shares of the length."""
    out = bytearray(data)
    for kind, share, value in edits:
        at = int(share * len(out)) if out else 0
        if kind == "flip" and out:
            out[at] ^= 1 << value % 8
        elif kind == "set" and out:
            out[at] = value % 256
        elif kind == "cut":
            del out[at : at + value % 600]
        elif kind == "insert":
            out[at:at] = random.Random(value).randbytes(value % 40)
        elif kind == "copy":
            out[at:at] = out[at : at + value % 1100]
        elif kind == "zero":
            out[at : at + value % 64] = bytes(len(out[at : at + value % 64]))
        elif kind == "number":
            out[at : at + 4] = struct.pack(">I" if value % 2 else "<I", value)
    return bytes(out)


def repaired_png(data):
    """A PNG with its chunks' checksums right again, so that edits reach the decoder."""
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        return data
    out, at = bytearray(data), 8
    while at + 12 <= len(out):
        end = at + 8 + int.from_bytes(out[at : at + 4], "big")
        if end + 4 > len(out):
            break
        out[end : end + 4] = struct.pack(">I", zlib.crc32(out[at + 4 : end]))
        at = end + 4
    return bytes(out)


def repaired_headers(data):
    """A tar whose header checksums are right again, so that edits get past them."""
    out = bytearray(data)
    for at in range(0, len(out) - 511, 512):
        if out[at + 257 : at + 262] == b"ustar":
            total = sum(out[at : at + 148]) + 8 * 32 + sum(out[at + 156 : at + 512])
            out[at + 148 : at + 156] = b"%06o\0 " % total
    return bytes(out)


def repaired_index(data):
    """An index with its checksum right again, where it is still JSON."""
    try:
        value = json.loads(data)
        value["crc32"] = zlib.crc32(json.dumps(value["samples"]).encode())
    except (ValueError, LookupError, TypeError, RecursionError):
        return data
    return json.dumps(value).encode()
