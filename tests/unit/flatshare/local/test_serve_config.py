"""Serve's config file: valid by Serve's own schema, without secrets, and refused where something must be named."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve.schema import ServeDeploySchema

from flatshare.control import app_builder
from flatshare.errors import SettingsError
from flatshare.local.serve_config import cluster_environment, serve_config
from flatshare.pipelines import app as pipelines_app
from flatshare.pool import app as pool_app
from flatshare.pool import tasks_app
from flatshare.pool.app_arguments import AppArguments, built
from flatshare.pool.environment import serve_environment
from flatshare.settings import Settings, StepSettings
from flatshare_registry.keys import new_key

KEY = new_key("ADMIN").text


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        store=(tmp_path / "store").as_uri(), erasure_key_file="/etc/flatshare/erasure.key", slots=7,
        admin_key=KEY, pipelines={"images": StepSettings(max_replicas=3)}, tasks="redis",
        tasks_broker_url="redis://queue:6379/0",
    )  # fmt: skip


def test_it_is_what_serve_takes_and_names_no_key(settings: Settings) -> None:
    text = serve_config(settings, "/etc/flatshare/admin.key")
    assert KEY not in text and "&id" not in text
    found = ServeDeploySchema.model_validate(yaml.safe_load(text))
    assert [(one.name, one.route_prefix, one.external_scaler_enabled) for one in found.applications] == [
        ("flatshare-pipeline-images", None, False), ("flatshare", "/", True), ("flatshare-tasks", None, True),
        ("flatshare-control", "/admin", False),
    ]  # fmt: skip
    for one in found.applications:
        module, _, name = one.import_path.partition(":")
        builders = {found.__name__: found for found in (pool_app, tasks_app, app_builder, pipelines_app)}
        assert callable(getattr(builders[module], name))
        assert one.args["settings"]["slots"] == 7 and "admin_key" not in one.args["settings"]


@pytest.mark.parametrize("builder", [pool_app.build, tasks_app.build, app_builder.build, pipelines_app.build])
def test_serve_validates_the_arguments(builder: Callable[..., Any]) -> None:
    (parameter,) = inspect.signature(builder).parameters.values()
    assert inspect.isclass(parameter.annotation), (
        "a string here, and Serve hands over an unchecked dictionary"
    )
    with pytest.raises(ValidationError, match="slotz"):
        call_user_app_builder_with_args_if_necessary(builder, {"settings": {}, "slotz": 3})


def test_keys_come_from_files_and_settings_from_the_file_alone(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "admin").write_text(KEY + "\n")
    text = yaml.safe_load(serve_config(settings, str(tmp_path / "admin")))
    monkeypatch.setenv("FLATSHARE_SLOTS", "99")
    monkeypatch.setenv("AWS_REGION", "eu-1")
    found = built(AppArguments(**text["applications"][1]["args"]))
    assert found.settings.slots == 7 and found.settings.pipelines["images"].max_replicas == 3
    assert found.operators is not None and KEY not in repr(found)
    assert found.environment["AWS_REGION"] == "eu-1"
    assert found.environment.items() >= serve_environment("haproxy").items()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"settings": {"erasure_key_file": "/x"}}, "admin_key_file"),
        ({"settings": {"auth": "off"}}, "erasure_key_file"),
        ({"settings": {"admin_key": "fs_x"}}, "name a file"),
        ({"settings": {"slotz": 1}}, "no setting slotz"),
        ({"settings": {"slots": 0}}, "slots"),
        ({"settings": {"erasure_key_file": "/x"}, "admin_key_file": "/nowhere/key"}, "can't be read"),
        ({"settings": {"erasure_key_file": "/x", "auth": "off", "tasks": "embedded"}}, "tasks_file"),
    ],
)  # fmt: skip
def test_what_is_missing_or_wrong_is_said(args: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        built(AppArguments(**args))


def test_what_must_be_named_for_a_cluster_is_asked_for_when_it_is_printed(settings: Settings) -> None:
    with pytest.raises(SettingsError, match="admin-key-file"):
        serve_config(settings, "")
    with pytest.raises(SettingsError, match="ERASURE_KEY_FILE"):
        serve_config(settings.model_copy(update={"erasure_key_file": ""}), "/k")
    with pytest.raises(SettingsError, match="TASKS_FILE"):
        serve_config(settings.model_copy(update={"tasks": "embedded", "tasks_broker_url": ""}), "/k")


def test_nodes_are_told_what_serve_reads_when_it_starts(settings: Settings) -> None:
    assert cluster_environment(settings).items() >= serve_environment("haproxy").items()
