"""The platform's errors: one small tree, one class for each thing that a caller does differently.

    ServeError                  anything below
    ├── BadInput                the request can never work: body, shape, header; do not retry as it is
    │   ├── TooSlow             the body does not arrive
    │   ├── UnsupportedEncoding the body is compressed in a way that is not read here
    │   └── TooLarge            the body or the batch is over its stated limit
    │       ├── BodyOverQuota   ... over this tenant's own limit
    │       └── RowsOverQuota
    ├── Unauthenticated         no key, or one that is not good: unknown, expired or revoked
    ├── Forbidden               a good key that may not do this
    │   └── NotLocal            there are no keys, and it is not of this machine alone
    ├── Suspended               the tenant is suspended; its operator can resume it
    ├── OverQuota               more than the tenant's share; retry later
    │   ├── TooManyRequests     requests_per_s
    │   ├── TooManyAtOnce       concurrent_requests
    │   ├── TooManyBytesAtOnce  bytes of bodies that are held at a time
    │   ├── TooManyTasks        too many wait to be run
    │   ├── TooManyColdLoads    cold_loads_per_min
    │   └── ResidentOverQuota   resident_bytes: all that the tenant may keep on a device is in use
    ├── Overloaded              no room now; retry after ``retry_after_s``
    │   ├── WouldBeLate         its turn would come after its time
    │   ├── Wedged              a pass never ends: the replica is being replaced
    │   ├── DeviceBroken        the device is lost to this process: likewise
    │   └── NoRoom              every slot is leased and none came free before the deadline
    │       └── DeviceFull      the device has no memory, whatever the ledger says
    ├── DeadlineExceeded        it was accepted but not answered in time; retry
    ├── OtherStore              the call is about another store than this platform's
    ├── FleetUnavailable        not all replicas answered in time; retry
    ├── NoTasks                 no tasks are taken here
    ├── NoSuchPipeline          no pipeline of this name is served here
    ├── StepFailed              a pipeline's step failed on a request; tell an operator
    ├── StepUnavailable         a pipeline's step does not answer; retry
    ├── ModelFailed             this version can't be served (corrupt, or does not load); tell an operator
    │   ├── NeverFits           it is larger than the whole budget of a replica; no waiting helps
    │   └── ProbeFailed         it does not answer its probe as it did when it was registered
    ├── IsolationBroken         a lease tag did not match: the request failed rather than mix two tenants
    ├── SettingsError           contradictory settings; refused when the program starts
    └── LocalError              something on this machine is in the way: a taken port, a dead process

What the registry raises (``flatshare_registry.errors``) passes through unchanged. No HTTP in here:
``api/error_table.py`` maps classes to statuses and ``cli/errors.py`` to exit codes. Every class
pickles with ``args == (message,)``, because errors cross Ray processes.
"""

from __future__ import annotations

__all__ = [
    "BadInput",
    "BodyOverQuota",
    "DeadlineExceeded",
    "DeviceBroken",
    "DeviceFull",
    "FleetUnavailable",
    "Forbidden",
    "IsolationBroken",
    "LocalError",
    "ModelFailed",
    "NeverFits",
    "NoRoom",
    "NoSuchPipeline",
    "NoTasks",
    "NotLocal",
    "OtherStore",
    "OverQuota",
    "Overloaded",
    "ProbeFailed",
    "ResidentOverQuota",
    "RowsOverQuota",
    "ServeError",
    "SettingsError",
    "StepFailed",
    "StepUnavailable",
    "Suspended",
    "TooLarge",
    "TooManyAtOnce",
    "TooManyBytesAtOnce",
    "TooManyColdLoads",
    "TooManyRequests",
    "TooManyTasks",
    "TooSlow",
    "Unauthenticated",
    "UnsupportedEncoding",
    "Wedged",
    "WouldBeLate",
    "copy_of",
]


class ServeError(Exception):
    """Root of the platform's errors."""

    retry_after_s: int | None = None
    """Seconds after which a retry makes sense; None when it does not."""

    def __init__(self, message: str) -> None:
        super().__init__(message)

    @property
    def message(self) -> str:
        """What happened and what to do about it, for a person."""
        return str(self.args[0])


class BadInput(ServeError):
    """The request itself is wrong."""


class TooSlow(BadInput):
    """The body did not arrive in time."""


class UnsupportedEncoding(BadInput):
    """The body is compressed in a way that is not read here."""


class TooLarge(BadInput):
    """The request is over a stated limit."""


class BodyOverQuota(TooLarge):
    """The body is longer than this tenant may send."""


class RowsOverQuota(TooLarge):
    """The batch is larger than this tenant may send."""


class Unauthenticated(ServeError):
    """Who calls is not known."""


class Forbidden(ServeError):
    """Who calls is known, and may not do this."""


class NotLocal(Forbidden):
    """Authentication is off, and the request may be a web page's rather than this machine's user's."""


class Suspended(ServeError):
    """The tenant is suspended; nothing of it is deleted."""


class OverQuota(ServeError):
    """The tenant is over a limit of its own; others are not concerned."""

    retry_after_s = 1


class TooManyRequests(OverQuota):
    """Faster than ``requests_per_s``."""


class TooManyAtOnce(OverQuota):
    """More than ``concurrent_requests`` under way."""


class TooManyBytesAtOnce(OverQuota):
    """The bodies of the tenant's requests take more memory together than it may have."""


class TooManyTasks(OverQuota):
    """The tenant has too many tasks waiting."""


class TooManyColdLoads(OverQuota):
    """More loads than ``cold_loads_per_min``."""

    retry_after_s = 5


class ResidentOverQuota(OverQuota):
    """All that the tenant may keep on the device is in use."""


class Overloaded(ServeError):
    """Refused at once, because too much is already waiting."""

    retry_after_s = 1


class WouldBeLate(Overloaded):
    """Refused at once, because its turn would come after its time; ``retry_after_s`` is worked out."""


class Wedged(Overloaded):
    """A pass on the device does not end; the replica is unhealthy, and will be replaced.

    Attributes
    ----------
    before_pass
        Whoever is told had not come into a pass: nothing uses its model.
    """

    before_pass = False


class DeviceBroken(Overloaded):
    """The device failed in a way that only a new process mends; the replica is unhealthy, and will be
    replaced.
    """


class NoRoom(Overloaded):
    """Every slot was leased until the deadline."""


class DeviceFull(NoRoom):
    """The device has no memory for it now, although the ledger has: the allocator cuts it otherwise."""


class DeadlineExceeded(ServeError):
    """Accepted, but the deadline passed first."""

    retry_after_s = 1


class OtherStore(ServeError):
    """A change was told, or asked for, that concerns another store than this platform's."""


class FleetUnavailable(ServeError):
    """The replicas did not all answer in time."""

    retry_after_s = 1


class NoTasks(ServeError):
    """No tasks are taken here."""


class NoSuchPipeline(ServeError):
    """No pipeline of this name is served beside this pool."""


class StepFailed(ServeError):
    """A pipeline's step failed on a request, or made what no model takes; it is not asked again."""


class StepUnavailable(ServeError):
    """A pipeline's step died each time that it was asked, or there is none now."""


class ModelFailed(ServeError):
    """The version is there but can't be served."""


class NeverFits(ModelFailed):
    """The version is larger than all that a replica may hold."""


class ProbeFailed(ModelFailed):
    """The version is loaded but would answer wrongly."""


class IsolationBroken(ServeError):
    """The model that ran is not the one that was leased."""


class SettingsError(ServeError):
    """Settings that contradict each other or the machine."""


class LocalError(ServeError):
    """Starting or stopping things on this machine failed."""


def copy_of(error: Exception) -> Exception:
    """A copy of a failure for one of many waiters: a shared one would collect all their tracebacks."""
    try:
        copy = type(error)(*error.args)
    except TypeError:
        return error
    copy.__dict__.update(error.__dict__)
    copy.__cause__ = error.__cause__
    return copy
