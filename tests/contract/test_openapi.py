"""Both OpenAPI documents: valid, complete in what clients need, and enough for a client that is generated from them."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import numpy as np
import openapi_python_client
import pytest
from openapi_python_client.config import Config, ConfigFile, MetaType
from openapi_spec_validator import validate

from flatshare.api.error_table import TABLE
from flatshare.api.http import ERROR_REPLIES
from flatshare.api.oip_schemas import OIP_ERROR_REPLIES
from flatshare.api.openapi import DOCS_PATHS
from flatshare.control.access import RULES, Access
from flatshare.control.ui import UI_PATHS

from .planes import Control, Data, data_plane

JsonObject = dict[str, Any]
METHODS = {"get", "put", "post", "delete", "patch", "options", "head", "trace"}


@pytest.fixture(scope="module")
def data() -> Iterator[Data]:
    with data_plane() as made:
        yield made


@pytest.fixture
def control(tmp_path: Path) -> Control:
    return Control(tmp_path)


def app_of(plane: str, data: Data, control: Control) -> Any:
    return data.app if plane == "data" else control.app


async def document_of(app: Any) -> JsonObject:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
        found: JsonObject = (await client.get("/openapi.json")).json()
        return found


def operations(document: JsonObject) -> dict[tuple[str, str], JsonObject]:
    return {
        (method.upper(), path): operation
        for path, item in document["paths"].items()
        for method, operation in item.items()
        if method in METHODS
    }


@pytest.mark.parametrize("plane", ["data", "control"])
async def test_it_is_valid_and_documents_every_route(data: Data, control: Control, plane: str) -> None:
    app = app_of(plane, data, control)
    document = await document_of(app)
    validate(document)  # raises
    routes = {
        (method, route.path)
        for route in app._app.routes
        for method in route.methods
        if method != "HEAD" and route.path not in (*DOCS_PATHS, *UI_PATHS)
    }
    assert operations(document).keys() == routes
    names = [operation["operationId"] for operation in operations(document).values()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("plane", ["data", "control"])
async def test_what_needs_a_key_says_so(data: Data, control: Control, plane: str) -> None:
    document = await document_of(app_of(plane, data, control))
    schemes = document["components"]["securitySchemes"]
    assert {(one["type"], one.get("scheme") or one.get("name")) for one in schemes.values()} == {
        ("http", "bearer"), ("apiKey", "x-api-key"),
    }  # fmt: skip
    for (method, path), operation in operations(document).items():
        is_open = (
            path.startswith("/v2") and "{" not in path
            if plane == "data"
            else RULES[method, path] is Access.OPEN
        )
        wanted = None if is_open else [{name: []} for name in schemes]
        assert operation.get("security") == wanted, f"{method} {path}"


@pytest.mark.parametrize("plane", ["data", "control"])
async def test_it_says_what_is_answered(data: Data, control: Control, plane: str) -> None:
    """Bodies and replies with a schema each, our errors and not the framework's 422."""
    document = await document_of(app_of(plane, data, control))
    assert not {"HTTPValidationError", "ValidationError"} & document["components"]["schemas"].keys()
    for (method, path), operation in operations(document).items():
        where = f"{method} {path}"
        assert "422" not in operation["responses"], where
        contents = [
            one["content"] for status, one in operation["responses"].items() if status.startswith("2")
        ]
        assert contents and all(kind.get("schema") for content in contents for kind in content.values()), (
            where
        )
        if method == "POST" and plane == "data" and not path.endswith("/replay"):
            assert all(kind["schema"] for kind in operation["requestBody"]["content"].values()), where
        named = {one["name"] for one in operation.get("parameters", []) if one["in"] == "path"}
        assert all(f"{{{name}}}" in path for name in named) and path.count("{") == len(named), where
        if "security" in operation:
            for status in ("400", "401", "403", "404"):
                reply = operation["responses"][status]["content"]["application/json"]["schema"]["$ref"]
                assert reply.endswith("/OipErrorReply" if path.startswith("/v2") else "/ErrorReply"), where


def test_every_status_that_an_error_may_have_is_documented() -> None:
    """Else a generated client has no words for it."""
    assert {error.status for error in TABLE.values()} <= ERROR_REPLIES.keys() == OIP_ERROR_REPLIES.keys()


# -- a client that openapi-python-client generates

CONFIG = ConfigFile(
    # What it writes is no Python before.
    post_hooks=[f"{Path(sys.executable).with_name('ruff')} format --quiet --isolated ."],
    content_type_overrides=dict.fromkeys(
        ("application/x-npy", "application/x-ndjson", "image/png", "image/jpeg"), "application/octet-stream"
    ),
)
PIXELS = np.zeros((28, 28), dtype=np.uint8).tobytes()
IMAGE = {"image": np.zeros((1, 28, 28)).tolist()}
TENSOR = {"name": "image", "datatype": "FP32", "shape": [1, 1, 28, 28], "data": [0.0] * 784}


def generated(document: JsonObject, folder: Path, name: str) -> ModuleType:
    """The package that the generator makes; it must have left nothing out."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps(document))
    config = Config.from_sources(
        config_file=CONFIG.model_copy(update={"package_name_override": name}), meta_type=MetaType.NONE,
        document_source=path, file_encoding="utf-8", overwrite=True, output_path=folder / name,
    )  # fmt: skip
    errors = openapi_python_client.generate(config=config)
    assert not errors, [(error.header, error.detail) for error in errors]
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))


def functions(package: ModuleType) -> dict[str, ModuleType]:
    """The generated functions' modules, by operation id."""
    folder = Path(str(package.__file__)).parent / "api"
    return {
        path.stem: importlib.import_module(f"{package.__name__}.api.{path.parent.name}.{path.stem}")
        for path in folder.glob("*/*.py")
        if path.stem != "__init__"
    }


async def call(package: ModuleType, module: ModuleType, app: Any, key: str | None, **arguments: Any) -> Any:
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    kind = package.Client if key is None else package.AuthenticatedClient
    token = {} if key is None else {"token": key}
    client = kind(base_url="http://test", httpx_args={"transport": transport}, **token)
    async with client:
        return await module.asyncio_detailed(client=client, **arguments)


BATCH = {"image": [[[0] * 28] * 28]}


async def test_a_generated_client_calls_every_route_of_the_data_plane(data: Data, tmp_path: Path) -> None:
    package = generated(await document_of(data.app), tmp_path, "data_client")
    models = importlib.import_module("data_client.models")
    types = importlib.import_module("data_client.types")
    header = {"serve_multiplexed_model_id": "acme"}
    octets = types.File(payload=PIXELS)
    infer = models.InferRequest.from_dict({"inputs": [TENSOR]})
    lines = types.File(payload=json.dumps(IMAGE).encode() + b"\n")
    arguments: dict[str, JsonObject] = {
        "predict": {"body": models.PredictRequest.from_dict(IMAGE), **header},
        "predict_at_root": {"body": models.PredictRequest.from_dict(IMAGE), **header},
        "classify": {"body": octets, **header},
        "predict_stream": {"body": lines, **header},
        "list_pipelines": {},
        "list_tasks": {"tenant": "acme"}, "get_task": {"task_id": data.task},
        "get_task_result": {"task_id": data.task}, "cancel_task": {"task_id": data.task},
        "run_pipeline": {"name": "images", "body": models.RunPipelineBody.from_dict(BATCH), **header},
        "oip_server": {}, "oip_live": {}, "oip_ready": {},
        "oip_metadata": {"ref": "acme"},
        "oip_model_ready": {"ref": "acme:production"},
        "oip_infer": {"ref": "acme", "body": infer},
        "oip_metadata_of_version": {"ref": "acme", "version": 1},
        "oip_model_ready_of_version": {"ref": "acme", "version": 1},
        "oip_infer_of_version": {"ref": "acme", "version": 1, "body": infer},
    }  # fmt: skip
    found = functions(package)
    others = {"create_task", "replay_task"}  # another status, called below
    assert found.keys() == arguments.keys() | others
    for name, given in arguments.items():
        key = None if name in ("oip_server", "oip_live", "oip_ready") else data.keys.texts["predict"]
        reply = await call(package, found[name], data.app, key, **given)
        assert reply.status_code == 200, (name, reply.content)
        assert reply.parsed is not None, name
    taken = await call(
        package, found["create_task"], data.app, data.keys.texts["predict"],
        body=models.CreateTaskJsonBody.from_dict(IMAGE), **header,
    )  # fmt: skip
    assert taken.status_code == 202, taken.content
    replayed = await call(
        package, found["replay_task"], data.app, data.keys.texts["predict"], task_id=data.task
    )
    assert (replayed.status_code, replayed.parsed.error.code) == (400, "invalid_input")
    answer = (
        await call(package, found["oip_infer"], data.app, data.keys.texts["both"], ref="acme", body=infer)
    ).parsed
    assert [one.name for one in answer.outputs] == ["logits", "predicted_label"]
    refused = await call(package, found["oip_metadata"], data.app, data.keys.texts["both"], ref="globex")
    assert (refused.status_code, refused.parsed.code) == (404, "not_found")


async def test_a_generated_client_calls_every_route_of_the_control_plane(
    control: Control, tmp_path: Path
) -> None:
    package = generated(await document_of(control.app), tmp_path, "control_client")
    models = importlib.import_module("control_client.models")
    found = functions(package)
    tenant, canary = {"tenant": "acme"}, {"tenant": "acme", "alias": "canary"}
    model = models.ModelRequest.from_dict({"model": "acme"})
    called: list[str] = []

    async def ask(name: str, status: int = 200, **given: Any) -> Any:
        called.append(name)
        reply = await call(package, found[name], control.app, control.keys.texts["admin"], **given)
        assert reply.status_code == status, (name, reply.content)
        assert reply.parsed is not None, name
        return reply.parsed

    await ask("list_tenants")
    await ask("list_plans")
    await ask("create_tenant", 201, body=models.NewTenant.from_dict({"id": "new"}))
    assert (await ask("show_tenant", **tenant)).production == 1
    assert (await ask("refresh", **tenant)).missed == []
    await ask("delete_tenant", tenant="new")
    await ask("suspend", **tenant)
    await ask("resume", **tenant)
    page = await ask("audit", limit=2, **tenant)
    assert len(page.entries) == 2
    assert (await ask("audit", before=page.next_, **tenant)).next_ is None
    assert (await ask("verify_audit", **tenant)).whole
    made = await ask("create_key", 201, body=models.NewKeyRequest(), idempotency_key="once", **tenant)
    await ask("create_key", 409, body=models.NewKeyRequest(), idempotency_key="once", **tenant)
    await ask("rotate_key", 201, key_id=made.id, body=models.RotateRequest(), **tenant)
    await ask("revoke_key", key_id=made.id, **tenant)
    assert made.id not in [one.id for one in await ask("list_keys", **tenant)]
    quotas = models.QuotasRequest.from_dict({"quotas": {"burst": 5}})
    assert (await ask("set_quotas", body=quotas, **tenant)).effective.burst == 5
    await ask("show_quotas", **tenant)
    assert len(await ask("list_versions", **tenant)) == 3
    await ask("show_version", version=3, **tenant)
    await ask("delete_version", version=3, **tenant)
    await ask("rollback", body=models.RollbackRequest.from_dict({"expected": 2}), **canary)
    await ask("set_alias", body=models.AliasChange.from_dict({"version": 2}), **canary)
    await ask("remove_alias", **canary)
    await ask("replicas")
    await ask("metrics")
    await ask("metrics_targets")
    assert (await ask("get_history")).points == []
    await ask("drain", 404, replica="none-such")
    assert (await ask("drain_node", node="10.0.0.2")).left == []
    assert (await ask("get_settings")).revision == 0
    share = models.SettingsChange.from_dict({"settings": {"tenant_share": 0.5}})
    assert (await ask("change_settings", body=share)).settings["tenant_share"] == 0.5
    assert (await ask("get_task_queue")).max_consumers == 4
    assert (await ask("get_scaling")).max_replicas == 1
    bounds = models.ScalingRequest.from_dict({"min_replicas": 1, "max_replicas": 3})
    assert (await ask("set_scaling", body=bounds)).max_replicas == 3
    await ask("preload", body=models.PreloadRequest.from_dict({"model": "acme", "pin": True}))
    assert (await ask("unpin", body=model)).unpinned == 1
    assert (await ask("unload", body=model)).unloaded == 1
    await ask("erase", **tenant)
    assert set(called) == found.keys()
