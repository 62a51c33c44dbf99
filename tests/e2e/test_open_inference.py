"""The Open Inference Protocol's own client against a running platform: NVIDIA's tritonclient[http]."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from .conftest import MODEL, Platform, random_rows


@pytest.fixture(scope="module")
def tenant(platform: Platform) -> str:
    platform.add("oip", 77)
    return "oip"


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("ref", ["oip", "oip@1", "oip:production"])
def test_tritonclient_gets_logits_and_labels(platform: Platform, tenant: str, ref: str, binary: bool) -> None:
    rows = random_rows(5, seed=3)
    client = triton.InferenceServerClient(f"127.0.0.1:{platform.port}")
    key = {"x-api-key": platform.key("oip")}
    assert client.is_server_live()
    assert client.is_server_ready()
    assert not client.is_model_ready(ref)
    assert client.is_model_ready(ref, headers=key)
    assert client.get_model_metadata(ref, headers=key)["inputs"][0]["name"] == "image"
    image = triton.InferInput("image", list(rows.shape), "FP32")
    image.set_data_from_numpy(rows, binary_data=binary)
    outputs = [
        triton.InferRequestedOutput(name, binary_data=binary) for name in ("logits", "predicted_label")
    ]
    result = client.infer(ref, [image], outputs=outputs, request_id="7", headers=key)
    with torch.inference_mode():
        wanted = platform.modules["oip@1"](torch.from_numpy(rows)).numpy()
    np.testing.assert_allclose(result.as_numpy("logits"), wanted, atol=1e-5)
    assert result.as_numpy("predicted_label").tolist() == wanted.argmax(axis=1).tolist()
    everything = client.infer(ref, [image], headers=key)  # no outputs named: the client asks for binary ones
    np.testing.assert_allclose(everything.as_numpy("logits"), wanted, atol=1e-5)
    client.close()


def test_tritonclient_gets_clear_errors(platform: Platform, tenant: str) -> None:
    client = triton.InferenceServerClient(f"127.0.0.1:{platform.port}")
    assert not client.is_model_ready("nobody", headers=platform.admin)
    image = triton.InferInput("image", [1, 7], "FP32")
    image.set_data_from_numpy(np.zeros((1, 7), dtype=np.float32))
    with pytest.raises(InferenceServerException, match="has shape"):
        client.infer(tenant, [image], headers=platform.admin)
    with pytest.raises(InferenceServerException, match="there is no tenant nobody"):
        client.infer("nobody", [image], headers=platform.admin)
    client.close()


def test_a_model_asked_for_by_path_has_the_same_home_as_by_header(platform: Platform, tenant: str) -> None:
    rows = random_rows(1)
    document = {
        "inputs": [{"name": "image", "datatype": "FP32", "shape": [1, 1, 28, 28], "data": rows.tolist()}]
    }
    by_path = {
        platform.http.post(f"{platform.url}/v2/models/{tenant}/infer", json=document).headers[
            "x-flatshare-replica"
        ]
        for _ in range(5)
    }
    assert by_path == {platform.predict(tenant, rows).headers["x-flatshare-replica"]}


def test_a_stream_through_the_edge_is_answered_while_it_comes(platform: Platform, tenant: str) -> None:
    rows = [random_rows(1, seed) for seed in range(3)]
    seen: list[int] = []

    def lines():  # type: ignore[no-untyped-def]  # a generator of bytes that looks at what came back
        for one in rows:
            yield json.dumps({"image": one.tolist()}).encode() + b"\n"

    with platform.http.stream(
        "POST", f"{platform.url}/predict/stream", content=lines(),
        headers={MODEL: tenant, "content-type": "application/x-ndjson"}, timeout=30,
    ) as reply:  # fmt: skip
        assert reply.status_code == 200
        answers = {}
        for line in reply.iter_lines():
            answer = json.loads(line)
            seen.append(answer["index"])
            answers[answer["index"]] = answer["predicted_label"]
    assert answers == {index: platform.right("oip@1", one) for index, one in enumerate(rows)}
    assert sorted(seen) == [0, 1, 2]
