"""Ray's own multiplexing example (docs.ray.io, serve/model-multiplexing), on TorchScript models in S3.

Written as the docs write it: one deployment, a multiplexed loader that downloads and loads, the
model id from the request, and the notebook's MNIST parsing and answer.
"""

import io
import json
import os

import boto3
import torch
from ray import serve
from starlette.requests import Request

SLOTS = int(os.environ.get("STOCK_SLOTS", "10"))
REPLICAS = int(os.environ.get("STOCK_REPLICAS", "2"))


@serve.deployment(num_replicas=REPLICAS, max_ongoing_requests=64)
class ModelInferencer:
    def __init__(self) -> None:
        self.bucket = "models"
        self.s3 = boto3.client("s3")

    @serve.multiplexed(max_num_models_per_replica=SLOTS)
    async def get_model(self, model_id: str) -> torch.jit.ScriptModule:
        body = self.s3.get_object(Bucket=self.bucket, Key=f"torchscript/{model_id}/model.pt")["Body"]
        return torch.jit.load(io.BytesIO(body.read())).eval()

    async def __call__(self, request: Request) -> dict:
        batch = await request.json()
        if isinstance(batch, str):
            batch = json.loads(batch)
        model = await self.get_model(serve.get_multiplexed_model_id())
        images = torch.tensor(batch["image"]).float()
        with torch.no_grad():
            logits = model(images)
        return {"predicted_label": logits.argmax(dim=1).tolist()}


app = ModelInferencer.bind()
