"""The part of CUDA that ``CudaDevice`` uses, in a form that can be simulated.

``torch_cuda.py`` implements it with ``torch.cuda``, each method in a line or two;
``testing/simulated_cuda.py`` does so in host memory. ``cuda.py`` makes the decisions (which stream waits for
which, what is reused when).
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from flatshare.device.memory import DeviceMemory

__all__ = ["CudaRuntime", "Event"]


class Event(Protocol):
    """A point in a stream."""

    def synchronize(self) -> None:
        """Block this thread, asleep, until the stream has come here."""
        ...


class CudaRuntime(Protocol):
    """One device. Streams are whatever the runtime calls one."""

    @property
    def torch_device(self) -> torch.device:
        """The device that tensors on it name."""
        ...

    @property
    def expandable_segments(self) -> bool:
        """Whether the allocator grows its segments, so that it wastes next to nothing."""
        ...

    @property
    def most_bytes(self) -> int:
        """Memory that this process's allocator may take; 0 for no bound of its own."""
        ...

    @property
    def main(self) -> Any:
        """The default stream: passes run on it."""
        ...

    def stream(self) -> Any:
        """A new stream; waits for no other by itself."""
        ...

    def on(self, stream: Any) -> AbstractContextManager[None]:
        """Within this, in this thread, what is computed and allocated belongs to a stream."""
        ...

    def wait(self, stream: Any, for_: Any) -> None:
        """Whatever a stream is given from now on begins after all that another has been given so far."""
        ...

    def event(self, stream: Any) -> Event:
        """The point that a stream has been given work up to."""
        ...

    def pinned(self, size: int) -> torch.Tensor:
        """``uint8 (size,)`` in page-locked host memory."""
        ...

    def empty_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Device memory of the current stream, in the shape, type and memory order of a host tensor.

        Raises
        ------
        torch.OutOfMemoryError
            There is none, and nothing cached to give back for it.
        """
        ...

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        """Copy on the current stream, from or to host memory, without waiting."""
        ...

    def zero(self, tensor: torch.Tensor) -> None:
        """Overwrite with zeros, on the current stream, without waiting."""
        ...

    def describe(self) -> str:
        """The card, and what this torch has kernels for; for people."""
        ...

    def memory(self) -> DeviceMemory:
        """The allocator's and the driver's accounts."""
        ...
