"""PNG and JPEG files to rows: only what describes pixels reaches the decoder.

A decoder reads everything in a file: profiles, texts, camera data. Each of these can expand without bound
(Pillow 12: a JPEG of 500 kB whose camera data names the same bytes 2,000 times took 955 MB; a PNG of 8 MB
with 7,900 colour profiles took 17 s). So a file is taken apart here first: its size is read from its header,
the segments that hold pixels are kept and their bytes are counted, and all others are left out. The one thing
that is read of the others is which way up the image is (EXIF orientation).
"""

from __future__ import annotations

import io
import re
import struct
import time
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from flatshare.errors import BadInput, TooLarge
from flatshare.models.architecture import Architecture, InputSpec

__all__ = ["DECODE_BUDGET_S", "MAX_SEGMENTS", "decode_images"]

DECODE_BUDGET_S: Final = 5.0
"""Seconds that the images of one request may take together."""

MAX_SEGMENTS: Final = 2048
"""Most chunks (PNG) or segments (JPEG) of a file. A photo of 20 megapixels has about 300."""

FREE_PIXEL_BYTES: Final = 64 * 1024
BYTES_A_PIXEL: Final = 8
"""Most bytes of compressed pixels that are decoded: a fixed number, and this many more per pixel. An
encoder's worst result for noise is smaller."""

MAX_EXIF_ENTRIES: Final = 512
"""Directory entries that are looked at for the orientation; a camera writes about 20."""

IMAGE_MODES: Final = frozenset({"1", "L", "P", "RGB"})
"""Pixel formats that convert to 8 bits without loss. Not 16-bit grey, which Pillow clips to white,
and nothing with transparency, which it drops: both would be answered wrongly, and confidently."""

_FORMATS: Final = ("PNG", "JPEG")

_PNG_START: Final = b"\x89PNG\r\n\x1a\n"
_PNG_KEPT: Final = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})

_JPEG_START: Final = b"\xff\xd8"
_JPEG_DROPPED: Final = frozenset({*range(0xE1, 0xEE), 0xEF, 0xFE})
"""APP1 to APP13, APP15 and comments. APP0 says how dense the pixels are and APP14 which colours they have."""
_JPEG_FRAMES: Final = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})
_JPEG_ALONE, _JPEG_SCAN, _JPEG_END, _JPEG_EXIF = 0x01, 0xDA, 0xD9, 0xE1
_JPEG_MARKER: Final = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
"""What ends a scan's coded pixels: not a stuffed zero, a restart marker or a fill byte."""

_TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each EXIF orientation (CIPA DC-008, 4.6.5.1); from 5 on, width and height change places."""


def decode_images(
    files: Sequence[bytes],
    network: Architecture,
    max_rows: int,
    *,
    budget_s: float = DECODE_BUDGET_S,
    clock: Callable[[], float] = time.monotonic,
) -> NDArray[np.float32]:
    """Rows of PNG or JPEG files, through the architecture's own transform.

    Safe to call in any thread; takes tenths of a millisecond an image, so a request of many belongs in one.

    Parameters
    ----------
    budget_s
        Seconds for all files together.
    clock
        Monotonic seconds.

    Raises
    ------
    BadInput
        Not such a file, damaged, or not of the architecture's size (checked before it is decoded).
    TooLarge
        More than ``max_rows`` files, or together they take longer than ``budget_s``.
    """
    if not files:
        raise BadInput("there is no image in the request")
    if len(files) > max_rows:
        raise TooLarge(f"there are {len(files)} images in the request; the limit is {max_rows}")
    deadline = clock() + budget_s
    decoded: list[NDArray[np.uint8]] = []
    for data in files:
        decoded.append(_decode(data, network.input))
        if clock() > deadline:
            raise TooLarge(f"the images take longer than {budget_s:g} s to decode; send fewer at a time")
    return network.preprocess(np.stack(decoded))


def _decode(data: bytes, spec: InputSpec) -> NDArray[np.uint8]:
    channels, height, width = spec.shape
    try:
        if data.startswith(_PNG_START):
            bare, size, exif = _bare_png(data, (width, height))
        elif data.startswith(_JPEG_START):
            bare, size, exif = _bare_jpeg(data, (width, height))
        else:
            raise BadInput(f"an image is not {' or '.join(_FORMATS)}")
        turn = _TURNS.get(_orientation(exif))
        sideways = turn is not None and _orientation(exif) >= 5
        if size != ((height, width) if sideways else (width, height)):
            raise _other_size(size, (width, height))
        with Image.open(io.BytesIO(bare), formats=_FORMATS) as image:
            if image.size != size:
                raise BadInput("an image is damaged")
            if image.mode not in IMAGE_MODES or "transparency" in image.info:
                raise BadInput("an image must be 8-bit grey, palette or RGB, without transparency")
            plain = image.convert("L" if channels == 1 else "RGB")
            return np.asarray(plain if turn is None else plain.transpose(turn), dtype=np.uint8)
    except BadInput:
        raise
    except UnidentifiedImageError:
        raise BadInput("an image is damaged") from None
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError):
        raise BadInput("an image is damaged") from None


def _other_size(size: tuple[int, int], wanted: tuple[int, int]) -> BadInput:
    return BadInput(f"an image is {size[0]} x {size[1]}; it must be {wanted[0]} x {wanted[1]}")


class _Bare:
    """A file with only what describes pixels, put together piece by piece.

    Parameters
    ----------
    wanted
        Width and height that the image must have. They may be swapped: the file may say that the image lies
        on its side.
    """

    def __init__(self, start: bytes, wanted: tuple[int, int]) -> None:
        self._pieces = [start]
        self._segments = 0
        self._wanted = wanted
        self._left = FREE_PIXEL_BYTES + BYTES_A_PIXEL * wanted[0] * wanted[1]

    def check_size(self, size: tuple[int, int]) -> None:
        """Raise ``BadInput`` if the image can't have the size that is wanted."""
        if sorted(size) != sorted(self._wanted):
            raise _other_size(size, self._wanted)

    def count(self) -> None:
        """One more segment; raises ``BadInput`` when there are too many."""
        self._segments += 1
        if self._segments > MAX_SEGMENTS:
            raise BadInput(f"an image has more than {MAX_SEGMENTS} segments; save it anew without metadata")

    @property
    def left(self) -> int:
        """Bytes that may still be kept."""
        return self._left

    def keep(self, piece: bytes) -> None:
        """Keep a piece; raises ``BadInput`` when there are too many bytes."""
        self._left -= len(piece)
        if self._left < 0:
            raise BadInput("an image has more bytes of pixels than one of its size can need")
        self._pieces.append(piece)

    def whole(self) -> bytes:
        """The file."""
        return b"".join(self._pieces)


def _bare_png(data: bytes, wanted: tuple[int, int]) -> tuple[bytes, tuple[int, int], bytes]:
    """The file with only what describes pixels; width and height; its EXIF directory, or nothing."""
    bare, exif, at = _Bare(_PNG_START, wanted), b"", len(_PNG_START)
    width, height = struct.unpack_from(">II", data, at + 8)
    bare.check_size((width, height))
    while at < len(data):
        bare.count()
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if end > len(data):
            raise BadInput("an image is damaged")
        if kind in _PNG_KEPT:
            bare.keep(data[at:end])
        elif kind == b"eXIf" and not exif:
            exif = data[at + 8 : end - 4]
        if kind == b"IEND":
            break
        at = end
    return bare.whole(), (width, height), exif


def _bare_jpeg(data: bytes, wanted: tuple[int, int]) -> tuple[bytes, tuple[int, int], bytes]:
    """As :func:`_bare_png`."""
    bare, exif, size, at = _Bare(_JPEG_START, wanted), b"", (0, 0), len(_JPEG_START)
    while at < len(data):
        bare.count()
        found = _JPEG_MARKER.match(data, at)
        if found is None:  # fill bytes before a marker, or what no decoder would take
            found = _JPEG_MARKER.search(data, at, at + bare.left)
            if found is None or data[at : found.start()].strip(b"\xff"):
                raise BadInput("an image is damaged")
            at = found.start()
        marker = data[at + 1]
        if marker == _JPEG_END:
            bare.keep(data[at : at + 2])
            break
        if marker == _JPEG_ALONE:
            bare.keep(data[at : at + 2])
            at += 2
            continue
        end = at + 2 + struct.unpack_from(">H", data, at + 2)[0]
        if marker == _JPEG_SCAN:
            following = _JPEG_MARKER.search(data, end, end + bare.left + 2)
            if following is None and end + bare.left < len(data):
                bare.keep(data[at : end + bare.left + 1])  # says why
            end = following.start() if following is not None else len(data)
        if marker in _JPEG_FRAMES:
            if size != (0, 0):
                raise BadInput("an image is damaged")
            height, width = struct.unpack_from(">HH", data, at + 5)
            size = (width, height)
            bare.check_size(size)
        if marker not in _JPEG_DROPPED:
            bare.keep(data[at:end])
        elif marker == _JPEG_EXIF and not exif and data[at + 4 : at + 10] == b"Exif\0\0":
            exif = data[at + 10 : end]
        at = end
    return bare.whole(), size, exif


def _orientation(exif: bytes) -> int:
    """The orientation in a TIFF directory, 1 to 8; 1 where none is, or none that counts."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None or len(exif) < 10:
        return 1
    (start,) = struct.unpack_from(f"{order}I", exif, 4)
    if start + 2 > len(exif):
        return 1
    (entries,) = struct.unpack_from(f"{order}H", exif, start)
    for at in range(start + 2, start + 2 + 12 * min(entries, MAX_EXIF_ENTRIES), 12):
        if at + 12 > len(exif):
            return 1
        tag, kind, count, value = struct.unpack_from(f"{order}HHIH", exif, at)
        if tag == 0x112:
            return int(value) if (kind, count) == (3, 1) and 1 <= value <= 8 else 1
    return 1
