"""Operators of a platform that starts here: their keys, from settings or files, and what is passed on."""

from __future__ import annotations

import os

from pydantic import SecretStr

from flatshare.api.identity import OperatorKeys, Role
from flatshare.errors import SettingsError
from flatshare.local.keys import key_file, make_key
from flatshare.local.state import state_folder
from flatshare.settings import Settings
from flatshare_registry.errors import InvalidInput

__all__ = ["operators_of", "without_keys"]


def operators_of(settings: Settings) -> tuple[Settings, OperatorKeys | None]:
    """Settings without secrets, for Ray to pass around, and the digests of the operators' keys.

    The keys' variables also leave this process's environment, which Ray's processes inherit.

    Raises
    ------
    SettingsError
        A setting does not hold a key of its role.
    LocalError
        A key's file can be read by others.
    """
    given = {Role.ADMIN: settings.admin_key, Role.VIEWER: settings.viewer_key}
    bare = without_keys(settings).model_copy(
        update={
            "erasure_key_file": settings.erasure_key_file or str(key_file("erasure")),
            "tasks_file": settings.tasks_file or str(state_folder() / f"tasks-{settings.port}.sqlite"),
        }
    )
    if settings.auth == "off":
        return bare, None
    try:
        keys = {role: key.get_secret_value() or make_key(role.value) for role, key in given.items()}
        return bare, OperatorKeys.of(keys)
    except InvalidInput as error:
        raise SettingsError(f"admin_key or viewer_key: {error.message}") from error


def without_keys(settings: Settings) -> Settings:
    """The settings without keys, which also leave this process's environment: Ray's processes inherit it."""
    for name in ("ADMIN_KEY", "VIEWER_KEY", "API_KEY"):
        os.environ.pop(f"FLATSHARE_{name}", None)
    empty = SecretStr("")
    return settings.model_copy(update={"admin_key": empty, "viewer_key": empty, "api_key": empty})
