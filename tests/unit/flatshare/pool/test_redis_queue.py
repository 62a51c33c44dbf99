"""The queue in Redis: where its password is, and that one which is away keeps nobody from starting.

What it does with a real Redis is in ``tests/e2e/test_tasks.py``.
"""

from __future__ import annotations

import base64
import json
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
import ray.cloudpickle as cloudpickle

from flatshare.pool.celery_queue import full_url, queue_config
from flatshare.pool.redis_queue import RedisQueue, RedisTaskAdapter, _age_s, _is_held
from flatshare.tasks.records import TaskId
from flatshare_registry import TenantId
from flatshare_registry.errors import Unavailable
from flatshare_registry.records import new_ulid

NOWHERE = "redis://127.0.0.1:9/0"


def test_what_serve_keeps_names_no_password(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("s3cret/with:signs\n")
    config = queue_config(RedisTaskAdapter, "redis://queue:6379/0", str(file), 45)
    assert b"s3cret" not in cloudpickle.dumps(config)
    assert full_url("redis://queue:6379/0", str(file)) == "redis://:s3cret%2Fwith%3Asigns@queue:6379/0"
    assert (
        full_url("redis://user@queue:6379/1", str(file)) == "redis://user:s3cret%2Fwith%3Asigns@queue:6379/1"
    )


def test_tls_is_checked() -> None:
    assert full_url("rediss://queue:6380/0", "") == "rediss://queue:6380/0?ssl_cert_reqs=required"
    assert (
        full_url("rediss://queue:6380/0?ssl_cert_reqs=none", "") == "rediss://queue:6380/0?ssl_cert_reqs=none"
    )


@pytest.mark.parametrize("password_file", ["", "/nowhere/password"])
def test_one_that_is_away_says_so_and_only_to_who_asks(password_file: str) -> None:
    queue = RedisQueue(NOWHERE, password_file, 45, 10, 10, lambda tenant: 0)
    with pytest.raises(Unavailable):
        queue.check_room(TenantId("acme"))
    with pytest.raises(Unavailable):
        queue.put(TaskId.new(TenantId("acme")))
    with pytest.raises(Unavailable):
        queue.backlog()
    with pytest.raises(Unavailable):
        queue.missing_of(1)


def test_how_old_a_message_is_says_its_tasks_id() -> None:
    task = TaskId(TenantId("acme"), new_ulid(time.time() - 90))
    body = base64.b64encode(json.dumps([[str(task)], {}, {}]).encode()).decode()
    assert 90 <= _age_s(json.dumps({"body": body}).encode()) < 91
    for nothing in (None, b"", b"[]", b"{}", b'{"body": "AA=="}', json.dumps({"body": "W10="}).encode()):
        assert _age_s(nothing) == 0.0


def test_what_is_held_back_until_its_time_is_not_under_way() -> None:
    def message(eta: str | None) -> bytes:
        return json.dumps([{"headers": {"eta": eta}, "body": ""}, "flatshare", "flatshare"]).encode()

    soon = datetime.fromtimestamp(time.time() + 30, UTC).isoformat()
    assert _is_held(message(soon))
    assert not _is_held(message("2026-01-01T00:00:00+00:00")) and not _is_held(message(None))
    assert not any(map(_is_held, (b"", b"[]", b"{}", b"[1]")))
