"""The forward pass: one thread, one device; requests that wait together run together.

No timer: a lone request runs at once, and those that arrive while a pass runs form the next ones. The
thread takes its next pass from the queue itself, so it is never idle while somebody waits, and the
event loop goes on accepting. ``fair_queue.py`` decides who runs next, ``passes.py`` what shares a pass. If
the device computes beside the thread, the next pass is launched before the last answers are waited for.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Final, cast

import numpy as np
from numpy.typing import NDArray

from flatshare.device.protocol import Device
from flatshare.engine.fair_queue import PriorityQueue
from flatshare.engine.jobs import Answer, Job
from flatshare.engine.runner import Pass, PassRunner
from flatshare.engine.stacked import Stacks
from flatshare.errors import NoRoom, Wedged
from flatshare.residency.lease import Lease
from flatshare.telemetry.tracing import current_trace

__all__ = ["MAX_BATCH_ROWS", "Inference"]

logger = logging.getLogger("flatshare.engine")

# Rows may be views of a request's own bytes, which are read-only; a forward pass writes to none of them.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable", category=UserWarning)

PASS_LIMIT_S: Final = 60.0
"""Seconds that a pass may take, where nobody says otherwise: a full one takes 14 ms."""

WARM_UP_S: Final = 300.0
"""Seconds that the first passes may take."""

MAX_BATCH_ROWS: Final = 64
"""Rows at which a pass is full. On one core ``mnist-cnn`` (channels-last) gives 4,300 images/s at 16 rows,
4,700 at 64 and 3,200 at 256, where activations fall out of the cache. A single larger request runs alone."""


PARTS_AT_ONCE: Final = 2
"""Passes of one request that wait or run at a time: one runs while the next is made ready."""


class Inference:
    """Runs models on one device, in a thread of its own.

    All methods must be called on one event loop.

    Parameters
    ----------
    device
        Where the leased models are.
    warm_up
        Called in the thread before its first pass; :meth:`ready` waits for it.
    torch_threads
        Threads of one forward pass; 0 for what each architecture says.
    max_batch_rows
        Rows of one pass; ``max_rows`` afterwards.
    stacks
        Where models of one architecture that share no layer run together; they fill each other's passes then.
        None: they run apart. On CPU to meet gives nothing: 20 models by Zipf, 16 rows in flight, 1,434
        rows/s, and 1,464 apart; medians of 7.
    pass_limit_s
        Seconds after which a pass counts as one that never ends.
    """

    def __init__(
        self,
        device: Device,
        torch_threads: int = 0,
        max_batch_rows: int = MAX_BATCH_ROWS,
        *,
        stacks: Stacks | None = None,
        warm_up: Callable[[], None] = lambda: None,
        pass_limit_s: float = PASS_LIMIT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stacks = stacks
        self._pass_limit_s = pass_limit_s
        self._clock = clock
        self._pass_began: float | None = None  # written by the thread alone
        self._ready: Future[None] = Future()
        self._warm_up = warm_up
        self.device = device
        self.rows = 0
        self.busy_s = 0.0  # written by the thread alone
        self._runner = PassRunner(device, torch_threads, max_batch_rows, stacks)
        self.max_rows = max_batch_rows
        self._queue: PriorityQueue[Job] = PriorityQueue(max_batch_rows)
        self._lock = threading.Lock()
        self._idle = False
        self._wakeup = threading.Lock()  # taken: a semaphore of one, without threading's Python around it
        self._wakeup.acquire()
        self._closing = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._work, name="inference", daemon=True)
        self._thread.start()

    @property
    def passes(self) -> int:
        """Passes so far."""
        return self._runner.passes

    @property
    def memory_failures(self) -> int:
        """Passes that the device had no memory for."""
        return self._runner.memory_failures

    @property
    def waiting(self) -> int:
        """Jobs that wait for their pass."""
        return len(self._queue)

    def _patience_s(self) -> float:
        """Seconds until the pass that runs now has run for too long."""
        began = self._pass_began
        return self._pass_limit_s if began is None else max(began + self._pass_limit_s - self._clock(), 0.01)

    def check_alive(self) -> None:
        """Return if no pass has run for longer than any may.

        Raises
        ------
        Wedged
            One has: the thread can't be ended, so the process must be.
        DeviceBroken
            Its device can't be used any more.
        """
        began = self._pass_began
        if began is not None and self._clock() - began > self._pass_limit_s:
            raise Wedged(
                f"a pass of this replica has not ended within {self._pass_limit_s:g} s: it is replaced, retry"
            )
        self.device.check(self._pass_limit_s)

    def ready(self) -> None:
        """Wait until the thread can take passes.

        Raises
        ------
        Wedged
            The device does not come back from its first passes.
        Exception
            What the warm-up raised; the thread has ended then, and requests are refused.
        """
        try:
            self._ready.result(WARM_UP_S)
        except TimeoutError:
            raise Wedged(f"the device has not run its first passes within {WARM_UP_S:g} s") from None

    async def run(
        self, lease: Lease, rows: NDArray[np.float32], background: bool = False
    ) -> NDArray[np.float32]:
        """Logits of some rows.

        More rows than a pass takes go in several passes, of which two wait at a time. Other requests, also of
        the same tenant, get their turns in between.

        Parameters
        ----------
        lease
            Held by the caller until this returns or raises.
        rows
            ``(N, *input.shape)``, C-contiguous; not changed.
        background
            Whether nobody waits for the answer at this moment: then others go first.

        Returns
        -------
        ndarray
            ``(N, classes)`` float32.

        Raises
        ------
        IsolationBroken
            The slot held something else before or after the pass.
        ModelFailed
            The pass raised an error, and a pass of this request's rows alone did too.
        NoRoom
            The device has no memory for the pass now.
        DeviceBroken
            The device is lost to this process.
        Wedged
            A pass never ends. The lease, and what it holds, must be kept: the thread still uses it.
        """
        most = self.max_rows
        if len(rows) <= most:
            return await self._run_one(lease, rows, background)
        turns = asyncio.Semaphore(PARTS_AT_ONCE)

        async def part(start: int) -> NDArray[np.float32]:
            async with turns:
                return await self._run_one(lease, rows[start : start + most], background)

        parts = [part(start) for start in range(0, len(rows), most)]
        # Do not raise the first failure at once: the lease must live until the last pass has ended.
        answers = await asyncio.gather(*parts, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return np.concatenate(cast("list[NDArray[np.float32]]", answers))

    def submit(
        self,
        lease: Lease,
        rows: NDArray[np.float32],
        done: Callable[[Answer], None],
        background: bool = False,
    ) -> Job:
        """Queue rows of one pass without waiting for them.

        Parameters
        ----------
        lease
            Held by the caller until ``done`` is called, or :meth:`withdraw` returns True.
        rows
            As :meth:`run`'s, but no more than ``max_rows``.
        done
            Called once, on this event loop, with what :meth:`run` would return or raise.
        background
            As :meth:`run`'s.

        Raises
        ------
        NoRoom
            The replica is stopping; ``done`` is not called.
        Wedged, DeviceBroken
            The replica is being replaced; likewise.
        """
        try:
            self.check_alive()
        except Wedged as error:
            error.before_pass = True
            raise
        model = lease.model
        loop = asyncio.get_running_loop()
        kind = model.architecture if self._stacks is not None else id(model.stages[0])
        job = Job(lease, rows, lease.record.tenant, len(rows), id(model), kind, done, background)
        with self._lock:
            if self._closing:
                raise NoRoom("the replica is stopping; retry")
            self._loop = loop
            self._queue.put(job)
            wake, self._idle = self._idle, False
        if wake:  # a thread that is busy looks by itself; waking one costs more than a row's bookkeeping
            self._wakeup.release()
        return job

    def withdraw(self, job: Job) -> bool:
        """Remove a job that no pass has taken. True if it was removed: then ``done`` is not called."""
        with self._lock:
            return self._queue.remove(job)

    async def _run_one(
        self, lease: Lease, rows: NDArray[np.float32], background: bool
    ) -> NDArray[np.float32]:
        loop = asyncio.get_running_loop()
        logits: asyncio.Future[NDArray[np.float32]] = loop.create_future()

        def done(answer: Answer) -> None:
            if logits.done():  # cancelled
                return
            if isinstance(answer, Exception):
                logits.set_exception(answer)
            else:
                logits.set_result(answer)

        job = self.submit(lease, rows, done, background)
        try:
            answer = await logits
            current_trace().passed(job)
            return answer
        except asyncio.CancelledError:
            # A caller that goes away must not release the lease while its pass runs. A job that no pass took
            # is removed; for one whose pass runs we wait, however often we are cancelled.
            if not self.withdraw(job) and not job.ended:
                job.over = loop.create_future()
                while not job.over.done():
                    self.check_alive()
                    with contextlib.suppress(asyncio.CancelledError):
                        await asyncio.wait([job.over], timeout=self._patience_s())
            raise

    def close(self) -> None:
        """End the thread after the pass that runs now; jobs that still wait are refused. Blocks until then.

        It waits for a pass that never ends no longer than any pass may take.
        """
        with self._lock:
            self._closing = True
            wake, self._idle = self._idle, False
        if wake:
            self._wakeup.release()
        self._thread.join(self._pass_limit_s)

    # -- in the thread

    def _work(self) -> None:
        try:
            self._warm_up()
        except Exception as error:
            with self._lock:
                self._closing = True
            self._ready.set_exception(error)
            self._refuse_all()
            return
        self._ready.set_result(None)
        under_way: Pass | None = None
        while True:
            with self._lock:
                self._queue.max_rows = self._runner.rows_now
                batch = self._queue.take()
                loop, closing = self._loop, self._closing
                self._idle = not batch and not closing and under_way is None
            if closing:
                if under_way is not None:
                    self._end(under_way)
                if batch:
                    self._deliver_soon(loop, batch, None)
                self._refuse_all()
                return
            if not batch:
                if under_way is None:
                    self._wakeup.acquire()
                else:
                    self._end(under_way)
                    under_way = None
                continue
            now = self._clock()
            for job in batch:
                self.rows += job.size
                job.began = now
            if under_way is None:
                self._pass_began = now
            begun = self._runner.begin(batch)
            del batch  # a job in here would keep its model alive while the thread waits
            if under_way is not None:
                self._end(under_way, more=True)
            if self.device.overlaps:
                under_way = begun
            else:
                self._end(begun)
            del begun

    def _refuse_all(self) -> None:
        """Refuse all waiting jobs: no pass takes them any more."""
        while True:
            with self._lock:
                batch, loop = self._queue.take(), self._loop
            if not batch:
                return
            self._deliver_soon(loop, batch, None)

    def _end(self, one: Pass, *, more: bool = False) -> None:
        """Wait for a pass and have its answers delivered.

        Parameters
        ----------
        more
            Another one was launched meanwhile.
        """
        answers = self._runner.answers(one)
        now = self._clock()
        if self._pass_began is not None:
            self.busy_s += now - self._pass_began
        self._pass_began = now if more else None  # before anybody hears of its end
        self._deliver_soon(self._loop, one.batch, answers)

    def _deliver_soon(
        self,
        loop: asyncio.AbstractEventLoop | None,
        batch: Sequence[Job],
        answers: Sequence[Answer] | None,
    ) -> None:
        assert loop is not None, "a job came from a loop"
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile: nobody waits
            loop.call_soon_threadsafe(_deliver, batch, answers)


def _deliver(batch: Sequence[Job], answers: Sequence[Answer] | None) -> None:
    """On the event loop: hand each job its answer; None for "the replica stops"."""
    for index, job in enumerate(batch):
        job.ended = True
        if job.over is not None:
            job.over.set_result(None)
        try:
            job.done(answers[index] if answers is not None else NoRoom("the replica is stopping; retry"))
        except Exception:  # one job's caller must not keep the others' answers from them
            logger.exception("an answer of %s was not taken", job.lease.record.name)
