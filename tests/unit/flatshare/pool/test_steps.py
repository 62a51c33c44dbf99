"""How a step is asked: again when it died, never when it failed, and taken back from a caller that leaves."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError

from flatshare.errors import BadInput, NoSuchPipeline, Overloaded, StepFailed, StepUnavailable
from flatshare.pool import steps as steps_module
from flatshare.pool.steps import BY_VALUE_BYTES, TRIES, StepRequest, Steps


class Response:
    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.cancelled = False

    def __await__(self) -> Any:
        return self._answer().__await__()

    async def _answer(self) -> Any:
        if isinstance(self.answer, asyncio.Event):
            await self.answer.wait()
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """Stands where a step's handle stands."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.asked: list[StepRequest] = []
        self.responses: list[Response] = []
        self.by_reference = 0
        self.run = self

    def options(self, *, _by_reference: bool) -> Handle:
        self.by_reference += 1
        return self

    def remote(self, request: StepRequest) -> Response:
        self.asked.append(request)
        self.responses.append(Response(self.answers.pop(0)))
        return self.responses[-1]


def task_error(cause: Exception) -> RayTaskError:
    return RayTaskError("run", "Traceback ... /home/secret", cause)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps_module, "PAUSE_S", 0)


async def ask(handle: Handle, body: bytes = b"{}") -> Any:
    return await Steps(["images"], lambda name: handle).arrays("images", body, "r", "acme")


async def test_one_that_died_is_asked_again_and_not_for_ever() -> None:
    made = {"image": np.zeros(1)}
    handle = Handle(ActorDiedError(), made)
    assert await ask(handle) is made
    assert handle.asked == [StepRequest(b"{}", "r", "acme")] * 2
    handle = Handle(*[ActorDiedError() for _ in range(TRIES + 1)])
    with pytest.raises(StepUnavailable):
        await ask(handle)
    assert len(handle.asked) == TRIES


async def test_one_that_failed_is_not_asked_again_and_its_words_stay_inside() -> None:
    for error, raised in ((BadInput("no image"), BadInput), (ValueError("/home/secret"), StepFailed)):
        handle = Handle(task_error(error))
        with pytest.raises(raised) as caught:
            await ask(handle)
        assert len(handle.asked) == 1 and "secret" not in str(caught.value)


async def test_a_full_step_is_told_of() -> None:
    with pytest.raises(Overloaded):
        await ask(Handle(BackPressureError(num_queued_requests=1, max_queued_requests=1)))


async def test_long_bodies_go_by_reference() -> None:
    handle = Handle({}, {})
    await ask(handle, bytes(BY_VALUE_BYTES))
    assert handle.by_reference == 0
    await ask(handle, bytes(BY_VALUE_BYTES + 1))
    assert handle.by_reference == 1


async def test_a_caller_that_leaves_takes_its_call_back() -> None:
    handle = Handle(asyncio.Event())
    asking = asyncio.create_task(ask(handle))
    while not handle.responses:
        await asyncio.sleep(0)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert handle.responses[0].cancelled


async def test_what_is_not_served_is_not_asked() -> None:
    with pytest.raises(NoSuchPipeline, match=r"'other'.*'images'"):
        Steps(["images"]).check("other")
