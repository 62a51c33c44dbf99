"""What draining a node relies on in Ray 2.60: a node that is told to leave takes nothing more, Serve moves its replicas
away by itself, new ones first, and the node goes when it is empty.

In a process of its own: a cluster is no other test's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

CODE = """
import json, os, time
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
import ray
from ray import serve
from ray.cluster_utils import Cluster
from flatshare.pool.controller import read_details
from flatshare.pool.details import replica_states, replicas_on
from flatshare.pool.nodes import RayNodes

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 80 * 2**20})
second = cluster.add_node(num_cpus=1, node_ip_address="127.0.0.2", object_store_memory=80 * 2**20)
ray.init(address=cluster.address, log_to_driver=False)
serve.start(proxy_location="Disabled")
nodes = RayNodes(cpus=1, gpus=0)
found = {"before": sorted([one.address == "127.0.0.2", one.is_head, one.room] for one in nodes.nodes())}

@serve.deployment(name="Pool", num_replicas=2, ray_actor_options={"num_cpus": 1}, graceful_shutdown_wait_loop_s=0.1,
                  max_replicas_per_node=None)
class Pool:
    def __call__(self):
        return serve.get_replica_context().replica_id.unique_id

serve.run(Pool.bind(), name="app", route_prefix=None)
third = cluster.add_node(num_cpus=2, node_ip_address="127.0.0.3", object_store_memory=80 * 2**20)
busy = second.node_id
there = replicas_on(read_details(), busy)
found["there"] = len(there)
nodes.leave(busy)
found["leaving"] = [one.node_id for one in nodes.nodes() if one.leaving] == [busy]
states, least, deadline = set(), 2, time.monotonic() + 60
while time.monotonic() < deadline and (replicas_on(read_details(), busy) or any(n.node_id == busy for n in nodes.nodes())):
    now = replica_states(read_details(), "app", "Pool")
    states |= {one.state for one in now if f"app/Pool/{one.replica}" in there}
    least = min(least, sum(one.state in ("RUNNING", "PENDING_MIGRATION") for one in now))
    time.sleep(0.05)
found["left"] = replicas_on(read_details(), busy)
found["states"] = "PENDING_MIGRATION" in states
found["least"] = least
found["gone"] = all(one.node_id != busy for one in nodes.nodes())
try:
    nodes.leave("0" * 56)
    found["unknown"] = "told"
except Exception as error:
    found["unknown"] = type(error).__name__
print("FOUND", json.dumps(found))
serve.shutdown()
ray.shutdown()
cluster.shutdown()
"""


def test_a_node_that_is_told_to_leave_is_emptied_by_serve_and_goes(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="fs-", dir="/tmp") as short:  # Ray's sockets lie below it
        (Path(short) / "ray").mkdir()
        done = subprocess.run(
            [sys.executable, "-c", CODE], capture_output=True, text=True, timeout=240,
            env={**os.environ, "RAY_TMPDIR": short},
        )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert lines, done.stdout[-1000:] + done.stderr[-3000:]
    found = json.loads(lines[0].removeprefix("FOUND "))
    assert found["before"] == [[False, True, 2], [True, False, 1]]
    assert found["there"] == 1, "Serve spreads replicas"
    assert found["left"] == [] and found["gone"], found
    assert found["leaving"]
    assert found["states"] and found["least"] == 2, "the new one runs before the old one goes"
    assert found["unknown"] == "told", "Ray takes a node that it does not know for one that has left"
