"""Every pixel format: scaled by the file's range, composited over white, or refused."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from megatron_sr1.data.images import decode_image
from megatron_sr1.errors import DataError

pytestmark = pytest.mark.field
RAMP = np.tile(np.arange(256, dtype=np.int32), (8, 1))


def file(array, kind="TIFF", **options):
    buffer = io.BytesIO()
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def tiff(bits, data, sample_format=1, photometric=1, samples=1, extra=None):
    """A TIFF of 256 x 8 pixels in one strip."""
    tags = {256: 256, 257: 8, 258: bits, 259: 1, 262: photometric, 273: 0, 277: samples, 278: 8}
    tags |= {279: len(data), 339: sample_format} | ({338: extra} if extra is not None else {})
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    out = struct.pack("<4sIH", b"II*\0", 8, len(tags))
    for tag, value in sorted(tags.items()):
        if tag in (258, 339) and samples == 2:  # both numbers fit into the entry
            out += struct.pack("<HHIHH", tag, 3, 2, value, value)
        else:
            out += struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value)
    return out + b"\0\0\0\0" + data


def packed_12_bits(values):
    pairs = values.reshape(-1, 2).tolist()
    return b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in pairs)


def png(depth, color, rows, transparent):
    """A PNG of one row a given bytes string, with a transparent value."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 4, len(rows), depth, color, 0, 0, 0)),
        (b"tRNS", transparent),
        (b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks
    )


SCALED = {
    "TIFF of 32 bits, 0 to 255": file(RAMP),
    "TIFF of 32 bits, 0 to 65535": file(RAMP * 257),
    "TIFF of 32 bits without a sign": tiff(32, RAMP.astype("<u4").tobytes()),
    "TIFF of 32 bits, 0 to 4095": file(RAMP * 4095 // 255),
    "TIFF of 12 bits": tiff(12, packed_12_bits(RAMP * 4095 // 255)),
    "TIFF of 16 bits": file((RAMP * 257).astype(np.uint16)),
    "TIFF of 16 bits, big-endian": file(Image.fromarray((RAMP * 257).astype(">u2"))),
    "TIFF of 16 bits with a sign": tiff(16, (RAMP * 32767 // 255).astype("<i2").tobytes(), 2),
    "PNG of 16 bits": file((RAMP * 257).astype(np.uint16), "PNG"),
    "PPM of 16 bits": file(RAMP * 257, "PPM"),
    "TIFF of floats, 0 to 1": file((RAMP / 255).astype(np.float32)),
    "TIFF of floats, 0 to 255": file(RAMP.astype(np.float32)),
    "PFM, 0 to 1": file((RAMP / 255).astype(np.float32), "PPM"),
}


@pytest.mark.parametrize("name", SCALED)
def test_a_ramp_stays_a_ramp(name):
    grey = np.asarray(decode_image(SCALED[name]))
    assert grey.shape == (8, 256, 3)
    assert np.abs(grey.astype(int) - RAMP[:, :, None]).max() <= 1
    assert (grey[0, 0, 0], grey[0, 255, 0]) == (0, 255)


def test_16_bit_images_decode_as_before():
    """Dark ones too: their files say how many bits they have."""
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    for kind in ("PNG", "TIFF"):
        found = np.asarray(decode_image(file(values, kind)))[..., 0]
        assert np.array_equal(found, values // 257)
    dark = np.full((4, 4), 200, np.uint16)
    assert np.asarray(decode_image(file(dark, "PNG"))).max() == 0
    assert np.asarray(decode_image(file(dark.astype(np.int32), "PPM"))).max() == 0


@pytest.mark.parametrize("bits", [8, 16])
def test_images_whose_white_is_zero_are_inverted(bits):
    data = (RAMP * (1 if bits == 8 else 257)).astype("<u2" if bits == 16 else "u1").tobytes()
    grey = np.asarray(decode_image(tiff(bits, data, photometric=0)))[0, :, 0]
    assert grey.tolist() == list(range(255, -1, -1))


REFUSED = {
    "32 bits below 0": (file(RAMP - 1), "values from -1 to 254; expected 0 to one of 255, 1023"),
    "32 bits up to 102,000": (file(RAMP * 400), "values from 0 to 102000; expected 0 to one of"),
    "32 bits that wrap": (
        tiff(32, (RAMP.astype(np.int64) * 2**24).astype("<u4").tobytes()),
        "expected 0 to one of",
    ),
    "16 bits below 0": (tiff(16, (RAMP - 5).astype("<i2").tobytes(), 2), "expected none below 0"),
    "floats up to 3": (
        file((RAMP / 85).astype(np.float32)),
        "from 0 to 3; expected 0 to one of 1, 255",
    ),
    "floats up to 65535": (file((RAMP * 257.0).astype(np.float32)), "values from 0 to 65535"),
    "floats below 0": (file((RAMP / 255 - 0.5).astype(np.float32)), "values from -0.5 to 0.5"),
    "floats with NaN": (
        file(np.where(RAMP == 3, np.nan, RAMP).astype(np.float32)),
        "infinite or NaN",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_values_that_do_not_say_what_is_white_are_refused(name):
    data, reason = REFUSED[name]
    with pytest.raises(DataError, match=reason) as error:
        decode_image(data)
    assert str(error.value).startswith("the image does not decode")


TRANSPARENT = {
    "1 bit": (1, 0, [b"\x50"], b"\0\1", [0, 255, 0, 255], 1),
    "2 bits": (2, 0, [bytes([0b00011011])], b"\0\1", [0, 255, 170, 255], 1),
    "4 bits": (4, 0, [b"\x01\x5f"], b"\0\5", [0, 17, 255, 255], 2),
    "8 bits": (8, 0, [b"\x00\x10\x80\xff"], b"\0\x80", [0, 16, 255, 255], 2),
    "16 bits": (16, 0, [b"\0\0\x10\x10\x80\x80\xff\xff"], b"\x80\x80", [0, 16, 255, 255], 2),
    "16 bits, black": (16, 0, [b"\0\0\x10\x10\0\1\xff\xff"], b"\0\0", [255, 16, 0, 255], 0),
    "RGB": (8, 2, [b"\0\0\0\x10\2\3\x80\4\5\xff\xff\xff"], b"\0\x80\0\4\0\5", [0, 16, 255, 255], 2),
    "RGB of 16 bits": (
        16,
        2,
        [b"\0\0\0\0\0\0\x10\1\2\2\3\3\x80\1\4\2\5\3\xff\xff\xff\xff\xff\xff"],
        b"\x80\1\4\2\5\3",
        [0, 16, 255, 255],
        2,
    ),
}


@pytest.mark.parametrize("name", TRANSPARENT)
def test_the_transparent_value_of_a_png_is_white(name):
    depth, color, rows, transparent, reds, place = TRANSPARENT[name]
    pixels = np.asarray(decode_image(png(depth, color, rows, transparent)))
    assert pixels[0, :, 0].tolist() == reds
    assert pixels[0, place].tolist() == [255, 255, 255]


def test_premultiplied_grey_is_composited_over_white():
    data = bytes([100, 200]) * (256 * 8)
    pixel = decode_image(tiff(8, data, samples=2, extra=1)).getpixel((5, 5))
    assert abs(pixel[0] - (100 + 55)) <= 1 and len(set(pixel)) == 1
