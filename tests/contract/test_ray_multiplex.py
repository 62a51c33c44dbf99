"""What the adapter assumes of Ray 2.60's multiplexing wrapper, each pinned: an upgrade fails here, loudly."""

from __future__ import annotations

import asyncio
import os
from types import SimpleNamespace
from typing import Any

import pytest

os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import ray
from ray import serve
from ray.serve import multiplex

from flatshare.pool.environment import serve_environment
from flatshare.pool.multiplex import NEVER_EVICT, Advertiser


class Recorder:
    """Stands where the controller's client stands; keeps what is pushed."""

    def __init__(self) -> None:
        self.pushed: list[set[str]] = []

    def record_request_routing_info(self, info: Any) -> None:
        self.pushed.append(set(info.multiplexed_model_ids))


class Replica:
    """An owner as the pool is one: a decorated loader and an advertiser over a set that the test changes."""

    def __init__(self) -> None:
        self.held: set[str] = set()
        self.advertiser = Advertiser(self, self.load_model, lambda: self.held)

    @serve.multiplexed(max_num_models_per_replica=NEVER_EVICT)
    async def load_model(self, model_id: str) -> str:
        return model_id

    @property
    def wrapper(self) -> Any:
        return getattr(self, "__serve_multiplex_wrapper")


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    context = SimpleNamespace(app_name="app", deployment="dep", replica_id="r")
    monkeypatch.setattr(multiplex, "_get_internal_replica_context", lambda: context)
    monkeypatch.setattr(multiplex, "_get_global_client", lambda: recorder)

    class Metric:
        def __init__(self, *_: object, **__: object) -> None:
            self.values: dict[str, float] = {}

        def set(self, value: float, tags: dict[str, str] | None = None) -> None:
            if tags:
                self.values[tags["model_id"]] = value

        def inc(self, *_: object) -> None: ...

        def observe(self, *_: object) -> None: ...

    for name in ("Gauge", "Counter", "Histogram"):
        monkeypatch.setattr(multiplex.metrics, name, Metric)
    monkeypatch.setattr(multiplex.MetricsPusher, "start", lambda self: None)
    return recorder


async def publish(replica: Replica, *held: str) -> None:
    replica.held = set(held)
    replica.advertiser.changed()
    task = replica.advertiser._task
    assert task is not None
    await task


def test_ray_is_the_release_that_we_know() -> None:
    assert ray.__version__.startswith("2.60.")


async def test_ids_are_published_and_taken_back(recorder: Recorder) -> None:
    replica = Replica()
    await publish(replica, "acme", "acme@1")
    replica.wrapper._push_model_ids_info()  # what Ray's pusher calls every 0.1 s
    await publish(replica, "acme@1")
    replica.wrapper._push_model_ids_info()
    await publish(replica)
    replica.wrapper._push_model_ids_info()
    assert recorder.pushed == [{"acme", "acme@1"}, {"acme@1"}, set()]
    assert replica.wrapper.registered_model_gauge.values["acme"] == 0


async def test_nothing_is_pushed_when_nothing_changed(recorder: Recorder) -> None:
    replica = Replica()
    await publish(replica, "acme")
    replica.wrapper._push_model_ids_info()
    await publish(replica, "acme")
    replica.wrapper._push_model_ids_info()
    assert recorder.pushed == [{"acme"}]


async def test_ray_never_evicts_by_itself(recorder: Recorder) -> None:
    replica = Replica()
    many = {f"t-{n}" for n in range(200)}
    await publish(replica, *many)
    assert replica.advertiser.advertised() == many


async def test_changes_during_an_update_are_not_lost(recorder: Recorder) -> None:
    replica = Replica()
    replica.held = {"a"}
    replica.advertiser.changed()
    await asyncio.sleep(0)
    replica.held = {"b"}
    replica.advertiser.changed()
    replica.held = {"c"}
    assert replica.advertiser._task is not None
    await replica.advertiser._task
    assert replica.advertiser.advertised() == {"c"}


def test_ray_reads_every_flag_that_we_set() -> None:
    from pathlib import Path

    source = Path(serve.__file__).parent / "_private" / "constants.py"
    text = source.read_text()
    for name in serve_environment("haproxy"):
        assert f'"{name}"' in text, f"ray {ray.__version__} no longer reads {name}"
    config = (Path(ray.__file__).parent / "_private").rglob("*.py")
    assert (
        any("worker_niceness" in path.read_text(errors="ignore") for path in config)
        or b"worker_niceness"
        in (Path(ray.__file__).parent / "core" / "src" / "ray" / "raylet" / "raylet").read_bytes()
    )


def test_what_we_patch_and_call_is_there() -> None:
    from ray.serve._private.client import ServeControllerClient
    from ray.serve.handle import DeploymentBroadcastResponse, DeploymentHandle
    from ray.serve.request_router import FIFOMixin, MultiplexMixin, RequestRouter
    from ray.serve.schema import ServeInstanceDetails, Target, TargetGroup

    assert callable(ServeControllerClient.get_serve_details)
    assert callable(DeploymentHandle.broadcast)
    assert callable(DeploymentBroadcastResponse.results_async)
    assert callable(MultiplexMixin._get_pending_request_matching_multiplexed_model_id)
    assert callable(FIFOMixin._fulfill_next_pending_request)
    assert callable(RequestRouter.on_request_routed)
    assert {"target_groups", "applications"} <= set(ServeInstanceDetails.model_fields)
    assert {"name", "ip", "port"} <= set(Target.model_fields)
    assert {"app_name", "protocol", "targets"} <= set(TargetGroup.model_fields)
