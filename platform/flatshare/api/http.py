"""What both planes share of HTTP: request ids, capped bodies, error replies."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Mapping
from typing import Any, Final, Protocol

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.types import Scope

from flatshare.api.error_table import HttpError, describe_error
from flatshare.api.schemas import ErrorReply
from flatshare.codecs.numbers import whole_number
from flatshare.errors import (
    BadInput,
    BodyOverQuota,
    ServeError,
    TooLarge,
    TooSlow,
    UnsupportedEncoding,
)
from flatshare_registry.errors import RegistryError
from flatshare_registry.records import new_ulid

__all__ = [
    "CODE_HEADER",
    "ERROR_REPLIES",
    "ErrorForm",
    "Incoming",
    "PlainResponse",
    "WithHeaders",
    "claimed_length",
    "code_of",
    "encoding_of",
    "error_reply",
    "error_response",
    "install_error_handlers",
    "own_form",
    "read_body",
    "request_id_of",
    "route_path",
]

logger = logging.getLogger("flatshare.api")

REQUEST_ID_HEADER: Final = "x-request-id"

CODE_HEADER: Final = "x-flatshare-code"
"""The code of an error reply, for readers that see no bodies (access logs, metrics)."""

_CODE: Final = CODE_HEADER.encode()

BODY_TIMEOUT_S: Final = 30.0
"""Seconds in which a body must be here: one that drips must not hold a place for ever."""

_SAFE_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,64}", re.ASCII)

ERROR_REPLIES: Final[dict[int | str, dict[str, Any]]] = {
    status: {"model": ErrorReply, "description": description}
    for status, description in {
        400: "The request is wrong; do not retry it as it is.",
        401: "No API key, or not a good one.",
        403: "The key may not do this, or the tenant is suspended.",
        404: "No such tenant, alias or version; or not this key's.",
        408: "The body did not arrive in time.",
        409: "What is there is in the way: it exists already, is referred to, or somebody changed it.",
        413: "Over a stated limit.",
        415: "The body is compressed in a way that is not read here.",
        429: "Over a limit of the tenant's, which the code names; Retry-After says when to try again.",
        500: "The model or the service failed; tell the operator.",
        503: "No room, or the store is down; Retry-After says when to try again.",
        504: "Not answered in time; retry.",
        507: "The model is larger than all that a replica may hold.",
    }.items()
}


ErrorForm = Callable[[HttpError, str], dict[str, Any]]
"""Makes the body of an error reply from the error and the request's id."""


class WithHeaders(Protocol):
    """A request whose headers are known."""

    @property
    def headers(self) -> Mapping[str, str]:
        """By name in lower case; the first value of a header that came twice."""
        ...


class Incoming(WithHeaders, Protocol):
    """What a handler needs of a request: Starlette's ``Request`` has it, and ``hot.HotRequest``."""

    @property
    def scope(self) -> Scope:
        """As ASGI gave it."""
        ...

    def stream(self) -> AsyncGenerator[bytes, None]:
        """The body's parts as they arrive; raises ``ClientDisconnect``."""
        ...


class PlainResponse(Response):
    """A whole body with its headers as they go out; made in a third of the time of Starlette's own."""

    def __init__(self, body: bytes, headers: Mapping[str, str], media_type: str) -> None:
        self.body = body
        self.status_code = 200
        self.background = None
        self.raw_headers = [
            (b"content-length", str(len(body)).encode()),
            (b"content-type", media_type.encode()),
            *((name.encode(), value.encode()) for name, value in headers.items()),
        ]


def request_id_of(headers: Mapping[str, str]) -> str:
    """The caller's request id if it is safe to log and echo, else a new one."""
    given = headers.get(REQUEST_ID_HEADER, "")
    return given if _SAFE_ID.fullmatch(given) else new_ulid()


def route_path(scope: Scope) -> str:
    """The path below where the application is mounted."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def encoding_of(request: Incoming, known: Collection[str] = ()) -> str | None:
    """How a body is compressed (``Content-Encoding``); None when it is not.

    Parameters
    ----------
    known
        Codings that are read here.

    Raises
    ------
    UnsupportedEncoding
        It is another one, or several after each other.
    """
    text = request.headers.get("content-encoding")
    if text is None:
        return None
    coding = text.strip().lower()
    if coding in ("", "identity"):
        return None
    if coding not in known:
        readable = " or ".join(sorted(known)) or "nothing"
        raise UnsupportedEncoding(f"Content-Encoding {coding[:40]!a} is not read here; {readable} is")
    return coding


def claimed_length(text: str, limit_bytes: int, quota_bytes: int | None = None) -> int:
    """The length that a Content-Length says.

    Parameters
    ----------
    quota_bytes
        The tenant's own limit.

    Raises
    ------
    BadInput
        It is not a number.
    TooLarge, BodyOverQuota
        It is over a limit.
    """
    refusal: type[TooLarge] = TooLarge
    if quota_bytes is not None and quota_bytes < limit_bytes:
        limit_bytes, refusal = quota_bytes, BodyOverQuota
    if not text.isascii() or not text.isdigit():
        raise BadInput("Content-Length is not a number")
    length = whole_number(text, limit_bytes)
    if length is None:
        raise refusal(f"the body has {text[:20]} bytes; the limit is {limit_bytes}")
    return length


async def read_body(
    request: Incoming,
    limit_bytes: int,
    quota_bytes: int | None = None,
    *,
    hold: Callable[[int], None] = lambda size: None,
) -> bytes:
    """Read a request's body as it was sent, never holding more than the limit.

    Checking how it is compressed is the caller's job (:func:`encoding_of`).

    Parameters
    ----------
    quota_bytes
        The tenant's own limit.
    hold
        Called with the number of bytes before they are held; raises to refuse them.

    Raises
    ------
    TooLarge, BodyOverQuota
        It claims, or turns out, to be longer.
    TooSlow
        It does not arrive within ``BODY_TIMEOUT_S``.
    BadInput
        Its Content-Length is not a number.
    """
    claimed = request.headers.get("content-length")
    if claimed is not None:
        hold(claimed_length(claimed, limit_bytes, quota_bytes))
    refusal: type[TooLarge] = TooLarge
    if quota_bytes is not None and quota_bytes < limit_bytes:
        limit_bytes, refusal = quota_bytes, BodyOverQuota
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for part in request.stream():
                size += len(part)
                if size > limit_bytes:
                    raise refusal(f"the body is longer than the limit of {limit_bytes} bytes")
                if claimed is None:
                    hold(size)
                parts.append(part)
    except TimeoutError:
        raise TooSlow(f"the body did not arrive within {BODY_TIMEOUT_S:g} s") from None
    return parts[0] if len(parts) == 1 else b"".join(parts)


def own_form(error: HttpError, request_id: str) -> dict[str, Any]:
    """The form of all errors but those of the Open Inference Protocol's routes."""
    return {"error": {"code": error.code, "message": error.message, "request_id": request_id}}


def error_response(error: HttpError, request_id: str, form: ErrorForm = own_form) -> Response:
    """The JSON reply for an error."""
    # The door, and Serve itself where it listens, put the x-request-id header on every reply.
    headers = {CODE_HEADER: error.code}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(error.retry_after_s)
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    body = orjson.dumps(form(error, request_id))
    return Response(body, error.status, headers, media_type="application/json")


def code_of(status: int, headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The code of an error reply; empty for any other reply, and for an error that is not ours."""
    if status < 400:
        return ""
    return next((value.decode("latin-1") for name, value in headers if name == _CODE), "")


def error_reply(request: WithHeaders, error: Exception, form: ErrorForm = own_form) -> Response:
    """The reply for an exception; what is our fault is logged with its traceback, here and nowhere else."""
    request_id = request_id_of(request.headers)
    described = describe_error(error)
    if described.status >= 500 and described.status != 503:
        logger.error(
            "request %s failed: %s",
            request_id,
            described.code,
            exc_info=error,
            extra={"request_id": request_id},
        )
    return error_response(described, request_id, form)


def install_error_handlers(
    app: FastAPI, form_of: Callable[[Request], ErrorForm] = lambda request: own_form
) -> None:
    """Answer every exception, the framework's own too, in a form of ours; never with a traceback.

    Parameters
    ----------
    form_of
        Which form an error takes on a request's route.
    """

    async def known(request: Request, error: Exception) -> Response:
        return error_reply(request, error, form_of(request))

    def answer(request: Request, status: int, code: str, message: str) -> Response:
        return error_response(
            HttpError(status, code, message), request_id_of(request.headers), form_of(request)
        )

    async def framework(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = {404: "no_such_route", 405: "method_not_allowed"}.get(error.status_code, "bad_input")
        docs = f"GET {request.scope.get('root_path', '').rstrip('/')}/docs"
        message = {
            404: f"there is no such route; {docs} lists them",
            405: f"this route does not take that method; {docs} lists them",
        }.get(error.status_code, str(error.detail))
        return answer(request, error.status_code, code, message)

    async def validation(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        problems = [
            f"{'.'.join(str(part)[:80] for part in problem['loc'])}: {problem['msg']}"
            for problem in error.errors()[:3]
        ]
        return answer(request, 400, "bad_input", "; ".join(problems))

    app.add_exception_handler(HTTPException, framework)
    app.add_exception_handler(RequestValidationError, validation)
    app.add_exception_handler(Exception, known)
    # Starlette re-raises an error that only the handler of Exception answers, and Serve then logs it as a
    # crash. Errors of our own classes are answers, not crashes.
    app.add_exception_handler(RegistryError, known)
    app.add_exception_handler(ServeError, known)
