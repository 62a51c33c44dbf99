"""The page at ``/admin/ui``: three files, served as they are.

The page asks the control plane's own routes for what it shows, with the key that a person gives it. So the
files are open to everybody: there is no secret in them.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from typing import Final

from fastapi import FastAPI
from starlette.responses import Response

__all__ = ["UI_PATHS", "add_ui"]

_FILES: Final = {
    "/ui": ("index.html", "text/html; charset=utf-8"),
    "/ui/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/ui/style.css": ("style.css", "text/css; charset=utf-8"),
}

UI_PATHS: Final = tuple(_FILES)
"""The routes that :func:`add_ui` adds: for everybody."""

HEADERS: Final = {
    # Nothing from elsewhere, no inline script or style, no frame around the page: a tenant's text that ended
    # up as markup could do nothing.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def add_ui(app: FastAPI) -> None:
    """Add the page's routes."""
    for path, (name, media_type) in _FILES.items():
        content = (files("flatshare.control") / "page" / name).read_bytes()
        app.add_api_route(path, _serving(content, media_type), include_in_schema=False, name=f"ui {name}")


def _serving(content: bytes, media_type: str) -> Callable[[], Response]:
    def serve() -> Response:
        return Response(content, media_type=media_type, headers=HEADERS)

    return serve
