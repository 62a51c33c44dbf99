"""The conformance suite on the local-folder backend, and the race again across processes."""

import fcntl
import multiprocessing
import os
from pathlib import Path

import pytest

from flatshare_registry.errors import Conflict, Unavailable
from flatshare_registry.stores.base import Create, Overwrite, UpdateIf
from flatshare_registry.stores.local import LocalStore
from flatshare_registry.testing.store_suite import BlobStoreSuite


def _increment(root: Path) -> None:
    store = LocalStore(root)
    done = 0
    while done < 10:
        blob = store.get("counter")
        try:
            store.put("counter", str(int(blob.data) + 1).encode(), UpdateIf(blob.meta.etag))
            done += 1
        except Conflict:
            pass


class TestLocalStore(BlobStoreSuite):
    @pytest.fixture
    def store(self, tmp_path: Path) -> LocalStore:
        return LocalStore(tmp_path / "store")

    def test_compare_and_swap_across_processes(self, tmp_path: Path) -> None:
        store = LocalStore(tmp_path / "store")
        store.put("counter", b"0", Create())
        spawn = multiprocessing.get_context("spawn")
        workers = [spawn.Process(target=_increment, args=(tmp_path / "store",)) for _ in range(5)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
        assert [worker.exitcode for worker in workers] == [0] * 5
        assert store.get("counter").data == b"50"

    def test_no_temporary_file_stays_behind(self, store: LocalStore, tmp_path: Path) -> None:
        meta = store.put("a/k", b"1", Create())
        with pytest.raises(Conflict):
            store.put("a/k", b"2", UpdateIf("stale"))
        store.put("a/k", b"2", UpdateIf(meta.etag))
        assert sorted(path.name for path in (tmp_path / "store" / "a").iterdir()) == ["k"]

    def test_the_lock_is_that_of_the_file_that_is_there(
        self, store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Somebody cleans the folder while a writer waits: two writers must not hold two locks."""
        lock, real, locked = tmp_path / "store" / ".flatshare-lock", fcntl.flock, []

        def flock(handle: int, how: int) -> None:
            if not locked:
                lock.unlink()
            real(handle, how)
            locked.append(os.fstat(handle).st_ino)

        store.put("k", b"1", Create())
        monkeypatch.setattr(fcntl, "flock", flock)
        store.put("k", b"2", Overwrite())
        assert locked[-1] == lock.stat().st_ino

    def test_a_folder_that_cannot_be_made_is_unavailable(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(Unavailable):
            LocalStore(tmp_path / "file")
