"""Lines of a streamed body: bounded in length and time, and read in time that grows with their length."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable

import pytest

from flatshare.api import stream
from flatshare.api.stream import lines_of
from flatshare.errors import TooLarge, TooSlow


async def pieces(chunks: Iterable[bytes]) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


async def lines(*chunks: bytes, limit: int = 100) -> list[bytes]:
    return [line async for line in lines_of(pieces(chunks), limit)]


@pytest.mark.parametrize(
    ("chunks", "wanted"),
    [
        ([b"a\nb\n"], [b"a", b"b"]),
        ([b"a", b"b\nc", b"d"], [b"ab", b"cd"]),
        ([b"\n\n", b"  \n", b"a\n"], [b"a"]),
        ([b"a\n" * 50], [b"a"] * 50),
        ([b"x" * 100, b"\n", b"y" * 100], [b"x" * 100, b"y" * 100]),
        ([], []),
    ],
)
async def test_lines_are_put_together_from_any_pieces(chunks: list[bytes], wanted: list[bytes]) -> None:
    assert await lines(*chunks) == wanted


@pytest.mark.parametrize(
    "chunks", [[b"x" * 101], [b"x" * 60, b"x" * 60, b"\n"], [b"a\n" + b"x" * 101 + b"\n"]]
)
async def test_a_line_over_the_limit_ends_the_stream(chunks: list[bytes]) -> None:
    with pytest.raises(TooLarge):
        await lines(*chunks)


async def test_a_long_line_in_many_pieces_costs_what_its_length_costs() -> None:
    """Four times the length may not take sixteen times as long."""

    async def seconds(count: int) -> float:
        began = time.thread_time()  # what others do on this machine does not count
        await lines(*[b"x" * 1460] * count, limit=10**9)
        return time.thread_time() - began

    short = min([await seconds(2_000) for _ in range(3)])
    long = min([await seconds(8_000) for _ in range(3)])
    assert long < 9 * short


async def test_a_stream_that_drips_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "LINE_S", 0.1)
    gone = False

    async def drip() -> AsyncIterator[bytes]:
        nonlocal gone
        try:
            while True:
                yield b"x"
                await asyncio.sleep(0.01)
        finally:
            gone = True

    with pytest.raises(TooSlow, match="a line took"):
        async for _ in lines_of(drip(), 10**6):
            pass
    assert gone
