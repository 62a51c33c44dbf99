"""The one table from error class to exit code. Messages go to stderr; there is never a traceback."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from flatshare import errors
from flatshare_registry import errors as registry_errors

__all__ = ["ABOUT_EXIT_CODES", "EXIT_CODES", "NotTold", "exit_code"]


class NotTold(errors.ServeError):
    """A change stands in the store; the platform was not told, or not one replica took it up."""


EXIT_CODES: Final[Mapping[type[Exception], int]] = {
    registry_errors.InvalidInput: 2,
    errors.BadInput: 2,
    errors.SettingsError: 2,
    registry_errors.NotFound: 3,
    registry_errors.AlreadyExists: 4,
    registry_errors.Conflict: 4,
    registry_errors.StillReferenced: 4,
    registry_errors.Unavailable: 5,
    errors.Unauthenticated: 4,
    errors.Forbidden: 4,
    errors.Suspended: 4,
    errors.OverQuota: 5,
    errors.Overloaded: 5,
    errors.DeadlineExceeded: 5,
    errors.FleetUnavailable: 5,
    errors.NoTasks: 3,
    errors.NoSuchPipeline: 3,
    errors.StepFailed: 6,
    errors.StepUnavailable: 5,
    errors.OtherStore: 4,
    registry_errors.Corrupt: 6,
    registry_errors.UnfitStore: 6,
    errors.ModelFailed: 6,
    errors.IsolationBroken: 6,
    errors.LocalError: 7,
    NotTold: 8,
    registry_errors.RegistryError: 1,
    errors.ServeError: 1,
}
ABOUT_EXIT_CODES: Final = (
    "Exit codes: 0 done, 2 wrong use or settings, 3 not found, 4 refused by what is there or for want of a "
    "right, 5 try again later, 6 damaged, 7 something on this machine, 8 changed in the store, but a "
    "platform that runs was not told, 1 else."
)


def exit_code(error: BaseException) -> int:
    """The most specific class wins."""
    return next((EXIT_CODES[kind] for kind in type(error).__mro__ if kind in EXIT_CODES), 1)
