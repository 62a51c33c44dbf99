"""Bodies of requests: read within limits, expanded within the same limits, counted while they are held."""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import AsyncGenerator, Mapping
from typing import Final

from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from flatshare.api.decoding import INLINE_BYTES, DecodeRoom
from flatshare.api.http import Incoming, encoding_of, read_body
from flatshare.errors import BadInput, BodyOverQuota, TooLarge
from flatshare.replica.ticket import Ticket

__all__ = ["BodyReader", "expand", "files_of", "media_type_of"]

MULTIPART_BUDGET_S: Final = 5.0
"""Seconds that one multipart body may take to be taken apart."""

PIECE_BYTES: Final = 64 * 1024
"""How much of a multipart body is parsed between two looks at the clock."""

MAX_FIELDS: Final = 16
"""Most parts of a multipart body that are not files."""

_WINDOW_BITS: Final[Mapping[str, int]] = {"gzip": 31, "x-gzip": 31, "deflate": 15}
"""What zlib calls each coding; ``deflate`` is a zlib stream (RFC 9110, 8.4.1.2)."""


def media_type_of(headers: Mapping[str, str]) -> str:
    """The media type of a body, in lower case and without parameters; empty when none is named."""
    return headers.get("content-type", "").partition(";")[0].strip().lower()


def expand(body: bytes, coding: str, limit_bytes: int, refusal: type[TooLarge] = TooLarge) -> bytes:
    """Decompress a body, never holding more than the limit.

    Parameters
    ----------
    coding
        ``gzip`` or ``deflate``.

    Raises
    ------
    TooLarge
        It expands beyond the limit; raised as the class ``refusal``.
    BadInput
        It is damaged or incomplete.
    """
    decompressor = zlib.decompressobj(_WINDOW_BITS[coding])
    try:
        plain = decompressor.decompress(body, limit_bytes + 1)
    except zlib.error:
        raise BadInput(f"the body is not what its Content-Encoding says: {coding}") from None
    if len(plain) > limit_bytes:
        raise refusal(f"the body is longer than the limit of {limit_bytes} bytes when it is expanded")
    if not decompressor.eof or decompressor.unused_data:
        raise BadInput(f"the body is not one whole {coding} stream")
    return plain


class BodyReader:
    """Reads the bodies of one replica's requests.

    Parameters
    ----------
    room
        Where compressed bodies are expanded.
    max_body_bytes
        Longest body, as it comes and expanded.
    """

    def __init__(self, room: DecodeRoom, max_body_bytes: int) -> None:
        self._room = room
        self._max_body_bytes = max_body_bytes

    async def read(self, request: Incoming, ticket: Ticket) -> bytes:
        """A request's whole body, expanded; its bytes count as the tenant's until the ticket ends.

        A compressed body counts with its compressed size until it is expanded, then with its expanded size.
        While it is expanded both are in memory, for as many bodies at a time as the room has threads.

        Raises
        ------
        TooLarge, BodyOverQuota, TooSlow, BadInput
            As :func:`flatshare.api.http.read_body`, of the expanded body too.
        UnsupportedEncoding
            It is compressed in a way that is not read here.
        TooManyBytesAtOnce, Overloaded
            The tenant, or the replica, holds too many bytes of bodies now.
        """
        coding = encoding_of(request, known=_WINDOW_BITS.keys())
        own = ticket.limits.body_bytes
        body = await read_body(request, self._max_body_bytes, own, hold=ticket.hold_bytes)
        if coding is None:
            return body
        limit, refusal = self._max_body_bytes, TooLarge
        if own is not None and own < limit:
            limit, refusal = own, BodyOverQuota
        plain = await self._room.run(ticket.ref.tenant, lambda: expand(body, coding, limit, refusal))
        ticket.hold_bytes(len(plain))
        return plain


def files_of(headers: Mapping[str, str], body: bytes, max_files: int) -> list[bytes]:
    """Files of a multipart body, in order. Blocks: run it in a thread.

    Raises
    ------
    BadInput
        The body is not multipart, or has too many parts.
    TooLarge
        It takes longer than ``MULTIPART_BUDGET_S``.
    """
    deadline = time.monotonic() + MULTIPART_BUDGET_S
    # Pass only the boundary: a charset would choose a Python codec for names, and some take quadratic time.
    boundary = (
        parse_options_header(headers.get("content-type", ""))[1].get(b"boundary", b"").decode("latin-1")
    )
    if not boundary or '"' in boundary:
        raise BadInput("the multipart body can't be read: its Content-Type names no boundary")
    kind = Headers({"content-type": f'multipart/form-data; boundary="{boundary}"'})

    async def pieces() -> AsyncGenerator[bytes, None]:
        for start in range(0, len(body), PIECE_BYTES):
            if time.monotonic() > deadline:
                raise TooLarge(f"the multipart body takes longer than {MULTIPART_BUDGET_S:g} s to read")
            yield body[start : start + PIECE_BYTES]

    async def parse() -> list[bytes]:
        parser = MultiPartParser(kind, pieces(), max_files=max_files + 1, max_fields=MAX_FIELDS)
        # In memory whatever its size: the body is, too, and its length is capped.
        parser.spool_max_size = max(len(body), INLINE_BYTES) + 1
        form = await parser.parse()
        try:
            return [await part.read() for _, part in form.multi_items() if isinstance(part, UploadFile)]
        finally:
            await form.close()

    try:
        return asyncio.run(parse())
    except MultiPartException as error:
        raise BadInput(f"the multipart body can't be read: {ascii(error.message)[1:-1][:200]}") from None
    except (KeyError, ValueError):
        raise BadInput("the multipart body can't be read: a part's headers are damaged") from None
