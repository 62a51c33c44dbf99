"""One CUDA device: what is copied, computed and overwritten on which stream, and what waits for what.

Two streams. Passes and overwriting run on the main one, copies of weights on another, so that a load does not
stop passes. Three rules keep them right, and ``testing/simulated_cuda.py`` raises where one is broken:

- Weights are used only after :meth:`CudaDevice.place` has returned: it waits for its copies.
- Memory that a model left is written again only after every pass and every overwriting launched before: a
  load allocates first, and then makes the copies' stream wait for the main one. This avoids
  ``record_stream``, with which a load could not use the memory that it has just evicted.
- A pinned buffer is written again only when the copy from it is done: one event per chunk, one per pass.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from flatshare.device.faults import fault_of, first_line
from flatshare.device.memory import DeviceMemory
from flatshare.device.protocol import Fault, K, Work
from flatshare.device.runtime import CudaRuntime, Event
from flatshare.errors import DeviceBroken, SettingsError, Wedged
from flatshare.threads import in_thread

__all__ = ["CHUNK_BYTES", "CudaDevice"]

MIB: Final = 1024**2
SMALL_BYTES: Final = MIB
LARGE_BYTES: Final = 10 * MIB
SMALL_SEGMENT_BYTES: Final = 2 * MIB
SEGMENT_BYTES: Final = 20 * MIB
BLOCK_BYTES: Final = 512
ROUND_BYTES: Final = 2 * MIB
"""How torch's caching allocator cuts memory (c10/core/AllocatorConfig.h: kSmallSize, kMinLargeAlloc,
kSmallBuffer, kLargeBuffer, kMinBlockSize, kRoundLarge)."""

CHUNK_BYTES: Final = 8 * MIB
"""Pinned memory that is filled while the device reads the chunk before: two chunks are a slab."""

SLABS: Final = 2
"""Loads that copy at a time; one more waits for a moment, since they share the bus."""

LEAST_BUFFER_BYTES: Final = MIB
ALIGN_BYTES: Final = 256
"""Where each model's rows begin in a pass's input."""

FULL_ROWS: Final = 64
"""Up to here row counts are padded to the next power of two, and beyond it to the next multiple."""

UNCLEAR: Final = ("unable to find an engine", "CUDNN_STATUS_INTERNAL_ERROR")
"""What cuDNN says if no plan worked, whether for want of memory or not."""
SCARCE_BYTES: Final = 256 * MIB
"""If a process could get less memory than this, then it was for want of memory."""

TOLERANCE: Final = 1e-4
"""For the first computation, relative to its largest number; one wrong kernel is off by its own size."""


class CudaDevice:
    """See :class:`Device`.

    Parameters
    ----------
    runtime
        CUDA, or a simulation of it.
    chunk_bytes
        Of pinned memory, at a time.

    Raises
    ------
    SettingsError
        The device is there and does not compute.
    """

    name = "cuda"
    computes_in_host_memory = False
    overwrites_what_leaves = True
    overlaps = True

    def __init__(
        self,
        runtime: CudaRuntime,
        *,
        chunk_bytes: int = CHUNK_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.runtime = runtime
        self.torch_device = runtime.torch_device
        self._clock = clock
        self._broken = ""
        self._since: dict[int, float] = {}  # waits for the device that go on, and when each began
        self._numbers = itertools.count()
        try:
            self._copies = runtime.stream()
            self._slabs: queue.SimpleQueue[_Slab] = queue.SimpleQueue()
            for _ in range(SLABS):
                self._slabs.put(_Slab(runtime, chunk_bytes, self._wait))
            self._buffers = [_PassBuffers(runtime), _PassBuffers(runtime)]  # those that no pass has
            self._compute_once()
        except SettingsError:
            raise
        except RuntimeError as error:
            if fault_of(error) == "memory":
                raise SettingsError(f"{runtime.describe()}: it has no memory left for a replica") from error
            raise SettingsError(
                f"{runtime.describe()}: it does not compute ({first_line(error)}). Look at the driver "
                "(nvidia-smi) and at what torch is built for"
            ) from error

    # -- memory

    def footprint(self, size_bytes: int) -> int:
        """See :class:`Device`: what the allocator takes, unless its segments grow.

        Tensors of up to 1 MiB share segments of 2 MiB, tensors of up to 10 MiB share segments of 20 MiB, as
        many as fit; the rest of a segment counts as lost. A larger tensor has its own segment.
        """
        size = -(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES
        if self.runtime.expandable_segments or not size:
            return size
        if size <= SMALL_BYTES:
            return SMALL_SEGMENT_BYTES // (SMALL_SEGMENT_BYTES // size)
        if size < LARGE_BYTES:
            return SEGMENT_BYTES // (SEGMENT_BYTES // size)
        return -(-size // ROUND_BYTES) * ROUND_BYTES

    def place(self, tensors: Mapping[K, torch.Tensor]) -> Mapping[K, torch.Tensor]:
        """See :class:`Device`. Pinned memory is overwritten before this returns."""
        with self._judged(), self.runtime.on(self._copies):
            # Allocate all of it first, so that a load that finds no memory has copied nothing.
            placed = {key: self.runtime.empty_like(tensor) for key, tensor in tensors.items()}
            # The last owner of this memory let go of it before now, so all that still uses it was launched
            # before now.
            self.runtime.wait(self._copies, self.runtime.main)
            slab = self._slabs.get()
            try:
                slab.send(
                    self._copies, ((_bytes_of(tensors[key]), _bytes_of(to)) for key, to in placed.items())
                )
                self._wait(self.runtime.event(self._copies))
            finally:
                slab.overwrite()
                self._slabs.put(slab)
        return placed

    def scrub(self, tensors: Iterable[torch.Tensor]) -> int:
        """See :class:`Device`."""
        size = 0
        with self._judged(), self.runtime.on(self.runtime.main):
            for tensor in tensors:
                self.runtime.zero(tensor)
                size += tensor.nbytes
        return size

    async def settle(self) -> None:
        """See :class:`Device`."""
        try:
            with self._judged():
                done = self.runtime.event(self.runtime.main)
                await in_thread(None, lambda: self._wait(done))
        except RuntimeError as error:
            raise DeviceBroken(self._broken or first_line(error)) from error

    # -- passes

    def launch(self, rows: Sequence[NDArray[np.float32]], work: Work) -> _CudaPass:
        """See :class:`Device`."""
        # A pass keeps its buffers until its answer is copied out, however many are under way: no other
        # tenant's logits may get into a buffer that is still to be read.
        with self._judged(), self.runtime.on(self.runtime.main), torch.inference_mode():
            buffers = self._buffers.pop() if self._buffers else _PassBuffers(self.runtime)
            if buffers.busy is not None:
                self._wait(buffers.busy)
            launched = False
            try:
                outputs = work(buffers.send(rows))
                together = (
                    outputs[0] if len(outputs) == 1 else torch.cat([one.reshape(-1) for one in outputs])
                )
                found = buffers.receive(together.reshape(-1))
                launched = True
            finally:  # a pass that raised has its rows on their way, too
                done = buffers.busy = self.runtime.event(self.runtime.main)
                if not launched:
                    self._buffers.append(buffers)
        return _CudaPass(self, buffers, done, found, [tuple(one.shape) for one in outputs])

    def padded(self, rows: int) -> int:
        """See :class:`Device`: cuDNN makes a plan for each shape, and keeps it for each thread."""
        if rows > FULL_ROWS:
            return -(-rows // FULL_ROWS) * FULL_ROWS
        return 1 << (rows - 1).bit_length() if rows else 0

    # -- health

    def judge(self, error: BaseException) -> Fault:
        """See :class:`Device`."""
        fault = fault_of(error)
        if any(words in str(error) for words in UNCLEAR) and self._free_bytes() < SCARCE_BYTES:
            return "memory"
        if fault == "broken" and not self._broken:
            self._broken = f"the device failed ({first_line(error)}): this replica is replaced, retry"
        return fault

    def _free_bytes(self) -> int:
        """What this process could still have."""
        try:
            memory, bound = self.runtime.memory(), self.runtime.most_bytes
        except RuntimeError:
            return SCARCE_BYTES
        return min(memory.free, bound - memory.reserved) if bound else memory.free

    def check(self, limit_s: float) -> None:
        """See :class:`Device`."""
        if self._broken:
            raise DeviceBroken(self._broken)
        began = min(self._since.copy().values(), default=None)
        if began is not None and self._clock() - began > limit_s:
            raise Wedged(f"the device has not answered for {limit_s:g} s: this replica is replaced, retry")

    def memory(self) -> DeviceMemory:
        """See :class:`Device`."""
        with self._judged():
            return self.runtime.memory()

    def close(self) -> None:
        """See :class:`Device`."""

    @contextlib.contextmanager
    def _judged(self) -> Iterator[None]:
        if self._broken:
            raise torch.AcceleratorError(self._broken)
        try:
            yield
        except RuntimeError as error:
            self.judge(error)
            raise

    def _wait(self, event: Event) -> None:
        number = next(self._numbers)
        self._since[number] = self._clock()
        try:
            event.synchronize()
        finally:
            del self._since[number]

    def _compute_once(self) -> None:
        """A convolution and a linear layer, compared with the CPU's: a card without kernels shows here."""
        random = torch.Generator().manual_seed(0)
        weights = {
            "convolution": torch.randn(4, 1, 3, 3, generator=random),
            "linear": torch.randn(3, 4 * 6 * 6, generator=random),
        }
        rows = torch.randn(2, 1, 8, 8, generator=random)

        def computed(rows: torch.Tensor, given: Mapping[str, torch.Tensor]) -> torch.Tensor:
            hidden = torch.relu(torch.conv2d(rows, given["convolution"]))
            return torch.nn.functional.linear(torch.flatten(hidden, 1), given["linear"])

        placed = self.place(weights)
        (found,) = self.launch([rows.numpy()], lambda given: [computed(given[0], placed)]).wait()
        wanted = computed(rows, weights).numpy()
        if not np.allclose(found, wanted, rtol=0, atol=TOLERANCE * float(np.abs(wanted).max())):
            raise SettingsError(f"{self.runtime.describe()}: it computes other numbers than the CPU")


class _CudaPass:
    """A pass on its way; its answer comes into pinned memory."""

    def __init__(
        self,
        device: CudaDevice,
        buffers: _PassBuffers,
        done: Event,
        found: torch.Tensor,
        shapes: list[tuple[int, ...]],
    ) -> None:
        self._device = device
        self._buffers = buffers
        self._done = done
        self._found = found
        self._shapes = shapes

    def wait(self) -> list[NDArray[np.float32]]:
        try:
            with self._device._judged():
                self._device._wait(self._done)
            numbers = self._found.numpy().copy()
        finally:
            self._device._buffers.append(self._buffers)
        answers, start = [], 0
        for shape in self._shapes:
            size = int(np.prod(shape))
            answers.append(numbers[start : start + size].reshape(shape))
            start += size
        return answers


class _PassBuffers:
    """Pinned memory for one pass's rows and logits; grows to the largest.

    Attributes
    ----------
    busy
        The event until which the device uses them.
    """

    def __init__(self, runtime: CudaRuntime) -> None:
        self._runtime = runtime
        self.busy: Event | None = None
        self._rows = runtime.pinned(LEAST_BUFFER_BYTES)
        self._logits = runtime.pinned(LEAST_BUFFER_BYTES)

    def send(self, rows: Sequence[NDArray[np.float32]]) -> list[torch.Tensor]:
        """Rows on the device, by one copy."""
        starts, size = [], 0
        for one in rows:
            starts.append(size)
            size += -(-one.nbytes // ALIGN_BYTES) * ALIGN_BYTES
        self._rows = self._at_least(self._rows, size)
        host = self._rows[:size]
        for one, start in zip(rows, starts, strict=True):
            host[start : start + one.nbytes].view(torch.float32).copy_(torch.from_numpy(one).reshape(-1))
        there = self._runtime.empty_like(host)
        self._runtime.copy(there, host)
        return [
            there[start : start + one.nbytes].view(torch.float32).reshape(one.shape)
            for one, start in zip(rows, starts, strict=True)
        ]

    def receive(self, logits: torch.Tensor) -> torch.Tensor:
        """Begin to copy logits to the host; returns where they will be."""
        numbers = logits.float()
        self._logits = self._at_least(self._logits, numbers.nbytes)
        host = self._logits[: numbers.nbytes].view(torch.float32)
        self._runtime.copy(host, numbers)
        return host

    def _at_least(self, buffer: torch.Tensor, size: int) -> torch.Tensor:
        return buffer if size <= buffer.nbytes else self._runtime.pinned(1 << (size - 1).bit_length())


class _Slab:
    """Two chunks of pinned memory: one is filled while the device reads the other."""

    def __init__(self, runtime: CudaRuntime, chunk_bytes: int, wait: Callable[[Event], None]) -> None:
        self._runtime = runtime
        self._wait = wait
        self._chunks = [runtime.pinned(chunk_bytes) for _ in range(2)]
        self._used = [0, 0]

    def send(self, stream: object, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Begin to copy bytes from host memory to the device, on a stream that is the current one.

        The device may still read the last two chunks when this returns.
        """
        sent: list[Event | None] = [None, None]
        now, at = 0, 0
        for source, to in pairs:
            start, size = 0, len(source)
            while start < size:
                chunk = self._chunks[now]
                if at == len(chunk):
                    sent[now] = self._runtime.event(stream)
                    now, at = 1 - now, 0
                    before = sent[now]
                    if before is not None:
                        self._wait(before)
                    continue
                count = min(len(chunk) - at, size - start)
                part = chunk[at : at + count]
                part.copy_(source[start : start + count])
                self._runtime.copy(to[start : start + count], part)
                start, at = start + count, at + count
                self._used[now] = max(self._used[now], at)

    def overwrite(self) -> None:
        """Leave nothing of what was sent."""
        for index, chunk in enumerate(self._chunks):
            chunk[: self._used[index]].zero_()
            self._used[index] = 0


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """A dense tensor's memory as ``uint8``, whatever its order; no copy."""
    flat = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    start = tensor.storage_offset() * tensor.element_size()
    found: torch.Tensor = flat.set_(tensor.untyped_storage(), start, (tensor.nbytes,), (1,))
    return found
