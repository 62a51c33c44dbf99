"""The data plane: routes over an :class:`InferenceService`.

The hot routes take the raw request and return a ready response: FastAPI documents them, but
neither parses their bodies nor serialises their replies.
"""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from typing import Any, Final

import orjson
from fastapi import FastAPI, Request, Response
from starlette.responses import StreamingResponse

from flatshare.api.bodies import BodyReader, files_of, media_type_of
from flatshare.api.decoding import DecodeRoom
from flatshare.api.hot import HotAnswers, HotRoute, HotRoutes, RawHeaders
from flatshare.api.http import (
    ERROR_REPLIES,
    REQUEST_ID_HEADER,
    Incoming,
    PlainResponse,
    encoding_of,
    install_error_handlers,
    request_id_of,
)
from flatshare.api.identity import Identities
from flatshare.api.local_only import LocalOnly
from flatshare.api.oip import OPEN_PATHS, add_oip_routes, error_form, infer_route, is_infer_path
from flatshare.api.oip_schemas import InferRequest
from flatshare.api.openapi import documented
from flatshare.api.pipelines import NoPipelines, Pipelines, add_pipeline_routes
from flatshare.api.schemas import MODEL_ID_HEADER, PredictReply, PredictRequest
from flatshare.api.stream import LinesResponse, lines_of
from flatshare.api.stream import answers as answers_of
from flatshare.api.tasks import (
    CALLBACK_HEADER,
    INPUT_HEADER,
    PIN_HEADER,
    PINNED,
    TASK_PATH_HEADER,
    Tasks,
    add_task_routes,
)
from flatshare.codecs.images import decode_images
from flatshare.codecs.payload import READY, READY_HEADER, decode_json, decode_pixels
from flatshare.codecs.tensors import DTYPE_HEADER, SHAPE_HEADER, decode_npy, decode_octets, is_ready
from flatshare.errors import BadInput
from flatshare.models.architecture import Architecture
from flatshare.replica.request import InferenceService
from flatshare.replica.ticket import Prediction, Rows, Ticket
from flatshare.telemetry.tracing import line_trace
from flatshare_registry.ids import ModelRef

__all__ = ["create_app"]

_ABOUT: Final = """Many customers, one pool of replicas. Name your model in the
`serve_multiplexed_model_id` header: `acme` (what is in production), `acme:canary`, or `acme@7`."""

NDJSON: Final = "application/x-ndjson"

_BINARY: Final = {"schema": {"type": "string", "format": "binary"}}

_STREAM_BODY: Final = {
    "schema": {"type": "string", "description": "A JSON object of /predict a line."},
    "example": '{"image": [[0.0, 0.0]]}\n',
}
_STREAM_REPLY: Final = {
    "description": "A line for each line, as it is ready: its index, and what /predict answers or an error.",
    "content": {
        NDJSON: {
            "schema": {"type": "string"},
            "example": '{"index": 0, "predicted_label": [7], "version": 1, "tier": "device"}\n',
        }
    },
}


def create_app(
    service: InferenceService,
    identities: Identities,
    *,
    replica: str,
    max_body_bytes: int,
    max_rows: int,
    room: DecodeRoom | None = None,
    pipelines: Pipelines | None = None,
    tasks: Tasks | None = None,
    traced: bool = False,
) -> HotRoutes:
    """Build the data plane of one replica, an ASGI app.

    Parameters
    ----------
    identities
        Tells who calls.
    room
        Where long bodies are decoded; one of its own by default.
    replica
        Named in the ``x-flatshare-replica`` reply header.
    max_body_bytes, max_rows
        Limits of one request; beyond them 413.
    pipelines
        Served beside it; none by default.
    tasks
        Where requests are taken to be answered later; None: nowhere.
    traced
        Whether requests that are sampled leave spans.
    """
    # Behind TLS a trailing-slash redirect would name http://, and the client would send its key in clear.
    app = FastAPI(
        title="flatshare",
        description=_ABOUT,
        version="1",
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
    )
    install_error_handlers(app, error_form)
    decoding = room or DecodeRoom()
    bodies = BodyReader(decoding, max_body_bytes)

    answers = HotAnswers(
        service, identities, bodies, decoding, max_body_bytes=max_body_bytes, max_rows=max_rows
    )
    predict = HotRoute(ref_of, lambda headers, body, ref: PredictCall(headers, body, replica))
    infer = infer_route(lambda prediction: _headers_of(prediction, replica))

    async def enter(request: Incoming) -> Ticket:
        """Identify the caller, parse the ref and admit the request, before a byte of the body is read."""
        caller = await identities.identify(request.headers)
        return await service.enter(caller, ref_of(request.scope["headers"]))

    async def documented_only(request: Request) -> Response:
        return await answers.answer(predict, request)  # FastAPI wants its own class in the signature

    described: dict[str, Any] = {
        "response_model": PredictReply,
        "responses": {200: {"headers": _reply_headers()}, **ERROR_REPLIES},
    }
    body_of_predict = {
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": {"$ref": "#/components/schemas/PredictRequest"}},
                "application/octet-stream": _BINARY,
                "application/x-npy": _BINARY,
            },
        },
        "parameters": [
            _model_id_parameter(),
            _request_id_parameter(),
            _header_parameter(
                DTYPE_HEADER, "Of an octet-stream: uint8 pixels (default) or float32.", "float32"
            ),
            _header_parameter(SHAPE_HEADER, "Of an octet-stream: its shape.", "64,1,28,28"),
            _header_parameter(
                READY_HEADER, "Numbers that look like raw pixels are what the model wants.", READY
            ),
        ],
    }
    for path, name in (("/predict", "predict"), ("/", "predict_at_root")):
        app.post(path, operation_id=name, openapi_extra=body_of_predict, **described)(documented_only)

    @app.post(
        "/classify",
        operation_id="classify",
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {
                    "image/png": _BINARY,
                    "image/jpeg": _BINARY,
                    "application/octet-stream": _BINARY,
                    "multipart/form-data": {
                        "schema": {
                            "type": "object",
                            "properties": {"image": {"type": "array", "items": _BINARY["schema"]}},
                        }
                    },
                },
            },
            "parameters": [_model_id_parameter(), _request_id_parameter()],
        },
        **described,
    )
    async def classify(request: Request) -> Response:
        """Classify images: one PNG or JPEG file, several as multipart/form-data, or raw uint8 pixels."""
        kind = media_type_of(request.headers)
        if kind not in ("image/png", "image/jpeg", "multipart/form-data", "application/octet-stream"):
            raise BadInput(
                "Content-Type must be image/png, image/jpeg, multipart/form-data "
                "or application/octet-stream (raw pixels)"
            )
        with await enter(request) as ticket:
            body = await bodies.read(request, ticket)
            headers = request.headers

            def decode(network: Architecture) -> Rows | Awaitable[Rows]:
                def pixels(most: int) -> Rows:
                    return decode_pixels(body, network, most)

                def images() -> Rows:
                    several = kind == "multipart/form-data"
                    files = files_of(headers, body, max_rows) if several else [body]
                    return ticket.decode(max_rows, lambda most: decode_images(files, network, most))

                tenant = ticket.ref.tenant
                if kind == "application/octet-stream":
                    return decoding.here_or_there(tenant, len(body), lambda: ticket.decode(max_rows, pixels))
                return decoding.run(tenant, images)

            response = _reply(await service.predict(ticket, decode), replica)
            ticket.trace.lap("encode")
            return response

    @app.post(
        "/predict/stream",
        operation_id="predict_stream",
        response_class=StreamingResponse,
        responses={200: _STREAM_REPLY, **ERROR_REPLIES},
        openapi_extra={
            "requestBody": {"required": True, "content": {NDJSON: _STREAM_BODY}},
            "parameters": [_model_id_parameter(), _request_id_parameter()],
        },
    )
    async def stream(request: Request) -> LinesResponse:
        """Many requests in one: a JSON object a line in, a line out for each as it is ready."""
        encoding_of(request)
        ready = is_ready(request.headers)
        stream_ticket = await enter(request)  # held until the stream has ended
        limit = min(max_body_bytes, stream_ticket.limits.body_bytes or max_body_bytes)

        async def predict_line(line: bytes) -> Prediction:
            # Each line is a request: a key that is revoked ends the stream, a full quota slows it down.
            caller = await identities.identify(request.headers)
            with (
                line_trace("line"),
                await service.enter(caller, stream_ticket.ref, within=stream_ticket) as ticket,
            ):
                ticket.hold_bytes(len(line))

                def decode(network: Architecture) -> Rows | Awaitable[Rows]:
                    def rows(most: int) -> Rows:
                        return decode_json(line, network.input, most, ready=ready)

                    return decoding.here_or_there(
                        ticket.ref.tenant, len(line), lambda: ticket.decode(max_rows, rows)
                    )

                return await service.predict(ticket, decode)

        lines = lines_of(request.stream(), limit, stream_ticket.hold_bytes)
        return LinesResponse(
            answers_of(
                lines,
                predict_line,
                request_id_of(request.headers),
                lambda: service.another_place(stream_ticket),
            ),
            stream_ticket,
            media_type=NDJSON,
        )

    add_pipeline_routes(
        app, service, identities, pipelines or NoPipelines(), enter,
        lambda prediction: _reply(prediction, replica), bodies, decoding,
        max_rows=max_rows, described=described, parameters=[_model_id_parameter(), _request_id_parameter()],
    )  # fmt: skip
    add_task_routes(
        app, service, identities, tasks, enter,
        BodyReader(decoding, tasks.max_body_bytes) if tasks is not None else bodies,
        max_body_bytes=max_body_bytes, parameters=[
            _model_id_parameter(), _request_id_parameter(),
            _header_parameter(TASK_PATH_HEADER, "Which route the task is for.", "/predict"),
            _header_parameter(PIN_HEADER, "The version that the ref means now answers.", PINNED),
            _header_parameter(INPUT_HEADER, "An input that the store holds; no body.", "digits.npy"),
            _header_parameter(
                CALLBACK_HEADER, "Told of the task's end, where the operator allows its host.",
                "https://hooks.acme.com/done",
            ),
        ],
    )  # fmt: skip
    add_oip_routes(app, service, identities, answers, infer)
    documented(app, open_paths=OPEN_PATHS, bodies=[PredictRequest, InferRequest])
    # For the hot routes ``identities`` makes the same check. Some of the other routes need no key.
    others = LocalOnly(app, error_form) if identities.off else app
    return HotRoutes(
        others,
        answers,
        {"/predict": predict, "/": predict},
        lambda path: infer if is_infer_path(path) else None,
        service.usage.replied,
        traced,
    )


class PredictCall:
    """One prediction: rows of JSON, npy or octets, and their labels as JSON."""

    __slots__ = ("_body", "_headers", "_replica")

    def __init__(self, headers: Mapping[str, str], body: bytes, replica: str) -> None:
        self._headers = headers
        self._body = body
        self._replica = replica

    def rows(self, network: Architecture, most: int) -> Rows:
        """Rows of the body, by its media type. Raises ``BadInput`` and ``TooLarge``."""
        kind = media_type_of(self._headers)
        ready = is_ready(self._headers)
        if kind == "application/octet-stream":
            return decode_octets(self._body, self._headers, network, most)
        if kind == "application/x-npy":
            return decode_npy(self._body, network, most, ready=ready)
        return decode_json(self._body, network.input, most, ready=ready)

    def reply(self, prediction: Prediction) -> Response:
        """The labels."""
        return _reply(prediction, self._replica)


_MODEL_ID: Final = MODEL_ID_HEADER.encode()
_MODEL_ID_WITH_DASHES: Final = _MODEL_ID.replace(b"_", b"-")


def ref_of(headers: RawHeaders, path: str = "") -> ModelRef:
    """The model ref in the header; ``-`` and ``_`` are the same there, as in Ray Serve.

    Raises
    ------
    BadInput
        The header is missing, or is there twice.
    InvalidRef
        It is not a model ref.
    """
    found = [value for name, value in headers if name == _MODEL_ID] or [
        value for name, value in headers if name == _MODEL_ID_WITH_DASHES
    ]
    if len(found) != 1:
        raise BadInput(
            f"name one model in the {MODEL_ID_HEADER} header: acme, acme:canary or acme@7; behind a proxy "
            f"that drops names with underscores (nginx does), write {MODEL_ID_HEADER.replace('_', '-')}"
        )
    return ModelRef.parse(found[0].decode("latin-1"))


def _reply(prediction: Prediction, replica: str) -> Response:
    return PlainResponse(
        orjson.dumps({"predicted_label": prediction.label_list()}),
        _headers_of(prediction, replica),
        "application/json",
    )


def _headers_of(prediction: Prediction, replica: str) -> dict[str, str]:
    version = prediction.version
    return {
        "x-flatshare-tenant": version.tenant,
        "x-flatshare-version": str(version.version),
        "x-flatshare-digest": version.digest,
        "x-flatshare-tier": prediction.tier.value,
        "x-flatshare-replica": replica,
    }


def _reply_headers() -> dict[str, Any]:
    about = {
        "x-flatshare-tenant": "Whose model answered.",
        "x-flatshare-version": "Which of its versions.",
        "x-flatshare-digest": "sha256 of the weights that answered.",
        "x-flatshare-tier": "Where they were found: device, host, peer (another node's files) or store.",
        "x-flatshare-replica": "Which replica answered.",
        REQUEST_ID_HEADER: "The request's id: yours if it is safe, else a new one.",
    }
    return {name: {"description": text, "schema": {"type": "string"}} for name, text in about.items()}


def _header_parameter(name: str, description: str, example: str) -> dict[str, Any]:
    schema = {"type": "string"}
    return {"name": name, "in": "header", "description": description, "schema": schema, "example": example}


def _request_id_parameter() -> dict[str, Any]:
    about = "Yours, to find the request again: 1 to 64 of letters, digits and ._:-"
    return _header_parameter(REQUEST_ID_HEADER, about, "01JD8ZQ6E4W7YB1R2N9K3M5T0V")


def _model_id_parameter() -> dict[str, Any]:
    return {
        "name": MODEL_ID_HEADER,
        "in": "header",
        "required": True,
        "description": "Model ref: tenant, tenant:alias or tenant@version.",
        "schema": {"type": "string"},
        "example": "acme",
    }
