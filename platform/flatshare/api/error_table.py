"""The one table from error class to HTTP status and stable code, for both planes.

Clients may rely on status and code; messages are for people. The most specific class wins. A test
fails when an error class of either package is not covered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from flatshare import errors
from flatshare_registry import errors as registry_errors

__all__ = ["TABLE", "HttpError", "describe_error"]


@dataclass(frozen=True, slots=True)
class HttpError:
    """How an error is reported to a client.

    Attributes
    ----------
    retry_after_s
        Value of Retry-After; None for none.
    """

    status: int
    code: str
    message: str = ""
    retry_after_s: int | None = None


TABLE: Final[Mapping[type[Exception], HttpError]] = {
    registry_errors.InvalidRef: HttpError(400, "invalid_model_ref"),
    registry_errors.InvalidWeights: HttpError(400, "invalid_weights"),
    registry_errors.InvalidInput: HttpError(400, "invalid_input"),
    registry_errors.NotFound: HttpError(404, "not_found"),
    registry_errors.AlreadyExists: HttpError(409, "already_exists"),
    registry_errors.StillReferenced: HttpError(409, "still_referenced"),
    registry_errors.AliasMoved: HttpError(409, "alias_moved"),
    registry_errors.Conflict: HttpError(409, "conflict", retry_after_s=1),
    registry_errors.Corrupt: HttpError(500, "model_corrupt"),
    registry_errors.UnfitStore: HttpError(500, "store_unfit"),
    registry_errors.Unavailable: HttpError(503, "store_unavailable", retry_after_s=1),
    errors.Unauthenticated: HttpError(401, "unauthenticated"),
    errors.Forbidden: HttpError(403, "forbidden"),
    errors.NotLocal: HttpError(403, "not_local"),
    errors.Suspended: HttpError(403, "tenant_suspended"),
    errors.TooSlow: HttpError(408, "too_slow"),
    errors.BodyOverQuota: HttpError(413, "over_body_bytes"),
    errors.RowsOverQuota: HttpError(413, "over_rows_per_request"),
    errors.UnsupportedEncoding: HttpError(415, "unsupported_encoding"),
    errors.OverQuota: HttpError(429, "over_quota", retry_after_s=1),
    errors.TooManyRequests: HttpError(429, "over_requests_per_s", retry_after_s=1),
    errors.TooManyAtOnce: HttpError(429, "over_concurrent_requests", retry_after_s=1),
    errors.TooManyBytesAtOnce: HttpError(429, "over_body_bytes_at_once", retry_after_s=1),
    errors.TooManyColdLoads: HttpError(429, "over_cold_loads_per_min", retry_after_s=5),
    errors.ResidentOverQuota: HttpError(429, "over_resident_bytes", retry_after_s=1),
    errors.TooLarge: HttpError(413, "too_large"),
    errors.BadInput: HttpError(400, "bad_input"),
    errors.Wedged: HttpError(503, "replica_wedged", retry_after_s=1),
    errors.DeviceBroken: HttpError(503, "replica_device_failed", retry_after_s=1),
    errors.NoRoom: HttpError(503, "no_room", retry_after_s=1),
    errors.DeviceFull: HttpError(503, "device_full", retry_after_s=1),
    errors.WouldBeLate: HttpError(503, "would_be_late", retry_after_s=1),
    errors.Overloaded: HttpError(503, "overloaded", retry_after_s=1),
    errors.DeadlineExceeded: HttpError(504, "deadline_exceeded", retry_after_s=1),
    errors.OtherStore: HttpError(409, "other_store"),
    errors.FleetUnavailable: HttpError(503, "fleet_unavailable", retry_after_s=1),
    errors.NeverFits: HttpError(507, "model_too_large"),
    errors.ProbeFailed: HttpError(500, "probe_failed"),
    errors.NoTasks: HttpError(404, "no_tasks"),
    errors.TooManyTasks: HttpError(429, "over_queued_tasks", retry_after_s=5),
    errors.NoSuchPipeline: HttpError(404, "no_such_pipeline"),
    errors.StepFailed: HttpError(500, "step_failed"),
    errors.StepUnavailable: HttpError(503, "step_unavailable", retry_after_s=1),
    errors.ModelFailed: HttpError(500, "model_failed"),
    errors.IsolationBroken: HttpError(500, "isolation_broken"),
}

INTERNAL: Final = HttpError(500, "internal", "something went wrong here; give your operator the request id")


def describe_error(error: BaseException) -> HttpError:
    """Status, code and message for any exception; one that is not in the table reveals no details.

    An error that crossed a Ray process comes as a class that is also a ``RayTaskError``, whose
    text is the remote traceback: its ``cause`` is the error itself.
    """
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):
        error = cause
    for kind in type(error).__mro__:
        known = TABLE.get(kind)
        if known is not None:
            message = _public_message(error, known)
            # An error may know better than its class when a retry makes sense.
            retry_after_s = getattr(error, "retry_after_s", None) or known.retry_after_s
            return HttpError(known.status, known.code, message, retry_after_s)
    return INTERNAL


def _public_message(error: BaseException, known: HttpError) -> str:
    """The error's own words, which are written for callers; a store's address is not for them."""
    if known.code == "store_unavailable":
        return "the registry's store does not answer; retry"
    return str(error.args[0]) if error.args else known.code
