"""Arguments of Ray Serve's config files, and what builders make of them.

Whoever can read the cluster's state can read these arguments, so keys come from files on the node where
Serve builds applications: the head.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, SecretStr

from flatshare.api.identity import OperatorKeys, Role
from flatshare.errors import SettingsError
from flatshare.pool.environment import variables_of
from flatshare.settings import Settings, load_settings

__all__ = ["AppArguments", "Built", "built"]


class AppArguments(BaseModel):
    """What a config file says of the platform.

    Attributes
    ----------
    settings
        By name, as in ``FLATSHARE_<NAME>`` but in lower case. What is left out is the default: the head's
        environment is not asked.
    admin_key_file, viewer_key_file
        Files with the operators' keys, on the head; needed unless ``auth`` is ``off``.
    """

    model_config = ConfigDict(extra="forbid")

    settings: dict[str, Any] = Field(default_factory=dict)
    admin_key_file: str = ""
    viewer_key_file: str = ""


class Built(BaseModel):
    """What builders need of the arguments.

    Attributes
    ----------
    settings
        Without secrets.
    operators
        Digests of keys; None when authentication is off.
    environment
        Variables of Serve's processes.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, frozen=True)

    settings: Settings
    operators: OperatorKeys | None
    environment: dict[str, str]


def built(args: AppArguments) -> Built:
    """The settings, the operators and the environment of a platform.

    Raises
    ------
    SettingsError
        Settings are wrong, secret or unknown, or a key's file can't be read.
    """
    secret = {"admin_key", "viewer_key", "api_key"} & set(args.settings)
    if secret:
        raise SettingsError(f"{', '.join(sorted(secret))}: name a file (admin_key_file) instead of a key")
    unknown = set(args.settings) - set(Settings.model_fields)
    if unknown:
        raise SettingsError(f"there is no setting {', '.join(sorted(unknown))}")
    settings = _settings(args.settings)
    operators = None
    if settings.auth == "on":
        if not args.admin_key_file:
            raise SettingsError("admin_key_file: name the file of the operator's key, or set auth to off")
        files = {Role.ADMIN: args.admin_key_file, Role.VIEWER: args.viewer_key_file}
        operators = OperatorKeys.of({role: _key(file) for role, file in files.items() if file})
    if settings.tasks == "embedded" and not settings.tasks_file:
        raise SettingsError("tasks=embedded: name tasks_file, and keep to one node; or take a broker")
    if not settings.erasure_key_file:
        raise SettingsError("erasure_key_file: name a file on the head; it is made when it is missing")
    environment = variables_of(settings.edge, os.environ)
    return Built(settings=settings, operators=operators, environment=environment)


def _settings(values: dict[str, Any]) -> Settings:
    """Settings of these values and the defaults alone, whatever this process's environment says."""
    names = [f"FLATSHARE_{name.upper()}" for name in Settings.model_fields]
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        settings = load_settings(**values)
    finally:
        os.environ.update(hidden)
    empty = SecretStr("")
    return settings.model_copy(update={"admin_key": empty, "viewer_key": empty, "api_key": empty})


def _key(file: str) -> str:
    try:
        return Path(file).read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not text"
        raise SettingsError(f"the key in {file} can't be read: {why}") from None
