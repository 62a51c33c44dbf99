"""The host tier at its edges: what exactly fits, who may look, what a failure leaves, and who waits for whom."""

from __future__ import annotations

import errno
import fcntl
import gc
import hashlib
import logging
import os
import shutil
import threading
from pathlib import Path

import pytest

from flatshare.weights import host_tier as module
from flatshare.weights.host_tier import HostTier, Scrubbed
from flatshare.weights.tier_files import PAGE

BIG = 25 * PAGE


def content(number: int, size: int = BIG) -> bytes:
    return bytes([number % 256]) * size


def name(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def publish(tier: HostTier, data: bytes) -> memoryview | None:
    writer = tier.writer(name(data), len(data))
    if writer is None:
        return None
    assert writer.write(memoryview(data))
    return writer.publish()


def publish_and_let_go(tier: HostTier, *datas: bytes) -> None:
    """Publish files that nobody maps, the first the longest unopened."""
    for age, data in enumerate(datas):
        assert publish(tier, data) is not None
        os.utime(tier.path(name(data)), (age, age))
    gc.collect()


def set_count(tier: HostTier, used_bytes: int) -> None:
    """What a crash may leave in the file that counts."""
    handle = os.open(tier._root / "usage", os.O_RDWR)
    os.pwrite(handle, f"{used_bytes:031d}\n".encode(), 0)
    os.close(handle)


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def test_a_missing_folder_is_made_with_those_above_it_and_for_this_user_only(tmp_path: Path) -> None:
    tier = HostTier(tmp_path / "a" / "b" / "tier", 2 * BIG)
    publish(tier, content(1))
    with tier.fetching("ab" * 32, 1):
        made = [tmp_path / "a" / "b" / "tier", *(tmp_path / "a" / "b" / "tier").rglob("*")]
        modes = {path.name: path.stat().st_mode & 0o777 for path in made}
    digest = name(content(1))
    files = {"usage": 0o600, "ab" * 32: 0o600, digest: 0o400}
    assert modes == files | dict.fromkeys(modes.keys() - files.keys(), 0o700)


@pytest.mark.parametrize(("mode", "refused"), [(0o720, True), (0o702, True), (0o711, False), (0o700, False)])
def test_only_a_folder_that_nobody_else_may_write_to_is_used(
    tmp_path: Path, mode: int, refused: bool
) -> None:
    folder = tmp_path / "tier"
    folder.mkdir()
    folder.chmod(mode)
    if refused:
        with pytest.raises(PermissionError):
            HostTier(folder, BIG)
        assert list(folder.iterdir()) == []
    else:
        assert publish(HostTier(folder, BIG), content(1)) is not None


def test_a_folder_of_another_user_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tier").mkdir(mode=0o700)
    monkeypatch.setattr(module.os, "getuid", lambda: (tmp_path / "tier").stat().st_uid + 1)
    with pytest.raises(PermissionError, match="must belong to this user"):
        HostTier(tmp_path / "tier", BIG)


def test_one_tensor_may_take_the_whole_budget(tmp_path: Path) -> None:
    tier = HostTier(tmp_path / "tier", BIG)
    assert publish(tier, content(1)) is not None
    assert (tier.usage().used_bytes, tier.usage().bypassed) == (BIG, 0)


def test_what_just_fits_costs_nobody_their_place(tmp_path: Path) -> None:
    tier = HostTier(tmp_path / "tier", 2 * BIG)
    pressed: list[int] = []
    tier.on_pressure = lambda: pressed.append(1)
    publish_and_let_go(tier, content(1))
    assert publish(tier, content(2)) is not None
    assert (len(tier.digests()), pressed) == (2, [])


def test_an_eviction_that_makes_just_enough_room_is_enough(tmp_path: Path) -> None:
    tier = HostTier(tmp_path / "tier", 2 * BIG)
    mapped = publish(tier, content(1))
    publish_and_let_go(tier, content(2))
    assert publish(tier, content(3)) is not None
    assert set(tier.digests()) == {name(content(1)), name(content(3))}
    assert mapped == content(1)


def test_who_maps_files_without_need_is_asked_before_files_are_looked_for(tmp_path: Path) -> None:
    tier = HostTier(tmp_path / "tier", 2 * BIG)
    held = [publish(tier, content(1)), publish(tier, content(2))]

    def let_go() -> None:
        held.clear()
        gc.collect()

    tier.on_pressure = let_go
    assert tier.writer("ab" * 32, 2 * BIG + 1) is None
    assert len(held) == 2, "what can never fit asks nobody to let go"
    assert tier.bypassed == 1
    assert publish(tier, content(3)) is not None
    assert not held


def test_an_eviction_leaves_some_room_so_that_not_each_tensor_needs_one(tmp_path: Path) -> None:
    tier = HostTier(tmp_path / "tier", 40 * PAGE)
    publish_and_let_go(tier, *(content(number, PAGE) for number in range(40)))
    assert len(tier.digests()) == 40
    publish(tier, content(40, PAGE))
    left = len(tier.digests())
    assert 36 <= left < 40, "some more than one went, and by far not all"
    publish(tier, content(41, PAGE))
    assert len(tier.digests()) == left + 1


def test_a_count_that_is_too_high_is_put_right_also_where_it_gains_no_room(tmp_path: Path) -> None:
    tier = HostTier(tmp_path / "tier", 2 * BIG)
    mapped = [publish(tier, content(1)), publish(tier, content(2))]
    set_count(tier, 10**12)
    assert publish(tier, content(3)) is None
    assert tier.usage().used_bytes == 2 * BIG
    assert mapped == [content(1), content(2)]


def test_a_replica_that_starts_counts_anew(tmp_path: Path) -> None:
    tier = HostTier(tmp_path / "tier", 4 * BIG)
    publish(tier, content(1))
    set_count(tier, 10**12)
    assert HostTier(tmp_path / "tier", 4 * BIG).usage().used_bytes == BIG
    assert tier.usage().used_bytes == BIG


def test_a_tier_that_somebody_removed_holds_nothing(tmp_path: Path) -> None:
    tier = HostTier(tmp_path / "tier", BIG)
    publish(tier, content(1))
    shutil.rmtree(tmp_path / "tier")
    assert tier.usage().used_bytes == 0


def test_what_is_held_is_told_only_when_whoever_counts_has_done(tmp_path: Path) -> None:
    tier = HostTier(tmp_path / "tier", BIG)
    told: list[int] = []
    handle = os.open(tier._root / "usage", os.O_RDWR)
    fcntl.flock(handle, fcntl.LOCK_EX)  # as another process does that counts
    asks = threading.Thread(target=lambda: told.append(tier.usage().used_bytes), daemon=True)
    asks.start()
    asks.join(0.2)
    assert told == []
    set_count(tier, 7 * PAGE)
    os.close(handle)
    asks.join(10)
    assert told == [7 * PAGE]


def test_who_waits_for_a_fetch_in_vain_leaves_no_descriptor_open(tmp_path: Path) -> None:
    tier = HostTier(tmp_path / "tier", BIG)
    with tier.fetching("ab" * 32, 0) as first:
        assert first
        before = descriptors()
        for timeout_s in (0, 0.03):
            with tier.fetching("ab" * 32, timeout_s) as second:
                assert not second
        assert descriptors() == before
    with tier.fetching("ab" * 32, 0) as third:
        assert third


def test_a_lock_whose_file_its_owner_has_just_removed_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening and locking the owner ends: the next one to come makes a new file, and must not have both."""
    tier = HostTier(tmp_path / "tier", BIG)
    path = tier._locks / ("ab" * 32)
    real, left = fcntl.flock, [path.unlink]

    def flock(handle: int, how: int) -> None:
        if left:
            left.pop()()
        real(handle, how)

    before = descriptors()
    monkeypatch.setattr(module.fcntl, "flock", flock)
    with tier.fetching("ab" * 32, 1) as ours:
        assert ours and not left
        with tier.fetching("ab" * 32, 0) as others:
            assert not others
    assert descriptors() == before


def test_a_tensor_that_was_renamed_but_not_overwritten_counts_as_removed_and_is_finished_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = HostTier(tmp_path / "tier", 4 * BIG)
    publish_and_let_go(tier, content(1), content(2))

    def fails(handle: int) -> int:
        raise OSError(errno.EIO, "the disk is failing")

    with monkeypatch.context() as patched:
        patched.setattr(module, "overwrite", fails)
        done = tier.scrub([name(content(1))])
    assert (done.removed, done.kept, done.overwritten_bytes) == ((name(content(1)),), (), 0)
    assert not tier.has(name(content(1)))
    assert list((tmp_path / "tier").rglob("tmp/*")) == [], "the count that follows overwrites orphans"
    assert tier.usage().used_bytes == BIG


def test_a_scrub_follows_no_link(tmp_path: Path) -> None:
    tier = HostTier(tmp_path / "tier", 4 * BIG)
    outside = tmp_path / "outside"
    outside.write_bytes(content(5))
    path = tier.path(name(content(5)))
    path.parent.mkdir()
    path.symlink_to(outside)
    with pytest.raises(OSError) as caught:
        tier.scrub([name(content(5))])
    assert caught.value.errno == errno.ELOOP, "said aloud: it is no file of ours"
    assert outside.read_bytes() == content(5)


def test_a_tier_without_room_is_said_once_and_counted_each_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tier = HostTier(tmp_path / "tier", BIG)
    with caplog.at_level(logging.WARNING, logger="flatshare.weights"):
        for _ in range(3):
            assert tier.writer("ab" * 32, 2 * BIG) is None
    assert tier.usage().bypassed == 3
    assert [one.name for one in caplog.records] == ["flatshare.weights"]


def test_an_erasure_that_found_no_tier_overwrote_nothing() -> None:
    assert Scrubbed() == Scrubbed((), (), 0)
