"""Settings that change while the platform runs, without a restart: which, and how a change is checked."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

from pydantic import ValidationError

from flatshare.errors import SettingsError
from flatshare.settings import Settings, settings_of

__all__ = ["LIVE", "changed", "live_of", "with_live"]

LIVE: Final = (
    "plans",
    "tenant_share",
    "target_ongoing_requests",
    "upscale_delay_s",
    "downscale_delay_s",
    "downscale_to_zero_delay_s",
)
"""Names of settings that the control plane and running replicas take over in place."""


def live_of(settings: Settings) -> dict[str, object]:
    """The settings that can change in place, by name, as JSON has them."""
    return settings.model_dump(mode="json", include=set(LIVE), exclude_none=True)


def with_live(settings: Settings, latest: Settings) -> Settings:
    """These settings, with what can change in place as it is in ``latest``."""
    return settings.model_copy(update={name: getattr(latest, name) for name in LIVE})


def changed(
    settings: Settings, changes: Mapping[str, object], allowed: Collection[str], otherwise: str
) -> Settings:
    """The same settings, except for these changes.

    Parameters
    ----------
    allowed
        Names that may change this way.
    otherwise
        What to do about another one.

    Raises
    ------
    SettingsError
        One is no setting or can't change this way, or what comes out contradicts itself.
    """
    for name in changes:
        if name not in Settings.model_fields:
            raise SettingsError(f"there is no setting {name[:80]}")
        if name not in allowed:
            raise SettingsError(f"{name} can't change {otherwise}")
    try:
        return settings_of({**settings.model_dump(), **changes})
    except ValidationError as error:
        problems = [
            ".".join(str(part) for part in problem["loc"][1:]) + (": " if problem["loc"][1:] else "")
            + problem["msg"].removeprefix("Value error, ")
            for problem in error.errors(include_input=False)
        ]  # fmt: skip
        raise SettingsError(f"{', '.join(changes)}: {'; '.join(problems)}") from None
