"""Whether both OpenAPI documents are valid; ``--write DIR`` also writes them, for client generators."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
from openapi_spec_validator import OpenAPIV31SpecValidator
from starlette.types import ASGIApp

from flatshare.api.app import create_app
from flatshare.api.identity import Identities, OperatorKeys
from flatshare.control.app import RegistryHeads, create_control_app
from flatshare.control.fleet import Fleet
from flatshare.control.settings import RunningSettings
from flatshare.settings import Settings
from flatshare_registry import Registry
from flatshare_registry.stores.memory import MemoryStore


def planes() -> dict[str, tuple[ASGIApp, str]]:
    """Both applications and where they are mounted, over nothing: only their documents are asked for."""
    registry, nothing = Registry(MemoryStore()), cast("Any", None)
    service = cast("Any", SimpleNamespace(usage=SimpleNamespace(replied=lambda *_: None)))
    identities = Identities(RegistryHeads(registry), OperatorKeys({}))
    return {
        "data-plane": (create_app(service, identities, replica="none", max_body_bytes=1, max_rows=1), ""),
        "control-plane": (
            create_control_app(registry, Fleet(nothing, list), identities, RunningSettings(Settings())),
            "/admin",
        ),
    }


async def document_of(app: ASGIApp, root: str) -> dict[str, Any]:
    transport = httpx.ASGITransport(app=app, root_path=root)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        found: dict[str, Any] = (await client.get(f"{root}/openapi.json")).raise_for_status().json()
        return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--write", type=Path, metavar="DIR", help="write data-plane.json and control-plane.json"
    )
    folder: Path | None = parser.parse_args().write
    failed = False
    for name, (app, root) in planes().items():
        document = asyncio.run(document_of(app, root))
        problems = list(OpenAPIV31SpecValidator(document).iter_errors())
        for problem in problems:
            print(f"openapi: {name}: {'/'.join(map(str, problem.absolute_path))}: {problem.message[:200]}")
        print(f"openapi: {name}: {len(document['paths'])} paths, {'not valid' if problems else 'valid'}")
        failed = failed or bool(problems)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
