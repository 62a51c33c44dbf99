"""Open Inference Protocol v2 (github.com/kserve/open-inference-protocol), with its binary-data extension.

The model's name in the path is a model ref; ``/versions/<n>`` in the path means ``<tenant>@<n>``.
Errors are the protocol's ``{"error": "<message>"}``, with our code and request id beside it, on every path
below ``/v2``: its clients expect a string there. A request for an extension that is not served here is
refused, and the error names it: an answer without it would be a different tensor from the one asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any, Final

import numpy as np
import orjson
from fastapi import FastAPI, Request, Response
from numpy.typing import NDArray

from flatshare.api.error_table import HttpError
from flatshare.api.hot import HotAnswers, HotRoute
from flatshare.api.http import ErrorForm, error_reply, own_form, route_path
from flatshare.api.identity import Identities
from flatshare.api.oip_schemas import (
    HEADER_LENGTH_PARAMETER,
    INFER_BODY,
    INFER_REPLY,
    OIP_ERROR_REPLIES,
    REF_PARAMETER,
    TAG,
    VERSION_PARAMETER,
    InferReply,
    LiveReply,
    ModelMetadata,
    ModelReadyReply,
    ReadyReply,
    ServerReply,
)
from flatshare.codecs.oip import HEADER_LENGTH, input_rows, split_body, wanted_outputs
from flatshare.codecs.tensors import is_ready
from flatshare.models.architecture import Architecture, architecture
from flatshare.replica.request import InferenceService
from flatshare.replica.ticket import Prediction, Rows, Ticket
from flatshare_registry.ids import ModelRef, parse_version
from flatshare_registry.records import VersionRecord

__all__ = [
    "OPEN_PATHS",
    "InferCall",
    "add_oip_routes",
    "error_form",
    "infer_ref",
    "infer_route",
    "is_infer_path",
]

PREFIX: Final = "/v2"
OPEN_PATHS: Final = frozenset({PREFIX, f"{PREFIX}/health/live", f"{PREFIX}/health/ready"})
"""Answered without a key."""


class InferCall:
    """One inference request: the rows of its one input, and the outputs that it wants.

    Parameters
    ----------
    headers_of
        Makes a prediction's reply headers, which name tenant, version and replica.
    """

    def __init__(
        self,
        headers: Mapping[str, str],
        body: bytes,
        ref: ModelRef,
        headers_of: Callable[[Prediction], dict[str, str]],
    ) -> None:
        self._headers = headers
        self._body = body
        self._ref = ref
        self._headers_of = headers_of
        self._document: dict[str, Any] = {}

    def rows(self, network: Architecture, most: int) -> Rows:
        """Rows of the input. Raises ``BadInput`` and ``TooLarge``."""
        ready = is_ready(self._headers)
        self._document, binary = split_body(self._body, self._headers.get(HEADER_LENGTH), network, most)
        return input_rows(self._document, binary, network, most, ready=ready)

    def reply(self, prediction: Prediction) -> Response:
        """The outputs that were asked for. Raises ``BadInput`` when there is no such output."""
        return _reply(prediction, self._document, str(self._ref), self._headers_of(prediction))


def infer_route(headers_of: Callable[[Prediction], dict[str, str]]) -> HotRoute:
    """The protocol's hot route."""

    def call(headers: Mapping[str, str], body: bytes, ref: ModelRef) -> InferCall:
        return InferCall(headers, body, ref, headers_of)

    return HotRoute(lambda headers, path: infer_ref(path), call, _protocol_form)


def infer_ref(path: str) -> ModelRef:
    """The model that an infer route's path names: ``/v2/models/<ref>[/versions/<n>]/infer``.

    Raises
    ------
    InvalidRef
        It is no model ref.
    """
    _, _, _, ref, *rest = path.split("/")
    return _ref_of_version(ref, rest[1] if rest[0] == "versions" else None)


def is_infer_path(path: str) -> bool:
    """Whether a path is that of an infer route, whatever the model."""
    parts = path.split("/")
    return (
        path.startswith(f"{PREFIX}/models/")
        and parts[-1] == "infer"
        and (len(parts) == 5 or (len(parts) == 7 and parts[4] == "versions"))
    )


def add_oip_routes(
    app: FastAPI, service: InferenceService, identities: Identities, hot: HotAnswers, route: HotRoute
) -> None:
    """Add the protocol's routes to the data plane.

    Parameters
    ----------
    hot, route
        What answers the infer route, and the infer route itself.
    """

    @app.get("/v2", operation_id="oip_server", tags=[TAG])
    async def server() -> ServerReply:
        """Server metadata."""
        return ServerReply(version=version("flatshare"))

    @app.get("/v2/health/live", operation_id="oip_live", tags=[TAG])
    async def live() -> LiveReply:
        """The replica answers."""
        return LiveReply()

    @app.get("/v2/health/ready", operation_id="oip_ready", tags=[TAG])
    async def ready() -> ReadyReply:
        """The replica can answer for models."""
        return ReadyReply()

    async def enter(request: Request) -> Ticket:
        caller = await identities.identify(request.headers)
        return await service.enter(caller, _ref(request))

    async def described(request: Request) -> tuple[ModelRef, VersionRecord]:
        with await enter(request) as ticket:
            return ticket.ref, await service.describe(ticket)

    async def metadata(request: Request) -> Response:
        """A model's inputs and outputs; loads nothing."""
        try:
            ref, version = await described(request)
            return Response(orjson.dumps(_metadata(ref, version)), media_type="application/json")
        except Exception as error:  # in the protocol's form, whatever it is
            return _error(request, error)

    async def model_ready(request: Request) -> Response:
        """Whether the model can be asked for; it is loaded when it is."""
        try:
            ref, _ = await described(request)
            body = {"name": str(ref), "ready": True}
            return Response(orjson.dumps(body), media_type="application/json")
        except Exception as error:
            return _error(request, error)

    async def infer(request: Request) -> Response:
        """Predict: JSON tensors, or binary ones after the JSON."""
        try:
            return await hot.answer(route, request)
        except Exception as error:
            return _error(request, error)

    # The handlers take the raw request, so FastAPI is told of parameters and bodies.
    for prefix, suffix, parameters in (
        ("/v2/models/{ref}", "", [REF_PARAMETER]),
        ("/v2/models/{ref}/versions/{version}", "_of_version", [REF_PARAMETER, VERSION_PARAMETER]),
    ):
        plain = {"parameters": parameters}
        binary = {"parameters": [*parameters, HEADER_LENGTH_PARAMETER], "requestBody": INFER_BODY}
        app.get(
            prefix, operation_id=f"oip_metadata{suffix}", tags=[TAG], openapi_extra=plain,
            response_model=ModelMetadata, responses=OIP_ERROR_REPLIES,
        )(metadata)  # fmt: skip
        app.get(
            f"{prefix}/ready", operation_id=f"oip_model_ready{suffix}", tags=[TAG], openapi_extra=plain,
            response_model=ModelReadyReply, responses=OIP_ERROR_REPLIES,
        )(model_ready)  # fmt: skip
        app.post(
            f"{prefix}/infer", operation_id=f"oip_infer{suffix}", tags=[TAG], openapi_extra=binary,
            response_model=InferReply, responses={200: INFER_REPLY, **OIP_ERROR_REPLIES},
        )(infer)  # fmt: skip


def error_form(request: Request) -> ErrorForm:
    """The form that errors have on a request's path: the protocol's below ``/v2``."""
    path = route_path(request.scope)
    return _protocol_form if path == PREFIX or path.startswith(f"{PREFIX}/") else own_form


def _ref(request: Request) -> ModelRef:
    return _ref_of_version(request.path_params["ref"], request.path_params.get("version"))


def _ref_of_version(text: str, version: str | None) -> ModelRef:
    ref = ModelRef.parse(text)
    return ref if version is None else ModelRef(ref.tenant, parse_version(version))


def _metadata(ref: ModelRef, version: VersionRecord) -> dict[str, Any]:
    network = architecture(version.architecture)
    return {
        "name": str(ref),
        "versions": [str(version.version)],
        "platform": network.name,
        "inputs": [{"name": network.input.name, "datatype": "FP32", "shape": [-1, *network.input.shape]}],
        "outputs": [
            {"name": "logits", "datatype": "FP32", "shape": [-1, network.classes]},
            {"name": "predicted_label", "datatype": "INT64", "shape": [-1]},
        ],
    }


def _reply(prediction: Prediction, document: dict[str, Any], name: str, headers: dict[str, str]) -> Response:
    values: dict[str, tuple[str, NDArray[Any]]] = {
        "logits": ("FP32", np.ascontiguousarray(prediction.logits, dtype="<f4")),
        "predicted_label": ("INT64", np.ascontiguousarray(prediction.labels, dtype="<i8")),
    }
    outputs: list[dict[str, Any]] = []
    blobs: list[bytes] = []
    for output, binary in wanted_outputs(document):
        datatype, array = values[output]
        described: dict[str, Any] = {"name": output, "datatype": datatype, "shape": list(array.shape)}
        if binary:
            blobs.append(array.tobytes())
            described["parameters"] = {"binary_data_size": len(blobs[-1])}
        else:
            described["data"] = array.ravel().tolist()
        outputs.append(described)
    reply: dict[str, Any] = {
        "model_name": name,
        "model_version": str(prediction.version.version),
        "outputs": outputs,
    }
    if isinstance(document.get("id"), str):
        reply["id"] = document["id"][:256]
    text = orjson.dumps(reply)
    if not blobs:
        return Response(text, headers=headers, media_type="application/json")
    headers = {**headers, HEADER_LENGTH: str(len(text))}
    return Response(text + b"".join(blobs), headers=headers, media_type="application/octet-stream")


def _error(request: Request, error: Exception) -> Response:
    return error_reply(request, error, _protocol_form)


def _protocol_form(error: HttpError, request_id: str) -> dict[str, Any]:
    """``error`` is a string."""
    return {"error": error.message, "code": error.code, "request_id": request_id}
