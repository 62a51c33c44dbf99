"""Read and check safetensors files without torch, before a byte of them is trusted.

Format (github.com/huggingface/safetensors): 8 bytes, the little-endian length N of the header;
N bytes of JSON, ``{name: {"dtype", "shape", "data_offsets": [start, end]}}`` with an optional
``__metadata__`` of strings; then the data, which the offsets must cover without gap or overlap.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, Final

from flatshare_registry.errors import InvalidWeights
from flatshare_registry.records import TensorRecord

__all__ = [
    "DTYPE_BYTES",
    "TensorSpec",
    "WeightsFile",
    "check_architecture",
    "describe",
    "read_weights",
]

DTYPE_BYTES: Final[Mapping[str, int]] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
"""Bytes of one element, by safetensors dtype name."""

MAX_HEADER_BYTES: Final = 8 * 1024**2
"""Longest header that is read into memory, in bytes. A thousand tensors need about 100 kB."""

MAX_TENSORS: Final = 20_000
"""Most tensors of one file: each becomes a record that every replica keeps."""

MAX_DIMS: Final = 8
MAX_ELEMENTS: Final = 2**40
_LENGTH_BYTES: Final = 8

_SHOWN: Final = 3
"""Most names of one kind in a message."""

_COMPARED: Final = 40
"""Most names that are compared with as many others to find those that are alike."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What an architecture asks of one tensor: safetensors dtype name and shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WeightsFile:
    """A checked safetensors file.

    Attributes
    ----------
    digest
        sha256 of the whole file, in hex.
    size_bytes
        Length of the whole file.
    tensors
        In the order of their bytes.
    """

    digest: str
    size_bytes: int
    tensors: tuple[TensorRecord, ...]


def read_weights(path: Path) -> bytes:
    """Read a whole file after checking its header, so that a hostile or damaged one costs little.

    Nothing is hashed here: the registration does that, of exactly these bytes.

    Raises
    ------
    InvalidWeights
        Not a file that can be read, or not a valid safetensors file.
    """
    try:
        with path.open("rb") as file:
            # Refuse a hostile or damaged file before reading all of it.
            head = file.read(_LENGTH_BYTES)
            head += file.read(min(int.from_bytes(head, "little"), MAX_HEADER_BYTES))
            _header(memoryview(head), os.fstat(file.fileno()).st_size)
            file.seek(0)
            data = file.read()
    except OSError as error:
        raise InvalidWeights(f"{path} can't be read: {error.strerror or error}") from error
    return data


def describe(data: bytes | memoryview) -> WeightsFile:
    """Check a safetensors file and describe it.

    Parameters
    ----------
    data
        The whole file. Nothing is copied but the header.

    Raises
    ------
    InvalidWeights
        With one clear reason. Memory used is bounded by the header limit, whatever the file claims.
    """
    view = memoryview(data).cast("B")
    entries, start = _header(view, len(view))
    tensors = tuple(
        TensorRecord(
            name=name,
            dtype=spec.dtype,
            shape=spec.shape,
            start=start + begin,
            end=start + end,
            sha256=hashlib.sha256(view[start + begin : start + end]).hexdigest(),
        )
        for name, spec, begin, end in entries
    )
    return WeightsFile(hashlib.sha256(view).hexdigest(), len(view), tensors)


def check_architecture(
    tensors: tuple[TensorRecord, ...], name: str, wanted: Mapping[str, TensorSpec]
) -> None:
    """Check that a file's tensors are exactly those of an architecture.

    Raises
    ------
    InvalidWeights
        Naming the first few tensors that are missing, not part of it, or of another dtype or shape.
    """
    found = {tensor.name: TensorSpec(tensor.dtype, tensor.shape) for tensor in tensors}
    missing, unknown = _nearest_first([key for key in wanted if key not in found], set(found) - set(wanted))
    problems = [_some(missing, "missing"), _some(unknown, "not part of it")]
    wrong = [
        f"{key!a} is {found[key].dtype}{list(found[key].shape)}, must be {spec.dtype}{list(spec.shape)}"
        for key, spec in wanted.items()
        if key in found and found[key] != spec
    ]
    problems += wrong[:_SHOWN] + ([f"{len(wrong) - _SHOWN} more of another shape"] if wrong[_SHOWN:] else [])
    if any(problems):
        raise InvalidWeights(f"the weights are not a {name}: {'; '.join(filter(None, problems))}")


def _some(names: Sequence[str], what: str) -> str:
    """The first few names, and what is the matter with them; empty when there is none."""
    if not names:
        return ""
    shown = ", ".join(f"{name[:80]!a}" for name in names[:_SHOWN])
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{shown}{more} {'is' if len(names) == 1 else 'are'} {what}"


def _nearest_first(missing: Sequence[str], unknown: Collection[str]) -> tuple[list[str], list[str]]:
    """Both lists, with the names first that are most like one of the other list: a wrapper's prefix shows.

    Only some names are compared, so that it is quick whatever a file holds.
    """
    left, pairs = sorted(unknown)[:_COMPARED], []
    for place, name in enumerate(missing[:_COMPARED]):
        likeness = [(SequenceMatcher(None, name[:80], other[:80]).ratio(), other) for other in left]
        if likeness:
            pairs.append((-max(likeness)[0], place, name, max(likeness)[1]))
    first = [(name, other) for _, _, name, other in sorted(pairs)]
    return (
        list(dict.fromkeys([*(name for name, _ in first), *missing])),
        list(dict.fromkeys([*(other for _, other in first), *sorted(unknown)])),
    )


Entry = tuple[str, TensorSpec, int, int]


def _header(view: memoryview, size_bytes: int) -> tuple[list[Entry], int]:
    """Entries of the header in order of their bytes, and where the data starts.

    ``view`` holds at least the header of a file of ``size_bytes``.
    """
    if size_bytes < _LENGTH_BYTES:
        raise InvalidWeights(f"not a safetensors file: {size_bytes} bytes are too few for a header length")
    length = int.from_bytes(view[:_LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise InvalidWeights(
            f"not a safetensors file that is accepted: it claims a header of {length} bytes, "
            f"the limit is {MAX_HEADER_BYTES}"
        )
    data_start = _LENGTH_BYTES + length
    if data_start > size_bytes:
        raise InvalidWeights(f"truncated: the header ends at byte {data_start}, the file at {size_bytes}")
    raw = _parse_json(bytes(view[_LENGTH_BYTES:data_start]))
    _check_metadata(raw.pop("__metadata__", {}))
    if not raw:
        raise InvalidWeights("the file holds no tensor")
    if len(raw) > MAX_TENSORS:
        raise InvalidWeights(f"the file holds {len(raw)} tensors, the limit is {MAX_TENSORS}")
    entries = sorted((_entry(name, value) for name, value in raw.items()), key=lambda entry: entry[2:])
    position = 0
    for name, _, begin, end in entries:
        if begin != position:
            kind = "overlaps the tensor before it" if begin < position else "leaves a gap before it"
            raise InvalidWeights(
                f"tensor {name[:80]!a} starts at {begin}, which {kind} (expected {position})"
            )
        position = end
    if data_start + position != size_bytes:
        raise InvalidWeights(
            f"the tensors end at byte {data_start + position}, the file at {size_bytes}: truncated or padded"
        )
    return entries, data_start


def _parse_json(text: bytes) -> dict[str, Any]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise InvalidWeights("the header names a key twice")
        return result

    try:
        raw = json.loads(text.decode("utf-8"), object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:  # ValueError: bad UTF-8, bad JSON, absurd integers
        raise InvalidWeights("not a safetensors file: the header is not JSON") from error
    if not isinstance(raw, dict):
        raise InvalidWeights("not a safetensors file: the header is not a JSON object")
    return raw


def _check_metadata(metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InvalidWeights("the header's __metadata__ is not an object of strings")


def _entry(name: str, value: Any) -> Entry:
    shown = f"tensor {name[:80]!a}"
    if not name or len(name) > 512 or not name.isprintable():
        raise InvalidWeights(f"{shown} has an unusable name")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise InvalidWeights(f"{shown} must have dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise InvalidWeights(f"{shown} has dtype {str(dtype)[:20]!a}; known are {', '.join(DTYPE_BYTES)}")
    if not _naturals(shape) or len(shape) > MAX_DIMS:
        raise InvalidWeights(f"{shown} has a shape that is not a list of at most {MAX_DIMS} sizes")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InvalidWeights(f"{shown} has data_offsets that are not [start, end]")
    elements = math.prod(shape)
    if elements > MAX_ELEMENTS or elements * DTYPE_BYTES[dtype] != offsets[1] - offsets[0]:
        raise InvalidWeights(
            f"{shown} spans {offsets[1] - offsets[0]} bytes, which its dtype and shape do not"
        )
    return name, TensorSpec(dtype, tuple(shape)), offsets[0], offsets[1]


def _naturals(value: Any) -> bool:
    """Whether it is a list of non-negative integers of sane size (a bool is no integer here)."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= MAX_ELEMENTS for item in value)
