"""Tasks on a real platform: what was taken is answered once, whatever is killed meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import httpx
import numpy as np
import psutil
import pytest

from flatshare.mnist.pixels import preprocess
from flatshare.tasks.callbacks import verify_callback

from .conftest import MODEL, Platform, end, processes_of, random_rows, start
from .rabbit_server import RabbitServer, rabbit_server
from .redis_server import RedisServer, redis_server

TENANTS = 20
TASKS = int(os.environ.get("FLATSHARE_TEST_TASKS", "400"))
"""At least; they go on until all kills are done. The long variant has 1,000 and more."""


@pytest.fixture(scope="module", params=["embedded", "redis", "rabbitmq"])
def broker(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RedisServer | RabbitServer | None]:
    """Redis or RabbitMQ, or None for the embedded queue."""
    if request.param == "embedded":
        yield None
        return
    if request.param == "rabbitmq":
        with rabbit_server(tmp_path_factory.mktemp("rabbit")) as rabbit:
            yield rabbit
        return
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


class Receiver(BaseHTTPRequestHandler):
    """Takes callbacks; the first message of each task gets a 503."""

    told: ClassVar[dict[str, list[bytes]]] = {}
    headers_of: ClassVar[dict[str, dict[str, str]]] = {}
    enough = threading.Event()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        task = json.loads(body)["data"]["id"]
        messages = self.told.setdefault(task, [])
        messages.append(body)
        self.headers_of[task] = dict(self.headers.items())
        self.send_response(503 if len(messages) == 1 else 204)
        self.end_headers()
        if len(messages) > 1:
            self.enough.set()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def receiver() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def platform(
    broker: RedisServer | RabbitServer | None,
    receiver: str,
    tmp_path_factory: pytest.TempPathFactory,
    s3_url_e2e: str,
) -> Iterator[Platform]:
    queue = {"FLATSHARE_TASKS": "embedded", "FLATSHARE_TASKS_CALLBACK_HOSTS": receiver}
    if broker is not None:
        queue |= {"FLATSHARE_TASKS": "redis", "FLATSHARE_TASKS_BROKER_URL": broker.url}
    if isinstance(broker, RabbitServer):
        queue |= {
            "FLATSHARE_TASKS": "rabbitmq",
            "FLATSHARE_TASKS_BROKER_PASSWORD_FILE": str(broker.password_file),
        }
    running = start(
        tmp_path_factory.mktemp("state"), s3_url_e2e, f"tasks-{queue['FLATSHARE_TASKS']}",
        "--replicas", "2", "--slots", "8", FLATSHARE_TASKS_AT_A_TIME="4", FLATSHARE_REQUEST_TIMEOUT_S="10",
        FLATSHARE_TASKS_MIN_CONSUMERS="0", FLATSHARE_TASKS_MAX_CONSUMERS="3", FLATSHARE_DOWNSCALE_DELAY_S="5", **queue,
    )  # fmt: skip
    for number in range(TENANTS):
        running.add(f"t{number:02}", 500 + number, tell=False)
    yield running
    end(running)


def pids_of(platform: Platform, title: str) -> list[int]:
    found = []
    for one in processes_of(platform):
        try:
            if title in " ".join(one.cmdline()):
                found.append(one.pid)
        except psutil.Error:
            pass  # it ended between two looks
    return found


def ended(platform: Platform, task: str, within_s: float = 60) -> dict[str, object]:
    deadline = time.monotonic() + within_s
    while True:
        try:
            shown = platform.http.get(f"{platform.url}/tasks/{task}").raise_for_status().json()
        except httpx.HTTPError:
            shown = {"state": "unknown"}  # what answers was killed
        if shown["state"] not in ("queued", "running", "unknown"):
            return dict(shown)
        assert time.monotonic() < deadline, shown
        threading.Event().wait(0.1)  # a task's end shows only by asking


def one_ends(platform: Platform, accepted: list[str], over: set[str], within_s: float = 120) -> None:
    """Wait until a task ends of those that are under way now: not the newest, which all others come before.

    Parameters
    ----------
    over
        Tasks that are known to have ended; more are added.
    """

    def has_ended(task: str) -> bool:
        with contextlib.suppress(httpx.HTTPError):  # what answers was killed
            state = platform.http.get(f"{platform.url}/tasks/{task}").raise_for_status().json()["state"]
            if state not in ("queued", "running"):
                over.add(task)
        return task in over

    open_now = (task for task in accepted if task not in over and not has_ended(task))
    under_way = list(itertools.islice(open_now, 20))
    deadline = time.monotonic() + within_s
    while under_way and not any(map(has_ended, under_way)):  # none: all that were sent have been run
        assert time.monotonic() < deadline, f"none of {under_way} ended"
        threading.Event().wait(0.1)  # a task's end shows only by asking


def test_prefer_respond_async_makes_a_task_of_a_request(platform: Platform) -> None:
    rows = random_rows(3)
    headers = {MODEL: "t01", "prefer": "respond-async", "authorization": f"Bearer {platform.key('t01')}"}
    taken = httpx.post(f"{platform.url}/predict", json={"image": rows.tolist()}, headers=headers)
    assert taken.status_code == 202
    shown = ended(platform, taken.json()["id"])
    assert shown["result"] == {"predicted_label": platform.right("t01@1", rows)}
    assert (shown["version"], shown["attempts"]) == (1, 1)
    pixels = np.arange(784, dtype=np.uint8).reshape(1, 28, 28)
    octets = {**headers, "content-type": "application/octet-stream"}
    taken = httpx.post(f"{platform.url}/classify", content=pixels.tobytes(), headers=octets)
    assert ended(platform, taken.json()["id"])["result"] == {
        "predicted_label": platform.right("t01@1", preprocess(pixels))
    }
    listed = httpx.get(f"{platform.url}/tasks", headers=headers).json()["tasks"]
    assert [one["path"] for one in listed] == ["/classify", "/predict"]
    assert (
        httpx.get(
            f"{platform.url}/tasks/{taken.json()['id']}",
            headers={"authorization": f"Bearer {platform.key('t02')}"},
        ).status_code
        == 404
    )


def test_who_asked_is_told_of_the_end_again_until_it_is_taken(platform: Platform, receiver: str) -> None:
    Receiver.enough.clear()
    key = platform.key("t01")
    headers = {MODEL: "t01", "authorization": f"Bearer {key}"}
    headers |= {"prefer": "respond-async", "x-task-callback": f"{receiver}/done"}
    rows = random_rows(1)
    taken = httpx.post(f"{platform.url}/predict", json={"image": rows.tolist()}, headers=headers).json()
    assert taken["callback"]["state"] == "owed"
    assert Receiver.enough.wait(60)
    first, second = Receiver.told[taken["id"]]
    assert first == second and json.loads(first)["data"]["state"] == "done"
    shown = {name.lower(): value for name, value in Receiver.headers_of[taken["id"]].items()}
    verify_callback(key, shown, second, time.time())


def test_nothing_accepted_is_lost_and_nothing_is_answered_twice_differently(
    platform: Platform, broker: RedisServer | RabbitServer | None
) -> None:
    rows = {f"t{n:02}": random_rows(1, seed=n) for n in range(TENANTS)}
    expected = {name: platform.right(f"{name}@1", one) for name, one in rows.items()}
    accepted: dict[str, str] = {}
    over: set[str] = set()
    refused: Counter[int] = Counter()
    sending, killed = threading.Event(), threading.Event()

    async def send_all() -> None:
        async with httpx.AsyncClient(headers=platform.admin, timeout=60) as client:

            async def client_of(numbers: Iterator[int]) -> None:
                for number in numbers:
                    if number >= TASKS and killed.is_set():
                        return
                    name = f"t{number % TENANTS:02}"
                    try:
                        reply = await client.post(
                            f"{platform.url}/tasks",
                            json={"image": rows[name].tolist()},
                            headers={MODEL: name},
                        )
                    except httpx.TransportError:
                        refused[0] += 1  # not taken, as far as the client knows: it sends the next one
                        await asyncio.sleep(0.3)  # who is refused a connection does not spin
                        continue
                    if reply.status_code == 202:
                        accepted[reply.json()["id"]] = name
                    else:
                        refused[reply.status_code] += 1
                    if number == 40:
                        sending.set()

            numbers = itertools.count()
            await asyncio.gather(*[client_of(numbers) for _ in range(8)])

    def kill(title: str) -> None:
        """With tasks in hand: consumers stand still until some wait, and then the pool, until they are taken."""
        if title == "TaskConsumer":
            one_ends(platform, list(accepted), over)  # so one runs: one that starts has nothing in hand
        consumers = [psutil.Process(pid) for pid in pids_of(platform, "TaskConsumer")]
        pool = [psutil.Process(pid) for pid in pids_of(platform, "ServeReplica:flatshare:")]
        for one in consumers:
            one.suspend()
        time.sleep(1)  # while clients send
        for one in pool:
            one.suspend()
        for one in consumers:
            one.resume()
        time.sleep(0.5)
        found = pids_of(platform, title)
        for pid in found if title == "TaskConsumer" else found[:1]:
            psutil.Process(pid).kill()
        for one in pool:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.resume()

    def kill_them() -> None:
        try:
            sending.wait(60)
            for title in (
                "TaskConsumer",
                "ServeReplica:flatshare:",
                "ControlPlane",
                "TaskConsumer",
                "haproxy",
            ):
                kill(title)
                if title == "ControlPlane" and broker is not None:
                    broker.kill()
                    broker.start()
                time.sleep(2)  # kills at times of their own, whatever is under way
        finally:
            killed.set()

    killer = threading.Thread(target=kill_them)
    killer.start()
    asyncio.run(send_all())
    killer.join()
    assert len(accepted) > 0.8 * TASKS, refused
    print(f"{len(accepted)} tasks taken, {dict(refused)} refused")
    # Redis gives back what a dead worker had in hand after minutes; who looks for lost tasks is sooner.
    deadline = time.monotonic() + (150 if broker is None else 240)
    ends = {task: ended(platform, task, deadline - time.monotonic()) for task in accepted}
    assert Counter(one["state"] for one in ends.values()) == {"done": len(accepted)}
    for task, shown in ends.items():
        assert shown["result"] == {"predicted_label": expected[accepted[task]]}, task
    print("runs by task:", Counter(one["attempts"] for one in ends.values()))
    assert max(int(str(one["attempts"])) for one in ends.values()) > 1, (
        "a kill hit nothing: it proves nothing"
    )


def test_dead_letters_are_listed_shown_and_replayed(platform: Platform, tmp_path: Path) -> None:
    (tmp_path / "wrong.json").write_text(json.dumps({"image": [[0.0]]}))
    key = platform.key("t03")
    body = {"content": (tmp_path / "wrong.json").read_bytes()}
    headers = {MODEL: "t03", "authorization": f"Bearer {key}", "content-type": "application/json"}
    task = httpx.post(f"{platform.url}/tasks", headers=headers, **body).json()["id"]
    assert ended(platform, task)["state"] == "failed"
    (listed,) = platform.cli_json("tasks", "list", "t03", "--state", "failed")["tasks"]
    assert platform.cli_json("tasks", "dead", "list", "t03") == {"tasks": [], "next": None}
    assert (listed["id"], listed["code"]) == (task, "bad_input")
    assert "must be" in platform.cli("tasks", "show", task).stdout
    assert platform.cli_json("tasks", "replay", task)["state"] == "queued"
    assert ended(platform, task)["attempts"] == 1
    assert platform.cli_json("tasks", "dead", "drop", task)["id"] == task
    assert platform.cli("tasks", "show", task, check=False).returncode == 3


def test_consumers_go_to_zero_and_come_back_with_the_next_task(platform: Platform) -> None:
    deadline = time.monotonic() + 60
    while (shown := platform.cli_json("tasks", "queue"))["consumers"] != 0:
        assert time.monotonic() < deadline, shown
    while pids_of(platform, "TaskConsumer"):
        assert time.monotonic() < deadline
        threading.Event().wait(0.2)  # a process's end shows only by looking
    rows = random_rows(1)
    reply = platform.http.post(f"{platform.url}/tasks", json={"image": rows.tolist()}, headers={MODEL: "t05"})
    assert ended(platform, reply.json()["id"])["result"] == {"predicted_label": platform.right("t05@1", rows)}
    assert platform.cli_json("tasks", "queue")["consumers"] == 1


def test_erasing_a_tenant_takes_its_tasks_along(platform: Platform) -> None:
    rows = random_rows(1)
    reply = platform.http.post(f"{platform.url}/tasks", json={"image": rows.tolist()}, headers={MODEL: "t04"})
    assert ended(platform, reply.json()["id"])["state"] == "done"
    platform.cli("tenants", "erase", "t04", "--yes")
    store = platform.registry.store
    assert [meta.key for meta in store.list("tasks/t04/")] == []
    assert platform.http.get(f"{platform.url}/tasks/{reply.json()['id']}").status_code == 404
