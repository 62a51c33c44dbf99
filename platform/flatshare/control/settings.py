"""Settings that change while the platform runs, over HTTP: what holds, and how it is changed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Final

from pydantic import BaseModel, Field

from flatshare.control.fleet import Fleet, Told
from flatshare.control.schemas import Refreshed, told
from flatshare.errors import SettingsError
from flatshare.live_settings import LIVE, changed, live_of
from flatshare.settings import Settings
from flatshare_registry.errors import InvalidInput

__all__ = ["RunningSettings", "SettingsChange", "SettingsReply"]

OTHERWISE: Final = (
    "in place: flatshare rollout --set changes what replicas alone read, all else needs a restart"
)


class SettingsReply(Refreshed):
    """What can change in place, as it is now; and which replicas go by it, where it was just changed."""

    revision: int = Field(description="How often settings were changed since the platform started.")
    settings: dict[str, Any] = Field(description="By name.")

    @classmethod
    def now(cls, running: RunningSettings, who: Told) -> SettingsReply:
        """From what holds and whom the fleet reached."""
        return cls(revision=running.revision, settings=live_of(running.settings), **told(who))


class SettingsChange(BaseModel):
    """Settings by name."""

    settings: dict[str, Any] = Field(description="Values as in the environment, or as JSON has them.")


class RunningSettings:
    """What holds now. Must be used on one event loop.

    Parameters
    ----------
    keep
        Has a change kept where replicas and a new control plane find it; blocks, and returns the revision.
    on_change
        Told of the new settings, once they are kept.
    """

    def __init__(
        self,
        settings: Settings,
        revision: int = 0,
        keep: Callable[[Callable[[Settings], Settings]], tuple[Settings, int]] | None = None,
        on_change: Callable[[Settings], None] = lambda _: None,
    ) -> None:
        self.settings = settings
        self.revision = revision
        self._keep = keep
        self._on_change = on_change
        self._lock = asyncio.Lock()

    async def change(self, changes: Mapping[str, object], fleet: Fleet) -> Told:
        """Change some, and tell all replicas; whom it reached. The others look for it every few seconds.

        Raises
        ------
        InvalidInput
            One can't change in place, or what comes out contradicts itself; nothing was changed.
        Unavailable
            The cluster did not say that it keeps the change: look, and make it again.
        """

        def apply(settings: Settings) -> Settings:
            try:
                return changed(settings, changes, LIVE, OTHERWISE)
            except SettingsError as error:
                raise InvalidInput(error.message) from None

        async with self._lock:
            if self._keep is None:
                self.settings, self.revision = apply(self.settings), self.revision + 1
            else:
                self.settings, self.revision = await asyncio.to_thread(self._keep, apply)
            self._on_change(self.settings)
        return await fleet.follow_settings()
