"""The registry's errors: one small tree, one class for each thing that a caller does differently.

    RegistryError                 anything below
    ├── InvalidInput              the caller's fault; do not retry; nothing was read or written
    │   ├── InvalidRef            an id or model ref that the grammar refuses
    │   └── InvalidWeights        a file that is not a well-formed safetensors file of this architecture
    ├── NotFound                  tenant, version, alias or blob that does not exist (a real miss only)
    ├── AlreadyExists             create of something that is there
    ├── Conflict                  somebody else changed it first; read again, then retry
    │   └── AliasMoved            the alias does not name what the caller said it does; look, then decide
    ├── StillReferenced           refused because something names it; move the alias first
    ├── Corrupt                   stored bytes are not what their name or schema says; tell an operator
    └── Unavailable               the store did not answer (in time); retry later

Messages are for people and are not part of the API. No HTTP in here: the serving package maps
classes to statuses in one table. Every class pickles, because errors cross Ray processes.
"""

from __future__ import annotations

__all__ = [
    "AliasMoved",
    "AlreadyExists",
    "Conflict",
    "Corrupt",
    "InvalidInput",
    "InvalidRef",
    "InvalidWeights",
    "NotFound",
    "RegistryError",
    "StillReferenced",
    "Unavailable",
]


class RegistryError(Exception):
    """Root of the registry's errors; ``args == (message,)`` so that every subclass pickles."""

    def __init__(self, message: str) -> None:
        super().__init__(message)

    @property
    def message(self) -> str:
        """What happened and what to do about it, for a person."""
        return str(self.args[0])


class InvalidInput(RegistryError):
    """The caller passed something that can never work."""


class InvalidRef(InvalidInput):
    """A tenant id, alias, version or model ref that the grammar refuses."""


class InvalidWeights(InvalidInput):
    """Not a safetensors file that this registry (or this architecture) accepts."""


class NotFound(RegistryError):
    """It does not exist. Never raised for a store that failed to answer."""


class AlreadyExists(RegistryError):
    """A create met something that is already there."""


class Conflict(RegistryError):
    """A compare-and-swap lost its race; read again and retry."""


class AliasMoved(Conflict):
    """An alias names another version than the caller expected; nothing was changed."""


class StillReferenced(RegistryError):
    """Refused because an alias names it."""


class Corrupt(RegistryError):
    """Stored bytes do not match their digest or schema."""


class Unavailable(RegistryError):
    """The store did not answer, or not in time; retry later."""
