"""The routes of pipelines: a step of its own resources, then the model, as one request."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, Protocol

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, Field

from flatshare.api.bodies import BodyReader, media_type_of
from flatshare.api.decoding import DecodeRoom
from flatshare.api.http import ERROR_REPLIES, Incoming, request_id_of
from flatshare.api.identity import Identities
from flatshare.codecs.payload import decode_array
from flatshare.errors import BadInput, NoSuchPipeline, StepFailed
from flatshare.models.architecture import Architecture
from flatshare.replica.request import InferenceService
from flatshare.replica.ticket import Prediction, Rows, Ticket

__all__ = ["NoPipelines", "Pipelines", "PipelinesReply", "add_pipeline_routes"]

NO_JSON: Final = frozenset({
    "application/octet-stream", "application/x-npy", "image/png", "image/jpeg", "multipart/form-data",
})  # fmt: skip
"""Types that other routes take. Any other is read as JSON, as on ``/predict``: ``curl -d`` names a form."""


class Pipelines(Protocol):
    """The pipelines that are served beside this pool."""

    @property
    def names(self) -> Sequence[str]:
        """Their names."""
        ...

    def check(self, name: str) -> None:
        """Return if there is one of this name; raises ``NoSuchPipeline``."""
        ...

    async def arrays(self, name: str, body: bytes, request_id: str, tenant: str) -> Mapping[str, Any]:
        """Run a pipeline's step on a body; its arrays by name.

        Raises
        ------
        BadInput, StepFailed, StepUnavailable, Overloaded
            As the step says, or because the step does not answer.
        """
        ...


class NoPipelines:
    """None at all."""

    names: Sequence[str] = ()

    def check(self, name: str) -> None:
        """See :meth:`Pipelines.check`."""
        raise NoSuchPipeline(f"there is no pipeline {name[:80]!a}; none is served here")

    async def arrays(self, name: str, body: bytes, request_id: str, tenant: str) -> Mapping[str, Any]:
        """See :meth:`Pipelines.arrays`."""
        self.check(name)
        raise AssertionError("there is none")


class PipelinesReply(BaseModel):
    """The pipelines that are served."""

    pipelines: list[str] = Field(description="Names; `POST /pipelines/<name>` calls one.")


def add_pipeline_routes(
    app: FastAPI,
    service: InferenceService,
    identities: Identities,
    pipelines: Pipelines,
    enter: Callable[[Incoming], Awaitable[Ticket]],
    reply: Callable[[Prediction], Response],
    bodies: BodyReader,
    decoding: DecodeRoom,
    *,
    max_rows: int,
    described: dict[str, Any],
    parameters: list[dict[str, Any]],
) -> None:
    """Add ``GET /pipelines`` and ``POST /pipelines/{name}``.

    Parameters
    ----------
    enter
        Lets a request in, before its body is read.
    reply
        What ``/predict`` answers.
    described, parameters
        What OpenAPI says of that answer and of headers.
    """

    @app.get("/pipelines", operation_id="list_pipelines", tags=["pipelines"], responses={**ERROR_REPLIES})
    async def names(request: Request) -> PipelinesReply:
        """The pipelines that are served here; for everybody with a key."""
        await identities.identify(request.headers)
        return PipelinesReply(pipelines=list(pipelines.names))

    @app.post(
        "/pipelines/{name}",
        operation_id="run_pipeline",
        tags=["pipelines"],
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {
                    "application/json": {"schema": {"type": "object"}, "example": {"image": [[[0, 255]]]}}
                },
            },
            "parameters": parameters,
        },
        **described,
    )
    async def run(name: str, request: Request) -> Response:
        """Run a pipeline's step on a JSON object, then the model on what the step made of it."""
        if media_type_of(request.headers) in NO_JSON:
            raise BadInput("a pipeline takes JSON: Content-Type must be application/json")
        with await enter(request) as ticket:
            pipelines.check(name)  # only after admission: others need not know which pipelines exist
            body = await bodies.read(request, ticket)
            tenant = ticket.ref.tenant

            async def decode(network: Architecture) -> Rows:
                made = await pipelines.arrays(name, body, request_id_of(request.headers), tenant)
                if network.input.name not in made:
                    raise StepFailed(
                        f'the step of pipeline {name} made no "{network.input.name}", which the model takes'
                    )
                array = made[network.input.name]
                ticket.under_way.hold_more(array.nbytes)
                rows = decoding.here_or_there(
                    tenant,
                    array.nbytes,
                    lambda: ticket.decode(
                        max_rows, lambda most: decode_array(array, network.input, most, ready=True)
                    ),
                )
                return await rows if isinstance(rows, Awaitable) else rows

            response = reply(await service.predict(ticket, decode))
            ticket.trace.lap("encode")
            return response
