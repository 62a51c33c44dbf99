"""Host tensors that a process keeps ready: a model that comes back within a while costs no system call.

What is kept is mostly views of the node's files, which are there anyway and shared; convolution weights
in channels-last order are copies of this process's own. Both count, and the whole is bounded.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping

import torch

from flatshare.weights.tiers import Part

__all__ = ["HostTensorCache"]


class HostTensorCache:
    """The most recently used host tensors, up to a number of bytes; safe for several threads."""

    def __init__(self, budget_bytes: int) -> None:
        self._budget = budget_bytes
        self._tensors: OrderedDict[Part, torch.Tensor] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, parts: Iterable[Part]) -> dict[Part, torch.Tensor] | None:
        """All of these, or None."""
        found: dict[Part, torch.Tensor] = {}
        with self._lock:
            for part in parts:
                tensor = self._tensors.get(part)
                if tensor is None:
                    return None
                found[part] = tensor
        return found

    def touch(self, parts: Iterable[Part]) -> None:
        """Mark these as in use, so that they are dropped after the others, whichever model holds them."""
        with self._lock:
            for part in parts:
                if part in self._tensors:
                    self._tensors.move_to_end(part)

    def keep(self, tensors: Mapping[Part, torch.Tensor]) -> None:
        """Keep these too, and let go of the longest unused."""
        gone: list[torch.Tensor] = []  # freed after the lock: it may unmap a file
        with self._lock:
            for part, tensor in tensors.items():
                if part not in self._tensors and tensor.nbytes <= self._budget:
                    self._tensors[part] = tensor
                    self._bytes += tensor.nbytes
            while self._bytes > self._budget:
                _, oldest = self._tensors.popitem(last=False)
                self._bytes -= oldest.nbytes
                gone.append(oldest)

    def clear(self) -> None:
        """Let go of all: the node's tier needs room."""
        with self._lock:
            gone, self._tensors = self._tensors, OrderedDict()
            self._bytes = 0
        del gone
