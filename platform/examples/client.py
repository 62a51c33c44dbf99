"""A client for a service: one connection, retries as the platform asks for them, errors by code.

    python client.py acme digits/0.png digits/1.png

The key is read from ``KEY``, the platform's address from ``FLATSHARE_URL``. Needs ``requests``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

# A prediction changes nothing, so it may be sent again. ``Retry`` obeys the Retry-After of 429 and 503.
RETRIES = Retry(
    total=4, read=0, backoff_factor=0.2, status_forcelist=[429, 502, 503, 504],
    allowed_methods=["GET", "POST"], raise_on_status=False,
)  # fmt: skip


class PredictionFailed(Exception):
    """The platform refused or failed.

    Attributes
    ----------
    code
        Stable: programs may rely on it. ``platform/API.md`` lists all codes, each with what to do.
    request_id
        Give it to the operator: the access log and the traces have it too.
    """

    def __init__(self, code: str, message: str, request_id: str) -> None:
        super().__init__(f"{code}: {message} (request {request_id})")
        self.code = code
        self.request_id = request_id


class Client:
    """Calls one platform with one key. A session is kept, so use one client in each thread."""

    def __init__(self, url: str, key: str) -> None:
        self._url = url.rstrip("/")
        self._session = requests.Session()
        self._session.mount(self._url, HTTPAdapter(max_retries=RETRIES))
        self._session.headers["x-api-key"] = key

    def classify(self, model: str, image: bytes) -> tuple[int, str]:
        """The label of a PNG or JPEG image, and the version that answered: ``(7, "acme@3")``."""
        reply = self._post("/classify", model, data=image, headers={"content-type": "image/png"})
        labels = reply.json()["predicted_label"]
        return labels[0], f"{reply.headers['x-flatshare-tenant']}@{reply.headers['x-flatshare-version']}"

    def predict(self, model: str, rows: Any) -> list[int]:
        """The labels of rows of numbers: a list or an array ``(N, 1, 28, 28)``, as in training."""
        rows = rows.tolist() if hasattr(rows, "tolist") else rows
        labels: list[int] = self._post("/predict", model, json={"image": rows}).json()["predicted_label"]
        return labels

    def _post(
        self, path: str, model: str, *, headers: dict[str, str] | None = None, **body: Any
    ) -> requests.Response:
        named = {"serve_multiplexed_model_id": model, **(headers or {})}
        try:
            reply = self._session.post(f"{self._url}{path}", headers=named, timeout=(5, 60), **body)
        except requests.RequestException as failure:
            raise PredictionFailed("no_answer", str(failure), "-") from failure
        if reply.ok:
            return reply
        try:
            error = reply.json()["error"]
            failed = PredictionFailed(error["code"], error["message"], error["request_id"])
        except (ValueError, KeyError, TypeError):  # it came from a proxy on the way
            failed = PredictionFailed(f"http_{reply.status_code}", reply.reason, "-")
        raise failed


def main() -> int:
    """Classify the files that the command line names."""
    if len(sys.argv) < 3 or "KEY" not in os.environ:
        print("usage: KEY=fs_... python client.py MODEL IMAGE ...", file=sys.stderr)
        return 2
    model, *files = sys.argv[1:]
    client = Client(os.environ.get("FLATSHARE_URL", "http://127.0.0.1:8000"), os.environ["KEY"])
    for file in files:
        try:
            label, version = client.classify(model, Path(file).read_bytes())
        except PredictionFailed as error:
            print(error, file=sys.stderr)
            return 1
        print(f"{file}: {label}, by {version}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
