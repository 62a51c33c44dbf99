"""What an expert writes in an afternoon: one single-worker process of two behind HAProxy, which hashes the model's id.

As in the docs of its libraries: FastAPI with a lifespan, orjson for bodies and replies, a module on the meta device
that takes the tensors of a safetensors file as they are (``load_state_dict(assign=True)``), channels-last weights, an
LRU of modules. Weights are on the node's tmpfs as safetensors; one that is not there yet comes from S3, once.
"""

import asyncio
import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import boto3
import numpy as np
import orjson
import torch
from cachetools import LRUCache
from fastapi import FastAPI, Request, Response
from safetensors.torch import load_file

from flatshare.models.architecture import architecture

SLOTS = int(os.environ.get("BENCH_SLOTS", "10"))
FOLDER = Path(os.environ["BENCH_FOLDER"])
NETWORK = architecture("mnist-cnn")


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    torch.set_num_threads(1)
    app.state.s3 = boto3.client("s3")
    app.state.models = LRUCache(maxsize=SLOTS)
    yield


app = FastAPI(lifespan=lifespan)


def load(model_id: str) -> torch.nn.Module:
    path = FOLDER / f"{model_id}.safetensors"
    if not path.exists():
        draft = FOLDER / f"{model_id}.{os.getpid()}.{threading.get_ident()}"
        body = app.state.s3.get_object(Bucket="models", Key=f"safetensors/{model_id}.safetensors")["Body"]
        draft.write_bytes(body.read())
        draft.replace(path)
    with torch.device("meta"):
        module = NETWORK.build()
    module.load_state_dict(load_file(path), assign=True)
    return module.eval().to(memory_format=torch.channels_last)


@app.get("/health")
async def health() -> dict:
    return {}


@app.post("/")
async def predict(request: Request) -> Response:
    model_id = request.headers["serve_multiplexed_model_id"]
    body = await request.body()
    if request.headers.get("content-type") == "application/octet-stream":
        pixels = np.frombuffer(body, dtype=np.uint8).reshape(-1, 1, 28, 28)
        images = (pixels.astype(np.float32) / 255 - 0.5) / 0.5
    else:
        batch = orjson.loads(body)
        if isinstance(batch, str):
            batch = orjson.loads(batch)
        images = np.array(batch["image"], dtype=np.float32).reshape(-1, 1, 28, 28)
    model = app.state.models.get(model_id)
    if model is None:
        model = app.state.models[model_id] = await asyncio.to_thread(load, model_id)
    with torch.inference_mode():
        logits = model(torch.from_numpy(images).to(memory_format=torch.channels_last))
    labels = logits.argmax(dim=1).tolist()
    return Response(orjson.dumps({"predicted_label": labels}), media_type="application/json")
