"""Compressed bodies: honest ones, ones that expand without end, and ones that are not what they say."""

from __future__ import annotations

import base64
import gzip
import random
import struct
import zlib
from functools import lru_cache
from typing import Final

from .body_bombs import Body

__all__ = ["aligned_gzip", "compressed"]

_BROTLI_ZEROS: Final = {
    784: base64.b64decode("Gw8D+CcAorFAIBk="),
    10**6: base64.b64decode("Wz9Cj38CIB4LBPJzHgA="),
}
"""Zeros, by their number: no library that is installed for certain writes brotli."""

ZSTD_BLOCK: Final = 128 * 1024


def aligned_gzip(content: bytes, multiple: int) -> bytes:
    """A good gzip file whose own length is a multiple: what reads it as raw pixels finds whole images in it."""
    flat = zlib.compressobj(9, wbits=-15)
    packed = flat.compress(content) + flat.flush()
    tail = struct.pack("<II", zlib.crc32(content), len(content) & 0xFFFFFFFF)
    room = -(10 + 2 + len(packed) + len(tail)) % multiple
    return b"\x1f\x8b\x08\x04" + b"\0" * 6 + struct.pack("<H", room) + b"\0" * room + packed + tail


def _zstd_zeros(size: int) -> bytes:
    """A frame of run-length blocks: four bytes each, and 128 KiB out of each."""
    blocks = []
    while size > 0:
        now, size = min(size, ZSTD_BLOCK), size - ZSTD_BLOCK
        blocks.append(struct.pack("<I", now << 3 | 1 << 1 | (size <= 0))[:3] + b"\0")
    return struct.pack("<IBB", 0xFD2FB528, 0, 7 << 3) + b"".join(blocks)


@lru_cache(maxsize=32)
def _gzip(content: bytes) -> bytes:
    return gzip.compress(content, 9, mtime=0)


@lru_cache(maxsize=8)
def _gzip_zeros(size: int) -> bytes:
    return _gzip.__wrapped__(b"\0" * size)


def compressed(chosen: random.Random, body: Body) -> Body:
    """A body with a content-encoding."""
    size = chosen.choice([784, 10**6, 10**6 + 1, 10**8])
    coding = chosen.choice(["gzip", "gzip", "deflate", "br", "zstd", "GZIP", "x-gzip", "gzip;q=1", "compress", "identity",
                            "gzip, gzip", "gzip,deflate,br", "gzip," * 1000 + "gzip", "", "aes128gcm", "\xe9"])  # fmt: skip
    if chosen.random() < 0.5:  # what is in it is good, or a bomb of another kind
        content = {
            "deflate": lambda: chosen.choice(
                [zlib.compress(body.content, 9), zlib.compress(body.content, 9)[2:-4]]
            ),
            "br": lambda: _BROTLI_ZEROS[784],
            "zstd": lambda: _zstd_zeros(784),
            "gzip, gzip": lambda: _gzip(_gzip(body.content)),
        }.get(coding, lambda: _gzip(body.content))()
    else:
        content = {
            "deflate": lambda: zlib.compress(b"\0" * min(size, 10**7), 9),
            "br": lambda: _BROTLI_ZEROS[784 if size == 784 else 10**6] * chosen.choice([1, 500]),
            "zstd": lambda: _zstd_zeros(chosen.choice([size, 10**10])),
            "gzip, gzip": lambda: _gzip(_gzip_zeros(size)),
        }.get(coding, lambda: _gzip_zeros(size))()
    if chosen.random() < 0.15:
        content = chosen.choice(
            [content[:-5], content + content, content * 50, content + b"x" * 100, body.content, b""]
        )
    if chosen.random() < 0.1 and "gzip" in coding:
        content = aligned_gzip(b"\0" * 784 * chosen.choice([1, 8, 9]), 784)
    return Body(content, body.kind, (*body.headers, ("content-encoding", coding)))
