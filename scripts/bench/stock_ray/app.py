"""Ray's own multiplexing example (docs.ray.io, serve/model-multiplexing), on TorchScript models in S3.

Written as the docs write it: one deployment, a multiplexed loader that downloads and loads, the
model id from the request, and the notebook's MNIST parsing and answer.
"""

import io
import json
import os

import boto3
import numpy as np
import torch
from ray import serve
from starlette.requests import Request

SLOTS = int(os.environ.get("BENCH_SLOTS", "10"))
LOADS = os.environ.get("BENCH_LOADS", "")
REPLICAS = int(os.environ.get("BENCH_REPLICAS", "2"))


@serve.deployment(num_replicas=REPLICAS, max_ongoing_requests=64)
class ModelInferencer:
    def __init__(self) -> None:
        self.bucket = "models"
        self.s3 = boto3.client("s3")

    @serve.multiplexed(max_num_models_per_replica=SLOTS)
    async def get_model(self, model_id: str) -> torch.jit.ScriptModule:
        key = f"torchscript/{model_id}/model.pt"
        if LOADS:  # bench-fleet counts loads: one file for all models, a byte a load
            key = "torchscript/model.pt"
            counter = os.open(LOADS, os.O_WRONLY | os.O_APPEND)
            os.write(counter, b".")
            os.close(counter)
        body = self.s3.get_object(Bucket=self.bucket, Key=key)["Body"]
        return torch.jit.load(io.BytesIO(body.read())).eval()

    async def __call__(self, request: Request) -> dict:
        if request.headers.get("content-type") == "application/octet-stream":
            pixels = np.frombuffer(await request.body(), dtype=np.uint8).reshape(-1, 1, 28, 28)
            images = torch.from_numpy((pixels.astype(np.float32) / 255 - 0.5) / 0.5)
        else:
            batch = await request.json()
            if isinstance(batch, str):
                batch = json.loads(batch)
            images = torch.tensor(batch["image"]).float()
        model = await self.get_model(serve.get_multiplexed_model_id())
        with torch.no_grad():
            logits = model(images)
        return {"predicted_label": logits.argmax(dim=1).tolist()}


app = ModelInferencer.bind()
