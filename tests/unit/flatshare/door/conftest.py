"""A door over the data plane of ``api/conftest.py``, and a client that speaks bytes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass

import orjson
import pytest

from flatshare.door.listener import Door

from ..api.conftest import World
from ..api.conftest import world as make_world

__all__ = ["Answer", "Client", "World", "ask", "request"]


@dataclass(frozen=True)
class Answer:
    """One reply, as it came."""

    status: int
    headers: dict[str, str]
    body: bytes
    head: bytes

    @property
    def json(self) -> object:
        return orjson.loads(self.body)


class Client:
    """One connection. Bytes go out as they are given."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def to(cls, door: Door) -> Client:
        return cls(*await asyncio.open_connection(door.host, door.port))

    async def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.writer.write(piece)
            await self.writer.drain()
            await asyncio.sleep(0)

    async def answer(self) -> Answer:
        head = await self.reader.readuntil(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        headers = {
            name.strip().lower(): value.strip()
            for name, _, value in (line.partition(":") for line in lines[1:-2])
        }
        length = int(headers.get("content-length", "0"))
        body = await self.reader.readexactly(length)
        return Answer(int(lines[0].split(" ")[1]), headers, body, head)

    async def is_closed(self) -> bool:
        """Whether the other side has closed, with nothing more to say."""
        return await self.reader.read() == b""

    def close(self) -> None:
        self.writer.close()


def request(
    body: bytes,
    headers: Iterable[tuple[str, str]] = (("serve_multiplexed_model_id", "acme"),),
    *,
    path: str = "/predict",
    method: str = "POST",
    version: str = "1.1",
    length: bool = True,
) -> bytes:
    """A whole request as bytes."""
    lines = [f"{method} {path} HTTP/{version}", "host: localhost"]
    lines += [f"{name}: {value}" for name, value in headers]
    if length:
        lines.append(f"content-length: {len(body)}")
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


async def ask(door: Door, *pieces: bytes) -> Answer:
    """One request on a connection of its own."""
    client = await Client.to(door)
    try:
        await client.send(*pieces)
        return await client.answer()
    finally:
        client.close()


@pytest.fixture
def world() -> Iterator[World]:
    yield from make_world.__wrapped__()  # type: ignore[attr-defined]  # pytest's


@pytest.fixture
async def door(world: World) -> AsyncIterator[Door]:
    door = Door(world.app, "127.0.0.1")
    await door.start()
    yield door
    await door.stop(1, notice_s=0)
