"""What people write by hand: FastAPI, uvicorn workers, an LRU of TorchScript models from S3 in each worker.

As in FastAPI's docs (a lifespan for start-up, ``await request.json()``), and as fast as it is without
going round the framework: numpy for the body, inference in the handler.
"""

import asyncio
import io
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import boto3
import numpy as np
import torch
from cachetools import LRUCache
from fastapi import FastAPI, Request

SLOTS = int(os.environ.get("BENCH_SLOTS", "10"))


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    torch.set_num_threads(1)
    app.state.s3 = boto3.client("s3")
    app.state.models = LRUCache(maxsize=SLOTS)
    yield


app = FastAPI(lifespan=lifespan)


def load(model_id: str) -> torch.jit.ScriptModule:
    body = app.state.s3.get_object(Bucket="models", Key=f"torchscript/{model_id}/model.pt")["Body"]
    return torch.jit.load(io.BytesIO(body.read())).eval()


@app.post("/")
async def predict(request: Request) -> dict:
    model_id = request.headers["serve_multiplexed_model_id"]
    if request.headers.get("content-type") == "application/octet-stream":
        pixels = np.frombuffer(await request.body(), dtype=np.uint8).reshape(-1, 1, 28, 28)
        images = (pixels.astype(np.float32) / 255 - 0.5) / 0.5
    else:
        batch = await request.json()
        if isinstance(batch, str):
            batch = json.loads(batch)
        images = np.array(batch["image"], dtype=np.float32).reshape(-1, 1, 28, 28)
    model = app.state.models.get(model_id)
    if model is None:
        model = app.state.models[model_id] = await asyncio.to_thread(load, model_id)
    with torch.inference_mode():
        logits = model(torch.from_numpy(images))
    return {"predicted_label": logits.argmax(dim=1).tolist()}
