"""Requests for one route: a hostile body, or hostile numbers in headers, path and query, or a body in tiny pieces."""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final
from urllib.parse import quote

from ..contract.planes import MODEL
from . import body_bombs
from .body_bombs import Body, number
from .coding_bombs import compressed

__all__ = ["Maker", "Request", "Route", "routes_of"]

Route = tuple[str, str]
"""Method and path, as the application has them."""


@dataclass(frozen=True)
class Request:
    """As a server hands it to an application; ``pieces`` are the sizes in which the body comes, the last one for the rest."""

    method: str
    path: str
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = field(default=b"", repr=False)
    query: str = ""
    pieces: tuple[int, ...] = ()

    def __str__(self) -> str:
        headers = {
            name: value[:60] for name, value in self.headers if name not in ("authorization", "x-api-key")
        }
        return (
            f"{self.method} {self.path[:120]}{'?' + self.query[:60] if self.query else ''} {headers} "
            f"{len(self.body)} bytes{f' in pieces of {self.pieces[0]}' if self.pieces else ''}: {self.body[:40]!r}"
        )


def routes_of(app: Any) -> list[Route]:
    """All routes of a FastAPI application."""
    return sorted(
        (method, route.path) for route in app.routes for method in route.methods if method != "HEAD"
    )


_BODIES: Final[Sequence[Callable[[random.Random], Body]]] = (
    body_bombs.image, body_bombs.multipart, body_bombs.json_rows, body_bombs.lines, body_bombs.npy, body_bombs.octets,
    body_bombs.oip,
)  # fmt: skip
_FITTING: Final[Mapping[str, Sequence[Callable[[random.Random], Body]]]] = {
    "/classify": (body_bombs.image, body_bombs.image, body_bombs.multipart, body_bombs.octets),
    "/predict": (body_bombs.json_rows, body_bombs.npy, body_bombs.octets),
    "/": (body_bombs.json_rows, body_bombs.npy, body_bombs.octets),
    "/predict/stream": (body_bombs.lines,),
}
_NUMBERS: Final = ("content-length", "inference-header-content-length", "x-tensor-shape", "x-tensor-dtype")
_OTHERS: Final = ("x-request-id", "range", "expect", "accept", "accept-encoding", "traceparent", "cookie", "if-match", "te",
                  "x-forwarded-for", "host", "origin", "retry-after", "x-tensor-order", MODEL)  # fmt: skip
_CONTROL_KEYS: Final = (
    "id",
    "scopes",
    "label",
    "lifetime_s",
    "grace_s",
    "quotas",
    "plan",
    "version",
    "model",
    "pin",
)

_CONTROL_GOOD: Final[Mapping[str, str]] = {
    "/tenants": '"id": "new"', "/tenants/{tenant}/keys": '"label": "x"', "/tenants/{tenant}/quotas": '"quotas": {"burst": 5}',
    "/tenants/{tenant}/keys/{key_id}/rotate": '"grace_s": 1', "/tenants/{tenant}/aliases/{alias}": '"version": 2',
    "/preload": '"model": "acme"', "/unpin": '"model": "acme"', "/unload": '"model": "acme"',
}  # fmt: skip


class Maker:
    """Makes requests at random, all of them with a key that may.

    Parameters
    ----------
    key
        An operator's.
    key_id
        Of a key that exists.
    """

    def __init__(self, seed: int, key: str, key_id: str = "acme.none") -> None:
        self.random = random.Random(seed)
        self.key = key
        self.key_id = key_id

    def request(self, route: Route) -> Request:
        """One for this route."""
        chosen, (method, template) = self.random, route
        made = Request(method, self._path(template), (("x-api-key", self.key),))
        if "{ref}" not in template and chosen.random() < 0.97:
            made = replace(made, headers=(*made.headers, (MODEL, "acme")))
        if method in ("POST", "PUT") or chosen.random() < 0.1:
            body = self._body(template)
            if chosen.random() < 0.2:
                body = compressed(chosen, body)
            headers = (*made.headers, ("content-type", body.kind), *body.headers)
            made = replace(made, headers=headers, body=body.content, pieces=self._pieces(len(body.content)))
        if chosen.random() < 0.5:
            made = self._claims(made)
        if chosen.random() < 0.2:
            name, value = chosen.choice([*_NUMBERS, *_OTHERS]), number(chosen)
            made = replace(made, headers=(*(one for one in made.headers if one[0] != name), (name, value)))
        if chosen.random() < 0.15:
            made = replace(made, query=self._query())
        return made

    def _path(self, template: str) -> str:
        chosen, path = self.random, template
        for _, name, _, _ in string.Formatter().parse(template):
            if name is None:
                continue
            good = {
                "version": ["1", "1", "1", "3"], "alias": ["canary", "production", "new"], "key_id": [self.key_id],
                "tenant": ["acme", "acme", "globex", "nobody"], "ref": ["acme", "acme", "acme", "acme@1", "acme:canary"],
            }.get(name, ["1"])  # fmt: skip
            text = chosen.choice(good)
            if chosen.random() < (0.3 if name in ("version", "key_id") else 0.1):
                text = chosen.choice(
                    [number(chosen), f"acme@{number(chosen)}", f"acme:{number(chosen)}", "%00", "a" * 9000]
                )
            path = path.replace(f"{{{name}}}", quote(text, safe="@:,%") or "%20")
        return path

    def _body(self, template: str) -> Body:
        chosen = self.random
        if template.startswith("/v2"):
            fitting: Sequence[Callable[[random.Random], Body]] = (body_bombs.oip,)
        else:
            fitting = _FITTING.get(template, (partial(self._control_body, template),))
        return chosen.choice(_BODIES if chosen.random() < 0.15 else fitting)(chosen)

    def _control_body(self, template: str, chosen: random.Random) -> Body:
        """What the control plane takes, cut to what it reads, with a value that expands."""
        if chosen.random() < 0.3:
            body = body_bombs.json_rows(chosen)
            return replace(
                body, content=body.content[: chosen.choice([60_000, 70_000])], kind="application/json"
            )
        wanted = _CONTROL_GOOD.get(
            chosen.choice(list(_CONTROL_GOOD)) if chosen.random() < 0.1 else template, ""
        )
        values = ["acme", '"acme"', '"new"', '["predict"]', "2", "{}", '{"burst": 5}', "true", number(chosen), f'"{number(chosen)}"',
                  '{"burst": ' + number(chosen) + "}", "[" * 900 + "]" * 900, "[" + '"predict",' * 5000 + '"predict"]']  # fmt: skip
        keys = chosen.sample(_CONTROL_KEYS, chosen.choice([1, 1, 2, len(_CONTROL_KEYS)]))
        pairs = [f'"{key}": {chosen.choice(values)}' for key in keys]
        if wanted and chosen.random() < 0.7:  # of a key that comes twice the last counts
            pairs = [*(pairs if chosen.random() < 0.5 else []), wanted]
        text = "{" + ", ".join(pairs) + "}"
        return Body(text.encode("utf-8"), "application/json")

    def _claims(self, made: Request) -> Request:
        """A Content-Length, as most clients send; sometimes it lies."""
        length = str(len(made.body)) if self.random.random() < 0.95 else number(self.random)
        return replace(made, headers=(*made.headers, ("content-length", length)))

    def _pieces(self, size: int) -> tuple[int, ...]:
        chosen = self.random
        if chosen.random() < 0.7 or not size:
            return ()
        piece = chosen.choice([1, 7, 1000, 65_536])
        return (piece,) * min(size // piece, 3000) + (0,) * chosen.choice([0, 1, 500])

    def _query(self) -> str:
        return "&".join(
            f"{self.random.choice(['limit', 'version', 'after', 'timeout_s', 'a' * 3000])}={quote(number(self.random))}"
            for _ in range(self.random.choice([1, 2, 500]))
        )
