"""Takes one tensor's bytes as they arrive, checks them, and publishes them to the host tier or keeps them."""

from __future__ import annotations

from dataclasses import dataclass

from flatshare.threads import ThreadWork
from flatshare.weights.hasher import Hasher
from flatshare.weights.host_tier import HostTier
from flatshare.weights.tier_writer import TensorWriter
from flatshare_registry.errors import Corrupt, NotFound
from flatshare_registry.records import TensorRecord, VersionRecord

__all__ = ["TensorSink"]


@dataclass(slots=True)
class TensorSink:
    """One tensor on its way into the tier, or into memory where the tier has no room."""

    record: VersionRecord
    tensor: TensorRecord
    tier: HostTier | None
    hasher: Hasher
    work: ThreadWork
    written: int = 0
    writer: TensorWriter | None = None
    memory: bytearray | None = None
    only: memoryview | None = None

    def __post_init__(self) -> None:
        if self.tier is not None:
            self.writer = self.tier.writer(self.tensor.sha256, self.tensor.size_bytes)

    def write(self, data: memoryview, range_bytes: int) -> bool:
        """Take the next bytes, from a range of ``range_bytes``; returns whether the tensor is complete."""
        self.hasher.update(data)
        whole = not self.written and len(data) == self.tensor.size_bytes
        self.written += len(data)
        if self.writer is not None and not self.writer.write(data):
            partial, self.writer = self.writer, None
            before = self.written - len(data)
            self.memory = bytearray(partial.read_back()[:before])
            partial.abort()
        if self.writer is None:
            if whole and 2 * len(data) > range_bytes:
                self.only = data  # no copy: most of the range is this tensor, and may live as long as it
            else:
                self.memory = self.memory if self.memory is not None else bytearray()
                self.memory += data
        return self.written == self.tensor.size_bytes

    def finish(self) -> memoryview:
        """Check the digest, publish, and give the bytes back as the tier has them.

        Raises
        ------
        Corrupt
            The bytes are not the registered ones. Nothing was published.
        NotFound
            The tenant was erased meanwhile. Nothing was published.
        """
        if self.work.is_stopped(self.record.tenant):
            self.abort()
            raise NotFound(f"{self.record.name} was erased")
        if self.hasher.hexdigest() != self.tensor.sha256:
            self.abort()
            raise Corrupt(f"stored tensor {self.tensor.name} of {self.record.name} does not have its sha256")
        writer, self.writer = self.writer, None
        if writer is not None:
            return writer.publish()
        if self.only is not None:
            return self.only
        assert self.memory is not None, "without a writer the bytes are in memory"
        return memoryview(self.memory).toreadonly()

    def abort(self) -> None:
        """Forget it."""
        writer, self.writer = self.writer, None
        if writer is not None:
            writer.abort()
