"""A request from within the cluster, answered by the data plane as one that came by HTTP.

Tasks are run this way. The sender of a task is checked when the task is taken, and again before it is run
(``tasks/runner.py``), so its request stands for its tenant alone. No request that comes by HTTP gets here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.types import ASGIApp, Message

from flatshare.api.http import REQUEST_ID_HEADER
from flatshare.api.identity import Caller, Identities
from flatshare.api.schemas import MODEL_ID_HEADER
from flatshare.tasks.runner import Asked, Reply
from flatshare_registry.ids import ModelRef
from flatshare_registry.records import Scope

__all__ = ["InsideIdentities", "answered"]


class InsideIdentities(Identities):
    """Everybody is the tenant whose model is named."""

    def __init__(self) -> None:  # nothing is looked up
        self._operators = None

    @property
    def off(self) -> bool:
        """No page of a browser gets here."""
        return False

    async def identify(self, headers: Mapping[str, str]) -> Caller:
        """The tenant, with the right to predict."""
        return self.identify_now(headers)

    def identify_now(self, headers: Mapping[str, str]) -> Caller:
        """The tenant, with the right to predict."""
        tenant = ModelRef.parse(headers[MODEL_ID_HEADER]).tenant
        return Caller("task", None, tenant, frozenset({Scope.PREDICT}), background=True)


async def answered(app: ASGIApp, asked: Asked) -> Reply:
    """What the data plane answers to a POST."""
    headers = {**asked.headers, MODEL_ID_HEADER: asked.ref, REQUEST_ID_HEADER: asked.request_id}
    headers["content-length"] = str(len(asked.body))
    scope: dict[str, Any] = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": asked.path, "raw_path": asked.path.encode(), "root_path": "", "query_string": b"",
        "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()],
        "client": None, "server": ("flatshare", 80),
    }  # fmt: skip
    status = 500
    shown: dict[str, str] = {}
    body = bytearray()

    async def receive() -> Message:
        return {"type": "http.request", "body": asked.body, "more_body": False}

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = int(message["status"])
            shown.update((name.decode(), value.decode("latin-1")) for name, value in message["headers"])
        elif message["type"] == "http.response.body":
            body.extend(message.get("body", b""))

    try:
        await app(scope, receive, send)
    except Exception:  # what Starlette raises once more, after it has answered 500
        if not shown:
            raise
    return Reply(status, shown, bytes(body))
