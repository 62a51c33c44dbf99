"""Jobs of passes: a request's rows under a lease, what is checked around a pass, what a failure becomes."""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flatshare.device.protocol import Device, Fault
from flatshare.errors import DeviceBroken, IsolationBroken, ModelFailed, NoRoom, ServeError, copy_of
from flatshare.models.architecture import architecture
from flatshare.models.probe import probe_rows
from flatshare.residency.lease import Lease

__all__ = [
    "Answer",
    "Caught",
    "Job",
    "caught",
    "check_lease",
    "failure_of",
    "joined",
    "probe_answered",
    "probe_due",
    "probe_of",
]

logger = logging.getLogger("flatshare.engine")

Answer = NDArray[np.float32] | Exception
"""Logits ``(N, classes)``, or why there are none."""


@dataclass(slots=True, eq=False)
class Job:
    """One request's rows, and who gets its logits.

    Attributes
    ----------
    done
        Called once on the event loop with the answer, also when nobody waits for it any more.
    over
        What a caller that was cancelled waits for: the end of its pass.
    background
        It belongs to a task.
    ended
        Its pass has ended, and the event loop knows.
    began
        By the clock, when its pass began; 0 before.
    """

    lease: Lease
    rows: NDArray[np.float32]
    tenant: str
    size: int
    same: Hashable
    kind: Hashable
    done: Callable[[Answer], None]
    background: bool = False
    over: asyncio.Future[None] | None = None
    ended: bool = False
    began: float = 0.0


def joined(block: Sequence[Job], probe: NDArray[np.float32] | None) -> NDArray[np.float32]:
    """Rows of a block's jobs, one after the other, and the probe's last."""
    rows = [job.rows for job in block]
    if probe is not None:
        rows.append(probe)
    return rows[0] if len(rows) == 1 else np.concatenate(rows)


def probe_due(block: Sequence[Job]) -> NDArray[np.float32] | None:
    """The probe's row, if the block's model has not answered it since it was loaded again."""
    resident = block[0].lease.resident
    return probe_of(block) if resident is not None and resident.probe_due else None


def probe_of(block: Sequence[Job]) -> NDArray[np.float32] | None:
    """The probe's row for the block's model, whether it is due or not; None if it was registered without."""
    record = block[0].lease.record
    return None if record.probe_logits is None else probe_rows(architecture(record.architecture))


def probe_answered(block: Sequence[Job]) -> None:
    """The block's model owes its probe no longer."""
    if block[0].lease.resident is not None:
        block[0].lease.resident.probe_due = False


@dataclass(frozen=True, slots=True)
class Caught:
    """The error of a pass, without its stack frames, which would keep the pass's tensors and models alive.

    Attributes
    ----------
    fault
        What it says of the device.
    text
        The traceback, for the log.
    """

    error: Exception
    fault: Fault
    text: str


def caught(error: Exception, device: Device) -> Caught:
    """Judge an error and let go of its frames, and of those that it came from."""
    fault = device.judge(error)
    text = "" if isinstance(error, ServeError) else "".join(traceback.format_exception(error))
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen.__traceback__ = None
        seen = seen.__cause__ or seen.__context__
    return Caught(error, fault, text)


def failure_of(job: Job, found: Caught) -> Exception:
    """The error that a job gets for an error in its pass; the log gets all of it."""
    error, name = found.error, job.lease.record.name
    if isinstance(error, ServeError):
        return copy_of(error)
    if found.fault == "memory":  # of the device, not of the model; perhaps over in a moment
        logger.warning("the device has no memory for a pass of %s: %s", name, error)
        return NoRoom(f"the device has no memory for {name} now; retry")
    if found.fault == "broken":  # perhaps by another tenant's pass, or a load
        logger.error("the device failed in a pass of %s: %s", name, error)
        return DeviceBroken(f"the device failed in a pass of {name}; this replica is replaced, retry")
    failed = ModelFailed(f"{name} failed in its forward pass")
    logger.error("%s\n%s", failed.message, found.text)
    failed.__cause__ = error
    return failed


def check_lease(job: Job, when: str) -> None:
    """The lease must still hold the slot and the model that it was granted on.

    Raises
    ------
    IsolationBroken
        It does not: the request fails rather than be answered with another's weights.
    """
    if not job.lease.is_intact(job.same):
        raise IsolationBroken(f"the slot of {job.lease.record.name} held another model {when} the pass")
