"""Unit tests run without ray: what they import must not import it either. And who needs no torch has none."""

import subprocess
import sys

CORE = [
    "flatshare.api.app", "flatshare.bench.load", "flatshare.residency.model_cache", "flatshare.resolution.heads",
    "flatshare.control.app", "flatshare.edge.supervisor", "flatshare.replica.request", "flatshare.models.probe",
    "flatshare.placement.homes", "flatshare.pool.details", "flatshare.mnist.train", "flatshare.cli.main",
    "flatshare_registry",
]  # fmt: skip


def test_the_core_imports_no_ray() -> None:
    code = f"import sys\nfor name in {CORE}: __import__(name)\nsys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_the_registry_imports_no_torch() -> None:
    code = "import sys, flatshare.cli.main\nsys.exit(bool({'torch', 'ray', 'fastapi'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


WITHOUT_TORCH = [
    "flatshare.control.deployment", "flatshare.control.app", "flatshare.edge.supervisor",
    "flatshare.edge.configuration", "flatshare.edge.process", "flatshare.local.platform", "flatshare.pool.controller",
    "flatshare.pool.environment", "flatshare.replica.receipt", "flatshare.replica.snapshot", "flatshare.cli.main",
    "flatshare.cli.fleet", "flatshare.cli.platform_verbs", "flatshare.cli.registry_verbs",
    "flatshare.cli.tenancy_verbs", "flatshare.cli.training_verbs",
]  # fmt: skip
"""Long-lived processes and light verbs: torch is 500 MB of a process, and two seconds of its start."""


def test_only_replicas_and_trainers_import_torch() -> None:
    code = (
        "import importlib, sys\n"
        f"for name in {WITHOUT_TORCH}:\n"
        "    importlib.import_module(name)\n"
        "    if 'torch' in sys.modules: sys.exit(f'{name} brought torch in')\n"
    )
    # Ray's warnings of its own are no business of this test.
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], timeout=120, stderr=subprocess.PIPE, text=True
    )
    assert done.returncode == 0, done.stderr
