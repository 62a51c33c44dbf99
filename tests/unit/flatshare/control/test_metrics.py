"""What Prometheus reads: every number that the fleet shows, in names that promtool has nothing against."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.debian import program

from flatshare.control.decided import Placement
from flatshare.control.fleet import FleetView
from flatshare.control.metrics import FAMILIES, exposition
from flatshare.control.tasks import TaskQueueReply
from flatshare.placement.scaling import Bounds
from flatshare.pool.details import ReplicaState
from flatshare.replica.usage import UsageCounter
from flatshare.residency.stats import CacheStats
from flatshare.weights.tiers import Tier
from flatshare_registry.stores.memory import MemoryStore
from flatshare_registry.usage import OTHERS

from ..snapshots import replica

ROOT = Path(__file__).parents[4]
QUEUE = TaskQueueReply(
    answers=True, due=4, under_way=2, oldest_s=1.5, consumers=1, min_consumers=0, max_consumers=4
)
PLACEMENT = Placement({"acme": (0, 1)}, Bounds(1, 4), 2, 2, None, {"globex": 1, "initech": 0})


def view(*names: str) -> FleetView:
    states = {name: ReplicaState(name, "RUNNING", "127.0.0.1") for name in names}
    states["r9"] = ReplicaState("r9", "STARTING", "127.0.0.1")
    snapshots = [replica(name) for name in names]
    return FleetView(snapshots, states, CacheStats.total([one.stats for one in snapshots]))


def samples(text: bytes) -> dict[tuple[str, tuple[str, ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.values()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def test_every_number_is_there_and_right() -> None:
    found = samples(exposition(view("r1", "r2"), PLACEMENT, QUEUE))
    wanted = {
        ("flatshare_replicas", ("RUNNING",)): 2, ("flatshare_replicas", ("STARTING",)): 1,
        ("flatshare_replica_info", ("r2", "0", "host", "n1", "cpu")): 1,
        ("flatshare_leases_total", ("r1", "device")): 6, ("flatshare_leases_total", ("r1", "host")): 0,
        ("flatshare_leases_total", ("r1", "store")): 2, ("flatshare_refused_requests_total", ("r1",)): 13,
        ("flatshare_loads_total", ("r1", "ok")): 2, ("flatshare_loads_total", ("r1", "failed")): 1,
        ("flatshare_load_seconds_count", ("r1",)): 2, ("flatshare_load_seconds_sum", ("r1",)): 0.204,
        ("flatshare_load_seconds_bucket", ("r1", "0.0025")): 0,
        ("flatshare_load_seconds_bucket", ("r1", "0.005")): 1,
        ("flatshare_load_seconds_bucket", ("r1", "0.25")): 2,
        ("flatshare_host_tier_bytes", ("host", "n1")): 17, ("flatshare_pinned_models", ("r1",)): 1,
        ("flatshare_swaps_failing", ("r1",)): 1, ("flatshare_device_budget_bytes", ("r2",)): 1000,
        ("flatshare_replicas_wanted", ()): 2, ("flatshare_replicas_allowed", ("max",)): 4,
        ("flatshare_request_errors_total", ("r1", "over_quota")): 3, ("flatshare_pass_seconds_total", ("r1",)): 3.5,
        ("flatshare_store_requests_total", ("r1",)): 9, ("flatshare_store_errors_total", ("r1",)): 1,
        ("flatshare_event_loop_lag_seconds", ("r2",)): 0.02, ("flatshare_change_feed_age_seconds", ("r1",)): 4,
        ("flatshare_probes_failed_total", ("r1",)): 6,
        ("flatshare_requests_total", ("r1", "200")): 8, ("flatshare_requests_total", ("r1", "429")): 3,
        ("flatshare_request_seconds_bucket", ("r1", "device", "0.001")): 0,
        ("flatshare_request_seconds_bucket", ("r1", "device", "0.0025")): 1,
        ("flatshare_request_seconds_sum", ("r1", "device")): 0.002,
        ("flatshare_tenant_requests_per_second", ("acme",)): 4,
        ("flatshare_tenant_requests_per_second", ("globex",)): 1,
        ("flatshare_tenant_requests_per_second", (OTHERS,)): 0.5,
        ("flatshare_copied_models", ()): 1, ("flatshare_moved_models", ()): 2,
        ("flatshare_tasks_due", ()): 4, ("flatshare_tasks_oldest_seconds", ()): 1.5,
    }  # fmt: skip
    by_value = {(name, tuple(sorted(labels))): value for (name, labels), value in wanted.items()}
    assert {key: found.get(key) for key in by_value} == pytest.approx(by_value)
    named = {name for name, _ in found}
    for family in FAMILIES:
        ending = {"counter": "_total", "gauge": "", "histogram": "_bucket"}[family.kind]
        assert family.name + ending in named, "each metric has a sample"


def test_what_is_not_known_has_no_sample_and_no_replica_is_a_zero() -> None:
    one = dataclasses.replace(replica("r1"), budget_bytes=None, host=None)
    alone = FleetView([one], {}, CacheStats())
    found = samples(exposition(alone, None, None))
    assert found["flatshare_replicas", ("RUNNING",)] == 0
    named = {name for name, _ in found}
    assert not [name for name in named if "budget" in name or "host_tier" in name or "task" in name]
    assert "flatshare_replicas_wanted" not in named


def test_only_the_busiest_tenants_are_named_of_a_hundred_thousand() -> None:
    def named(tenants: int) -> dict[str, float]:
        found = samples(exposition(fleet, None, None, tenants))
        name = "flatshare_tenant_requests_per_second"
        return {labels[0]: value for (sample, labels), value in found.items() if sample == name}

    replicas, now = [], [0.0]
    for number in range(4):
        now[0] = 0.0
        counter = UsageCounter(MemoryStore(), f"r{number}", ThreadPoolExecutor(1), 0, clock=lambda: now[0])
        for tenant in range(number, 100_000, 4):
            record = SimpleNamespace(tenant=f"t{tenant}", version=1)
            for _ in range(1 if tenant else 60):
                counter.answered(cast("Any", record), Tier.DEVICE, 0.001, [0], 10, 10)
        now[0] = 60.0
        counter.look_at_the_busiest()
        replicas.append(dataclasses.replace(replica(f"r{number}"), requests=counter.stats))
    fleet = FleetView(replicas, {}, CacheStats())
    assert len(named(20)) == 21 and named(20)["t0"] == 1.0 and OTHERS in named(20)
    assert len(named(50)) <= 51
    assert named(0) == {}


def test_the_page_is_made_of_the_code() -> None:
    made = subprocess.run(
        [sys.executable, "-c", "import sys; sys.path.insert(0, 'scripts'); import metrics; print(metrics.page(metrics.PAGE.read_text()), end='')"],
        capture_output=True, text=True, cwd=ROOT, check=True,
    )  # fmt: skip
    assert made.stdout == (ROOT / "platform/METRICS.md").read_text(), "run scripts/metrics.py"


def test_the_dashboard_is_made_by_its_script_and_asks_for_metrics_that_there_are() -> None:
    made = subprocess.run(
        [sys.executable, "-c", "import sys; sys.path.insert(0, 'scripts'); import dashboard; print(dashboard.document(), end='')"],
        capture_output=True, text=True, cwd=ROOT, check=True,
    ).stdout  # fmt: skip
    assert made == (ROOT / "platform/deploy/dashboard.json").read_text(), "run scripts/dashboard.py"
    endings = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket",)}
    names = {one.name + ending for one in FAMILIES for ending in endings[one.kind]}
    asked = set(re.findall(r"flatshare_[a-z0-9_]+", made))
    assert len(asked) > 20 and asked <= names, asked - names


def test_promtool_takes_the_metrics_and_the_alerts(tmp_path: Path) -> None:
    promtool = program("promtool", "prometheus", tmp_path)
    checked = subprocess.run(
        [promtool, "check", "metrics"],
        input=exposition(view("r1", "r2"), PLACEMENT, QUEUE),
        capture_output=True,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    folder = ROOT / "platform/deploy"
    for command in (["check", "rules", "alerts.yaml"], ["test", "rules", "alerts_test.yaml"]):
        done = subprocess.run([promtool, *command], capture_output=True, text=True, cwd=folder)
        assert done.returncode == 0, done.stdout + done.stderr


def test_alerts_ask_for_metrics_that_there_are() -> None:
    text = (ROOT / "platform/deploy/alerts.yaml").read_text()
    names = {
        one.name + {"counter": "_total", "gauge": "", "histogram": "_bucket"}[one.kind] for one in FAMILIES
    }
    asked = set(re.findall(r"flatshare_[a-z_]+", text))
    assert asked and asked <= names, asked - names
