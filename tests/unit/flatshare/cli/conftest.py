"""What stands at a platform's address: the real control plane over HTTP, or something that is none."""

from __future__ import annotations

import contextlib
import http.server
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route

from flatshare.api.identity import Identities, OperatorKeys, Role
from flatshare.control.app import RegistryHeads, create_control_app
from flatshare.control.fleet import Fleet
from flatshare.control.settings import RunningSettings
from flatshare.pool.details import ReplicaState
from flatshare.settings import Settings
from flatshare_registry import Registry
from flatshare_registry.keys import new_key
from flatshare_registry.records import Quotas
from flatshare_registry.settings import RegistrySettings

Answer = Callable[[str, str], tuple[int, dict[str, str], bytes]]
"""Of method and path: status, headers and body."""


@dataclass
class Site:
    """An HTTP server that answers what a test says, and what it was asked."""

    url: str = ""
    asked: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)


@contextmanager
def serving(answer: Answer) -> Iterator[Site]:
    site = Site()

    class Handler(http.server.BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            site.asked.append(f"{self.command} {self.path}")
            site.headers.append({name.lower(): value for name, value in self.headers.items()})
            status, headers, body = answer(self.command, self.path)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            self.handle_any()

        do_POST = do_PUT = do_CONNECT = do_GET  # noqa: N815  # the base class looks for these names

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    site.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield site
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def serve() -> Callable[[Answer], AbstractContextManager[Site]]:
    """Makes servers."""
    return serving


class Replicas:
    """Stands where the pool's handle stands."""

    def __init__(self) -> None:
        self.refreshed: list[str] = ["r1", "r2"]
        self.preloaded: list[str] = []
        self.calls: list[str] = []

    def broadcast(self, method: str, *arguments: object) -> Any:
        self.calls.append(" ".join([method, *map(str, arguments)]))
        found = {
            "refresh": self.refreshed,
            "follow_settings": self.refreshed,
            "preload": self.preloaded,
        }.get(method, [])

        class Answers:
            async def results_async(self, *, return_exceptions: bool) -> list[Any]:
                return list(found)

        return Answers()


@dataclass
class ControlPlane:
    """The real control plane, listening; on the registry that ``FLATSHARE_STORE`` names."""

    url: str
    admin_key: str
    viewer_key: str
    replicas: Replicas
    states: list[ReplicaState]
    registry: Registry
    predicted: list[dict[str, str]] = field(default_factory=list)
    """Headers of what came to the data plane, which is played."""
    failures: list[int] = field(default_factory=list)
    """Statuses of the data plane's next answers; 200 when there are none left."""
    code: str = ""
    """Of these answers; by default their status."""
    held_back: bool = False
    """As the edge holds back a key that was refused too often: 429 on the control plane."""


@pytest.fixture
def control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ControlPlane]:
    monkeypatch.setenv("FLATSHARE_STORE", (tmp_path / "store").as_uri())
    registry = Registry(RegistrySettings().open_store(), actor="test")
    replicas, states = Replicas(), [ReplicaState(one, "RUNNING", "127.0.0.1") for one in ("r1", "r2")]
    admin, viewer = new_key("ADMIN"), new_key("VIEWER")
    operators = OperatorKeys.of({Role.ADMIN: admin.text, Role.VIEWER: viewer.text})
    app = create_control_app(
        registry,
        Fleet(replicas, lambda: states),
        Identities(RegistryHeads(registry), operators),
        RunningSettings(
            Settings(plans={"gold": Quotas(requests_per_s=100), "silver": Quotas(requests_per_s=10)})
        ),
    )
    plane = ControlPlane("", admin.text, viewer.text, replicas, states, registry)

    async def edge(scope: Any, receive: Any, send: Any) -> None:
        target = app
        if plane.held_back:
            error = {"code": "too_many_refusals", "message": "too many", "request_id": "r"}
            target = JSONResponse({"error": error}, 429)
        await target(scope, receive, send)

    async def predict(request: Request) -> JSONResponse:
        plane.predicted.append(dict(request.headers))
        status = plane.failures.pop(0) if plane.failures else 200
        if status != 200:
            return JSONResponse({"error": {"code": plane.code or f"c{status}"}}, status)
        return JSONResponse({"predicted_label": [1]}, headers={"x-flatshare-tier": "device"})

    routes = [Mount("/admin", edge), Route("/predict", predict, methods=["POST"])]
    with listening(Starlette(routes=routes)) as url:
        plane.url = url
        yield plane


@contextmanager
def listening(app: Any) -> Iterator[str]:
    """An ASGI application on loopback, in a thread."""
    started = threading.Event()

    class Server(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            started.set()

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield  # a thread can't

    server = Server(uvicorn.Config(app, "127.0.0.1", 0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    assert started.wait(20)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(autouse=True)
def no_platform_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test meets a platform that this user runs, its key, or a proxy of the machine."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
