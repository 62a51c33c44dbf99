"""Start the stock contender on loopback and run until stdin closes; prints ``ready`` when it answers."""

import os
import sys

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
from app import app
from ray import serve

port = int(sys.argv[1])
ray.init(address="local", num_cpus=8, include_dashboard=False, object_store_memory=128 * 1024**2,
         log_to_driver=False, _node_ip_address="127.0.0.1")  # fmt: skip
serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
serve.run(app, name="stock", route_prefix="/")
print("ready", flush=True)
sys.stdin.read()
ray.shutdown()
