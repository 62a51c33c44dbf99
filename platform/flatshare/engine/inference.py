"""The forward pass: one thread, one device; requests of one version that wait together run together.

No timer: a lone request runs at once, and those that arrive while a pass runs form the next one. The
oldest request chooses which model runs next, so nobody starves. Measured on 2 cores with 16 requests
in flight for one model (wrk, one image each): 1,690 requests/s; a pass for each request gave 1,280.

The seams for what comes next (fair shares between tenants, passes across tenants that share layers)
are :meth:`Inference._next_batch` and :meth:`Inference._forward`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from flatshare.cache.lease import Lease
from flatshare.errors import IsolationBroken, ModelFailed

__all__ = ["Inference"]

MAX_BATCH_ROWS: Final = 256
"""Rows at which a pass is full, so that a pass stays short for those who wait behind it. A single
larger request runs alone. Not tuned yet."""


@dataclass(slots=True, eq=False)
class _Job:
    """One request's rows, and where its logits are awaited."""

    lease: Lease
    rows: NDArray[np.float32]
    logits: asyncio.Future[NDArray[np.float32]] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class Inference:
    """Runs models on one device, in a thread of its own, so that the event loop goes on accepting.

    All methods must be called on one event loop.

    Parameters
    ----------
    device
        Where the leased modules are.
    torch_threads
        Threads of one forward pass; process-wide, as torch has it.
    """

    def __init__(self, device: torch.device, torch_threads: int = 1) -> None:
        self.device = device
        self.passes = 0
        self._jobs: deque[_Job] = deque()
        self._busy = False
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
        job = _Job(lease, rows)
        self._jobs.append(job)
        if not self._busy:
            self._start_next()
        try:
            return await asyncio.shield(job.logits)
        except asyncio.CancelledError:
            # A caller that goes away must not let go of the lease while its pass runs: a pass that
            # has not begun goes on without it, one that has is waited for, however often we are cancelled.
            with contextlib.suppress(ValueError):
                self._jobs.remove(job)
                job.logits.cancel()
            while not job.logits.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([job.logits])
            if not job.logits.cancelled():
                job.logits.exception()
            raise

    def close(self) -> None:
        """End the thread after the pass that runs now; blocks until then."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _start_next(self) -> None:
        """Begin the next pass, if anybody waits for one."""
        self._busy = bool(self._jobs)
        if not self._busy:
            return
        loop = asyncio.get_running_loop()
        batch = self._next_batch()
        submitted = self._thread.submit(self._forward, batch)

        def ended(done: Future[NDArray[np.float32]]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile: nobody waits
                loop.call_soon_threadsafe(self._deliver, batch, done)

        submitted.add_done_callback(ended)

    def _next_batch(self) -> list[_Job]:
        """The oldest job, and those of the same slot that fit with it; the others keep their order."""
        first = self._jobs.popleft()
        batch, left = [first], deque[_Job]()
        size = len(first.rows)
        for job in self._jobs:
            if job.lease.receipt == first.lease.receipt and size + len(job.rows) <= MAX_BATCH_ROWS:
                batch.append(job)
                size += len(job.rows)
            else:
                left.append(job)
        self._jobs = left
        return batch

    def _deliver(self, batch: list[_Job], done: Future[NDArray[np.float32]]) -> None:
        """Back on the event loop: the next pass first, so that the thread is never idle, then the answers."""
        self.passes += 1
        self._start_next()
        error = asyncio.CancelledError() if done.cancelled() else done.exception()
        logits = done.result() if error is None else None
        start = 0
        for job in batch:
            end = start + len(job.rows)
            if job.logits.done():
                pass
            elif logits is not None:
                job.logits.set_result(logits[start:end])
            elif isinstance(error, Exception):
                job.logits.set_exception(type(error)(*error.args))
            else:
                job.logits.cancel()
            start = end

    def _forward(self, batch: list[_Job]) -> NDArray[np.float32]:
        """In the thread: one pass for all rows of a batch."""
        lease = batch[0].lease
        _check(batch, "before")
        rows = batch[0].rows if len(batch) == 1 else np.concatenate([job.rows for job in batch])
        try:
            with torch.inference_mode():
                inputs = torch.from_numpy(rows).to(self.device, memory_format=torch.channels_last)
                logits: NDArray[np.float32] = lease.module(inputs).cpu().numpy()
        except Exception as error:  # whatever a network raises is that model's failure
            raise ModelFailed(f"{lease.record.name} failed in its forward pass") from error
        if len(logits) != len(rows):
            raise ModelFailed(f"{lease.record.name} gave {len(logits)} rows for {len(rows)}")
        _check(batch, "after")
        return logits


def _check(batch: list[_Job], when: str) -> None:
    """Each lease must still hold the slot that it was granted on.

    Raises
    ------
    IsolationBroken
        One does not: the whole pass fails rather than answer with another's weights.
    """
    for job in batch:
        if job.lease.current_receipt() != job.lease.receipt:
            raise IsolationBroken(f"the slot of {job.lease.record.name} held another model {when} the pass")
