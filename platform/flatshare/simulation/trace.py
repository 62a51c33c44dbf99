"""Traces: which tenant was asked for when. Drawn by popularity, read from a file, or written to one."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from flatshare_registry.errors import InvalidInput

__all__ = ["Trace", "read_trace", "tide_trace", "write_trace", "zipf_trace"]


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """Requests in order.

    Attributes
    ----------
    at_s
        Seconds from the first request on, not falling; float64 ``(N,)``.
    models
        Index into ``names``; int64 ``(N,)``.
    names
        Model refs.
    """

    at_s: npt.NDArray[np.float64]
    models: npt.NDArray[np.int64]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.models)


def zipf_trace(tenants: int, exponent: float, requests: int, rate: float, seed: int = 0) -> Trace:
    """A steady trace.

    Parameters
    ----------
    exponent
        Of popularity: the k-th tenant's share falls with ``k**-exponent``.
    rate
        Requests a second; they come at random (a Poisson process).
    """
    dice = np.random.default_rng(seed)
    at_s = np.cumsum(dice.exponential(1 / rate, requests))
    return Trace(at_s - at_s[0], _drawn(dice, tenants, exponent, requests), _names(tenants))


def tide_trace(
    tenants: int, exponent: float, requests: int, day_s: float = 86_400.0, low: float = 0.2, seed: int = 0
) -> Trace:
    """One day, whose rate rises from ``low`` of the peak at its beginning to the peak at noon, and falls
    again.
    """
    dice = np.random.default_rng(seed)
    at = np.linspace(0, day_s, 10_000)
    rate = low + (1 - low) * (1 - np.cos(2 * np.pi * at / day_s)) / 2
    share = np.cumsum(rate)
    at_s = np.sort(np.interp(dice.random(requests), share / share[-1], at))
    return Trace(at_s, _drawn(dice, tenants, exponent, requests), _names(tenants))


def _drawn(dice: np.random.Generator, tenants: int, exponent: float, requests: int) -> npt.NDArray[np.int64]:
    weights = 1.0 / np.arange(1, tenants + 1) ** exponent
    edges = np.cumsum(weights / weights.sum())
    return np.minimum(np.searchsorted(edges, dice.random(requests)), tenants - 1)


def _names(tenants: int) -> tuple[str, ...]:
    return tuple(f"t{number:06}" for number in range(tenants))


def write_trace(path: Path, requests: Iterable[tuple[float, str]]) -> int:
    """Write a trace as CSV with the columns ``time`` (seconds) and ``tenant``; how many requests it has."""
    count = 0
    try:
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("time", "tenant"))
            for at_s, tenant in requests:
                writer.writerow((f"{at_s:.6f}", tenant))
                count += 1
    except OSError as error:
        raise InvalidInput(f"{path} can't be written: {error.strerror}") from None
    return count


def read_trace(path: Path) -> Trace:
    """Read such a CSV; rows may come in any order, and times may begin anywhere.

    Raises
    ------
    InvalidInput
        It can't be read, has no such columns, a time that is no number, or no request.
    """
    times: list[float] = []
    models: list[int] = []
    known: dict[str, int] = {}
    try:
        with path.open(newline="") as file:
            rows = csv.DictReader(file)
            if not {"time", "tenant"} <= set(rows.fieldnames or ()):
                raise InvalidInput(f"{path} has no columns time and tenant in its first line")
            for row in rows:
                times.append(float(row["time"]))
                if not row["tenant"]:
                    raise InvalidInput(f"{path}: line {len(times) + 1} names no tenant")
                models.append(known.setdefault(row["tenant"], len(known)))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InvalidInput(
            f"{path} can't be read: {getattr(error, 'strerror', None) or 'not text'}"
        ) from None
    except (ValueError, TypeError):
        raise InvalidInput(f"{path}: line {len(times) + 2} has no number of seconds in `time`") from None
    at_s = np.array(times)
    if not len(at_s) or not np.isfinite(at_s).all():
        raise InvalidInput(f"{path} holds no request, or a time that is none")
    order = np.argsort(at_s, kind="stable")
    return Trace(at_s[order] - at_s[order[0]], np.array(models, np.int64)[order], tuple(known))
