"""Conformance suite of ``BlobStore``: subclass it, give a ``store`` fixture, run pytest.

Ends with the race of five writers, each doing ten compare-and-swap increments: the sum must be 50.
"""

from __future__ import annotations

import threading
import time

import pytest

from flatshare_registry.errors import AlreadyExists, Conflict, InvalidInput, NotFound
from flatshare_registry.stores.base import CHUNK_BYTES, BlobStore, ByteRange, Create, Overwrite, UpdateIf
from flatshare_registry.stores.conditions import check_conditions

__all__ = ["BlobStoreSuite"]


class BlobStoreSuite:
    """Every promise of the protocol, one test each. Subclasses provide ``store``: empty, one a test."""

    @pytest.fixture
    def store(self) -> BlobStore:
        raise AssertionError("a subclass gives the store")

    def test_put_then_get_returns_the_bytes(self, store: BlobStore) -> None:
        meta = store.put("a/b.json", b"hello", Create())
        blob = store.get("a/b.json")
        assert blob.data == b"hello"
        assert (blob.meta.key, blob.meta.size_bytes, blob.meta.etag) == ("a/b.json", 5, meta.etag)

    def test_put_takes_a_memoryview_and_an_empty_object(self, store: BlobStore) -> None:
        store.put("view", memoryview(b"xhellox")[1:6], Create())
        store.put("empty", b"", Create())
        assert store.get("view").data == b"hello"
        assert store.get("empty").data == b""

    def test_get_of_a_missing_key_is_not_found(self, store: BlobStore) -> None:
        with pytest.raises(NotFound):
            store.get("nothing")
        with pytest.raises(NotFound):
            store.head("nothing")
        with pytest.raises(NotFound):
            store.get_unless("nothing", '"x"')

    def test_a_folder_is_not_an_object(self, store: BlobStore) -> None:
        store.put("a/b", b"1", Create())
        with pytest.raises(NotFound):
            store.get("a")

    def test_ranges(self, store: BlobStore) -> None:
        store.put("r", b"0123456789", Create())
        blob = store.get("r", ByteRange(2, 5))
        assert blob.data == b"234"
        assert blob.meta.size_bytes == 10
        assert store.get("r", ByteRange(9, 10)).data == b"9"

    @pytest.mark.parametrize(("start", "end"), [(5, 11), (10, 12), (50, 60)])
    def test_a_range_beyond_the_object_is_refused(self, store: BlobStore, start: int, end: int) -> None:
        store.put("r", b"0123456789", Create())
        with pytest.raises(InvalidInput):
            store.get("r", ByteRange(start, end))

    @pytest.mark.parametrize(("start", "end"), [(-1, 2), (3, 3), (5, 2)])
    def test_a_bad_range_is_refused_before_any_read(self, start: int, end: int) -> None:
        with pytest.raises(InvalidInput):
            ByteRange(start, end)

    def test_chunks_are_the_object_in_pieces(self, store: BlobStore) -> None:
        data = bytes(range(256)) * (10 * CHUNK_BYTES // 1024)  # two and a half pieces
        store.put("long", data, Create())
        store.put("empty", b"", Create())
        pieces = list(store.chunks("long"))
        assert b"".join(pieces) == data
        assert 1 < len(pieces) <= 20
        assert max(map(len, pieces)) <= CHUNK_BYTES
        assert b"".join(store.chunks("empty")) == b""
        assert b"".join(store.chunks("long", ByteRange(7, 300_000))) == data[7:300_000]
        for _ in range(100):  # who stops early holds nothing up: more often than a client has connections
            assert next(iter(store.chunks("long")))[:2] == b"\0\1"

    def test_chunks_raise_as_get_does(self, store: BlobStore) -> None:
        store.put("r", b"0123456789", Create())
        for key, byte_range, error in (
            ("nothing", None, NotFound),
            ("../up", None, InvalidInput),
            ("r", ByteRange(5, 11), InvalidInput),
            ("r", ByteRange(10, 12), InvalidInput),
        ):
            with pytest.raises(error):
                list(store.chunks(key, byte_range))

    def test_get_unless_unchanged(self, store: BlobStore) -> None:
        meta = store.put("k", b"1", Create())
        assert store.get_unless("k", meta.etag) is None
        newer = store.put("k", b"2", Overwrite())
        blob = store.get_unless("k", meta.etag)
        assert blob is not None
        assert (blob.data, blob.meta.etag) == (b"2", newer.etag)

    def test_head_tells_size_and_time(self, store: BlobStore) -> None:
        before = time.time()
        store.put("k", b"12345", Create())
        meta = store.head("k")
        assert meta.size_bytes == 5
        assert abs(meta.modified_s - before) < 60  # the store's own clock, whole seconds on S3

    def test_create_twice(self, store: BlobStore) -> None:
        store.put("k", b"1", Create())
        with pytest.raises(AlreadyExists):
            store.put("k", b"2", Create())
        assert store.get("k").data == b"1"

    def test_update_if_unchanged(self, store: BlobStore) -> None:
        first = store.put("k", b"1", Create())
        second = store.put("k", b"2", UpdateIf(first.etag))
        assert second.etag != first.etag
        with pytest.raises(Conflict):
            store.put("k", b"3", UpdateIf(first.etag))
        assert store.get("k").data == b"2"

    def test_update_of_nothing_is_a_conflict(self, store: BlobStore) -> None:
        with pytest.raises(Conflict):
            store.put("k", b"1", UpdateIf('"d41d8cd98f00b204e9800998ecf8427e"'))
        with pytest.raises(NotFound):
            store.get("k")

    def test_update_after_delete_is_a_conflict(self, store: BlobStore) -> None:
        meta = store.put("k", b"1", Create())
        store.delete("k")
        with pytest.raises(Conflict):
            store.put("k", b"2", UpdateIf(meta.etag))

    def test_list_stays_below_the_prefix(self, store: BlobStore) -> None:
        for key in ("b/2", "b/1", "b/sub/3", "bb/4", "a/5"):
            store.put(key, key.encode(), Create())
        assert sorted(meta.key for meta in store.list("b/")) == ["b/1", "b/2", "b/sub/3"]
        assert sorted(meta.key for meta in store.list("")) == ["a/5", "b/1", "b/2", "b/sub/3", "bb/4"]
        assert list(store.list("none/")) == []
        assert {meta.key: meta.size_bytes for meta in store.list("b/")}["b/sub/3"] == 7
        for meta in store.list("b/"):
            assert meta.etag == store.get(meta.key).meta.etag, "what did not change need not be read again"

    def test_list_is_whole_beyond_one_page(self, store: BlobStore) -> None:
        for number in range(1010):  # S3 lists 1,000 at a time
            store.put(f"many/{number:04d}", b"", Create())
        assert sorted(meta.key for meta in store.list("many/")) == [f"many/{n:04d}" for n in range(1010)]
        later = sorted(meta.key for meta in store.list("many/", after="many/0003"))
        assert later == [f"many/{n:04d}" for n in range(4, 1010)], "and so is what comes after a key"

    def test_list_goes_on_after_a_key(self, store: BlobStore) -> None:
        """For whoever follows what is new: S3's ``StartAfter``."""
        for number in range(20):
            store.put(f"new/{number:04d}.acme", b"", Create())
        store.put("other/9", b"", Create())
        listed = sorted(meta.key for meta in store.list("new/", after="new/0004"))
        assert listed == [f"new/{n:04d}.acme" for n in range(4, 20)], "what begins so sorts after it"
        assert [meta.key for meta in store.list("new/", after="new/0018.acme")] == ["new/0019.acme"]
        assert list(store.list("new/", after="new/9")) == []

    def test_delete_is_idempotent(self, store: BlobStore) -> None:
        store.put("k", b"1", Create())
        store.delete("k")
        store.delete("k")
        with pytest.raises(NotFound):
            store.get("k")

    def test_purge_leaves_nothing(self, store: BlobStore) -> None:
        store.put("k", b"1", Create())
        store.put("k/below", b"other", Create()) if "file:" not in store.url else None
        assert store.purge("k") == 1
        assert store.purge("k") == 0
        with pytest.raises(NotFound):
            store.get("k")
        store.put("kept", b"1", Create())
        assert store.purge("kept", keep_latest=True) == 0
        assert store.get("kept").data == b"1"
        store.put("tree/a", b"1", Create())
        store.put("tree/b/c", b"1", Create())
        store.put("treehouse", b"1", Create())
        assert sorted(store.history("tree/")) == ["tree/a", "tree/b/c"]
        assert store.purge_all("tree/") == 2
        assert list(store.history("tree/")) == []
        assert {"kept", "treehouse"} <= {meta.key for meta in store.list("")}
        assert not any(meta.key.startswith("tree/") for meta in store.list(""))

    @pytest.mark.parametrize(
        "key",
        ["", "/", "/abs", "a//b", "a/", "../up", "a/../../etc/passwd", "a/./b", "a\\b", "nul\0", "new\nline",
         "ü", "x" * 600, "a/" + "x" * 250],
    )  # fmt: skip
    def test_bad_keys_are_refused_by_every_method(self, store: BlobStore, key: str) -> None:
        for call in (
            lambda: store.get(key),
            lambda: store.get_unless(key, '"x"'),
            lambda: store.head(key),
            lambda: store.put(key, b"", Overwrite()),
            lambda: store.delete(key),
            lambda: store.purge(key),
        ):
            with pytest.raises(InvalidInput):
                call()

    @pytest.mark.parametrize("prefix", ["a", "../", "/", "a//", "a/../"])
    def test_bad_prefixes_are_refused(self, store: BlobStore, prefix: str) -> None:
        with pytest.raises(InvalidInput):
            list(store.list(prefix))

    def test_conditions_are_honoured(self, store: BlobStore) -> None:
        check_conditions(store)
        assert list(store.list("")) == [], "it leaves nothing behind"

    def test_one_of_many_creates_wins(self, store: BlobStore) -> None:
        outcomes: list[str] = []
        start = threading.Barrier(8)

        def create(number: int) -> None:
            start.wait()
            try:
                store.put("one", str(number).encode(), Create())
            except (AlreadyExists, Conflict):
                outcomes.append("lost")
            else:
                outcomes.append("won")

        _run_all([lambda n=n: create(n) for n in range(8)])
        assert sorted(outcomes) == ["lost"] * 7 + ["won"]

    def test_compare_and_swap_loses_no_increment(self, store: BlobStore) -> None:
        store.put("counter", b"0", Create())

        def increment_ten_times() -> None:
            for _ in range(10):
                while True:
                    blob = store.get("counter")
                    wanted = str(int(blob.data) + 1).encode()
                    try:
                        store.put("counter", wanted, UpdateIf(blob.meta.etag))
                    except Conflict:
                        continue
                    break

        _run_all([increment_ten_times] * 5)
        assert store.get("counter").data == b"50"


def _run_all(functions: list[object]) -> None:
    """Run functions in a thread each; an exception in any fails the test."""
    errors: list[BaseException] = []

    def guarded(function: object) -> None:
        try:
            assert callable(function)
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a writer never finished"
    assert errors == []
