"""Unit tests run without ray: what they import must not import it either."""

import subprocess
import sys

CORE = [
    "flatshare.api.app", "flatshare.bench.load", "flatshare.cache.model_cache", "flatshare.cache.view",
    "flatshare.control.app", "flatshare.edge.supervisor", "flatshare.engine.service", "flatshare.models.probe",
    "flatshare.pool.ranking", "flatshare.pool.details", "flatshare.training.train", "flatshare.cli.main",
    "flatshare_registry",
]  # fmt: skip


def test_the_core_imports_no_ray() -> None:
    code = f"import sys\nfor name in {CORE}: __import__(name)\nsys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_the_registry_imports_no_torch() -> None:
    code = "import sys, flatshare.cli.main\nsys.exit(bool({'torch', 'ray', 'fastapi'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
