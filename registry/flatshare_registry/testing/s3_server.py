"""A local S3 over HTTP for tests and the demo: moto's server, on loopback, on a port of its own.

Run it by hand with ``python -m flatshare_registry.testing.s3_server --port 0 --bucket models``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import boto3

try:
    from moto.moto_server.werkzeug_app import (
        DomainDispatcherApplication,
        MotoRequestHandler,
        create_backend_app,
    )
    from moto.s3.models import FakeKey
    from werkzeug.serving import make_server
except ImportError as missing:
    text = f"the local S3 server needs {missing.name}: pip install 'flatshare[local]'"
    if __name__ == "__main__":
        sys.exit(f"error: {text}")
    raise ImportError(text, name=missing.name) from missing

__all__ = ["CREDENTIALS", "local_s3"]

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "local",
    "AWS_SECRET_ACCESS_KEY": "local",
    "AWS_DEFAULT_REGION": "us-east-1",
}
"""What to set for boto3: moto takes any credentials."""


def _copy_without_data(key: FakeKey, memo: dict[int, Any]) -> FakeKey:
    """An object's copy for a listing: all but its data.

    moto copies all objects of a bucket whenever versions are listed (5.2.5): with 2 GB of models one erasure
    took 12 GB more, and Ray, which sees a machine without memory, ends its workers.
    """
    copied: FakeKey = object.__new__(type(key))
    # Its buffer is its own: moto closes a key's when the key goes.
    copied.__dict__.update(key.__dict__, _value_buffer=io.BytesIO(), multipart=None, disposed=True)
    return copied


def _serialised_puts(app: Callable[..., Any]) -> Callable[..., Any]:
    """Let one PUT in at a time: moto checks If-Match and writes in two steps, S3 in one."""
    lock = threading.Lock()

    def wrapped(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        if environ["REQUEST_METHOD"] == "PUT":
            with lock:
                return list(app(environ, start_response))
        return app(environ, start_response)

    return wrapped


class _Handler(MotoRequestHandler):
    """Keeps connections open as S3 does; one TCP connect a request would be most of a small GET."""

    protocol_version = "HTTP/1.1"

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Say nothing."""


@contextlib.contextmanager
def local_s3(port: int = 0, bucket: str | None = None) -> Iterator[str]:
    """Serve S3 in threads of this process; yields the endpoint URL.

    Port 0 takes a free one. The bucket, when named, exists before the URL is yielded.
    """
    FakeKey.__deepcopy__ = _copy_without_data  # type: ignore[attr-defined]  # copy.deepcopy asks for it, moto has none
    app = _serialised_puts(DomainDispatcherApplication(create_backend_app))
    # make_server listens before it returns: requests that come before serve_forever wait in the backlog.
    server = make_server("127.0.0.1", port, app, threaded=True, request_handler=_Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True, name="local-s3")
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        if bucket is not None:
            _make_bucket(url, bucket)
        yield url
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _make_bucket(url: str, bucket: str) -> None:
    client = boto3.client(
        "s3",
        endpoint_url=url,
        aws_access_key_id=CREDENTIALS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
        region_name=CREDENTIALS["AWS_DEFAULT_REGION"],
    )
    client.create_bucket(Bucket=bucket)


def main() -> None:
    """Serve until SIGINT or SIGTERM; prints the endpoint URL as the first line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--bucket", default="models")
    arguments = parser.parse_args()
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with local_s3(arguments.port, arguments.bucket) as url:
        print(url, flush=True)  # noqa: T201  # the one line that a parent process reads
        stop.wait()


if __name__ == "__main__":
    main()
