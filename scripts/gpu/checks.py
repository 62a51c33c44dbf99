"""Fifteen checks of the CUDA path, in one table: what a stand-in can't tell, on the first machine with a GPU.

``--simulated`` runs those that can on the simulated CUDA, which tests the checks themselves. Long, since each
check is a function of its own here, in the order of the table.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
from world import MIB, Place, World, percentile, rows_of, weights

from flatshare.device.cuda import CudaDevice
from flatshare.device.opening import CONTEXT_BYTES
from flatshare.device.torch_cuda import allocator_settings, without_tf32
from flatshare.engine.passes import forward
from flatshare.errors import ServeError
from flatshare.models.architecture import architecture
from flatshare.models.probe import probe_rows, probe_tolerance
from flatshare.models.stages import Model, device_tensor, plan_of

ROOT = Path(__file__).resolve().parents[2]


class Skip(Exception):
    """Why a check can't be made here."""


class Failed(Exception):
    """What a check found."""


@dataclass(frozen=True)
class Result:
    number: int
    check: str
    result: str
    detail: str
    seconds: float


Check = Callable[[Place], str]
CHECKS: list[tuple[int, str, Check, bool]] = []


def check(number: int, title: str, simulated: bool = False) -> Callable[[Check], Check]:
    def add(function: Check) -> Check:
        CHECKS.append((number, title, function, simulated))
        return function

    return add


def expect(condition: bool, text: str) -> None:
    if not condition:
        raise Failed(text)


def on_device(device: CudaDevice, seed: int, name: str) -> Model:
    net = architecture(name)
    plan = plan_of(net)
    placed = device.place(
        {key: device_tensor(one, channels_last=net.channels_last) for key, one in weights(seed, name).items()}
    )
    return Model(
        tuple(plan.stage(index, placed) for index in range(len(plan.names))), {}, "", name, net.channels_last
    )


def in_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, for what breaks one."""
    prelude = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    return subprocess.run(
        [sys.executable, "-c", prelude + code], capture_output=True, text=True, timeout=300, cwd=ROOT,
        env={**os.environ, **environment},
    )  # fmt: skip


@check(1, "driver, and kernels for this card")
def driver(place: Place) -> str:
    major, minor = torch.cuda.get_device_capability()
    built = [
        int(name.split("_")[1].rstrip("af")) for name in torch.cuda.get_arch_list() if name.startswith("sm_")
    ]
    runs = any(one // 10 == major and one % 10 <= minor for one in built)
    expect(runs, f"capability {major}.{minor} is not among {built}")
    found = shutil.which("nvidia-smi")
    version = subprocess.run([found, "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True).stdout.split() if found else ["?"]  # fmt: skip
    return f"driver {version[0]}, capability {major}.{minor}, torch has {built}"


@check(2, "tests of the device and the loader")
def tests(place: Place) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/conformance/test_devices.py",
         "tests/unit/flatshare/weights/test_device_loader.py"], capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    lines = (done.stdout + done.stderr).strip().splitlines()
    expect(done.returncode == 0, " ".join(lines[-3:]))
    return done.stdout.strip().splitlines()[-1]


@check(3, "probe errors as shares of the tolerance: FP32 below 0.1, TF32 told", simulated=True)
def probes(place: Place) -> str:
    worst: dict[tuple[str, bool], float] = {}
    device = place.device()
    for name in ("mnist-cnn", "mnist-resnet18"):
        net = architecture(name)
        for seed in range(max(place.models // 10, 2)):
            model = on_device(device, seed, name)
            cpu = Model((net.build().eval(),), {}, "", name, net.channels_last)
            cpu.stages[0].load_state_dict(weights(seed, name))  # type: ignore[attr-defined]  # a module
            for tf32 in (False, True):
                torch.backends.cudnn.allow_tf32 = tf32
                for count in (1, 2, 17, 65):
                    rows = (
                        np.concatenate([probe_rows(net), rows_of(count - 1)])
                        if count > 1
                        else probe_rows(net)
                    )
                    (found,) = device.launch(
                        [rows], lambda given, model=model: forward([model], given)
                    ).wait()
                    with torch.inference_mode():
                        wanted = cpu(torch.from_numpy(rows)).numpy()
                    without_tf32()
                    allowed = probe_tolerance(net, device.torch_device) * np.abs(wanted).max()
                    share = float(np.abs(found - wanted).max() / allowed)
                    worst[name, tf32] = max(worst.get((name, tf32), 0), share)
                    torch.backends.cudnn.allow_tf32 = tf32
            without_tf32()
    for (name, tf32), share in worst.items():
        expect(tf32 or share < 0.1, f"{name} in FP32: {share:.3f} of the tolerance")
    return ", ".join(
        f"{name} {'TF32' if tf32 else 'FP32'} {share:.3f}" for (name, tf32), share in worst.items()
    )


@check(4, "ledger and allocator agree, and a full device evicts", simulated=True)
def ledger(place: Place) -> str:
    async def run() -> str:
        world = World.of(place, place.models, slots=100_000, device_bytes=4_900_000 * place.models * 3 // 4)
        for tenant in range(place.models):
            rows = rows_of(2, tenant)
            found = await world.ask(tenant, rows)
            expect(world.error_of(tenant, rows, found) < 1e-3, f"t{tenant} answers wrongly")
        memory, cache = world.device.memory(), world.replica.cache
        held, evicted = cache.ledger.held_bytes, cache.stats.evictions
        expect(evicted > 0, "the budget was never full")
        await world.replica.close()
        return f"ledger {held // MIB} MiB, allocated {memory.allocated // MIB}, reserved {memory.reserved // MIB} ({memory.reserved / held:.3f}), {evicted} evicted, {cache.stats.loads} loads, segments grow: {world.device.runtime.expandable_segments}"  # fmt: skip

    return asyncio.run(run())


@check(5, "loads at a full budget beside full passes: no retry, no failure of the allocator", simulated=True)
def churn(place: Place) -> str:
    async def run() -> str:
        world = World.of(place, place.models, slots=100_000, device_bytes=4_900_000 * place.models // 2)
        ends, passes, loads = time.monotonic() + place.seconds, 0, 0
        before = dict(torch.cuda.memory_stats()) if not place.simulated else {}

        async def full() -> None:
            nonlocal passes
            while time.monotonic() < ends:
                await world.ask(0, rows_of(64))
                passes += 1

        async def turns() -> None:
            nonlocal loads
            while time.monotonic() < ends:
                await world.ask(loads % place.models, rows_of(1))
                loads += 1

        await asyncio.gather(full(), turns())
        counts = {}
        if not place.simulated:
            after = torch.cuda.memory_stats()
            counts = {name: after[name] - before.get(name, 0) for name in ("num_alloc_retries", "num_ooms")}
            expect(not any(counts.values()), str(counts))
        refusals = world.replica.cache._loads.refusals
        await world.replica.close()
        expect(not refusals, f"{refusals} loads found no memory")
        return f"{passes} passes of 64 rows, {loads} requests that load, {counts or 'no refusals'}"

    return asyncio.run(run())


@check(6, "four processes of a quarter each stay within it")
def quarters(place: Place) -> str:
    code = (
        "import torch\nfrom flatshare.device.torch_cuda import TorchCuda\n"
        "from flatshare.device.opening import most_bytes\n"
        "total = torch.cuda.mem_get_info()[1]\nmost = most_bytes(total, 0.25)\nruntime = TorchCuda(most)\nkept = []\n"
        "try:\n    while True: kept.append(torch.empty(64 * 2**20, dtype=torch.uint8, device='cuda'))\n"
        "except torch.OutOfMemoryError: print(runtime.memory().reserved, most, total)\n"
    )
    found = []
    for _ in range(4):
        done = in_process(code)
        expect(done.returncode == 0, done.stderr[-300:])
        reserved, most, total = map(int, done.stdout.split())
        expect(reserved <= most, f"{reserved} bytes reserved, {most} allowed")
        found.append(reserved)
    return f"{max(found) // MIB} MiB of {total // MIB}, at most {most // MIB}"


@check(7, "placements in parallel while passes run: every model is what it was", simulated=True)
def parallel(place: Place) -> str:
    async def run() -> str:
        world = World.of(place, 24, slots=9, load_concurrency=8)
        worst, answers = 0.0, 0
        for _ in range(max(place.repeats // 24, 1)):
            rows = rows_of(3, answers)
            found = await asyncio.gather(*(world.ask(tenant, rows) for tenant in range(24)))
            for tenant, one in enumerate(found):
                worst, answers = max(worst, world.error_of(tenant, rows, one)), answers + 1
        await world.replica.close()
        expect(worst < 1e-3, f"largest difference {worst:.2e}")
        return f"{answers} answers, largest difference from the CPU {worst:.1e}"

    return asyncio.run(run())


SICK = """
import asyncio, torch
from world import Place, World, rows_of
from flatshare.errors import DeviceBroken, ServeError, Wedged
async def run():
    world = World.of(Place(False, 3, 1, 1), 3, slots=4, request_timeout_s=3.0)
    world.replica.inference.ready()  # a device's first passes take longer than a request may
    await world.ask(0, rows_of(1))
    launch = world.device.launch
    def sick(rows, work):
        def bad(given):
            SICKNESS
            return work(given)
        return launch(rows, bad)
    world.device.launch = sick
    try: await world.ask(0, rows_of(1))
    except ServeError as error: print("request:", type(error).__name__)
    world.device.launch = launch
    try: await world.ask(1, rows_of(1))
    except ServeError as error: print("next:", type(error).__name__)
    try: world.replica.check_health(); print("healthy")
    except (DeviceBroken, Wedged) as error: print("health:", type(error).__name__)
asyncio.get_event_loop_policy().new_event_loop().run_until_complete(run())
import os; os._exit(0)
"""


@check(8, "a device-side assert makes the replica unhealthy")
def assertion(place: Place) -> str:
    done = in_process(SICK.replace("SICKNESS", "torch._assert_async(torch.zeros(1, device=given[0].device))"))
    expect("health: DeviceBroken" in done.stdout, done.stdout + done.stderr[-300:])
    return " ".join(done.stdout.split())


@check(9, "a pass that never ends: requests end in their time, the replica is unhealthy")
def hang(place: Place) -> str:
    took = time.monotonic()
    done = in_process(SICK.replace("SICKNESS", "torch.cuda._sleep(10**12)"))
    took = time.monotonic() - took
    expect("health:" in done.stdout, done.stdout + done.stderr[-300:])
    return f"{' '.join(done.stdout.split())}; {took:.0f} s with start"


def left_after(place: Place, scrubbed: bool) -> tuple[int, int]:
    """How often a pattern is found after a model went, and of how many bytes it was."""
    pattern = np.frombuffer(b"\x5a\xa5customer-weights" * 64, np.uint8)
    runtime = place.runtime()
    device = CudaDevice(runtime)
    placed = device.place({number: torch.from_numpy(np.tile(pattern, 4096)) for number in range(8)})
    if scrubbed:
        device.scrub(placed.values())
    size = sum(one.nbytes for one in placed.values())
    del placed
    gc.collect()
    asyncio.run(device.settle())
    if place.simulated:
        left = runtime.contents().count(pattern.tobytes())  # type: ignore[attr-defined]  # the simulation's
    else:
        left = 0
        with device.runtime.on(
            device._copies
        ):  # the pool of the stream that they came by; all are kept, so all are others
            blocks = [torch.empty(size // 8, dtype=torch.uint8, device="cuda") for _ in range(8)]
            torch.cuda.synchronize()
        for block in blocks:
            left += block.cpu().numpy().tobytes().count(pattern.tobytes())
        for slab in iter(lambda: device._slabs.get(timeout=0) if not device._slabs.empty() else None, None):
            left += sum(chunk.numpy().tobytes().count(pattern.tobytes()) for chunk in slab._chunks)
    return left, size


@check(10, "nothing of erased weights is left on the device or in pinned memory", simulated=True)
def erasure(place: Place) -> str:
    control, _ = left_after(place, scrubbed=False)
    expect(control > 0, "the search finds nothing where it should")
    left, size = left_after(place, scrubbed=True)
    expect(not left, f"found {left} times")
    return f"{size // MIB} MiB overwritten, nothing found ({control} times without)"


@check(11, "first request after start, and of each batch size", simulated=True)
def first(place: Place) -> str:
    async def run() -> str:
        world = World.of(place, 1, slots=2)
        began = time.monotonic()
        world.replica.inference.ready()
        warm = time.monotonic() - began
        times = []
        for count in range(1, 65):
            began = time.perf_counter()
            await world.ask(0, rows_of(count))
            times.append((time.perf_counter() - began) * 1e3)
        await world.replica.close()
        rest = times[1:]
        return f"warm-up {warm:.1f} s; first {times[0]:.1f} ms with its load; 2 to 64 rows p50 {percentile(rest, 0.5):.2f}, p99 {percentile(rest, 0.99):.2f} ms"  # fmt: skip

    return asyncio.run(run())


@check(12, "no allocation by the driver in steady state")
def steady(place: Place) -> str:
    device = place.device()
    models = [on_device(device, seed, "mnist-cnn") for seed in range(4)]
    for seed in range(4):  # each once more: what a replacement needs beside what it replaces is there then
        models[seed] = on_device(device, seed, "mnist-cnn")
        device.launch([rows_of(8)], lambda given, seed=seed: forward([models[seed]], given)).wait()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]) as seen:  # fmt: skip
        for seed in range(20):
            models[seed % 4] = on_device(device, seed, "mnist-cnn")
            device.launch([rows_of(8)], lambda given, seed=seed: forward([models[seed % 4]], given)).wait()
    counted = {one.key: one.count for one in seen.key_averages()}
    bad = {name: counted.get(name, 0) for name in ("cudaHostAlloc", "cudaMalloc", "cudaFree", "cuMemCreate")}
    expect(not any(bad.values()), str(bad))
    return f"20 loads and passes: {bad}"


@check(13, "memory beside the allocator's: the context, against what is left for it")
def context(place: Place) -> str:
    code = (
        "import torch\nfree, total = torch.cuda.mem_get_info()\nfrom world import Place\nfrom checks import on_device\n"
        "from flatshare.engine.passes import forward\nfrom world import rows_of\ndevice = Place(False, 1, 1, 1).device()\n"
        "model = on_device(device, 0, 'mnist-resnet18')\n"
        "device.launch([rows_of(64)], lambda given: forward([model], given)).wait()\n"
        "now = torch.cuda.mem_get_info()[0]\nprint(free - now - torch.cuda.memory_reserved(), total)\n"
    )
    done = in_process(code)
    expect(done.returncode == 0, done.stderr[-300:])
    beside = int(done.stdout.split()[0])
    expect(beside < CONTEXT_BYTES, f"{beside // MIB} MiB, and {CONTEXT_BYTES // MIB} are left for it")
    return f"{beside // MIB} MiB after the context itself; {CONTEXT_BYTES // MIB} are left for both"


@check(14, "a reserved GPU that is not seen is refused", simulated=True)
def refused(place: Place) -> str:
    code = "from flatshare.device.opening import open_device\nopen_device('auto', 0.25)\n"
    done = in_process(code, CUDA_VISIBLE_DEVICES="")
    expect(done.returncode != 0 and "finds no CUDA device" in done.stderr, done.stderr[-300:])
    return done.stderr.strip().splitlines()[-1].partition(": ")[2].partition(". ")[0]


@check(15, "two GPUs: one process each")
def two(place: Place) -> str:
    if torch.cuda.device_count() < 2:
        raise Skip(f"{torch.cuda.device_count()} GPU here")
    code = (
        "import os; os.environ.setdefault('RAY_AUTH_MODE', 'disabled')\nimport ray\n"
        "from flatshare.pool.gpus import check_visible\nray.init(address='local', include_dashboard=False)\n"
        "@ray.remote(num_gpus=1)\nclass One:\n    def where(self):\n"
        "        check_visible(ray.get_gpu_ids(), os.environ['CUDA_VISIBLE_DEVICES']); return ray.get_gpu_ids()[0]\n"
        "print(sorted(ray.get([one.where.remote() for one in [One.remote(), One.remote()]])))\n"
    )
    done = in_process(code)
    expect(done.stdout.strip().endswith("[0, 1]"), done.stdout + done.stderr[-300:])
    return "replicas on GPU 0 and 1"


def made(number: int, title: str, function: Check, place: Place) -> Result:
    began = time.monotonic()
    try:
        result, detail = "ok", function(place)
    except Skip as error:
        result, detail = "skipped", str(error)
    except (Failed, ServeError, RuntimeError, subprocess.TimeoutExpired) as error:
        result, detail = "failed", f"{type(error).__name__}: {error}"
    return Result(number, title, result, detail, round(time.monotonic() - began, 1))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table as a document")
    parser.add_argument(
        "--only", type=int, action="append", metavar="NUMBER", help="these checks (repeatable)"
    )
    parser.add_argument(
        "--without",
        type=int,
        action="append",
        default=[],
        metavar="NUMBER",
        help="all but these (repeatable)",
    )
    parser.add_argument("--simulated", action="store_true", help="on the simulated CUDA, what can run there")
    parser.add_argument("--models", type=int, default=200, help="tenants of the checks of memory")
    parser.add_argument("--seconds", type=float, default=60, help="of loads beside passes")
    parser.add_argument(
        "--repeats", type=int, default=10_000, help="answers while placements run in parallel"
    )
    options = parser.parse_args()
    place = Place(options.simulated, options.models, options.seconds, options.repeats)
    there = torch.cuda.is_available()
    console = Console()
    card = torch.cuda.get_device_name() if there else "simulated" if options.simulated else "no GPU"
    console.print(
        f"{card}; torch {torch.__version__}; allocator: {allocator_settings() or 'as torch has it'}"
    )
    if not there and not options.simulated:
        console.print("This machine has no CUDA device: only the checks that need none are made.")
    results: list[Result] = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("checks", total=len(CHECKS))
        for number, title, function, simulated in CHECKS:
            progress.update(task, description=title, advance=1)
            if (options.only and number not in options.only) or number in options.without:
                continue
            if number == 14 or (there and not options.simulated) or (options.simulated and simulated):
                results.append(made(number, title, function, place))
                one = results[-1]  # at once: a card that hangs takes the table along
                console.print(
                    f"{one.number:>2} {one.result}: {one.check}: {one.detail} ({one.seconds:.1f} s)"
                )
            else:
                results.append(Result(number, title, "skipped", "needs a GPU", 0.0))
            if options.json:
                document = {
                    "card": card,
                    "torch": torch.__version__,
                    "checks": [asdict(one) for one in results],
                }
                options.json.write_text(json.dumps(document, indent=1) + "\n")
    table = Table("", "check", "result", "what was found", "s")
    for one in results:
        table.add_row(str(one.number), one.check, one.result, one.detail, f"{one.seconds:.1f}")
    console.print(table)
    return int(any(one.result == "failed" for one in results))


if __name__ == "__main__":
    sys.exit(main())
