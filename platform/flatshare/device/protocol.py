"""What every device can do. The conformance suite that each passes is ``testing/device_suite.py``."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Literal, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from flatshare.device.memory import DeviceMemory

__all__ = ["Device", "Fault", "K", "Launched", "Work"]

K = TypeVar("K", bound=Hashable)
"""A caller's keys for its tensors."""

Work = Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]
"""A pass: one tensor of rows in for each model, one tensor of float32 logits ``(N, classes)`` out for each.
"""

Fault = Literal["memory", "broken", "other"]
"""What an error says of the device: it has no memory now; it is lost, and its process with it; nothing."""


class Launched(Protocol):
    """A pass that was given to the device."""

    def wait(self) -> list[NDArray[np.float32]]:
        """The logits, once they are there; the arrays are the caller's. Blocks; to be called once.

        Raises
        ------
        Exception
            Whatever the pass raised, or the device since then.
        """
        ...


class Device(Protocol):
    """Where models run. Safe for several threads, but for passes: :meth:`launch` is one thread's."""

    @property
    def name(self) -> str:
        """``cpu`` or ``cuda``."""
        ...

    @property
    def torch_device(self) -> torch.device:
        """As torch knows it."""
        ...

    @property
    def computes_in_host_memory(self) -> bool:
        """Whether prepared tensors run as they are, so that nothing is copied when they are placed."""
        ...

    @property
    def overwrites_what_leaves(self) -> bool:
        """Whether each model's memory is overwritten when it is evicted, not only at an erasure."""
        ...

    @property
    def overlaps(self) -> bool:
        """Whether :meth:`launch` returns before the pass has ended, so that the next may be launched."""
        ...

    def footprint(self, size_bytes: int) -> int:
        """Bytes that a tensor of ``size_bytes`` takes on this device."""
        ...

    def place(self, tensors: Mapping[K, torch.Tensor]) -> Mapping[K, torch.Tensor]:
        """Put tensors on the device; when this returns they can be used by any pass. Blocks: for a thread.

        Raises
        ------
        torch.OutOfMemoryError
            There is no memory for them now; nothing of them is left.
        """
        ...

    def scrub(self, tensors: Iterable[torch.Tensor]) -> int:
        """Overwrite tensors that no new pass uses, after all passes that were launched.

        Returns at once; :meth:`settle` says when it is done. The memory may be let go of at once.

        Returns
        -------
        int
            Bytes.
        """
        ...

    async def settle(self) -> None:
        """Wait until all the overwriting begun so far is done.

        Raises
        ------
        DeviceBroken
            It can't be told any more.
        """
        ...

    def launch(self, rows: Sequence[NDArray[np.float32]], work: Work) -> Launched:
        """Begin a pass: rows, one array for each model, go to the device and then through ``work``.

        Several may be under way, and may be waited for in any order. The rows are read before this
        returns.

        Raises
        ------
        Exception
            Whatever ``work`` raises, and what the device does (:meth:`judge`).
        """
        ...

    def padded(self, rows: int) -> int:
        """How many rows a pass of ``rows`` rows is computed with: few sizes, if each costs a plan."""
        ...

    def judge(self, error: BaseException) -> Fault:
        """What an error says of this device; remembers one after which it can't be used any more."""
        ...

    def check(self, limit_s: float) -> None:
        """Return if the device can go on.

        Raises
        ------
        DeviceBroken
            An error was judged to be one that only a new process mends.
        Wedged
            Something that it was asked for has not ended within ``limit_s`` seconds.
        """
        ...

    def memory(self) -> DeviceMemory:
        """The device's own accounts. May wait for the driver: not on an event loop."""
        ...

    def close(self) -> None:
        """Let go of buffers; nothing may run any more."""
        ...
