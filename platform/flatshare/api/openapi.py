"""The OpenAPI document of a plane, and the page that shows it, which fetches nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.responses import HTMLResponse, Response

__all__ = ["DOCS_PATHS", "documented"]

_ASSETS: Final = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "favicon.png": "image/png",
}

DOCS_PATHS: Final = ("/docs", *(f"/docs/{name}" for name in _ASSETS), "/openapi.json")
"""The routes that :func:`documented` adds, and the framework's own: for everybody."""

_SECURITY_SCHEMES: Final = {
    "bearer": {
        "type": "http",
        "scheme": "bearer",
        "description": "An API key, or a token of the issuer if the platform has one.",
    },
    "apiKey": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "An API key."},
}
_SECURITY: Final[list[dict[str, list[str]]]] = [{"bearer": []}, {"apiKey": []}]

_FRAMEWORKS_ERRORS: Final = ("HTTPValidationError", "ValidationError")
"""Schemas of FastAPI's 422, in whose place we answer 400."""


def documented(
    app: FastAPI, *, open_paths: Collection[str] = (), bodies: Sequence[type[BaseModel]] = ()
) -> FastAPI:
    """Add ``/docs``, and correct ``/openapi.json``. The app must have been made without docs.

    Parameters
    ----------
    open_paths
        Routes that need no key.
    bodies
        Bodies that routes refer to by ``#/components/schemas/<name>`` without FastAPI's knowing.
    """

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(
                title=app.title, version=app.version, description=app.description, routes=app.routes
            )
            app.openapi_schema = _corrected(made, open_paths, bodies)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]  # so FastAPI documents it
    _add_page(app)
    return app


def _corrected(
    document: dict[str, Any], open_paths: Collection[str], bodies: Sequence[type[BaseModel]]
) -> dict[str, Any]:
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    _, found = models_json_schema(
        [(body, "validation") for body in bodies], ref_template="#/components/schemas/{model}"
    )
    schemas.update(found.get("$defs", {}))
    for name in _FRAMEWORKS_ERRORS:
        schemas.pop(name, None)
    components["securitySchemes"] = _SECURITY_SCHEMES
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            if path in open_paths:
                operation["responses"].pop("401", None)
            else:
                operation["security"] = _SECURITY
    return document


@cache
def _asset(path: Path) -> bytes:
    """A file of the page; there are three, and a process reads each once."""
    return path.read_bytes()


def _add_page(app: FastAPI) -> None:
    """Swagger UI, from files that are here: a CDN can't be reached from everywhere, and knows who reads."""
    folder = Path(str(files("fastapi_offline").joinpath("static")))

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> HTMLResponse:
        root = request.scope.get("root_path", "").rstrip("/")
        return get_swagger_ui_html(
            openapi_url=f"{root}{app.openapi_url}",
            title=app.title,
            swagger_js_url=f"{root}/docs/swagger-ui-bundle.js",
            swagger_css_url=f"{root}/docs/swagger-ui.css",
            swagger_favicon_url=f"{root}/docs/favicon.png",
        )

    def add(name: str, media_type: str) -> None:
        async def asset() -> Response:
            # Not a FileResponse: that reads Range, and answers a bad one in plain text.
            return Response(_asset(folder / name), media_type=media_type)

        app.get(f"/docs/{name}", include_in_schema=False, name=name)(asset)

    for name, media_type in _ASSETS.items():
        add(name, media_type)
