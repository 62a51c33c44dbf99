"""From a version's record to the bytes of its tensors: the host tier, other nodes' tiers, then the store.

Only what is missing is asked for: neighbouring tensors in one ranged GET, long runs in several that
go side by side. Each tensor's sha256 is worked out as its bytes arrive (``hasher.py``) and checked before
anybody sees them (promise 12: every byte that is used was checked; the header of the file is not used).
"""

from __future__ import annotations

import hashlib
import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Final

from flatshare.threads import ThreadWork
from flatshare.weights.hasher import Hasher
from flatshare.weights.host_tier import HostTier
from flatshare.weights.peers import Peer, PeerFailed, PeerTiers
from flatshare.weights.tensor_sink import TensorSink
from flatshare.weights.tiers import Tier
from flatshare_registry import layout
from flatshare_registry.errors import Corrupt, InvalidInput, NotFound, Unavailable
from flatshare_registry.records import TensorRecord, VersionRecord
from flatshare_registry.stores.base import BlobStore, ByteRange

__all__ = ["Fetched", "TensorSource"]

logger = logging.getLogger("flatshare.weights")

RANGE_BYTES: Final = 8 * 1024**2
"""Longest ranged GET, in bytes."""

RANGES_AHEAD: Final = 4
"""Ranges of one load that are under way or wait to be hashed: what it holds in memory is this many."""

GAP_BYTES: Final = 64 * 1024
"""Missing tensors with at most this much between them share a GET: a request costs more than the gap."""

LOCK_FROM_BYTES: Final = 64 * 1024
"""Smaller tensors are not locked but come along with larger ones: a lock costs as much as a second fetch."""

MAX_LOCKS: Final = 64
"""Most locks that one load holds; each is an open file."""

RANGE_TRIES: Final = 2
"""Tries of a range whose answer is cut short; boto3 itself retries requests that are refused."""

RETRY_S: Final = 0.2
"""Longest wait before such a try; the wait is drawn evenly from 0 to this, so that replicas spread."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """Bytes of tensors, by digest, each checked; and the slowest tier that any came from."""

    data: Mapping[str, memoryview]
    tier: Tier


class TensorSource:
    """Gets tensors' bytes; thread-safe, and each call blocks its thread.

    Parameters
    ----------
    store
        Any blob store; its own time-outs and retries hold.
    tier
        The node's host tier, or None to do without.
    range_threads
        Where ranged GETs of one load run side by side; its size bounds them over all loads. None:
        one after the other.
    keeps
        Whether a version's fetched tensors are written to the tier: not those that this node uses only once.
        What others wrote is read in any case.
    peers
        Other nodes' tiers, asked before the store; None to do without.

    Attributes
    ----------
    work
        What threads do here, by tenant.
    """

    def __init__(
        self,
        store: BlobStore,
        tier: HostTier | None = None,
        range_threads: Executor | None = None,
        *,
        keeps: Callable[[VersionRecord], bool] = lambda record: True,
        peers: PeerTiers | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.tier = tier
        self.keeps = keeps
        self.fetched_bytes = 0
        self.work = ThreadWork()
        self._peers = peers
        self._store = store
        self._range_threads = range_threads
        self._clock = clock
        self._counting = threading.Lock()

    def is_local(self, record: VersionRecord, names: Collection[str]) -> bool:
        """Whether :meth:`read_local` is worth a thread: the host tier has the largest of these tensors.

        It checks one name only, cheaply enough for an event loop; :meth:`read_local` gives the exact answer.
        """
        wanted = _wanted(record, names).values()
        largest = max(wanted, key=lambda one: one.size_bytes, default=None)
        return self.tier is not None and (largest is None or self.tier.has(largest.sha256))

    def read_local(self, record: VersionRecord, names: Collection[str]) -> Fetched | None:
        """As :meth:`read`, but only if the host tier has all of them; never asks the store."""
        if self.tier is None:
            return None
        found: dict[str, memoryview] = {}
        missing = self._look(self.tier, _wanted(record, names), found)
        return None if missing else Fetched(found, Tier.HOST)

    def read(self, record: VersionRecord, names: Collection[str], timeout_s: float) -> Fetched:
        """Bytes of some of a version's tensors.

        Raises
        ------
        Corrupt
            They are not what the record says, or are gone.
        Unavailable
            The store did not answer, or not within ``timeout_s`` seconds.
        """
        deadline = self._clock() + timeout_s
        wanted = _wanted(record, names)
        found: dict[str, memoryview] = {}
        if self.tier is None:
            return Fetched(found, self._obtain(record, wanted, found, None, deadline))
        missing = self._look(self.tier, wanted, found)
        if not missing:
            return Fetched(found, Tier.HOST)
        if not self.keeps(record):
            return Fetched(found, self._obtain(record, missing, found, None, deadline))
        with ExitStack() as locks:
            for digest in _to_lock(missing.values()):
                patience_s = max(deadline - self._clock(), 0) / 2
                if not locks.enter_context(self.tier.fetching(digest, patience_s)):
                    logger.warning("%s: somebody else's fetch takes too long; fetching here", record.name)
                    break
            missing = self._look(self.tier, missing, found)  # others may have fetched it while we waited
            if not missing:
                return Fetched(found, Tier.HOST)
            return Fetched(found, self._obtain(record, missing, found, self.tier, deadline))

    def recheck(self, record: VersionRecord) -> list[str]:
        """Hash the host tier's files of a version again and remove the wrong ones; returns their digests.

        For a model that answers wrongly although its bytes were right when they were published: memory and
        disks go bad, and other replicas must not find what this one has found.
        """
        wrong: list[str] = []
        if self.tier is not None:
            for digest, tensor in _wanted(record, {one.name for one in record.tensors}).items():
                data = self.tier.open(digest, tensor.size_bytes)
                if data is not None and hashlib.sha256(data).hexdigest() != digest:
                    wrong.append(digest)
            self.tier.remove(wrong)
        if wrong:
            logger.error("%s: %d damaged files were removed from the host tier", record.name, len(wrong))
        return wrong

    def _look(
        self, tier: HostTier, wanted: Mapping[str, TensorRecord], found: dict[str, memoryview]
    ) -> dict[str, TensorRecord]:
        """Take from the tier what it has; returns what it has not."""
        missing: dict[str, TensorRecord] = {}
        for digest, tensor in wanted.items():
            data = tier.open(digest, tensor.size_bytes)
            if data is None:
                missing[digest] = tensor
            else:
                found[digest] = data
        return missing

    def _obtain(
        self,
        record: VersionRecord,
        missing: Mapping[str, TensorRecord],
        found: dict[str, memoryview],
        tier: HostTier | None,
        deadline: float,
    ) -> Tier:
        """Get what this node has not, from other nodes or the store; returns the slowest of these."""
        left = dict(missing)
        for peer in self._peers.to_ask(record.tenant) if self._peers is not None else ():
            # Half of the time that is left: the store must still be able to answer.
            until = self._clock() + max(deadline - self._clock(), 0) / 2
            received = self._receive(peer, record, list(left.values()), tier, until)
            found |= received
            left = {digest: tensor for digest, tensor in left.items() if digest not in received}
            if not left:
                return Tier.PEER
        found |= self._download(record, left.values(), tier, deadline)
        return Tier.STORE

    def _receive(
        self,
        peer: Peer,
        record: VersionRecord,
        tensors: Sequence[TensorRecord],
        tier: HostTier | None,
        deadline: float,
    ) -> dict[str, memoryview]:
        """Those of the tensors that a peer has, each checked and published as one from the store is.

        Raises
        ------
        NotFound
            The tenant was erased meanwhile.
        """
        assert self._peers is not None, "it has a peer"
        done: dict[str, memoryview] = {}
        sink: TensorSink | None = None
        with Hasher() as hasher:
            try:
                for tensor, piece in self._peers.read(peer, record, tensors, deadline):
                    sink = sink or TensorSink(record, tensor, tier, hasher, self.work)
                    if sink.write(piece, len(piece)):
                        done[tensor.sha256] = sink.finish()
                        sink = None
            except (PeerFailed, Corrupt) as error:  # what is whole is right: it was checked
                self._peers.avoid(peer, error)
            finally:
                if sink is not None:
                    sink.abort()
        return done

    def _download(
        self, record: VersionRecord, tensors: Collection[TensorRecord], tier: HostTier | None, deadline: float
    ) -> dict[str, memoryview]:
        """Fetch tensors from the store, publishing each to the tier as soon as it is complete."""
        by_start = sorted(tensors, key=lambda one: one.start)
        pending = list(reversed(by_start))
        done: dict[str, memoryview] = {}
        sink: TensorSink | None = None
        with Hasher() as hasher:
            try:
                for start, data in self._read_ranges(record, _ranges(by_start), deadline):
                    view = memoryview(data)
                    while pending and pending[-1].start < start + len(view):
                        tensor = pending[-1]
                        sink = sink or TensorSink(record, tensor, tier, hasher, self.work)
                        piece = view[tensor.start + sink.written - start : tensor.end - start]
                        if sink.write(piece, len(view)):
                            done[tensor.sha256] = sink.finish()
                            sink = None
                            pending.pop()
                        else:
                            break  # the rest of it is in the next range
            except BaseException:
                if sink is not None:
                    sink.abort()
                raise
        assert not pending, "the ranges cover every tensor that was asked for"
        return done

    def _read_ranges(
        self, record: VersionRecord, ranges: Sequence[ByteRange], deadline: float
    ) -> Iterator[tuple[int, bytes]]:
        """The bytes in order. What comes next is on its way while one piece is being hashed and written."""
        if self._range_threads is None or len(ranges) == 1:
            for wanted in ranges:
                yield from self._stream_range(record, wanted, deadline)
            return
        ahead: deque[tuple[int, Future[bytes]]] = deque()
        todo = iter(ranges)
        try:
            while True:
                for wanted in islice(todo, RANGES_AHEAD - len(ahead)):
                    read = partial(self._read_range, record, wanted, deadline)
                    ahead.append((wanted.start, self.work.submit(self._range_threads, record.tenant, read)))
                if not ahead:
                    return
                start, future = ahead.popleft()
                try:
                    data = future.result(max(deadline - self._clock(), 0))
                except TimeoutError:
                    raise _late(record) from None
                del future  # it would keep the bytes
                yield start, data
        finally:
            for _, future in ahead:
                future.cancel()

    def _read_range(self, record: VersionRecord, wanted: ByteRange, deadline: float) -> bytes:
        return b"".join(piece for _, piece in self._stream_range(record, wanted, deadline))

    def _stream_range(
        self, record: VersionRecord, wanted: ByteRange, deadline: float
    ) -> Iterator[tuple[int, bytes]]:
        """One GET's bytes as they arrive. An answer that is cut short goes on where it stopped."""
        key, at, tries = layout.blob_key(record.digest), wanted.start, RANGE_TRIES
        while at < wanted.end:
            rest = ByteRange(at, wanted.end)
            whole = rest.end - rest.start == record.size_bytes
            try:
                for piece in self._store.chunks(key, None if whole else rest):
                    if self._clock() >= deadline:
                        raise _late(record)
                    with self._counting:
                        self.fetched_bytes += len(piece)
                    if at + len(piece) > wanted.end:
                        break
                    yield at, piece
                    at += len(piece)
                if at != wanted.end:
                    raise Corrupt(f"the stored weights of {record.name} do not have the registered length")
            except NotFound as error:
                raise Corrupt(f"the weights of {record.name} are gone from the store") from error
            except InvalidInput as error:
                raise Corrupt(f"the stored weights of {record.name} are shorter than registered") from error
            except Unavailable:
                tries -= 1
                if not tries or self._clock() >= deadline:
                    raise
                # A store has no event to await. The wait is random: loads that failed together spread out.
                time.sleep(random.uniform(0, RETRY_S))  # noqa: S311  # no secret


def _wanted(record: VersionRecord, names: Collection[str]) -> dict[str, TensorRecord]:
    """Tensors to get, by digest: equal ones of a version are one."""
    return {one.sha256: one for one in record.tensors if one.name in names and one.size_bytes}


def _to_lock(missing: Collection[TensorRecord]) -> list[str]:
    """Digests to lock so that nobody else fetches: those worth a lock, in one order to prevent deadlock."""
    largest = sorted(missing, key=lambda one: (-one.size_bytes, one.sha256))[:MAX_LOCKS]
    return sorted(one.sha256 for one in largest if one.size_bytes >= LOCK_FROM_BYTES or one is largest[0])


def _ranges(tensors: Sequence[TensorRecord]) -> list[ByteRange]:
    """GETs that cover these tensors, which are in order of their bytes."""
    runs: list[tuple[int, int]] = []
    for tensor in tensors:
        if runs and tensor.start - runs[-1][1] <= GAP_BYTES:
            runs[-1] = (runs[-1][0], max(tensor.end, runs[-1][1]))
        else:
            runs.append((tensor.start, tensor.end))
    return [
        ByteRange(start, min(start + RANGE_BYTES, end))
        for first, end in runs
        for start in range(first, end, RANGE_BYTES)
    ]


def _late(record: VersionRecord) -> Unavailable:
    return Unavailable(f"the store did not deliver {record.name} in time")
