"""A store knows who it is."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flatshare_registry import layout
from flatshare_registry.errors import Corrupt, Unavailable
from flatshare_registry.identity import StoreIdentity, ensure_identity, read_identity
from flatshare_registry.stores.base import Overwrite
from flatshare_registry.stores.local import LocalStore
from flatshare_registry.stores.memory import MemoryStore
from flatshare_registry.testing.faults import FaultyStore


def test_an_identity_is_made_once_and_stays(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "a")
    assert read_identity(store) is None
    made = ensure_identity(store)
    assert len(made) == 32
    (tmp_path / "a").rename(tmp_path / "elsewhere")
    assert ensure_identity(LocalStore(tmp_path / "elsewhere")) == made, "a store's URL is not who it is"
    assert ensure_identity(LocalStore(tmp_path / "a")) != made


def test_of_many_who_make_one_all_have_the_same(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        found = set(threads.map(lambda _: ensure_identity(LocalStore(tmp_path)), range(32)))
    assert len(found) == 1


@pytest.mark.parametrize("data", [b"", b"[]", b'{"id": 7}', b'{"id": "a b"}', b'{"id": ""}', b"\xff"])
def test_what_is_no_identity_is_said_so(data: bytes) -> None:
    store = MemoryStore()
    store.put(layout.IDENTITY, data, Overwrite())
    with pytest.raises(Corrupt):
        ensure_identity(store)


def test_it_is_read_once_and_asked_again_after_a_failure() -> None:
    reads: list[str] = []
    down = True

    def before(operation: str, key: str) -> None:
        reads.append(operation)
        if down:
            raise Unavailable("down")

    store = MemoryStore()
    identity = StoreIdentity(FaultyStore(store, before=before))
    with pytest.raises(Unavailable):
        identity()
    down = False
    first = identity()
    assert first == read_identity(store)
    count = len(reads)
    assert identity() == first
    assert len(reads) == count


@pytest.mark.parametrize("length", [1, 64, 65])
def test_an_identity_has_at_most_64_characters(length: int) -> None:
    store = MemoryStore()
    store.put(layout.IDENTITY, json.dumps({"id": "a" * length}).encode(), Overwrite())
    if length > 64:
        with pytest.raises(Corrupt, match="does not hold the store's id"):
            read_identity(store)
    else:
        assert read_identity(store) == ensure_identity(store) == "a" * length


def test_who_is_beaten_to_it_takes_the_winners() -> None:
    store = MemoryStore()
    won: list[str] = []

    def before(operation: str, key: str) -> None:
        if operation == "put" and not won:
            won.append("")
            won[0] = ensure_identity(store)

    assert ensure_identity(FaultyStore(store, before=before)) == won[0]
    assert read_identity(store) == won[0]
