"""What users rely on: exported names, the error tables, documented settings, the command's verbs."""

from __future__ import annotations

import inspect
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

import flatshare_registry
from flatshare import errors
from flatshare.api.error_table import INTERNAL, TABLE, describe_error
from flatshare.cli.errors import ABOUT_EXIT_CODES, EXIT_CODES, exit_code
from flatshare.cli.main import app
from flatshare.settings import Settings
from flatshare_registry import errors as registry_errors
from flatshare_registry.settings import RegistrySettings

ROOT = Path(__file__).parents[2]


def classes(module: object, root: type[Exception]) -> list[type[Exception]]:
    return [
        one
        for _, one in inspect.getmembers(module, inspect.isclass)
        if issubclass(one, root) and one is not root
    ]


OURS = [
    *classes(registry_errors, registry_errors.RegistryError),
    *classes(errors, errors.ServeError),
]


def test_exported_names_are_there() -> None:
    for module in (flatshare_registry, registry_errors, errors):
        assert len(set(module.__all__)) == len(module.__all__)  # ruff keeps them sorted
        for name in module.__all__:
            assert hasattr(module, name)
    assert {one.__name__ for one in OURS} <= set(registry_errors.__all__) | set(errors.__all__)


ONLY_AT_START = {errors.SettingsError, errors.LocalError}


@pytest.mark.parametrize("kind", OURS)
def test_every_error_has_a_status_a_code_and_an_exit_code(kind: type[Exception]) -> None:
    described = describe_error(kind("the words"))
    if kind in ONLY_AT_START:
        assert described == INTERNAL
    else:
        assert kind in TABLE
        assert 400 <= described.status < 600
        assert described.code.islower()
    assert exit_code(kind("x")) > 1
    assert set(EXIT_CODES.values()) <= set(range(1, 9))
    assert f"{exit_code(kind('x'))} " in ABOUT_EXIT_CODES, "--help names it"


@pytest.mark.parametrize("kind", OURS)
def test_every_error_survives_pickling(kind: type[Exception]) -> None:
    copy = pickle.loads(pickle.dumps(kind("the words")))
    assert type(copy) is kind
    assert copy.args == ("the words",)
    assert copy.message == "the words"  # type: ignore[attr-defined]  # both roots have it


def test_codes_are_distinct_and_unknown_errors_say_nothing() -> None:
    codes = [entry.code for entry in TABLE.values()]
    assert len(codes) == len(set(codes))
    assert "secret" not in describe_error(RuntimeError("secret")).message


def test_an_error_that_crossed_ray_is_described_by_its_cause() -> None:
    import os

    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    from ray.exceptions import RayTaskError

    original = registry_errors.NotFound("there is no tenant acme")
    crossed = RayTaskError("f", "Traceback (most recent call last): ...", original).as_instanceof_cause()
    assert isinstance(crossed, registry_errors.NotFound)
    assert str(crossed) != original.message  # Ray's own text: where it ran, and the remote traceback
    described = describe_error(crossed)
    assert (described.status, described.message) == (404, "there is no tenant acme")


def test_the_settings_page_is_as_the_code_has_it() -> None:
    code = "from settings import PAGE, page; print(page(PAGE.read_text()), end='')"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "scripts")}
    made = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert made.stdout == (ROOT / "platform/SETTINGS.md").read_text(), "run scripts/settings.py"
    for settings in (RegistrySettings, Settings):
        for name, field in settings.model_fields.items():
            assert field.description, name


def test_the_command_has_the_verbs_that_are_promised() -> None:
    verbs = set(get_command(app).commands)  # type: ignore[attr-defined]  # a click group
    assert verbs >= {
        "up", "down", "status", "edge", "tenants", "register", "versions", "promote", "rollback", "predict",
        "replicas", "scale", "drain", "rollout", "settings", "tasks", "batch", "bench", "plan", "config", "convert", "train", "gc", "audit", "doctor",
    }  # fmt: skip
