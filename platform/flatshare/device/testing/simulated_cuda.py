"""CUDA in host memory: streams, events, a caching allocator, and a checker of the order between them.

Everything that is computed within :meth:`SimulatedCuda.on` is seen (``TorchDispatchMode``): what it reads and
writes, and on which stream. A stream knows by vector clock (Fidge 1988, Mattern 1989) what comes before its
next operation: its own earlier ones, what it was told to wait for, and what the host had waited for. There
are two violations, whatever the schedule would have been: an operation on memory whose last writer does not
come before it, and a write to memory, or to a pinned buffer, that an operation may still use. A violation
raises, and is kept.

Copies from and to host memory are done as late as the order allows. Until then a buffer on the host holds
NaNs, so that an early reader gets wrong answers too. Tensors on the device lie in segments as torch's
allocator lays them, so that released memory still holds what it held. This module is long because what an
operation may do depends on streams, memory and pinned buffers together.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flatshare.device.memory import DeviceMemory
from flatshare.device.testing.allocator import Block, CachingAllocator, Uses

__all__ = ["OrderViolation", "SimulatedCuda", "SimulatedStream"]

TF32_DROPPED_BITS: Final = 13
"""Of an FP32 number's 23 bits of mantissa, those that TF32 leaves out."""

_CONVOLUTIONS: Final = frozenset({"aten::conv2d", "aten::convolution", "aten::_convolution"})


class OrderViolation(AssertionError):
    """Two operations on the same memory have no order, and should have one."""


@dataclass(slots=True, eq=False)
class SimulatedStream:
    """A queue of operations.

    Attributes
    ----------
    launched
        How many it was given.
    seen
        By stream, the last operation that comes before the next one here.
    pending
        Copies that are not done yet: their number, what comes before them, and what they do.
    """

    number: int
    launched: int = 0
    seen: Uses = field(default_factory=dict)
    pending: list[tuple[int, Uses, Callable[[], None]]] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Pinned:
    """A pinned buffer, and the copies that use parts of it: first and last byte, stream and number."""

    copies: list[tuple[int, int, int, int]] = field(default_factory=list)

    def is_free(self, span: tuple[int, int], seen: Uses) -> bool:
        """Whether all copies of a part come before a point."""
        self.copies = [one for one in self.copies if one[3] > seen.get(one[2], 0)]
        return not any(start < span[1] and span[0] < end for start, end, _, _ in self.copies)


@dataclass(slots=True, eq=False)
class _Memory:
    """A tensor's memory on the device.

    Attributes
    ----------
    uses
        By stream, the last operation that read or wrote it, or what lay there before it.
    written
        Stream and number of the last operation that wrote it.
    """

    uses: Uses
    written: tuple[int, int] | None = None
    block: Block | None = None


class _Event:
    def __init__(self, runtime: SimulatedCuda, seen: Uses) -> None:
        self._runtime = runtime
        self._seen = seen

    def synchronize(self) -> None:
        self._runtime.host_waits(self._seen)


class SimulatedCuda:
    """See :class:`CudaRuntime`.

    Parameters
    ----------
    total_bytes
        Memory of the device.
    tf32
        Convolutions drop bits as Ampere's do, where torch's switch lets them.

    Attributes
    ----------
    violations
        All that were found, since the caller may have turned the raised error into another one.
    operations, copies
        How many were launched, and how many of them were copies from or to the host.
    pinned_bytes
        Of page-locked memory.
    """

    def __init__(
        self, total_bytes: int = 1 << 30, *, expandable_segments: bool = False, tf32: bool = False
    ) -> None:
        self.torch_device = torch.device("cpu")
        self.expandable_segments = expandable_segments
        self.most_bytes = 0
        self.allocator = CachingAllocator(total_bytes, expandable_segments=expandable_segments)
        self.violations: list[str] = []
        self.operations = 0
        self.copies = 0
        self.pinned_bytes = 0
        self.tf32 = tf32
        self._lock = threading.RLock()
        self._streams: list[SimulatedStream] = []
        self._memory: dict[int, _Memory] = {}  # by storage
        self._arenas: dict[int, mmap.mmap] = {}  # by segment
        self._pinned: dict[int, _Pinned] = {}  # by storage
        self._pinned_tensors: list[torch.Tensor] = []
        self._host: Uses = {}
        self._breaks_at: int | None = None
        self._error = ""
        self._going = threading.Event()
        self._going.set()
        self._thread = threading.local()
        self.main = self.stream()

    # -- what tests do to it

    def break_down(self, after: int = 0) -> None:
        """Make an operation fail as on CUDA: the error comes at the next call, and at each one after it."""
        self._breaks_at = self.operations + after + 1

    def hang(self) -> None:
        """Have nothing come back that waits for the device."""
        self._going.clear()

    def go_on(self) -> None:
        """End :meth:`hang`."""
        self._going.set()

    def contents(self) -> bytes:
        """All memory: of tensors, of what was let go of and not given back, and of pinned buffers."""
        with self._lock:
            self._flush({one.number: one.launched for one in self._streams})
            return b"".join([*(arena[:] for arena in self._arenas.values()), *(
                one.numpy().tobytes() for one in self._pinned_tensors
            )])  # fmt: skip

    # -- CudaRuntime

    def stream(self) -> SimulatedStream:
        """See :class:`CudaRuntime`."""
        made = SimulatedStream(len(self._streams))
        self._streams.append(made)
        return made

    @contextlib.contextmanager
    def on(self, stream: SimulatedStream) -> Iterator[None]:
        """See :class:`CudaRuntime`."""
        self._check()
        outer = getattr(self._thread, "stream", None)
        self._thread.stream = stream
        try:
            with _Recorder(self):
                yield
        finally:
            self._thread.stream = outer

    def wait(self, stream: SimulatedStream, for_: SimulatedStream) -> None:
        """See :class:`CudaRuntime`."""
        with self._lock:
            _join(stream.seen, self._point(for_))

    def event(self, stream: SimulatedStream) -> _Event:
        """See :class:`CudaRuntime`."""
        with self._lock:
            return _Event(self, self._point(stream))

    def pinned(self, size: int) -> torch.Tensor:
        """See :class:`CudaRuntime`."""
        made = torch.zeros(size, dtype=torch.uint8)
        self._pinned[made.untyped_storage()._cdata] = _Pinned()
        self._pinned_tensors.append(made)
        self.pinned_bytes += size
        return made

    def empty_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """See :class:`CudaRuntime`."""
        with self._lock, _unseen():
            block = self.allocator.allocate(tensor.nbytes, self._stream().number)
            if not tensor.nbytes:
                made = torch.empty_like(tensor)
            else:
                flat = torch.frombuffer(
                    self._arena(block), dtype=tensor.dtype, count=tensor.numel(), offset=block.start
                )
                made = flat.as_strided(tensor.shape, torch.empty_like(tensor, device="meta").stride())
            self._know(made, _Memory(dict(block.uses), block=block))
            return made

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        """See :class:`CudaRuntime`: from a pinned buffer to the device, or back."""
        with self._lock, _unseen():
            host, device = (source, to) if _storage(source) in self._pinned else (to, source)
            buffer, memory = self._pinned[_storage(host)], self._memory[_storage(device)]
            self.copies += 1
            stream = self._launch(*(([], [memory]) if host is source else ([memory], [])))
            span = _span(host)
            copy: Callable[[], None]
            if host is to:
                if not buffer.is_free(span, {**stream.seen, stream.number: stream.launched - 1}):
                    self._violated("a pinned buffer is written while another copy uses it")
                found, target = _host_bytes(source).copy(), _host_bytes(to)
                target[:] = 0xFF  # NaN, as floats
                copy = partial(np.copyto, target, found)
            else:
                assert memory.block is not None, "a tensor of the device"
                # Not ``to`` itself: what was let go of stays let go of.
                start = memory.block.start + _span(to)[0]
                target = np.frombuffer(self._arena(memory.block), np.uint8, to.nbytes, start)
                found = _host_bytes(source)
                copy = partial(self._send, target, found, zlib.crc32(found.tobytes()))
            buffer.copies.append((*span, stream.number, stream.launched))
            stream.pending.append((stream.launched, dict(stream.seen), copy))

    def zero(self, tensor: torch.Tensor) -> None:
        """See :class:`CudaRuntime`."""
        tensor.zero_()

    def describe(self) -> str:
        """See :class:`CudaRuntime`."""
        return "a simulated CUDA device"

    def memory(self) -> DeviceMemory:
        """See :class:`CudaRuntime`."""
        self._check()
        taken = self.allocator
        free = taken.total_bytes - taken.reserved - taken.others_bytes
        return DeviceMemory(taken.allocated, taken.reserved, free, taken.total_bytes)

    # -- order

    def host_waits(self, seen: Uses) -> None:
        """The host goes on when some operations are done."""
        self._going.wait()
        self._check()
        with self._lock:
            self._flush(seen)
            _join(self._host, seen)

    def before(self, tensors: Iterable[torch.Tensor], written: Iterable[torch.Tensor]) -> bool:
        """Something is computed with tensors; whether on the device."""
        with self._lock:
            reads, writes = list(tensors), list(written)
            if not any(
                _storage(one) in self._memory for one in (*reads, *writes)
            ):  # the host does it, and now
                for one in writes:
                    buffer = self._pinned.get(_storage(one))
                    if self._error:
                        continue  # a context that is lost copies nothing any more
                    if buffer is not None and not buffer.is_free(_span(one), self._host):
                        self._violated("a pinned buffer is written while a copy may still use it")
                return False
            if any(_storage(one) not in self._memory and one.dim() for one in (*reads, *writes)):
                raise RuntimeError("Expected all tensors to be on the same device (simulated)")
            self._launch(
                *([self._memory[_storage(one)] for one in some if one.dim()] for some in (reads, writes))
            )
            return True

    def made(self, tensor: torch.Tensor) -> None:
        """The operation that was just launched has made a tensor."""
        with self._lock:
            if _storage(tensor) in self._memory:
                return
            stream = self._stream()
            block = self.allocator.allocate(tensor.untyped_storage().nbytes(), stream.number)
            memory = _Memory(dict(block.uses), block=block)
            if not _within(memory.uses, stream.seen):
                self._violated("memory is written while another stream may still use it")
            memory.uses[stream.number] = stream.launched
            memory.written = (stream.number, stream.launched)
            self._know(tensor, memory)

    def _launch(self, reads: list[_Memory], writes: list[_Memory]) -> SimulatedStream:
        stream = self._stream()
        self.operations += 1
        if self.operations == self._breaks_at:
            self._error = "CUDA error: device-side assert triggered (simulated)"
        _join(stream.seen, self._host)
        for memory in reads:
            if any(memory is one for one in writes):
                continue
            if memory.written is None:
                self._violated("memory is read that nothing has been written to")
            elif stream.seen.get(memory.written[0], 0) < memory.written[1]:
                self._violated("memory is read before what writes it is done")
        for memory in writes:
            if not _within(memory.uses, stream.seen):
                self._violated("memory is written while another stream may still use it")
        stream.launched += 1
        self._flush(stream.seen)
        stream.seen[stream.number] = stream.launched
        for memory in (*reads, *writes):
            memory.uses[stream.number] = stream.launched
        for memory in writes:
            memory.written = (stream.number, stream.launched)
        return stream

    def _point(self, stream: SimulatedStream) -> Uses:
        return {**stream.seen, stream.number: stream.launched}

    def _flush(self, seen: Uses) -> None:
        """Do all copies that come before a point."""
        for stream in self._streams:
            while stream.pending and stream.pending[0][0] <= seen.get(stream.number, 0):
                _, before, copy = stream.pending.pop(0)
                self._flush({**before, stream.number: 0})
                copy()

    def _send(self, target: NDArray[np.uint8], source: NDArray[np.uint8], checksum: int) -> None:
        if zlib.crc32(source.tobytes()) != checksum:
            self._violated("a pinned buffer was written before the copy from it was done")
        np.copyto(target, source)

    def _violated(self, text: str) -> None:
        self.violations.append(text)
        raise OrderViolation(text)

    def _check(self) -> None:
        if self._error:
            raise torch.AcceleratorError(self._error)

    # -- memory

    def _stream(self) -> SimulatedStream:
        return getattr(self._thread, "stream", None) or self.main

    def _arena(self, block: Block) -> mmap.mmap:
        while self.allocator.given_back:
            self._arenas.pop(self.allocator.given_back.pop(), None)
        if block.segment not in self._arenas:
            self._arenas[block.segment] = mmap.mmap(-1, self.allocator.segment_bytes(block))
        return self._arenas[block.segment]

    def _know(self, tensor: torch.Tensor, memory: _Memory) -> None:
        storage = tensor.untyped_storage()
        self._memory[storage._cdata] = memory
        weakref.finalize(storage, self._gone, storage._cdata).atexit = False

    def _gone(self, storage: int) -> None:
        with self._lock:
            memory = self._memory.pop(storage)
            assert memory.block is not None, "all that is known has a block"
            _join(memory.block.uses, memory.uses)
            self.allocator.free(memory.block)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch gives it no types
    """Tells the runtime of every operation, before it is done."""

    def __init__(self, runtime: SimulatedCuda) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch gives it no types
        self._runtime = runtime

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func._schema.name == "aten::set_":
            return func(*args, **kwargs)
        if func.is_view:
            result = func(*args, **kwargs)
            given = {_storage(one) for one in _tensors((args, kwargs))}
            if all(_storage(one) in given for one in _tensors(result)):
                return result  # nothing was computed; else (flatten, reshape) it had to copy
        named = dict(zip((one.name for one in func._schema.arguments), args, strict=False)) | kwargs
        written = {
            one.name
            for one in func._schema.arguments
            if one.alias_info is not None and one.alias_info.is_write
        }
        on_device = self._runtime.before(
            [one for name, value in named.items() if name not in written for one in _tensors(value)],
            [one for name in written if name in named for one in _tensors(named[name])],
        )
        if self._runtime.tf32 and torch.backends.cudnn.allow_tf32 and func._schema.name in _CONVOLUTIONS:
            args = (_truncated(args[0]), _truncated(args[1]), *args[2:])
        result = func(*args, **kwargs)
        if on_device:
            for one in _tensors(result):
                self._runtime.made(one)
        return result


def _tensors(value: object) -> list[torch.Tensor]:
    return [one for one in tree_leaves(value) if isinstance(one, torch.Tensor)]


def _unseen() -> contextlib.AbstractContextManager[None]:
    """Within this, what is computed is the simulation's own."""
    return torch.utils._python_dispatch._disable_current_modes()


def _truncated(tensor: torch.Tensor) -> torch.Tensor:
    with _unseen():
        mask = -1 << TF32_DROPPED_BITS
        return (tensor.view(torch.int32) & mask).view(torch.float32)


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _host_bytes(tensor: torch.Tensor) -> NDArray[np.uint8]:
    found: NDArray[np.uint8] = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return found


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """First and last byte of a tensor within its storage."""
    start = int(tensor.storage_offset()) * tensor.element_size()
    return start, start + tensor.nbytes


def _join(into: Uses, other: Uses) -> None:
    for stream, number in other.items():
        into[stream] = max(into.get(stream, 0), number)


def _within(uses: Uses, seen: Uses) -> bool:
    return all(number <= seen.get(stream, 0) for stream, number in uses.items())
