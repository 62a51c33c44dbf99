"""What one actor of Ray Data does with its units: it reads rows, labels them, and reports good and bad ones
separately.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections import deque
from concurrent.futures import Future
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from flatshare.batch.core import OfflineCore
from flatshare.batch.inputs import Input
from flatshare.batch.units import Unit
from flatshare.errors import BadInput, DeviceBroken, ServeError, Wedged
from flatshare.settings import Settings
from flatshare_registry.errors import RegistryError
from flatshare_registry.records import VersionRecord

__all__ = ["UnitRunner"]

logger = logging.getLogger("flatshare.batch")

CALL_ROWS: Final = 1024
"""Rows that are read and made ready at a time: a few passes."""

AHEAD: Final = 4
"""Calls under way at a time in one process: the next models are loaded while rows of one are computed."""

READ_ERRORS: Final = (ServeError, RegistryError, OSError, ValueError, pa.ArrowException)
"""What reading a row may raise: its file is gone, or damaged."""


class UnitRunner:
    """An actor of Ray Data: labels units."""

    def __init__(self, source: Input, settings: Settings, ready: bool) -> None:
        self._source = source
        self._core = OfflineCore(settings, ready=ready)
        if len(source.files) == 1:  # while others start; with many files, the first one is not known yet
            with contextlib.suppress(*READ_ERRORS):  # its rows will say so
                source.rows(0, np.zeros(1, np.int64))

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Columns of :data:`flatshare.batch.results.SCHEMA`, and when this began and what it loaded."""
        began, loads = time.time(), self._core.loads
        units = [
            Unit(str(version), int(file), int(first), np.frombuffer(numbers, np.int64), bool(once))
            for version, file, first, numbers, once in zip(
                *(batch[name] for name in ("version", "file", "first", "numbers", "once")), strict=True
            )
        ]
        under_way: deque[_Call] = deque()
        parts: list[dict[str, NDArray[Any]]] = []
        for unit in units:
            for start in range(0, len(unit.numbers), CALL_ROWS):
                if len(under_way) == AHEAD:
                    parts += under_way.popleft().labelled()
                numbers = unit.numbers[start : start + CALL_ROWS]
                under_way.append(_Call(self._core, self._source, unit, numbers))
        parts += [part for one in under_way for part in one.labelled()]
        found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        count = len(found["row"])
        found["began"] = np.full(count, began)
        found["loads"] = np.zeros(count, np.int64)
        found["loads"][0] = self._core.loads - loads
        return found


class _Call:
    """Some rows of a unit on their way to labels; begun when it is made."""

    def __init__(self, core: OfflineCore, source: Input, unit: Unit, numbers: NDArray[np.int64]) -> None:
        self._core = core
        self._source = source
        self._unit = unit
        self._numbers = numbers
        self._answer: Future[tuple[NDArray[np.int64], VersionRecord]] = Future()
        try:
            self._answer = core.start(unit.version, source.rows(unit.file, numbers), once=unit.once)
        except READ_ERRORS as failure:
            self._answer.set_exception(failure)

    def labelled(self) -> list[dict[str, NDArray[Any]]]:
        """Columns of the results, in parts; waits for them."""
        count = len(self._numbers)
        labels: NDArray[np.int64] = np.full(count, -1)
        digest, error = "", ""
        try:
            labels, record = self._answer.result()
            digest = record.digest
        except (Wedged, DeviceBroken):
            # Nothing ends that thread. Ray Data starts another process, which does these rows.
            logger.critical("this process can't go on: it ends", exc_info=True)
            os._exit(1)
        except (BadInput, *READ_ERRORS[2:]) as failure:
            # It is one of the rows: its halves show which one, and the other rows get their labels.
            if count > 1:
                halves = np.array_split(self._numbers, 2)
                calls = [_Call(self._core, self._source, self._unit, half) for half in halves]
                return [part for call in calls for part in call.labelled()]
            error = failure.message if isinstance(failure, BadInput) else f"it can't be read: {failure}"
        except (ServeError, RegistryError) as failure:
            error = failure.message
        return [{
            "row": self._numbers + self._unit.first,
            "file": self._source.names(self._unit.file, self._numbers),
            "predicted_label": labels,
            "model": np.full(count, self._unit.version, object),
            "digest": np.full(count, digest, object),
            "error": np.full(count, error, object),
        }]  # fmt: skip
