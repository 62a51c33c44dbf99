"""Lines of a streamed body: bounded in length and time, and read in time that grows with their length."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable

import orjson
import pytest

from flatshare.api import stream
from flatshare.api.stream import lines_of
from flatshare.errors import BadInput, TooLarge, TooSlow
from flatshare.replica.ticket import Prediction


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


async def test_lines_beside_the_first_need_a_place_and_wait_for_one() -> None:
    """A tenant whose places are taken goes on line by line; nothing is refused, and all places come back."""
    free, under_way, most = 2, 0, 0

    class Place:
        def __enter__(self) -> None: ...

        def __exit__(self, *error: object) -> None:
            nonlocal free
            free += 1

    def another_place() -> Place | None:
        nonlocal free
        if not free:
            return None
        free -= 1
        return Place()

    async def predict(line: bytes) -> Prediction:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        for _ in range(30):
            await asyncio.sleep(0)
        under_way -= 1
        raise BadInput("answered")

    source = pieces([b"1\n" * 20])
    found = [line async for line in stream.answers(lines_of(source, 100), predict, "id", another_place)]
    assert len(found) == 20
    assert sorted(orjson.loads(line)["index"] for line in found) == list(range(20))
    assert most == 3, "the stream's own place, and two more"
    assert free == 2


async def test_a_stream_that_is_closed_gives_its_places_back() -> None:
    taken = 0

    class Place:
        def __enter__(self) -> None: ...

        def __exit__(self, *error: object) -> None:
            nonlocal taken
            taken -= 1

    def another_place() -> Place:
        nonlocal taken
        taken += 1
        return Place()

    async def predict(line: bytes) -> Prediction:
        if line == b"0":
            raise BadInput("the first")
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    source = pieces([b"0\n", b"1\n" * 20])
    generator = stream.answers(lines_of(source, 100), predict, "id", another_place)
    assert orjson.loads(await anext(generator))["index"] == 0
    await generator.aclose()
    await asyncio.sleep(0)
    assert taken == 0


async def test_a_line_is_held_while_it_is_not_whole() -> None:
    held: list[int] = []
    chunks = pieces([b"x" * 60, b"y" * 60 + b"\nz", b"\n"])
    assert [line async for line in lines_of(chunks, 200, held.append)] == [b"x" * 60 + b"y" * 60, b"z"]
    assert held == [60, 0, 1, 0, 0]


async def test_a_stream_of_nothing_but_bad_lines_ends() -> None:
    """Each costs a replica's core, whatever it is refused for; one good line among them begins the count anew."""
    answered = 0

    async def predict(line: bytes) -> Prediction:
        nonlocal answered
        answered += 1
        raise BadInput("no")

    source = pieces([b"x\n"] * 10_000)
    found = [line async for line in stream.answers(lines_of(source, 100), predict, "id")]
    assert stream.BAD_LINES <= answered <= stream.BAD_LINES + stream.IN_FLIGHT
    assert len(found) == answered
