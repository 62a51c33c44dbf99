"""What a platform's answers become for whoever called it from the command line."""

import http.server
import json
import threading
from collections.abc import Iterator

import pytest

from flatshare.cli.context import call
from flatshare.errors import BadInput, Forbidden, OverQuota, ServeError, Unauthenticated
from flatshare_registry.errors import NotFound, Unavailable


@pytest.fixture(scope="module")
def answering() -> Iterator[str]:
    """A server that answers ``/<status>`` with that status and an error of the platform's form."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status = int(self.path.strip("/"))
            body = json.dumps(
                {"error": {"code": "c", "message": f"it was {status}", "request_id": "r1"}}
            ).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, BadInput),
        (401, Unauthenticated),
        (403, Forbidden),
        (404, NotFound),
        (429, OverQuota),
        (500, ServeError),
        (502, Unavailable),  # the edge: a replica went away while answering; `tenants erase` asks again
        (503, Unavailable),
        (504, Unavailable),
    ],
)
def test_each_status_has_its_error(answering: str, status: int, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"it was {status} .request r1.") as caught:
        call("GET", f"{answering}/{status}")
    assert type(caught.value) is error


def test_nobody_there_is_unavailable() -> None:
    with pytest.raises(Unavailable, match="is the platform up"):
        call("GET", "http://127.0.0.1:9")
