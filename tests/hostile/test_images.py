"""Damaged, disguised or oversized image files: decoded within limits, or refused."""

import io
import struct
import subprocess
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from megatron_sr1.data.images import MAX_JPEG_SCANS, decode_image
from megatron_sr1.data.processor import Processor
from megatron_sr1.errors import DataError


def file(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def plain(size=(9, 5), color="red", mode="RGB"):
    return Image.new(mode, size, color)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, *before, pixels=b""):
    """A PNG of one bit a pixel whose header says what it likes."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(pixels or bytes((width // 8 + 1) * height)))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(before) + body + chunk(b"IEND", b"")


NOISE = Image.fromarray(np.random.default_rng(0).integers(256, size=(40, 60, 3), dtype=np.uint8))
SCANS = file(NOISE, "JPEG", progressive=True)
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
POSTSCRIPT = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(%pipe%touch ran) (w) file\n"
)
REFUSED = {
    "decompression bomb": (png(100_000, 100_000, pixels=b"\0"), "refused: |more than 67108864"),
    "bomb below Pillow's limit": (png(12_000, 12_000), "12000 x 12000 pixels, more than"),
    "bomb in GIF": (
        b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\2\0;",
        "refused: |more than",
    ),
    "truncated JPEG": (file(NOISE, "JPEG")[:-200], "does not decode: .*truncated"),
    "truncated PNG": (file(NOISE)[:-200], "does not decode"),
    "truncated GIF": (file(NOISE, "GIF")[:-900], "does not decode"),
    "truncated WebP": (file(NOISE, "WEBP")[:-200], "does not decode|not an image"),
    "30,000 x 1": (png(30_000, 1), "30000 x 1 pixels; .* 200 times the shorter"),
    "1 x 30,000": (png(1, 30_000), "1 x 30000 pixels; .* 200 times the shorter"),
    "0 x 0": (png(0, 0), "not an image"),
    "zero bytes": (b"", "not an image that can be read as .* .0 bytes"),
    "text as jpg": (b"this is no picture\n" * 9, "not an image that can be read as"),
    "SVG": (SVG, "not an image that can be read as"),
    "PostScript, for which Pillow starts a program": (POSTSCRIPT, "not an image"),
    "PDF": (b"%PDF-1.4\n1 0 obj\n<< >>\nendobj\n", "not an image"),
    "JPEG 2000": (file(NOISE, "JPEG2000"), "not an image that can be read as"),
    "icon": (file(NOISE, "ICO"), "not an image that can be read as"),
    "a PNG whose text unpacks to gigabytes": (
        png(9, 9, *[chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**20 - 9)))] * 80),
        "not an image|does not decode",
    ),
    "a JPEG of a thousand scans": (
        SCANS[:-2] + SCANS[SCANS.rindex(b"\xff\xda") : -2] * 1000 + b"\xff\xd9",
        f"a JPEG of more than {MAX_JPEG_SCANS} scans",
    ),
    "PNG checksum wrong": (png(9, 9).replace(b"IDAT", b"IDAX"), "does not decode|not an image"),
    "TIFF with a directory in a circle": (
        b"II*\0\x08\0\0\0\1\0\0\1\4\0\1\0\0\0\1\0\0\0\x08\0\0\0",
        "not an image",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_image_is_refused_in_one_line(name, tmp_path, monkeypatch):
    data, reason = REFUSED[name]
    monkeypatch.chdir(tmp_path)

    def start(*arguments, **options):
        raise AssertionError(f"a program was started: {arguments}")

    monkeypatch.setattr(subprocess.Popen, "__init__", start)
    started = time.process_time()
    with pytest.raises(DataError, match=reason) as error:
        decode_image(data)
    assert time.process_time() - started < 5
    assert str(error.value).isprintable()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation_is_read(kind):
    frames = [plain(color=c) for c in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = file(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert decode_image(data).getpixel((4, 2)) == (255, 0, 0)


def test_cmyk_images_become_rgb():
    image = decode_image(file(plain(color=(0, 0, 0, 0), mode="CMYK"), "JPEG"))
    assert image.mode == "RGB" and min(image.getpixel((4, 2))) > 250


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(kind):
    ramp = np.tile(np.linspace(0, 65535, 16).astype(np.uint16), (4, 1))
    image = np.asarray(decode_image(file(Image.fromarray(ramp), kind)))
    assert image.shape == (4, 16, 3)
    assert image[0, :, 0].tolist() == [255 * i // 15 for i in range(16)]


def test_a_palette_with_transparency_is_composited_over_white():
    image = Image.new("P", (4, 4), 0)
    image.putpalette([0, 0, 0, 200, 10, 10])
    image.putpixel((1, 1), 1)
    pixels = decode_image(file(image, transparency=0))
    assert pixels.getpixel((0, 0)) == (255, 255, 255)
    assert pixels.getpixel((1, 1)) == (200, 10, 10)


@pytest.mark.parametrize(("turn", "size"), [(1, (9, 5)), (3, (9, 5)), (6, (5, 9)), (99, (9, 5))])
def test_exif_orientation_is_applied_if_it_is_valid(turn, size):
    exif = plain().getexif()
    exif[0x0112] = turn
    assert decode_image(file(plain(), "JPEG", exif=exif)).size == size


def test_an_image_of_one_pixel_is_accepted(tiny_model):
    image = decode_image(file(plain((1, 1))))
    processor = Processor(tiny_model, 784, 200704)
    assert processor.grid(image) == (1, 2, 2)
    assert processor.vision([image]).image_grid_thw.tolist() == [[1, 2, 2]]


def test_the_processor_accepts_the_longest_allowed_side(tiny_model):
    processor = Processor(tiny_model, 784, 200704)
    for size in ((200, 1), (1, 200), (6000, 30)):
        t, h, w = processor.grid(decode_image(file(plain(size))))
        assert t * h * w * 196 <= 2 * 200704
