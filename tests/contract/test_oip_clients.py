"""The Open Inference Protocol's clients against the data plane on a real listener: tritonclient, and KServe's reading.

The edge is not in between; ``tests/e2e/test_open_inference.py`` has it.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
import uvicorn
from tritonclient.utils import InferenceServerException

from .planes import data_plane


@dataclass
class Listener:
    address: str
    key: str

    @property
    def headers(self) -> dict[str, str]:
        """Made anew: tritonclient leaves headers of its own in what it is given."""
        return {"x-api-key": self.key}


@pytest.fixture(scope="module")
def listener() -> Iterator[Listener]:
    with data_plane() as data, socket.create_server(("127.0.0.1", 0)) as bound:
        server = uvicorn.Server(uvicorn.Config(data.app, log_level="critical", lifespan="off"))
        started = threading.Event()

        async def serve() -> None:
            serving = asyncio.create_task(server.serve([bound]))
            while not server.started:  # uvicorn has no event for it
                await asyncio.sleep(0.01)
            started.set()
            await serving

        thread = threading.Thread(target=lambda: asyncio.run(serve()), name="listener")
        thread.start()
        try:
            assert started.wait(30)
            port = bound.getsockname()[1]
            yield Listener(f"127.0.0.1:{port}", data.keys.texts["predict"] or "")
        finally:
            server.should_exit = True
            thread.join(30)


@pytest.fixture
def client(listener: Listener) -> Iterator[triton.InferenceServerClient]:
    made = triton.InferenceServerClient(listener.address)
    yield made
    made.close()


def image() -> triton.InferInput:
    made = triton.InferInput("image", [2, 1, 28, 28], "FP32")
    made.set_data_from_numpy(np.zeros((2, 1, 28, 28), dtype=np.float32))
    return made


def test_tritonclient_asks_for_health_and_metadata(
    listener: Listener, client: triton.InferenceServerClient
) -> None:
    assert client.is_server_live() and client.is_server_ready()
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    assert client.is_model_ready("acme", headers=listener.headers)
    assert client.is_model_ready("acme", "1", headers=listener.headers)
    assert not client.is_model_ready("acme", "2", headers=listener.headers)
    assert client.get_model_metadata("acme", headers=listener.headers)["name"] == "acme"
    answer = client.infer("acme", [image()], headers=listener.headers)
    assert answer.as_numpy("predicted_label").shape == (2,)


CALLS: dict[str, Callable[[triton.InferenceServerClient, dict[str, str]], Any]] = {
    "config": lambda client, headers: client.get_model_config("acme", headers=headers),
    "statistics": lambda client, headers: client.get_inference_statistics("acme", headers=headers),
    "index": lambda client, headers: client.get_model_repository_index(headers=headers),
    "load": lambda client, headers: client.load_model("acme", headers=headers),
    "unload": lambda client, headers: client.unload_model("acme", headers=headers),
    "trace": lambda client, headers: client.get_trace_settings("acme", headers=headers),
    "log": lambda client, headers: client.get_log_settings(headers=headers),
    "shared memory": lambda client, headers: client.get_system_shared_memory_status(headers=headers),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_is_not_served_is_an_error_that_tritonclient_can_show(
    listener: Listener, client: triton.InferenceServerClient, name: str
) -> None:
    with pytest.raises(InferenceServerException) as caught:
        CALLS[name](client, listener.headers)
    assert "no such route" in str(caught.value)


def test_an_extension_is_refused_by_name(listener: Listener, client: triton.InferenceServerClient) -> None:
    classes = triton.InferRequestedOutput("logits", class_count=3)
    with pytest.raises(InferenceServerException, match='"classification"'):
        client.infer("acme", [image()], outputs=[classes], headers=listener.headers)
    shared = triton.InferRequestedOutput("logits")
    shared.set_shared_memory("region", 80)
    with pytest.raises(InferenceServerException, match='"shared_memory_region"'):
        client.infer("acme", [image()], outputs=[shared], headers=listener.headers)
    from_memory = triton.InferInput("image", [2, 1, 28, 28], "FP32")
    from_memory.set_shared_memory("region", 6272)
    with pytest.raises(InferenceServerException, match='"shared_memory_region"'):
        client.infer("acme", [from_memory], headers=listener.headers)
    with pytest.raises(InferenceServerException, match='"sequence_id"'):
        client.infer("acme", [image()], sequence_id=7, headers=listener.headers)
    with pytest.raises(InferenceServerException, match="there is no tenant globex"):
        client.infer("globex", [image()], headers=listener.headers)


def test_what_kserves_client_reads(listener: Listener) -> None:
    """Its InferenceRESTClient takes ``live`` and ``ready`` of a JSON body (KServe's protocol document, v2)."""
    with httpx.Client(base_url=f"http://{listener.address}", headers=listener.headers) as client:
        assert client.get("/v2/health/live").json()["live"] is True
        assert client.get("/v2/health/ready").json()["ready"] is True
        assert client.get("/v2/models/acme/ready").json() == {"name": "acme", "ready": True}
        assert isinstance(client.get("/v2/models/acme/nope").json()["error"], str)
