"""Reading from the host tier leaves nothing behind: no descriptor, and no lock that stops an eviction or an erasure."""

from __future__ import annotations

import errno
import gc
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from flatshare.weights.host_tier import HostTier

BIG, SMALL = 100 * 1024, 100
CONTENT = {size: bytes([size % 251]) * size for size in (BIG, SMALL)}


def name(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def publish(tier: HostTier, data: bytes) -> None:
    writer = tier.writer(name(data), len(data))
    assert writer is not None and writer.write(memoryview(data))
    writer.publish()


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def tier(tmp_path: Path) -> HostTier:
    tier = HostTier(tmp_path / "tier", 2 * BIG)
    for data in CONTENT.values():
        publish(tier, data)
    return tier


def read(tier: HostTier, size: int) -> None:
    view = tier.open(name(CONTENT[size]), size)
    assert view is not None and bytes(view) == CONTENT[size]


def another_length(tier: HostTier, size: int) -> None:
    assert tier.open(name(CONTENT[size]), size + 1) is None


def gone(tier: HostTier, size: int) -> None:
    assert tier.open("0" * 64, size) is None


@pytest.mark.parametrize("size", [BIG, SMALL])
@pytest.mark.parametrize("way", [read, another_length, gone])
def test_a_read_leaves_no_descriptor_open(
    tier: HostTier, way: Callable[[HostTier, int], None], size: int
) -> None:
    way(tier, size)
    before = descriptors()
    for _ in range(20):
        way(tier, size)
    assert descriptors() == before


@pytest.mark.parametrize("size", [BIG, SMALL])
@pytest.mark.parametrize("way", [read, another_length])
def test_what_was_read_and_let_go_of_can_be_erased(
    tier: HostTier, way: Callable[[HostTier, int], None], size: int
) -> None:
    way(tier, size)
    gc.collect()
    digest = name(CONTENT[size])
    scrubbed = tier.scrub([digest])
    assert (scrubbed.removed, scrubbed.kept) == ((digest,), ())
    assert not tier.has(digest)


def test_what_was_read_and_let_go_of_can_be_evicted(tier: HostTier) -> None:
    for size in CONTENT:
        read(tier, size)
    gc.collect()
    other = bytes([7]) * (2 * BIG - 4096)
    publish(tier, other)
    assert tier.digests() == [name(other)]


def test_what_is_still_looked_at_is_kept_and_said(tier: HostTier) -> None:
    digest = name(CONTENT[BIG])
    view = tier.open(digest, BIG)
    assert view is not None
    assert tier.scrub([digest, "0" * 64]).kept == (digest,)
    assert tier.has(digest)
    del view
    gc.collect()
    assert tier.scrub([digest]).removed == (digest,)


def test_writing_fetching_and_giving_up_leave_no_descriptor_open(tier: HostTier) -> None:
    def once(number: int) -> None:
        data = bytes([number]) * 5000
        with tier.fetching(name(data), 1) as ours:
            assert ours
            writer = tier.writer(name(data), len(data))
            assert writer is not None
            writer.write(memoryview(data)[:1000])
            writer.abort()
        publish(tier, data)

    once(1)
    before, used = descriptors(), tier.usage().used_bytes
    for number in range(2, 12):
        once(number)
        assert tier.scrub([name(bytes([number]) * 5000)]).removed
    assert descriptors() == before
    assert tier.usage().used_bytes == used


def test_what_could_not_be_erased_is_said_to_be_kept(tier: HostTier, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = name(CONTENT[BIG])

    def fails(path: Path, target: Path) -> Path:
        raise OSError(errno.EIO, "the disk is failing")

    monkeypatch.setattr(Path, "rename", fails)
    assert (tier.scrub([digest]).removed, tier.scrub([digest]).kept) == ((), (digest,))
    assert tier.has(digest)
    monkeypatch.undo()
    assert tier.scrub([digest]).removed == (digest,)


def test_nobody_else_can_read_or_change_anything_in_the_tier(tier: HostTier, tmp_path: Path) -> None:
    assert (tmp_path / "tier").stat().st_mode & 0o077 == 0
    with tier.fetching("a" * 64, 1):
        everything = [path for path in (tmp_path / "tier").rglob("*") if path.is_file()]
        assert len(everything) >= 4
        for path in everything:
            assert path.stat().st_mode & 0o177 == 0, path
