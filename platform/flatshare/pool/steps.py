"""How a replica of the pool runs a pipeline's step: by handle, within the request's deadline.

The pool's replica is the ingress, so that the edge's hash finds a model's home, and only requests for a
pipeline pay for the hop (``platform/DESIGN.md`` has its cost).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Final

from numpy.typing import NDArray
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException

from flatshare.errors import NoSuchPipeline, Overloaded, ServeError, StepFailed, StepUnavailable
from flatshare.telemetry.tracing import sent_on

__all__ = ["BY_VALUE_BYTES", "STEP_DEPLOYMENT", "StepRequest", "Steps", "step_app"]

logger = logging.getLogger("flatshare.pool")

STEP_DEPLOYMENT: Final = "Step"

BY_VALUE_BYTES: Final = 1024**2
"""Body up to which a step is called by value; beyond it the object store is quicker (measured in
DESIGN.md).
"""

TRIES: Final = 3
"""How often a step that dies during a request is called: it only computes, so a repeat does no harm."""

PAUSE_S: Final = 0.2
"""Seconds before the next try: routers have dropped a dead replica by then."""


def step_app(name: str) -> str:
    """The Serve application of a pipeline's step."""
    return f"flatshare-pipeline-{name}"


@dataclass(frozen=True, slots=True)
class StepRequest:
    """What a step is told of a request. It names no credential: a step can do nothing in its caller's name.

    Attributes
    ----------
    id
        The request's.
    tenant
        Whose model will answer.
    traceparent
        Of the trace that it is part of; empty for none.
    """

    body: bytes
    id: str
    tenant: str
    traceparent: str = ""


class Steps:
    """The steps that are served beside this pool.

    Parameters
    ----------
    names
        Of pipelines.
    handle_of
        A handle on a pipeline's step.
    """

    def __init__(self, names: Collection[str], handle_of: Callable[[str], Any] | None = None) -> None:
        self.names = tuple(sorted(names))
        self._handle_of = handle_of or _handle_of
        self._handles: dict[str, Any] = {}

    def check(self, name: str) -> None:
        """Return if there is such a pipeline.

        Raises
        ------
        NoSuchPipeline
            There is not.
        """
        if name not in self.names:
            raise NoSuchPipeline(f"there is no pipeline {name[:80]!a}; there are {list(self.names)}")

    async def arrays(self, name: str, body: bytes, request_id: str, tenant: str) -> dict[str, NDArray[Any]]:
        """Run a pipeline's step on a request; its arrays. Cancelling the caller cancels the call.

        Raises
        ------
        BadInput
            As the step says.
        StepFailed
            It failed; it is not asked again.
        Overloaded, StepUnavailable
            Too many wait for it, or it died each time that it was asked.
        """
        self.check(name)
        request = StepRequest(body, request_id, tenant, sent_on())
        if name not in self._handles:
            self._handles[name] = self._handle_of(name)
        handle = self._handles[name]
        if len(body) > BY_VALUE_BYTES:
            handle = handle.options(_by_reference=True)
        for last in (*[False] * (TRIES - 1), True):
            try:
                return await _answer(handle.run.remote(request))
            except RayTaskError as error:
                cause = error.cause
                if isinstance(cause, ServeError):
                    raise cause from None
                logger.error("the step of pipeline %s failed: %s", name, type(cause).__name__)
                raise StepFailed(f"the step of pipeline {name} failed") from None
            except BackPressureError:
                raise Overloaded(f"too many requests wait for the step of pipeline {name}; retry") from None
            except (RayActorError, RayServeException) as error:
                logger.warning("the step of pipeline %s died: %s", name, type(error).__name__)
                if last:
                    raise StepUnavailable(f"the step of pipeline {name} does not answer; retry") from None
            await asyncio.sleep(PAUSE_S)
        raise AssertionError("the last try returns or raises")


async def _answer(response: Any) -> dict[str, NDArray[Any]]:
    try:
        answer: dict[str, NDArray[Any]] = await response
    except asyncio.CancelledError:
        with contextlib.suppress(Exception):  # it may have ended meanwhile
            response.cancel()
        raise
    return answer


def _handle_of(name: str) -> Any:
    return serve.get_deployment_handle(STEP_DEPLOYMENT, app_name=step_app(name))
