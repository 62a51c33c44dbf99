"""Who is compared: each starts on loopback, answers rightly, and is ended by its id."""

from __future__ import annotations

import base64
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson
from numpy.typing import NDArray

from flatshare.bench.workload import BenchRequest, encode_json
from flatshare.edge.process import find_haproxy
from flatshare_registry.testing.ports import free_ports

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent
START_TIMEOUT_S = 180


@dataclass(frozen=True)
class Capacity:
    replicas: int
    slots: int


@dataclass(frozen=True)
class Contender:
    """How to start one, and the form in which it takes requests."""

    start: Callable[[Capacity], contextlib.AbstractContextManager[str]]
    json_shot: Callable[[str, NDArray[np.float32], tuple[int, ...]], BenchRequest]
    binary_shot: Callable[[str, NDArray[np.uint8], tuple[int, ...]], BenchRequest]


def header_json(model: str, rows: NDArray[np.float32], expected: tuple[int, ...]) -> BenchRequest:
    return BenchRequest(model, encode_json(rows), expected)


def header_binary(model: str, pixels: NDArray[np.uint8], expected: tuple[int, ...]) -> BenchRequest:
    return BenchRequest(model, pixels.tobytes(), expected, "application/octet-stream")


def body_json(model: str, rows: NDArray[np.float32], expected: tuple[int, ...]) -> BenchRequest:
    body = orjson.dumps({"model": model, "image": rows}, option=orjson.OPT_SERIALIZE_NUMPY)
    return BenchRequest(model, body, expected)


def base64_binary(model: str, pixels: NDArray[np.uint8], expected: tuple[int, ...]) -> BenchRequest:
    text = base64.b64encode(pixels.tobytes()).decode()
    return BenchRequest(model, orjson.dumps({"model": model, "pixels": text}), expected)


@contextlib.contextmanager
def stock(capacity: Capacity) -> Iterator[str]:
    """Ray's docs' example, Ray's default settings."""
    (port,) = free_ports(1)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_SERVE_")},
        "BENCH_SLOTS": str(capacity.slots),
        "BENCH_REPLICAS": str(capacity.replicas),
        "PYTHONPATH": str(HERE / "stock_ray"),
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        [sys.executable, str(HERE / "stock_ray" / "serve_stock.py"), str(port)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    try:
        for line in process.stdout:
            if line.strip() == "ready":
                break
        else:
            raise SystemExit("the stock contender did not start")
        yield f"http://127.0.0.1:{port}/"
    finally:
        process.stdin.close()
        process.wait(START_TIMEOUT_S)


@contextlib.contextmanager
def fastapi(capacity: Capacity) -> Iterator[str]:
    """FastAPI and uvicorn with a worker for each replica."""
    (port,) = free_ports(1)
    command = [
        sys.executable, "-m", "uvicorn", "app:app", "--host", "127.0.0.1", "--port", str(port),
        "--workers", str(capacity.replicas), "--log-level", "error", "--no-access-log",
    ]  # fmt: skip
    with server(command, HERE / "fastapi_lru", capacity, port) as url:
        yield url


@contextlib.contextmanager
def litserve(capacity: Capacity) -> Iterator[str]:
    """LitServe with a worker for each replica, in a virtual environment of its own."""
    (port,) = free_ports(1)
    assert capacity.replicas == 2, "its app is written for two workers"
    with server([str(litserve_python()), "app.py", str(port)], HERE / "litserve_lru", capacity, port) as url:
        yield url


@contextlib.contextmanager
def expert(capacity: Capacity) -> Iterator[str]:
    """HAProxy that hashes the model's id, two single-worker processes, an LRU of modules from tmpfs."""
    port, *ports = free_ports(3)
    assert capacity.replicas == len(ports), "its HAProxy is written for two processes"
    folder = HERE / "expert_lru"
    shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with (
        tempfile.TemporaryDirectory(prefix="expert-bench-", dir=shared) as weights,
        contextlib.ExitStack() as stack,
    ):
        for one in ports:
            command = [
                sys.executable, "-m", "uvicorn", "app:app", "--host", "127.0.0.1", "--port", str(one),
                "--log-level", "error", "--no-access-log",
            ]  # fmt: skip
            stack.enter_context(server(command, folder, capacity, one, {"BENCH_FOLDER": weights}))
        variables = dict(
            zip(("BENCH_PORT", "BENCH_PORT_A", "BENCH_PORT_B"), map(str, (port, *ports)), strict=True)
        )
        edge = [find_haproxy(), "-db", "-f", str(folder / "haproxy.cfg")]
        yield stack.enter_context(server(edge, folder, capacity, port, variables))


@contextlib.contextmanager
def flatshare(capacity: Capacity) -> Iterator[str]:
    """This project, as ``flatshare up`` starts it."""
    port, serve_port = free_ports(2)
    command = [
        str(BIN / "flatshare"), "up", "--detach", "--ray", "local", "--port", str(port),
        "--serve-port", str(serve_port), "--replicas", str(capacity.replicas), "--slots", str(capacity.slots),
    ]  # fmt: skip
    # A host tier of its own for each turn: nothing is left from the last one.
    shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="flatshare-bench-", dir=shared) as folder:
        environment = {**os.environ, "FLATSHARE_HOST_DIR": folder}
        subprocess.run(
            command, check=True, stdout=subprocess.DEVNULL, timeout=START_TIMEOUT_S, env=environment
        )
        try:
            yield f"http://127.0.0.1:{port}/predict"
        finally:
            down = [str(BIN / "flatshare"), "down", "--port", str(port)]
            subprocess.run(down, check=True, stdout=subprocess.DEVNULL, timeout=START_TIMEOUT_S)


CONTENDERS = {
    "stock": Contender(stock, header_json, header_binary),
    "fastapi": Contender(fastapi, header_json, header_binary),
    "expert": Contender(expert, header_json, header_binary),
    "litserve": Contender(litserve, body_json, base64_binary),
    "flatshare": Contender(flatshare, header_json, header_binary),
}


@contextlib.contextmanager
def server(
    command: list[str],
    folder: Path,
    capacity: Capacity,
    port: int,
    variables: Mapping[str, str] | None = None,
) -> Iterator[str]:
    """A server with workers: started in a session of its own, so that all of it can be ended."""
    environment = {
        **os.environ,
        "BENCH_SLOTS": str(capacity.slots),
        "OMP_NUM_THREADS": "1",
        **(variables or {}),
    }
    process = subprocess.Popen(
        command, cwd=folder, env=environment, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_for_port(process, port)
        yield f"http://127.0.0.1:{port}/"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 15)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait(10)


def wait_for_port(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(f"{process.args} ended with {process.returncode}")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.1)  # a socket that does not listen yet can't be awaited
    raise SystemExit(f"{process.args} did not listen on {port}")


def litserve_python() -> Path:
    """Its own environment, which sees ours for torch and the rest: made at the first run."""
    root = HERE.parents[1] / ".venv-bench" / "litserve"
    python = root / "bin" / "python"
    if not (root / "installed").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(root)], check=True)
        requirements = str(HERE / "litserve_lru" / "requirements.txt")
        subprocess.run(
            [str(python), "-m", "pip", "install", "-q", "--no-deps", "-r", requirements], check=True
        )
        ours = next(path for path in sys.path if path.endswith("site-packages"))
        (next((root / "lib").glob("python*")) / "site-packages" / "ours.pth").write_text(ours + "\n")
        (root / "installed").touch()
    return python
