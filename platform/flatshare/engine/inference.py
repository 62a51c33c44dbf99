"""The forward pass: one thread, one device, rows of one version at a time.

The seam for batching: callers await :meth:`Inference.run` and don't know whether their rows ran
alone. Today each call is one pass.
"""

from __future__ import annotations

import asyncio
import contextlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray

from flatshare.cache.model_cache import Lease
from flatshare.errors import IsolationBroken, ModelFailed

__all__ = ["Inference"]


class Inference:
    """Runs models on one device, in a thread of its own, so that the event loop goes on accepting.

    Parameters
    ----------
    device
        Where the leased modules are.
    torch_threads
        Threads of one forward pass; process-wide, as torch has it.
    """

    def __init__(self, device: torch.device, torch_threads: int = 1) -> None:
        self.device = device
        self._thread = ThreadPoolExecutor(
            1, thread_name_prefix="inference", initializer=torch.set_num_threads, initargs=(torch_threads,)
        )

    async def run(self, lease: Lease, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits of some rows.

        Parameters
        ----------
        lease
            Held by the caller until this returns or raises.
        rows
            ``(N, *input.shape)``, C-contiguous; not changed.

        Returns
        -------
        ndarray
            ``(N, classes)`` float32.

        Raises
        ------
        IsolationBroken
            The slot held something else before or after the pass.
        ModelFailed
            The pass raised (out of memory, say).
        """
        submitted = self._thread.submit(self._forward, lease, rows)
        future = asyncio.wrap_future(submitted)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            # A caller that goes away must not let go of the lease while its pass runs: a pass that
            # has not begun is dropped, one that has is waited for, however often we are cancelled.
            if not submitted.cancel():
                while not future.done():
                    with contextlib.suppress(asyncio.CancelledError):
                        await asyncio.wait([future])
                future.exception()
            raise

    def _forward(self, lease: Lease, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        if lease.current_receipt() != lease.receipt:
            raise IsolationBroken(f"the slot of {lease.record.name} held another model before the pass")
        try:
            with torch.inference_mode():
                inputs = torch.from_numpy(rows).to(self.device, memory_format=torch.channels_last)
                logits: NDArray[np.float32] = lease.module(inputs).cpu().numpy()
        except (RuntimeError, MemoryError) as error:
            raise ModelFailed(f"{lease.record.name} failed in its forward pass") from error
        if lease.current_receipt() != lease.receipt:
            raise IsolationBroken(f"the slot of {lease.record.name} held another model after the pass")
        return logits

    def close(self) -> None:
        """End the thread after the pass that runs now."""
        self._thread.shutdown(wait=True, cancel_futures=True)
