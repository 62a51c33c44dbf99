"""The demo: train real customers, serve them from one pool, check every answer, show who is where."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

from flatshare.bench.load import Load, Outcome, run_load
from flatshare.bench.report import summarise
from flatshare.bench.workload import BenchRequest, encode_json, zipf_shares
from flatshare.cli.context import credentials
from flatshare.cli.fleet import print_fleet
from flatshare.cli.output import out, print_table, progress_bar
from flatshare.mnist.digits import Digits, load_digits
from flatshare.mnist.handwriting import HANDWRITINGS, Handwriting
from flatshare.mnist.train import Trained, fine_tune, load_module, train_base
from flatshare.models.architecture import architecture
from flatshare_registry import PRODUCTION, Registry, TenantId
from flatshare_registry.settings import RegistrySettings
from flatshare_registry.testing.ports import free_ports
from flatshare_registry.testing.s3_server import CREDENTIALS

NETWORK = architecture("mnist-cnn")
CUSTOMERS = {
    "acme": "rotated", "globex": "inverted", "initech": "thick", "umbrella": "thin", "hooli": "noisy",
    "stark": "shifted", "wayne": "mirrored", "wonka": "relabelled", "tyrell": "upside-down",
    "soylent": "flipped", "cyberdyne": "checkered", "vandelay": "rotated-right",
}  # fmt: skip
BATCH = 100
"""Images a request when the whole held-out set goes through the service."""


@dataclass
class Customer:
    """A tenant, what was measured of its model offline, and its held-out digits."""

    tenant: str
    writing: Handwriting
    trained: Trained
    rows: NDArray[np.float32]
    labels: NDArray[np.int64]
    expected: NDArray[np.int64]


def main() -> int:
    arguments = parse_arguments()
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="flatshare-demo-")))
        keep = contextlib.ExitStack()
        stack.callback(lambda: None if arguments.keep else keep.close())
        out.rule("a local S3 and a platform", align="left")
        os.environ |= CREDENTIALS
        os.environ["AWS_ENDPOINT_URL"], s3 = start_s3()
        keep.callback(stop_process, s3)
        os.environ["FLATSHARE_STORE"] = "s3://models/demo"
        if not arguments.keep:
            os.environ["FLATSHARE_HOST_DIR"] = str(folder / "host")  # goes with the demo
        port = arguments.port or free_ports(1)[0]
        starting = start_platform(arguments, port)
        keep.callback(lambda: run_cli("down", "--port", str(port)))

        out.rule("customers: one base model, fine-tuned on each one's handwriting", align="left")
        digits = load_digits()
        customers, second = train_customers(digits, folder, arguments.tenants)

        url = f"http://127.0.0.1:{port}"
        finish(starting)
        register(customers, second)
        show_customers(customers)

        out.rule("every held-out digit through the service", align="left")
        served = send_held_out(url, customers)
        out.rule("a mix of customers, one digit a request, by Zipf(1.0)", align="left")
        mixed = send_mix(url, customers, arguments.requests)
        fleet = httpx.get(f"{url}/admin/replicas", timeout=30, headers=credentials(url)).json()
        document = report(customers, served, mixed, fleet)
        show(document, fleet)
        out.print(f"\n{time.monotonic() - started:.0f} s in all")
        if arguments.json:
            Path(arguments.json).write_text(json.dumps(document, indent=2))
            out.print(f"written: {arguments.json}")
        if arguments.keep:
            store, endpoint = os.environ["FLATSHARE_STORE"], os.environ["AWS_ENDPOINT_URL"]
            out.print(
                f"Left running: {url}\n  export FLATSHARE_STORE={store} AWS_ENDPOINT_URL={endpoint} "
                + " ".join(f"{name}={value}" for name, value in CREDENTIALS.items())
                + f"\n  .venv/bin/flatshare replicas\nEnd it: .venv/bin/flatshare down --port {port}; "
                f"kill {s3.pid}",
                soft_wrap=True,
            )
        good = not document["errors"] and not document["wrong_answers"]
        good &= all(one["served_accuracy"] == one["own_accuracy"] for one in document["tenants"])
        return 0 if good else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="also write the results as a document")
    parser.add_argument("--keep", action="store_true", help="leave the platform and its S3 running")
    parser.add_argument("--tenants", type=int, default=len(CUSTOMERS), choices=range(2, len(CUSTOMERS) + 1),
                        metavar=f"2..{len(CUSTOMERS)}")  # fmt: skip
    parser.add_argument("--requests", type=int, default=2000, help="requests of the mix")
    parser.add_argument("--slots", type=int, default=4, help="models that one replica holds")
    parser.add_argument("--port", type=int, help="port of the edge; a free one by default")
    return parser.parse_args()


def start_s3() -> tuple[str, subprocess.Popen[str]]:
    """moto's S3 as a process of its own, which prints its address when it listens.

    Not a context manager: with --keep it must outlive this program, and a generator's ``finally``
    runs when the interpreter ends.
    """
    command = [sys.executable, "-m", "flatshare_registry.testing.s3_server", "--bucket", "models"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, start_new_session=True
    )
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    if not url:
        raise SystemExit("the local S3 server did not start")
    return url, process


def stop_process(process: subprocess.Popen[str]) -> None:
    process.terminate()
    process.wait(10)


def run_cli(*arguments: str) -> str:
    """Run flatshare as a user would; its output."""
    command = [str(Path(sys.executable).parent / "flatshare"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"flatshare {' '.join(arguments)}: {done.stderr or done.stdout}")
    return done.stdout


def start_platform(arguments: argparse.Namespace, port: int) -> subprocess.Popen[str]:
    """Begin to start the platform; it comes up while the base model trains."""
    (serve_port,) = free_ports(1)
    command = [str(Path(sys.executable).parent / "flatshare"), "up", "--detach", "--ray", "local",
               "--port", str(port), "--serve-port", str(serve_port), "--slots", str(arguments.slots)]  # fmt: skip
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(starting: subprocess.Popen[str]) -> None:
    output = starting.communicate(timeout=180)[0]
    if starting.returncode:
        raise SystemExit(output)
    out.print(output.partition("\nTry:")[0])


def train_customers(digits: Digits, folder: Path, count: int) -> tuple[list[Customer], Trained]:
    """Train the base, then everybody; and a second version of the first customer."""
    with progress_bar("base model") as progress:
        weights, accuracy = train_base(NETWORK, digits, progress=progress)
    path = folder / "base.safetensors"
    path.write_bytes(weights)
    out.print(f"base model: {accuracy:.2%} of {len(digits.test_labels)} test digits right")
    base = load_module(NETWORK, path)
    customers = []
    for tenant, name in itertools.islice(CUSTOMERS.items(), count):
        writing = HANDWRITINGS[name]
        with progress_bar(f"{tenant} ({name})") as progress:
            trained = fine_tune(NETWORK, base, digits, writing, progress=progress)
        customers.append(measured(tenant, writing, trained, digits, seed=0))
    first = customers[0]
    with progress_bar(f"{first.tenant}, second version") as progress:
        second = fine_tune(NETWORK, base, digits, first.writing, seed=10, progress=progress)
    customers[0] = measured(first.tenant, first.writing, second, digits, seed=10)
    return customers, first.trained


def measured(tenant: str, writing: Handwriting, trained: Trained, digits: Digits, seed: int) -> Customer:
    """What the model said offline of each of its customer's held-out digits."""
    pixels, labels = writing.apply(digits.test_images, digits.test_labels, seed + 1)
    return Customer(tenant, writing, trained, NETWORK.preprocess(pixels), labels, trained.own_labels)


def register(customers: list[Customer], first_version: Trained) -> None:
    """Everybody into the registry; the first customer's second version is promoted."""
    registry = Registry(RegistrySettings().open_store(), actor="demo")
    for customer in customers:
        tenant = TenantId(customer.tenant)
        registry.create_tenant(tenant)
        weights = first_version.weights if customer is customers[0] else customer.trained.weights
        registry.register(tenant, weights, NETWORK.name, NETWORK.tensors)
    tenant = TenantId(customers[0].tenant)
    second = registry.register(tenant, customers[0].trained.weights, NETWORK.name, NETWORK.tensors)
    registry.set_alias(tenant, PRODUCTION, second.version.version)
    out.print(f"registered {len(customers)} tenants; {second.version.name} is promoted")


def show_customers(customers: list[Customer]) -> None:
    print_table(
        "",
        ["tenant", "handwriting", "base#", "own#"],
        [
            (one.tenant, one.writing.about, f"{one.trained.base_accuracy:.2%}", f"{offline(one):.2%}")
            for one in customers
        ],
    )


def offline(customer: Customer) -> float:
    return float((customer.expected == customer.labels).mean())


def send_held_out(url: str, customers: list[Customer]) -> dict[str, float]:
    """All held-out digits of all customers; their accuracy through the service."""
    accuracy: dict[str, float] = {}
    with progress_bar("requests") as progress:
        total = sum(-(-len(one.rows) // BATCH) for one in customers)
        done = 0
        with httpx.Client(timeout=60, headers=credentials(url)) as client:
            for customer in customers:
                labels: list[int] = []
                for start in range(0, len(customer.rows), BATCH):
                    reply = client.post(
                        f"{url}/predict",
                        content=encode_json(customer.rows[start : start + BATCH]),
                        headers={
                            "serve_multiplexed_model_id": customer.tenant,
                            "content-type": "application/json",
                        },
                    )
                    reply.raise_for_status()
                    labels += reply.json()["predicted_label"]
                    done += 1
                    progress(done, total)
                WRONG[customer.tenant] = int((np.array(labels) != customer.expected).sum())
                accuracy[customer.tenant] = float((np.array(labels) == customer.labels).mean())
    out.print(
        f"{sum(len(one.rows) for one in customers)} digits sent, "
        f"{sum(WRONG.values())} answers differ from the offline ones"
    )
    return accuracy


WRONG: dict[str, int] = {}


def send_mix(url: str, customers: list[Customer], count: int) -> list[Outcome]:
    random = np.random.default_rng(0)
    chosen = random.choice(len(customers), size=count, p=zipf_shares(len(customers), 1.0))

    def shots() -> Iterator[BenchRequest]:
        for index in chosen.tolist():
            customer = customers[index]
            row = int(random.integers(0, len(customer.rows)))
            body = encode_json(customer.rows[row : row + 1])
            yield BenchRequest(customer.tenant, body, (int(customer.expected[row]),))

    with progress_bar("requests") as progress:
        return run_load(
            f"{url}/predict",
            shots(),
            Load(requests=count, concurrency=8, headers=credentials(url)),
            lambda done: progress(done, count),
        )


def report(
    customers: list[Customer], served: dict[str, float], mixed: list[Outcome], fleet: dict[str, Any]
) -> dict[str, Any]:
    summary = summarise(mixed)
    return {
        "tenants": [
            {
                "id": one.tenant,
                "handwriting": one.writing.name,
                "base_accuracy": one.trained.base_accuracy,
                "own_accuracy": offline(one),
                "served_accuracy": served[one.tenant],
            }
            for one in customers
        ],
        "requests": summary["requests"],
        "errors": summary["errors"],
        "wrong_answers": summary["wrong_answers"] + sum(WRONG.values()),
        "hit_rate": summary["hit_rate"],
        "latency_ms": {name: summary["latency_ms"][name] for name in ("p50", "p99")},
        "requests_per_s": summary["requests_per_s"],
        "totals": fleet["totals"],
        "replicas": fleet["replicas"],
    }


def show(document: dict[str, Any], fleet: dict[str, Any]) -> None:
    latency, rate = document["latency_ms"], document["hit_rate"]
    out.print(
        f"{document['requests']} requests, {document['errors']} errors, {document['wrong_answers']} wrong answers; "
        f"p50 {latency['p50']:.1f} ms, p99 {latency['p99']:.1f} ms, {document['requests_per_s']:.0f} requests/s; "
        f"found on the device {rate['device']:.1%}, in the store {rate['store']:.1%}",
        soft_wrap=True,
    )
    out.rule("accuracy through the service", align="left")
    print_table(
        "",
        ["tenant", "handwriting", "base#", "own, offline#", "served#"],
        [
            (
                one["id"],
                one["handwriting"],
                *(f"{one[key]:.2%}" for key in ("base_accuracy", "own_accuracy", "served_accuracy")),
            )
            for one in document["tenants"]
        ],
    )
    out.rule("who is where", align="left")
    print_fleet(fleet, models=True)


if __name__ == "__main__":
    sys.exit(main())
