"""`serve deploy` of what `flatshare config` prints, on a cluster of two nodes that `ray start` made: requests reach
both, an erasure reaches both nodes' tiers, other settings are deployed, a node is drained and one lost under load.
"""

from __future__ import annotations

import json
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest

from .conftest import FLATSHARE, MODEL, Platform, random_rows
from .ray_cluster import Cluster, kill_family

TENANTS = 8
CLIENTS = 4


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

        asked = httpx.post(f"{platform.url}/-/peer/tensors", headers={"x-flatshare-peer": "1.0"})
        assert (asked.status_code, asked.json()["error"]["code"]) == (404, "no_such_route"), (
            "no edge passes it on"
        )

        # An erasure reaches both: the tenant's weights are put on both nodes first.
        platform.http.post(f"{platform.url}/admin/preload", json={"model": "t7"}).raise_for_status()
        before = {name: files_of(tmp_path / name) for name in tiers}
        loaded = [one for replica in platform.fleet()["replicas"] for one in replica["models"]]
        sources = Counter(one["tier"] for one in loaded if one["tenant"] == "t7")
        assert sources["peer"], f"one node has the weights from the other: {sources}"
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

        # One node is drained under load, another is lost under load, as by a power cut.
        third = cluster.add_node("127.0.0.3", cpus=2)
        with load(platform, {name: right[name] for name in list(right)[:-1]}, rows) as outcomes:
            while True:  # until the third is seen, there is no room for what is on the second
                refused = subprocess.run(
                    [FLATSHARE, "drain", "127.0.0.2", "--url", platform.url, "--json"],
                    env=platform.environment, capture_output=True, text=True, timeout=180,
                )  # fmt: skip
                if "have room for" not in refused.stderr:
                    break
                assert time.monotonic() < deadline + 120
            assert refused.returncode == 0, refused.stderr
            drained = json.loads(refused.stdout)
            assert drained["left"] == [], drained
            fleet = platform.fleet()["replicas"]
            assert len(fleet) == 4 and drained["node_id"] not in {one["node_id"] for one in fleet}
            kill_family(second, signal.SIGTERM)  # as `ray stop` there
            time.sleep(3)  # load without it
        print("drained", dict(outcomes), drained)
        assert set(outcomes) == {"ok"} and outcomes["ok"] > 200, outcomes

        with load(platform, {name: right[name] for name in list(right)[:-1]}, rows) as outcomes:
            time.sleep(3)  # load before the loss
            kill_family(third, signal.SIGKILL)
            time.sleep(
                15
            )  # and after it: replicas of that node are taken out, and replaced where there is room
        print("lost", dict(outcomes))
        assert outcomes["ok"] > 200 and set(outcomes) <= {"ok", "cut"}, outcomes
        assert outcomes["cut"] <= CLIENTS, "beyond those that were in the node's hands"


@contextmanager
def load(platform: Platform, right: dict[str, list[int]], rows: np.ndarray) -> Iterator[Counter[str]]:
    """Clients that ask all the time; what became of their requests."""
    outcomes: Counter[str] = Counter()
    stop = threading.Event()

    def client(step: int) -> None:
        names = sorted(right)
        with httpx.Client(headers=platform.admin, timeout=60) as http:
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
                outcomes["ok" if good else f"{reply.status_code} {reply.text[:200]}"] += 1

    clients = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
    for one in clients:
        one.start()
    try:
        yield outcomes
    finally:
        stop.set()
        for one in clients:
            one.join()


def files_of(tier: Path) -> list[str]:
    """Weights in a host tier."""
    return [path.name for path in tier.rglob("*") if path.is_file() and path.stat().st_size > 1000]
