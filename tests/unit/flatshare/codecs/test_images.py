"""Image files from strangers: only what describes pixels reaches the decoder, turned as the file says."""

from __future__ import annotations

import io
import struct
import time
import tracemalloc
import zlib
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from flatshare.codecs.images import MAX_SEGMENTS, decode_images
from flatshare.errors import BadInput, TooLarge
from flatshare.models.architecture import architecture

NETWORK = architecture("mnist-cnn")
RANDOM = np.random.default_rng(0)
LIMIT_BYTES = 8 * 1024**2
"""What a request may have: the files below are as large as that allows."""

GREY = Image.fromarray(RANDOM.integers(0, 256, (28, 28), dtype=np.uint8))


def file_of(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(*extra: bytes, image: Image.Image = GREY) -> bytes:
    plain = file_of(image, "PNG")
    after_header = 8 + 25
    return plain[:after_header] + b"".join(extra) + plain[after_header:]


def segment(marker: int, data: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data


def jpeg_with(*extra: bytes, image: Image.Image = GREY) -> bytes:
    plain = file_of(image, "JPEG", quality=95)
    return plain[:2] + b"".join(extra) + plain[2:]


def exif(orientation: int, order: str = "<", *, entries: int = 1) -> bytes:
    """A TIFF header and one directory, in which the orientation comes last."""
    start = b"II*\0" if order == "<" else b"MM\0*"
    others = b"".join(struct.pack(f"{order}HHII", 0x10F + n, 4, 1, 7) for n in range(entries - 1))
    own = struct.pack(f"{order}HHIHH", 0x112, 3, 1, orientation, 0)
    return start + struct.pack(f"{order}IH", 8, entries) + others + own + bytes(4)


def pixels(data: bytes) -> NDArray[np.float32]:
    return decode_images([data], NETWORK, 10)


def bomb_of_exif_entries() -> bytes:
    """2,000 directory entries that all point at the same 65,000 bytes: Pillow copies them for each."""
    entries = b"".join(struct.pack("<HHII", 1 + n, 1, 60_000, 8) for n in range(2_000))
    tiff = b"II*\0" + struct.pack("<IH", 8, 2_000) + entries + bytes(4)
    parts = [b"Exif\0\0" + tiff + bytes(65_000 - len(tiff) - 6)] + [b"Exif\0\0" + bytes(65_000)] * 60
    return jpeg_with(*(segment(0xE1, part) for part in parts))


def bomb_of_many_exif_segments() -> bytes:
    return jpeg_with(*[segment(0xE1, b"Exif\0\0" + bytes(60_000))] * (LIMIT_BYTES // 60_100))


def bomb_of_profiles() -> bytes:
    profile = chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(10**6), 9))
    return png_with(*[profile] * (LIMIT_BYTES // len(profile) // 3))


def bomb_of_texts() -> bytes:
    text = chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(900_000), 9))
    return png_with(*[text] * (LIMIT_BYTES // len(text) // 3))


def bomb_of_tiny_chunks() -> bytes:
    return png_with(*[chunk(b"tIME", b"")] * (LIMIT_BYTES // 12))


def bomb_of_tiny_segments() -> bytes:
    return jpeg_with(*[segment(0xFE, b"")] * (LIMIT_BYTES // 4))


def bomb_of_scans() -> bytes:
    """A progressive file whose last scan comes again and again."""
    plain = file_of(GREY, "JPEG", quality=95, progressive=True)
    scans = [at for at in range(len(plain)) if plain[at : at + 2] == b"\xff\xda"]
    last = plain[scans[-1] : -2]
    return plain[:-2] + last * (LIMIT_BYTES // len(last) // 2) + plain[-2:]


def bomb_of_pixel_data() -> bytes:
    plain = file_of(GREY, "PNG")
    return plain[:33] + chunk(b"IDAT", zlib.compress(bytes(5 * 10**9 // 1000), 9)) * 1500 + plain[33:]


BOMBS = {
    make.__name__: make
    for make in (
        bomb_of_exif_entries, bomb_of_many_exif_segments, bomb_of_profiles, bomb_of_texts, bomb_of_tiny_chunks,
        bomb_of_tiny_segments, bomb_of_scans, bomb_of_pixel_data,
    )
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_what_expands_costs_no_more_than_reading_it(name: str) -> None:
    """Memory stays below the file's own, time near that of as many plain bytes; answered or refused."""
    data = BOMBS[name]()
    assert len(data) <= LIMIT_BYTES + 100_000, "the limit on bodies would have caught it"
    began = time.perf_counter()
    bytes(data).count(b"\xff\xd8") + zlib.crc32(data)
    plain_s = time.perf_counter() - began
    tracemalloc.start()
    try:
        began = time.perf_counter()
        try:
            decode_images([data], NETWORK, 10)
        except BadInput as error:
            assert "segments" in error.message or "bytes of pixels" in error.message, error.message
        took_s = time.perf_counter() - began
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * 1024**2, f"{peak / 1e6:.1f} MB for a file of {len(data) / 1e6:.1f} MB"
    # tracemalloc slows each of at most MAX_SEGMENTS steps; the bombs took 1.6 to 17 s where they worked.
    assert took_s < 20 * plain_s + 0.2


def test_the_pixels_are_those_of_the_file_without_metadata() -> None:
    colour = Image.fromarray(RANDOM.integers(0, 256, (28, 28, 3), dtype=np.uint8))
    palette = GREY.convert("P")
    extra_png = (
        chunk(b"tEXt", b"a\0b"),
        chunk(b"iCCP", b"x\0\0" + zlib.compress(b"profile")),
        chunk(b"gAMA", b"\0\0\xb1\x8f"),
    )
    extra_jpeg = (
        segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x/>"),
        segment(0xE2, b"ICC_PROFILE\0\1\1x"),
        segment(0xFE, b"hi"),
    )
    for image in (GREY, colour, palette):
        np.testing.assert_array_equal(
            pixels(png_with(*extra_png, image=image)), pixels(file_of(image, "PNG"))
        )
    for image in (GREY, colour):
        np.testing.assert_array_equal(
            pixels(jpeg_with(*extra_jpeg, image=image)), pixels(file_of(image, "JPEG", quality=95))
        )


def test_decoded_pixels_are_pillows_own() -> None:
    """Every flavour that Pillow writes: progressive, optimised, restart markers, interlaced rows of all filters."""
    colour = Image.fromarray(RANDOM.integers(0, 256, (28, 28, 3), dtype=np.uint8))
    for image in (GREY, colour):
        for options in (
            {},
            {"progressive": True},
            {"optimize": True},
            {"subsampling": 0},
            {"restart_marker_blocks": 1},
            {"quality": 1},
        ):
            data = file_of(image, "JPEG", **options)
            wanted = np.asarray(Image.open(io.BytesIO(data)).convert("L"))
            np.testing.assert_array_equal(pixels(data), NETWORK.preprocess(wanted[None]))
    for image in (GREY, colour, GREY.convert("1"), GREY.convert("P")):
        data = file_of(image, "PNG", optimize=True)
        np.testing.assert_array_equal(
            pixels(data), NETWORK.preprocess(np.asarray(Image.open(io.BytesIO(data)).convert("L"))[None])
        )


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_as_it_says(orientation: int, order: str) -> None:
    tag = exif(orientation, order, entries=3)
    for data in (jpeg_with(segment(0xE1, b"Exif\0\0" + tag)), png_with(chunk(b"eXIf", tag))):
        with Image.open(io.BytesIO(data)) as image:
            wanted = np.asarray(ImageOps.exif_transpose(image), dtype=np.uint8)
        np.testing.assert_array_equal(pixels(data), NETWORK.preprocess(wanted[None]))


@pytest.mark.parametrize(
    "tag",
    [b"", b"II", b"II*\0\xff\xff\xff\xff", b"XX*\0" + bytes(20), exif(0), exif(9), exif(65535), exif(6)[:-8],
     b"II*\0" + struct.pack("<IH", 8, 65535)],
)  # fmt: skip
def test_a_direction_that_is_none_leaves_the_image_as_it_is(tag: bytes) -> None:
    np.testing.assert_array_equal(pixels(png_with(chunk(b"eXIf", tag))), pixels(file_of(GREY, "PNG")))


def test_a_size_is_looked_at_before_anything_is_decoded() -> None:
    for kind in ("PNG", "JPEG"):
        with pytest.raises(BadInput, match="8000 x 8000; it must be 28 x 28"):
            decode_images([file_of(Image.new("L", (8000, 8000)), kind)], NETWORK, 10)


def test_damaged_files_are_refused_in_words() -> None:
    """Every cut and every flipped byte of both formats: an answer or BadInput, nothing else."""
    for plain in (file_of(GREY, "PNG"), file_of(GREY, "JPEG", progressive=True)):
        for at in range(0, len(plain), 3):
            flipped = bytearray(plain)
            flipped[at] ^= 0x81
            for data in (plain[:at], bytes(flipped)):
                try:
                    assert pixels(data).shape == (1, 1, 28, 28)
                except BadInput:
                    pass


def test_a_request_of_many_files_has_one_budget_of_time() -> None:
    data = file_of(GREY, "PNG")
    ticks = iter(range(10**6))
    with pytest.raises(TooLarge, match="longer than 5 s"):
        decode_images([data] * 10, NETWORK, 10, budget_s=5, clock=lambda: float(next(ticks)))
    assert decode_images([data] * 4, NETWORK, 10, budget_s=5, clock=lambda: 0.0).shape == (4, 1, 28, 28)


def test_a_file_may_have_as_many_segments_as_it_says() -> None:
    few = png_with(*[chunk(b"tIME", b"")] * (MAX_SEGMENTS - 3))
    np.testing.assert_array_equal(pixels(few), pixels(file_of(GREY, "PNG")))
    with pytest.raises(BadInput, match="segments"):
        pixels(png_with(*[chunk(b"tIME", b"")] * MAX_SEGMENTS))


def test_the_order_of_turns_is_not_a_guess() -> None:
    """All eight of an image without symmetry are different: a mix-up of two would be seen above."""
    turned = [pixels(png_with(chunk(b"eXIf", exif(one)))) for one in range(1, 9)]
    assert all(not np.array_equal(one, other) for one, other in pairwise([*turned, turned[0]]))
