"""The consumer finds in the store what its queue has lost, and leaves alone what is not lost."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from ray.serve.schema import TaskProcessorConfig

from flatshare.pool.consumer import TaskConsumer
from flatshare.pool.embedded_queue import EmbeddedQueue, SqliteTaskAdapter
from flatshare.settings import Settings
from flatshare.tasks.records import TaskId, TaskState
from flatshare.tasks.store import TaskStore
from flatshare_registry import TenantId


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        store=(tmp_path / "store").as_uri(), tasks="embedded", tasks_file=str(tmp_path / "q.sqlite")
    )


def consumer_of(settings: Settings) -> TaskConsumer:
    """As ``task_consumer`` makes it, on a queue whose file was lost."""
    consumer = TaskConsumer(settings)
    config = TaskProcessorConfig(queue_name="q", adapter_config={"path": settings.tasks_file})
    adapter = SqliteTaskAdapter(config)
    adapter.initialize(1)
    consumer._adapter = adapter  # type: ignore[assignment]  # what the protocol names as an attribute is a property
    return consumer


def test_what_the_queue_lost_is_put_again_and_what_is_young_is_not(settings: Settings) -> None:
    now = time.time()
    tasks = {name: TaskId.new(TenantId("acme")) for name in ("lost", "young", "running", "dead run", "ended")}
    for name, task in tasks.items():
        age_s = 5 if name == "young" else 300
        store = TaskStore(settings.open_store(), clock=lambda age_s=age_s: now - age_s)
        store.take(task, "/predict", "acme", {}, b"{}", "operator", None)
        if name in ("running", "ended"):
            TaskStore(settings.open_store()).begin(task, "f")
        elif name == "dead run":
            store.begin(task, "f")
        if name == "ended":
            TaskStore(settings.open_store()).refuse(task, "f", TaskState.DEAD, "x", "x")
    consumer = consumer_of(settings)
    consumer._store._store = OldStore(settings)  # markers are as old as their tasks
    consumer._sweep_once()
    consumer._sweep_once()
    queue = EmbeddedQueue(Path(settings.tasks_file), 9, 9)._queue
    claimed = {claim.task for _ in range(5) if (claim := queue.claim())}
    assert claimed == {tasks["lost"], tasks["dead run"]}


class OldStore:
    """The store, whose markers of open tasks were all written long ago."""

    def __init__(self, settings: Settings) -> None:
        self._store = settings.open_store()

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)

    def list(self, prefix: str, *, after: str = "") -> object:
        import dataclasses

        return (dataclasses.replace(meta, modified_s=0.0) for meta in self._store.list(prefix, after=after))
