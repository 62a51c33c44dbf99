"""The host tier: published whole or not at all, bounded at every instant, nothing lost by a dead owner."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flatshare.weights import host_tier as module
from flatshare.weights.host_place import open_host_tier
from flatshare.weights.host_tier import HostTier
from flatshare.weights.tier_files import PAGE, unlink_unless_mapped

BIG = 100 * 1024


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


def files(folder: Path) -> int:
    return sum(-(-path.stat().st_size // PAGE) * PAGE for path in folder.rglob("tensors/*/*"))


@pytest.fixture
def tier(tmp_path: Path) -> HostTier:
    return HostTier(tmp_path / "tier", 5 * BIG + 4 * PAGE)


@pytest.mark.parametrize("size", [1, 3000, BIG])
def test_what_was_published_can_be_opened_by_another_process_too(
    tier: HostTier, tmp_path: Path, size: int
) -> None:
    data = content(7, size)
    view = publish(tier, data)
    assert view is not None
    assert bytes(view) == data
    other = HostTier(tmp_path / "tier", 10 * BIG).open(name(data), size)
    assert other is not None
    assert bytes(other) == data
    assert other.readonly


def test_what_is_not_there_or_has_another_length_is_a_miss(tier: HostTier) -> None:
    data = content(1)
    assert tier.open(name(data), BIG) is None
    publish(tier, data)
    os.chmod(tier.path(name(data)), 0o600)
    os.truncate(tier.path(name(data)), BIG - 1)
    assert tier.open(name(data), BIG) is None
    again = publish(tier, data)  # who fetches it anew puts it right
    assert again is not None
    assert bytes(again) == data
    assert tier.open(name(data), BIG) is not None


def test_nothing_is_visible_before_it_is_published(tier: HostTier) -> None:
    data = content(1)
    writer = tier.writer(name(data), BIG)
    assert writer is not None
    writer.write(memoryview(data)[:1000])
    assert (tier.open(name(data), BIG), tier.digests()) == (None, [])
    assert tier.usage().used_bytes == BIG, "bytes are set aside before they are written"
    writer.abort()
    assert tier.usage().used_bytes == 0


def test_the_budget_holds_and_the_longest_unopened_goes_first(tier: HostTier, tmp_path: Path) -> None:
    for number in range(5):
        publish(tier, content(number))
        os.utime(tier.path(name(content(number))), (number, number))
    assert tier.open(name(content(0)), BIG) is not None  # opened just now: not the oldest any more
    publish(tier, content(5))
    assert files(tmp_path) <= tier.budget_bytes
    assert name(content(0)) in tier.digests()
    assert name(content(1)) not in tier.digests()


def test_a_mapped_file_is_not_evicted_and_too_much_is_not_taken(tier: HostTier, tmp_path: Path) -> None:
    mapped = [publish(tier, content(number)) for number in range(5)]
    assert publish(tier, content(9)) is None, "all are mapped: removing one would free nothing"
    assert tier.usage().bypassed == 1
    assert files(tmp_path) <= tier.budget_bytes
    mapped.pop()
    assert publish(tier, content(9)) is not None
    assert name(content(4)) not in tier.digests()


def test_a_tensor_that_can_never_fit_and_one_that_mapped_files_leave_no_room_for_evict_nothing(
    tier: HostTier,
) -> None:
    mapped = publish(tier, content(0))
    for number in range(1, 5):
        publish(tier, content(number))
    assert tier.writer("ab" * 32, tier.budget_bytes + 1) is None
    assert tier.writer("ab" * 32, 5 * BIG) is None
    assert len(tier.digests()) == 5
    assert mapped is not None


def test_a_tier_whose_folders_were_removed_is_gone_without_and_found_again(
    tier: HostTier, tmp_path: Path
) -> None:
    shutil.rmtree(tmp_path / "tier")
    with tier.fetching("ab" * 32, 1) as ours:
        assert not ours
    assert tier.open("ab" * 32, 1) is None
    assert publish(tier, content(1)) is None
    assert tier.usage().bypassed == 2
    assert publish(tier, content(1)) is not None


def test_what_is_published_while_somebody_counts_is_never_missed(
    tier: HostTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = content(1)
    writer = tier.writer(name(data), BIG)
    assert writer is not None
    writer.write(memoryview(data))
    files = tier._files
    kept = []

    def published_meanwhile():  # type: ignore[no-untyped-def]  # as _files
        if not kept:
            kept.append(writer.publish())
        return files()

    monkeypatch.setattr(tier, "_files", published_meanwhile)
    assert tier._count() >= BIG


def test_an_orphan_of_a_killed_writer_is_swept_and_a_living_ones_is_not(
    tier: HostTier, tmp_path: Path
) -> None:
    script = f"""
import sys, os
from pathlib import Path
from flatshare.weights.host_tier import HostTier
tier = HostTier(Path({str(tmp_path / "tier")!r}), {tier.budget_bytes})
writer = tier.writer("ab" * 32, {3 * BIG})
writer.write(memoryview(bytes(1000)))
with tier.fetching("cd" * 32, 1):
    print("ready", flush=True)
    sys.stdin.read()
"""
    child = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    assert HostTier(tmp_path / "tier", tier.budget_bytes).usage().used_bytes == 3 * BIG + 0
    with tier.fetching("cd" * 32, 0.02) as ours:
        assert not ours
    child.kill()
    child.wait()
    with tier.fetching("cd" * 32, 1) as ours:
        assert ours, "the kernel let go of a dead owner's lock"
    assert [publish(tier, content(number)) is not None for number in range(5)] == [True] * 5
    assert list((tmp_path / "tier").rglob("tmp/*")) == []


def test_one_fetch_at_a_time_and_the_lock_file_goes(tier: HostTier, tmp_path: Path) -> None:
    inside = 0
    most = 0
    lock = threading.Lock()
    pause = threading.Event()

    def work() -> None:
        nonlocal inside, most
        for _ in range(20):
            with tier.fetching("ab" * 32, 20) as ours:
                assert ours
                with lock:
                    inside += 1
                    most = max(most, inside)
                pause.wait(0.002)  # never set: long enough for another to come in, if it could
                with lock:
                    inside -= 1

    threads = [threading.Thread(target=work, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert list((tmp_path / "tier").rglob("locks/*")) == []


def test_a_full_disk_is_survived_and_said(
    tier: HostTier, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    data = content(3)
    writer = tier.writer(name(data), BIG)
    assert writer is not None
    writer.write(memoryview(data)[:1000])

    def full(handle: int, chunk: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(module.os, "write", full)
        assert not writer.write(memoryview(data)[1000:])
    assert writer.read_back() == data[:1000]
    writer.abort()
    assert "No space left" in caplog.text
    assert (tier.usage().used_bytes, tier.usage().bypassed) == (0, 1)


def test_who_comes_second_gets_the_first_ones_file(tier: HostTier) -> None:
    data = content(4)
    one, two = tier.writer(name(data), BIG), tier.writer(name(data), BIG)
    assert one is not None
    assert two is not None
    for writer in (one, two):
        writer.write(memoryview(data))
    assert [bytes(one.publish()), bytes(two.publish())] == [data, data]
    assert tier.usage().used_bytes == BIG


def test_files_of_another_boot_are_removed_not_trusted(tmp_path: Path) -> None:
    old = tmp_path / "tier" / "b5a7c7f2-94f1-4d0b-9a5c-0d9a1d1d7c11" / "tensors" / "ab"
    old.mkdir(parents=True)
    (old.parents[1] / "usage").write_text("0")
    (old / ("ab" * 32)).write_bytes(b"half written before the power went")
    (tmp_path / "tier").chmod(0o700)
    HostTier(tmp_path / "tier", BIG)
    assert not old.exists()


def test_what_else_is_in_the_folder_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "home"
    mine = [folder / "photos" / "cat.jpg", folder / "b5a7c7f2-94f1-4d0b-9a5c-0d9a1d1d7c11" / "notes.txt"]
    for path in mine:
        path.parent.mkdir(parents=True)
        path.write_text("mine")
    folder.chmod(0o700)
    HostTier(folder, BIG)
    assert all(path.read_text() == "mine" for path in mine)


def test_a_folder_that_others_can_write_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o777)
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(PermissionError, match="nobody else may write"):
        HostTier(tmp_path / "open", BIG)
    assert open_host_tier(str(tmp_path / "open"), BIG) is None, "a replica goes on without a host tier"
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(PermissionError):
        HostTier(tmp_path / "link", BIG)


def test_the_settings_mean_a_tier_or_none(tmp_path: Path) -> None:
    assert open_host_tier("off", 0) is None
    tier = open_host_tier(str(tmp_path / "here"), 0)
    assert tier is not None
    assert 0 < tier.budget_bytes <= 8 * 1024**3


def test_erasing_removes_also_what_is_mapped(tier: HostTier) -> None:
    view = publish(tier, content(1))
    assert tier.remove([name(content(1)), "ab" * 32]) == 1
    assert tier.digests() == []
    assert view is not None
    assert bytes(view[:1]) == b"\x01", "who maps it keeps it until they let go"
    assert tier.usage().used_bytes == 0


def test_a_count_that_is_too_high_after_a_crash_is_put_right(tier: HostTier) -> None:
    publish(tier, content(1))
    path = tier._root / "usage"
    handle = os.open(path, os.O_RDWR)
    fcntl.flock(handle, fcntl.LOCK_EX)
    os.pwrite(handle, f"{10**12:031d}\n".encode(), 0)
    os.close(handle)
    assert publish(tier, content(2)) is not None
    assert tier.usage().used_bytes == 2 * BIG


def test_replicas_that_map_a_file_hold_its_bytes_once(tmp_path: Path) -> None:
    size = 32 * 1024**2
    data = os.urandom(size)
    publish(HostTier(tmp_path / "tier", 2 * size), data)
    script = f"""
import sys
from pathlib import Path
from flatshare.weights.host_tier import HostTier
view = HostTier(Path({str(tmp_path / "tier")!r}), {2 * size}).open({name(data)!r}, {size})
assert sum(view[::4096]) > 0
print("ready", flush=True)
sys.stdin.readline()
pss = rss = 0
for line in open("/proc/self/smaps"):
    field, _, value = line.partition(":")
    if line[:1] in "0123456789abcdef" and "-" in field.split()[0]:
        ours = {name(data)!r} in line
    elif ours and field in ("Pss", "Rss"):
        kb = int(value.split()[0])
        pss, rss = (pss + kb, rss) if field == "Pss" else (pss, rss + kb)
print(pss * 1024, rss * 1024, flush=True)
sys.stdin.readline()
"""
    replicas = [
        subprocess.Popen(
            [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    for replica in replicas:
        assert replica.stdout is not None
        assert replica.stdout.readline() == "ready\n"
    measured = []
    for replica in replicas:
        assert replica.stdin is not None
        assert replica.stdout is not None
        replica.stdin.write("measure\n")
        replica.stdin.flush()
        measured.append([int(value) for value in replica.stdout.readline().split()])
    for replica in replicas:
        replica.communicate("end\n")
    assert all(rss == size for _, rss in measured), "each has all of it mapped"
    assert sum(pss for pss, _ in measured) == pytest.approx(size, rel=0.02), "together they hold it once"


def test_scrubbing_overwrites_what_nobody_maps_and_leaves_the_rest(tmp_path: Path) -> None:
    tier = HostTier(tmp_path / "tier", 10**8)
    big, shared, small = (os.urandom(size) for size in (200_000, 100_000, 5_000))
    views = {name(data): publish(tier, data) for data in (big, shared, small)}
    inodes = os.open(tier.path(name(big)), os.O_RDONLY)  # what was on the disk, whatever it is named
    kept = views[name(shared)]
    views.clear()
    gc.collect()
    done = tier.scrub([name(big), name(shared), name(small), "f" * 64])
    assert (set(done.removed), done.kept) == ({name(big), name(small)}, (name(shared),))
    assert done.overwritten_bytes == len(big) + len(small)
    assert os.pread(inodes, 10**6, 0) == bytes(len(big))
    os.close(inodes)
    assert bytes(kept) == shared
    assert tier.digests() == [name(shared)]
    assert tier.usage().used_bytes == 102_400, "whole pages of what is left"
    del kept
    gc.collect()
    assert tier.scrub([name(shared)]).removed == (name(shared),)


DIES_WHILE_IT_OVERWRITES = """
import os, sys
from pathlib import Path
from flatshare.weights import host_tier
def die(handle):
    os.ftruncate(os.open(f"/proc/self/fd/{handle}", os.O_WRONLY), 10)
    os.kill(os.getpid(), 9)
host_tier.overwrite = lambda handle: (os.fchmod(handle, 0o600), die(handle))
host_tier.HostTier(Path(sys.argv[1]), 10**7).scrub([sys.argv[2]])
"""


def test_who_dies_while_it_scrubs_leaves_no_damaged_tensor(tmp_path: Path) -> None:
    folder = tmp_path / "tier"
    tier = HostTier(folder, 10 * BIG)
    data = content(3)
    view = publish(tier, data)
    del view
    gc.collect()
    died = subprocess.run(
        [sys.executable, "-c", DIES_WHILE_IT_OVERWRITES, str(folder), name(data)], check=False
    )
    assert died.returncode == -9
    assert tier.open(name(data), BIG) is None and not tier.path(name(data)).exists()
    assert len(list(folder.rglob("tmp/*"))) == 1
    assert tier.scrub([name(data)]).kept == (), "the rerun finishes what is left"
    assert list(folder.rglob("tmp/*")) == [] and tier.usage().used_bytes == 0


def test_an_orphan_is_overwritten_unless_it_was_published(tmp_path: Path) -> None:
    folder = tmp_path / "tier"
    tier = HostTier(folder, 10 * BIG)
    tmp = next(folder.glob("*/tmp"))
    orphan = tmp / f"{BIG}-1-ab"
    orphan.write_bytes(content(5))
    second_name = tmp_path / "kept-open"
    os.link(orphan, second_name)
    half_published = tmp / f"{BIG}-1-cd"
    half_published.write_bytes(content(6))
    target = tier.path(name(content(6)))
    target.parent.mkdir(exist_ok=True)
    os.link(half_published, target)
    handle = os.open(orphan, os.O_RDONLY)
    second_name.unlink()
    tier.scrub([])
    assert os.pread(handle, BIG, 0) == bytes(BIG)
    os.close(handle)
    assert target.read_bytes() == content(6)
    assert list(tmp.iterdir()) == []


def test_a_process_without_handles_goes_on_with_its_own_copy(
    tier: HostTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_handles(handle: int) -> memoryview:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("flatshare.weights.tier_writer.view_of", no_handles)
    data = content(8)
    view = publish(tier, data)
    assert view is not None and bytes(view) == data
    assert tier.usage().bypassed == 1
    assert tier.open(name(data), BIG) is not None, "it is there for others"


def test_replicas_of_one_node_that_scrub_at_once_do_not_get_in_each_others_way(tmp_path: Path) -> None:
    first = HostTier(tmp_path / "tier", 10**8)
    second = HostTier(tmp_path / "tier", 10**8)
    datas = [content(number, 5_000) for number in range(200)]
    for data in datas:
        publish(first, data)
    names = [name(data) for data in datas]
    with ThreadPoolExecutor(4) as threads:
        done = list(threads.map(lambda tier: tier.scrub(names), [first, second, first, second]))
    assert sorted(digest for one in done for digest in one.removed) == sorted(names), "each once, by somebody"
    assert (first.digests(), first.usage().used_bytes) == ([], 0)


def test_a_file_that_took_the_place_of_the_one_to_scrub_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening it and locking it, the old file goes and another tenant publishes the same bytes."""
    tier = HostTier(tmp_path / "tier", 10**8)
    data = os.urandom(100_000)
    publish(tier, data)
    gc.collect()
    published: list[memoryview | None] = []
    real = fcntl.flock

    def flock(handle: int, how: int) -> None:
        if how == fcntl.LOCK_EX | fcntl.LOCK_NB and not published:
            published.append(None)
            tier.remove([name(data)])
            published[0] = publish(tier, data)
        real(handle, how)

    monkeypatch.setattr(module.fcntl, "flock", flock)
    assert tier.scrub([name(data)]).removed == ()
    assert published[0] is not None
    assert bytes(published[0]) == data


@contextlib.contextmanager
def between_open_and_lock(
    monkeypatch: pytest.MonkeyPatch, how: int, act: Callable[[], object]
) -> Iterator[None]:
    """Do something once, after a file was opened and before it is locked so."""
    real, left = fcntl.flock, [act]

    def flock(handle: int, wanted: int) -> None:
        if wanted == how and left:
            left.pop()()
        real(handle, wanted)

    with monkeypatch.context() as patched:
        patched.setattr(fcntl, "flock", flock)
        yield
    assert not left, "nobody came by there"


@pytest.mark.parametrize("size", [3000, BIG])
def test_a_file_whose_scrubber_was_killed_is_not_opened_as_zeros(
    tier: HostTier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    data = content(7, size)
    publish(tier, data)
    gc.collect()
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom flatshare.weights import host_tier as module\n"
        "real = module.overwrite\n"
        "module.overwrite = lambda handle: (real(handle), os.kill(os.getpid(), 9))\n"
        "module.HostTier(Path(sys.argv[1]), 10**7).scrub([sys.argv[2]])\n"
    )

    def scrub_and_die() -> None:
        died = subprocess.run([sys.executable, "-c", script, str(tmp_path / "tier"), name(data)])
        assert died.returncode == -9

    with between_open_and_lock(monkeypatch, fcntl.LOCK_SH | fcntl.LOCK_NB, scrub_and_die):
        assert tier.open(name(data), size) is None
    assert publish(tier, data) == data, "the next one brings it again"


def test_an_eviction_takes_only_the_file_that_it_has_locked(
    tier: HostTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = content(7)
    publish(tier, data)
    gc.collect()
    mapped: list[memoryview | None] = []

    def another_comes() -> None:
        assert tier.scrub([name(data)]).removed
        mapped.append(publish(tier, data))

    path = str(tier.path(name(data)))
    with between_open_and_lock(monkeypatch, fcntl.LOCK_EX | fcntl.LOCK_NB, another_comes):
        assert unlink_unless_mapped(path) == 0
    assert tier.has(name(data)), "it is mapped, and counts"
    assert mapped == [data]


def test_who_counts_has_the_lock_of_the_file_that_is_there(
    tier: HostTier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = next((tmp_path / "tier").glob("*/usage"))
    with between_open_and_lock(monkeypatch, fcntl.LOCK_EX | fcntl.LOCK_NB, usage.unlink):
        publish(tier, content(7))
    assert tier.usage().used_bytes == -(-BIG // PAGE) * PAGE


@pytest.fixture
def stuck(tier: HostTier, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], None]]:
    """Holds the lock of a file as a process does that was stopped (SIGSTOP), and never lets go."""
    monkeypatch.setattr(module, "HELD_S", 0.2)
    handles: list[int] = []

    def hold(path: Path) -> None:
        handles.append(os.open(path, os.O_RDONLY))
        fcntl.flock(handles[-1], fcntl.LOCK_EX)

    yield hold
    for handle in handles:
        os.close(handle)


def test_a_process_that_is_stopped_with_the_count_stops_no_load(
    tier: HostTier, stuck: Callable[[Path], None]
) -> None:
    writer = tier.writer("a" * 64, 1000)
    assert writer is not None
    stuck(tier.path("x" * 64).parents[2] / "usage")
    began = time.monotonic()
    assert tier.writer("b" * 64, 1000) is None
    assert tier.bypassed == 1
    assert tier.usage().used_bytes == 0
    writer.abort()
    assert not list((tier.path("x" * 64).parents[2] / "tmp").iterdir())
    with pytest.raises(TimeoutError):
        tier.remove(["a" * 64])  # an erasure says that it is not done
    assert time.monotonic() - began < 3


def test_a_process_that_is_stopped_with_a_tensors_lock_stops_no_load(
    tier: HostTier, stuck: Callable[[Path], None]
) -> None:
    data = content(1, 1000)
    publish(tier, data)
    stuck(tier.path(name(data)))
    began = time.monotonic()
    assert tier.open(name(data), len(data)) is None
    assert time.monotonic() - began < 3
