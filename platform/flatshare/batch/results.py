"""What a batch writes: Parquet parts, each whole or not there, and a manifest that says what they are of."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from flatshare_registry.errors import InvalidInput

__all__ = ["SCHEMA", "Manifest", "Results"]

SCHEMA: Final = pa.schema(
    [
        ("row", pa.int64()),
        ("file", pa.string()),
        ("predicted_label", pa.int64()),
        ("model", pa.string()),
        ("digest", pa.string()),
        ("error", pa.string()),
    ]
)
"""``row``: its number in the input. ``error``: why it has no label. The next run tries
it again, and its row without a label stays: count rows whose ``error`` is null.
"""

MANIFEST: Final = "_batch.json"


@dataclass(frozen=True, slots=True)
class Manifest:
    """What the results in a folder belong to.

    Attributes
    ----------
    input
        Its path.
    fingerprint
        Of its files: names, sizes, times and rows.
    columns
        Of Parquet: what goes to the model, and what names it.
    versions
        The version of each ref, resolved once: a promotion in the middle of a batch changes nothing of it.
    """

    input: str
    fingerprint: str
    model: str
    columns: str
    versions: dict[str, str]


class Results:
    """A folder of results.

    Parameters
    ----------
    folder
        Made when it is missing.

    Raises
    ------
    InvalidInput
        It can't be, or holds other things.
    """

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidInput(f"{folder} can't be made: {error.strerror}") from error
        others = [one.name for one in self._folder.iterdir() if not one.name.startswith((".", "_"))]
        self._lock = open(self._folder / ".lock", "w")  # noqa: SIM115  # as long as this lives
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InvalidInput(f"another batch writes into {folder} now") from None
        if others and not (self._folder / MANIFEST).exists():
            raise InvalidInput(f"{folder} holds other things ({others[0]} ...); name a new folder")

    def manifest(self) -> Manifest | None:
        """What was begun here; None for nothing."""
        try:
            document = json.loads((self._folder / MANIFEST).read_text())
            return Manifest(**document)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError) as error:
            raise InvalidInput(f"{self._folder / MANIFEST} is damaged; name a new folder") from error

    def begin(self, manifest: Manifest) -> None:
        """Write down what the results that follow belong to."""
        self._put(MANIFEST, json.dumps(asdict(manifest), indent=1).encode())

    def done(self, rows: int) -> NDArray[np.bool_]:
        """Which of the input's rows have a label here, ``(rows,)``."""
        found = np.zeros(rows, np.bool_)
        for part in self.parts():
            table = pq.read_table(part, columns=["row", "error"])
            labelled = table.column("row").to_numpy()[table.column("error").is_null().to_numpy()]
            found[labelled] = True
        return found

    def parts(self) -> list[Path]:
        """The parts that are there, all of them whole."""
        return sorted(self._folder.glob("part-*.parquet"))

    def add(self, columns: Sequence[dict[str, NDArray[Any]]]) -> None:
        """Write a part of these rows: whole, or not at all."""
        if not columns:
            return
        merged = {name: np.concatenate([one[name] for one in columns]) for name in SCHEMA.names}
        failed = merged["error"] != ""
        masks = {"predicted_label": failed, "digest": failed, "error": ~failed}
        arrays = [pa.array(merged[field.name], field.type, mask=masks.get(field.name)) for field in SCHEMA]
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_arrays(arrays, schema=SCHEMA), sink)
        self._put(f"part-{uuid.uuid4().hex}.parquet", sink.getvalue().to_pybytes())

    def _put(self, name: str, data: bytes) -> None:
        new = self._folder / f".{name}.new"
        try:
            with open(new, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            new.replace(self._folder / name)
        except OSError as error:
            with contextlib.suppress(OSError):
                new.unlink()
            raise InvalidInput(f"{self._folder / name} can't be written: {error.strerror}") from error
