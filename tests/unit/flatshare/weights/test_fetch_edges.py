"""Fetching at its edges: who waits for whom and how long, what is held in memory, and stores that misbehave."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flatshare.weights import fetch
from flatshare.weights.fetch import RANGES_AHEAD, Fetched, TensorSource
from flatshare.weights.host_tier import HostTier
from flatshare.weights.tiers import Tier
from flatshare_registry import Registry, TenantId, layout
from flatshare_registry.errors import Corrupt, NotFound, Unavailable
from flatshare_registry.records import TensorRecord, VersionRecord
from flatshare_registry.stores.base import ByteRange
from flatshare_registry.stores.memory import MemoryStore
from flatshare_registry.testing.files import encode_safetensors, specs_of

LARGE, OTHER, MIDDLE, HEAD = 300_000, 200_000, 5_000, 700


class Store(MemoryStore):
    """Says what it is asked for, hands out pieces of a size that the test chooses, and changes what it answers."""

    def __init__(self) -> None:
        super().__init__()
        self.piece = 1 << 20
        self.asked: list[ByteRange | None] = []
        self.given: list[bytes] = []
        self.go: threading.Event | None = None
        self.change: Callable[[bytes], list[bytes]] = lambda data: [data]

    def chunks(self, key: str, byte_range: ByteRange | None = None) -> Iterator[bytes]:
        self.asked.append(byte_range)
        if self.go is not None:
            assert self.go.wait(20)
        for data in self.change(bytes(self.get(key, byte_range).data)):
            for start in range(0, len(data), self.piece):
                self.given.append(data[start : start + self.piece])
                yield self.given[-1]


@pytest.fixture
def store() -> Store:
    return Store()


def registered(store: Store, sizes: dict[str, int]) -> tuple[VersionRecord, dict[str, TensorRecord]]:
    arrays = {
        name: np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
        for seed, (name, size) in enumerate(sizes.items())
    }
    registry = Registry(store)
    registry.create_tenant(TenantId("acme"))
    weights = encode_safetensors(arrays)
    record = registry.register(TenantId("acme"), weights, "edges", specs_of(arrays)).version
    by_name = {one.name: one for one in record.tensors}
    for name, array in arrays.items():
        one = by_name[name]
        assert weights[one.start : one.end] == array.tobytes()
    return record, by_name


def check(store: Store, record: VersionRecord, found: Fetched, *names: str) -> None:
    """What was found is what was registered."""
    weights = store.get(layout.blob_key(record.digest)).data
    wanted = {one.sha256: bytes(weights[one.start : one.end]) for one in record.tensors if one.name in names}
    assert {digest: bytes(data) for digest, data in found.data.items()} == wanted


def test_of_two_replicas_that_need_the_same_one_fetches_and_the_other_waits(
    store: Store, tmp_path: Path
) -> None:
    record, _ = registered(store, {"large": LARGE, "head": HEAD})
    store.go = threading.Event()
    sources = [TensorSource(store, HostTier(tmp_path / "tier", 10**7)) for _ in range(2)]
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(sources[0].read, record, ["large", "head"], 20)
        while not store.asked:
            time.sleep(0.001)
        second = threads.submit(sources[1].read, record, ["large", "head"], 20)
        time.sleep(0.1)
        assert len(store.asked) == 1
        store.go.set()
        found = [first.result(20), second.result(20)]
    assert ([one.tier for one in found], len(store.asked)) == ([Tier.STORE, Tier.HOST], 1)
    for one in found:
        check(store, record, one, "large", "head")


@pytest.mark.parametrize("timeout_s", [0.4, 60.0])
def test_who_waits_for_another_replica_in_vain_does_so_once_and_still_has_time_to_fetch(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, timeout_s: float
) -> None:
    record, _ = registered(store, {"large": LARGE, "other": OTHER})
    tier = HostTier(tmp_path / "tier", 10**7)
    now_s = 1000.0
    waits: list[float] = []

    @contextlib.contextmanager
    def never(digest: str, wait_s: float) -> Iterator[bool]:
        nonlocal now_s
        waits.append(wait_s)
        now_s += wait_s
        yield False

    monkeypatch.setattr(tier, "fetching", never)
    found = TensorSource(store, tier, clock=lambda: now_s).read(record, ["large", "other"], timeout_s)
    assert len(waits) == 1 and 0 < waits[0] < timeout_s
    assert found.tier is Tier.STORE
    check(store, record, found, "large", "other")


@pytest.mark.parametrize(
    ("from_bytes", "most", "wanted", "locked"),
    [
        (LARGE, 64, ["large", "other", "middle", "head"], ["large"]),
        (MIDDLE, 64, ["large", "other", "middle", "head"], ["large", "other", "middle"]),
        (MIDDLE, 2, ["large", "other", "middle", "head"], ["large", "other"]),
        (MIDDLE, 64, ["head", "small"], ["head"]),
    ],
)
def test_large_tensors_are_locked_and_of_small_ones_the_largest(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    from_bytes: int, most: int, wanted: list[str], locked: list[str],
) -> None:  # fmt: skip
    """In the order of their digests, as every replica does: no two can wait for each other."""
    sizes = {"small": 10, "middle": MIDDLE, "large": LARGE, "head": HEAD, "other": OTHER}
    record, tensors = registered(store, sizes)
    monkeypatch.setattr(fetch, "LOCK_FROM_BYTES", from_bytes)
    monkeypatch.setattr(fetch, "MAX_LOCKS", most)
    tier = HostTier(tmp_path / "tier", 10**7)
    asked: list[str] = []
    fetching = tier.fetching

    def noted(digest: str, timeout_s: float) -> Any:
        asked.append(digest)
        return fetching(digest, timeout_s)

    monkeypatch.setattr(tier, "fetching", noted)
    check(store, record, TensorSource(store, tier).read(record, wanted, 10), *wanted)
    assert asked == sorted(tensors[name].sha256 for name in locked)


class AtOnce(Executor):
    """Does the work when it is handed over, and counts it."""

    def __init__(self) -> None:
        self.submitted = 0

    def submit(self, work: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.submitted += 1
        future: Future[Any] = Future()
        future.set_result(work(*args, **kwargs))
        return future


def test_a_load_holds_few_parts_in_memory_however_many_it_has(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, tensors = registered(store, {"large": LARGE})
    monkeypatch.setattr(fetch, "RANGE_BYTES", 10_000)
    ranges = fetch._ranges([tensors["large"]])
    assert len(ranges) == 30
    threads = AtOnce()
    source = TensorSource(store, None, threads)
    for taken, _ in enumerate(source._read_ranges(record, ranges, time.monotonic() + 10), start=1):
        assert threads.submitted - taken < RANGES_AHEAD
    assert taken == threads.submitted == 30


class Never(Executor):
    """Begins nothing that it is given; says for how long somebody has waited for it."""

    def __init__(self) -> None:
        self.futures: list[Future[Any]] = []
        self.waits: list[float | None] = []

    def submit(self, work: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        never = self

        class Waited(Future[Any]):
            def result(self, timeout: float | None = None) -> Any:
                never.waits.append(timeout)
                raise TimeoutError

        self.futures.append(Waited())
        return self.futures[-1]


def test_parts_that_come_too_late_are_waited_for_in_time_and_those_behind_them_never_begun(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, _ = registered(store, {"large": LARGE})
    monkeypatch.setattr(fetch, "RANGE_BYTES", 10_000)
    threads = Never()
    with pytest.raises(Unavailable, match="in time"):
        TensorSource(store, None, threads, clock=lambda: 1000.0).read(record, ["large"], 0.25)
    assert threads.waits == [0.25]
    assert len(threads.futures) == RANGES_AHEAD
    assert all(one.cancelled() for one in threads.futures[1:])


def test_small_tensors_do_not_keep_the_bytes_around_them_and_large_ones_are_not_copied(store: Store) -> None:
    record, tensors = registered(store, {"small": 4_000, "large": 6_000})
    found = TensorSource(store).read(record, ["small", "large"], 10).data
    (piece,) = store.given
    small, large = found[tensors["small"].sha256], found[tensors["large"].sha256]
    assert len(small.obj) == 4_000  # type: ignore[arg-type]  # a bytearray
    assert large.obj is piece
    assert small.readonly and large.readonly


def test_what_a_failing_disk_took_in_part_is_not_taken_twice(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, _ = registered(store, {"large": LARGE})
    store.piece = 100_000
    tier = HostTier(tmp_path / "tier", 10**7)
    writer = tier.writer

    def fills_up(digest: str, size_bytes: int) -> Any:
        made = writer(digest, size_bytes)
        assert made is not None
        write, writes = made.write, [1]

        def some(data: memoryview) -> bool:
            if writes:
                writes.pop()
                return write(data)
            write(data[: len(data) // 2])
            return False

        made.write = some  # type: ignore[method-assign]
        return made

    monkeypatch.setattr(tier, "writer", fills_up)
    check(store, record, TensorSource(store, tier).read(record, ["large"], 10), "large")


def test_tensors_near_each_other_come_together_wherever_they_are_in_the_file(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"a": 100, "x": 5_000, "b": 200, "y": 5_000, "c": 300, "d": 400, "e": 500}
    record, tensors = registered(store, sizes)
    monkeypatch.setattr(fetch, "GAP_BYTES", 0)
    found = TensorSource(store).read(record, ["a", "b", "c", "d", "e"], 10)
    check(store, record, found, "a", "b", "c", "d", "e")
    assert store.asked == [
        ByteRange(tensors["a"].start, tensors["a"].end),
        ByteRange(tensors["b"].start, tensors["b"].end),
        ByteRange(tensors["c"].start, tensors["e"].end),
    ]


def test_what_is_asked_for_is_the_range_of_the_tensor_and_never_the_whole_file(store: Store) -> None:
    """Also where the range ends as far before the file's end as it starts after its beginning."""
    probe, tensors = registered(Store(), {"first": HEAD, "rest": 100})
    rest = tensors["first"].start
    record, tensors = registered(store, {"first": HEAD, "rest": rest})
    shift = tensors["first"].start - rest  # the header says how long `rest` is, and may be longer by a digit
    store = Store()
    record, tensors = registered(store, {"first": HEAD, "rest": rest + shift})
    first = tensors["first"]
    assert first.start + first.end == record.size_bytes and probe.size_bytes
    check(store, record, TensorSource(store).read(record, ["first"], 10), "first")
    assert store.asked == [ByteRange(first.start, first.end)]


@pytest.mark.parametrize("with_tier", [False, True])
def test_more_than_was_asked_for_is_not_used(store: Store, tmp_path: Path, with_tier: bool) -> None:
    record, _ = registered(store, {"large": LARGE, "head": HEAD})
    store.change = lambda data: [data, b"more"]
    tier = HostTier(tmp_path / "tier", 10**7) if with_tier else None
    check(store, record, TensorSource(store, tier).read(record, ["large"], 10), "large")


@pytest.mark.parametrize("with_tier", [False, True])
def test_an_answer_that_ends_early_without_a_word_is_corrupt(
    store: Store, tmp_path: Path, with_tier: bool
) -> None:
    record, _ = registered(store, {"large": LARGE})
    store.change = lambda data: [data[:-1]]
    tier = HostTier(tmp_path / "tier", 10**7) if with_tier else None
    with pytest.raises(Corrupt, match="do not have the registered length"):
        TensorSource(store, tier).read(record, ["large"], 10)
    assert len(store.asked) == 1
    assert tier is None or (tier.digests(), tier.usage().used_bytes) == ([], 0)


@pytest.mark.parametrize("with_tier", [False, True])
def test_wrong_bytes_are_corrupt_with_a_host_tier_and_without(
    store: Store, tmp_path: Path, with_tier: bool
) -> None:
    record, _ = registered(store, {"large": LARGE, "head": HEAD})
    store.change = lambda data: [bytes(len(data))]
    tier = HostTier(tmp_path / "tier", 10**7) if with_tier else None
    with pytest.raises(Corrupt, match="does not have its sha256"):
        TensorSource(store, tier).read(record, ["large", "head"], 10)
    assert tier is None or (tier.digests(), tier.usage().used_bytes) == ([], 0)


@pytest.mark.parametrize("with_tier", [False, True])
def test_what_arrives_for_a_tenant_that_was_erased_meanwhile_is_not_kept(
    store: Store, tmp_path: Path, with_tier: bool
) -> None:
    record, _ = registered(store, {"large": LARGE, "head": HEAD})
    tier = HostTier(tmp_path / "tier", 10**7) if with_tier else None
    source = TensorSource(store, tier)
    source.work.stop("acme")
    with pytest.raises(NotFound, match="was erased"):
        source.read(record, ["large", "head"], 10)
    assert tier is None or (tier.digests(), tier.usage().used_bytes) == ([], 0)
    assert not [path for path in tmp_path.rglob("tmp/*") if path.is_file()]


def test_who_asks_again_waits_a_little_each_by_chance(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    record, _ = registered(store, {"large": LARGE})
    waits: list[float] = []
    monkeypatch.setattr(fetch.time, "sleep", waits.append)
    failing: list[bool] = []

    def fails_once(data: bytes) -> list[bytes]:
        if not failing:
            failing.append(True)
            raise Unavailable("reset")
        failing.clear()
        return [data]

    store.change = fails_once
    for _ in range(20):
        check(store, record, TensorSource(store).read(record, ["large"], 10), "large")
    assert len(set(waits)) == 20
    assert all(0 <= wait_s <= fetch.RETRY_S for wait_s in waits)


def test_damaged_files_are_told_and_whole_ones_are_not(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record, tensors = registered(store, {"large": LARGE, "head": HEAD})
    tier = HostTier(tmp_path / "tier", 10**7)
    source = TensorSource(store, tier)
    source.read(record, ["large"], 10)
    with caplog.at_level(logging.ERROR, logger="flatshare.weights"):
        assert source.recheck(record) == [] and caplog.records == []
        path = tier.path(tensors["large"].sha256)
        path.chmod(0o600)
        path.write_bytes(bytes(LARGE))
        assert source.recheck(record) == [tensors["large"].sha256] and len(caplog.records) == 1
