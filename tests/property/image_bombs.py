"""Image files that are small and become large: each keeps its format's rules, most hold a good 28 x 28 picture.

What any one asks for is capped (``MOST_ASKED``): enough to be found, not enough to take the machine with it.
"""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Final

from PIL import Image

__all__ = [
    "JPEGS",
    "MOST_ASKED",
    "PNGS",
    "app1_segments",
    "exif_of_one_value",
    "good_image",
    "png_of",
    "profiles",
]

MOST_ASKED: Final = 400 * 1024**2
"""Most bytes that a naive reader of one such file would copy or unpack."""

_HEADER: Final = 8 + 25  # a PNG's signature and its IHDR


@lru_cache(maxsize=64)
def good_image(form: str = "PNG", size: tuple[int, int] = (28, 28), mode: str = "L") -> bytes:
    """An honest file."""
    target = io.BytesIO()
    Image.new(mode, size, 7).save(target, form)
    return target.getvalue()


# -- PNG


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_of(extra: Sequence[bytes] | bytes, size: int = 10**6) -> bytes:
    """A good picture with chunks behind its header: of those given as many as fit, or one again and again."""
    raw = good_image()
    room = size - len(raw)
    if isinstance(extra, bytes):
        more = extra * max(room // len(extra), 1)
    else:
        more = b"".join(extra)
    return raw[:_HEADER] + more + raw[_HEADER:]


@lru_cache(maxsize=16)
def _squeezed(size: int) -> bytes:
    return zlib.compress(b"\0" * size, 9)


def profiles(count: int, each: int = 1024**2) -> bytes:
    """A colour profile again and again, each of which unpacks to a megabyte."""
    return png_of([chunk(b"iCCP", b"a\0\0" + _squeezed(each))] * count)


def _texts(chosen: random.Random) -> bytes:
    size = chosen.choice([10, 1000, 10**5, 10**6])
    piece = chosen.choice([
        chunk(b"zTXt", b"k\0\0" + _squeezed(size)),
        chunk(b"iTXt", b"k\0\1\0en\0k\0" + _squeezed(size)),
        chunk(b"iTXt", b"k\0\0\0en\0k\0" + b"x" * min(size, 10**5)),
        chunk(b"tEXt", b"k\0" + b"x" * min(size, 10**5)),
    ])  # fmt: skip
    count = min(chosen.choice([1, 50, 10**5]), MOST_ASKED // size, 900_000 // len(piece) or 1)
    return png_of([piece] * count)


def _many_chunks(chosen: random.Random) -> bytes:
    name = chosen.choice(
        [b"tIME", b"gAMA", b"pHYs", b"sRGB", b"PLTE", b"tRNS", b"abCd", b"hIST", b"sPLT", b"eXIf"]
    )
    piece = chunk(name, b"\0" * chosen.choice([0, 1, 3, 4, 6, 9, 768]))
    return png_of([piece] * min(chosen.choice([1, 100, 80_000]), 900_000 // len(piece)))


def _ihdr(width: int, height: int, depth: int = 8, colour: int = 0, interlaced: int = 0) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced))


def _raw_png(*chunks: bytes) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + chunk(b"IEND", b"")


def _declared(chosen: random.Random) -> bytes:
    side = chosen.choice([28, 29, 20_000, 2**31 - 1, 2**32 - 1, 0])
    other = chosen.choice([28, side])
    header = _ihdr(
        side, other, chosen.choice([1, 8, 16, 3]), chosen.choice([0, 2, 3, 4, 6, 7]), chosen.choice([0, 1, 2])
    )
    return _raw_png(header, chunk(b"IDAT", _squeezed(10_000)))


def _long_pixels(chosen: random.Random) -> bytes:
    """Pixels of 28 x 28, and then unpacked zeros without end."""
    data = _squeezed(chosen.choice([812, 10**6, 10**8]))
    step = chosen.choice([len(data), 1, 8])
    data = data[: 100_000 if step > 1 else 70_000]
    pieces = [chunk(b"IDAT", data[start : start + step]) for start in range(0, len(data), step)]
    return _raw_png(_ihdr(28, 28, interlaced=chosen.choice([0, 1])), *pieces)


def _animated(chosen: random.Random) -> bytes:
    frames = chosen.choice([0, 1, 2, 2**31 - 1, 2**32 - 1])
    control = struct.pack(">IIIIIHHBB", 0, chosen.choice([28, 20_000]), 28, 0, 0, 1, 1, 0, 0)
    count = chosen.choice([1, 10, 5000])
    extra = [chunk(b"acTL", struct.pack(">II", frames, 0))] * chosen.choice([1, 2, 5000])
    extra += [chunk(b"fcTL", control), chunk(b"fdAT", b"\0\0\0\1" + _squeezed(10_000))] * count
    return png_of(extra)


def _png_exif(chosen: random.Random) -> bytes:
    return png_of([chunk(b"eXIf", _tiff(chosen))] * chosen.choice([1, 2]))


def _profiles(chosen: random.Random) -> bytes:
    return profiles(chosen.choice([1, 20, 300]))


# -- JPEG


def _segment(marker: int, data: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


def _jpeg_with(segments: bytes, size: tuple[int, int] = (28, 28)) -> bytes:
    raw = good_image("JPEG", size)
    (own,) = struct.unpack(">H", raw[4:6])  # JFIF goes: with it there is a density, and nobody asks EXIF
    return raw[:2] + segments + raw[4 + own :]


def _exif_segments(tiff: bytes, piece: int = 65_000) -> bytes:
    return b"".join(_segment(0xE1, b"Exif\0\0" + tiff[at : at + piece]) for at in range(0, len(tiff), piece))


def _ifd(entries: Sequence[tuple[int, int, int, int]], after: int = 0) -> bytes:
    packed = b"".join(struct.pack("<HHLL", *entry) for entry in entries[:65_535])
    return struct.pack("<H", min(len(entries), 65_535)) + packed + struct.pack("<L", after)


def exif_of_one_value(tags: int, size: int) -> bytes:
    """A JPEG whose tags all have the same bytes for their value: a reader that copies holds tags x size."""
    tags = min(tags, MOST_ASKED // size)
    tiff = b"II*\0" + struct.pack("<L", 8) + _ifd([(1000 + tag, 1, size, 8) for tag in range(tags)])
    return _jpeg_with(_exif_segments(tiff + b"A" * max(0, 8 + size - len(tiff))))


def app1_segments(count: int, size: int) -> bytes:
    """A JPEG whose EXIF comes in many pieces: a reader that joins them one by one copies count**2 x size / 2."""
    return _jpeg_with(_segment(0xE1, b"Exif\0\0" + b"x" * size) * count)


def _tiff(chosen: random.Random) -> bytes:
    """Directories that point at themselves and at each other, odd types and counts, and an orientation."""
    entries = [(0x0112, 3, 1, chosen.choice([0, 1, 3, 6, 8, 9, 65_535]))]
    for tag in range(chosen.choice([0, 3, 500])):
        place = chosen.choice([0, 8, 26, 2**31, 2**32 - 1])
        entries.append(
            (
                tag + 1,
                chosen.choice([0, 1, 2, 3, 4, 5, 7, 10, 12, 13, 99]),
                chosen.choice([0, 1, 999, 2**32 - 1]),
                place,
            )
        )
    for tag in chosen.sample([0x8769, 0x8825, 0xA005, 0x014A], 2):
        entries.append((tag, 4, chosen.choice([1, 999]), 8))
    return b"II*\0" + struct.pack("<L", 8) + _ifd(entries, chosen.choice([0, 8, 2**32 - 1]))


def _segments(chosen: random.Random) -> bytes:
    marker = chosen.choice([0xFE, 0xE0, 0xE1, 0xE2, 0xED, 0xEE, 0xDB, 0xC4, 0xDD, 0xDA])
    head = chosen.choice([
        b"", b"Exif\0\0", b"ICC_PROFILE\0\1\xff", b"Photoshop 3.0\x008BIM\x03\xed\0\0\0\0\0\x10" + b"\0" * 16, b"JFIF\0",
        b"MPF\0" + _tiff(chosen)[:3000], b"Adobe\0d\0\0\0\0\1", b"http://ns.adobe.com/xap/1.0/\0<x/>",
    ])  # fmt: skip
    piece = _segment(marker, head + b"\0" * chosen.choice([0, 2, 65, 5000]))
    return _jpeg_with(piece * min(chosen.choice([1, 100, 60_000]), 900_000 // len(piece)))


def _scans(chosen: random.Random) -> bytes:
    """A progressive picture that repeats one of its scans."""
    target = io.BytesIO()
    Image.new("L", (28, 28)).save(target, "JPEG", progressive=True)
    raw = target.getvalue()
    start = raw.rindex(b"\xff\xda")
    scan = raw[start:-2]
    return raw[:start] + scan * min(chosen.choice([2, 500, 20_000]), 900_000 // len(scan)) + raw[-2:]


def _jpeg_size(chosen: random.Random) -> bytes:
    raw = bytearray(good_image("JPEG", mode=chosen.choice(["L", "RGB", "CMYK"])))
    frame = raw.index(b"\xff\xc0")
    raw[frame + 5 : frame + 9] = struct.pack(
        ">HH", chosen.choice([28, 65_535, 0]), chosen.choice([28, 65_535])
    )
    return bytes(raw)


PNGS: Final[Sequence[Callable[[random.Random], bytes]]] = (
    _profiles, _texts, _many_chunks, _declared, _long_pixels, _animated, _png_exif,
)  # fmt: skip
JPEGS: Final[Sequence[Callable[[random.Random], bytes]]] = (
    lambda chosen: exif_of_one_value(chosen.choice([10, 300, 5000]), chosen.choice([1000, 60_000, 500_000])),
    lambda chosen: app1_segments(chosen.choice([2, 200, 20_000]), chosen.choice([0, 10, 30])),
    lambda chosen: _jpeg_with(_exif_segments(_tiff(chosen), chosen.choice([65_000, 1000, 100]))),
    _segments, _scans, _jpeg_size,
)  # fmt: skip
