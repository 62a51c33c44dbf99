"""`serve deploy` of what `flatshare config` prints, on a cluster of two nodes that `ray start` made: requests reach
both, an erasure reaches both nodes' tiers, other settings are deployed, and a node is lost under load.
"""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from .conftest import MODEL, random_rows
from .ray_cluster import Cluster, kill_family

TENANTS = 8


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(
        tmp_path, cpus=2, FLATSHARE_NODES="several", FLATSHARE_REPLICAS="4", FLATSHARE_SLOTS="4",
        FLATSHARE_HOST_DIR=str(tmp_path / "tier-{node}"), FLATSHARE_CPUS_PER_REPLICA="1",
    )  # fmt: skip
    yield made
    made.end()


def test_two_nodes_serve_one_is_lost_and_erasures_reach_both(cluster: Cluster, tmp_path: Path) -> None:
    second = cluster.add_node("127.0.0.2", cpus=2)
    cluster.deploy()
    platform, rows = cluster.platform, random_rows(1)
    with cluster.edge():
        for number in range(TENANTS):
            platform.add(f"t{number}", 40 + number)
        right = {f"t{n}": platform.right(f"t{n}@1", rows) for n in range(TENANTS)}
        replicas: Counter[str] = Counter()
        for name in right:
            answer = platform.predict(name, rows)
            assert answer.json() == {"predicted_label": right[name]}
            replicas[answer.headers["x-flatshare-replica"]] += 1
        fleet = platform.fleet()["replicas"]
        assert len({one["node_id"] for one in fleet}) == 2 and len(replicas) > 1
        tiers = sorted(path.name for path in tmp_path.glob("tier-*"))
        assert len(tiers) == 2 and "tier-127.0.0.2" in tiers, "each node has a host tier of its own"

        # An erasure reaches both: the tenant's weights are put on both nodes first.
        platform.http.post(f"{platform.url}/admin/preload", json={"model": "t7"}).raise_for_status()
        before = {name: files_of(tmp_path / name) for name in tiers}
        while (reply := platform.http.post(f"{platform.url}/admin/tenants/t7/erase")).status_code == 202:
            pass  # it goes on; asking waits for it
        receipts = {one["node_id"]: one for one in reply.raise_for_status().json()["nodes"]}
        assert len(receipts) == 2 and all(one["removed_tensors"] for one in receipts.values()), receipts
        assert all(len(files_of(tmp_path / name)) < len(before[name]) for name in tiers)

        # Other settings: every process is replaced, and the same is answered.
        assert httpx.get(f"{platform.url}/admin/tenants").status_code == 401, "keys came from the file"
        assert httpx.get(f"{platform.url}/-/healthz").status_code == 200, "what probes ask"
        old = cluster.replicas()
        assert len(old) == 5, "four of the pool, and the control plane"
        cluster.deploy(FLATSHARE_SLOTS="5")
        deadline = time.monotonic() + 90
        while {one["slots"] for one in platform.fleet()["replicas"]} != {5} or cluster.replicas() & old:
            assert time.monotonic() < deadline, "every process was replaced"
            time.sleep(0.5)  # their end shows only by looking
        assert platform.predict("t0", rows).json() == {"predicted_label": right["t0"]}

        # One node is lost under load, as by a power cut.
        outcomes: Counter[str] = Counter()
        stop = threading.Event()

        def client(number: int) -> None:
            names = [f"t{n}" for n in range(TENANTS - 1)]
            with httpx.Client(headers=platform.admin, timeout=60) as http:
                step = number
                while not stop.is_set():
                    name = names[step % len(names)]
                    step += 1
                    try:
                        reply = http.post(
                            f"{platform.url}/predict", json={"image": rows.tolist()}, headers={MODEL: name}
                        )
                    except httpx.TransportError:
                        outcomes["cut"] += 1  # the edge could not send it again
                        continue
                    good = reply.status_code == 200 and reply.json()["predicted_label"] == right[name]
                    outcomes["ok" if good else str(reply.status_code)] += 1

        clients = [threading.Thread(target=client, args=(number,)) for number in range(4)]
        for one in clients:
            one.start()
        time.sleep(3)  # load before the loss
        kill_family(second, signal.SIGKILL)
        time.sleep(15)  # and after it: replicas of that node are taken out, and replaced where there is room
        stop.set()
        for one in clients:
            one.join()
        print(dict(outcomes))
        assert outcomes["ok"] > 200 and set(outcomes) <= {"ok", "cut"}, outcomes
        assert outcomes["cut"] <= len(clients), "beyond those that were in the node's hands"


def files_of(tier: Path) -> list[str]:
    """Weights in a host tier."""
    return [path.name for path in tier.rglob("*") if path.is_file() and path.stat().st_size > 1000]
