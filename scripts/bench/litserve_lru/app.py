"""LitServe (lightning.ai/docs/litserve): a LitAPI with an LRU of TorchScript models from S3 in each worker.

LitServe hands its API the decoded JSON and no headers, so the model's id travels in the body, and images
of a binary request come as base64, as in its docs' image examples.
"""

import base64
import io
import json
import os
import sys

import boto3
import litserve as ls
import numpy as np
import torch
from cachetools import LRUCache

SLOTS = int(os.environ.get("BENCH_SLOTS", "10"))


class Classifier(ls.LitAPI):
    def setup(self, device: str) -> None:
        torch.set_num_threads(1)
        self.s3 = boto3.client("s3")
        self.models: LRUCache = LRUCache(maxsize=SLOTS)

    def decode_request(self, request: dict) -> tuple[str, torch.Tensor]:
        if "pixels" in request:
            raw = base64.b64decode(request["pixels"])
            pixels = np.frombuffer(raw, dtype=np.uint8).reshape(-1, 1, 28, 28)
            images = (pixels.astype(np.float32) / 255 - 0.5) / 0.5
        else:
            if isinstance(request, str):
                request = json.loads(request)
            images = np.array(request["image"], dtype=np.float32).reshape(-1, 1, 28, 28)
        return request["model"], torch.from_numpy(images)

    def predict(self, inputs: tuple[str, torch.Tensor]) -> torch.Tensor:
        model_id, images = inputs
        model = self.models.get(model_id)
        if model is None:
            body = self.s3.get_object(Bucket="models", Key=f"torchscript/{model_id}/model.pt")["Body"]
            model = self.models[model_id] = torch.jit.load(io.BytesIO(body.read())).eval()
        with torch.inference_mode():
            return model(images)

    def encode_response(self, logits: torch.Tensor) -> dict:
        return {"predicted_label": logits.argmax(dim=1).tolist()}


if __name__ == "__main__":
    server = ls.LitServer(Classifier(api_path="/"), accelerator="cpu", workers_per_device=2)
    server.run(
        host="127.0.0.1",
        port=int(sys.argv[1]),
        num_api_servers=1,
        log_level="error",
        generate_client_file=False,
    )
