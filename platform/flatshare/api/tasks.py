"""The routes of asynchronous requests: taken at once, answered later, asked for by id.

Whoever may predict for a tenant may send, see and cancel its tasks; replay and drop them, too.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from functools import partial
from typing import Annotated, Any, Final, Self, TypeVar

import orjson
from fastapi import FastAPI, Header, Query, Request, Response
from pydantic import BaseModel, Field

from flatshare.api.bodies import BodyReader, media_type_of
from flatshare.api.http import ERROR_REPLIES, Incoming
from flatshare.api.identity import Caller, Identities
from flatshare.callback_rules import CallbackRules
from flatshare.codecs.payload import READY_HEADER
from flatshare.codecs.tensors import DTYPE_HEADER, SHAPE_HEADER
from flatshare.errors import BadInput, NoTasks, TooLarge
from flatshare.replica.request import InferenceService
from flatshare.replica.ticket import Ticket
from flatshare.tasks.inputs import StoredBody
from flatshare.tasks.queues import TaskQueue
from flatshare.tasks.records import CallbackState, TaskId, TaskRecord, TaskState
from flatshare.tasks.store import TaskStore
from flatshare.telemetry.tracing import sent_on
from flatshare.threads import in_thread
from flatshare_registry.errors import NotFound, Unavailable
from flatshare_registry.ids import ModelRef, TenantId
from flatshare_registry.records import Scope

__all__ = [
    "CALLBACK_HEADER", "INPUT_HEADER", "PINNED", "PIN_HEADER", "TASK_PATH_HEADER", "TaskReply", "Tasks",
    "add_task_routes",
]  # fmt: skip

logger = logging.getLogger("flatshare.api")

T = TypeVar("T")

THREADS: Final = 4
"""Calls to the store, or the queue, of one replica's task routes at a time."""

TASK_PATH_HEADER: Final = "x-task-path"
"""Which route the task is for; ``/predict`` where it is missing."""

INPUT_HEADER: Final = "x-task-input"
"""An input that the store holds already, instead of a body."""

CALLBACK_HEADER: Final = "x-task-callback"
"""A URL that is told of the task's end, by a message that the sender's key signs."""

PIN_HEADER: Final = "x-task-version"
PINNED: Final = "pinned"
"""Says that the task uses the version which the ref means now, whatever it means when the task runs."""

_KEPT_HEADERS: Final = ("content-type", DTYPE_HEADER, SHAPE_HEADER, READY_HEADER)
_BINARY_KINDS: Final = ("application/octet-stream", "application/x-npy", "image/png", "image/jpeg")
_BINARY: Final = {"schema": {"type": "string", "format": "binary"}}


class Tasks:
    """What the routes need: where tasks are kept, and where they wait.

    Parameters
    ----------
    callbacks
        Where messages of their ends may go.
    max_body_bytes
        Longest input of a task.
    """

    def __init__(
        self,
        store: TaskStore,
        queue: TaskQueue,
        callbacks: CallbackRules | None = None,
        max_body_bytes: int = 64 * 1024**2,
    ) -> None:
        self.store = store
        self.queue = queue
        self.callbacks = callbacks or CallbackRules()
        self.max_body_bytes = max_body_bytes
        # A pool of its own: a flood of requests for tasks delays other such requests, and nothing else.
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="tasks")

    async def run(self, work: Callable[..., T], *arguments: Any) -> T:
        """Run a blocking call in a thread; returns its result."""
        return await in_thread(self._threads, partial(work, *arguments))

    async def put(self, task: TaskId) -> None:
        """Queue a task that is stored by now; if the queue does not take it, the keeper finds it."""
        try:
            await self.run(self.queue.put, task)
        except Unavailable as error:
            logger.warning("task %s: %s", task, error.message)


class CallbackReply(BaseModel):
    """The message of a task's end."""

    url: str
    state: CallbackState
    attempts: int
    error: str | None = Field(None, description="Why the last one was not taken.")


class TaskReply(BaseModel):
    """A task."""

    id: str
    state: TaskState
    path: str
    model: str = Field(
        description="The ref that it names; its version is resolved when it runs, or was pinned."
    )
    created_at: datetime
    updated_at: datetime
    expires_at: datetime = Field(description="Afterwards it may be removed, if it has ended.")
    attempts: int = Field(description="Runs that were begun; a process that died ends one, too.")
    error: str | None = Field(None, description="Why it has no answer, or had none at the last try.")
    code: str | None = None
    status: int | None = Field(None, description="Of the answer, once it is done.")
    version: int | None = Field(None, description="The version that answered.")
    digest: str | None = Field(None, description="Of its weights.")
    result: Any | None = Field(None, description="The answer, if it is JSON; else see `result_url`.")
    result_url: str | None = None
    callback: CallbackReply | None = None

    @classmethod
    def of(cls, record: TaskRecord) -> Self:
        """From its record, without the answer's body."""
        answer, told = record.answer, record.callback
        return cls(
            id=record.id, state=record.state, path=record.input.path, model=record.pinned or record.input.ref,
            created_at=record.created_at, updated_at=record.updated_at, expires_at=record.expires_at,
            attempts=record.attempts, error=record.error, code=record.code,
            status=answer.status if answer else None, version=answer.version if answer else None,
            digest=answer.digest if answer else None,
            result=None, result_url=f"/tasks/{record.id}/result" if answer else None,
            callback=CallbackReply(
                url=told.url, state=told.state, attempts=told.attempts, error=told.error
            ) if told else None,
        )  # fmt: skip


class TasksReply(BaseModel):
    """A page of tasks, newest first."""

    tasks: list[TaskReply]
    next: str | None = Field(description="Ask for those `before` this; null: there are no more.")


def add_task_routes(
    app: FastAPI,
    service: InferenceService,
    identities: Identities,
    tasks: Tasks | None,
    enter: Callable[[Incoming], Awaitable[Ticket]],
    bodies: BodyReader,
    *,
    max_body_bytes: int,
    parameters: list[dict[str, Any]],
) -> None:
    """Add the routes below ``/tasks``.

    Parameters
    ----------
    tasks
        None: no task is taken here.
    max_body_bytes
        Longest JSON body: parsing it holds the interpreter. Other bodies have the limit of ``tasks``.
    enter
        Lets a request in, before its body is read. A task counts for its tenant's rate when it is taken, and
        each time that it runs.
    """

    def known() -> Tasks:
        if tasks is None:
            raise NoTasks("no tasks are taken here; FLATSHARE_TASKS turns them on")
        return tasks

    async def admitted(caller: Caller, tenant: TenantId) -> contextlib.AbstractContextManager[object]:
        """Admit a caller to a tenant's tasks. Operators may in any state of it, and use none of its rate."""
        ref = ModelRef.parse(tenant)
        if caller.tenant is None:
            caller.may(tenant, Scope.PREDICT)
            service.check_fence(ref)
            return contextlib.nullcontext()
        return await service.enter(caller, ref)

    async def own(request: Request, text: str) -> TaskId:
        """Check that a task id is the caller's; each question counts against the tenant's rate."""
        caller = await identities.identify(request.headers)
        try:
            task = TaskId.parse(text)
        except Exception:
            raise NotFound(f"there is no task {text[:100]!a}") from None
        try:
            with await admitted(caller, task.tenant):
                return task
        except NotFound:
            raise NotFound(f"there is no task {text}") from None

    @app.post(
        "/tasks", operation_id="create_task", tags=["tasks"], status_code=202, response_model=TaskReply,
        responses={**ERROR_REPLIES},
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {
                    "application/json": {"schema": {"type": "object"}},
                    **dict.fromkeys(_BINARY_KINDS, _BINARY),
                },
            },
            "parameters": parameters,
        },
    )  # fmt: skip
    async def create(
        request: Request,
        idempotency_key: Annotated[
            str | None,
            Header(
                alias="Idempotency-Key",
                min_length=1,
                max_length=255,
                description="Makes one task, however often it is sent.",
            ),
        ] = None,
    ) -> Response:
        """Take a request, to be answered later: any body of `/predict`, `/classify` or a pipeline.

        `/predict` with `Prefer: respond-async` does the same, through the edge.
        """
        place = known()
        path = request.headers.get(TASK_PATH_HEADER, "/predict")
        if path not in ("/predict", "/classify") and not path.startswith("/pipelines/"):
            raise BadInput(f"{TASK_PATH_HEADER} is /predict, /classify or /pipelines/<name>")
        caller = await identities.identify(request.headers)
        callback = request.headers.get(CALLBACK_HEADER)
        if callback is not None:
            place.callbacks.check(callback)
            if _key_of(caller) is None:
                raise BadInput("a callback is signed with a tenant's key: send the task with one")
        with await enter(request) as ticket:
            tenant = ticket.ref.tenant
            await place.run(place.queue.check_room, tenant)
            stored = request.headers.get(INPUT_HEADER)
            body: bytes | StoredBody = await bodies.read(request, ticket)
            if stored is not None:
                if body:
                    raise BadInput(f"{INPUT_HEADER} names an input: send no body with it")
                body = await place.run(place.store.inputs.find, tenant, stored, place.max_body_bytes)
            headers = {name: request.headers[name] for name in _KEPT_HEADERS if name in request.headers}
            headers.setdefault("content-type", "application/json")
            size = len(body) if isinstance(body, bytes) else body.size_bytes
            if size > max_body_bytes and media_type_of(headers) not in _BINARY_KINDS:
                raise TooLarge(
                    f"a body of more than {max_body_bytes} bytes is one of {', '.join(_BINARY_KINDS)}"
                )
            task = TaskId.new(tenant)
            if idempotency_key is not None:
                task = await place.run(place.store.once, tenant, idempotency_key)
            pinned = None
            if request.headers.get(PIN_HEADER) == PINNED and not await place.run(place.store.has, task):
                pinned = (await service.describe(ticket)).name
            service.check_fence(ticket.ref)
            record = await place.run(
                partial(
                    place.store.take,
                    owner_since=ticket.head.created_at, pinned=pinned, callback=callback,
                    traceparent=sent_on() or None,
                ),
                task, path, str(ticket.ref), headers, body, caller.name, _key_of(caller),
            )  # fmt: skip
            try:
                service.check_fence(ticket.ref)
            except NotFound:  # its tenant is being erased, perhaps without what came a moment ago
                await place.run(place.store.forget, task)
                raise
            if not record.state.ended:
                await place.put(task)
        return Response(
            TaskReply.of(record).model_dump_json(exclude_none=True), 202,
            {"location": f"/tasks/{task}", "retry-after": "1"}, "application/json",
        )  # fmt: skip

    @app.get("/tasks", operation_id="list_tasks", tags=["tasks"], responses={**ERROR_REPLIES})
    async def page(
        request: Request,
        tenant: Annotated[str | None, Query(description="For operators: whose.")] = None,
        state: Annotated[
            TaskState | None, Query(description="Only these: `dead` are the dead letters.")
        ] = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        before: Annotated[str, Query(pattern="^([0-9A-HJKMNP-TV-Z]{26})?$")] = "",
    ) -> TasksReply:
        """One's own tasks, newest first."""
        caller = await identities.identify(request.headers)
        if tenant is None and caller.tenant is None:
            raise BadInput("an operator names the tenant: ?tenant=acme")
        whose = TenantId(tenant) if tenant is not None else caller.tenant
        assert whose is not None, "one of them is there"
        with await admitted(caller, whose):
            found, following = await known().run(known().store.list, whose, limit, before, state)
        return TasksReply(tasks=[TaskReply.of(one) for one in found], next=following)

    @app.get("/tasks/{task_id}", operation_id="get_task", tags=["tasks"], responses={**ERROR_REPLIES})
    async def show(task_id: str, request: Request) -> TaskReply:
        """A task: where it is, and its answer once it is done."""
        task = await own(request, task_id)
        record = await known().run(known().store.read, task)
        reply = TaskReply.of(record)
        answer = record.answer
        if answer is not None and answer.content_type.startswith("application/json"):
            reply.result = orjson.loads(await known().run(known().store.answer, task, answer.fence))
        return reply

    @app.get(
        "/tasks/{task_id}/result", operation_id="get_task_result", tags=["tasks"], response_class=Response,
        responses={
            200: {"content": {"application/octet-stream": _BINARY}}, 202: {"model": TaskReply},
            **ERROR_REPLIES,
        },
    )  # fmt: skip
    async def result(task_id: str, request: Request) -> Response:
        """The answer as it was, with its media type; 202 while there is none yet."""
        task = await own(request, task_id)
        record = await known().run(known().store.read, task)
        if not record.state.ended:
            return Response(
                TaskReply.of(record).model_dump_json(exclude_none=True), 202,
                {"retry-after": "1"}, "application/json",
            )  # fmt: skip
        if record.answer is None:
            raise NotFound(f"task {task} has no answer: it is {record.state}")
        body = await known().run(known().store.answer, task, record.answer.fence)
        return Response(body, record.answer.status, media_type=record.answer.content_type)

    @app.post(
        "/tasks/{task_id}/replay", operation_id="replay_task", tags=["tasks"], responses={**ERROR_REPLIES}
    )
    async def replay(task_id: str, request: Request) -> TaskReply:
        """Have a task that is dead or failed tried anew."""
        task = await own(request, task_id)
        await known().run(known().queue.check_room, task.tenant)
        record = await known().run(known().store.replay, task)
        await known().put(task)
        return TaskReply.of(record)

    @app.delete("/tasks/{task_id}", operation_id="cancel_task", tags=["tasks"], responses={**ERROR_REPLIES})
    async def cancel(
        task_id: str,
        request: Request,
        drop: Annotated[bool, Query(description="Also remove it, its input and its answer.")] = False,
    ) -> TaskReply:
        """Cancel a task that has not ended; an answer of a run under way is dropped."""
        task = await own(request, task_id)
        record = await known().run(known().store.cancel, task)
        if drop:
            await known().run(known().store.drop, task)
        return TaskReply.of(record)


def _key_of(caller: Caller) -> str | None:
    """The id of a tenant's key; None for an operator's, and for a token, which nobody can check later."""
    kind, _, name = caller.name.partition(":")
    return name if kind == "key" else None
