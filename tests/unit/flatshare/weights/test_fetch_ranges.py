"""Weights in parts: side by side, in time, only what is needed, and whole whatever the pieces are."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from flatshare.weights import fetch
from flatshare.weights.fetch import RANGES_AHEAD, TensorSource
from flatshare.weights.host_tier import HostTier
from flatshare.weights.tiers import Tier
from flatshare_registry import Registry, TenantId, layout
from flatshare_registry.errors import Corrupt, Unavailable
from flatshare_registry.records import VersionRecord
from flatshare_registry.stores.base import ByteRange
from flatshare_registry.stores.memory import MemoryStore
from flatshare_registry.testing.files import encode_safetensors, specs_of

ARRAYS = {
    name: np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    for seed, (name, size) in enumerate({"base": 300_000, "small": 10, "middle": 5_000, "head": 700}.items())
}


class PieceStore(MemoryStore):
    """Answers in pieces of a size that the test chooses; counts who reads at the same time, and may hold them back."""

    def __init__(self) -> None:
        super().__init__()
        self.piece = 1 << 20
        self.asked: list[ByteRange | None] = []
        self.together: threading.Barrier | None = None
        self.hang: threading.Event | None = None

    def chunks(self, key: str, byte_range: ByteRange | None = None) -> Iterator[bytes]:
        self.asked.append(byte_range)
        if self.together is not None:
            self.together.wait(10)
        if self.hang is not None:
            assert self.hang.wait(10)
        data = self.get(key, byte_range).data
        for start in range(0, len(data), self.piece):
            yield bytes(data[start : start + self.piece])


@pytest.fixture
def store() -> PieceStore:
    return PieceStore()


@pytest.fixture
def record(store: PieceStore) -> VersionRecord:
    registry = Registry(store)
    registry.create_tenant(TenantId("acme"))
    return registry.register(TenantId("acme"), encode_safetensors(ARRAYS), "parts", specs_of(ARRAYS)).version


def read(source: TensorSource, record: VersionRecord, *names: str, timeout_s: float = 10) -> dict[str, bytes]:
    wanted = names or tuple(ARRAYS)
    found = source.read(record, wanted, timeout_s).data
    by_name = {one.name: one.sha256 for one in record.tensors}
    assert set(found) == {by_name[name] for name in wanted}
    return {name: bytes(found[by_name[name]]) for name in wanted}


def right(*names: str) -> dict[str, bytes]:
    return {name: ARRAYS[name].tobytes() for name in names or ARRAYS}


@pytest.mark.parametrize(("part", "ranges"), [(80_000, 4), (150_000, 2)])
def test_parts_are_read_side_by_side(
    store: PieceStore, record: VersionRecord, monkeypatch: pytest.MonkeyPatch, part: int, ranges: int
) -> None:
    """Each read waits until as many are under way as there are threads: one after the other would never end."""
    monkeypatch.setattr(fetch, "RANGE_BYTES", part)
    together = min(RANGES_AHEAD, 2)
    assert together > 1
    store.together = threading.Barrier(together)
    with ThreadPoolExecutor(together) as parts:
        assert read(TensorSource(store, None, parts), record, "base") == right("base")
    assert len(store.asked) == ranges


def test_what_comes_in_one_part_waits_for_none_of_the_threads_of_others(
    store: PieceStore, record: VersionRecord
) -> None:
    go = threading.Event()
    with ThreadPoolExecutor(1) as parts:
        parts.submit(go.wait, 10)
        try:
            assert read(TensorSource(store, None, parts), record, timeout_s=5) == right()
            assert not go.is_set()
        finally:
            go.set()


@pytest.mark.parametrize("with_parts", [False, True])
@pytest.mark.parametrize("with_tier", [False, True])
@pytest.mark.parametrize("piece", [999, 4096, 1 << 20])
@pytest.mark.parametrize("part", [1_000, 7_919, 1 << 20])
def test_tensors_are_whole_wherever_pieces_and_parts_end(
    store: PieceStore, record: VersionRecord, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    with_parts: bool, with_tier: bool, piece: int, part: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(fetch, "RANGE_BYTES", part)
    store.piece = piece
    tier = HostTier(tmp_path / "tier", 10**7) if with_tier else None
    with ThreadPoolExecutor(2) as threads:
        source = TensorSource(store, tier, threads if with_parts else None)
        assert read(source, record) == right()
        assert source.fetched_bytes == sum(len(one) for one in right().values())


@pytest.mark.parametrize("with_parts", [False, True])
def test_parts_that_come_too_late_are_unavailable_in_time(
    store: PieceStore, record: VersionRecord, monkeypatch: pytest.MonkeyPatch, with_parts: bool
) -> None:
    monkeypatch.setattr(fetch, "RANGE_BYTES", 80_000)
    store.hang = threading.Event()
    with ThreadPoolExecutor(2) as threads:
        if not with_parts:
            threading.Timer(0.2, store.hang.set).start()
        source = TensorSource(store, None, threads if with_parts else None)
        with pytest.raises(Unavailable, match="acme@1 in time"):
            source.read(record, list(ARRAYS), 0.1)
        store.hang.set()
    assert len(store.asked) <= RANGES_AHEAD, "what was not begun is not read any more"


def test_a_new_head_fetches_its_own_bytes_and_not_the_base(
    store: PieceStore, record: VersionRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "GAP_BYTES", 0)
    source = TensorSource(store)
    assert read(source, record, "head") == right("head")
    tensor = next(one for one in record.tensors if one.name == "head")
    assert store.asked == [ByteRange(tensor.start, tensor.end)]
    assert source.fetched_bytes == 700


def test_tensors_with_little_between_them_come_in_one_get_and_others_do_not(
    store: PieceStore, record: VersionRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_name = {one.name: one for one in record.tensors}
    base, middle = by_name["base"], by_name["middle"]
    monkeypatch.setattr(fetch, "GAP_BYTES", middle.start - base.end)
    assert read(TensorSource(store), record, "base", "middle") == right("base", "middle")
    assert store.asked == [ByteRange(base.start, middle.end)]
    store.asked.clear()
    monkeypatch.setattr(fetch, "GAP_BYTES", middle.start - base.end - 1)
    assert read(TensorSource(store), record, "base", "middle") == right("base", "middle")
    assert store.asked == [ByteRange(base.start, base.end), ByteRange(middle.start, middle.end)]


def test_a_tensor_for_which_the_tier_loses_its_room_comes_whole_and_leaves_no_file(
    store: PieceStore, record: VersionRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full after some pieces: what was written is taken back into memory."""
    tier = HostTier(tmp_path / "tier", 10**7)
    store.piece = 100_000
    whole = tier.writer

    def writer(digest: str, size_bytes: int):  # type: ignore[no-untyped-def]  # as HostTier.writer
        made = whole(digest, size_bytes)
        if made is not None and size_bytes == 300_000:
            first = [True]
            write = made.write
            made.write = lambda data: first.pop() and write(data) if first else False
        return made

    monkeypatch.setattr(tier, "writer", writer)
    used = tier.usage().used_bytes
    assert read(TensorSource(store, tier), record, "base") == right("base")
    assert (tier.digests(), tier.usage().used_bytes) == ([], used), "its bytes are not set aside any more"
    assert not [path for path in (tmp_path / "tier").rglob("tmp/*") if path.is_file()]


@pytest.mark.parametrize("with_parts", [False, True])
def test_weights_that_are_gone_from_the_store_are_corrupt(
    store: PieceStore, record: VersionRecord, with_parts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "RANGE_BYTES", 80_000)
    store.delete(layout.blob_key(record.digest))
    with ThreadPoolExecutor(2) as threads:
        with pytest.raises(Corrupt, match="acme@1 are gone"):
            read(TensorSource(store, None, threads if with_parts else None), record)


def test_a_wrong_tensor_publishes_nothing_and_gives_back_its_room(
    store: PieceStore, record: VersionRecord, tmp_path: Path
) -> None:
    tier = HostTier(tmp_path / "tier", 10**7)
    wrong = record.model_copy(
        update={"tensors": tuple(one.model_copy(update={"sha256": "e" * 64}) for one in record.tensors)}
    )
    for names in (["head"], ["base"]):
        with pytest.raises(Corrupt, match="does not have its sha256"):
            TensorSource(store, tier).read(wrong, names, 5)
    assert (tier.digests(), tier.usage().used_bytes) == ([], 0)


def test_what_the_node_has_is_read_there_and_what_it_has_not_is_not(
    store: PieceStore, record: VersionRecord, tmp_path: Path
) -> None:
    tier = HostTier(tmp_path / "tier", 10**7)
    source, without = TensorSource(store, tier), TensorSource(store)
    assert not source.is_local(record, ARRAYS) and not without.is_local(record, ARRAYS)
    assert source.read_local(record, ARRAYS) is None and without.read_local(record, ARRAYS) is None
    read(source, record, "base", "small")
    asked = len(store.asked)
    assert (
        source.is_local(record, ["base"]) and source.is_local(record, []) and not without.is_local(record, [])
    )
    by_name = {one.name: one.sha256 for one in record.tensors}
    found = source.read_local(record, ["base", "small"])
    assert found is not None and {digest: bytes(data) for digest, data in found.data.items()} == {
        by_name[name]: data for name, data in right("base", "small").items()
    }
    assert source.read_local(record, ["base", "head"]) is None
    assert found.tier is source.read(record, ["base", "small"], 5).tier is Tier.HOST
    assert len(store.asked) == asked
    mixed = source.read(record, ["base", "head"], 5)
    assert mixed.tier is Tier.STORE and len(store.asked) == asked + 1
    assert {digest: bytes(data) for digest, data in mixed.data.items()} == {
        by_name[name]: data for name, data in right("base", "head").items()
    }


def test_files_that_went_bad_on_the_node_are_found_and_only_these_go(
    store: PieceStore, record: VersionRecord, tmp_path: Path
) -> None:
    tier = HostTier(tmp_path / "tier", 10**7)
    source = TensorSource(store, tier)
    read(source, record)
    by_name = {one.name: one.sha256 for one in record.tensors}
    path = tier.path(by_name["head"])
    path.chmod(0o600)
    path.write_bytes(bytes(700))
    assert source.recheck(record) == [by_name["head"]]
    assert not tier.has(by_name["head"]) and tier.has(by_name["base"])
    assert source.recheck(record) == TensorSource(store).recheck(record) == []
