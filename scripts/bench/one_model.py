"""So many replicas of a plain Ray Serve deployment, each with one model, until stdin closes; prints ``ready``."""

from __future__ import annotations

import os
import sys

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_enable_metrics_collection", "0")

import ray
from ray import serve


@serve.deployment
class OneModel:
    def __init__(self) -> None:
        import torch

        from flatshare.models.architecture import architecture

        self.network = architecture("mnist-cnn").build().eval()
        with torch.inference_mode():
            self.network(torch.zeros(1, 1, 28, 28))

    def __call__(self) -> None:
        return None


ray.init(address="local", num_cpus=16, include_dashboard=False, object_store_memory=128 * 1024**2,
         log_to_driver=False, _node_ip_address="127.0.0.1")  # fmt: skip
for number in range(int(sys.argv[1])):
    serve.run(OneModel.options(name=f"one-{number}").bind(), name=f"app-{number}", route_prefix=None)
print("ready", flush=True)
sys.stdin.read()
ray.shutdown()
