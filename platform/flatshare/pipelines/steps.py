"""What a pipeline's step is, and where it is found: a class with a ``run``, named by an entry point."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final, Protocol, cast

import numpy as np
import orjson
from numpy.typing import NDArray

from flatshare.errors import BadInput, SettingsError, StepFailed

__all__ = ["ENTRY_POINTS", "Step", "arrays_of", "batch_of", "step_class", "step_names"]

ENTRY_POINTS: Final = "flatshare.pipelines"


class Step(Protocol):
    """What runs before a pipeline's model; made once a replica, without arguments.

    ``run`` may be a coroutine. One that is not is called in a thread, one batch at a time.
    """

    def run(self, batch: dict[str, Any]) -> Mapping[str, Any] | Awaitable[Mapping[str, Any]]:
        """Turn a request's batch into what the model takes, under the name of the model's input.

        Raises
        ------
        BadInput
            The caller's mistake: 400, with its message. Any other exception is the step's own: 500, and its
            message is only in the log.
        """
        ...


def step_names() -> list[str]:
    """Names of pipelines whose steps are installed."""
    return sorted({one.name for one in entry_points(group=ENTRY_POINTS)})


def step_class(name: str, path: str = "") -> Callable[[], Step]:
    """The class of a pipeline's step.

    Parameters
    ----------
    path
        ``module:Class``; empty for the entry point of this name.

    Raises
    ------
    SettingsError
        There is none, it can't be imported, or has no ``run``.
    """
    if not path:
        found = next((one.value for one in entry_points(group=ENTRY_POINTS) if one.name == name), None)
        if found is None:
            raise SettingsError(
                f"there is no pipeline {name}: installed are {', '.join(step_names()) or 'none'}; a step of "
                f'your own is named by "step": "module:Class"'
            )
        path = found
    if ":" not in path:
        raise SettingsError(f"the step of pipeline {name}, {path}, is not named as module:Class")
    try:
        made = EntryPoint(name, path, ENTRY_POINTS).load()
    except (ImportError, AttributeError, ValueError) as error:
        raise SettingsError(f"the step of pipeline {name} can't be imported from {path}: {error}") from error
    if not inspect.isclass(made) or not callable(getattr(made, "run", None)):
        raise SettingsError(f"the step of pipeline {name}, {path}, is no class with a method run(batch)")
    return cast("Callable[[], Step]", made)


def batch_of(body: bytes) -> dict[str, Any]:
    """A request's batch: a JSON object, or the JSON string of one (what the notebook sends).

    Raises
    ------
    BadInput
        It is neither.
    """
    try:
        batch = orjson.loads(body)
        if isinstance(batch, str):
            batch = orjson.loads(batch)
    except orjson.JSONDecodeError as error:
        raise BadInput(f"the body is not JSON: {error}") from None
    if not isinstance(batch, dict):
        raise BadInput("the body must be a JSON object")
    return batch


def arrays_of(made: object) -> dict[str, NDArray[Any]]:
    """What a step made, as arrays.

    Raises
    ------
    StepFailed
        It is no mapping of names to rectangular arrays of numbers.
    """
    if not isinstance(made, Mapping):
        raise StepFailed("the step did not return a mapping of names to arrays")
    found: dict[str, NDArray[Any]] = {}
    for name, value in made.items():
        try:
            array = np.asarray(value)
        except ValueError:
            array = np.empty(0, object)
        if array.dtype.kind not in "fiub" or not isinstance(name, str):
            raise StepFailed(f"the step returned no rectangular array of numbers as {str(name)[:80]!a}")
        found[name] = array
    return found
