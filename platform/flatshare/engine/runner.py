"""Runs passes of jobs on a device: launches them, waits for them, and retries failed ones in smaller passes.

Only the thread of ``inference.py`` uses it. ``passes.py`` decides what shares a pass's computation.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from functools import partial
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from flatshare.device.protocol import Device, Launched
from flatshare.engine.jobs import (
    Answer,
    Caught,
    Job,
    caught,
    check_lease,
    failure_of,
    joined,
    probe_answered,
    probe_due,
    probe_of,
)
from flatshare.engine.passes import forward
from flatshare.engine.stacked import Stacks
from flatshare.errors import ModelFailed, ProbeFailed, ServeError
from flatshare.models.architecture import architecture
from flatshare.models.probe import check_probe_logits

__all__ = ["PASSES_BEFORE_MORE", "Pass", "PassRunner"]

logger = logging.getLogger("flatshare.engine")

PASSES_BEFORE_MORE: Final = 256
"""Passes to run, after one found no memory, before twice as many rows are tried again."""


class Pass:
    """A pass under way: its jobs, those of each model together, and the probe that a model owes."""

    __slots__ = ("batch", "blocks", "failed", "launched", "probes")

    def __init__(
        self,
        batch: Sequence[Job],
        blocks: Sequence[Sequence[Job]],
        probes: Sequence[NDArray[np.float32] | None],
        launched: Launched | None,
        failed: Caught | None = None,
    ) -> None:
        self.batch = batch
        self.blocks = blocks
        self.probes = probes
        self.launched = launched
        self.failed = failed


class PassRunner:
    """Runs passes, two of which may be under way.

    Parameters
    ----------
    device
        Where the leased models are.
    torch_threads
        Threads of one forward pass; 0 for what each architecture says.
    max_rows
        Rows at which a pass is full.
    stacks
        Where models of one architecture that share no layer run together; None: they run apart.

    Attributes
    ----------
    passes
        How many were begun, without those that were tried again.
    rows_now
        Rows at which a pass is full now: fewer for a while after the device had no memory for one.
    memory_failures
        How often the device had no memory for a pass.
    """

    def __init__(self, device: Device, torch_threads: int, max_rows: int, stacks: Stacks | None) -> None:
        self.device = device
        self.passes = 0
        self.rows_now = self._max_rows = max_rows
        self.memory_failures = 0
        self._raise_at: int | None = None
        self._torch_threads = torch_threads
        self._threads_now = 0
        self._stacks = stacks

    def begin(self, batch: Sequence[Job]) -> Pass:
        """Launch a pass of jobs; also returns a pass if the launch fails at once."""
        self.passes += 1
        if self._raise_at is not None and self.passes >= self._raise_at:
            self._raise_again()
        return self._begin(batch)

    def _begin(self, batch: Sequence[Job], *, ask: bool = False) -> Pass:
        try:
            return self._launch(batch, ask=ask)
        except Exception as error:  # whatever a network raises is that model's failure
            return Pass(batch, [], [], None, caught(error, self.device))

    def answers(self, one: Pass) -> list[Answer]:
        """One answer for each job: from one pass, or if that fails from smaller ones, so that a bad job fails
        alone.
        """
        found = self._logits_of(one)
        if not isinstance(found, Caught):
            return found
        # Nothing of the pass that failed is held here any more: its memory may be what the next ones need.
        batch, fault = one.batch, found.fault
        if fault == "memory":
            self._lower(sum(job.size for job in batch))
        if fault == "broken":  # each of them would only hear the same
            return [failure_of(job, found) for job in batch]
        if len(batch) == 1:
            if fault == "memory" and batch[0].size > 1:
                return [self._in_two(batch[0])]
            return [self._failure(batch[0], found)]
        if fault == "memory":
            logger.warning("the device has no memory for a pass of %d jobs: %s", len(batch), found.error)
            half = len(batch) // 2
            return [
                *self.answers(self._begin(batch[:half])), *self.answers(self._begin(batch[half:]))
            ]  # fmt: skip
        logger.info("a pass of %d jobs failed; each runs alone: %s", len(batch), found.error)
        # If a stack may be what is wrong, each model must answer its probe, whether it owes one or not.
        stacked = self._stacks is not None and len({job.same for job in batch}) > 1
        answers = [
            answer for job in batch for answer in self.answers(self._begin([job], ask=stacked))
        ]  # fmt: skip
        if stacked and self._stacks is not None and not any(isinstance(one, Exception) for one in answers):
            # Each is right alone, so together they were wrong.
            self._stacks.disable(batch[0].lease.record.architecture)
        return answers

    def _logits_of(self, one: Pass) -> list[Answer] | Caught:
        if one.failed is not None:
            return one.failed
        try:
            return list(self._logits(one))
        except Exception as error:
            return caught(error, self.device)

    def _in_two(self, job: Job) -> Answer:
        """One request's rows in two passes, since the device has no memory for one."""
        half = job.size // 2
        answers: list[NDArray[np.float32]] = []
        for rows in (job.rows[:half], job.rows[half:]):
            part = Job(job.lease, rows, job.tenant, len(rows), job.same, job.kind, job.done)
            (answer,) = self.answers(self._begin([part]))
            if isinstance(answer, Exception):
                return answer
            answers.append(answer)
        return np.concatenate(answers)

    def _lower(self, rows: int) -> None:
        """A pass of this many rows found no memory: halve the next ones, and try more rows after a while."""
        self.memory_failures += 1
        self.rows_now = max(min(self.rows_now, rows // 2), 1)
        self._raise_at = self.passes + PASSES_BEFORE_MORE

    def _raise_again(self) -> None:
        self.rows_now = min(2 * self.rows_now, self._max_rows)
        self._raise_at = None if self.rows_now == self._max_rows else self.passes + PASSES_BEFORE_MORE

    def _failure(self, job: Job, found: Caught) -> Exception:
        """Why a job that ran alone has no logits.

        A model that owes its probe and can't answer that alone either does not run on this device. This is
        reported as a failed probe, so that the model is removed. A bad row removes no model.
        """
        own = found.fault == "other" and not isinstance(found.error, ServeError)
        probe = probe_due([job]) if own else None
        if probe is None:
            return failure_of(job, found)
        try:
            self.device.launch([probe], lambda rows: forward([job.lease.model], rows)).wait()
        except Exception as error:
            again = caught(error, self.device)
            if again.fault == "other":
                failed = ProbeFailed(f"{job.lease.record.name} does not run on {self.device.name}")
                logger.error("%s\n%s", failed.message, again.text)
                return failed
        return failure_of(job, found)

    def _launch(self, batch: Sequence[Job], *, ask: bool = False) -> Pass:
        for job in batch:
            check_lease(job, "before")
        # Rows of one model are one block; equal models are one model.
        blocks: dict[Hashable, list[Job]] = {}
        for job in batch:
            blocks.setdefault(job.same, []).append(job)
        jobs = list(blocks.values())
        probes = [probe_of(block) if ask else probe_due(block) for block in jobs]
        if self._stacks is not None and len(jobs) > 1:  # what several tenants share is asked in each pass
            one = self.passes % len(jobs)
            probes[one] = probe_of(jobs[one])
        models = [block[0].lease.model for block in jobs]
        self._set_threads(self._torch_threads or models[0].threads)
        rows = [joined(block, probe) for block, probe in zip(jobs, probes, strict=True)]
        work = partial(forward, models, padded=self.device.padded, stacks=self._stacks)
        launched = self.device.launch(rows, work)
        return Pass(batch, jobs, probes, launched)

    def _logits(self, one: Pass) -> list[NDArray[np.float32]]:
        assert one.launched is not None, "one that failed at once has none"
        answers: dict[int, NDArray[np.float32]] = {}
        for block, probe, found in zip(one.blocks, one.probes, one.launched.wait(), strict=True):
            if len(found) != sum(job.size for job in block) + (probe is not None):
                raise ModelFailed(f"{block[0].lease.record.name} gave {len(found)} rows for other inputs")
            if probe is not None:
                record = block[0].lease.record
                network = architecture(record.architecture)
                check_probe_logits(network, record, found[-1], self.device.torch_device)
                probe_answered(block)
            start = 0
            for job in block:
                check_lease(job, "after")
                answers[id(job)] = found[start : start + job.size]
                start += job.size
        return [answers[id(job)] for job in one.batch]

    def _set_threads(self, threads: int) -> None:
        """A setting of the calling thread, under OpenMP; models of one pass are of one architecture."""
        if threads != self._threads_now:
            torch.set_num_threads(threads)
            self._threads_now = threads
