"""What to send: tenants drawn by popularity, images drawn from real digits, all from one seed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import orjson
from numpy.typing import NDArray

__all__ = ["BenchRequest", "digit_shots", "encode_json", "zipf_shares"]


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """One request to send.

    Attributes
    ----------
    model
        The ref in the header.
    body
        Ready to send.
    expected
        The labels that the answer must have; None to not check.
    headers
        More than those of the whole load: a key of the model's own tenant, say.
    """

    model: str
    body: bytes
    expected: tuple[int, ...] | None = None
    content_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()


def zipf_shares(count: int, exponent: float) -> NDArray[np.float64]:
    """Share of traffic of each of ``count`` tenants, the first the most popular; 0 is all alike."""
    weights = 1.0 / np.arange(1, count + 1) ** exponent
    shares: NDArray[np.float64] = weights / weights.sum()
    return shares


def encode_json(rows: NDArray[np.float32]) -> bytes:
    """The notebook's body for some rows: ``{"image": [...]}``."""
    return orjson.dumps({"image": rows}, option=orjson.OPT_SERIALIZE_NUMPY)


def digit_shots(
    models: Sequence[str],
    images: NDArray[np.float32],
    *,
    exponent: float,
    batch: int,
    seed: int,
    distinct: int = 64,
    headers: Mapping[str, tuple[tuple[str, str], ...]] | None = None,
    order: Sequence[int] | None = None,
) -> Iterator[BenchRequest]:
    """Endless shots: models by Zipf, bodies from a pool that is encoded once.

    Parameters
    ----------
    images
        Model-ready rows ``(N, C, H, W)`` to draw from.
    batch
        Rows in one request.
    distinct
        Different bodies in the pool: enough that nothing can be cached by content, few enough that
        encoding does not count.
    headers
        More headers, by model.
    order
        Index of the model of each shot; the shots end with it. None: endless, drawn by ``exponent``.
    """
    random = np.random.default_rng(seed)
    bodies = [encode_json(images[random.integers(0, len(images), batch)]) for _ in range(distinct)]
    shares = zipf_shares(len(models), exponent)
    more = headers or {}
    for number in order or ():
        name = models[number]
        yield BenchRequest(name, bodies[random.integers(0, distinct)], headers=more.get(name, ()))
    while order is None:
        chosen = random.choice(len(models), size=4096, p=shares)
        bodies_chosen = random.integers(0, distinct, size=4096)
        for model, body in zip(chosen.tolist(), bodies_chosen.tolist(), strict=True):
            name = models[model]
            yield BenchRequest(name, bodies[body], headers=more.get(name, ()))
